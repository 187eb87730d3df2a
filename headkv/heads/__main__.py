"""`python -m headkv.heads KIND --out heads.json`: measure a head profile of a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from headkv.heads.profile import KINDS
from headkv.heads.run import run_profile


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, save, and say which heads lead."""
    parser = argparse.ArgumentParser(prog="python -m headkv.heads", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name or folder")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the profiler; VALUE is JSON"
    )
    given = parser.parse_args(arguments)
    try:
        options = dict(_option(text) for text in given.option)
        profile = run_profile(given.kind, given.model, given.out, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    best = profile.scores.flatten().topk(min(5, profile.scores.numel()))
    heads = (
        f"({index // profile.num_heads}, {index % profile.num_heads})" for index in best.indices.tolist()
    )
    leaders = "  ".join(
        f"{head} {score:.3f}" for head, score in zip(heads, best.values.tolist(), strict=True)
    )
    print(f"{given.out}: {profile.kind} of {profile.model}; the first {profile.heads} heads: {leaders}")
    return 0


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    raise SystemExit(main())
