"""A tokenizer with a token a letter, for the tiny models of 97 tokens."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'{}[]"


def letters(template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """Unknown letters are one token; `template` is the chat template, `bos` whether a text has a begin token."""
    words = {word: number for number, word in enumerate([*SPECIAL, *LETTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if bos:
        names["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = template
    return tokenizer
