"""The command `headkv`: see the methods at work on a real model, and measure what kind its heads are."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headkv
from headkv._config import model_name
from headkv._table import table
from headkv.evaluation.commands import add_commands
from headkv.evaluation.profiling import WAYS, profile_options, run_profile
from headkv.heads.profile import KINDS

if TYPE_CHECKING:
    from headkv.evaluation.compare import Result
    from headkv.evaluation.profile_compare import Cell

PROFILE_HELP = {
    "num_tokens": "length of the random block",
    "repeats": "how often the block stands in the text",
    "seeds": "one text each; the scores are means",
    "lengths": "of the texts, in tokens; gate --way published: the least and the greatest",
    "depths": "where the fact is hidden, from 0 to 1",
    "steps": "of the optimiser, one text each",
    "kinds": "of the hidden facts",
    "texts": "how many texts with hidden facts",
    "each": "facts of each kind in each text",
    "recent_share": "share of the text, at its end, that a streaming head keeps",
    "greedy": "so many heads are chosen one after another on top",
    "penalties": "weights of the mean gate; the score is the mean over them",
    "validation": "texts with other people, words and prose to judge the gates on",
    "chunk": "tokens that are read again at a time",
    "sinks": "first entries that a windowed head sees",
    "recent": "last entries that a windowed head sees",
    "passkeys": "hidden in each text",
    "words": "of each passkey",
    "learning_rate": "the greatest",
    "penalty": "weight of the mean of the gates",
    "seed": "of the texts",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for arguments that can not be served."""
    words, rest = list(sys.argv[1:] if arguments is None else arguments), []
    if words[:1] == ["lm-eval"]:  # what follows is for another command, and argparse would read it
        words, rest = words[:1], words[1:]
    options = parser().parse_args(words, argparse.Namespace(rest=rest, given=words))
    try:
        options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"headkv {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    top = argparse.ArgumentParser(prog="headkv", description="Head-specific KV-cache compression.")
    top.add_argument("--version", action="version", version=f"headkv {headkv.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo",
        help="which head keeps matters: every method at equal bytes, the question seen and unseen",
        description="Hide facts in a few texts, compress SmolLM2's cache by every method to the same share, and ask "
        "for the facts: with the question at the end of the compressed prompt (seen), and after a text that was "
        "compressed before anybody asked (unseen).",
    )
    show.add_argument(
        "--model",
        choices=("plain", "tuned"),
        default="plain",
        help="SmolLM2 as it is, or tuned to find needles (default: plain)",
    )
    show.add_argument("--tokens", type=int, default=800, metavar="N", help="of each text (default: 800)")
    show.add_argument(
        "--texts", type=int, default=6, metavar="N", help="each with two questions (default: 6)"
    )
    show.add_argument(
        "--share", type=float, default=0.1, metavar="X", help="share of the cache to keep (default: 0.1)"
    )
    show.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods, e.g. SnapKV KVzip")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="of the texts (default: 0)")
    show.add_argument("--picture", type=Path, metavar="FILE", help="draw each head's entries to this file")
    show.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    show.set_defaults(run=demo)

    measure = commands.add_parser(
        "profile",
        help="measure a score for every head of a model",
        description="Measure what kind each head is, and write a profile that HeadKV, DuoAttention and "
        "RazorAttention read.",
    )
    measure.add_argument("--kind", choices=KINDS, help="what to measure")
    measure.add_argument(
        "--way", choices=sorted({way for ways in WAYS.values() for way in ways}), help=_ways()
    )
    measure.add_argument(
        "--model", default="smollm2", help="smollm2, smollm2-tuned, or a transformers name or folder"
    )
    measure.add_argument("--out", type=Path, help="the JSON file to write")
    measure.add_argument("--force", action="store_true", help="replace that file if it exists")
    measure.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    _add_profile_options(measure)
    measure.set_defaults(run=profile)
    actions = measure.add_subparsers(dest="action", metavar="compare", title="or")
    beside = actions.add_parser(
        "compare",
        help="compare profiles: answers right against heads kept",
        description="Ask about held-out texts, the question unseen, with the first heads of each profile full and the "
        "others streaming.",
    )
    beside.add_argument("files", nargs="+", metavar="FILE", help="profiles, or names of shipped ones")
    beside.add_argument(
        "--model", default="smollm2", help="smollm2, smollm2-tuned, or a transformers name or folder"
    )
    beside.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    beside.add_argument("--heads", **numbers, default=[9, 13, 18, 27], help="KV heads that keep all")
    beside.add_argument(
        "--lengths", **numbers, default=[1000], help="of the texts, in tokens (default: 1000)"
    )
    beside.add_argument(
        "--kinds", nargs="+", default=["words", "numbers"], metavar="KIND", help="of the needles"
    )
    beside.add_argument("--texts", type=int, default=16, help="for each kind and length, two questions each")
    beside.add_argument("--seed", type=int, default=0, help="of the texts")
    beside.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    beside.add_argument("--picture", type=Path, help="also draw the answers against the heads, to this file")
    beside.set_defaults(run=compare_files)

    add_commands(commands)

    what = commands.add_parser(
        "info",
        help="versions, backends, and what is missing",
        description="Say what runs here: versions, backends, and what is missing with the line that installs it.",
    )
    what.add_argument("--json", action="store_true", help="print one JSON object")
    what.set_defaults(run=show_info)
    return top


def _ways() -> str:
    return "; ".join(
        f"{kind}: {', '.join(ways)} (default: {next(iter(ways))})" for kind, ways in WAYS.items()
    )


def _add_profile_options(command: argparse.ArgumentParser) -> None:
    """Every option of every profiler, in a group that names the kinds it belongs to; those not given stay away."""
    defaults: dict[str, dict[str, Any]] = {}  # option -> kind -> default
    for kind in KINDS:
        for number, way in enumerate(WAYS.get(kind, (None,))):
            for name, default in profile_options(kind, way).items():
                defaults.setdefault(name, {})[f"{kind} --way {way}" if number else kind] = default
    groups: dict[tuple[str, ...], Any] = {}
    for name, by_kind in defaults.items():
        kinds = tuple(by_kind)
        if kinds not in groups:
            groups[kinds] = command.add_argument_group(f"options of --kind {', '.join(kinds)}")
        texts = {kind: _words(default) for kind, default in by_kind.items()}
        default = "; ".join(f"{kind}: {text}" for kind, text in texts.items())
        if len(set(texts.values())) == 1:
            default = texts[kinds[0]]
        example = by_kind[kinds[0]]
        kind_of_value = type(example[0] if isinstance(example, tuple) else example)
        groups[kinds].add_argument(
            _flag(name),
            type=kind_of_value,
            nargs="+" if isinstance(example, tuple) else None,
            default=argparse.SUPPRESS,
            metavar={float: "X", int: "N"}.get(kind_of_value, "NAME"),
            help=f"{PROFILE_HELP[name]} (default: {default})",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def demo(options: argparse.Namespace) -> None:
    """`headkv demo`."""
    from tqdm import tqdm

    from headkv.data.chat import repeat_request
    from headkv.data.needles import needle_texts
    from headkv.evaluation.compare import compare, smollm2_methods, steps
    from headkv.evaluation.plots import plot_lengths
    from headkv.evaluation.roster import reader

    if not 0 < options.share <= 1:
        raise ValueError(f"--share must be in (0, 1], got {options.share}")
    if options.texts < 1:
        raise ValueError(f"--texts must be at least 1, got {options.texts}")
    tuned = options.model == "tuned"
    model, tokenizer = headkv.load_smollm2(tuned=tuned)
    entries = smollm2_methods(options.share, reader(repeat_request(tokenizer)), tuned=tuned)
    if unknown := set(options.methods or ()) - set(entries):
        raise ValueError(f"--methods must be of {', '.join(entries)}, got {', '.join(sorted(unknown))}")
    entries = {name: x for name, x in entries.items() if not options.methods or name in options.methods}
    texts = needle_texts(
        tokenizer,
        texts=options.texts,
        lengths=[options.tokens],
        kinds=("words", "numbers"),
        seed=options.seed,
        split="validation",
    )
    tokens, questions = texts[0].context_ids.shape[1], sum(len(text.needles) for text in texts)
    print(
        f"SmolLM2-135M-Instruct, {options.model}: {questions} questions about {len(texts)} texts of about {tokens} "
        f"tokens, {options.share:.0%} of the cache kept\n",
        file=sys.stderr,
    )
    results: list[Result] = []
    with tqdm(total=steps(texts, entries), leave=False, file=sys.stderr) as bar:

        def on_step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for result in compare(model, texts, entries, on_step=on_step):
            results.append(result)
            if not options.json:
                bar.clear()
                for line in _demo_lines(result, results[0], first=len(results) == 1):
                    print(line, flush=True)
    if options.picture is not None:
        plot_lengths(results, tokens).savefig(options.picture, dpi=150)
        print(f"Entries of each head: {options.picture}", file=sys.stderr)
    if options.json:
        about = {name: getattr(options, name) for name in ("model", "share", "seed")}
        print(json.dumps({**about, "tokens": tokens, "results": [x.to_json() for x in results]}, indent=2))


def profile(options: argparse.Namespace) -> None:
    """`headkv profile`."""
    if options.kind is None or options.out is None:
        raise ValueError("--kind and --out must be given, or the word compare with the files to compare")
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {options.out}")
    if options.out.exists() and not options.force:
        raise ValueError(f"--out must be a new file, got {options.out}, which exists; --force replaces it")
    own = profile_options(options.kind, options.way)
    given = {name: getattr(options, name) for name in PROFILE_HELP if hasattr(options, name)}
    if foreign := [_flag(name) for name in given if name not in own]:
        allowed = ", ".join(map(_flag, own))
        kind = options.kind if options.way is None else f"{options.kind} --way {options.way}"
        raise ValueError(f"options of --kind {kind} must be of {allowed}, got {', '.join(foreign)}")
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    result = run_profile(
        options.kind, options.model, options.out, way=options.way, device=options.device, **given
    )
    for entry in result.parameters.get("log", ()):
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in entry.items()))
    shape = f"{result.num_layers} x {result.num_heads} {result.heads} heads"
    print(f"{options.out}: {result.kind} scores of {shape}")


def compare_files(options: argparse.Namespace) -> None:
    """`headkv profile compare`."""
    from headkv.evaluation.profile_compare import compare_profiles, overlap, plot_cells, rank_correlation
    from headkv.evaluation.profiling import load_on
    from headkv.evaluation.sweep import where
    from headkv.heads import HeadProfile

    profiles = {}
    for name in options.files:
        there = Path(name).exists() or name.endswith(".json")
        profiles[Path(name).stem] = HeadProfile.load(name) if there else HeadProfile.builtin(name)
    if len(profiles) < len(options.files):
        raise ValueError(f"FILE must be files with names of their own, got {', '.join(options.files)}")
    model, tokenizer = load_on(options.device, options.model)
    cells = compare_profiles(
        model,
        tokenizer,
        profiles,
        heads=options.heads,
        kinds=options.kinds,
        lengths=options.lengths,
        texts=options.texts,
        seed=options.seed,
        progress=True,
    )
    heads = model.config.get_text_config().num_key_value_heads
    scores = {name: profile.kv_scores(heads) for name, profile in profiles.items()}
    pairs = [
        {
            "profiles": [first, second],
            "rank_correlation": rank_correlation(scores[first], scores[second]),
            "overlap": {k: round(overlap(scores[first], scores[second], k), 4) for k in options.heads if k},
        }
        for number, first in enumerate(scores)
        for second in list(scores)[number + 1 :]
    ]
    if options.picture is not None:
        plot_cells(cells).savefig(options.picture, dpi=150)
    if options.json:
        about = {
            "command": shlex.join(["headkv", *options.given]),
            "model": model_name(model),
            **where(model),
            **{name: getattr(options, name) for name in ("texts", "seed")},
        }
        print(json.dumps({**about, "cells": [cell.to_json() for cell in cells], "pairs": pairs}, indent=2))
    else:
        _print_comparison(cells, pairs)


def show_info(options: argparse.Namespace) -> None:
    """`headkv info`."""
    from headkv.info import as_text, info

    found = info(headkv.__version__)
    print(json.dumps(found, indent=2) if options.json else as_text(found))


def _demo_lines(result: Result, full: Result, first: bool) -> list[str]:
    """A result as a line of a table, under a heading if it is the first: columns are as wide as they will ever be."""
    from headkv.evaluation.compare import interval

    def right(found: Sequence[bool]) -> str:
        low, high = interval(sum(found), len(found))
        return f"{sum(found):>2} of {len(found)}  ({low:.0%} to {high:.0%})"

    cells = {
        "method": f"{result.name:<24}",
        "heads": f"{result.heads:<13}",
        "stored": f"{result.stored_share:>6.1%}",
        "cache": f"{result.nbytes / 1e6:>6.1f} MB",
        "decode": f"{full.decode_ms / result.decode_ms:>5.2f} x",
        "question seen": f"{right(result.seen):<21}",
        "question unseen": f"{right(result.unseen):<21}",
    }
    line = "  ".join(cells.values())
    if not first:
        return [line]
    heading = "  ".join(name.ljust(len(cell)) for name, cell in cells.items())
    return [heading, "─" * len(heading), line]


def _print_comparison(cells: Sequence[Cell], pairs: Sequence[dict[str, Any]]) -> None:
    for kind, length in dict.fromkeys((cell.kind, cell.length) for cell in cells):
        here = [cell for cell in cells if (cell.kind, cell.length) == (kind, length)]
        full, asked = here[0].full, here[0].asked
        print(f"{kind}, {length} tokens: share of the {full} that the full cache has right, of {asked}")
        rows = []
        for name in dict.fromkeys(cell.profile for cell in here):
            found = {
                f"{cell.heads} heads ({cell.stored:.0%})": f"{cell.right / max(1, cell.full):.2f}"
                for cell in here
                if cell.profile == name
            }
            rows.append({"profile": name, **found})
        print(table(rows, words=("profile",)), end="\n\n")
    for pair in pairs:
        shared = ", ".join(f"{share:.2f} of {k}" for k, share in pair["overlap"].items())
        names = " and ".join(pair["profiles"])
        print(f"{names}: rank correlation {pair['rank_correlation']:.2f}; first heads in common: {shared}")


if __name__ == "__main__":
    sys.exit(main())
