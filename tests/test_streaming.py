"""Heads that stream while a prompt is read: against the reference over windowed rows, and against a masked full cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from generation_cases import METHODS, prompts
from masked_oracle import oracle_cache
from torch import Tensor

import headkv
from headkv.attention import dense, reference, streaming
from headkv.cache import RaggedLayer
from headkv.models.tiny import FAMILIES, tiny_model

BF16, FP64 = torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Case:
    """`kinds[head] = (sinks, recent)`, recent 0 for a head that sees all; `padding[batch]` tokens on the left."""

    name: str
    n: int
    kinds: tuple[tuple[int, int], ...] = ((4, 16), (0, 0), (4, 16))
    padding: tuple[int, ...] = (0,)
    group: int = 2
    dim: int = 32
    compensate: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> dict:
        return {"scale": self.dim**-0.5, "sliding_window": self.sliding_window, "softcap": self.softcap}

    def build(self, device: str = "cpu") -> tuple[list[Tensor], dict[str, Tensor | None]]:
        """Queries, keys, values and what tells rows apart, padded rows filled with NaN."""
        generator = torch.Generator().manual_seed(self.n)
        batch, heads = len(self.padding), len(self.kinds)
        counts = (heads * self.group, heads, heads)
        tensors = [torch.randn(batch, count, self.n, self.dim, generator=generator) for count in counts]
        valid = torch.arange(self.n) >= torch.tensor(self.padding)[:, None]
        for x in tensors:
            x.masked_fill_(~valid[:, None, :, None], float("nan"))
        sinks, recent = torch.tensor(self.kinds).T.expand(batch, 2, heads).unbind(1)
        rows = {"sinks": sinks, "recent": recent, "compensate": (recent > 0) & self.compensate}
        rows["valid"] = None if sum(self.padding) == 0 else valid.to(device)
        return [x.to(device, self.dtype) for x in tensors], rows

    def truth(self) -> Tensor:
        """The specification: the reference over a layer whose rows hold the whole prompt and are windowed, in float64."""
        (q, keys, values), rows = self.build()
        lengths = [self.n - pad for pad in self.padding]
        pairs = [
            [(keys[b, h, -m:].float(), values[b, h, -m:].float()) for h in range(len(self.kinds))]
            for b, m in enumerate(lengths)
        ]
        layer = RaggedLayer.from_rows(pairs)
        layer.set_windows(rows["sinks"], rows["recent"], rows["compensate"])
        where = torch.arange(self.n).expand(len(lengths), -1)
        out = reference.extend(q.double(), layer, query_positions=where, **self.options)
        for b, pad in enumerate(self.padding):
            out[b, :, :pad] = 0  # padding asks nothing
        return out


ALL, NONE = ((3, 9),) * 3, ((0, 0),) * 3
CASES = [
    Case("some heads", 100),
    Case("all heads", 77, kinds=ALL),
    Case("no head", 77, kinds=NONE),
    Case("different windows", 100, kinds=((4, 16), (0, 20), (0, 0), (9, 1))),
    Case("one token", 1),
    Case("shorter than the sinks", 3),
    Case("as long as the window", 20),
    Case("one more than the window", 21),
    Case("no sinks", 63, kinds=((0, 8), (0, 0))),
    Case("a window of one", 50, kinds=((2, 1), (0, 1))),
    Case("more than a block", 700, kinds=((4, 300), (300, 7), (0, 0))),
    Case("no groups", 65, group=1),
    Case("groups of 4", 130, group=4, dim=64),
    Case("padding", 90, padding=(0, 13, 89, 60)),
    Case("a sequence of padding", 60, padding=(60, 5)),
    Case("softcap", 90, softcap=2.0),
    Case("a sliding window that is wider", 90, sliding_window=40),
    Case("a sliding window that is narrower", 90, sliding_window=7),
    Case("a sliding window within the sinks", 60, kinds=((20, 4), (0, 0)), sliding_window=5),
    Case("a sliding window over padding", 90, padding=(0, 30), sliding_window=9),
    Case("sliding window and softcap", 300, kinds=((4, 260), (0, 0)), sliding_window=100, softcap=3.0),
    Case("compensation", 100, compensate=True),
    Case("compensation of one entry", 21, compensate=True),
    Case("compensation, no sinks", 300, kinds=((0, 1), (0, 0)), compensate=True),
    Case("compensation, padding", 90, padding=(0, 13, 89, 60), compensate=True),
    Case("compensation, softcap", 90, softcap=2.0, compensate=True),
    Case("compensation, more than a block", 700, kinds=((4, 300), (300, 7)), compensate=True),
    Case("bf16", 300, dtype=BF16, dim=64),
    Case("bf16, compensation, padding", 300, dtype=BF16, padding=(0, 9), compensate=True),
    Case("fp16", 300, dtype=torch.float16),
    Case("fp64", 90, dtype=FP64, compensate=True),
]
GPU_CASES = [replace(case, dim=64) for case in CASES if case.dtype != FP64] + [
    Case("Llama's shape", 3000, ((64, 256),) * 4 + ((0, 0),) * 4, group=4, dim=128, dtype=BF16),
    Case(
        "Llama's shape, a wide window", 3000, ((4, 600),) * 8, group=4, dim=128, dtype=BF16, compensate=True
    ),
    Case("bf16, odd sizes", 1001, ((1, 17), (0, 0), (5, 1)), (0, 333), 3, 96, dtype=BF16, compensate=True),
]
TOLERANCE = {torch.float32: 2e-5, BF16: 2e-2, torch.float16: 3e-3, FP64: 1e-10}


def check(case: Case, device: str = "cpu") -> None:
    tensors, rows = case.build(device)
    got = dense.prefill(*tensors, **rows, **case.options)
    assert got.dtype == case.dtype
    error = (got.cpu().double() - case.truth()).abs().max()
    assert error < TOLERANCE[case.dtype], f"{case.name}: {error}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prefill_is_the_reference_over_windowed_rows(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_prefill_on_a_gpu(case):
    check(case, "cuda")


@pytest.mark.gpu
def test_flash_attention_is_what_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(streaming, "_blocks", None)
    check(Case("bf16", 300, dtype=BF16, dim=64, compensate=True), "cuda")


def flash_attention(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
):
    """What torch's flash attention is said to do, `[R, m, heads, D]`."""
    assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[1], k.shape[1])
    assert (dropout, causal, debug) == (0.0, False, False)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    logits = q @ k.mT * scale
    age = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) + k.shape[2] - q.shape[2]
    if window_size_left >= 0:
        logits = logits.masked_fill(age > window_size_left, float("-inf"))
    if window_size_right >= 0:
        logits = logits.masked_fill(-age > window_size_right, float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    return out, logits.logsumexp(-1).float(), None, None, None


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.softcap is c.sliding_window is None and c.dtype != FP64],
    ids=lambda case: case.name,
)
def test_parts_of_flash_attention(case, monkeypatch):
    """The way that a GPU goes, with a stand-in for the one call that needs a GPU."""
    monkeypatch.setattr(streaming, "_flash_runs", lambda *tensors: True)
    monkeypatch.setattr(streaming, "_blocks", None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    check(case)


def test_flash_attention_takes_these_arguments():
    """torch's own checks of shapes and types, without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, keys = (torch.empty(2, *shape, device="cuda", dtype=BF16) for shape in ((4, 100, 64), (100, 64)))
        for window, seen in ((16, slice(None)), (None, slice(7))):
            out, lse = streaming._flash(q, keys[:, seen], keys[:, seen], window, 0.1)
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)


def test_rows_of_one_kind_go_in_turns(monkeypatch):
    """What is copied at once is bounded; which rows go together changes nothing."""
    case = Case("turns", 100, kinds=((4, 16),) * 5 + ((0, 0),) * 3, padding=(0, 0))
    monkeypatch.setattr(dense, "TOKENS", 250)
    sizes, attend = [], streaming.attend
    monkeypatch.setattr(
        streaming, "attend", lambda q, *a, **k: sizes.append(q.shape[0]) or attend(q, *a, **k)
    )
    check(case)
    assert sizes == [2] * 5


DUO = replace(METHODS["DuoAttention"], streaming_prefill=True)
RAZOR = replace(METHODS["RazorAttention"], streaming_prefill=True)
STREAMING = {
    "DuoAttention": DUO,
    "DuoAttention, all stream": replace(DUO, sparsity=1),
    "DuoAttention, none streams": replace(DUO, sparsity=0),
    "DuoAttention, no sinks": replace(DUO, sinks=0, recent=3),
    "RazorAttention": RAZOR,
    "RazorAttention, a share": replace(RAZOR, window_share=0.3),
    "RazorAttention, no compensation": replace(RAZOR, compensation=False),
}
CHUNKED = [name for name in STREAMING if "share" not in name]


def generate(model, cache=None, **arguments):
    out = model.generate(
        **prompts(),
        **arguments,
        past_key_values=cache,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("method", STREAMING)
def test_generation_is_that_of_a_masked_full_cache(method, family):
    model, chosen = tiny_model(family), STREAMING[method]
    want = generate(model, oracle_cache(model, chosen))
    with headkv.compress(model, chosen, headroom=3):
        same(generate(model), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny_model(family)
    want = generate(model, oracle_cache(model, RAZOR))
    with headkv.compress(model, RAZOR):
        same(generate(model), want)


@pytest.mark.parametrize("chunk", [2, 7, 20, 59, 64])
@pytest.mark.parametrize("method", CHUNKED)
def test_chunks_change_nothing(method, chunk):
    """The third sequence's first 13 tokens are padding: chunks of 2 and 7 begin with nothing of it."""
    model = tiny_model("llama")
    with headkv.compress(model, STREAMING[method]):
        want = generate(model)
    with headkv.compress(model, STREAMING[method], chunked_prefill=True, rollback=2, headroom=3) as session:
        same(generate(model, prefill_chunk_size=chunk), want)
    window = 1 + 5 + 2 + 3 + 9
    stored = session.cache.lengths()
    assert method == "DuoAttention, none streams" or int(stored.min()) <= window


@pytest.mark.parametrize("family", ["gemma2", "mistral-sliding", "qwen3"])
def test_chunks_of_sliding_layers(family):
    model = tiny_model(family)
    with headkv.compress(model, DUO):
        want = generate(model)
    with headkv.compress(model, DUO, chunked_prefill=True):
        same(generate(model, prefill_chunk_size=11), want)


def test_off_it_changes_nothing_and_on_it_does():
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    logits = []
    for method in (headkv.FullCache(), METHODS["DuoAttention"], DUO):
        with headkv.compress(model, method):
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 0.1


@pytest.mark.parametrize("method", [DUO, RAZOR], ids=["DuoAttention", "RazorAttention"])
def test_memory_of_a_chunked_prefill(method):
    """Bytes held while chunks arrive: streaming rows a chunk and their window, however long the text."""
    model = tiny_model("llama", max_position_embeddings=4096)
    chunk, rollback, heads, dim = 100, 8, 2, 16
    ids = torch.randint(3, 97, (1, 2000), generator=torch.Generator().manual_seed(1))
    cache = headkv.RaggedCache.for_model(model, method, chunked_prefill=True, rollback=rollback)
    windowed = 1 + 5 + rollback
    slot = 2 * dim * 4 + 4  # key, value, position
    counted: set[bool] = set()
    for begin in range(0, 2000, chunk):
        with torch.inference_mode():
            model(ids[:, begin : begin + chunk], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            stored = layer.filled()
            streams = stored.recent > 0
            slots = stored.keys.shape[0]
            full = begin + chunk + max(64, chunk, (begin + chunk) // 16)
            assert slots <= int(streams.sum()) * (windowed + chunk) + int((~streams).sum()) * full
            assert stored.nbytes <= slots * slot + heads * (9 * 8 + 2 * dim * 4)
            assert bool((stored.length[streams] <= windowed + chunk).all())
            counted |= set(streams.tolist())
    assert counted == {True, False}
    cache.finalize_prefill()
    for layer in cache.layers:
        stored = layer.filled()
        assert (stored.length[stored.recent > 0] == windowed).all()
        assert (stored.length[stored.recent == 0] == 2000).all()
