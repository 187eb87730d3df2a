"""The commands that measure: `headkv eval`, `report`, `compare`, and `lm-eval`, the harness's own that knows headkv."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from headkv._table import table
from headkv.evaluation.asking import WAYS, ask
from headkv.evaluation.documents import NEEDLES, check, maker, read_documents, write_documents
from headkv.evaluation.roster import BY_SHARE, NAMES, budget_from, roster, share_of, sized

PARTS = ("task", "length", "depth", "seed")
MODEL = "smollm2, smollm2-tuned, or a transformers name or folder (default: smollm2)"


def add_commands(commands: Any) -> None:
    """Add them to a parser's subcommands."""
    many: dict[str, Any] = {"nargs": "+"}
    run = commands.add_parser(
        "eval",
        help="RULER by lm-evaluation-harness: methods, budgets, lengths and tasks, question seen and unseen",
        description="Ask lm-evaluation-harness's RULER questions of compressed caches, and write a row for each "
        "method, budget, document and way to ask. A run that was killed goes on when the same command is given again.",
    )
    _add_methods(run)
    _add_documents(run)
    run.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="N",
        help="document to begin with, for runs that share a sweep",
    )
    run.add_argument(
        "--documents", type=Path, metavar="FILE", help="of headkv documents (default: made anew)"
    )
    run.add_argument(
        "--question",
        **many,
        choices=WAYS,
        default=["seen", "unseen"],
        help="seen: compressed with the text; unseen: comes after; second: comes after another one",
    )
    run.add_argument(
        "--out", type=Path, default=Path("headkv-eval.parquet"), metavar="FILE", help="of the rows"
    )
    run.add_argument("--by", default="task", choices=PARTS, help="the columns of the table")
    run.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="ask on the workers of a Ray cluster, host:port or auto; without ADDRESS, of one on this machine",
    )
    run.add_argument(
        "--workers", type=int, metavar="N", help="with --ray (default: as many as there is room for)"
    )
    run.add_argument(
        "--gpu-share",
        type=float,
        metavar="X",
        help="of a card for each, with --ray --device cuda (default: 1)",
    )
    run.set_defaults(run=evaluate)

    write = commands.add_parser(
        "documents",
        help="write the documents of headkv eval to a file, for machines that can not make them",
        description="Make documents of RULER (by lm-evaluation-harness) or of headkv's own needles, and write them to "
        "a file that headkv eval --documents reads without lm-evaluation-harness.",
    )
    write.add_argument("--model", default="smollm2", help=MODEL + "; only its tokenizer is used")
    _add_documents(write)
    write.add_argument("--out", type=Path, required=True, metavar="FILE", help="gzipped if it ends in .gz")
    write.set_defaults(run=documents)

    tell = commands.add_parser(
        "report",
        help="quality against bytes, from what headkv eval wrote",
        description="Tables of quality against bytes with bootstrap intervals, from files of headkv eval.",
    )
    tell.add_argument(
        "files", **many, metavar="FILE", help="what headkv eval wrote, or is still writing (.partial)"
    )
    tell.add_argument("--rows", type=Path, metavar="FILE", help="also write all rows to one file")
    tell.add_argument("--by", default="task", choices=PARTS, help="the columns of the table")
    tell.add_argument("--html", type=Path, metavar="FILE", help="also write one page, light and dark")
    tell.add_argument("--png", type=Path, metavar="FILE", help="also draw it; FILE-dark is for dark pages")
    tell.add_argument("--needles", type=Path, metavar="FILE", help="also draw scores by depth and length")
    tell.add_argument(
        "--cells", type=Path, metavar="FILE", help="also write every mean and interval, as JSON"
    )
    tell.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    tell.set_defaults(run=report)

    own = commands.add_parser(
        "compare",
        help="your own text and question: what each method answers",
        description="Ask questions about a text of your own, of any model, by every method side by side.",
    )
    _add_methods(own)
    own.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text, UTF-8")
    own.add_argument("--question", **many, required=True, metavar="TEXT", help="one or more questions")
    own.add_argument("--when", **many, choices=WAYS, default=["seen", "unseen"], help="as --question of eval")
    own.add_argument(
        "--answer", metavar="TEXT", help="the expected one, for its probability (default: the full cache's)"
    )
    own.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    own.set_defaults(run=compare_text)

    other = commands.add_parser(
        "lm-eval",
        help="lm-evaluation-harness's own command, with the model headkv",
        description='Everything behind "lm-eval" goes to lm-evaluation-harness, which then knows "--model headkv".',
        add_help=False,
    )
    other.set_defaults(run=harness)


def _add_documents(command: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"nargs": "+"}
    command.add_argument(
        "--tasks",
        **many,
        default=["niah_single_1"],
        metavar="TASK",
        help=f"of RULER, or {', '.join(NEEDLES)} (default: niah_single_1)",
    )
    command.add_argument(
        "--lengths", **many, type=int, default=[1024], metavar="N", help="in tokens (default: 1024)"
    )
    command.add_argument("--limit", type=int, default=8, metavar="N", help="documents of each (default: 8)")
    command.add_argument("--seed", **many, type=int, default=[0], metavar="N", help="of the documents")


def _add_methods(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="smollm2", help=MODEL)
    command.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    command.add_argument(
        "--method",
        nargs="+",
        default=["SnapKV", "AdaKV", "KVzip"],
        metavar="NAME",
        help=f"of {', '.join(NAMES)}",
    )
    command.add_argument(
        "--budget",
        nargs="+",
        default=["0.1", "0.2"],
        metavar="X",
        help="shares of the cache (0.1), or entries a KV head (256)",
    )
    command.add_argument("--new-tokens", type=int, metavar="N", help="of each reply, at most")


def evaluate(options: argparse.Namespace) -> None:
    """`headkv eval`."""
    from headkv.evaluation.profiling import load_on, load_tokenizer
    from headkv.evaluation.report import as_text
    from headkv.evaluation.sweep import Answers, Asker, Sweep, run_sweep

    sweep = Sweep(
        model=options.model,
        methods=tuple(options.method),
        budgets=tuple(map(budget_from, options.budget)),
        tasks=tuple(options.tasks),
        lengths=tuple(options.lengths),
        seeds=tuple(options.seed),
        questions=tuple(options.question),
        limit=options.limit,
        first=options.first,
        max_new_tokens=options.new_tokens,
    )
    for task, length, _ in sweep.groups:
        check(task, length)
    asking: AbstractContextManager[Answers]
    if options.ray is not None:
        from headkv.evaluation.distributed import workers

        tokenizer = load_tokenizer(options.model)
        asking = workers(
            *(sweep, options.device, options.ray), count=options.workers, gpu_share=options.gpu_share
        )
    elif options.workers is not None or options.gpu_share is not None:
        raise ValueError("--workers and --gpu-share must be given with --ray")
    else:
        model, tokenizer = load_on(options.device, options.model)
        asking = nullcontext(partial(map, Asker(sweep, model, tokenizer)))
    source = maker(tokenizer) if options.documents is None else read_documents(options.documents, tokenizer)
    with asking as answers:
        rows = run_sweep(sweep, answers, source, options.out, progress=True)
    print(as_text(rows, options.by))
    print(f"{len(rows)} rows: {options.out}", file=sys.stderr)


def documents(options: argparse.Namespace) -> None:
    """`headkv documents`."""
    from tqdm import tqdm

    from headkv.data.chat import chat_frame
    from headkv.evaluation.profiling import load_tokenizer

    for task in options.tasks:
        for length in options.lengths:
            check(task, length)
    tokenizer = load_tokenizer(options.model)
    make = maker(tokenizer)
    groups = [(task, n, seed) for task in options.tasks for n in options.lengths for seed in options.seed]
    made = (sample for group in tqdm(groups, unit="group") for sample in make(*group, options.limit))
    count = write_documents(options.out, made, chat_frame(tokenizer))
    print(f"{count} documents: {options.out}")


def report(options: argparse.Namespace) -> None:
    """`headkv report`."""
    from headkv.evaluation.report import as_text, sections
    from headkv.evaluation.rows import read_rows, write_rows

    rows = read_rows(*options.files)
    if options.rows is not None:
        write_rows(options.rows, rows)
    if options.json:
        print(json.dumps(dict(sections(rows, options.by)), indent=2))
    else:
        print(as_text(rows, options.by))
    if options.cells is not None:
        from headkv.evaluation.report_map import as_map

        found = as_map(rows, shlex.join(["headkv", *options.given]))
        lines = ",\n".join(f"  {json.dumps(cell, separators=(',', ':'))}" for cell in found.pop("cells"))
        about = json.dumps(found, indent=1, ensure_ascii=False)[:-2]
        options.cells.write_text(f'{about},\n "cells": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    if options.html is not None:
        from headkv.evaluation.report_page import as_html

        options.html.write_text(as_html(rows, options.by), encoding="utf-8")
    if options.png is not None or options.needles is not None:
        from headkv.evaluation.report_plots import plot_needles, plot_quality, save_pictures

        drawings = {
            options.png: lambda dark: plot_quality(rows, options.by, dark=dark),
            options.needles: lambda dark: plot_needles(rows, dark=dark),
        }
        for file, draw in drawings.items():
            for path in save_pictures(file, draw) if file is not None else ():
                print(f"Drawn: {path}", file=sys.stderr)


def compare_text(options: argparse.Namespace) -> None:
    """`headkv compare`."""
    from headkv.data.chat import chat_frame
    from headkv.evaluation.profiling import load_on

    budgets = [budget_from(text) for text in options.budget]
    for budget in budgets:
        share_of(budget, 1)
    text = options.text.read_text(encoding="utf-8")
    model, tokenizer = load_on(options.device, options.model)
    header, footer = chat_frame(tokenizer)
    made = roster(options.method, model, tokenizer)
    makes = {"full cache": sized(BY_SHARE["FullCache"], 1.0)}
    makes |= {f"{name} {budget:g}": sized(make, budget) for name, make in made.items() for budget in budgets}
    found = []
    for question in options.question:
        for way, replies in ask(
            *(model, tokenizer, header + text, f"\n\n{question}{footer}", makes, options.when),
            expected=None if options.answer is None else f" {options.answer}",
            max_new_tokens=options.new_tokens or 64,
        ):
            found.append({"question": question, "when": way, "replies": [vars(reply) for reply in replies]})
            if options.json:
                continue
            print(f"{question}  (question {way}, {replies[0].tokens} tokens compressed)")
            lines = [
                {
                    "method": reply.name,
                    "MB": f"{reply.nbytes / 1e6:.2f}",
                    "entries": f"{reply.stored_share:.1%}",
                    "log p": f"{reply.log_probability / reply.answer_tokens:.2f}",
                    "KL": f"{reply.divergence:.3f}",
                    "reply": " ".join(reply.text.split()),
                }
                for reply in replies
            ]
            print(table(lines, words=("method", "reply")), end="\n\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


def harness(options: argparse.Namespace) -> None:
    """`headkv lm-eval`."""
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        import headkv.evaluation.lm  # noqa: F401 (makes the name known)
    except ImportError as error:
        raise ImportError(
            f"this command is lm-evaluation-harness's: pip install 'headkv[eval]' ({error})"
        ) from error
    setup_logging()
    former = sys.argv
    sys.argv = ["headkv lm-eval", *options.rest]  # all that its parser reads
    try:
        command = HarnessCLI()
        command.execute(command.parse_args())
    finally:
        sys.argv = former
