"""The command `headkv`: see the methods at work on a real model, and measure what kind its heads are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv.heads.profile import KINDS

if TYPE_CHECKING:
    from headkv.evaluation.compare import Result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for arguments that can not be served."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"headkv {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    top = argparse.ArgumentParser(prog="headkv", description="Head-specific KV-cache compression.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo",
        help="every method on one prompt with hidden facts: memory, speed, answers",
        description="Hide facts in a text, compress SmolLM2's cache by every method, and ask for the facts.",
    )
    show.add_argument("--tokens", type=int, default=4000, help="length of the context (default: 4000)")
    show.add_argument("--share", type=float, default=0.2, help="share of the cache to keep (default: 0.2)")
    show.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods, e.g. AdaKV SnapKV")
    show.add_argument("--new-tokens", type=int, default=12, help="tokens of each answer (default: 12)")
    show.add_argument(
        "--picture", type=Path, default=Path("headkv-demo.png"), help="(default: headkv-demo.png)"
    )
    show.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    show.set_defaults(run=demo)

    measure = commands.add_parser(
        "profile",
        help="measure a score for every head of a model",
        description="Measure what kind each head is, and write a profile that HeadKV, DuoAttention and "
        "RazorAttention read.",
    )
    measure.add_argument("--kind", choices=KINDS, required=True, help="what to measure")
    measure.add_argument("--model", default="smollm2", help="smollm2, or a transformers name or folder")
    measure.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    measure.set_defaults(run=profile)
    return top


def demo(options: argparse.Namespace) -> None:
    """`headkv demo`."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    import headkv
    from headkv.data import haystack
    from headkv.evaluation.compare import compare, smollm2_methods
    from headkv.evaluation.plots import plot_lengths

    if not 0 < options.share <= 1:
        raise ValueError(f"--share must be in (0, 1], got {options.share}")
    if options.new_tokens < 2:
        raise ValueError(f"--new-tokens must be at least 2, got {options.new_tokens}")
    console = _console()
    model, tokenizer = headkv.load_smollm2()
    document = haystack(tokenizer, options.tokens)
    n = document.context_ids.shape[1]
    methods = smollm2_methods(options.share, n)
    if unknown := set(options.methods or ()) - set(methods):
        raise ValueError(f"--methods must be of {', '.join(methods)}, got {', '.join(sorted(unknown))}")
    chosen = {name: m for name, m in methods.items() if not options.methods or name in options.methods}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    results = []
    with Progress(
        *columns, *Progress.get_default_columns()[1:2], console=console, transient=True
    ) as progress:
        task = progress.add_task("prefill", total=len(chosen) + 1)
        for result in compare(
            model,
            tokenizer,
            document,
            chosen,
            max_new_tokens=options.new_tokens,
            on_step=lambda name: progress.update(task, description=f"{name}: {n} tokens"),
        ):
            results.append(result)
            progress.advance(task)
    plot_lengths(results, n).savefig(options.picture, dpi=150)
    if options.json:
        summary = {"tokens": n, "share": options.share, "picture": str(options.picture)}
        print(json.dumps({**summary, "results": [result.to_json() for result in results]}, indent=2))
    else:
        _print_table(results, document.facts, n)
        print(f"\nPer-head lengths: {options.picture}")


def profile(options: argparse.Namespace) -> None:
    """`headkv profile`."""
    from headkv.evaluation.profiling import run_profile

    if not options.out.parent.is_dir():
        raise ValueError(f"--out must be in a folder that exists, got {options.out}")
    result = run_profile(options.kind, options.model, options.out)
    print(
        f"{options.out}: {result.kind} scores of {result.num_layers} x {result.num_heads} {result.heads} heads"
    )


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _print_table(results: Sequence[Result], facts: Sequence[Any], tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    full = results[0]
    table = Table(title=f"SmolLM2-135M-Instruct, {tokens} tokens, {full.asked} hidden facts")
    table.add_column("method", no_wrap=True)
    for heading in ("stored", "our count", "resident", "decode", "against full", "right", "question unseen"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answers: " + ", ".join(fact.answer for fact in facts))
    for result in results:
        resident = "-" if result.resident_bytes is None else f"{result.resident_bytes / 1e6:.1f} MB"
        table.add_row(
            result.name,
            f"{result.stored_share:.1%}",
            f"{result.nbytes / 1e6:.1f} MB",
            resident,
            f"{1000 / result.decode_ms:.1f} tok/s",
            f"{full.decode_ms / result.decode_ms:.2f} x",
            f"{result.right} / {result.asked}",
            f"{result.right_unseen} / {result.asked}",
            " | ".join(answer.split("\n")[0][:12] for answer in result.answers),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    sys.exit(main())
