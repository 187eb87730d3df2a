"""Does memory stay where it is? Thousands of requests through the pipeline on a tiny random model.

    python benchmarks/soak.py --requests 2000

Lengths, methods and the number of questions change from request to request. Prints resident memory as it goes, and
exits with 1 where it grows by more than `--slack` MB from the first quarter to the last.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import headkv
from headkv.evaluation.resident import resident_bytes
from headkv.models.tiny import tiny_model

METHODS = (
    headkv.AdaKV(budget=0.3),
    headkv.SnapKV(budget=40),
    headkv.StreamingLLM(budget=30),
    headkv.RandomHeads(share=0.5, sinks=2, recent=16),
    headkv.FullCache(),
)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of some letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(26)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<s>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slack", type=float, default=8.0, help="MB that may come on top (default 8)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    draw, model = random.Random(0), tiny_model("llama")
    ask = headkv.pipeline(model, letters())
    resident = []
    for number in range(1, options.requests + 1):
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(40, 400)))
        questions = [text[:5]] * draw.randint(1, 3)
        ask(text, questions=questions, method=draw.choice(METHODS), max_new_tokens=draw.randint(1, 6))
        if number % max(1, options.requests // 20) == 0:
            resident.append(resident_bytes() / 1e6)
            print(f"{number:6} requests: {resident[-1]:8.1f} MB resident", flush=True)
    quarter = max(1, len(resident) // 4)
    before, after = (statistics.median(x) for x in (resident[:quarter], resident[-quarter:]))
    grown = after - before
    print(
        f"first quarter {before:.1f} MB, last {after:.1f} MB: {grown:+.1f} MB over {options.requests:,} requests"
    )
    sys.exit(grown > options.slack)


if __name__ == "__main__":
    main()
