"""A sweep on the workers of a Ray cluster: the rows of one process, whoever is killed meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import test_sweep
from letters import letters

from headkv.cli import main
from headkv.evaluation.distributed import DEATHS, _threads, workers
from headkv.evaluation.harness import Sample
from headkv.evaluation.profiling import load_on
from headkv.evaluation.rows import read_rows
from headkv.evaluation.sweep import Answers, Asker, Sweep, run_sweep
from headkv.models import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Eight documents, of a tiny model in a folder: each worker loads it."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_model("llama").save_pretrained(folder)
    letters().save_pretrained(folder)
    return replace(test_sweep.SWEEP, model=folder, max_new_tokens=30)


@pytest.fixture(scope="module")
def two(sweep: Sweep) -> Iterator[Answers]:
    """Two workers of a local cluster."""
    pytest.importorskip("ray", reason="pip install 'headkv[ray]'")
    with ExitStack() as stack:
        try:
            answers = stack.enter_context(workers(sweep, count=2))
        except ConnectionError:  # on a busy machine Ray misses time limits of its own
            answers = stack.enter_context(workers(sweep, count=2))
        yield answers


class Staying:
    """A score that can not be sent to a worker, as lm-eval's hold all of its task."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score, self._stays = score, threading.Lock()

    def __call__(self, reply: str) -> float:
        return self._score(reply)


def documents(task: str, length: int, seed: int, limit: int) -> list[Sample]:
    """Those of the sweep in one process, with replies long enough to be killed in."""
    made = test_sweep.documents(task, length, seed, limit)
    return [replace(x, max_new_tokens=30, score=Staying(x.score)) for x in made]


@contextmanager
def killer(times: int, begin: threading.Event) -> Iterator[list[int]]:
    """Kills workers of this process's cluster that are answering, as the system kills; gives whom, so far."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        begin.wait()
        while len(killed) < times and not over.wait(0.2):  # to look at all processes keeps a core busy
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.cmdline()[:1] == ["ray::_Worker.answer"] and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)
                        break
                except psutil.Error:  # it has ended meanwhile
                    continue

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        begin.set()
        thread.join()


def test_rows_are_those_of_one_process_though_a_worker_is_killed(
    sweep: Sweep, two: Answers, tmp_path: Path
) -> None:
    one = run_sweep(
        sweep, partial(map, Asker(sweep, *load_on("cpu", sweep.model))), documents, tmp_path / "one"
    )
    begin = threading.Event()
    counts: list[int] = []

    def on_document(done: int) -> None:
        counts.append(done)
        if done == 2:
            begin.set()

    with (
        killer(1, begin) as killed,
        pytest.warns(RuntimeWarning, match="its worker died, another one takes over: ") as told,
    ):
        found = run_sweep(sweep, two, documents, tmp_path / "two", on_document=on_document)
    assert len(killed) == 1 and counts == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "document " in str(told[0].message) and "60 tokens, seed" in str(told[0].message)
    assert found == one == read_rows(tmp_path / "two"), "in this order, too"


def test_a_document_that_kills_its_workers_stops_the_sweep(two: Answers) -> None:
    """Of two, the first is asked; whichever of its workers begins is killed."""
    begin = threading.Event()
    begin.set()
    (sample, *_) = documents("mills", 60, 0, 2)
    with (
        killer(DEATHS, begin) as killed,
        pytest.warns(RuntimeWarning, match="document 0 of mills, 60 tokens, seed 0: its worker died"),
        pytest.raises(
            RuntimeError, match=f"document 0 of mills, 60 tokens, seed 0: {DEATHS} workers died of it"
        ),
    ):
        list(two(iter([replace(sample, max_new_tokens=400)])))
    assert len(killed) == DEATHS


def test_what_a_worker_raises_is_raised_here(two: Answers) -> None:
    (sample,) = documents("mills", 60, 0, 1)
    with pytest.raises(ValueError, match="context and question must have at least three tokens"):
        list(two(iter([replace(sample, question="?")])))


def test_a_command_that_was_killed_goes_on(two: Answers, tmp_path: Path) -> None:
    """It joins the cluster, dies after some documents, and is given again, here without the cluster."""
    import ray

    folder = str(tmp_path / "tiny")
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(folder)
    letters().save_pretrained(folder)
    out, journal = tmp_path / "rows", tmp_path / "rows.partial"
    # headkv's own task: lm-eval's are made by an import of ten seconds, which both processes would wait for.
    words = ["eval", "--model", folder, "--tasks", "needle_words", "--lengths", "700", "--limit", "5"]
    words += ["--question", "unseen"]
    words += ["--method", "SnapKV", "--budget", "0.2", "--new-tokens", "40"]
    address = ray.get_runtime_context().gcs_address
    joined = [sys.executable, "-m", "headkv.cli", *words, "--out", str(out)]
    joined += ["--ray", address, "--workers", "1"]
    command = subprocess.Popen(joined, stderr=subprocess.PIPE, text=True)
    while command.poll() is None:
        if journal.exists() and journal.read_text().count("\n") > 2:  # the first line says what is asked
            os.kill(command.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    assert command.wait() == -signal.SIGKILL, command.communicate()[1]
    assert journal.exists() and not out.exists()
    done = journal.read_text().count("\n") - 1
    assert 2 <= done < 5
    assert main([*words, "--out", str(out)]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert read_rows(out) == read_rows(tmp_path / "whole") and len(read_rows(out)) == 10


# command line -> what it says
REFUSED = {
    "nobody there": (["--ray", "127.0.0.1:9"], "address must be a Ray cluster's host:port, .* got '127.0.0.1:9': "),
    "no port": (["--ray", "nowhere"], "address must be a Ray cluster's host:port, .* got 'nowhere': "),
    "a card's number": (["--ray", "--device", "cuda:0"], "device must have no number, .* got 'cuda:0'"),
    "no share": (["--ray", "--device", "cuda", "--gpu-share", "1.5"], r"gpu_share must lie in \(0, 1\], .* got 1.5"),
    "no card": (["--ray", "--gpu-share", "0.5"], "gpu_share must lie in .* on device 'cuda', got 0.5 on 'cpu'"),
    "no workers": (["--ray", "--workers", "0"], "workers must be an int of at least 1, got 0"),
    "no Ray asked for": (["--workers", "2"], "--workers and --gpu-share must be given with --ray"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="pip install 'headkv[ray]'")
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert re.search(f"headkv eval: {message}", said), said


def test_without_ray_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["eval", "--ray"]) == 2
    assert "a sweep with several workers needs Ray: pip install 'headkv[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "count", "expected"),
    [
        ([8], None, (4, 2)),
        ([8, 8, 2], None, (4, 4)),
        ([2], None, (2, 1)),
        ([8], 3, (2, 4)),
        ([6, 6], 4, (3, 4)),
        ([2], 3, (1, 2)),
    ],
)
def test_threads_of_a_worker(
    cores: list[int], count: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as torch has here, four, or fewer so that as many workers fit as were asked for."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert _threads(cores, count) == expected
