"""A sweep that is killed, at whatever moment, goes on: no row is lost, none is there twice, all are the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet
import pytest
from letters import letters

from headkv.evaluation.harness import Sample
from headkv.evaluation.rows import SweepRow, read_rows, write_rows
from headkv.evaluation.sweep import Asker, Sweep, run_sweep
from headkv.models import tiny_model

SWEEP = Sweep(
    model="tiny",
    methods=("SnapKV", "StreamingLLM"),
    budgets=(0.5, 20),
    tasks=("mills", "harbours"),
    lengths=(60,),
    seeds=(0, 1),
    limit=2,
    max_new_tokens=3,
)
# Tasks, seeds, documents, ways to ask; the full cache and methods x budgets.
ROWS = 2 * 2 * 2 * 2 * (1 + 2 * 2)


def documents(task: str, length: int, seed: int, limit: int) -> list[Sample]:
    """Short texts: what is tested here is that all of them are asked, not what they say."""
    return [
        Sample(
            *(task, length, seed, i),
            f"{task} of Vell are kept by Odile {seed}{i}, as all know.".ljust(length, "."),
            "\nWho keeps them? It is",
            (f"Odile {seed}{i}",),
            8,
            lambda reply: float("e" in reply),
        )
        for i in range(limit)
    ]


def run(out: Path, **options) -> list[SweepRow]:
    answers = partial(map, Asker(SWEEP, tiny_model("llama"), letters()))
    return run_sweep(SWEEP, answers, documents, out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[SweepRow]:
    """The rows of a sweep that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole") / "rows.parquet")


def test_all_is_asked_once(whole):
    assert len(whole) == ROWS == len({row.key for row in whole})
    assert {row.budget for row in whole if row.method != "FullCache"} == {0.5, 20.0}
    for row in whole:
        assert row.depth == pytest.approx(f"{row.task} of Vell are kept by ".__len__() / 60)
        assert row.parameters.startswith(row.method) and row.full_nbytes >= row.nbytes
        assert f"headkv {__import__('headkv').__version__}, lm_eval " in row.versions and row.device == "cpu"
        assert row.tokens == (60 if row.question == "unseen" else 60 + len("\nWho keeps them? It is") - 1)
        assert row.score == float("e" in row.reply)


def test_killed_in_the_middle_it_goes_on(whole, tmp_path):
    """Another process is killed, as the system kills, after the third document."""
    out = tmp_path / "rows.parquet"
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_sweep; from pathlib import Path\n"
        "kill = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 3 else None\n"
        f"test_sweep.run(Path({str(out)!r}), on_document=kill)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists() and (tmp_path / "rows.parquet.partial").exists()
    counts: list[int] = []
    assert run(out, on_document=counts.append) == whole
    assert counts == [4, 5, 6, 7, 8], "three of eight were done"
    assert read_rows(out) == whole and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("cut", [1, 40, 2000], ids=["line break", "end", "middle"])
def test_half_a_line_is_no_line(whole, tmp_path, cut):
    """A kill while a line is written leaves its beginning."""
    out, journal = tmp_path / "rows.parquet", tmp_path / "rows.parquet.partial"

    class Stop(Exception):
        pass

    def stop(done):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(out, on_document=stop)
    journal.write_text(journal.read_text(encoding="utf-8")[:-cut], encoding="utf-8")
    assert run(out) == whole and read_rows(out) == whole


def test_a_kill_between_the_file_and_the_end_of_its_journal(whole, tmp_path):
    out = tmp_path / "rows.parquet"
    run(
        out,
        on_document=lambda done: (
            done == 8 and (tmp_path / "copy").write_bytes((tmp_path / "rows.parquet.partial").read_bytes())
        ),
    )
    (tmp_path / "copy").rename(tmp_path / "rows.parquet.partial")
    assert run(out) == whole and read_rows(out) == whole


def test_another_sweeps_journal_and_a_finished_file_are_refused(whole, tmp_path):
    out = tmp_path / "rows.parquet"
    write_rows(out, whole[:1])
    with pytest.raises(ValueError, match="out must be a new file, got .*rows.parquet, which exists"):
        run(out)
    out.unlink()
    Path(f"{out}.partial").write_text('{"model": "other"}\n')
    with pytest.raises(ValueError, match="is what another run has left"):
        run(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, r"methods must be one or more, each once, got \(\)"),
        ({"seeds": (0, 0)}, r"seeds must be one or more, each once, got \(0, 0\)"),
        ({"budgets": (0.0,)}, "budget must be above 0, got 0.0"),
        ({"budgets": (1.5,)}, r"budget must be a number in \[0, 1\], got 1.5"),
        ({"questions": ("heard",)}, "question must be one of 'seen', 'unseen', 'second', got 'heard'"),
        ({"limit": 0}, "limit must be an int of at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_sweep_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SWEEP, **change)


def test_files_together(whole, tmp_path):
    """Rows that stand in two files count once; columns keep their types."""
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_rows(first, whole[:30])
    write_rows(second, whole[20:])
    assert read_rows(first, second) == whole
    kinds = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(first)}
    assert kinds["score"] == "double" and kinds["nbytes"] == "int64" and kinds["expected"].startswith("list")


def test_only_the_rows_that_are_asked_for(whole, tmp_path):
    write_rows(tmp_path / "rows", whole)
    method, budget = whole[-1].method, whole[-1].budget
    some = read_rows(tmp_path / "rows", method=method, budget=budget)
    assert some == [row for row in whole if (row.method, row.budget) == (method, budget)]
    assert 0 < len(some) < len(whole)
    with pytest.raises(ValueError, match=r"only must name attributes of SweepRow.*\['metod'\]"):
        read_rows(tmp_path / "rows", metod=method)


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="FILE must be what headkv eval wrote, got .*none"):
        read_rows(tmp_path / "none")
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="FILE must be what headkv eval wrote, got .*text: "):
        read_rows(tmp_path / "text")
    import pyarrow

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "other")
    with pytest.raises(
        ValueError, match="rows must have the columns of a sweep, got others: a, answer_tokens"
    ):
        read_rows(tmp_path / "other")
