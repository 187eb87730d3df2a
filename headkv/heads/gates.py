"""Gates: which KV heads may see only sinks and a recent window, learned by distillation.

DuoAttention, section 2.2. Each KV head has a gate alpha that mixes the attention of the model as it is (alpha = 1)
with that of a windowed head (alpha = 0). The gates alone are trained: the hidden states of the answers must stay
those of the full model, and a penalty on the gates pushes every one down that is not needed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headkv import _checks
from headkv._config import attention_layers, class_or_name, kv_heads
from headkv.data import Fact, haystack
from headkv.heads.observe import exchanged_attention
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# The International Radiotelephony Spelling Alphabet, as in the paper.
_WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec "
    "romeo sierra tango uniform victor whiskey xray yankee zulu"
)


def profile_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 200,
    lengths: tuple[int, int] = (400, 600),
    sinks: int = 16,
    recent: int = 64,
    passkeys: int = 4,
    words: int = 8,
    learning_rate: float = 0.02,
    penalty: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> HeadProfile:
    """The gate of every KV head, learned on texts with hidden passkeys.

    Loss: mean squared difference of the last hidden states at the answers + `penalty` * mean of the gates. AdamW, a
    linear warm-up over the first fifth and a linear decay over the last, down to a tenth. The gates are float32 and
    start at 1. The paper trains for 2,000 steps on texts as long as the model can take (most of the
    published gates: 32,000 tokens), with 128 sinks and 256 recent entries; the defaults are for a small model on a CPU.

    Args:
        model: a transformers decoder without sliding-window layers; its weights are left as they are.
        tokenizer: its tokenizer.
        steps: of the optimiser, one text each.
        lengths: the least and the greatest context, in tokens.
        sinks: first entries that a windowed head sees.
        recent: last entries that it sees, the current one included.
        passkeys: hidden in each text.
        words: of each passkey.
        learning_rate: the greatest.
        penalty: weight of the mean of the gates.
        seed: of the texts.
        progress: show a progress bar.

    Raises:
        ValueError: a number is out of range, or the model has sliding-window layers or soft-capped attention.
        TypeError: an option is no number.
    """
    steps = _checks.whole("steps", steps, 1)
    passkeys = _checks.whole("passkeys", passkeys, 1, len(_ORDINALS))
    words = _checks.whole("words", words, 1)
    sinks, recent = _checks.whole("sinks", sinks), _checks.whole("recent", recent, 1)
    seed = _checks.whole("seed", seed)
    least, greatest = _span(lengths, sinks + recent)
    _checks.between("learning_rate", learning_rate, 0)
    _checks.between("penalty", penalty, 0)
    config = model.config.get_text_config()
    layers = attention_layers(config)
    gates = nn.Parameter(torch.ones(len(layers), kv_heads(config), device=model.device))
    mixer = Mixer(gates, sinks, recent, dict(zip(layers, range(len(layers)), strict=True)))
    optimiser = torch.optim.AdamW([mixer.gates], lr=learning_rate, weight_decay=0.0)
    source = random.Random(seed)
    with frozen(model), exchanged_attention(model, mixer.attend):
        for step in track(range(steps), "Gates", progress):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
            text, answers = passkey_text(tokenizer, source.randint(least, greatest), passkeys, words, source)
            text = text.to(model.device)
            mixer.full.clear()
            with torch.no_grad():
                wanted = model.base_model(text, use_cache=False).last_hidden_state[0, answers]
            with mixer.mixing():
                found = model.base_model(text, use_cache=False).last_hidden_state[0, answers]
            loss = (found - wanted).square().mean() + penalty * mixer.gates.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                mixer.gates.clamp_(0, 1)
    parameters: dict[str, Any] = {
        "steps": steps,
        "lengths": [least, greatest],
        "sinks": sinks,
        "recent": recent,
        "passkeys": passkeys,
        "words": words,
        "learning_rate": learning_rate,
        "penalty": penalty,
        "seed": seed,
    }
    name = class_or_name(model)
    return HeadProfile(name, "gate", "kv", mixer.gates.detach(), parameters)


@dataclass(eq=False)
class Mixer:
    """The attention of all layers: full at first, then the gated mix of that and of windowed attention.

    Attributes:
        gates: [layers, H], float32, in [0, 1].
        sinks: first entries that windowed attention sees.
        recent: last entries that it sees.
        rows: of `gates`, by layer of the model.
        full: for each layer the full attention's output [1, n, HQ, D], without gradient, of the last plain pass.
    """

    gates: nn.Parameter
    sinks: int
    recent: int
    rows: dict[int, int]
    full: dict[int, Tensor] = field(default_factory=dict)
    _mixing: bool = False

    @contextmanager
    def mixing(self) -> Iterator[None]:
        """In this context a forward pass mixes; outside of it a pass is the model's own, and is remembered."""
        self._mixing = True
        try:
            yield
        finally:
            self._mixing = False

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers asks for it: query [1, HQ, n, D], key and value [1, H, n, D] -> [1, n, HQ, D]."""
        if options.get("sliding_window") or options.get("softcap") or options.get("s_aux") is not None:
            raise ValueError("model must have neither sliding-window layers nor soft caps nor sinks")
        layer, group = int(module.layer_idx), query.shape[1] // key.shape[1]  # type: ignore[arg-type]
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        if not self._mixing:
            attention = nn.functional.scaled_dot_product_attention
            output = attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)
            self.full[layer] = output.detach()
            return output, None
        output = windowed(query, key, value, self.sinks, self.recent, scaling).transpose(1, 2)
        gate = self.gates[self.rows[layer]].repeat_interleave(group).to(output.dtype)[:, None]
        return gate * self.full[layer] + (1 - gate) * output, None


def windowed(
    query: Tensor, key: Tensor, value: Tensor, sinks: int, recent: int, scaling: float | None = None
) -> Tensor:
    """Attention to the first `sinks` tokens and the last `recent`, in O(n) and with a gradient.

    Queries are taken `recent` at a time: such a block sees the sinks, the block before, and its own.

    Args:
        query, key, value: [1, HQ, n, D].
        sinks, recent: what a query sees, itself included.
        scaling: of the logits; default: 1 / sqrt(D).

    Returns:
        [1, HQ, n, D].
    """
    length, device = query.shape[2], query.device
    blocks = -(-length // recent)

    def cut(states: Tensor, before: int) -> Tensor:  # [HQ, before + blocks, recent, D]
        missing = blocks * recent - length
        padded = nn.functional.pad(states[0], (0, 0, before * recent, missing))
        return padded.unflatten(1, (-1, recent))

    def seen_by_blocks(states: Tensor) -> Tensor:  # [HQ, blocks, sinks + 2 * recent, D]
        first, near = states[0, :, None, :sinks].expand(-1, blocks, -1, -1), cut(states, 1)
        return torch.cat([first, near[:, :-1], near[:, 1:]], dim=2)

    at = torch.arange(blocks * recent, device=device).view(blocks, recent, 1)
    begin = (torch.arange(blocks, device=device)[:, None, None] - 1) * recent  # of the block before
    near = begin + torch.arange(2 * recent, device=device)
    far = torch.arange(min(sinks, length), device=device) < begin  # sinks that are not near
    visible = (near >= 0) & (near <= at) & ((at - near < recent) | (near < sinks))
    output = nn.functional.scaled_dot_product_attention(
        cut(query, 0),
        seen_by_blocks(key),
        seen_by_blocks(value),
        attn_mask=torch.cat([far.expand(-1, recent, -1), visible], dim=2),
        scale=scaling,
    )
    return output.flatten(1, 2)[None, :, :length]


def passkey_text(
    tokenizer: PreTrainedTokenizerBase, length: int, passkeys: int, words: int, source: random.Random
) -> tuple[Tensor, Tensor]:
    """A text with hidden passkeys, and all questions and answers after it.

    Args:
        tokenizer: of the model.
        length: of the context, in tokens.
        passkeys: how many.
        words: of each passkey.
        source: of the words, the places and the prose.

    Returns:
        The text [1, n] int64, and the positions [m] int64 of the questions and answers.
    """
    facts = []
    for ordinal in _ORDINALS[:passkeys]:
        key = " ".join(source.choices(_WORDS.split(), k=words))
        subject = f"the {ordinal} passkey"
        facts.append(Fact(f"This is {subject}: {key}.", f"What is {subject}?", f"This is {subject}:", key))
    depths = sorted(source.uniform(0.05, 0.95) for _ in facts)
    text = haystack(tokenizer, length, facts, depths, seed=source.randrange(1000))
    questions = "\n\n".join(f"{fact.question} {fact.prefix} {fact.answer}." for fact in text.facts)
    asked = torch.tensor([tokenizer(questions, add_special_tokens=False)["input_ids"]])
    context = text.context_ids.shape[1]
    return torch.cat([text.context_ids, asked], dim=1), torch.arange(context, context + asked.shape[1])


def schedule(step: int, steps: int) -> float:
    """The factor of the learning rate: up over the first fifth, down over the last, at least a tenth.

    >>> [round(schedule(step, 10), 2) for step in (0, 1, 5, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """A context in which no weight of `model` is trained; which ones were trained before is put back."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _span(lengths: Sequence[int], window: int) -> tuple[int, int]:
    """The least and the greatest length, beyond sinks and window."""
    found = [_checks.whole("lengths", length) for length in lengths]
    if len(found) != 2 or not window < found[0] <= found[1]:
        raise ValueError(f"lengths must be (least, greatest), over sinks + recent = {window}, got {lengths}")
    return found[0], found[1]
