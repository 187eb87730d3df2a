"""Reconstruction scores against eager attention, chunk by chunk, on all families."""

from __future__ import annotations

import pytest
import torch
from letters import letters

from headkv.heads.observe import Attention
from headkv.heads.reconstruction import (
    chunk_scores,
    profile_reconstruction,
    reconstruction_scores,
    repeat_requests,
)
from headkv.models import FAMILIES, tiny_model

RANDOM = torch.Generator().manual_seed(0)
CONTEXT = torch.randint(3, 97, (1, 50), generator=RANDOM)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_greatest_shares_of_eager_attention(family: str) -> None:
    """One chunk behind a prefix of 6: all columns of the second reading's attention are in the normaliser."""
    model = tiny_model(family)
    request = torch.cat([torch.randint(3, 97, (1, 5), generator=RANDOM), CONTEXT[:, 6:]], dim=1)
    found = reconstruction_scores(model, CONTEXT, iter([(slice(6, 50), request)]), prefix=6)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(torch.cat([CONTEXT, request], dim=1), output_attentions=True).attentions
    sliding = getattr(model.config, "sliding_window", None) is not None
    kinds = getattr(model.config, "layer_types", None) or ["sliding" if sliding else "full"] * 3
    for layer, shares in enumerate(weights):
        expected = shares[0, :, 50:, 6:50].amax((1, 2)).unflatten(0, (2, 2)).amax(1)
        wanted = torch.zeros(2) if kinds[layer].startswith("sliding") else expected
        torch.testing.assert_close(found[layer], wanted, atol=1e-5, rtol=1e-4)


def test_a_chunk_shares_its_attention_with_the_prefix_and_itself_alone() -> None:
    """By hand in double precision, two query heads a KV head; entries of the other chunks are not in the sum."""
    queries, keys = torch.randn(1, 4, 7, 8, generator=RANDOM), torch.randn(1, 2, 30, 8, generator=RANDOM)
    found = chunk_scores(Attention(0, queries, keys, 0.5, None, 4.0), slice(10, 16), prefix=3)
    columns = [0, 1, 2, *range(10, 16), *range(23, 30)]
    for head in range(2):
        logits = queries[0, 2 * head : 2 * head + 2].double() @ keys[0, head, columns].double().T * 0.5
        logits = 4 * torch.tanh(logits / 4)
        for row in range(7):
            logits[:, row, 9 + row + 1 :] = -torch.inf
        expected = logits.softmax(-1)[..., 3:9].amax((0, 1))
        torch.testing.assert_close(found[head].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 20, 100])
def test_the_requests_hold_every_token_of_the_text_once(chunk: int) -> None:
    tokenizer = letters()
    places, chunks = [], []
    for where, ids in repeat_requests(tokenizer, CONTEXT, 6, chunk):
        size = where.stop - where.start
        places += range(50)[where]
        chunks.append(ids[:, -size:])
        asked = tokenizer.decode(ids[0, :-size])
        assert asked.startswith("\n\nRepeat") and asked.endswith("\n"), "a request, then the turn"
        if where.start > 6:
            begin = tokenizer.decode(CONTEXT[0, max(6, where.start - 8) : where.start])
            assert asked.endswith(begin + "\n")
    assert places == list(range(6, 50)) and torch.equal(torch.cat(chunks, dim=1), CONTEXT[:, 6:])


def test_the_profile_is_the_mean_over_texts_and_chunks_hardly_matter() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    options = {"lengths": (700, 800), "seed": 3}
    both = profile_reconstruction(model, letters(), texts=2, **options)
    first = profile_reconstruction(model, letters(), texts=1, **options)
    assert (both.kind, both.heads, both.parameters) == (
        "reconstruction",
        "kv",
        {"lengths": [700, 800], "texts": 2, "chunk": 2000, "seed": 3},
    )
    assert both.scores.min() > 0 and both.scores.max() <= 1
    assert not torch.equal(both.scores, first.scores)


def test_the_options_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk must be an int of at least 1, got 0"):
        profile_reconstruction(tiny_model("llama"), letters(), chunk=0)
