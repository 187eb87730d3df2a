"""Scores that look at values, weights and rotations: against the papers' formulas written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation_cases import prompts
from prefills import prefill
from test_huggingface import compressed_as_masked

import headkv
from headkv.integrations.support import parts_of
from headkv.methods import Prefill, ScoredMethod
from headkv.models.tiny import FAMILIES, tiny_model
from headkv.prefill import Parts
from headkv.scorers import DefensiveScorer, ExpectedAttentionScorer, KeyDiffScorer, SnapKVScorer
from headkv.scorers.output import output_norms


def with_weight(p: Prefill, hidden: int = 24) -> Prefill:
    """A prefill whose layer has a random output projection."""
    width = p.queries.shape[0] * p.values.shape[-1]
    weight = torch.randn(hidden, width, generator=torch.Generator().manual_seed(1))
    return replace(p, parts=Parts(output=weight))


@pytest.mark.parametrize("group", [1, 3])
def test_output_norms(group, monkeypatch):
    p = with_weight(prefill(50, heads=2, group=group, dim=8))
    want = torch.zeros(2, 50, dtype=torch.float64)
    for h in range(2):
        for g in range(group):
            head = h * group + g
            rows = p.parts.output[:, head * 8 : (head + 1) * 8].double().T
            want[h] += (p.values[h].double() @ rows).abs().sum(-1) / group
    torch.testing.assert_close(output_norms(p, "x").double(), want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("headkv.scorers.output.BLOCK", 24 * group * 7)  # seven entries at a time
    torch.testing.assert_close(output_norms(p, "x").double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [0, 4, 100])
def test_defensive_scores(most):
    """Section 3 of arXiv 2510.13334, step by step."""
    w, n, kernel = 6, 40, 5
    p = with_weight(prefill(n, heads=2, group=2, dim=8, queries=w))
    q, k = p.queries.double().view(2, 2, w, 8), p.keys.double()
    logits = q @ k[:, None].mT * p.scale
    hidden = torch.arange(n) > torch.arange(n - w, n)[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., : n - w]
    pooled = torch.zeros_like(weights)
    for i in range(n - w):
        for j in range(max(0, i - kernel // 2), min(n - w, i + kernel // 2 + 1)):
            pooled[..., i] += weights[..., j] / kernel
    pooled *= (weights.sum(-1) / pooled.sum(-1))[..., None]
    worst = pooled.amax((1, 2))
    worst = torch.maximum(worst, worst.mean(1, keepdim=True))
    norms = output_norms(p, "x").double()[:, : n - w]
    want = worst * norms / norms.sum(0)
    mean = weights.mean((1, 2))
    for h in range(2):
        covered = 1 - float(mean[h].sum())
        for rank, i in enumerate(mean[h].argsort(descending=True).tolist()):
            covered += float(mean[h, i])
            if rank < most and covered < 0.6:
                want[h, i] = torch.inf
    want[want.isinf()] = want[~want.isinf()].max() if not want.isinf().all() else 1
    got = DefensiveScorer(w, kernel, mass=0.6).for_budget(most).score(p).double()
    assert (most == 0) == bool((got < got.max()).sum() == got.numel() - 1)
    free = got < got.max()
    torch.testing.assert_close(got[free], want[free], rtol=1e-4, atol=1e-7)


def test_worst_cases_by_hand():
    """Rows (.4 .1 .1 0) and (0 .1 .1 .4): the mean can not tell, the worst case is .4, and .25 at the least."""
    rows = torch.tensor([[0.4, 0.1, 0.1, 0.0], [0.0, 0.1, 0.1, 0.4]])
    worst = rows.amax(0)
    assert torch.maximum(worst, worst.mean()).tolist() == pytest.approx([0.4, 0.25, 0.25, 0.4])
    pooled = DefensiveScorer(kernel_size=3).pool(rows[:, None])
    torch.testing.assert_close(pooled.sum(-1), rows[:, None].sum(-1))


def test_defensive_kv_names_no_head_twice():
    p = with_weight(prefill(60, queries=32))
    for scope in ("layer", "model"):
        method = headkv.DefensiveKV(20, DefensiveScorer(window=8), scope=scope)
        assert method.whole_prompt is (scope == "model")
    keep = headkv.DefensiveKV(20, DefensiveScorer(window=8)).plan(p)
    assert int(keep.mask.sum()) == 60 and bool(keep.mask[:, -8:].all())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mistral", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [{}, {"covariance": False}, {"value_norm": False, "epsilon": 0.02}, {"window": 7}], ids=str
)
def test_expected_attention(family, options):
    """Against the model's own queries before they are turned, every future rotation made, in float64."""
    model, ids = tiny_model(family), prompts(1)["input_ids"]
    before: dict[int, torch.Tensor] = {}
    found: list[Prefill] = []

    class Spy:
        observed_queries = None

        def plan(self, p: Prefill) -> headkv.methods.Keep:
            found.append(p)
            return headkv.methods.Keep.all(p)

    handles = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            source = getattr(module, "q_norm", None) or getattr(module, "q_proj", None) or module.qkv_proj
            handles.append(
                source.register_forward_hook(lambda m, a, out, i=module.layer_idx: before.update({i: out}))
            )
    cache = headkv.RaggedCache.for_model(model, Spy())
    with torch.no_grad():
        model(ids, past_key_values=cache)
    [handle.remove() for handle in handles]
    n, sinks, future = 60, 4, 20
    scorer = ExpectedAttentionScorer(sinks=sinks, future=future, **options)
    for i, p in enumerate(found):
        q = before[i][0].double()
        q = q.transpose(0, 1) if q.ndim == 3 and q.shape[0] == n else q  # q_norm sees [n, HQ, D]
        if q.ndim == 2:
            q = q[:, : 4 * 16].view(n, 4, 16).transpose(0, 1)
        cos, sin = p.parts.rotary(torch.arange(n, n + future))
        width = cos.shape[1]
        turn = torch.zeros(future, 16, 16, dtype=torch.float64)
        for t in range(future):
            turn[t] = torch.eye(16)
            turn[t, :width, :width] = torch.diag(cos[t].double())
            for d in range(width // 2):
                turn[t, d, d + width // 2] = -sin[t, d]
                turn[t, d + width // 2, d] = sin[t, d + width // 2]
        ahead, keys = turn.mean(0), p.keys[:, sinks:].double()
        want = torch.zeros(2, n - sinks, dtype=torch.float64)
        for h in range(4):
            some = q[h, sinks:]
            mean, spread = some.mean(0), (some - some.mean(0)).T @ (some - some.mean(0)) / (n - sinks)
            logits = keys[h // 2] @ (ahead @ mean) * p.scale
            if options.get("covariance", True):
                spread = ahead @ spread @ ahead.T
                logits += torch.einsum("nd,de,ne->n", keys[h // 2], spread, keys[h // 2]) * p.scale**2 / 2
            if p.sink_logits is not None:
                logits = torch.cat([logits, p.sink_logits[h : h + 1].double()])
            want[h // 2] += logits.softmax(0)[: n - sinks] / 2
        want += options.get("epsilon", 0)
        if options.get("value_norm", True):
            want *= p.values[:, sinks:].double().norm(dim=-1)
        got = scorer.score(p).double()
        window = options.get("window", 0)
        assert got.shape == (2, n - window) and bool((got[:, :sinks] > got[:, sinks:].max()).all())
        torch.testing.assert_close(got[:, sinks:], want[:, : n - sinks - window], rtol=2e-4, atol=1e-7)


METHODS = {
    "CriticalKV": headkv.CriticalKV(20, SnapKVScorer(4, 3)),
    "CriticalAdaKV": headkv.CriticalKV(0.4, SnapKVScorer(4, 3), adaptive=True),
    "DefensiveKV": headkv.DefensiveKV(20, DefensiveScorer(window=6)),
    "Layer-DefensiveKV": headkv.DefensiveKV(20, DefensiveScorer(window=6), scope="model"),
    "Expected Attention": ScoredMethod(20, ExpectedAttentionScorer(future=30)),
    "KeyDiff": ScoredMethod(20, KeyDiffScorer()),
}


@pytest.mark.parametrize("way", ["greedy", "chunked prefill", "beam search"])
@pytest.mark.parametrize("name", METHODS)
def test_compressed_equals_masked_full_cache(name, way):
    """Batches with padding, GQA; the oracle's prefills get the same weights and rotations."""
    compressed_as_masked(tiny_model("llama"), METHODS[name], way)


@pytest.mark.parametrize("name", ["CriticalAdaKV", "Layer-DefensiveKV", "Expected Attention", "KeyDiff"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, name):
    compressed_as_masked(tiny_model(family), METHODS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_models_own(family):
    """What the output projection makes of values and weights is what the attention module returns."""
    model = tiny_model(family)
    parts = parts_of(model)
    assert len(parts) == 3 and all(part.rotary is not None for part in parts)
    modules = [m for m in model.get_decoder().modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    for module, part in zip(modules, parts, strict=True):
        assert part.output.data_ptr() == module.o_proj.weight.data_ptr()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: DefensiveScorer(window=8).score(prefill(20, queries=8)),
            ValueError,
            "needs the output projection",
        ),
        (lambda: ExpectedAttentionScorer().score(prefill(20)), ValueError, "needs the rotary embedding"),
        (
            lambda: ExpectedAttentionScorer().score(prefill(20, queries=5)),
            ValueError,
            "must hold all 20 tokens",
        ),
        (lambda: DefensiveScorer(window=8).score(prefill(20, queries=5)), ValueError, "must hold the last 8"),
        (
            lambda: headkv.CriticalKV(5, SnapKVScorer(3, 1)).plan(prefill(20)),
            ValueError,
            "CriticalKV needs the output",
        ),
        (lambda: DefensiveScorer(kernel_size=4), ValueError, "kernel_size must be odd"),
        (lambda: DefensiveScorer(mass=2), ValueError, "mass must be"),
        (lambda: ExpectedAttentionScorer(future=0), ValueError, "future must be"),
        (lambda: ExpectedAttentionScorer(covariance=1), TypeError, "covariance must be True or False"),
        (lambda: headkv.CriticalKV(5, first_share=2), ValueError, "first_share must be"),
        (lambda: headkv.CriticalKV(5, adaptive=1), TypeError, "adaptive must be"),
        (lambda: KeyDiffScorer(window=-1), ValueError, "window must be"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu(name):
    """The same heads keep as many entries as on the CPU, up to ties that rounding breaks."""
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        cache = headkv.RaggedCache.for_model(model, METHODS[name])
        with torch.no_grad():
            model(**{key: x.to(device) for key, x in prompts(3).items()}, past_key_values=cache)
        found.append(cache.lengths())
    assert int((found[0] - found[1]).abs().max()) <= 1
