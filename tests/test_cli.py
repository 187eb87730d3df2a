"""The command `headkv`: its help, its errors, and the demo on a short document with the real model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib.util import find_spec

import pytest
import torch
from letters import letters

import headkv
from headkv._table import table
from headkv.cache import rust, triton
from headkv.cli import PROFILE_HELP, main, parser
from headkv.evaluation.profiling import PROFILERS, WAYS, profile_options
from headkv.heads import KINDS, HeadProfile
from headkv.models import tiny_model


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["profile"], ["eval"], ["report"], ["compare"], ["info"]],
    ids=["headkv", "demo", "profile", "eval", "report", "compare", "info"],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    assert "usage: headkv" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"headkv {headkv.__version__}\n"


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["headkv"] == headkv.__version__ and found["versions"]["python"] in sys.version
    assert {name: backend["available"] for name, backend in found["backends"].items()} == {
        "reference": True,
        "rust": rust.available(),
        "triton": triton.available(),
    }
    if rust.available():
        assert found["backends"]["rust"]["detail"] == ", ".join(rust.extension().instruction_sets())


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"headkv          {headkv.__version__}\n" in shown and "\n  reference     yes  plain torch" in shown
    )


# what is not there -> what `info` says
GONE = {
    "matplotlib": ("plots", "pip install 'headkv[plots]'"),
    "anywidget": ("widgets", "pip install 'headkv[widgets]'"),
    "lm_eval": ("eval", "pip install 'headkv[eval]'"),
    "ray": ("eval on several workers", "pip install 'headkv[ray]'"),
    "headkv._rust": ("rust backend (fast on a CPU)", rust.INSTALL),
    "headkv_kernels": ("triton backend (fast on a GPU)", triton.INSTALL),
}


@pytest.mark.parametrize("module", GONE)
def test_info_says_how_to_install_what_is_missing(module, monkeypatch, capsys):
    purpose, line = GONE[module]
    monkeypatch.setattr("headkv.info.find_spec", lambda name: None if name == module else find_spec(name))
    if module == "headkv._rust":
        monkeypatch.setattr(rust, "available", lambda: False)
    if module == "headkv_kernels":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
        monkeypatch.setattr(triton, "available", lambda: False)
    assert main(["info"]) == 0
    assert f"missing\n  {purpose}: {line}\n" in capsys.readouterr().out


BAD = {
    "share 0": (["demo", "--share", "0"], "--share must be in (0, 1], got 0.0"),
    "no text": (["demo", "--texts", "0"], "--texts must be at least 1, got 0"),
    "no room for the facts": (["demo", "--tokens", "20"], "num_tokens"),
    "unknown method": (
        ["demo", "--tokens", "300", "--methods", "Magic"],
        "--methods must be of StreamingLLM, SnapKV",
    ),
    "no such folder": (
        ["profile", "--kind", "echo", "--out", "no/such/folder/x.json"],
        "--out must be a file in a folder that exists, got no/such/folder/x.json",
    ),
    "a folder": (
        ["profile", "--kind", "echo", "--out", "."],
        "--out must be a file in a folder that exists, got .",
    ),
    "no such model": (
        ["profile", "--kind", "echo", "--out", "x.json", "--model", "no/such/model"],
        "model must be 'smollm2', 'smollm2-tuned', or the name or folder of a transformers decoder with its tokenizer, got 'no/such/model'",
    ),
    "no such device": (
        ["profile", "--kind", "echo", "--out", "x.json", "--device", "abacus"],
        "device must be one that torch has here, got 'abacus'",
    ),
    "of another kind": (
        [
            "profile",
            "--kind",
            "echo",
            "--out",
            "x.json",
            "--steps",
            "5",
            "--repeats",
            "2",
            "--learning-rate",
            "1",
        ],
        "options of --kind echo must be of --num-tokens, --repeats, --seeds, got --steps, --learning-rate",
    ),
    "no such task": (["eval", "--tasks", "hellaswag"], "tasks must be one of 'niah_single_1', "),
    "too short": (
        ["eval", "--tasks", "ruler_vt", "--lengths", "500"],
        "lengths must be an int of at least 1000, got 500",
    ),
    "no such budget": (["eval", "--budget", "2.0"], "budget must be a number in [0, 1], got 2.0"),
    "no kind": (["profile", "--out", "x.json"], "--kind and --out must be given, or the word compare"),
    "no file": (["profile", "--kind", "echo"], "--kind and --out must be given, or the word compare"),
    "no such way": (
        ["profile", "--kind", "echo", "--way", "cached", "--out", "x.json"],
        "way must be left out for kind 'echo', got 'cached'",
    ),
    "of another way": (
        ["profile", "--kind", "gate", "--way", "published", "--out", "x.json", "--penalties", "1", "2"],
        "options of --kind gate --way published must be of --steps, --lengths, --sinks, --recent, --passkeys, --words, "
        "--learning-rate, --penalty, --seed, got --penalties",
    ),
    "compare: no such profile": (
        ["profile", "compare", "smollm2-magic"],
        "name must be one of 'smollm2-ablation'",
    ),
    "compare: no such file": (
        ["profile", "compare", "no/such.json"],
        "No such file or directory: 'no/such.json'",
    ),
    "compare: the same name": (
        ["profile", "compare", "smollm2-echo", "smollm2-echo"],
        "FILE must be files with names of their own, got smollm2-echo, smollm2-echo",
    ),
    "near another kind's": (
        ["profile", "--kind", "retrieval", "--out", "x.json", "--seed", "5"],
        "options of --kind retrieval must be of --lengths, --depths, got --seed",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder)
    letters().save_pretrained(folder)
    return str(folder)


# options, and as the file must record them
RUNS = {
    "--kind echo": (
        "--num-tokens 16 --repeats 3 --seeds 4 5",
        {"num_tokens": 16, "repeats": 3, "seeds": [4, 5]},
    ),
    "--kind induction": ("--num-tokens 60", {"num_tokens": 60, "repeats": 4, "seeds": [0, 1, 2]}),
    "--kind gate --way published": (
        "--steps 2 --lengths 400 420 --sinks 4 --recent 32 --passkeys 1 --words 2 --learning-rate 0.1 --seed 7",
        {
            **{"steps": 2, "lengths": [400, 420], "sinks": 4, "recent": 32, "passkeys": 1, "words": 2},
            **{"learning_rate": 0.1, "penalty": 0.05, "seed": 7},
        },
    ),
    "--kind reconstruction": (
        "--lengths 700 800 --texts 2 --chunk 300 --seed 3",
        {"lengths": [700, 800], "texts": 2, "chunk": 300, "seed": 3},
    ),
}


@pytest.mark.parametrize("which", RUNS)
def test_a_profile_records_what_made_it(which, tiny, tmp_path, capsys):
    arguments, recorded = RUNS[which]
    out = tmp_path / "heads.json"
    command = ["profile", *which.split(), "--model", tiny, "--out", str(out)]
    kind, *way = which.split()[1::2]
    assert main([*command, *arguments.split()]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: {kind} scores of 3 x ")
    assert "100%" in shown.err, "a progress bar"
    made = HeadProfile.load(out)
    versions = made.parameters.pop("versions")
    assert versions["torch"] == torch.__version__ and versions["device"] == "cpu"
    assert made.parameters == recorded and made.kind == kind
    assert recorded.keys() == profile_options(kind, *way).keys()
    before = out.read_bytes()
    assert main(command) == 2
    assert (
        f"--out must be a new file, got {out}, which exists; --force replaces it" in capsys.readouterr().err
    )
    assert out.read_bytes() == before
    assert main([*command, *arguments.split(), "--force"]) == 0
    assert torch.equal(HeadProfile.load(out).scores, made.scores)


def test_a_model_that_can_not_answer_is_named(tiny, tmp_path, capsys):
    out = tmp_path / "heads.json"
    for kind, options, asked in (
        ("retrieval", "--lengths 700 --depths 0.5", 1),
        ("gate", "--lengths 700 --texts 1 --kinds words numbers --each 1", 2),
        ("ablation", "--lengths 700 --texts 2 --kinds words", 2),
    ):
        command = ["profile", "--kind", kind, "--model", tiny, "--out", str(out), "--force"]
        assert main([*command, *options.split()]) == 2
        assert f"headkv profile: the model answered none of {asked} questions" in capsys.readouterr().err
        assert not out.exists()


def test_every_option_of_every_kind_has_its_help(capsys):
    assert PROFILERS.keys() == set(KINDS)
    ways = [(kind, way) for kind in PROFILERS for way in WAYS.get(kind, (None,))]
    assert set(PROFILE_HELP) == {name for kind, way in ways for name in profile_options(kind, way)}
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for group in (
        "echo, induction",
        "gate",
        "gate --way published",
        "ablation",
        "retrieval, retrieval-reasoning",
        "retrieval, retrieval-reasoning, gate, gate --way published, ablation, reconstruction",
    ):
        assert f"options of --kind {group}:" in shown
    assert "--learning-rate X the greatest (default: 0.02)" in shown
    assert (
        "retrieval: 500 1000 2000; retrieval-reasoning: 500 1000 2000; gate: 1000 2000; gate --way" in shown
    )


def test_the_shipped_profiles_are_what_their_commands_make(repository):
    """The commands of the folder's README, with the defaults of today, are the parameters that the files record."""
    folder = repository / "headkv" / "heads" / "data"
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("headkv ")]
    files = set()
    for line in lines:
        options = vars(parser().parse_args(shlex.split(line)[1:]))
        shipped = HeadProfile.load(folder / options["out"])
        own = profile_options(options["kind"], options["way"])
        wanted = {name: options.get(name, default) for name, default in own.items()}
        recorded = {name: shipped.parameters[name] for name in own}
        assert recorded == json.loads(json.dumps(wanted)) and shipped.kind == options["kind"], line
        files.add(options["out"].name)
    assert files == {path.name for path in folder.glob("*.json")}


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    """Uniform and head-specific budgets on a short text: real shares, bytes that follow them, lines as they come."""
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "demo.png"
    arguments = ["demo", "--tokens", "400", "--texts", "1", "--share", "0.2", "--methods", "SnapKV", "KVzip"]
    assert main([*arguments, "--picture", str(picture), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    full, snap, zipped = summary["results"]
    assert full["stored_share"] == 1 and full["unseen"]["right"] == full["seen"]["right"] == 2
    assert [x["stored_share"] for x in (snap, zipped)] == pytest.approx([0.2, 0.2], abs=0.01)
    # 80 entries a head and head room for 64 more, against 400
    assert max(snap["nbytes"], zipped["nbytes"]) < 0.45 * full["nbytes"]
    assert zipped["unseen"]["right"] > snap["unseen"]["right"]
    low, high = zipped["unseen"]["interval"]
    assert 0 <= low < zipped["unseen"]["right"] / 2 <= high <= 1
    assert picture.stat().st_size > 10_000
    picture.unlink()
    assert main([*arguments[:-1]]) == 0
    shown = capsys.readouterr().out
    assert "question unseen" in shown and shown.count(" of 2 ") == 4
    assert list(tmp_path.iterdir()) == [], "no picture unasked"


def test_a_table_is_aligned():
    rows = [
        {"method": "AdaKV", "MB": 39.9, "answer": "4 boats"},
        {"method": "none", "MB": 183.5, "answer": ""},
    ]
    assert table(rows, words=("method", "answer")).splitlines() == [
        "method     MB  answer",
        "──────  ─────  ───────",
        "AdaKV    39.9  4 boats",
        "none    183.5",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows must hold at least one row, got none"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "rows must have the columns ['a', 'b'], got ['b', 'a']"),
    ],
    ids=["no row", "other columns"],
)
def test_a_table_needs_rows_of_equal_columns(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        table(rows)
