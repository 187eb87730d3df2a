"""What people look for in a cache of transformers and a ragged one has not: what to look at instead."""

from __future__ import annotations

from typing import Any, NoReturn

INSTEAD = (
    "heads keep different numbers of entries. cache.lengths() says how many; cache.layers[i].row(batch, head) is what "
    "one head keeps (keys, values, positions); cache.layers[i].ragged.to_dense() spreads a layer out, with a mask"
)
# of caches of earlier releases, which some code still asks for
FORMER = ("key_cache", "value_cache", "to_legacy_cache")


class NotOneTensor(AttributeError):
    """A ragged layer's keys or values are asked for as one tensor; an AttributeError, so that `hasattr` says False."""


class NoTensor:
    """The attribute `keys` or `values` of a layer: None before the first prompt, then an error that explains."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is not None and layer.ragged is not None:
            raise NotOneTensor(f"`{self.name}` of a ragged layer is no tensor [B, H, n, D]: {INSTEAD}")
        return None

    def __set__(self, layer: Any, given: Any) -> None:
        if given is not None:  # transformers makes an empty layer with None
            raise NotOneTensor(
                f"`{self.name}` of a ragged layer can not be set; layer.ragged.append adds tokens"
            )


def no_pairs() -> NoReturn:
    """A cache is asked for a layer's keys and values as a pair.

    Raises:
        TypeError: saying what to look at.
    """
    raise TypeError(f"a RaggedCache holds no pairs of tensors, one a layer: {INSTEAD}")


def no_attribute(cache: Any, name: str) -> NoReturn:
    """A cache is asked for an attribute that it has not.

    Raises:
        AttributeError: saying what to look at, if caches of transformers had it once.
    """
    more = f": {INSTEAD}" if name in FORMER else ""
    raise AttributeError(f"{type(cache).__name__!r} object has no attribute {name!r}{more}")
