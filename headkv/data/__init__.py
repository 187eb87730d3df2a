"""Text at hand: plain prose written for headkv, facts to hide in it, and the running example of the book."""

from __future__ import annotations

from headkv.data.facts import FACTS, Fact
from headkv.data.haystacks import Haystack, haystack, running_example
from headkv.data.needles import NEEDLE_KINDS, Needle, NeedleText, needle_texts

__all__ = [
    "FACTS",
    "NEEDLE_KINDS",
    "Fact",
    "Haystack",
    "Needle",
    "NeedleText",
    "haystack",
    "needle_texts",
    "running_example",
]
