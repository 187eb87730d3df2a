"""Compare head profiles: how many answers are left when the heads that each ranks first keep all, the others stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv.data import needle_texts
from headkv.heads.ablation import hold
from headkv.heads.choice import gates_of
from headkv.heads.contexts import Stream, asking
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cell:
    """One cell of the comparison.

    Attributes:
        profile: its name.
        kind: of the needles.
        length: of the texts, in tokens.
        heads: KV heads that keep all; the others stream.
        stored: share of the text's entries that the cache holds.
        right: answers that are right, of those that are with all heads full.
        full: answers that are right with all heads full.
        asked: questions.
    """

    profile: str
    kind: str
    length: int
    heads: int
    stored: float
    right: int
    full: int
    asked: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def compare_profiles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profiles: Mapping[str, HeadProfile],
    *,
    heads: Sequence[int] = (9, 13, 18, 27),
    kinds: Sequence[str] = ("words", "numbers"),
    lengths: Sequence[int] = (1000,),
    texts: int = 16,
    sinks: int = 16,
    recent_share: float = 0.06,
    seed: int = 0,
    progress: bool = False,
) -> list[Cell]:
    """Ask about held-out texts, question unseen, where the first heads of each profile keep all and the others stream.

    Args:
        model: that the profiles are of.
        tokenizer: its tokenizer.
        profiles: name -> profile; of query heads or KV heads (the greatest of a group counts).
        heads: how many KV heads of the model keep all.
        kinds: of the needles, each in texts of its own, two a text.
        lengths: of the texts, in tokens.
        texts: for each kind and length.
        sinks: first entries that a streaming head keeps.
        recent_share: share of the text, at its end, that it keeps too.
        seed: of the texts, which are those of `needle_texts`'s validation split.
        progress: show a progress bar.

    Raises:
        ValueError: a profile is of another model, or an option is out of range.
    """
    stream = Stream(sinks, recent_share)
    with asking(model, stream) as asker:
        shape = asker.shape
    if outside := [k for k in heads if not 0 <= k <= shape[0] * shape[1]]:
        raise ValueError(f"heads must be between 0 and {shape[0] * shape[1]}, got {outside[0]}")
    for profile in profiles.values():
        profile.check_model(model)
    tops = [first_heads(profile.kv_scores(shape[1]), k) for profile in profiles.values() for k in heads]
    gates = gates_of([[divmod(head, shape[1]) for head in top] for top in tops], shape)
    cells = []
    for length, kind in track([(n, kind) for n in lengths for kind in kinds], "Held-out needles", progress):
        made = needle_texts(
            tokenizer, texts=texts, lengths=(length,), kinds=(kind,), each=2, seed=seed, split="validation"
        )
        right, full, stored = torch.zeros(len(gates), dtype=torch.int64), 0, torch.zeros(len(gates))
        for text in made:
            for held in hold(model, [text], stream):
                with asking(model, stream) as asker:
                    found = asker.try_all(held.context, held.needles, gates).right
                right += found.view(len(held.needles), -1).sum(0)
                full += len(held.needles)
            far = stream.far(text.context_ids.shape[1])
            shut = 1 - gates.mean((1, 2))
            stored += (1 - shut * (far.stop - far.start) / text.context_ids.shape[1]) / len(made)
        names = [(name, k) for name in profiles for k in heads]
        cells += [
            Cell(
                name,
                kind,
                length,
                k,
                round(float(share), 4),
                int(good),
                full,
                sum(len(t.needles) for t in made),
            )
            for (name, k), good, share in zip(names, right, stored, strict=True)
        ]
    return cells


def first_heads(scores: Tensor, count: int) -> list[int]:
    """The flat indices of the heads with the highest scores; equal ones go to the earlier layer and head.

    >>> first_heads(torch.tensor([[.1, .5], [.5, .0]]), 2)
    [1, 2]
    """
    return [int(index) for index in scores.flatten().argsort(descending=True, stable=True)[:count]]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two profiles' scores, equal scores sharing their mean rank.

    >>> rank_correlation(torch.tensor([1., 2., 3.]), torch.tensor([.3, .2, .1]))
    -1.0
    """
    ranks = [_ranks(scores.flatten()) for scores in (first, second)]
    return round(float(torch.corrcoef(torch.stack(ranks))[0, 1]), 4)


def _ranks(scores: Tensor) -> Tensor:
    below = (scores[None] < scores[:, None]).sum(1)
    equal = (scores[None] == scores[:, None]).sum(1)
    return below + (equal - 1) / 2


def overlap(first: Tensor, second: Tensor, count: int) -> float:
    """The share of the `count` first heads that two profiles have in common.

    >>> overlap(torch.tensor([3., 2., 1.]), torch.tensor([3., 0., 1.]), 2)
    0.5
    """
    return len(set(first_heads(first, count)) & set(first_heads(second, count))) / count


def plot_cells(cells: Sequence[Cell]) -> Figure:
    """Draw answers right, as a share of those of the full cache, against heads kept: a panel a kind and length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((cell.kind, cell.length) for cell in cells))
    figure = Figure(figsize=(2 + 2.6 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (kind, length) in zip(axes, panels, strict=True):
        here = [cell for cell in cells if (cell.kind, cell.length) == (kind, length)]
        for name in dict.fromkeys(cell.profile for cell in here):
            line = [cell for cell in here if cell.profile == name]
            axis.plot(
                [c.heads for c in line], [c.right / max(1, c.full) for c in line], marker="o", label=name
            )
        axis.set(title=f"{kind}, {length} tokens", xlabel="KV heads that keep all", ylim=(-0.03, 1.05))
    axes[0].set_ylabel("answers right, of the full cache's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure
