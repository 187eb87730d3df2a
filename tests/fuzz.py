"""Random conversations over a ragged cache, as users have them, against the masked oracle: `make fuzz`.

A conversation is drawn from one number: the model's family, a method, a dtype, a batch, how the cache is made, and then
what happens to it: text read in chunks, generation in several modes, crops, snapshots, copies, files, other batches,
errors and interrupts in between. After each of these the logits are those of a full cache with a mask. In 16 bits,
where rounding would choose other entries, the oracle is a ragged cache to which nothing of the kind happens.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from generation_cases import METHODS, SCORER, profile, prompts
from masked_oracle import oracle_cache
from transformers import DynamicCache
from transformers.utils import logging

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

FUZZED = {
    **METHODS,
    "AdaKV of the model": headkv.AdaKV(budget=20, scope="model", scorer=SCORER),
    "DuoAttention, streaming": headkv.DuoAttention(
        profile("gate"), sparsity=0.5, sinks=1, recent=5, streaming_prefill=True
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 9},
}
LENGTH = {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}


class Interrupted(KeyboardInterrupt):
    """What breaks a forward call on its way."""


class Conversation:
    """One random conversation; `log` says what happened so far."""

    def __init__(self, seed: int) -> None:
        self.draw, self.seed, self.log = random.Random(seed), seed, []  # type: ignore[var-annotated]
        self.family, self.name = self.draw.choice(FAMILIES), self.draw.choice(list(FUZZED))
        self.dtype = self.draw.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
        self.batch, self.chunked = self.draw.choice([1, 1, 2, 3]), self.draw.random() < 0.2
        self.options: dict[str, Any] = {
            "backend": self.draw.choice(["reference", "rust", "auto"]),
            "headroom": self.draw.choice([0, 3, 64]),
            "rollback": self.draw.choice([0, 2, 9, 32]),
            "chunked_prefill": self.chunked,
        }
        self.block = self.draw.random() < 0.5
        self.method = FUZZED[self.name]
        self.note(
            self.family, self.name, self.dtype, f"batch {self.batch}", self.options, f"block {self.block}"
        )

    def note(self, *what: Any) -> None:
        self.log.append(" ".join(map(str, what)))

    def run(self) -> None:
        """All of it.

        Raises:
            AssertionError: something was other than the oracle says.
        """
        with ExitStack() as stack, torch.no_grad():
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.model, self.other = (tiny_model(self.family).to(self.dtype) for _ in range(2))
            self.begin(stack)
            for _ in range(self.draw.randint(2, 8)):
                step = self.draw.choice(STEPS)
                self.note(step.__name__)
                if step(self) is False:
                    return
                self.check_counts()

    def begin(self, stack: ExitStack) -> None:
        """Caches, and a prompt."""
        ways = ["one call", "chunks"] if self.chunked else ["one call"]
        drafts = not self.chunked and not getattr(self.method, "whole_prompt", False)
        modes = [mode for mode in MODES if mode != "prompt lookup" or drafts]
        first = self.draw.choice([*ways, *modes])
        if self.dtype == torch.float32:
            waits = self.chunked or first == "chunked prefill"
            self.oracle: Any = oracle_cache(self.other, self.method, waits)
        else:
            never_refused = {**self.options, "rollback": 99}
            self.oracle = headkv.RaggedCache.for_model(self.other, self.method, **never_refused)
        inputs = prompts(self.batch, self.draw.choice([14, 30, 60]))
        self.ids, self.mask, self.cache = inputs["input_ids"], inputs["attention_mask"], None
        if self.block:
            session = stack.enter_context(headkv.compress(self.model, self.method, **self.options))
            self.cache = self.draw.choice([None, DynamicCache()] if first != "chunks" else [DynamicCache()])
        else:
            self.cache = headkv.RaggedCache.for_model(self.model, self.method, **self.options)
        self.note("prompt in", first)
        if first in MODES:
            self.generate(first)
        elif first == "one call":
            self.compare(self.ids, self.mask)
        else:
            end = self.draw.randint(1, self.ids.shape[1] - 1)
            self.compare(self.ids[:, :end], self.mask[:, :end])
            self.compare(self.ids[:, end:], self.mask)
        if self.block:
            self.cache = session.cache
        if self.cache.waiting:  # until a call of one token
            self.read(0 if self.ids.shape[1] > self.cache.seen else 1, padded=False)

    # -- what both do -------------------------------------------------------------------------------------------------

    def compare(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """One forward call of each."""
        tokens = ids.shape[1]
        want = self.other(ids, attention_mask=mask, past_key_values=self.oracle).logits
        got = self.model(ids, attention_mask=mask, past_key_values=self.cache).logits
        real = mask[:, -tokens:].bool()
        self.close(got[real], want[real])

    def close(self, got: torch.Tensor, want: torch.Tensor) -> None:
        slack = 1e-4 if self.dtype == torch.float32 else 0.05
        torch.testing.assert_close(got.float(), want.float(), rtol=slack, atol=slack)

    def read(self, tokens: int, padded: bool) -> None:
        """New text, behind what generation left unread."""
        self.write(tokens, padded)
        self.compare(self.ids[:, self.oracle.get_seq_length() :], self.mask)

    def write(self, tokens: int, padded: bool) -> None:
        """Text that is not read yet."""
        source = torch.Generator().manual_seed(self.draw.randrange(2**31))
        new = torch.randint(3, 97, (self.ids.shape[0], tokens), generator=source)
        new_mask = torch.ones_like(new)
        if padded:
            new_mask[self.draw.randrange(len(new)), : self.draw.randint(1, tokens)] = 0
        self.ids, self.mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, new_mask], 1)

    def generate(self, mode: str) -> None:
        # The oracle ends a prompt in chunks with the first call of one token, which a second new token makes.
        options, number = MODES[mode], self.draw.randint(2 if mode == "chunked prefill" else 1, 7)
        if mode == "prompt lookup" and len(self.ids) > 1:
            options = MODES["greedy"]
        self.note(mode, number, "tokens")
        plain = {key: value for key, value in options.items() if key != "prompt_lookup_num_tokens"}
        out = []
        for model, cache, way in ((self.other, self.oracle, plain), (self.model, self.cache, options)):
            torch.manual_seed(self.seed)
            given = {"attention_mask": self.mask, "past_key_values": cache, "max_new_tokens": number}
            out.append(model.generate(self.ids, **given, **way, **LENGTH))
        same = out[0].sequences.shape == out[1].sequences.shape
        if self.dtype == torch.float32:
            assert same and torch.equal(out[0].sequences, out[1].sequences), (
                out[0].sequences,
                out[1].sequences,
            )
            self.close(torch.stack(out[1].logits), torch.stack(out[0].logits))
        self.ids = out[0].sequences
        more = torch.ones(len(self.ids), self.ids.shape[1] - self.mask.shape[1], dtype=torch.int64)
        self.mask = torch.cat([self.mask, more], 1)
        assert torch.equal(out[0].sequences, out[1].sequences), "tokens differ"

    def check_counts(self) -> None:
        assert self.cache.seen == self.oracle.get_seq_length()
        lengths = self.cache.lengths()
        assert int(lengths.min()) >= 1 and int(lengths.max()) <= self.cache.seen
        assert self.cache.layers[0].filled().batch_size == len(self.ids)

    def cut(self, seen: int) -> None:
        self.oracle.crop(seen - self.oracle.get_seq_length())
        self.ids, self.mask = self.ids[:, :seen], self.mask[:, :seen]

    # -- what happens -------------------------------------------------------------------------------------------------

    def more_text(self) -> None:
        self.read(self.draw.choice([1, 1, 2, 5, 12]), padded=self.draw.random() < 0.3)

    def answer(self) -> None:
        """To some text that no layer has seen, as generation takes its first token from that."""
        if self.ids.shape[1] == self.cache.seen or self.draw.random() < 0.5:
            self.write(self.draw.randint(1, 9), padded=False)
        self.generate(self.draw.choice([mode for mode in MODES if mode != "chunked prefill"]))

    def crop(self) -> None:
        """All layers, or none."""
        seen = self.cache.seen - self.draw.randint(1, min(12, self.cache.seen - 1))
        before = self.cache.snapshot()
        try:
            self.cache.crop(seen - self.cache.seen)
        except ValueError as error:
            assert "cannot crop" in str(error)
            assert equal(self.cache.snapshot(), before), "a crop that was refused changed a layer"
            return
        self.cut(seen)

    def aside(self) -> None:
        """A question that is forgotten again."""
        taken, oracle, text = self.cache.snapshot(), state(self.oracle), (self.ids, self.mask)
        self.more_text()
        self.answer()
        self.cache.restore(taken)
        put_back(self.oracle, oracle)
        self.ids, self.mask = text

    def through_a_copy(self) -> None:
        former, self.cache = self.cache, copy.deepcopy(self.cache)
        former.reset()

    def through_a_file(self) -> None:
        self.cache.save(self.folder / "cache")
        self.cache = headkv.RaggedCache.load(
            self.folder / "cache", self.model, self.method, backend=self.options["backend"]
        )

    def another_batch(self) -> None:
        index = torch.tensor([self.draw.randrange(len(self.ids)) for _ in range(self.draw.randint(1, 3))])
        for cache in (self.cache, self.oracle):
            cache.reorder_cache(index)
        self.ids, self.mask = self.ids[index], self.mask[index]

    def an_interrupt(self) -> bool:
        """In one layer of one call; its tokens are taken out as the documentation says."""
        seen, calls = self.cache.seen, self.draw.randint(0, 3)
        before = self.cache.snapshot()
        new = torch.full((len(self.ids), self.draw.randint(1, 4)), 5)
        text = torch.cat([self.ids, new], 1)
        mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        try:
            with interrupted(self.model, self.draw.randrange(3), calls):
                self.model.generate(
                    text, attention_mask=mask, past_key_values=self.cache, max_new_tokens=6, eos_token_id=None
                )
        except Interrupted:
            pass
        else:
            raise AssertionError("nothing was interrupted")
        try:
            self.cache.crop(seen)
        except ValueError as error:
            assert "cannot crop" in str(error)
            self.cache.restore(before)
        return True

    def a_mistake(self) -> None:
        """What is refused changes nothing."""
        before, cache = self.cache.snapshot(), self.cache
        ids = self.ids[:, -1:]
        wrong: dict[str, Callable[[], Any]] = {
            "a dense mask": lambda: self.model(
                ids, attention_mask=torch.ones(len(ids), 1, 1, cache.seen + 1), past_key_values=cache
            ),
            "no cache": lambda: self.model(ids, past_key_values=cache, use_cache=False),
            "too much": lambda: cache.crop(-cache.seen - 1),
            "another's snapshot": lambda: cache.restore(before[:1]),
            "no such sequence": lambda: cache.reorder_cache(torch.tensor([99])),
        }
        name = self.draw.choice(list(wrong))
        self.note(name)
        try:
            wrong[name]()
        except (ValueError, TypeError):
            assert equal(cache.snapshot(), before), f"{name} changed the cache"
        else:
            raise AssertionError(f"{name} was not refused")


STEPS: list[Callable[[Conversation], Any]] = [
    Conversation.more_text,
    Conversation.more_text,
    Conversation.answer,
    Conversation.answer,
    Conversation.crop,
    Conversation.crop,
    Conversation.aside,
    Conversation.through_a_copy,
    Conversation.through_a_file,
    Conversation.another_batch,
    Conversation.an_interrupt,
    Conversation.a_mistake,
]


def state(cache: Any) -> Any:
    """All of an oracle, to come back to."""
    if isinstance(cache, headkv.RaggedCache):
        return cache.snapshot()
    return [(x.keys, x.values, x.queries, None if x.plan is None else list(x.plan)) for x in cache.layers]


def put_back(cache: Any, taken: Any) -> None:
    """Come back to it."""
    if isinstance(cache, headkv.RaggedCache):
        cache.restore(taken)
        return
    for layer, (keys, values, queries, plan) in zip(cache.layers, taken, strict=True):
        layer.keys, layer.values, layer.queries, layer.plan = keys, values, queries, plan


def equal(one: Any, other: Any) -> bool:
    """Two snapshots of the same contents."""
    return all(
        a.numbers == b.numbers
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def interrupted(model: Any, layer: int, calls: int) -> Iterator[None]:
    """Inside, one layer of the decoder is interrupted after so many calls of it."""
    left = [calls]

    def count(module: Any, args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    handle = model.get_decoder().layers[layer].register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def converse(seed: int) -> None:
    """The conversation of this number; what happened in it goes with an error."""
    one = Conversation(seed)
    try:
        one.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: " + "; ".join(one.log)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="this conversation alone; else as many as time allows")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first fault")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.seed is not None:
        converse(options.seed)
        print(f"seed {options.seed}: right")
        return
    seed = first = int(time.time())
    faults, end = [], time.monotonic() + options.seconds
    print(f"seeds from {first} on; one again: make fuzz SEED=...", flush=True)
    while time.monotonic() < end and (options.keep_going or not faults):
        try:
            converse(seed)
        except AssertionError as error:
            faults.append(seed)
            print(f"{error}\n    {type(error.__cause__).__name__}: {error.__cause__}", flush=True)
        seed += 1
    print(f"{seed - first} conversations, {len(faults)} wrong: {faults}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
