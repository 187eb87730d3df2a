"""Long text in, answers out: a transformers pipeline that compresses a text once and asks it any number of questions.

Importing this module makes the task "headkv-text-generation" known to `transformers.pipeline`. The call has the shape
of kvpress's pipeline: the text is compressed before any question is known (question-agnostic), every question meets
the same compressed text, and decoding is greedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from headkv import _checks
from headkv._config import layer_kinds
from headkv.data.chat import chat_frame
from headkv.integrations.cache import RaggedCache
from headkv.integrations.hook import NAME
from headkv.integrations.support import supported_config
from headkv.methods import AdaKV, FullCache
from headkv.models.attention import choose_attention, kept_attention
from headkv.models.decoding import end_tokens, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headkv.methods.base import Method

TASK = "headkv-text-generation"


def pipeline(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | str | None = None, **options: Any
) -> HeadKVPipeline:
    """Make a pipeline: `transformers.pipeline("headkv-text-generation", model, tokenizer=tokenizer, ...)`.

    Args:
        model: a decoder, or the name or folder of one.
        tokenizer: its tokenizer; needed with a loaded model.
        options: of `transformers.pipeline` (`device`, `dtype`, ...), and defaults for the calls (`method`, ...).

    Raises:
        TypeError, ValueError: the model is not supported, there is no tokenizer, or an option is wrong.

    >>> ask = headkv.pipeline(model, tokenizer)  # doctest: +SKIP
    >>> ask(text, questions=["Who?", "When?"], method=headkv.AdaKV(budget=0.2))  # doctest: +SKIP
    {'answers': ['...', '...']}
    """
    make: Any = transformers.pipeline  # its annotations list the tasks that come with it
    made: HeadKVPipeline = make(TASK, model, tokenizer=tokenizer, **options)
    return made


class HeadKVPipeline(Pipeline):
    """The pipeline of the task "headkv-text-generation"; make it with `headkv.pipeline` or `transformers.pipeline`."""

    tokenizer: PreTrainedTokenizerBase  # type: ignore[assignment]

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> None:
        supported_config(model)
        if tokenizer is None:
            raise ValueError("tokenizer must be given along with a model that is loaded already, got None")
        if options.get("batch_size") not in (None, 1):
            raise ValueError(f"batch_size must be 1: texts are read one by one, got {options['batch_size']}")
        super().__init__(model, tokenizer, **options)  # type: ignore[arg-type]

    def __call__(  # type: ignore[override]
        self,
        context: str | list[str],
        *,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        answer_prefix: str | None = None,
        method: Method | None = None,
        compression_ratio: float | None = None,
        max_new_tokens: int | None = None,
        max_context_length: int | None = None,
        cache: RaggedCache | None = None,
    ) -> Any:
        """Compress a text, then answer.

        The tokenizer's chat template is used if it has one: text and question are one message of the user. A blank
        line goes between them unless white space is there. Without a template a line break ends the question.

        Args:
            context: the text; or a list of texts, for a list of results.
            question: one question. Without any, the model goes on after the text: in a chat it answers the text.
            questions: several; a progress bar shows how far they are.
            answer_prefix: how every answer begins; it is not repeated in the result.
            method: what each head keeps of the text, e.g. `headkv.AdaKV(budget=0.2)`; all, if nothing is said.
            compression_ratio: the share to evict, in [0, 1): short for `method=headkv.AdaKV(1 - compression_ratio)`.
            max_new_tokens: of each answer, 50 if nothing is said; it ends earlier at the model's end token.
            max_context_length: cut longer texts, chat header included, after so many tokens, with a warning.
            cache: an empty `RaggedCache.for_model(model, method)` in place of a method. Afterwards it holds the
                compressed text, without questions and answers.

        Returns:
            `{"answer": str}`, or `{"answers": [str, ...]}` for `questions`.

        Raises:
            TypeError, ValueError: an argument is not as described, or the text is longer than the model reads and
                `max_context_length` does not say what to do.
        """
        if isinstance(context, list) and not context:
            raise ValueError("context must be a text, or a list of at least one, got []")
        options = {
            "question": question,
            "questions": questions,
            "answer_prefix": answer_prefix,
            "method": method,
            "compression_ratio": compression_ratio,
            "max_new_tokens": max_new_tokens,
            "max_context_length": max_context_length,
            "cache": cache,
        }
        return super().__call__(
            context, **{name: value for name, value in options.items() if value is not None}
        )

    # -- the steps that transformers calls ----------------------------------------------------------------------------

    def _sanitize_parameters(  # type: ignore[override]
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        answer_prefix: str | None = None,
        method: Method | None = None,
        compression_ratio: float | None = None,
        max_new_tokens: int | None = None,
        max_context_length: int | None = None,
        cache: RaggedCache | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Check what was said, and give each step its part; what was not said is left out, for the step's default."""
        reading: dict[str, Any] = {}
        answering: dict[str, Any] = {}
        if question is not None and questions is not None:
            raise ValueError("question and questions must not both be given")
        if question is not None:
            reading["questions"] = [_text("question", question)]
        if questions is not None:
            if isinstance(questions, str) or not isinstance(questions, Sequence) or not questions:
                raise TypeError(f"questions must be a list of at least one question, got {questions!r}")
            reading["questions"] = [_text(f"questions[{i}]", q) for i, q in enumerate(questions)]
        if answer_prefix is not None:
            if not isinstance(answer_prefix, str):
                raise TypeError(f"answer_prefix must be a string, got {answer_prefix!r}")
            reading["answer_prefix"] = answer_prefix
        if max_context_length is not None:
            _checks.whole("max_context_length", max_context_length, 1)
            reading["max_context_length"] = max_context_length
        if max_new_tokens is not None:
            _checks.whole("max_new_tokens", max_new_tokens, 1)
            answering["max_new_tokens"] = max_new_tokens
        ways = {"method": method, "compression_ratio": compression_ratio, "cache": cache}
        if len(said := [way for way, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"at most one of {', '.join(ways)} must be given, got {' and '.join(said)}")
        if compression_ratio is not None:
            _checks.between("compression_ratio", compression_ratio, 0, 1)
            if compression_ratio == 1:
                raise ValueError("compression_ratio must be below 1: something must be kept, got 1")
            method = AdaKV(1.0 - compression_ratio)
        if method is not None:
            _checks.has("method", method, "plan", "observed_queries")
        if said:
            answering |= {"method": method, "cache": cache}
        kind = {} if "questions" not in reading else {"several": questions is not None}
        return reading, answering, kind

    def preprocess(  # type: ignore[override]
        self,
        context: str,
        questions: Sequence[str | None] = (None,),
        answer_prefix: str = "",
        max_context_length: int | None = None,
    ) -> dict[str, Any]:
        """The tokens of the text, `context` `[1, n]`, and of what follows it each time, `asks` `[1, m]`, m > 0."""
        header, footer = chat_frame(self.tokenizer)
        ids = self._tokens(header + _text("context", context))
        ids = self._fitting(ids, max_context_length)
        asks = []
        for question in questions:
            ask = (
                answer_prefix
                if question is None and not self.tokenizer.chat_template
                else footer + answer_prefix
            )
            if question is not None:
                gap = "" if context[-1].isspace() or question[0].isspace() else "\n\n"
                ask = gap + question + ask
            asks.append(self._tokens(ask))
        if any(ask.shape[1] == 0 for ask in asks):
            # The first answered token must come from the compressed cache, so a token has to be left to ask it with.
            if ids.shape[1] < 2:
                raise ValueError("context must have at least two tokens to be continued, got one")
            ids, asks = ids[:, :-1], [ids[:, -1:]]
        return {"context": ids, "asks": asks}

    def _forward(  # type: ignore[override]
        self,
        inputs: dict[str, Any],
        method: Method | None = None,
        cache: RaggedCache | None = None,
        max_new_tokens: int = 50,
    ) -> dict[str, Any]:
        """Read the text into the cache once, then answer from there each time."""
        model, context, asks = self.model, inputs["context"], inputs["asks"]
        given = cache
        if given is not None:
            _check_cache(given, len(layer_kinds(supported_config(model))))
        with kept_attention(model):
            # Snapshots undo the answers, so that windowed rows need store no more than they attend to.
            cache = given or RaggedCache.for_model(model, method or FullCache(), rollback=0)
            choose_attention(model, NAME)
            model(context, past_key_values=cache, logits_to_keep=1)
            cache.finalize_prefill()
            saved = cache.snapshot() if given is not None or len(asks) > 1 else ()
            answers = []
            for number, ask in enumerate(logging.tqdm(asks, desc="Answers", disable=len(asks) == 1)):
                if number:
                    cache.restore(saved)
                answers.append(list(greedy(model, ask, cache, max_new_tokens, ends=end_tokens(model))))
            if given is not None:
                cache.restore(saved)
        return {"answers": answers}

    def postprocess(self, outputs: dict[str, Any], several: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """From tokens to text."""
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in outputs["answers"]]
        return {"answers": texts} if several else {"answer": texts[0]}

    # -- their parts --------------------------------------------------------------------------------------------------

    def _tokens(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return torch.tensor([ids], dtype=torch.int64)

    def _fitting(self, ids: Tensor, most: int | None) -> Tensor:
        """`ids` `[1, n]`, cut to `most` tokens with a warning; without that, an error if the model reads fewer."""
        n = ids.shape[1]
        if most is None:
            limit = getattr(supported_config(self.model), "max_position_embeddings", None) or n
            if n > limit:
                raise ValueError(
                    f"context must have at most {limit} tokens, as many as the model reads, got {n}; "
                    f"max_context_length={limit} cuts it"
                )
        elif n > most:
            warnings.warn(f"context is cut from {n} to {most} tokens (max_context_length)", stacklevel=2)
            return ids[:, :most]
        return ids


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return value


def _check_cache(cache: Any, num_layers: int) -> None:
    if not isinstance(cache, RaggedCache):
        raise TypeError(f"cache must be a RaggedCache, got {type(cache).__name__}")
    if len(cache.layers) != num_layers:
        raise ValueError(f"cache must have the model's {num_layers} layers, got {len(cache.layers)}")
    if cache.seen:
        raise ValueError(f"cache must be empty, got one with {cache.seen} tokens; cache.reset() empties it")


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=HeadKVPipeline, pt_model=AutoModelForCausalLM)
