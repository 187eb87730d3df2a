"""Documents in a file: the same as made anew, scored as lm-evaluation-harness scores; other files are refused."""

from __future__ import annotations

import gzip
import json

import pytest
from letters import letters

from headkv.cli import main
from headkv.data.chat import chat_frame
from headkv.evaluation.documents import NEEDLES, Found, check, needles, read_documents, write_documents
from headkv.evaluation.harness import samples
from headkv.evaluation.rows import read_rows
from headkv.models import tiny_model
from headkv.models.smollm2 import load_smollm2

REPLIES = ("", "it is {0}.", "{0} and {1}", "IT IS {0}", "\x00{1}\x1f", "nothing")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny):
    tokenizer = letters()
    tokenizer.name_or_path = tiny
    return [
        *samples(tokenizer, "niah_multikey_2", 700, limit=3),
        *samples(tokenizer, "ruler_fwe", 700, limit=2),
    ]


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.jsonl.gz"])
def test_a_file_holds_what_was_made(made, tmp_path, name):
    path, frame = tmp_path / name, chat_frame(letters())
    assert write_documents(path, made, frame) == 5
    give = read_documents(path, letters())
    for task in ("niah_multikey_2", "ruler_fwe"):
        for kept, sample in zip(give(task, 700, 0, 2), (x for x in made if x.task == task), strict=False):
            plain = {k: v for k, v in vars(sample).items() if k != "score"}
            assert {k: v for k, v in vars(kept).items() if k != "score"} == plain
            for reply in REPLIES:
                text = reply.format(*sample.expected, "else")
                assert kept.score(text) == sample.score(text), reply
    assert [x.doc_id for x in give("ruler_fwe", 700, 0, 1)] == [0]
    for asked in (("ruler_fwe", 700, 0, 3), ("ruler_fwe", 700, 1, 1), ("ruler_vt", 700, 0, 1)):
        with pytest.raises(
            ValueError, match=f"documents must hold {asked[3]} of {asked[0]}, length 700, seed"
        ):
            give(*asked)


BAD = {
    "not JSON": (b"documents\n", "must be what headkv documents wrote"),
    "empty": (b"", "must be what headkv documents wrote"),
    "another format": (
        b'{"format": "headkv documents 0", "chat": ["<s>", "\\n"]}\n',
        "must be a file of 'headkv doc",
    ),
    "a list": (b"[]\n", "must be a file of 'headkv doc"),
    "another chat": (
        b'{"format": "headkv documents 1", "chat": ["", ""]}\n',
        "for the model's chat template",
    ),
    "another line": (
        b'{"format": "headkv documents 1", "chat": ["<s>", "\\n"]}\n{"task": 1}\n',
        "with other lines",
    ),
    "cut off": (
        b'{"format": "headkv documents 1", "chat": ["<s>", "\\n"]}\n{"task": ',
        "must be what headkv documents",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused(tmp_path, case):
    content, message = BAD[case]
    (path := tmp_path / "documents.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(path, letters())


def test_a_gzipped_file_that_is_cut_off_is_refused(made, tmp_path):
    path = tmp_path / "documents.gz"
    write_documents(path, made, chat_frame(letters()))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="must be what headkv documents wrote"):
        read_documents(path, letters())
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match="must be what headkv documents wrote"):
        read_documents(path, letters())
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "none.gz", letters())


@pytest.mark.parametrize("task", NEEDLES)
def test_a_needle_stands_in_its_text_beside_others(task):
    _, tokenizer = load_smollm2()
    first, again = (needles(tokenizer, task, 600, seed=3, limit=n) for n in (3, 2))
    assert [x.context for x in again] == [x.context for x in first[:2]]
    assert needles(tokenizer, task, 600, limit=1)[0].context != first[0].context
    for sample in first:
        (answer,) = sample.expected
        assert sample.context.count(answer) >= 1 and answer not in sample.question
        assert (
            sample.context.startswith(chat_frame(tokenizer)[0])
            and chat_frame(tokenizer)[1] in sample.question
        )
        assert len(tokenizer(sample.context)["input_ids"]) <= 600
        assert sample.score(f"It is {answer}.") == 1 and sample.score("I do not know") == 0
        ids = tokenizer(sample.context, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == sample.context, "a text is the same after it was tokenised"


def test_what_is_found():
    assert Found(("a", "Bc"))("xbC") == 0.5


@pytest.mark.parametrize(
    "task, length, message",
    [
        ("needle_music", 1024, "tasks must be one of 'niah_single_1', .*'needle_hops', got 'needle_music'"),
        ("needle_words", 100, "lengths must be an int of at least 256, got 100"),
        ("ruler_vt", 512, "lengths must be an int of at least 1000, got 512"),
    ],
)
def test_what_can_not_be_made(task, length, message):
    with pytest.raises(ValueError, match=message):
        check(task, length)


def test_runs_that_share_a_sweep(made, tiny, tmp_path, capsys):
    """Documents from a file, in two runs of one command and in one; also from the journal of a run that goes on."""
    documents = str(tmp_path / "documents.gz")
    write_documents(documents, made, chat_frame(letters()))
    run = [
        "eval",
        "--model",
        tiny,
        "--tasks",
        "niah_multikey_2",
        "--lengths",
        "700",
        "--documents",
        documents,
    ]
    run += ["--method", "SnapKV", "--budget", "0.5", "--new-tokens", "3"]
    outs = {
        limits: str(tmp_path / f"rows{limits[0]}{limits[1]}.parquet") for limits in ((0, 3), (0, 1), (1, 2))
    }
    for (first, limit), out in outs.items():
        assert main([*run, "--first", str(first), "--limit", str(limit), "--out", out]) == 0
    whole, *parts = outs.values()
    ordered = [sorted((row.to_json() for row in read_rows(*some)), key=str) for some in ([whole], parts)]
    assert ordered[0] == ordered[1] and {row["doc_id"] for row in ordered[0]} == {0, 1, 2}
    merged = str(tmp_path / "all.parquet")
    assert main(["report", *parts, "--rows", merged]) == 0
    assert len(read_rows(merged)) == len(ordered[0])

    rows = [row.to_json() for row in read_rows(whole)]
    journal = tmp_path / "rows.parquet.partial"
    journal.write_text(
        json.dumps({"sweep": 1})
        + "\n"
        + json.dumps({"rows": rows[:4]})
        + "\n"
        + json.dumps({"rows": rows})[:50]
    )
    assert [row.to_json() for row in read_rows(journal)] == rows[:4]
    journal.write_text(json.dumps({"sweep": 1}) + "\n" + '{"pieces": []}\n')
    with pytest.raises(ValueError, match="FILE must be what headkv eval wrote"):
        read_rows(journal)
    capsys.readouterr()
    assert main([*run, "--first", "3", "--limit", "1", "--out", str(tmp_path / "none.parquet")]) == 2
    assert "documents must hold 4 of niah_multikey_2, length 700, seed 0" in capsys.readouterr().err


def test_the_command_writes_a_file(tmp_path, capsys):
    out = str(tmp_path / "needles.jsonl.gz")
    words = ["documents", "--tasks", "needle_words", "needle_hops", "--lengths", "300", "--limit", "2"]
    assert main([*words, "--out", out]) == 0
    assert f"4 documents: {out}" in capsys.readouterr().out
    with gzip.open(out, "rt") as file:
        assert file.readline().startswith('{"format": "headkv documents 1"')
    assert len(read_documents(out, load_smollm2()[1])("needle_hops", 300, 0, 2)) == 2
    assert main(["documents", "--tasks", "needle_music", "--out", out]) == 2
    assert "tasks must be one of" in capsys.readouterr().err
