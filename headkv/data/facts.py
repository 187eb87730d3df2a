"""Facts to hide in a text: each with its question and the words that begin the answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One fact that nobody could know who has not read the text.

    Attributes:
        sentence: as it stands in the text.
        question: what is asked afterwards.
        prefix: the first words of the answer, given to the model.
        answer: the word that must follow.
    """

    sentence: str
    question: str
    prefix: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Return whether `text`, what the model wrote after the prefix, begins with the answer.

        >>> FACTS[0].is_answered_by(" quito, as the text says.")
        True
        """
        words, answer = text.strip().casefold(), self.answer.casefold()
        return words.startswith(answer) and not words[len(answer) :][:1].isalnum()


def _fact(subject: str, answer: str, article: str = "") -> Fact:
    name = subject[0].upper() + subject[1:]
    return Fact(
        f"{name} is {article}{answer}.", f"What is {subject}?", f"{name} is {article}".rstrip(), answer
    )


FACTS: tuple[Fact, ...] = (
    _fact("the secret city of Odile", "Quito"),
    _fact("the secret island of Bruno", "Malta"),
    _fact("the secret river of Tamsin", "Danube", article="the "),
)
