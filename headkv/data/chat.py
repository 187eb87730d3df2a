"""Where a message stands in a chat: what comes before it, and what comes between it and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "{message}"
REPEAT = "\n\nRepeat the text above, word for word."  # what KVzip asks for behind a text


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before the user's message, and what between it and the answer.

    A tokenizer without a chat template has its first token and a line break for them.

    Raises:
        ValueError: a template that does not repeat the message.
    """
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", "\n"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # templates that can think aloud know this word, others ignore it
    )
    header, found, footer = str(chat).partition(_MARK)
    if not found:
        raise ValueError(f"tokenizer must have a chat template that repeats the message, got {chat!r}")
    return header, footer


def repeat_request(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that ask to repeat a text, up to where the answer begins: for `KVzipScorer`.

    Raises:
        ValueError: as `chat_frame`.
    """
    ids: list[int] = tokenizer(REPEAT + chat_frame(tokenizer)[1], add_special_tokens=False)["input_ids"]
    return ids


def next_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between the model's reply and the user's next message: the end of the one, the head of the other.

    A tokenizer without a chat template has a blank line for it.

    Raises:
        ValueError: a template that does not repeat the messages.
    """
    if not tokenizer.chat_template:
        return "\n\n"
    said = [("user", "{first}"), ("assistant", "{reply}"), ("user", _MARK)]
    chat = str(
        tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in said],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    )
    between = chat.partition("{reply}")[2].partition(_MARK)[0]
    if not between:
        raise ValueError(f"tokenizer must have a chat template that repeats the messages, got {chat!r}")
    return between
