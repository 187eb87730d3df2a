"""Heads that stream while a prompt is read: against the reference over windowed rows, and against a masked full cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from generation_cases import METHODS, prompts
from masked_oracle import oracle_cache
from torch import Tensor

import headkv
from headkv.attention import dense, reference, streaming
from headkv.cache import RaggedLayer
from headkv.logits import Rule
from headkv.methods import Keep, Prefill, Windows
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
    learned: bool = False  # sinks, of query heads from -2 on by ones
    dtype: torch.dtype = torch.float32

    def rule(self, device: str = "cpu") -> Rule:
        learned = (
            torch.arange(-2.0, len(self.kinds) * self.group - 2, device=device) if self.learned else None
        )
        return Rule(self.dim**-0.5, self.sliding_window, self.softcap, learned)

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
        out = reference.extend(q.double(), layer, self.rule(), query_positions=where)
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
    Case("learned sinks", 100, learned=True),
    Case("learned sinks, no head streams", 77, kinds=NONE, learned=True),
    Case("learned sinks, one token", 1, learned=True),
    Case("learned sinks, different windows", 100, kinds=((4, 16), (0, 20), (0, 0), (9, 1)), learned=True),
    Case("learned sinks, more than a block", 700, kinds=((4, 300), (300, 7), (0, 0)), learned=True),
    Case("learned sinks, padding, compensation", 90, padding=(0, 13, 89, 60), compensate=True, learned=True),
    Case(
        "learned sinks, sliding, softcap",
        300,
        ((4, 260), (0, 0)),
        sliding_window=100,
        softcap=3.0,
        learned=True,
    ),
    Case("learned sinks, bf16", 300, padding=(0, 9), dim=64, dtype=BF16, learned=True),
    Case("learned sinks, fp16", 300, dtype=torch.float16, learned=True),
    Case("learned sinks, fp64", 90, dtype=FP64, compensate=True, learned=True),
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
    got = dense.prefill(*tensors, case.rule(device), **rows)
    assert got.dtype == case.dtype
    error = (got.cpu().double() - case.truth()).abs().max()
    assert error < TOLERANCE[case.dtype], f"{case.name}: {error}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prefill_is_the_reference_over_windowed_rows(case):
    check(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.softcap is c.sliding_window is None], ids=lambda case: case.name
)
def test_blocks_by_hand(case, monkeypatch):
    """What float32 on a GPU takes."""
    monkeypatch.setattr(streaming, "_fused", lambda *block: streaming._plain(*block[:4], Rule(block[4])))
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


class Varlen:
    """What `torch.nn.attention.varlen` is said to do, where all sequences are of one length."""

    AuxRequest = SimpleNamespace

    @staticmethod
    def varlen_attn(q, k, v, cum_q, cum_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
        rows = cum_q.numel() - 1
        assert cum_q.dtype == cum_k.dtype == torch.int32 and return_aux.lse and enable_gqa
        assert (cum_q.tolist(), cum_k.tolist()) == (
            [i * max_q for i in range(rows + 1)],
            [i * max_k for i in range(rows + 1)],
        )
        q, k, v = (x.unflatten(0, (rows, -1)) for x in (q, k, v))
        sizes = {"window_size_left": window_size[0], "window_size_right": window_size[1]}
        out, lse, *_ = flash_attention(
            q, k, v, None, None, max_q, max_k, 0.0, False, False, scale=scale, **sizes
        )
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("public", [True, False], ids=["varlen", "private operator"])
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.softcap is c.sliding_window is None and c.dtype != FP64],
    ids=lambda case: case.name,
)
def test_parts_of_flash_attention(case, public, monkeypatch):
    """The way that a GPU goes, with a stand-in for the one call that needs a GPU."""
    monkeypatch.setattr(streaming, "_flash_runs", lambda *tensors: True)
    monkeypatch.setattr(streaming, "_blocks", None)
    monkeypatch.setattr(streaming, "_varlen", lambda: Varlen if public else None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    check(case)


def test_flash_attention_takes_these_arguments(monkeypatch):
    """torch's own checks of shapes and types, without a GPU; its public function needs one to be asked."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(streaming, "_varlen", lambda: None)
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding", "gpt_oss"])
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


@pytest.mark.parametrize("family", ["gemma2", "mistral-sliding", "qwen3", "gpt_oss"])
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


class Mine:
    """A method of a user: the second head streams, and says so or not."""

    observed_queries = 0

    def __init__(self, heads=2, compensate=None):
        self.windows = Windows(torch.tensor([0, 2])[:heads], torch.tensor([0, 6])[:heads], compensate)

    def plan(self, prefill):
        mask = torch.ones(2, prefill.length, dtype=torch.bool)
        return Keep(mask, self.windows.sinks, self.windows.recent)

    def prefill_windows(self, *, layer_idx, num_layers, num_kv_heads, length):
        assert (num_layers, num_kv_heads) == (3, 2) and layer_idx < 3
        assert length is None or length in (60, 54, 47), "padding is not counted"
        return self.windows


def test_a_method_of_a_user():
    model = tiny_model("llama")
    with headkv.compress(model, Mine()):
        want = generate(model)
    with headkv.compress(model, Mine(), chunked_prefill=True):
        same(generate(model, prefill_chunk_size=17), want)


@pytest.mark.parametrize("length", [1, 300, None])
@pytest.mark.parametrize("method", [DUO, RAZOR], ids=["DuoAttention", "RazorAttention"])
def test_windows_are_those_of_the_plan(method, length):
    where = {"layer_idx": 2 if method is DUO else 1, "num_layers": 3}
    windows = method.prefill_windows(**where, num_kv_heads=2, length=length)
    keys = torch.zeros(2, length or 40, 16)
    plan = method.plan(Prefill(torch.zeros(4, 0, 16), keys, keys, **where, scale=1.0))
    assert 0 < int((windows.recent > 0).sum()) < 2
    assert torch.equal(windows.sinks, plan.sinks) and torch.equal(windows.recent, plan.recent)
    assert method is DUO or torch.equal(windows.compensate, plan.compensate)
    assert (
        replace(method, streaming_prefill=False).prefill_windows(**where, num_kv_heads=2, length=length)
        is None
    )


def test_for_share_passes_it_on():
    gates, echo, induction = DUO.profile, RAZOR.echo, RAZOR.induction
    for on in (True, False):
        razor = headkv.RazorAttention.for_share(
            0.9, 500, echo, induction, num_kv_heads=2, streaming_prefill=on
        )
        duo = headkv.DuoAttention.for_share(0.5, 500, gates, streaming_prefill=on)
        assert razor.streaming_prefill is duo.streaming_prefill is on


def chunked(method):
    headkv.compress(tiny_model("llama"), method, chunked_prefill=True).__enter__()


def all_padding(**options):
    model, ids = tiny_model("llama"), torch.ones(2, 4).long()
    with headkv.compress(model, DUO, **options) as session:
        model(ids, attention_mask=torch.tensor([[1] * 4, [0] * 4]))
        session.cache.finalize_prefill()


def cropped():
    model = tiny_model("llama")
    with headkv.compress(model, DUO, chunked_prefill=True) as session:
        model(prompts(1)["input_ids"])
        session.cache.crop(-1)


BAD = {
    "a word for Duo": (lambda: replace(DUO, streaming_prefill="yes"), TypeError, "streaming_prefill must be True or False, got 'yes'"),
    "a number for Razor": (lambda: replace(RAZOR, streaming_prefill=1), TypeError, "streaming_prefill must be True or False, got 1"),
    "a share in chunks": (lambda: chunked(replace(RAZOR, window_share=0.2)), ValueError, "window_share must be 0 .* got 0.2: .* set window_share=0 and min_recent"),
    "other heads": (lambda: chunked(Mine(heads=1)), ValueError, r"must answer recent \[2\], or all None, got \[\[1\]\]"),
    "shapes of sinks": (lambda: Windows(torch.ones(2), torch.ones(3)), ValueError, r"sinks must have shape \[3\], got \[2\]"),
    "shapes of recent": (lambda: Windows(torch.ones(2, 2), torch.ones(2, 2)), ValueError, r"recent must have shape \[H\], got \[2, 2\]"),
    "shapes of compensate": (lambda: Mine(compensate=torch.ones(3).bool()), ValueError, r"compensate must have shape \[2\], got \[3\]"),
    "a negative window": (lambda: Windows(torch.zeros(2), torch.tensor([1, -1])), ValueError, r"recent must be at least 0 everywhere, got \[1, -1\]"),
    "a sequence of padding": (all_padding, ValueError, "row 1 is all padding"),
    "a sequence of padding in chunks": (lambda: all_padding(chunked_prefill=True), ValueError, "row 1 is all padding"),
    "a crop between chunks": (cropped, ValueError, "finalize_prefill"),
    "negative headroom": (lambda: RaggedLayer.from_rows([[(torch.ones(2, 4), torch.ones(2, 4))]]).trim(-1), ValueError, "headroom must be"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_the_option_a_share_may_be_read_in_chunks():
    chunked(replace(RAZOR, window_share=0.2, streaming_prefill=False))
