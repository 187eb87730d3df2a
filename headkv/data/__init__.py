"""Text at hand: plain prose written for headkv, facts to hide in it, and the running example of the book."""

from __future__ import annotations

from headkv.data.facts import FACTS, Fact
from headkv.data.haystacks import Haystack, haystack, running_example

__all__ = ["FACTS", "Fact", "Haystack", "haystack", "running_example"]
