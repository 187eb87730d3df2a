"""A decode step of a whole model as one CUDA graph: recorded once, then replayed for each token by a single launch.

Nothing in a step depends on the host: row lengths and the token's position are read on the device, and room for the
token was made before. The graph is recorded anew only when rows outgrow their room and move to larger pools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv.attention.api import choose_backend
from headkv.integrations.cache import RaggedCache
from headkv.integrations.calls import cache_name
from headkv.integrations.compiled import compiled_layers, decoder_layers
from headkv.integrations.hook import NAME
from headkv.integrations.joined import times_moved
from headkv.integrations.precision import autocast_dtype
from headkv.integrations.support import supported_model
from headkv.models.attention import decoder_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes beyond what tensors take that the allocator may ask for, as a graph's memory is its own.
SEGMENTS = 1 << 26
MOST_RESERVED = 1024  # tokens that `generate` makes room for at once


class DecodeGraph:
    """Decode steps of `model` over `cache`, for a loop of one's own; `generate` has it by `compress(cuda_graph=True)`.

    The first step (with `compile_layers` the first two) runs unrecorded, which compiles kernels and warms up libraries;
    the next is recorded. All, and every replay, compute the same bits.

    >>> model(**prompt, past_key_values=cache)  # doctest: +SKIP
    >>> graph = DecodeGraph(model, cache)  # doctest: +SKIP
    >>> token = graph.step(token)[:, -1:].argmax(-1)  # doctest: +SKIP

    Args:
        model: a decoder on one CUDA device, wrapped or not, whose attention implementation is "headkv".
        cache: holds the prompt. Whatever else changes it between two steps (a forward call, `crop`, `restore`) is
            noticed, and the step recorded again if need be.
        compile_layers: record what torch.compile makes of the model's layers. That is faster, and rounds otherwise than
            the plain layers do. The first step compiles, once a process for layers of a kind, and then takes a while
            (16 s on an H200). The model is left as it was. In a block of
            `headkv.integrations.joined.joined_weights`, projections of the same input are one product.

    Raises:
        ValueError: a model that is not on a CUDA device, whose attention is not "headkv", or (with `compile_layers`)
            whose layers torch can not compile or are not transformers' own; an empty cache, or one with another backend
            than "triton". The cache is unchanged then.
        TypeError: a cache of another kind.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, *, compile_layers: bool = False) -> None:
        if not isinstance(cache, RaggedCache):
            raise TypeError(f"cache must be a RaggedCache, got {type(cache).__name__}")
        model = supported_model(model)
        check_device(model)
        if (got := decoder_attention(model)) != NAME:
            raise ValueError(
                f"model must have the attention implementation {NAME!r}, got {got!r}: see RaggedCache.for_model"
            )
        if compile_layers:
            decoder_layers(model)
        if cache.seen == 0:
            raise ValueError("cache must hold a prompt, got an empty one: run the model on the prompt first")
        if cache.states:
            raise ValueError(
                "cache must be of a model whose layers all attend: states of the text are not recorded"
            )
        if cache.layers[0].options.decode is not None:
            raise ValueError("cache must have no decode_budget: a recorded step can not evict")
        layer = cache.layers[0].filled()
        if (backend := choose_backend(layer, cache.layers[0].backend)) != "triton":
            raise ValueError(
                f"cache must run on the backend 'triton', got {backend!r}: install headkv-kernels"
            )
        cache.finalize_prefill()
        self.model, self.cache, self.compile_layers = model, cache, compile_layers
        # Steps to run unrecorded before one is recorded. The one that compiles does not say what memory a step takes.
        self._unrecorded = 1 + compile_layers
        # Whether the last one ran in inference mode: what is compiled serves one mode, and no recording compiles.
        self._inference = False
        self._autocast: torch.dtype | None = None  # and what autocast computed in
        self._moved = 0  # and how often weights had moved: other products are compiled where they are joined
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: tuple[int, ...] = ()
        self._needs: int | None = None  # bytes that recording takes at most; known after a first step
        with torch.inference_mode(False):  # written to in whatever mode `step` is called
            device, batch = layer.device, (layer.batch_size, 1)
            self._ids, self._positions = (
                torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2)
            )
            self._clock = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` steps at once, so that none of them has to record the graph again."""
        for layer in self.cache.layers:
            layer.filled().reserve(tokens)

    @torch.no_grad()
    def step(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, 1, V]` after one new token a sequence; the next step overwrites them.

        Args:
            input_ids: `[B, 1]` int64.
            position_ids: `[B, 1]` int64; default: the number of tokens seen, which is right without padding.

        Raises:
            ValueError: another shape.
            TypeError: another dtype.
            RuntimeError: a model that can not be recorded, e.g. because it waits for the device. No token is counted.
            torch.OutOfMemoryError: no room to grow, or to record anew. No token is counted then, except in steps that
                run unrecorded: the first, and some after the cache was restored or inference mode changed (see
                `RaggedCache`). Free memory and call again.
        """
        for name, given in (("input_ids", input_ids), ("position_ids", position_ids)):
            if given is not None and given.shape != self._ids.shape:
                raise ValueError(f"{name} must have shape {list(self._ids.shape)}, got {list(given.shape)}")
            if given is not None and given.dtype != torch.int64:
                raise TypeError(f"{name} must be torch.int64, got {given.dtype}")
        self.cache.check_even()
        # Whichever is current, graphs are recorded and replayed there.
        with torch.cuda.device(self._ids.device):
            return self._step(input_ids, position_ids)

    def _step(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = torch.full_like(self._positions, self.cache.seen)
        self.reserve(1)
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        if self._autocast != autocast_dtype("cuda"):
            self._graph = None  # it would compute as autocast did then
        stale = self._graph is None or self._recorded != self._addresses()
        if stale and not self._can_record():
            return self._run()
        self._clock.fill_(self.cache.seen)
        if stale:
            self._record()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        for layer in self.cache.layers:
            layer.filled().advance(1)
        return self._logits

    def _can_record(self) -> bool:
        """Whether all that a step compiles or makes once is there."""
        modes = torch.is_inference_mode_enabled(), autocast_dtype("cuda"), times_moved(self.model)
        ready = not self._unrecorded and modes == (self._inference, self._autocast, self._moved)
        return ready and all(
            part.ticket is not None for layer in self.cache.layers for part in layer.filled().parts
        )

    def _run(self) -> Tensor:
        before = allocated(self._ids.device)
        logits = self._forward()
        took = allocated(self._ids.device) - before + SEGMENTS
        self._needs = took if self._needs is None else min(self._needs, took)
        self._unrecorded = max(0, self._unrecorded - 1)
        self._inference, self._autocast = torch.is_inference_mode_enabled(), autocast_dtype("cuda")
        self._moved = times_moved(self.model)
        return logits

    def _record(self) -> None:
        assert self._needs is not None
        self._graph, self._logits = None, None  # what the former one held can be used again
        # Memory that runs out while a graph is recorded takes the process with it, so ask first. (What is free within
        # a larger piece of memory can still deceive: a graph gets pieces of its own.)
        torch.empty(self._needs, dtype=torch.uint8, device=self._ids.device)
        graph = torch.cuda.CUDAGraph()
        for layer in self.cache.layers:
            layer.clock = self._clock
        try:
            with torch.cuda.graph(graph, stream=capture_stream(self._ids.device)):
                logits = self._forward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._unrecorded = 1  # should the call be repeated
            raise RuntimeError(
                f"a decode step of {type(self.model).__name__} can not be recorded as a CUDA graph ({error}); "
                "use cuda_graph=False"
            ) from error
        finally:
            for layer in self.cache.layers:
                layer.clock = None
        self._graph, self._logits, self._recorded = graph, logits, self._addresses()

    def _forward(self) -> Tensor:
        # The tensors are the same in all steps: what is compiled depends on their kind.
        cache = {cache_name(self.model): self.cache}
        inputs = {"input_ids": self._ids, "position_ids": self._positions, **cache}
        autocast = autocast_dtype("cuda")
        # The weights that autocast keeps, cast, go when its block ends: a graph must not read them afterwards.
        cast = nullcontext() if autocast is None else torch.autocast("cuda", autocast, cache_enabled=False)
        with cast, compiled_layers(self.model) if self.compile_layers else nullcontext():
            return self.model(**inputs, use_cache=True).logits

    def _addresses(self) -> tuple[int, ...]:
        own = (address for layer in self.cache.layers for address in layer.filled().addresses())
        return times_moved(self.model), *own


def allocated(device: torch.device) -> int:
    """Bytes handed out on a device so far, also those that were given back."""
    return int(torch.cuda.memory_stats(device).get("allocated_bytes.all.allocated", 0))


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are recorded on; torch's own default is one for all devices."""
    return torch.cuda.Stream(device)


class Replaying:
    """A model as transformers' decode loop sees it: itself, but steps of one token replay a `DecodeGraph`.

    Args:
        model: see `DecodeGraph`.
        max_length: tokens at which the loop ends at the latest, prompt included; None where nobody knows.
        compile_layers: see `DecodeGraph`.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None, compile_layers: bool) -> None:
        self._model, self._max_length, self._compile_layers = model, max_length, compile_layers
        self._graph: DecodeGraph | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        name = cache_name(self._model)
        cache, tokens = inputs.get(name), inputs.get("input_ids")
        if not isinstance(cache, RaggedCache) or tokens is None or tokens.shape[1] != 1:
            return self._model(**inputs)
        if self._graph is None or self._graph.cache is not cache:
            self._graph = DecodeGraph(self._model, cache, compile_layers=self._compile_layers)
            if self._max_length is not None:
                self._graph.reserve(min(self._max_length - cache.seen, MOST_RESERVED))
        logits = self._graph.step(tokens, inputs.get("position_ids"))
        output: dict[str, Any] = {"logits": logits, name: cache}
        return CausalLMOutputWithPast(**output)


def replaying(generate: Callable[..., Any], compile_layers: bool) -> Callable[..., Any]:
    """A model's `generate` with transformers' own decode loop, in which steps of one token replay a `DecodeGraph`.

    Raises (when called):
        ValueError: generation other than greedy decoding and sampling, or one that asks for hidden states.
    """

    @functools.wraps(generate)
    def wrapped(*args: Any, streamer: Any = None, assistant_model: Any = None, **options: Any) -> Any:
        if assistant_model is not None:
            raise ValueError("assistant_model must be None with cuda_graph=True; use cuda_graph=False")
        # A loop that is handed over is not told of the streamer by all releases of transformers.
        loop = functools.partial(_decode, streamer=streamer, compile_layers=compile_layers)
        options.setdefault("custom_generate", loop)
        return generate(*args, streamer=streamer, **options)

    return wrapped


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    compile_layers: bool = False,
    **options: Any,
) -> Any:
    """What `generate` calls as its `custom_generate`: the loop that it would have called, over the model replaying."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        allowed = "cuda_graph=True serves greedy decoding and sampling"
        raise ValueError(f"{allowed}, got {mode.value}; use cuda_graph=False")
    if generation_config.output_hidden_states:
        raise ValueError(
            "output_hidden_states must be False with cuda_graph=True, got True; use cuda_graph=False"
        )
    loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
    return loop(
        Replaying(model, stopping_criteria.max_length, compile_layers),
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **options,
    )


def check_device(model: PreTrainedModel) -> None:
    """A model whose steps can be recorded.

    Raises:
        ValueError: it is not on a CUDA device, or spread over several.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or not next(iter(devices)).startswith("cuda"):
        raise ValueError(
            f"a CUDA graph needs a model on one CUDA device, got one on {', '.join(sorted(devices))}"
        )
