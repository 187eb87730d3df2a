"""What needles are made of: people, words and sentences, none of which training and validation share."""

from __future__ import annotations

from dataclasses import dataclass


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


@dataclass(frozen=True)
class Pool:
    """What the facts of one split are made of."""

    people: tuple[str, ...]
    words: tuple[tuple[str, tuple[str, ...]], ...]  # (what is asked for, possible answers)
    number: str
    pair: tuple[str, str]  # (as it stands in the text, the question)
    wish: tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # (what, to do, with what, where)
    hop: tuple[str, tuple[str, ...], str, tuple[str, ...]]  # (who is it, all of them, what is asked, answers)


POOLS = {
    "training": Pool(
        people=_list(
            "Odile Bruno Tamsin Marten Salma Ingrid Piet Ruth Hugo Leila Anton Vera Nils Carla Jonas Petra "
            "Agnes Boris Clara Dmitri Elena Felix Greta Henrik Irma Jakob"
        ),
        words=(
            (
                "secret city",
                _list("Quito Lisbon Oslo Hanoi Tunis Lima Cairo Rome Vienna Dublin Prague"),
            ),
            (
                "secret country",
                _list("Norway Peru Kenya Japan Chile Egypt India Poland Cuba Ghana Nepal"),
            ),
            ("favorite planet", _list("Mars Venus Jupiter Saturn Neptune Mercury Uranus Earth")),
            ("favorite color", _list("red blue green yellow purple orange brown black white pink")),
            ("lucky month", _list("January March April May June July August October November")),
            (
                "secret language",
                _list("Latin Greek Arabic Danish Finnish Korean Polish Turkish Welsh"),
            ),
            ("stolen jewel", _list("ruby opal jade pearl emerald sapphire diamond amber topaz")),
        ),
        number="access code",
        pair=("The key {key} opens the box {value}.", "Which box does the key {key} open?"),
        wish=(
            "best thing to do in the house",
            (
                "to drink a cup of tea",
                "to read an old book",
                "to paint a small picture",
                "to play a game of chess",
            ),
            ("with the old neighbors", "with two white cats", "by the light of a candle", "in a red coat"),
            ("in the kitchen", "under the roof", "on the balcony", "behind the green door"),
        ),
        hop=(
            "is the {} of the village",
            _list("baker sailor doctor painter teacher hunter tailor judge"),
            "secret city",
            _list("Athens Berlin Tokyo Delhi Havana Paris Madrid Geneva"),
        ),
    ),
    "validation": Pool(
        people=_list(
            "Amara Benno Celine Darius Esther Fabian Gloria Hassan Ilse Joris Katya Lorenz Mira Noah Olga Pablo "
            "Rosa Stefan Thea Ulrich Viktor Wanda Xenia Yusuf"
        ),
        words=(
            ("secret island", _list("Malta Cyprus Crete Java Bali Iceland Jamaica Sicily")),
            ("hidden metal", _list("copper silver iron gold zinc nickel tin platinum lead")),
        ),
        number="special magic number",
        pair=("The register {key} holds the word {value}.", "Which word does the register {key} hold?"),
        wish=(
            "last wish",
            ("to cross the frozen lake", "to see the northern lights", "to sing in the old theater"),
            ("with seven brown dogs", "before the first snow", "with a brass telescope"),
            ("at dawn", "in silence", "for the last time"),
        ),
        hop=(
            "owns the {} in the harbor",
            _list("lighthouse tavern warehouse ferry bakery museum"),
            "secret island",
            _list("Greenland Tahiti Fiji Borneo Madagascar Corsica"),
        ),
    ),
}
