"""A sweep's documents, answered by the workers of a Ray cluster: of this machine, or of many.

Each worker is a process that has the model. Their rows come back here, so that one journal is written by one hand.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from headkv import _checks
from headkv.evaluation.harness import Sample
from headkv.evaluation.profiling import load_on
from headkv.evaluation.rows import SweepRow
from headkv.evaluation.sweep import Answers, Asker, Sweep

LOCAL = "local"
DEATHS = 3  # workers that one document may cost
STORE = 2**27  # bytes of a local cluster's object store: documents and rows are small
INSTALL = "pip install 'headkv[ray]'"


@contextmanager
def workers(
    sweep: Sweep,
    device: str = "cpu",
    address: str = LOCAL,
    *,
    count: int | None = None,
    gpu_share: float | None = None,
) -> Iterator[Answers]:
    """Workers of a Ray cluster, as `headkv.evaluation.sweep.run_sweep` takes them.

    A worker that is killed is replaced, and the document that it had is given to the next one that is free.

    Args:
        sweep: what is asked; its model must be found under its name on every machine.
        device: where each worker has the model; "cuda" is the card that Ray gives it.
        address: of a cluster, "host:port", or "auto" on one of its machines; "local" starts one on this machine, which
            ends with the sweep.
        count: of workers; None: as many as there is room for. With "cuda" each needs a share of a card, else as many
            cores as torch has threads here; less where more workers are asked for.
        gpu_share: of a card, a worker, in (0, 1]; None: all of it. Only with "cuda".

    Raises:
        ImportError: there is no Ray.
        ConnectionError: there is no cluster at `address`, or none could be started.
        ValueError: a device with a number, a share that is none, or more workers than there is room for.
        RuntimeError: later, while the sweep runs: a document has cost three workers.
    """
    on_cards = device == "cuda"
    if not on_cards and torch.device(device).type == "cuda":
        raise ValueError(f"device must have no number, as Ray gives out the cards, got {device!r}")
    if gpu_share is not None and not (on_cards and 0 < gpu_share <= 1):
        raise ValueError(f"gpu_share must lie in (0, 1], on device 'cuda', got {gpu_share} on {device!r}")
    if count is not None:
        _checks.whole("workers", count, 1)
    ray = _connected(address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if on_cards:
            share = gpu_share or 1.0
            room = sum(int(machine.get("GPU", 0)) * int(1 / share) for machine in machines)
            needs: dict[str, Any] = {"num_cpus": 0, "num_gpus": share}
        else:
            cores = [int(machine.get("CPU", 0)) for machine in machines]
            threads, room = _threads(cores, count)
            needs = {"num_cpus": threads}
        if room < (count or 1):
            raise ValueError(
                f"workers must be at most {room} on {device}, for which the cluster has room, got {count or 1}"
            )
        start = partial(ray.remote(**needs)(_Worker).remote, sweep, device, needs["num_cpus"])
        yield partial(_answers, ray, start, count or room)
    finally:
        ray.shutdown()


class _Worker:
    """A process with the model; Ray makes an actor of it."""

    def __init__(self, sweep: Sweep, device: str, threads: int) -> None:
        self._sweep, self._device = sweep, device
        if threads:
            torch.set_num_threads(threads)

    def load(self) -> None:
        """Load the model; not in `__init__`, where an error of ours would look like a worker's death."""
        self._ask = Asker(self._sweep, *load_on(self._device, self._sweep.model))

    def answer(self, sample: Sample) -> list[SweepRow]:
        return self._ask(sample)


def _answers(
    ray: Any, start: Callable[[], Any], count: int, samples: Iterator[Sample]
) -> Iterator[list[SweepRow]]:
    """The rows of each document, as they come; `start` starts a worker, `count` times at first."""
    free: list[Any] = []
    # What runs: a worker with a document, or without one while it loads the model.
    busy: dict[Any, tuple[Any, Sample | None]] = {}
    deaths: Counter[Sample | None] = Counter()

    def started() -> None:
        worker = start()
        busy[worker.load.remote()] = worker, None

    waiting: deque[Sample] = deque()
    for sample in islice(samples, count):  # no more workers than documents
        waiting.append(sample)
        started()
    while waiting or any(sample for _, sample in busy.values()):
        while free and waiting:
            worker, sample = free.pop(), waiting.popleft()
            busy[worker.answer.remote(replace(sample, score=_not_yet))] = worker, sample
            if not waiting:  # one is made ahead, while the workers are busy
                waiting.extend(islice(samples, 1))
        for task in ray.wait(list(busy))[0]:
            worker, asked = busy.pop(task)
            try:
                rows = ray.get(task)
            except (
                ray.exceptions.RayTaskError
            ) as error:  # the worker lives, and has raised what it would here
                raise error.cause from error
            except ray.exceptions.RayError as error:
                deaths[asked] += 1
                _tell(asked, deaths[asked], error)
                started()
                waiting.extendleft([] if asked is None else [asked])
            else:
                free.append(worker)
                if asked is not None:
                    yield [replace(row, score=asked.score(row.reply)) for row in rows]


def _not_yet(reply: str) -> float:
    """The score of a reply that is on its way here: what scores it holds all of lm-eval's task, and stays."""
    return float("nan")


def _tell(sample: Sample | None, deaths: int, error: Exception) -> None:
    """Warn of a worker's death; raise where there were too many."""
    what = "loading the model"
    if sample is not None:
        what = f"document {sample.doc_id} of {sample.task}, {sample.length} tokens, seed {sample.seed}"
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
    if deaths == DEATHS:
        raise RuntimeError(f"{what}: {DEATHS} workers died of it; the last one: {reason}") from error
    warnings.warn(f"{what}: its worker died, another one takes over: {reason}", RuntimeWarning, stacklevel=2)


def _threads(cores: Sequence[int], count: int | None) -> tuple[int, int]:
    """Threads a worker, and for how many workers that leaves room: torch's own, or fewer so that `count` fit."""
    for threads in range(torch.get_num_threads(), 0, -1):
        room = sum(machine // threads for machine in cores)
        if room >= (count or 1):
            break
    return threads, room


def _connected(address: str) -> Any:
    """Ray, connected to a cluster."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"a sweep with several workers needs Ray: {INSTALL}") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster of ours, nobody is told
        quiet |= {"include_dashboard": False, "object_store_memory": STORE}
    try:
        _knock(address)
        ray.init(address, **quiet)
    except Exception as error:  # Ray's own are of many kinds, plain ones among them
        wanted = "must be a Ray cluster's host:port, auto where one runs here, or local to start one"
        raise ConnectionError(f"address {wanted}, got {address!r}: {error}") from error
    return ray


def _knock(address: str) -> None:
    """Is anybody there? Ray itself would ask for a quarter of an hour."""
    if address not in (LOCAL, "auto") and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
