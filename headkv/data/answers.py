"""Whether a reply says what it must: RULER's string match, arXiv 2404.06654."""

from __future__ import annotations

from collections.abc import Sequence


def share_found(answers: Sequence[str], reply: str) -> float:
    """The share of `answers`, one at least, that stand in `reply`, in any order and case.

    >>> share_found(["Quito", "7"], "It is QUITO.")
    0.5
    """
    reply = reply.casefold()
    return sum(answer.casefold() in reply for answer in answers) / len(answers)
