"""Which head stores its entries in how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headkv import _checks
from headkv.cache.ragged import STORAGES, Storage
from headkv.heads.profile import HeadProfile


@dataclass(frozen=True)
class HeadStorage:
    """A storage for each KV head, in place of one for all: `headkv.compress(model, method, storage=HeadStorage(…))`.

    The heads of a layer that have the same storage are a `RaggedLayer` of their own, and attention reads these one
    after the other. `RaggedLayer.quantise` says which storages there are, and what they cost; "model" rounds nothing.

    Attributes:
        names: of each layer that attends, of each of its KV heads, the storage.

    Raises:
        ValueError: no storages, layers of different numbers of heads, or a name that there is not.
        TypeError: something else than names in lists of lists.

    >>> HeadStorage([["int8", "int4"], ["int4", "int4"]])
    HeadStorage(2 layers of 2 KV heads: int8 1, int4 3)
    """

    names: Sequence[Sequence[Storage]]

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or any(isinstance(layer, str) for layer in self.names):
            raise TypeError(f"names must be lists of storages, one list a layer, got {self.names!r}")
        names = tuple(tuple(layer) for layer in self.names)
        if not names or not names[0] or len({len(layer) for layer in names}) != 1:
            got = [len(layer) for layer in names]
            raise ValueError(f"names must be of layers with as many heads each, at least one, got {got}")
        for storage in {storage for layer in names for storage in layer}:
            _checks.one_of("names", storage, STORAGES)
        object.__setattr__(self, "names", names)

    @classmethod
    def by_profile(
        cls,
        profile: HeadProfile,
        first: Storage,
        others: Storage,
        *,
        share: float = 1 / 3,
        num_kv_heads: int | None = None,
    ) -> HeadStorage:
        """One storage for the KV heads that a profile ranks first, another for the rest.

        Args:
            share: of all KV heads, rounded; which of equal heads come first is as they stand.
            num_kv_heads: of a layer; default: those of the profile, if it is one of KV heads.

        Raises:
            ValueError: a share outside [0, 1], an unknown storage, or heads that do not fit the profile.

        >>> profile = HeadProfile("two layers", "ablation", "kv", torch.tensor([[3.0, 0.0], [1.0, 2.0]]))
        >>> HeadStorage.by_profile(profile, "int8", "int4", share=0.5).names
        (('int8', 'int4'), ('int4', 'int8'))
        """
        _checks.between("share", share, 0, 1)
        if num_kv_heads is None:
            if profile.heads != "kv":
                raise ValueError("num_kv_heads must be the model's with a profile of query heads, got None")
            num_kv_heads = profile.num_heads
        scores = profile.kv_scores(num_kv_heads)
        order = scores.flatten().argsort(descending=True, stable=True)
        leads = torch.zeros_like(order, dtype=torch.bool)
        leads[order[: round(share * len(order))]] = True
        return cls(
            [[first if lead else others for lead in layer] for layer in leads.view_as(scores).tolist()]
        )

    @property
    def kinds(self) -> set[Storage]:
        """The storages that heads have."""
        return {storage for layer in self.names for storage in layer}

    def __repr__(self) -> str:
        every = [storage for layer in self.names for storage in layer]
        count = ", ".join(f"{storage} {every.count(storage)}" for storage in STORAGES if storage in every)
        return f"HeadStorage({len(self.names)} layers of {len(self.names[0])} KV heads: {count})"
