"""headkv as a model of lm-evaluation-harness: importing this module makes the name "headkv" known to lm_eval.

lm_eval looks for no plug-ins: `headkv lm-eval ...` is its own command with this module imported first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from headkv import _checks
from headkv.evaluation.asking import WAYS, Reply, ask, check_fits, replies
from headkv.evaluation.harness import split
from headkv.evaluation.profiling import load_on
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import budget_from, roster, share_of, sized
from headkv.integrations.hook import NAME
from headkv.models.attention import chosen_attention

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  # lm-eval's own default


@register_model("headkv")
class HeadKVLM(TemplateLM):
    """A decoder whose prompts are compressed by a method, before anything is generated or scored.

    `question="seen"` compresses the whole prompt but its last token, as any prompt of any task can be. "unseen" and
    "second" (see `headkv.evaluation.asking`) cut the question off: RULER's tasks only.

    Args:
        pretrained: "smollm2", "smollm2-tuned", or the name or folder of a transformers decoder.
        method: a name in `headkv.evaluation.roster`.
        budget: a share (0.1) or entries a KV head (256).
        question: "seen", "unseen" or "second".
        device: where the model runs.
        tokenizer: where RULER's tasks find the tokenizer, for a model that is no folder; not used here.
        batch_size, max_batch_size: of lm_eval; prompts are read one by one.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        method: str = "FullCache",
        budget: float | int | str = 1.0,
        question: str = "seen",
        device: str | None = "cpu",
        tokenizer: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.question = _checks.one_of("question", question, WAYS)
        self.budget = budget_from(budget) if isinstance(budget, str) else budget
        share_of(self.budget, 1)
        self.model, self.tokenizer = load_on(device or "cpu", pretrained)
        self.method, make = next(iter(roster([method], self.model, self.tokenizer).items()))
        self.make = sized(make, self.budget)
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer came from."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; without `add_special_tokens=False` with the begin token that the tokenizer puts before a text."""
        text = string if add_special_tokens is False else self._begun(string)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begun(self, text: str) -> str:
        begin = self.tokenizer.bos_token
        if not begin or text.startswith(str(begin)):
            return text
        puts_it = self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id
        return f"{begin}{text}" if puts_it else text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as one text; without `add_generation_prompt` its last message goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results: the method, the budget and how questions are asked."""
        return {"method": self.method, "budget": self.budget, "question": self.question}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy replies, cut at the first stop string.

        Raises:
            ValueError: sampling is asked for, or a question has to be cut off that nobody knows.
        """
        written = []
        for request in tqdm(requests, disable=disable_tqdm, desc=f"{self.method}, question {self.question}"):
            prompt, options = request.args
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError(f"generation_kwargs must be greedy, got {options}")
            most = int(options.get("max_gen_toks", NEW_TOKENS))
            text = self._reply(prompt, str(request.task_name), most).text
            for stop in filter(None, _list(options.get("until"))):
                text = text.partition(stop)[0]
            written.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return written

    def _reply(self, prompt: str, task: str, most: int) -> Reply:
        methods = {self.method: self.make}
        if self.question == "seen":
            ids = self._ids(self.tok_encode(prompt))
            check_fits(self.model, ids.shape[1] + most)
            reading = Reading(self.model, ids)
            return replies(self.model, self.tokenizer, reading, reading.last, methods, None, most)[0]
        context, question = split(task, self._begun(prompt))
        for _, found in ask(
            *(self.model, self.tokenizer, context, question, methods, (self.question,)), max_new_tokens=most
        ):
            return found[0]
        raise AssertionError("one way gives one answer")

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """For each context and continuation the log-probability, and whether greedy decoding would write it.

        Contexts that follow each other and are the same are read and compressed once.
        """
        if self.question != "seen":
            raise ValueError(
                f"question must be 'seen' for tasks that score continuations, got {self.question!r}"
            )
        found: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc=self.method)
        for context, same in groupby(requests, key=lambda request: request[1]):
            group = list(same)
            check_fits(self.model, len(context) + max(len(request[2]) for request in group))
            found += self._scores(context, [request[2] for request in group])
            bar.update(len(group))
        bar.close()
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def _scores(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        cache, saved, last = None, None, self._ids(context)
        if len(context) > 1:  # one token is no prompt that could be compressed
            reading = Reading(self.model, last)
            cache, last = reading.compressed(self.make(reading.cache.seen)), reading.last
            saved = cache.snapshot()
        found = []
        for ids in continuations:
            if cache is not None and saved is not None:
                cache.restore(saved)
            asked = torch.cat([last, self._ids(ids[:-1])], 1) if len(ids) > 1 else last
            if cache is None:
                logits = self.model(asked, logits_to_keep=len(ids)).logits
            else:
                with chosen_attention(self.model, NAME):
                    logits = self.model(asked, past_key_values=cache, logits_to_keep=len(ids)).logits
            logs, answer = logits.float().log_softmax(-1)[0], torch.tensor(ids, device=logits.device)
            total = float(logs.gather(-1, answer[:, None]).sum())
            found.append((total, bool((logs.argmax(-1) == answer).all())))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not here: a text that is scored from its first token has no prompt to compress.

        Raises:
            ValueError: always.
        """
        raise ValueError("tasks must not be of rolling log-likelihoods: there is no prompt to compress")


def _list(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else list(until or ())
