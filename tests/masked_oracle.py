"""The oracle of compression: an ordinary full cache in which a boolean mask hides exactly what each head has evicted.

It shares no code with the ragged cache: everything stays stored, every step recomputes who may see what over the whole
text, and a compensation entry is the mean over the hidden part of the full cache.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from headkv.heads.observe import observe
from headkv.integrations.support import parts_of
from headkv.prefill import Parts, Prefill

NAME = "headkv-test-oracle"


@dataclass
class Handle:
    layer: OracleLayer


class OracleLayer(DynamicLayer):
    """All keys and values ever seen, and which prompt entries the method evicted."""

    def __init__(self, method, layer_idx, num_layers, chunked):
        super().__init__()
        self.method, self.layer_idx, self.num_layers, self.chunked = method, layer_idx, num_layers, chunked
        self.plan = None  # keep [B, H, n], sinks, recent, compensate [B, H]
        self.queries = None
        self.rule = {}  # scale, sliding_window, softcap, sink_logits
        self.decode = None  # (entries, every, window, kernel_size) of a decode budget
        self.budgets, self.began, self.planned = None, 0, 0
        self.rounding = None  # of keys and values once the prompt is planned
        self.parts = Parts()
        # Of the cache: for methods that see the whole prompt.
        self.siblings, self.ids, self.model = [], [], None

    def update(self, keys, values, *args, **kwargs):
        if self.plan is not None and self.rounding is not None:
            keys, values = self.rounding(keys, values)
        super().update(keys, values)
        return Handle(self), Handle(self)

    def make_plan(self, valid, scale, sliding_window, softcap, sink_logits):
        batch, heads, n, _ = self.keys.shape
        n = valid.shape[1]
        keep = torch.zeros(batch, heads, n, dtype=torch.bool)
        sinks, recent = torch.zeros(2, batch, heads, dtype=torch.int64)
        compensate = torch.zeros(batch, heads, dtype=torch.bool)
        self.rule = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
        self.rule["sink_logits"] = sink_logits
        for b in range(batch):
            real = valid[b]
            if getattr(self.method, "whole_prompt", False):
                chosen = self.method.plan_prompt(OraclePrompt(self, b, real))[self.layer_idx]
            else:
                chosen = self.method.plan(self.prefill(b, real))
            keep[b, :, real] = chosen.mask
            if chosen.recent is not None:
                sinks[b], recent[b] = chosen.sinks, chosen.recent
            if chosen.compensate is not None and sliding_window is None:
                compensate[b] = chosen.compensate
        # Windowed rows evict nothing for good: they see less.
        keep |= (recent > 0)[..., None] & valid[:, None]
        self.plan = [keep, sinks, recent, compensate]
        if self.rounding is not None:
            self.keys, self.values = self.rounding(self.keys, self.values)

    def prefill(self, b, real):
        """One sequence of the prompt, without its padding."""
        n = len(real)
        tensors = (
            self.queries[b, :, :n][:, real],
            self.keys[b, :, :n][:, real],
            self.values[b, :, :n][:, real],
        )
        return Prefill(*tensors, self.layer_idx, self.num_layers, **self.rule, parts=self.parts)

    def make_windows(self, valid, sliding_window):
        """The plan of a method whose heads stream from the first token: nothing is evicted, rows see less."""
        batch, heads = self.keys.shape[:2]
        where = {"layer_idx": self.layer_idx, "num_layers": self.num_layers, "num_kv_heads": heads}
        lengths = [None if self.chunked else int(n) for n in valid.sum(1)]
        windows = [self.method.prefill_windows(**where, length=n) for n in lengths]
        none = torch.zeros(heads, dtype=torch.bool)
        compensate = torch.stack([none if w.compensate is None else w.compensate for w in windows])
        keep = valid[:, None].expand(batch, heads, -1)
        sinks, recent = (torch.stack([getattr(w, name) for w in windows]) for name in ("sinks", "recent"))
        self.plan = [keep, sinks, recent, compensate & (sliding_window is None)]

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:  # older transformers give the length to keep
            tokens_to_remove -= self.keys.shape[2]
        if tokens_to_remove >= 0:
            return
        super().crop(tokens_to_remove)
        total = self.keys.shape[2]
        self.queries = self.queries[:, :, :total]
        self.plan[0] = self.plan[0][:, :, :total]

    def reorder_cache(self, index):
        super().reorder_cache(index)
        self.queries = self.queries[index]
        if self.plan is not None:
            self.plan = [part[index] for part in self.plan]
        if self.budgets is not None:
            self.budgets = self.budgets[index]

    def replan(self):
        """Rows that have outgrown their decode budget, one by one, by the last queries, as SnapKV chooses."""
        _, _, window, kernel_size = self.decode
        keep, seen = self.grown(), self.planned
        group = self.queries.shape[1] // self.keys.shape[1]
        for b, h in (self.budgets > 0).nonzero().tolist():
            stored = keep[b, h].nonzero()[:, 0]
            if len(stored) <= (most := int(self.budgets[b, h])):
                continue
            q = self.queries[b, h * group : (h + 1) * group, seen - window : seen]
            logits = q @ self.keys[b, h, stored].T * self.rule["scale"]
            if cap := self.rule["softcap"]:
                logits = cap * torch.tanh(logits / cap)
            late = stored > torch.arange(seen - window, seen)[:, None]
            weights = logits.masked_fill(late, float("-inf")).exp()
            total = weights.sum(-1, keepdim=True)
            if (sinks := self.rule["sink_logits"]) is not None:
                total = total + sinks[h * group : (h + 1) * group, None, None].exp()
            weights = weights / total
            looked_at = weights[..., :-window].mean((0, 1)).tolist()
            half = kernel_size // 2
            pooled = [max(looked_at[max(0, i - half) : i + half + 1]) for i in range(len(looked_at))]
            ranked = sorted(range(len(pooled)), key=lambda i: (-pooled[i], i))
            keep[b, h, stored[ranked[most - window :]]] = False
        self.plan[0] = keep

    def grown(self):
        """What is stored of everything that was seen before this call."""
        keep = self.plan[0]
        new = torch.ones(*keep.shape[:2], self.planned - keep.shape[2], dtype=torch.bool)
        return torch.cat([keep, new], 2)


class OracleHybridLayer(OracleLayer, LinearAttentionAndFullAttentionLayer):
    """The same where the layer has a state beside keys and values."""


def bound(layers, seen):
    """Before a call: all layers' rows are planned again, if that is due."""
    entries, every, window, _ = layers[0].decode
    if layers[0].budgets is None:
        for layer in layers:
            layer.began = layer.planned = seen
        stored = torch.stack([layer.grown().sum(2) for layer in layers]).double()
        rows = torch.stack([layer.plan[2] == 0 for layer in layers])
        for i, layer in enumerate(layers):
            layer.budgets = torch.zeros_like(layer.plan[2])
            for b in range(stored.shape[1]):
                mine = stored[:, b][rows[:, b]]
                exact = window + 1 + mine / mine.sum() * len(mine) * (entries - window - 1)
                whole, left = exact.floor(), round(float(exact.sum() - exact.floor().sum()))
                whole[sorted(range(len(mine)), key=lambda r: (-round(float(exact[r] % 1), 9), r))[:left]] += 1
                spread = torch.zeros(stored[:, b].shape, dtype=torch.long)
                spread[rows[:, b]] = whole.long()
                layer.budgets[b] = spread[i]
    if seen - layers[0].planned >= every and seen - layers[0].began >= window:
        for layer in layers:
            layer.planned = seen
            layer.replan()


class OraclePrompt:
    """A prompt for methods that see all of it. What is read behind it is read with it, by a copy with eager attention."""

    def __init__(self, layer, batch, real):
        self.layers, self.batch, self.real = layer.siblings, batch, real
        self.num_layers, self.length = len(self.layers), int(real.sum())

    @property
    def input_ids(self):
        return torch.cat(self.layers[0].ids, 1)[self.batch, : len(self.real)][self.real]

    def layer(self, layer_idx):
        return self.layers[layer_idx].prefill(self.batch, self.real)

    def read(self, input_ids, watch):
        model, text = copy.deepcopy(self.layers[0].model), torch.cat([self.input_ids, input_ids])
        model.set_attn_implementation("eager")
        m = len(input_ids)

        def watcher(attention):
            order = [layer.number for layer in self.layers]
            watch(order.index(attention.layer_idx), attention.queries[0, :, -m:], attention.keys[0, :, -m:])

        with observe(model, watcher), torch.no_grad():
            model(text[None], use_cache=False)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    layer = key.layer
    keys, values = layer.keys, layer.values
    batch, heads, total, dim = keys.shape
    tokens, group = query.shape[2], query.shape[1] // heads
    scale = dim**-0.5 if scaling is None else scaling
    valid = (
        torch.ones(batch, total, dtype=torch.bool)
        if attention_mask is None
        else attention_mask[:, :total].bool()
    )
    whole = getattr(layer.method, "whole_prompt", False)
    s_aux = None if s_aux is None else s_aux.detach()
    layer.rule = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "sink_logits": s_aux}
    if layer.plan is None and layer.chunked and tokens == 1 and total > 1:
        # With a whole prompt all layers, when the first is called.
        for one in layer.siblings if whole or layer.decode else [layer]:
            one.make_plan(valid[:, : total - 1], **(one.rule or layer.rule))
        keys, values = layer.keys, layer.values  # which may be rounded now
    if layer.plan is None and getattr(layer.method, "streaming_prefill", False):
        layer.make_windows(valid, sliding_window)
    first = layer.plan is None
    if layer.decode is not None and not first and layer is layer.siblings[0]:
        bound(layer.siblings, total - tokens)
    layer.queries = query if layer.queries is None else torch.cat([layer.queries, query], 2)

    where = torch.arange(total)
    now = torch.arange(total - tokens, total)
    eligible = valid[:, None, None, :] & (where <= now[:, None])  # [B, 1, T, N]
    eligible = eligible.expand(batch, heads, tokens, total)
    visible = eligible
    compensate = torch.zeros(batch, heads, dtype=torch.bool)
    if not first:
        keep, sinks, recent, compensate = layer.plan
        never_evicted = torch.ones(batch, heads, total - keep.shape[2], dtype=torch.bool)
        visible = visible & torch.cat([keep, never_evicted], 2)[:, :, None]
        rank = visible.cumsum(3) - 1
        newest = visible.sum(3, keepdim=True) - 1
        inside = (rank < sinks[:, :, None, None]) | (rank > newest - recent[:, :, None, None])
        visible = visible & (inside | (recent == 0)[:, :, None, None])
    if sliding_window is not None:
        visible = visible & (now[:, None] - where < sliding_window)

    def logits_of(some_keys):
        logits = query.unflatten(1, (heads, group)) @ some_keys.transpose(-1, -2)[:, :, None] * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logits = logits_of(keys).masked_fill(~visible[:, :, None], float("-inf"))  # [B, H, G, T, N]
    hidden = (eligible & ~visible).float()
    number = hidden.sum(3)  # [B, H, T]
    mean_key = torch.einsum("bhtn,bhnd->bhtd", hidden, keys) / number[..., None]
    mean_value = torch.einsum("bhtn,bhnd->bhtd", hidden, values) / number[..., None]
    extra = torch.einsum("bhgtd,bhtd->bhgt", query.unflatten(1, (heads, group)), mean_key) * scale
    if softcap is not None:
        extra = softcap * torch.tanh(extra / softcap)
    takes_part = (compensate[:, :, None] & (number > 0))[:, :, None]
    extra = torch.where(takes_part, extra + number[:, :, None].log(), float("-inf"))
    weights = torch.cat([logits, extra[..., None]], -1).softmax(-1).nan_to_num()  # pad queries see nothing
    if s_aux is not None:
        # What a head looks at has a share of e^lse / (e^lse + e^sink) of its attention; the sink has the rest.
        lse = torch.cat([logits, extra[..., None]], -1).logsumexp(-1)
        weights = weights * torch.sigmoid(lse - s_aux.view(heads, group, 1))[..., None]
    out = weights[..., :-1] @ values[:, :, None]
    out = out + torch.where(takes_part[..., None], weights[..., -1:] * mean_value[:, :, None], 0)
    if first and not layer.chunked and not whole:
        layer.make_plan(valid, **layer.rule)
    elif first and not layer.chunked and layer is layer.siblings[-1]:
        for one in layer.siblings:
            one.make_plan(valid, **one.rule)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    return attention_mask


def oracle_cache(model, method, chunked_prefill=False, decode=None, rounding=None):
    """A full cache for `model` that hides what `method`, and a decode budget, evict; sets the oracle's attention.

    With `rounding`, keys and values `[B, H, n, D]` are what it makes of them from the plan on.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    # transformers' own layers, but for those that attend
    config = model.config.get_text_config(decoder=True)
    every = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    n = sum(isinstance(x, CacheLayerMixin) for x in every)
    layers = []
    for i, own in enumerate(every):
        if isinstance(own, CacheLayerMixin):
            both = isinstance(own, LinearAttentionCacheLayerMixin)
            every[i] = (OracleHybridLayer if both else OracleLayer)(method, len(layers), n, chunked_prefill)
            every[i].number = i
            layers.append(every[i])
    cache, ids = Cache(layers=every), []
    for layer, layer.parts in zip(layers, parts_of(model), strict=True):
        layer.siblings, layer.ids, layer.model, layer.decode = layers, ids, model, decode
        layer.rounding = rounding

    def remember(module, args, kwargs):
        if cache in (kwargs.get("past_key_values"), kwargs.get("cache")):
            ids.append(kwargs.get("input_ids", args[0] if args else None))  # None: it was given embeddings

    model.get_decoder().register_forward_pre_hook(remember, with_kwargs=True)
    return cache
