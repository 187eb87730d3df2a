"""The command `headkv`: see the methods at work on a real model, and measure what kind its heads are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headkv
from headkv._table import table
from headkv.evaluation.profiling import PROFILERS, profile_options, run_profile

if TYPE_CHECKING:
    from headkv.evaluation.compare import Result

PROFILE_HELP = {
    "num_tokens": "length of the random block",
    "repeats": "how often the block stands in the text",
    "seeds": "one text each; the scores are means",
    "lengths": "of the contexts, in tokens; gate: the least and the greatest",
    "depths": "where the fact is hidden, from 0 to 1",
    "steps": "of the optimiser, one text each",
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
    options = parser().parse_args(arguments)
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
        help="every method on one prompt with hidden facts: memory, speed, answers",
        description="Hide facts in a text, compress SmolLM2's cache by every method, and ask for the facts.",
    )
    show.add_argument(
        "--tokens", type=int, default=4000, metavar="N", help="length of the context (default: 4000)"
    )
    show.add_argument(
        "--share", type=float, default=0.2, metavar="X", help="share of the cache to keep (default: 0.2)"
    )
    show.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods, e.g. AdaKV SnapKV")
    show.add_argument(
        "--new-tokens", type=int, default=12, metavar="N", help="tokens of each answer (default: 12)"
    )
    show.add_argument("--picture", type=Path, metavar="FILE", help="draw each head's entries to this file")
    show.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    show.set_defaults(run=demo)

    measure = commands.add_parser(
        "profile",
        help="measure a score for every head of a model",
        description="Measure what kind each head is, and write a profile that HeadKV, DuoAttention and "
        "RazorAttention read.",
    )
    measure.add_argument("--kind", choices=tuple(PROFILERS), required=True, help="what to measure")
    measure.add_argument("--model", default="smollm2", help="smollm2, or a transformers name or folder")
    measure.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    measure.add_argument("--force", action="store_true", help="replace that file if it exists")
    measure.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    _add_profile_options(measure)
    measure.set_defaults(run=profile)

    what = commands.add_parser(
        "info",
        help="versions, backends, and what is missing",
        description="Say what runs here: versions, backends, and what is missing with the line that installs it.",
    )
    what.add_argument("--json", action="store_true", help="print one JSON object")
    what.set_defaults(run=show_info)
    return top


def _add_profile_options(command: argparse.ArgumentParser) -> None:
    """Every option of every profiler, in a group that names the kinds it belongs to; those not given stay away."""
    defaults: dict[str, dict[str, Any]] = {}  # option -> kind -> default
    for kind in PROFILERS:
        for name, default in profile_options(kind).items():
            defaults.setdefault(name, {})[kind] = default
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
        number = type(example[0] if isinstance(example, tuple) else example)
        groups[kinds].add_argument(
            _flag(name),
            type=number,
            nargs="+" if isinstance(example, tuple) else None,
            default=argparse.SUPPRESS,
            metavar="X" if number is float else "N",
            help=f"{PROFILE_HELP[name]} (default: {default})",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def demo(options: argparse.Namespace) -> None:
    """`headkv demo`."""
    from tqdm import tqdm

    from headkv.data import haystack
    from headkv.evaluation.compare import compare, smollm2_methods
    from headkv.evaluation.plots import plot_lengths

    if not 0 < options.share <= 1:
        raise ValueError(f"--share must be in (0, 1], got {options.share}")
    if options.new_tokens < 2:
        raise ValueError(f"--new-tokens must be at least 2, got {options.new_tokens}")
    model, tokenizer = headkv.load_smollm2()
    document = haystack(tokenizer, options.tokens)
    n = document.context_ids.shape[1]
    methods = smollm2_methods(options.share, n)
    if unknown := set(options.methods or ()) - set(methods):
        raise ValueError(f"--methods must be of {', '.join(methods)}, got {', '.join(sorted(unknown))}")
    chosen = {name: m for name, m in methods.items() if not options.methods or name in options.methods}
    results = []
    # The full cache comes first: what the others are compared with.
    with tqdm(total=len(chosen) + 1, leave=False) as bar:
        for result in compare(
            model,
            tokenizer,
            document,
            chosen,
            max_new_tokens=options.new_tokens,
            on_step=bar.set_description,
        ):
            results.append(result)
            bar.update()
    if options.picture is not None:
        plot_lengths(results, n).savefig(options.picture, dpi=150)
    if options.json:
        picture = None if options.picture is None else str(options.picture)
        summary = {"tokens": n, "share": options.share, "picture": picture}
        print(json.dumps({**summary, "results": [result.to_json() for result in results]}, indent=2))
    else:
        _print_table(results, document.facts, n)
    if options.picture is not None:
        print(f"Entries of each head: {options.picture}", file=sys.stderr)


def profile(options: argparse.Namespace) -> None:
    """`headkv profile`."""
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {options.out}")
    if options.out.exists() and not options.force:
        raise ValueError(f"--out must be a new file, got {options.out}, which exists; --force replaces it")
    own = profile_options(options.kind)
    given = {name: getattr(options, name) for name in PROFILE_HELP if hasattr(options, name)}
    if foreign := [_flag(name) for name in given if name not in own]:
        allowed = ", ".join(map(_flag, own))
        raise ValueError(f"options of --kind {options.kind} must be of {allowed}, got {', '.join(foreign)}")
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    result = run_profile(options.kind, options.model, options.out, device=options.device, **given)
    shape = f"{result.num_layers} x {result.num_heads} {result.heads} heads"
    print(f"{options.out}: {result.kind} scores of {shape}")


def show_info(options: argparse.Namespace) -> None:
    """`headkv info`."""
    from headkv.info import as_text, info

    found = info(headkv.__version__)
    print(json.dumps(found, indent=2) if options.json else as_text(found))


def _print_table(results: Sequence[Result], facts: Sequence[Any], tokens: int) -> None:
    full = results[0]
    answers = "answers: " + ", ".join(fact.answer for fact in facts)
    rows = [
        {
            "method": result.name,
            "stored": f"{result.stored_share:.1%}",
            "our count": f"{result.nbytes / 1e6:.1f} MB",
            "resident": "-" if result.resident_bytes is None else f"{result.resident_bytes / 1e6:.1f} MB",
            "decode": f"{1000 / result.decode_ms:.1f} tok/s",
            "against full": f"{full.decode_ms / result.decode_ms:.2f} x",
            "right": f"{result.right} / {result.asked}",
            "question unseen": f"{result.right_unseen} / {result.asked}",
            answers: " | ".join(answer.split("\n")[0][:12] for answer in result.answers),
        }
        for result in results
    ]
    print(f"SmolLM2-135M-Instruct, {tokens} tokens, {full.asked} hidden facts\n")
    print(table(rows, words=("method", answers)))


if __name__ == "__main__":
    sys.exit(main())
