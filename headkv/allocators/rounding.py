"""From real-valued shares to whole budgets whose total is exact."""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 10**9  # of a slot; what targets differ by below that is the rounding of their computation


def largest_remainder(targets: Tensor, total: int, caps: Tensor) -> Tensor:
    """Round `targets` to whole numbers that add up to `total`, none above its cap.

    Every row gets the whole part of its target; what is left goes, one each, to the rows with the largest
    fractions (of equal fractions the first), and past full rows to the next. Targets are read to a billionth and
    compared as whole numbers, so that targets which are equal but were computed differently stay equal.

    Args:
        targets: `[rows]` floating, at least 0; their sum is `total` up to rounding.
        total: in `[0, caps.sum()]`.
        caps: `[rows]` int64, at least 0.

    Returns:
        `[rows]` int64, on the device of `targets`.

    Raises:
        ValueError: a total that the caps can not hold, or targets that are negative or not finite.

    >>> largest_remainder(torch.tensor([2.2, 3.8]), 6, torch.tensor([6, 6])).tolist()
    [2, 4]
    """
    device = targets.device
    wanted, room = targets.double().cpu(), caps.cpu()
    if not 0 <= total <= int(room.sum()):
        raise ValueError(f"total must lie in [0, {int(room.sum())}], the sum of the caps, got {total}")
    if not bool(torch.isfinite(wanted).all()) or bool((wanted < 0).any()):
        raise ValueError(f"targets must be finite and at least 0, got {wanted.tolist()}")
    parts = (wanted * PARTS + 0.5).floor().long()
    whole = torch.minimum(parts // PARTS, room)
    fraction = parts - whole * PARTS
    while left := total - int(whole.sum()):
        step = 1 if left > 0 else -1
        open_rows = (whole < room) if left > 0 else (whole > 0)
        order = torch.sort(fraction * step, descending=True, stable=True).indices
        chosen = order[open_rows[order]][: abs(left)]
        whole[chosen] += step
    return whole.to(device)


def water_fill(targets: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """Clip `targets` at `caps`; what overflows goes to the other rows by their weights, until none does.

    Args:
        targets: `[rows]` float64, at least 0.
        weights: `[rows]` float64, at least 0; where all rows with room have weight 0 they share evenly.
        caps: `[rows]` int64, at least 0.

    Returns:
        `[rows]` float64 with the sum of `targets`, or that of `caps` if it is smaller.

    >>> targets, weights = torch.tensor([[7.0, 3.0, 2.0], [7.0, 3.0, 1.0]], dtype=torch.float64)
    >>> water_fill(targets, weights, caps=torch.tensor([4, 6, 6])).tolist()
    [4.0, 5.25, 2.75]
    """
    level, most = targets.clone(), caps.double()
    while True:
        spill = float((level - most).clamp(min=0).sum())
        level = torch.minimum(level, most)
        share = torch.where(level < most, weights, 0.0)
        if spill <= 1e-9 or not bool((level < most).any()):
            return level
        share = share / share.max() if bool((share > 0).any()) else (level < most).double()
        level = level + spill * (share / share.sum())
