"""A hand-made model in which one KV head, and no other, fetches the answer to a question from anywhere in the text."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from headkv.data import Needle, NeedleText
from headkv.models import tiny_model

PLANTED = (1, 1)  # layer, KV head
FILLERS = range(3, 60)
ANSWERS = range(60, 76)
QUESTION = 90
_CONSTANT, _IS_ANSWER, _IS_QUESTION, _WHICH, _WRITTEN = 0, 1, 2, 10, 30


def planted_model() -> PreTrainedModel:
    """Two layers of two KV heads. Query heads 2 and 3 of layer 1 share the planted one; head 2 does the work.

    A question token looks for answer tokens by the slowest pair of the rotary embedding, which hardly turns; the value
    says which answer it is, and the output writes it where the vocabulary reads. All else is small noise.
    """
    theta = {"rope_type": "default", "rope_theta": 1e8}
    model = tiny_model("llama", num_hidden_layers=2, initializer_range=0.01, rope_parameters=theta)
    layer, head = PLANTED
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
        embedding, vocabulary = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        embedding[:, _CONSTANT] = 1
        embedding[QUESTION, _IS_QUESTION] = 1
        vocabulary.zero_()
        for number, token in enumerate(ANSWERS):
            embedding[token, _IS_ANSWER] = embedding[token, _WHICH + number] = 1
            vocabulary[token, _WRITTEN + number] = 1
        attention = model.model.layers[layer].self_attn
        query, key, value = (
            p.weight.view(-1, 16, 64) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query[2 * head, 7, _IS_QUESTION] = 2
        key[head, 7, _IS_ANSWER] = 2
        for number in range(len(ANSWERS)):
            value[head, number, _WHICH + number] = 1
            attention.o_proj.weight[_WRITTEN + number, 2 * head * 16 + number] = 1
    return model


def planted_text(seed: int, length: int = 120) -> NeedleText:
    """Fillers with one answer token, far from both ends."""
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(FILLERS.start, FILLERS.stop, (1, length), generator=source)
    answer = ANSWERS.start + seed % len(ANSWERS)
    text[0, length // 3 + seed % 10] = answer
    return NeedleText(text, (Needle("words", torch.tensor([[5, QUESTION]]), torch.tensor([[answer]])),))
