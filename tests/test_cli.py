"""The command `headkv`: its help, its errors, and the demo on a short document with the real model."""

from __future__ import annotations

import json

import pytest

from headkv.cli import main


@pytest.mark.parametrize("command", [[], ["demo"], ["profile"]], ids=["headkv", "demo", "profile"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    assert "usage: headkv" in capsys.readouterr().out


BAD = {
    "share 0": (["demo", "--share", "0"], "--share must be in (0, 1], got 0.0"),
    "one token": (["demo", "--new-tokens", "1"], "--new-tokens must be at least 2"),
    "no room for the facts": (["demo", "--tokens", "20"], "num_tokens"),
    "unknown method": (["demo", "--tokens", "300", "--methods", "Magic"], "--methods must be of AdaKV"),
    "no such folder": (
        ["profile", "--kind", "echo", "--out", "no/such/folder/x.json"],
        "--out must be in a folder",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_demo(tmp_path, capsys):
    """Two methods on a short document: real shares, bytes that follow them, a picture."""
    picture = tmp_path / "demo.png"
    arguments = ["demo", "--tokens", "400", "--methods", "AdaKV", "DuoAttention", "--new-tokens", "4"]
    assert main([*arguments, "--picture", str(picture), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    full, ada, duo = summary["results"]
    assert full["stored_share"] == 1 and full["right"] == 3, full["answers"]
    assert ada["stored_share"] == pytest.approx(0.2, abs=0.01)
    assert duo["stored_share"] == pytest.approx(0.2, abs=0.03)
    # 80 entries a head and head room for 64 more, against 400
    assert ada["nbytes"] < 0.4 * full["nbytes"]
    assert picture.stat().st_size > 10_000
    assert main([*arguments[:4], "AdaKV", "--new-tokens", "2", "--picture", str(picture)]) == 0
    assert "against full" in capsys.readouterr().out
