"""Presses inside headkv: what they see, what they can not have, and that what they mask is gone.

The presses here follow kvpress's contract and need nothing of it; its own are in `test_kvpress_realize.py`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from masked_oracle import oracle_cache
from prefills import prefill
from torch import Tensor

import headkv
from headkv.integrations.kvpress import KVPressScorer, realize
from headkv.integrations.support import parts_of
from headkv.methods import AdaKV, SnapKV
from headkv.models.tiny import tiny_model
from headkv.scorers import KeyNormScorer, ObservedAttentionScorer


@dataclass
class Press:
    """What kvpress calls with `score`, as a function."""

    function: Any
    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        return self.function(module, hidden_states, keys, values, attentions, kwargs)


def test_keys_and_values_are_a_batch_of_one() -> None:
    p = prefill(40)
    norm = KVPressScorer(Press(lambda m, h, keys, values, a, k: -keys.norm(dim=-1)), window=8)
    torch.testing.assert_close(norm.score(p), KeyNormScorer(8).score(p))
    assert torch.equal(AdaKV(20, norm).plan(p).mask, AdaKV(20, KeyNormScorer(8)).plan(p).mask)
    values = KVPressScorer(Press(lambda m, h, keys, values, a, k: values.sum(-1)))
    assert torch.equal(values.score(p), p.values.sum(-1))


@pytest.mark.parametrize("softcap, sinks", [(None, False), (3.0, False), (None, True)], ids=str)
def test_attention_weights_of_as_many_queries_as_asked(softcap: float | None, sinks: bool) -> None:
    p = prefill(30, softcap=softcap, sinks=sinks)

    def accumulated(
        module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Tensor, kwargs: Any
    ) -> Tensor:
        heads = module.config.num_key_value_heads
        assert attentions.shape[1] == module.config.num_attention_heads == 6
        assert hidden.shape[1] == keys.shape[2] == 30 and module.layer_idx == 0
        return attentions.sum(2).view(1, heads, -1, keys.shape[2]).mean(2)

    whole = KVPressScorer(Press(accumulated), window=4, observed_queries=None)
    torch.testing.assert_close(whole.score(p), ObservedAttentionScorer(4).score(p))
    last = KVPressScorer(Press(accumulated), window=4, observed_queries=1).score(p)
    assert torch.equal(
        SnapKV(9, KVPressScorer(Press(accumulated), 4, 1)).plan(p).mask[:, :26].sum(1), torch.tensor([5] * 3)
    )
    assert float(last.sum(1).max()) <= 1
    nothing: list[Any] = []
    KVPressScorer(Press(lambda m, h, k, v, a, kw: nothing.append(a) or k.sum(-1))).score(p)
    assert nothing == [None]


@pytest.mark.parametrize(
    "function, what",
    [
        (lambda m, h, k, v, a, kw: m.q_proj(h), "module.q_proj"),
        (lambda m, h, k, v, a, kw: hasattr(m, "k_proj"), "module.k_proj"),
        (lambda m, h, k, v, a, kw: m.config.rope_theta, "module.config.rope_theta"),
        (lambda m, h, k, v, a, kw: h[:, 4:], "hidden_states"),
        (lambda m, h, k, v, a, kw: h.mean(), "hidden_states.mean"),
        (lambda m, h, k, v, a, kw: kw["position_embeddings"], r"kwargs\['position_embeddings'\]"),
        (lambda m, h, k, v, a, kw: kw["hidden_states"], r"kwargs\['hidden_states'\]"),
    ],
)
def test_parts_of_the_model_are_refused_by_name(function: Any, what: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Press needs {what}, which this prefill does not have"):
        KVPressScorer(Press(function)).score(prefill(20))


def needs_attention(m: Any, h: Any, k: Tensor, v: Tensor, attentions: Any, kw: Any) -> Tensor:
    if attentions is None:
        raise AssertionError("no attention")
    return k.sum(-1)


@pytest.mark.parametrize(
    "scorer, message",
    [
        (
            KVPressScorer(Press(needs_attention)),
            r"Press refused its input \(no attention\), with observed_queries=0",
        ),
        (
            KVPressScorer(Press(lambda m, h, k, v, a, kw: k)),
            r"must have shape \[1, 3, 20\], got \[1, 3, 20, 16\]",
        ),
        (KVPressScorer(Press(needs_attention), 0, 9), "queries must hold the last 9 tokens, got 5"),
    ],
)
def test_refusals(scorer: KVPressScorer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(prefill(20, queries=5))


def test_bad_parameters() -> None:
    with pytest.raises(TypeError, match="press must be an object with score"):
        KVPressScorer(None)
    with pytest.raises(ValueError, match="window must be an int of at least 0, got -1"):
        KVPressScorer(Press(None), window=-1)


def by_weights(m: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
    """How well each key agrees with the mean rotated query, made from the hidden states by the model's weights."""
    batch, n, _ = hidden.shape
    queries = m.q_proj(hidden).view(batch, n, -1, m.head_dim).transpose(1, 2)
    cos, sin = (x[:, None] for x in kwargs["position_embeddings"])
    left, right = queries.chunk(2, -1)
    queries = queries * cos + torch.cat([-right, left], -1) * sin
    queries = queries.view(batch, keys.shape[1], -1, n, m.head_dim).mean((2, 3))
    return (keys * queries[:, :, None]).sum(-1)


class BasePress:
    """Masks the half of each layer's entries with the lowest scores, whichever head has them."""

    def __init__(self, function: Any = by_weights, **attributes: Any) -> None:
        self.function, self.models = function, []
        vars(self).update(attributes)

    def post_init_from_model(self, model: Any) -> None:
        self.models.append(model)

    def compress(self, module: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        scores = self.function(module, *arguments)
        low = scores.reshape(-1).argsort()[: scores.numel() // 2]
        n = scores.shape[2]
        module.masked_key_indices = (torch.zeros_like(low), low // n, low % n)
        return arguments[1], arguments[2]

    def forward_hook(self, module: Any, inputs: Any, kwargs: Any, output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        n = kwargs["hidden_states"].shape[1]
        if kwargs["cache_position"][-1] + 1 == n:
            at = module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
            layer.keys, layer.values = self.compress(*at)
        return output

    @contextmanager
    def __call__(self, model: Any) -> Any:
        self.post_init_from_model(model)
        attentions = [layer.self_attn for layer in model.model.layers]
        handles = [a.register_forward_hook(self.forward_hook, with_kwargs=True) for a in attentions]
        for attention in attentions:
            attention.rotary_emb = model.model.rotary_emb
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class ExitPress(BasePress):
    """The same entries, but masked when its block ends, from a cache that it remembers."""

    @contextmanager
    def __call__(self, model: Any) -> Any:
        seen: list[Any] = []

        def remember(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            seen.append((module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs))

        attentions = [layer.self_attn for layer in model.model.layers]
        handles = [a.register_forward_hook(remember, with_kwargs=True) for a in attentions]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for call in seen:
            self.compress(*call)


def ids(n: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(n))


def masked_by_itself(model: Any, press: BasePress, tokens: Tensor) -> Tensor:
    """What the press leaves visible in an ordinary cache, `[L, H, n]`."""
    from transformers import DynamicCache

    n, cache = tokens.shape[1], DynamicCache()
    visible = torch.ones(3, 2, n, dtype=torch.bool)
    with press(model), torch.no_grad():
        model(tokens, past_key_values=cache, cache_position=torch.arange(n))
    for layer, mask in zip(model.model.layers, visible, strict=True):
        _, head, position = layer.self_attn.masked_key_indices
        mask[head, position] = False
    return visible


def kept(cache: Any, n: int, batch: int = 0, first: int = 0) -> Tensor:
    """Which of n tokens from `first` on each row stores, `[L, H, n]`."""
    mask = torch.zeros(3, 2, n, dtype=torch.bool)
    for layer, rows in zip(cache.layers, mask, strict=True):
        for head, row in enumerate(rows):
            row[layer.row(batch, head).positions.long() - first] = True
    return mask


@pytest.mark.parametrize("kind", [BasePress, ExitPress])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_masking_press_really_evicts(kind: Any, family: str) -> None:
    tokens, model = ids(40), tiny_model(family)
    visible = masked_by_itself(tiny_model(family), kind(), tokens)
    before = {name: [*vars(m), *m._modules] for name, m in model.named_modules()}
    with headkv.compress(model, realize(kind())) as session, torch.no_grad():
        model(tokens)
        small = session.cache.nbytes
        assert torch.equal(kept(session.cache, 40), visible) and visible.sum() == 3 * 40
        out = [model(ids(1 + i)[:, :1], past_key_values=session.cache).logits for i in range(3)]
    assert before == {name: [*vars(m), *m._modules] for name, m in model.named_modules()}
    with headkv.compress(model, headkv.FullCache()) as full, torch.no_grad():
        model(tokens)
    assert small < full.cache.nbytes

    oracle = tiny_model(family)
    cache = oracle_cache(oracle, Given(visible))
    with torch.no_grad():
        oracle(tokens, past_key_values=cache)
        truth = [oracle(ids(1 + i)[:, :1], past_key_values=cache).logits for i in range(3)]
    torch.testing.assert_close(out, truth, atol=1e-4, rtol=0)


@dataclass
class Given:
    """A method that keeps what it is told to."""

    visible: Tensor
    observed_queries = 0

    def plan(self, p: Any) -> Any:
        return headkv.methods.Keep(self.visible[p.layer_idx])


@pytest.mark.parametrize("kind", [BasePress, ExitPress])
def test_chunks_and_padding_change_nothing(kind: Any) -> None:
    model, text = tiny_model("llama"), ids(30, batch=2)
    mask = torch.ones_like(text)
    mask[1, :7] = 0
    press = kind()
    with headkv.compress(model, realize(press), chunked_prefill=True) as session, torch.no_grad():
        cache = None
        for part in (slice(0, 5), slice(5, 22), slice(22, 30)):
            where = {"attention_mask": mask[:, : part.stop], "past_key_values": cache}
            model(text[:, part], position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, part], **where)
            cache = session.cache
        cache.finalize_prefill()
    for b, alone in enumerate((text[:1], text[1:, 7:])):
        visible = masked_by_itself(tiny_model("llama"), kind(), alone)
        assert torch.equal(kept(cache, alone.shape[1], b, first=7 * b), visible)
    assert len(press.models) == (2 if kind is BasePress else 0)


def test_weights_and_hidden_states_serve_a_scorer_of_any_method() -> None:
    model, tokens = tiny_model("llama"), ids(40)
    scorer = KVPressScorer(Press(by_weights), window=4)
    seen: list[Tensor] = []
    handle = model.model.layers[2].self_attn.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["hidden_states"]), with_kwargs=True
    )
    heard: list[Any] = []
    other = KVPressScorer(Press(lambda m, h, k, *rest: heard.append(h) or k.sum(-1)))
    for method in (AdaKV(20, scorer), AdaKV(20, scorer, scope="model"), SnapKV(20, other)):
        with headkv.compress(model, method) as session, torch.no_grad():
            model.generate(tokens, max_new_tokens=3, do_sample=False)
        assert session.cache.lengths().sum() == 3 * 2 * (20 + 2)
    handle.remove()
    assert torch.equal(heard[2], seen[-3]) and len(heard) == 3
    layers = session.cache.layers
    assert all(layer.hidden is None and layer.observed is None for layer in layers)


def test_a_wrapper_of_all_attention_functions_is_not_in_the_way() -> None:
    """As kvpress wraps them on import, headkv's among them if it came first."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = headkv.integrations.hook.NAME
    ours = ALL_ATTENTION_FUNCTIONS[name]

    def wrapper(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert query.shape[2] <= key.shape[2]
        return ours(module, query, key, *args, **kwargs)

    model, tokens = tiny_model("llama"), ids(20)
    for start in (headkv.compress, headkv.RaggedCache.for_model):
        ALL_ATTENTION_FUNCTIONS[name] = wrapper
        ready = start(model, SnapKV(8, KeyNormScorer(2)))
        if start is headkv.compress:
            with ready:
                model(tokens)
        else:
            model(tokens, past_key_values=ready)
        assert ALL_ATTENTION_FUNCTIONS[name] is ours


def changes(m: Any, h: Any, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    keys[..., 0] = 0
    return values.sum(-1)


def prunes_all_of_one_head(m: Any, h: Any, keys: Tensor, *rest: Any) -> Tensor:
    return torch.arange(2.0)[None, :, None].expand(1, 2, keys.shape[2]).clone()


def test_an_emptied_head_keeps_its_newest_entry() -> None:
    model = tiny_model("llama")
    with headkv.compress(model, realize(BasePress(prunes_all_of_one_head))) as session, torch.no_grad():
        model(ids(12))
    assert session.cache.lengths()[:, 0].tolist() == [[1, 12]] * 3
    assert session.cache.layers[0].row(0, 0).positions.tolist() == [11]


class Grows(ExitPress):
    """Leaves the cache longer than the prompt."""

    def compress(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        layer = rest[-1]["past_key_values"].layers[module.layer_idx]
        layer.keys = torch.cat([keys, keys[:, :, :1]], 2)


@pytest.mark.parametrize(
    "press, error, message",
    [
        (None, TypeError, "press must be an object with forward_hook, got None"),
        (BasePress, TypeError, "press must be an object with forward_hook"),
        (BasePress(decoding=True), ValueError, "decoding of BasePress must be False"),
        (BasePress(compression_interval=8), ValueError, "BasePress does so while decoding"),
        (BasePress(decoding_press=None), ValueError, "BasePress does so while decoding"),
    ],
)
def test_what_is_no_method_for_prompts(press: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        realize(press)
    with pytest.raises(ValueError, match="observed_queries must be an int of at least 0, got -1"):
        realize(BasePress(), observed_queries=-1)


@pytest.mark.parametrize("press", [BasePress(changes), Grows()])
def test_a_press_that_does_more_than_mask(press: BasePress) -> None:
    model = tiny_model("llama")
    with (
        headkv.compress(model, realize(press)),
        pytest.raises(ValueError, match="must only mask entries, but"),
        torch.no_grad(),
    ):
        model(ids(12))
    with torch.no_grad():
        model(ids(12))  # and the model is as it was


def test_without_a_model() -> None:
    with pytest.raises(NotImplementedError, match=r"BasePress needs kwargs\['hidden_states'\]"):
        realize(BasePress()).plan(prefill(20))

    class Prompt:
        input_ids = torch.arange(20)

        def layer(self, layer_idx: int) -> Any:
            return prefill(20)

    with pytest.raises(ValueError, match="ExitPress needs the model, which this prompt does not have"):
        realize(ExitPress()).plan_prompt(Prompt())


def test_what_a_prefill_says_of_hidden_states_and_the_model() -> None:
    parts = parts_of(tiny_model("llama"))[0]
    p = replace(prefill(20), parts=parts, hidden=torch.zeros(20, 64))
    assert p.parts.module.layer_idx == 0 and "hidden=<20 x 64>" in repr(p) and "LlamaAttention" not in repr(p)
    with pytest.raises(ValueError, match=r"hidden must have shape \[20, hidden\], got \[19, 64\]"):
        replace(p, hidden=torch.zeros(19, 64))


AGREE = """
import torch
try:
    from kvpress import KnormPress, ObservedAttentionPress, SnapKVPress
except ImportError as error:
    raise SystemExit(f"skip: {error}")
from prefills import prefill
from headkv.integrations.kvpress import KVPressScorer
from headkv.scorers import KeyNormScorer, ObservedAttentionScorer, SnapKVScorer

p = prefill(100)
for theirs, ours in (
    (KVPressScorer(KnormPress()), KeyNormScorer(0)),
    (KVPressScorer(SnapKVPress(window_size=16), 16, 16), SnapKVScorer(16, 5, "avg")),
    (KVPressScorer(ObservedAttentionPress(), 0, None), ObservedAttentionScorer(0, average=True)),
):
    torch.testing.assert_close(theirs.score(p), ours.score(p))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="needs kvpress: pip install kvpress")
def test_the_library_agrees_with_our_scorers() -> None:
    """In a process of its own: importing kvpress wraps the attention functions of transformers."""
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {path!r}\n{AGREE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"kvpress is there but does not import: {done.stderr[6:].strip()}")
    assert done.returncode == 0, done.stderr
