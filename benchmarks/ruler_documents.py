"""RULER's offline tasks as lm-evaluation-harness writes them: documents to one JSON file.

Needs `lm-eval==0.4.13 wonderwords nltk scipy`, in an environment of its own, and no network (the attempt to fetch
nltk's sentence splitter may fail: only tasks that are left out here use it).

    python benchmarks/ruler_documents.py --tokenizer FOLDER --out ruler.json

Each task and length starts from the same seeds, so that a list does not depend on what was written before it.
The file is not for the repository: the documents are lm-evaluation-harness's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import random
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

TASKS = {  # task -> the module and the function that write its documents
    "niah_single_1": ("niah_utils", "niah_single_1"),
    "niah_multikey_2": ("niah_utils", "niah_multikey_2"),
    "niah_multikey_3": ("niah_utils", "niah_multikey_3"),
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
}
SEEDS = {"random": 0, "numpy": 1234}  # as lm-eval's own command sets them
NEW_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}  # as lm-eval 0.4.13 limits the replies


def split(task: str, document: Mapping[str, Any]) -> tuple[str, str]:
    """A document's text, and the question behind it."""
    at = document["input"].rindex("What is" if task.startswith("niah") else "Question:")
    return document["input"][:at], document["input"][at:]


def documents(task: str, length: int, tokenizer: str, count: int) -> list[dict[str, object]]:
    """Return the first `count` documents of `task` at `length` tokens: input, gen_prefix, outputs."""
    import numpy as np

    module, function = TASKS[task]
    # Loaded anew: one task keeps a random generator of its own, made when the module is loaded.
    source = importlib.reload(importlib.import_module(f"lm_eval.tasks.ruler.{module}"))
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        rows = getattr(source, function)(tokenizer=tokenizer, max_seq_lengths=[length])["test"]
    kept = rows.select(range(min(count, len(rows))))
    return [{key: row[key] for key in ("input", "gen_prefix", "outputs")} for row in kept]


def main() -> None:
    """Write the documents of all tasks and lengths."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokenizer", required=True, help="a folder with the model's tokenizer")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    options.add_argument("--count", type=int, default=100, help="documents of each task and length")
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    logging.disable(logging.WARNING)
    written = {}
    for task in given.tasks:
        for length in given.lengths:
            written[f"{task}@{length}"] = documents(task, length, given.tokenizer, given.count)
            print(f"{task}, {length} tokens: {len(written[f'{task}@{length}'])} documents", flush=True)
    header = {"lm_eval": version("lm_eval"), "seeds": SEEDS, "documents": written}
    given.out.write_text(json.dumps(header), encoding="utf-8")


if __name__ == "__main__":
    main()
