"""Gates learned on cached contexts: DuoAttention's idea, where only question and answer pass the model.

Each text is read once, by the full model. A step then asks about one text, every KV head mixing full attention with
that of a streaming head over the stored keys and values, by its gate. The loss is the answers' own: their negative
log-likelihood, and a penalty on the mean gate. A step costs some thirty tokens instead of thousands, so that the
gates can be trained to their end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headkv import _checks
from headkv._config import class_or_name
from headkv.data import NEEDLE_KINDS, needle_texts
from headkv.heads.ablation import Held, hold
from headkv.heads.contexts import Asker, Stream, asking
from headkv.heads.gates import frozen
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENTRIES = 10  # of the log of a training


def profile_cached_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Sequence[str] = NEEDLE_KINDS,
    lengths: Sequence[int] = (1000, 2000),
    texts: int = 16,
    each: int = 2,
    sinks: int = 16,
    recent_share: float = 0.06,
    steps: int = 300,
    penalties: Sequence[float] = (8.0,),
    learning_rate: float = 0.02,
    validation: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> HeadProfile:
    """Learn the gate of every KV head on cached contexts with hidden facts.

    A penalty asks for a number of heads: the higher it is, the fewer gates stay open. Under several penalties, which
    are learned at once, a head's score is the mean of its gates: more heads are told apart, and the best few less
    well than by the highest penalty alone (benchmarks/README.md).

    Args:
        model: a transformers decoder; its weights are left as they are. Gates of sliding layers end at 0.
        tokenizer: its tokenizer.
        kinds: of the facts, see `headkv.data.needle_texts`.
        lengths: of the texts, in tokens, in turn.
        texts: how many.
        each: facts of each kind in each text.
        sinks: first entries that a streaming head keeps.
        recent_share: share of the text, at its end, that it keeps too.
        steps: of the optimiser, one text each.
        penalties: weights of the mean gate; more of them cost little time.
        learning_rate: the greatest.
        validation: texts with other people, words and prose, on which the gates are judged on the way.
        seed: of the texts and their order.
        progress: show a progress bar, and the log when it is done.

    Returns:
        The mean gates. `parameters["log"]` says how the training went, `ENTRIES` times and for each penalty: the step,
        the mean loss since the entry before, the mean gate, how many gates are over a half, and how many validation
        answers are right with those heads full and the others streaming, of those that are right with all heads full.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: the model answered no question right.
    """
    _checks.whole("steps", steps, 1)
    _checks.whole("validation", validation)
    if not penalties:
        raise ValueError("penalties must hold at least one number, got none")
    for penalty in penalties:
        _checks.between("penalties", penalty, 0)
    _checks.between("learning_rate", learning_rate, 0)
    stream = Stream(sinks, recent_share)
    made = needle_texts(tokenizer, texts=texts, lengths=lengths, kinds=kinds, each=each, seed=seed)
    held = hold(model, made, stream, progress)
    asked = sum(len(text.needles) for text in made)
    if not held:
        raise RuntimeError(f"the model answered none of {asked} questions, so its heads can not be scored")
    judged: list[Held] = []
    if validation:
        options: dict[str, Any] = {"kinds": kinds, "each": each, "seed": seed, "split": "validation"}
        judged = hold(model, needle_texts(tokenizer, texts=validation, lengths=lengths, **options), stream)
    with frozen(model), asking(model, stream) as asker:
        gates, log = learn_gates(
            asker,
            held,
            penalties,
            steps=steps,
            learning_rate=learning_rate,
            judged=judged,
            seed=seed,
            progress=progress,
        )
    parameters: dict[str, Any] = {
        "way": "cached",
        "kinds": list(kinds),
        "lengths": list(lengths),
        "texts": texts,
        "each": each,
        "sinks": sinks,
        "recent_share": recent_share,
        "steps": steps,
        "penalties": list(penalties),
        "learning_rate": learning_rate,
        "validation": validation,
        "seed": seed,
        "samples": asked,
        "samples_counted": sum(len(text.needles) for text in held),
        "log": log,
    }
    name = class_or_name(model)
    return HeadProfile(name, "gate", "kv", gates.mean(0), parameters)


def learn_gates(
    asker: Asker,
    held: Sequence[Held],
    penalties: Sequence[float],
    *,
    steps: int,
    learning_rate: float = 0.02,
    judged: Sequence[Held] = (),
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Train gates, a set for each penalty, all of them in one pass: they share nothing but the texts.

    Returns:
        Gates [penalties, layers, H] in [0, 1], float32, and the log, as `profile_cached_gates` says.
    """
    device = asker.model.device
    gates = nn.Parameter(torch.ones(len(penalties), *asker.shape, device=device))
    weights = torch.tensor(penalties, device=device)
    optimiser = torch.optim.Adam([gates], lr=learning_rate)
    source = random.Random(seed)
    log: list[dict[str, Any]] = []
    losses = torch.zeros(len(penalties), device=device)
    waiting: list[Held] = []
    last = 0
    for step in track(range(steps), "Gates", progress):
        if not waiting:  # all texts in turn, each time in another order
            waiting = source.sample(list(held), len(held))
        text = waiting.pop()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate(step, steps)
        loss = _loss(asker, text, gates)
        optimiser.zero_grad()
        (loss + weights * gates.mean((1, 2))).sum().backward()
        optimiser.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            losses += loss.detach()
        if step + 1 == steps or (step + 1) * ENTRIES // steps > step * ENTRIES // steps:
            means = (losses / (step + 1 - last)).tolist()
            log += _entries(asker, judged, gates.detach(), penalties, step + 1, means)
            losses.zero_()
            last = step + 1
    return gates.detach().cpu(), log


def rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: up over the first twentieth, down to 0 over the last third.

    >>> [round(rate(step, 60), 2) for step in (0, 2, 30, 50, 59)]
    [0.33, 1.0, 1.0, 0.5, 0.05]
    """
    return min(1.0, (step + 1) / max(1.0, steps / 20), 3 * (steps - step) / steps)


def _loss(asker: Asker, text: Held, gates: Tensor) -> Tensor:
    """The answers' mean negative log-likelihood a token, for each set of gates: [penalties]."""
    sets, count = len(gates), len(text.needles)
    rows = gates[:, None].expand(-1, count, -1, -1).flatten(0, 1)
    found = asker.ask(text.context, text.needles * sets, rows).logprobs
    sizes = torch.tensor([needle.answer_ids.shape[1] for needle in text.needles], device=found.device)
    return -(found.sum(-1).view(sets, count) / sizes).mean(-1)


def _entries(
    asker: Asker,
    judged: Sequence[Held],
    gates: Tensor,
    penalties: Sequence[float],
    step: int,
    losses: list[float],
) -> list[dict[str, Any]]:
    right = torch.zeros(len(gates), dtype=torch.int64)
    for text in judged:
        found = asker.try_all(text.context, text.needles, (gates > 0.5).float()).right
        right += found.view(len(text.needles), -1).sum(0)
    return [
        {
            "step": step,
            "penalty": penalty,
            "loss": round(loss, 4),
            "mean_gate": round(float(gate.mean()), 4),
            "heads": int((gate > 0.5).sum()),
            "right": int(good),
            "of": sum(len(text.needles) for text in judged),
        }
        for penalty, loss, gate, good in zip(penalties, losses, gates, right, strict=True)
    ]
