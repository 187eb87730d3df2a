"""Methods that decide once the whole prompt is read: budgets over all layers, and a text that is read again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from generation_cases import LAYERS, SCORER, prompts
from prefills import prefill
from test_huggingface import WAYS, compressed_as_masked

import headkv
from headkv.allocators import AdaptiveAllocator, UniformAllocator
from headkv.heads.observe import observe
from headkv.logits import Rule, greatest_weights
from headkv.methods import Keep, Prefill, Prompt, ScoredMethod
from headkv.models.tiny import FAMILIES, tiny_model
from headkv.scorers import KVzipScorer

WHOLE = {
    "AdaKV over all layers": headkv.AdaKV(20, SCORER, scope="model"),
    "KVzip": headkv.KVzip(20, KVzipScorer((5, 9), chunk=17, lead=3, sinks=2, window=4)),
    "KVzip in the layer": headkv.KVzip(0.5, KVzipScorer(chunk=100, window=4), safeguard=0.2, scope="layer"),
}
DRAFTS = ("prompt lookup", "assistant")  # prompt and drafts in one call


@pytest.mark.parametrize("way", [way for way in WAYS if way not in DRAFTS])
@pytest.mark.parametrize("method", WHOLE)
def test_compressed_equals_masked_full_cache(method, way):
    cache = compressed_as_masked(tiny_model("llama"), WHOLE[method], way)
    assert int(cache.lengths().min()) < cache.seen


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, method):
    compressed_as_masked(tiny_model(family), WHOLE[method])


@pytest.mark.parametrize("method", WHOLE)
def test_an_explicit_cache_and_bare_calls(method):
    """One forward call, no `generate`: compressed when it has ended; the inner decoder will do, too."""
    model, chosen, ids = tiny_model("llama"), WHOLE[method], prompts(1)["input_ids"]
    caches = [headkv.RaggedCache.for_model(model, chosen) for _ in range(3)]
    chunked = headkv.RaggedCache.for_model(model, chosen, chunked_prefill=True)
    with torch.no_grad():
        model(ids, past_key_values=caches[0])
        model.get_decoder()(input_ids=ids, past_key_values=caches[1])
        model(
            inputs_embeds=model.get_input_embeddings()(ids), past_key_values=caches[2]
        ) if "Ada" in method else None
        for part in ids.split(25, 1):
            model(part, past_key_values=chunked)
    assert int(chunked.lengths().min()) == ids.shape[1], "it waits"
    chunked.finalize_prefill()
    for cache in (caches[1], chunked, *caches[2 : 2 + ("Ada" in method)]):
        assert torch.equal(cache.lengths(), caches[0].lengths())
        for one, other in zip(caches[0].layers, cache.layers, strict=True):
            assert torch.equal(one.row(0, 1).positions, other.row(0, 1).positions)
    caches[0].reset()
    with torch.no_grad():
        model(ids, past_key_values=caches[0])
    assert torch.equal(caches[0].lengths(), caches[1].lengths()), "a cache can be used again"


def test_a_total_over_all_layers_is_exact():
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    for budget in (5, 20, 0.3, 59, 60, 1.0, 3):
        cache = headkv.RaggedCache.for_model(model, headkv.AdaKV(budget, SCORER, scope="model", safeguard=0))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        entries = budget if isinstance(budget, int) else round(budget * 60)
        assert int(cache.lengths().sum()) == min(60, entries) * cache.lengths().numel()
    layers = cache.lengths().sum((1, 2))
    assert len(set(layers.tolist())) == 1  # budget 3 is all window


def test_layers_get_what_their_scores_say():
    """Two layers of two heads, six entries: the highest scores of all layers, by hand."""

    @dataclass(frozen=True)
    class Given:
        window: int = 0
        observed_queries: int = 0

        def score(self, layer: Prefill) -> torch.Tensor:
            high = {
                0: [[0.9, 0.8, 0.7, 0.1, 0.1, 0.1], [0.2] * 6],
                1: [[0.6, 0.5, 0.1, 0.1, 0.1, 0.1], [0.05] * 6],
            }
            return torch.tensor(high[layer.layer_idx])

    @dataclass(frozen=True)
    class TwoLayers:
        num_layers: int = 2
        length: int = 6

        def layer(self, layer_idx: int) -> Prefill:
            return prefill(6, heads=2, layer_idx=layer_idx, num_layers=2, queries=0)

    method = ScoredMethod(2, Given(), AdaptiveAllocator(safeguard=0), scope="model")
    counts = [keep.mask.sum(1).tolist() for keep in method.plan_prompt(TwoLayers())]
    # 8 slots: .9 .8 .7 .6 .5, then three of the six equal .2; no row is left empty, so one goes to the last.
    assert counts == [[3, 2], [2, 1]]
    even = replace(method, allocator=UniformAllocator())
    assert [keep.mask.sum(1).tolist() for keep in even.plan_prompt(TwoLayers())] == [[2, 2], [2, 2]]


def test_kvzip_scores_are_their_definition():
    """Against full attention over text, request and text again, in float64, with the columns that do not count taken out."""
    model, ids = tiny_model("llama").double(), prompts(1)["input_ids"]
    n, request, chunk, lead, sinks = 60, [7, 8, 9], 25, 4, 3
    seen: dict[int, Any] = {}
    want = torch.zeros(LAYERS, 2, n, dtype=torch.float64)
    for begin in range(0, n, chunk):
        end = min(n, begin + chunk)
        more = torch.tensor(
            [request + ids[0, max(0, begin - lead) : begin].tolist() + ids[0, begin:end].tolist()]
        )
        with observe(model, lambda attention: seen.update({attention.layer_idx: attention})), torch.no_grad():
            model(torch.cat([ids, more], 1), use_cache=False)
        here = [*range(min(sinks, begin)), *range(begin, end), *range(n, n + more.shape[1])]
        for i, attention in seen.items():
            keys = attention.keys[0][:, here]
            logits = attention.queries[0].view(2, 2, -1, 16)[:, :, n:] @ keys.mT[:, None] * attention.scale
            hidden = torch.tensor(here) > torch.arange(n, n + more.shape[1])[:, None]
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            first = min(sinks, begin)
            want[i, :, begin:end] = weights[..., first : first + end - begin].amax((1, 2))
    model = tiny_model("llama")
    scorer = KVzipScorer(request, chunk, lead, sinks, window=5)
    found: list[list[torch.Tensor]] = []

    @dataclass(frozen=True)
    class Ask:
        observed_queries: int = 0
        whole_prompt: bool = True

        def plan_prompt(self, prompt: Prompt) -> list[Keep]:
            found.append(scorer.score_prompt(prompt))
            assert prompt.length == n and torch.equal(prompt.input_ids, ids[0])
            return [Keep.all(prompt.layer(i)) for i in range(prompt.num_layers)]

    with torch.no_grad():
        cache = headkv.RaggedCache.for_model(model, Ask())
        model(ids, past_key_values=cache)
    got = torch.stack(found[0])
    assert got.shape == (LAYERS, 2, n - 5) and bool((got[..., :sinks] == 2).all())
    torch.testing.assert_close(got[..., sinks:].double(), want[..., sinks : n - 5], rtol=1e-4, atol=1e-5)
    assert cache.seen == n and int(cache.lengths().min()) == n, "what was read is forgotten again"


class Broken(Exception):
    pass


def test_all_or_nothing(monkeypatch):
    """A method or the memory fails: the whole prompt is still there, uncompressed, and it can be ended again."""
    model, ids = tiny_model("llama"), prompts(2)
    want = headkv.RaggedCache.for_model(model, WHOLE["KVzip"])
    with torch.no_grad():
        model(**ids, past_key_values=want)
    from_dense, calls = headkv.RaggedLayer.from_dense, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory, says the test")
        return from_dense(*args, **options)

    cache = headkv.RaggedCache.for_model(model, WHOLE["KVzip"])
    monkeypatch.setattr(headkv.RaggedLayer, "from_dense", full)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        model(**ids, past_key_values=cache)
    assert cache.seen == 60 and cache.lengths().tolist() == [[[60, 60], [54, 54]]] * LAYERS
    with pytest.raises(RuntimeError, match="finalize_prefill"):
        cache.snapshot()
    cache.finalize_prefill()
    assert torch.equal(cache.lengths(), want.lengths())


@pytest.mark.parametrize("fails", [1, 4])
def test_a_failure_while_reading_again_forgets_what_was_read(fails):
    model, ids = tiny_model("llama"), prompts(2)
    calls = []

    @dataclass(frozen=True)
    class Failing:
        observed_queries: int = 0
        whole_prompt: bool = True

        def plan_prompt(self, prompt: Prompt) -> list[Keep]:
            def watch(*args: Any) -> None:
                calls.append(1)
                if len(calls) == fails:
                    raise Broken

            prompt.read(prompt.input_ids[:9], watch)
            return [Keep.all(prompt.layer(i)) for i in range(prompt.num_layers)]

    cache = headkv.RaggedCache.for_model(model, Failing())
    with pytest.raises(Broken), torch.no_grad():
        model(**ids, past_key_values=cache)
    assert cache.seen == 60 and cache.lengths().tolist() == [[[60, 60], [54, 54]]] * LAYERS
    cache.finalize_prefill()
    assert cache.lengths().tolist() == [[[60, 60], [54, 54]]] * LAYERS


BAD = {
    "another number of layers": (lambda p: [Keep.all(p.layer(0))], ValueError, "must answer for 3 layers, got 1"),
    "reading nothing": (lambda p: p.read(p.input_ids[:0], print), ValueError, "input_ids must be int64"),
    "reading floats": (lambda p: p.read(torch.zeros(3), print), ValueError, "got torch.float32"),
    "a batch": (lambda p: p.read(p.input_ids[None], print), ValueError, "of shape"),
}  # fmt: skip


@pytest.mark.parametrize("answer, error, message", BAD.values(), ids=BAD)
def test_bad_answers_are_named(answer, error, message):
    @dataclass(frozen=True)
    class Bad:
        observed_queries: int = 0
        whole_prompt: bool = True

        def plan_prompt(self, prompt: Prompt) -> Any:
            return answer(prompt)

    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, Bad())
    with pytest.raises(error, match=message), torch.no_grad():
        model(**prompts(1), past_key_values=cache)
    assert cache.seen == 60


def test_embeddings_can_not_be_read_again():
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, headkv.KVzip(40))
    embeddings = model.get_input_embeddings()(prompts(1)["input_ids"]).detach()
    with pytest.raises(ValueError, match="input_ids must be given"), torch.no_grad():
        model(inputs_embeds=embeddings, past_key_values=cache)


def test_hooks_go_with_the_cache():
    model = tiny_model("llama")
    decoder = model.get_decoder()
    before = len(decoder._forward_hooks), len(decoder._forward_pre_hooks)
    cache = headkv.RaggedCache.for_model(model, headkv.KVzip(20))
    assert len(decoder._forward_hooks) == before[0] + 1
    del cache
    assert (len(decoder._forward_hooks), len(decoder._forward_pre_hooks)) == before


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: headkv.AdaKV(0.2, scope="all"), ValueError, "scope must be one of 'layer', 'model'"),
        (lambda: headkv.AdaKV(0.2, pyramid=True, scope="model"), ValueError, "pyramid must be False"),
        (lambda: headkv.ScoredMethod(0), ValueError, "budget must be"),
        (lambda: headkv.ScoredMethod(0.2, scorer=3), TypeError, "scorer must be an object with window"),
        (lambda: headkv.ScoredMethod(0.2, allocator=AdaptiveAllocator), TypeError, "allocator must be"),
        (lambda: KVzipScorer(chunk=0), ValueError, "chunk must be"),
        (lambda: KVzipScorer((1, -1)), ValueError, "request must be"),
        (lambda: KVzipScorer(sinks=1.5), TypeError, "sinks must be"),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_papers_are_compositions():
    """SnapKV, PyramidKV, AdaKV and HeadKV keep what a `ScoredMethod` of their parts keeps."""
    p = prefill(60, queries=8)
    for method in (headkv.SnapKV(20, SCORER), headkv.AdaKV(0.3, SCORER), headkv.PyramidKV(20, scorer=SCORER)):
        by_parts = ScoredMethod(method.budget, SCORER, method.composed.allocator)
        assert torch.equal(method.plan(p).mask, by_parts.plan(p).mask)
        assert (
            method.stored_share(60)
            == by_parts.stored_share(60)
            == pytest.approx({20: 1 / 3, 0.3: 0.3}[method.budget])
        )
        assert type(method).for_share(0.25, 60).stored_share(60) == 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("method", WHOLE)
def test_on_a_gpu(method):
    """What is kept, and what comes after it, as on the CPU; the text is read again by the kernels."""
    kept = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        inputs = {name: x.to(device) for name, x in prompts(3).items()}
        cache = headkv.RaggedCache.for_model(model, WHOLE[method])
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            logits = model(inputs["input_ids"][:, :1], past_key_values=cache).logits
        kept.append((cache.lengths(), logits.cpu()))
    assert torch.equal(kept[0][0], kept[1][0])
    torch.testing.assert_close(kept[0][1], kept[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [1, 100, 700, 1 << 20], ids=["a query", "a few", "most", "all"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(0.25),
        Rule(0.3, softcap=4.0),
        Rule(0.25, sliding_window=6),
        Rule(0.25, sink_logits=torch.linspace(-1, 2, 6)),
    ],
    ids=["plain", "softcap", "window", "sinks"],
)
def test_greatest_weights_however_many_queries_at_a_time(rule, block, monkeypatch):
    """Against the formula in float64, one query after the other; keys before those of the queries have gaps."""
    monkeypatch.setattr("headkv.logits.BLOCK_CPU", block)
    torch.manual_seed(0)
    queries, keys = torch.randn(6, 11, 16), torch.randn(3, 24, 16)
    positions = torch.cat([torch.tensor([0, 1, 5]), torch.arange(20, 41)])
    expected = torch.zeros(3, 24, dtype=torch.float64)
    for head in range(6):
        for i in range(11):
            own = positions[13 + i]
            products = keys[head // 2].double() @ queries[head, i].double() * rule.scale
            if rule.softcap is not None:
                products = rule.softcap * torch.tanh(products / rule.softcap)
            far = positions > own
            if rule.sliding_window is not None:
                far |= own - positions >= rule.sliding_window
            shares = products.masked_fill(far, -torch.inf).exp()
            sink = 0 if rule.sink_logits is None else rule.sink_logits[head].double().exp()
            weights = shares / (shares.sum() + sink)
            expected[head // 2] = torch.maximum(expected[head // 2], weights)
    found = greatest_weights(queries, keys, positions, rule)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
