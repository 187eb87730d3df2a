"""`headkv.compress`: a model whose `generate` uses a ragged cache, for as long as a `with` block lasts."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from headkv.integrations.cache import RaggedCache
from headkv.integrations.compiled import decoder_layers
from headkv.integrations.graph import check_device, replaying
from headkv.integrations.hook import NAME
from headkv.models.attention import kept_attention

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from headkv.methods.base import Method


def compress(
    model: PreTrainedModel,
    method: Method,
    *,
    cuda_graph: bool = False,
    compile_layers: bool = False,
    **options: Any,
) -> Session:
    """Let `model` compress its KV cache by `method` inside a `with` block; outside it is as it was.

    Args:
        model: a decoder of transformers.
        method: e.g. `headkv.AdaKV(budget=0.2)`.
        cuda_graph: replay each decode step of `generate` (greedy or sampling) as one CUDA graph, see `DecodeGraph`: the
            same tokens, without the time that the host takes to launch over a thousand kernels. Recording costs a few
            steps.
        compile_layers: with `cuda_graph`, let torch.compile fuse what the layers do in a decode step: faster, but the
            first decode step takes a while (once a process), and tokens may differ by rounding.
        options: of `RaggedCache.for_model`: `backend`, `headroom`, `chunked_prefill`.

    Returns:
        A context manager; its `cache` is the `RaggedCache` of the latest `generate` (or forward) call.

    Raises:
        ValueError: `compile_layers` without `cuda_graph`; on entry, see `DecodeGraph` and `RaggedCache.for_model`.

    >>> with headkv.compress(model, headkv.AdaKV(budget=0.2)) as session:  # doctest: +SKIP
    ...     out = model.generate(**inputs, max_new_tokens=64)
    >>> session.cache.lengths()  # doctest: +SKIP
    """
    if compile_layers and not cuda_graph:
        raise ValueError("compile_layers must be False without cuda_graph=True, got True")
    return Session(model, method, options, cuda_graph, compile_layers)


class Session:
    """The `with` block of `compress`: sets the attention by name and supplies a cache to calls that bring none."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        options: dict[str, Any],
        cuda_graph: bool = False,
        compile_layers: bool = False,
    ):
        self.model, self.method, self._options = model, method, options
        self._cuda_graph, self._compile_layers = cuda_graph, compile_layers
        self._cache: RaggedCache | None = None
        self._replaced: weakref.WeakKeyDictionary[Any, RaggedCache] = weakref.WeakKeyDictionary()
        self._hook: Any = None
        self._former = ExitStack()  # puts back the attention that the model had
        self._own_generate: Any = None

    @property
    def cache(self) -> RaggedCache:
        """The cache of the latest call.

        Raises:
            RuntimeError: before the first call.
        """
        if self._cache is None:
            raise RuntimeError("no cache yet: call model.generate(...) inside the with block first")
        return self._cache

    def __enter__(self) -> Session:
        hooks = getattr(self.model, "_forward_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), Session) for hook in hooks):
            raise RuntimeError("model is inside another headkv.compress block already; leave that one first")
        if self._cuda_graph:
            check_device(self.model)
            if self._compile_layers:
                decoder_layers(self.model)
        with ExitStack() as former:
            former.enter_context(kept_attention(self.model))
            RaggedCache.for_model(self.model, self.method, **self._options)  # refuses what is not supported
            self._former = former.pop_all()
        self._hook = self.model.register_forward_pre_hook(self._supply_cache, with_kwargs=True)
        if self._cuda_graph:  # as transformers itself gives a model with a decode loop of its own that loop
            own: Any = vars(self.model)
            self._own_generate = own.get("generate")
            own["generate"] = replaying(cast(Any, self.model).generate, self._compile_layers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if self._cuda_graph:
            own: Any = vars(self.model)
            del own["generate"]
            if self._own_generate is not None:
                own["generate"] = self._own_generate
        self._former.close()

    def _supply_cache(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Before each forward call: put a ragged cache where the call has none or an empty one of another kind."""
        if kwargs.get("output_attentions") or self.model.config.output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: a ragged cache never forms the attention matrix"
            )
        if kwargs.get("use_cache") is False:
            return None
        given = kwargs.get("past_key_values")
        if isinstance(given, RaggedCache):
            self._cache = given
            return None
        if given is not None and given.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values must be empty or a RaggedCache, got a filled {type(given).__name__}"
            )
        if given is not None and getattr(given, "is_compileable", False) and len(given.layers) > 0:
            raise ValueError(f"past_key_values must not be a static cache, got {type(given).__name__}")
        ragged = self._replaced.get(given) if given is not None else None
        if ragged is None:
            ragged = RaggedCache.for_model(self.model, self.method, **self._options)
            if given is not None:
                self._replaced[given] = ragged
        self._cache = ragged
        return args, {**kwargs, "past_key_values": ragged}


__all__ = ["NAME", "Session", "compress"]
