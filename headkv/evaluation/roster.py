"""Methods by their names, sized for a budget: what a command line can say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from headkv import _checks
from headkv._config import kv_heads
from headkv.allocators import AdaptiveAllocator
from headkv.data.chat import repeat_request
from headkv.evaluation.remembered import Remembered, RememberedLayers
from headkv.heads import HeadProfile
from headkv.methods import (
    AdaKV,
    CriticalKV,
    DefensiveKV,
    DuoAttention,
    FullCache,
    HeadKV,
    KVzip,
    PyramidKV,
    RandomHeads,
    RazorAttention,
    ScoredMethod,
    SnapKV,
    StreamingLLM,
)
from headkv.scorers import ExpectedAttentionScorer, KeyDiffScorer, KVzipScorer, SnapKVScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headkv.methods.base import Method, PromptMethod

Sized = Callable[[float, int], "Method | PromptMethod"]

# Written one token a digit, a number is kept whole only by a wide kernel.
SNAP = RememberedLayers(SnapKVScorer(kernel_size=21))
EXPECTED, KEY_DIFF = (
    RememberedLayers(ExpectedAttentionScorer(epsilon=0.02)),
    RememberedLayers(KeyDiffScorer()),
)

BY_SHARE: Mapping[str, Sized] = {
    "FullCache": lambda share, n: FullCache(),
    "StreamingLLM": lambda share, n: StreamingLLM(share),
    "RandomHeads": lambda share, n: RandomHeads.for_share(share, n),
    "SnapKV": lambda share, n: SnapKV(share, SNAP),
    "PyramidKV": lambda share, n: PyramidKV(share, scorer=SNAP),
    "AdaKV": lambda share, n: AdaKV(share, SNAP),
    "AdaKV-model": lambda share, n: AdaKV(share, SNAP, scope="model"),
    "CriticalKV": lambda share, n: CriticalKV(share, SNAP),
    "CriticalAdaKV": lambda share, n: CriticalKV(share, SNAP, adaptive=True),
    "DefensiveKV": lambda share, n: DefensiveKV(share),
    "LayerDefensiveKV": lambda share, n: DefensiveKV(share, scope="model"),
    "ExpectedAttention": lambda share, n: ScoredMethod(share, EXPECTED),
    "KeyDiff": lambda share, n: ScoredMethod(share, KEY_DIFF),
}
READERS = ("KVzip", "KVzip-layer", "KVzip-uniform", "KVzip-ablation")  # read the text again
PROFILED = {  # the kind of the shipped profile
    "HeadKV": "ablation",
    "HeadKV-R2": "retrieval-reasoning",
    "DuoAttention": "gate",
    "DuoAttention-ablation": "ablation",
    "RazorAttention": "echo",
    "KVzip-ablation": "ablation",
}
NAMES = tuple(dict.fromkeys((*BY_SHARE, *READERS, *PROFILED)))


def roster(
    names: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Sized]:
    """For each name what makes the method, given the share to store and the tokens of the prompt.

    Args:
        names: of `NAMES`, without regard to upper and lower case.
        model: a decoder; methods with a head profile need one that is shipped for it.
        tokenizer: writes the request to repeat the text, for those that read it again.

    Raises:
        ValueError: there is no such method, or no profile of this model.
    """
    known = {name.casefold(): name for name in NAMES}
    made: dict[str, Sized] = {}
    num_kv_heads = kv_heads(model.config.get_text_config())
    again: Remembered | None = None  # one for all, so that a text is read again once
    for name in names:
        if (found := known.get(name.casefold())) is None:
            raise ValueError(f"method must be one of {', '.join(NAMES)}, got {name!r}")
        if found in READERS and again is None:
            again = reader(repeat_request(tokenizer))
        made[found] = by_name(found, partial(HeadProfile.for_model, model), again, num_kv_heads)
    return made


def reader(request: Sequence[int]) -> Remembered:
    """KVzip's scorer, behind a request to repeat the text, for all methods that read it again: each text once."""
    return Remembered(KVzipScorer(request, chunk=512, window=8))


def by_name(name: str, profile: Callable[[str], HeadProfile], again: Any, num_kv_heads: int) -> Sized:
    """What makes the method `name`, one of `NAMES`.

    Args:
        name: of the method.
        profile: from a kind to the model's profile; asked by methods that have one.
        again: what `reader` gives, for methods of `READERS`; others take None.
        num_kv_heads: of the model.
    """
    if name in BY_SHARE:
        return BY_SHARE[name]
    if name == "KVzip":
        return lambda share, n: KVzip(share, again)
    if name == "KVzip-uniform":
        return lambda share, n: ScoredMethod(share, again)
    if name == "KVzip-layer":
        return lambda share, n: ScoredMethod(share, again, AdaptiveAllocator(0.2))
    own = profile(PROFILED[name])
    if name == "KVzip-ablation":
        return lambda share, n: KVzip(share, again, safeguard=0.6, profile=own)
    if name.startswith("HeadKV"):
        return lambda share, n: HeadKV(share, own, 1.1, SNAP, reduce="max")
    if name.startswith("DuoAttention"):
        return lambda share, n: DuoAttention.for_share(share, n, own)
    induction = profile("induction")
    return lambda share, n: RazorAttention.for_share(
        # The paper's 14% of the heads would leave nothing for windows below a share of 17%.
        *(share, n, own, induction),
        num_kv_heads=num_kv_heads,
        induction_share=min(0.14, share / 2),
    )


def share_of(budget: int | float, length: int) -> float:
    """A budget as a share of `length` tokens: a float is one, an int are entries a KV head.

    Raises:
        TypeError, ValueError: it is neither a share in (0, 1] nor a whole number of at least 1.

    >>> share_of(0.1, 500), share_of(100, 500), share_of(1000, 500)
    (0.1, 0.2, 1.0)
    """
    if isinstance(budget, int):
        return min(1.0, _checks.whole("budget", budget, 1) / length)
    _checks.between("budget", budget, 0, 1)
    if budget == 0:
        raise ValueError("budget must be above 0, got 0.0")
    return budget


def sized(make: Sized, budget: int | float) -> Callable[[int], Method | PromptMethod]:
    """The method at a budget, given the tokens of a prompt."""
    return lambda n: make(share_of(budget, n), n)


def budget_from(text: str) -> int | float:
    """What a command line says: "256" are entries, "0.1" and "1.0" are shares.

    Raises:
        ValueError: it is no number, or not one that `share_of` takes.
    """
    try:
        budget: int | float = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(
            f"budget must be a share in (0, 1] or a whole number of entries, got {text!r}"
        ) from None
    share_of(budget, 1)
    return budget
