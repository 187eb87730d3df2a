"""Every backend of ragged attention against float64 truth, on one table of cases."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, truth

import headkv
from headkv.attention import reference
from headkv.attention.api import choose_backend, recorded_step
from headkv.attention.dense import prefill
from headkv.cache import RaggedLayer
from headkv.logits import Rule


def run(case: Case, backend: str, q, layer):
    if case.tokens == 1:
        return headkv.ragged_decode(q[:, :, 0], layer, backend=backend, **case.options(q))[:, :, None]
    return headkv.ragged_extend(q, layer, backend=backend, **case.options(q))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_equals_truth(case, backend):
    """The error against float64 is bounded by one rounding of the output to its dtype, and fp32 sums inside."""
    q, layer = case.build()
    got, want = run(case, backend, q, layer), truth(case, q, layer)
    assert got.dtype == q.dtype and bool(got.isfinite().all())
    rounding = torch.finfo(case.dtype).eps * want.abs() + 4e-6 * max(1.0, float(want.abs().max()))
    assert bool(((got.double() - want).abs() <= rounding).all()), float((got.double() - want).abs().max())


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens > 1 and c.gaps], ids=lambda case: case.name)
def test_extend_equals_decode_after_decode(case):
    """T queries at once are what T decode steps would have given."""
    q, layer = case.build()
    at_once = run(case, "reference", q, layer)
    layer.crop(case.tokens - 1)
    first = headkv.ragged_decode(q[:, :, 0], layer, backend="reference", **case.options(q))
    torch.testing.assert_close(at_once[:, :, 0], first)


@pytest.mark.parametrize("backend", ["reference", "rust", "auto"])
@pytest.mark.parametrize("sinks", [None, torch.arange(6.0) - 3], ids=["no sinks", "sinks"])
def test_a_step_is_append_and_decode(sinks, backend):
    """Far enough for the pools to grow and the windowed row to be trimmed."""
    torch.manual_seed(2)
    rows = [[tuple(torch.randn(2, n, 32)) for n in (1, 30)]]
    window, options = (
        {"sinks": torch.tensor([[0, 2]]), "recent": torch.tensor([[0, 9]])},
        {"sink_logits": sinks},
    )
    once, twice = (RaggedLayer.from_rows(rows, **window) for _ in range(2))
    for _ in range(150):
        q, keys, values = torch.randn(1, 6, 32), torch.randn(1, 2, 32), torch.randn(1, 2, 32)
        got = headkv.ragged_step(q, keys, values, once, backend=backend, **options)
        twice.append(keys[:, :, None], values[:, :, None])
        assert torch.equal(got, headkv.ragged_decode(q, twice, backend=backend, **options))
    assert once.seen == twice.seen == 180 and torch.equal(once.lengths(), twice.lengths())


STEPS = {
    "keys of 4 dimensions": (
        {"keys": torch.zeros(1, 2, 1, 32)},
        ValueError,
        r"keys must have shape \[B, H, D\]",
    ),
    "values no tensor": ({"values": None}, ValueError, r"values must have shape \[B, H, D\]"),
    "keys of another dtype": ({"keys": torch.zeros(1, 2, 32).half()}, TypeError, "dtype"),
    "too many heads": (
        {"keys": torch.zeros(1, 3, 32), "values": torch.zeros(1, 3, 32)},
        ValueError,
        "keys must have",
    ),
    "float64 queries": (
        {"q": torch.zeros(1, 4, 32).double()},
        TypeError,
        "backend 'rust', got torch.float64",
    ),
    "another backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("given, error, message", STEPS.values(), ids=STEPS)
def test_bad_steps_leave_the_layer_as_it_was(given, error, message):
    layer = RaggedLayer.from_rows([[(torch.zeros(3, 32),) * 2] * 2])
    good = {"q": torch.zeros(1, 4, 32), "keys": torch.zeros(1, 2, 32), "values": torch.zeros(1, 2, 32)}
    with pytest.raises(error, match=message):
        headkv.ragged_step(**{**good, "layer": layer, "backend": "rust", **given})
    assert layer.seen == 3 and layer.lengths().tolist() == [[3, 3]]


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_trimming_never_changes_attention(backend):
    """A windowed row gives the same output whether what it hides was dropped already or not."""
    torch.manual_seed(1)
    keys, values, q = torch.randn(1, 2, 400, 32), torch.randn(1, 2, 400, 32), torch.randn(1, 4, 32)
    window = {"sinks": 2, "recent": 40, "compensate": torch.tensor([[True, False]])}
    trimmed = RaggedLayer.from_dense(keys[:, :, :100], values[:, :, :100], headroom=8, **window)
    whole = RaggedLayer.from_dense(keys[:, :, :100], values[:, :, :100], headroom=400, **window)
    for t in range(100, 400):
        for layer in (trimmed, whole):
            layer.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        got, want = (headkv.ragged_decode(q, layer, backend=backend) for layer in (trimmed, whole))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert int(trimmed.length.max()) < int(whole.length.min()), "one of them was trimmed, the other not"


RULE = Rule(0.25)


def test_recorded_steps_are_for_a_gpu():
    layer = RaggedLayer.from_rows([[(torch.zeros(3, 32),) * 2] * 2])
    new = torch.zeros(1, 4, 32), torch.zeros(1, 2, 32), torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="seen must be None with the backend 'rust'"):
        recorded_step(*new, layer, RULE, "rust", seen=torch.zeros(1).long())
    assert layer.seen == 3 and layer.lengths().tolist() == [[3, 3]]


def test_compensation_of_one_entry_is_that_entry():
    """N = 1: the compensation entry is the dropped entry itself, so nothing is lost (RazorAttention, Eq. 5)."""
    torch.manual_seed(2)
    keys, values, q = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 2, 16)
    full = RaggedLayer.from_dense(keys, values)
    keep = torch.ones(1, 1, 9, dtype=torch.bool)
    keep[0, 0, 3] = False
    one = RaggedLayer.from_dense(
        keys, values, keep=keep, sinks=3, recent=5, compensate=torch.tensor([[True]])
    )
    torch.testing.assert_close(reference.decode(q, one, RULE), reference.decode(q, full, RULE))


def test_compensation_of_equal_keys_is_exact():
    torch.manual_seed(3)
    keys, values, q = torch.randn(1, 1, 50, 16), torch.randn(1, 1, 50, 16), torch.randn(1, 2, 16)
    keys[0, 0, 4:40] = keys[0, 0, 4]
    full = RaggedLayer.from_dense(keys, values)
    mean = RaggedLayer.from_dense(keys, values, sinks=4, recent=10, compensate=torch.tensor([[True]]))
    torch.testing.assert_close(reference.decode(q, mean, RULE), reference.decode(q, full, RULE))


def test_no_fake_keys_leak():
    """Trap 24 (kvpress): evicted entries have exactly no weight, however the queries spread."""
    torch.manual_seed(4)
    keys, values = torch.randn(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    values[0, 0, 10:20] = 1e6  # what leaks would show
    keep = torch.ones(1, 1, 64, dtype=torch.bool)
    keep[0, 0, 10:20] = False
    layer = RaggedLayer.from_dense(keys, values, keep=keep)
    assert headkv.ragged_decode(torch.randn(1, 128, 16) * 30, layer).abs().max() == 0


@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (None, 3.0), (40, 3.0)])
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([4.0, -3.0, float("-inf"), 0.0])], ids=["no sinks", "sinks"]
)
def test_prefill_equals_extend_of_the_reference(window, softcap, holes, sinks):
    """The dense prefill and the ragged specification agree on whole prompts, with padding on the left and in between."""
    torch.manual_seed(5)
    n = 300
    q, keys, values = torch.randn(2, 4, n, 16), torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)
    valid = torch.ones(2, n, dtype=torch.bool)
    if holes:
        valid[1, :7], valid[1, 100:103] = False, False
    options = {"scale": 0.25, "sliding_window": window, "softcap": softcap, "sink_logits": sinks}
    got = prefill(q, keys, values, Rule(**options), valid=valid)
    layer = RaggedLayer.from_dense(keys, values, valid=valid)
    want = headkv.ragged_extend(q, layer, backend="reference", **options)
    for b in range(2):
        torch.testing.assert_close(got[b][:, valid[b]], want[b][:, valid[b]], rtol=1e-4, atol=1e-5)


def small_layer(**window):
    return RaggedLayer.from_dense(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), **window)


def sunk(sinks, **options):
    return headkv.ragged_decode(Q, small_layer(), sink_logits=sinks, **options)


Q = torch.randn(1, 4, 8)
FOLDING = {"recent": 2, "compensate": torch.tensor([[True, True]])}
BAD = {
    "q of ints": (lambda: headkv.ragged_decode(Q.int(), small_layer()), TypeError, "q must be float32"),
    "q of 4-D": (lambda: headkv.ragged_decode(Q[None], small_layer()), ValueError, r"\[B, HQ, D\]"),
    "q of another batch": (lambda: headkv.ragged_decode(Q.repeat(2, 1, 1), small_layer()), ValueError, "B=1 and D=8"),
    "q of another D": (lambda: headkv.ragged_decode(Q[..., :4], small_layer()), ValueError, "D=8"),
    "heads that do not divide": (lambda: headkv.ragged_decode(Q[:, :3], small_layer()), ValueError, "multiple of 2 heads"),
    "q on another device": (lambda: headkv.ragged_decode(Q.to("meta"), small_layer()), ValueError, "device cpu, got meta"),
    "no tokens": (lambda: headkv.ragged_extend(Q[:, :, None][:, :, :0], small_layer()), ValueError, "no empty dimension"),
    "more tokens than seen": (lambda: headkv.ragged_extend(torch.randn(1, 4, 6, 8), small_layer()), ValueError, "at most the 5"),
    "positions of floats": (lambda: headkv.ragged_extend(Q[:, :, None], small_layer(), query_positions=torch.ones(1, 1)), ValueError, "query_positions must be int"),
    "window 0": (lambda: headkv.ragged_decode(Q, small_layer(), sliding_window=0), ValueError, "sliding_window must be None or at least 1, got 0"),
    "window with compensation": (lambda: headkv.ragged_decode(Q, small_layer(**FOLDING), sliding_window=3), ValueError, "compensation"),
    "softcap 0": (lambda: headkv.ragged_decode(Q, small_layer(), softcap=0.0), ValueError, "softcap must be None or positive"),
    "scale NaN": (lambda: headkv.ragged_decode(Q, small_layer(), scale=float("nan")), ValueError, "scale must be None or positive"),
    "sinks of another number": (lambda: sunk(torch.zeros(3)), ValueError, r"sink_logits must have shape \[4\] like the heads of q, got \[3\]"),
    "sinks of a batch": (lambda: sunk(torch.zeros(1, 4)), ValueError, r"sink_logits must have shape \[HQ\], got \[1, 4\]"),
    "sinks of ints": (lambda: sunk(torch.zeros(4).int()), TypeError, "sink_logits must be None or a floating tensor .*, got torch.int32"),
    "a list of sinks": (lambda: sunk([0.0] * 4), TypeError, "sink_logits must be None or a floating tensor .*, got list"),
    "sinks elsewhere": (lambda: sunk(torch.zeros(4, device="meta")), ValueError, "sink_logits must be on cpu like q, got meta"),
    "a sink that is no number": (lambda: sunk(torch.tensor([0, 0, torch.nan, 0])), ValueError, r"sink_logits must be below infinity \(-inf: no sink\), got \[0.0, 0.0, nan, 0.0\]"),
    "an infinite sink": (lambda: sunk(torch.full((4,), torch.inf), backend="reference"), ValueError, "sink_logits must be below infinity"),
    "sinks of a step": (lambda: headkv.ragged_step(Q, Q[:, :2], Q[:, :2], small_layer(), sink_logits=Q[0, 0]), ValueError, r"sink_logits must have shape \[4\]"),
    "sinks of an extension": (lambda: headkv.ragged_extend(Q[:, :, None], small_layer(), sink_logits=Q[0, 0]), ValueError, r"sink_logits must have shape \[4\]"),
    "sinks of a prefill": (lambda: prefill(Q[:, :, None], Q[:, :2, None], Q[:, :2, None], Rule(1.0, sink_logits=Q[0, 0])), ValueError, r"sink_logits must have shape \[4\]"),
    "float64 and rust": (lambda: headkv.ragged_decode(Q.double(), small_layer(), backend="rust"), TypeError, "float64; the backend 'reference' computes in float64"),
    "float64 and triton": (lambda: headkv.ragged_extend(Q[:, :, None].double(), small_layer(), backend="triton"), TypeError, "the backend 'triton', got torch.float64"),
    "unknown backend": (lambda: headkv.ragged_decode(Q, small_layer(), backend="cuda"), ValueError, "backend must be one of 'auto', 'reference'"),
    "no layer": (lambda: headkv.ragged_decode(Q, torch.zeros(3)), TypeError, "layer must be a RaggedLayer"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_auto_says_what_it_chose():
    assert choose_backend(small_layer()) == "rust"
    assert choose_backend(small_layer(), dtype=torch.float64) == "reference"
    assert choose_backend(small_layer(), "reference") == "reference"
