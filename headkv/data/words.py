"""Words to ask about, in two parts that share none: what a model is tuned on, and what it is judged by."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

_NAMES = (
    "Aldo Amara Anke Arvid Astrid Bela Benno Berta Birgit Bodil Camila Cedric Clara Conrad Corin Dagny Dario Davor "
    "Delia Dietmar Dora Edda Egon Eileen Elias Elin Emil Enzo Esther Fabio Farid Felix Fiona Flora Frieda Gaspar "
    "Gerda Gideon Gilda Greta Gustav Hanna Harald Heidi Helmut Henrik Hilda Ida Ignaz Ilse Imre Irena Ivo Jadwiga "
    "Jakob Jana Joachim Judit Julius Kaspar Katja Keno Kirsten Klara Konrad Lars Leonie Levin Linus Livia Lorenz "
    "Lothar Lucia Ludwig Magnus Malik Maren Margit Matteo Mika Milena Mira Moritz Nadia Nelson Nora Olaf Olga Oskar "
    "Otto Pablo Paula Pavel Quentin Rafael Ragna Rainer Regina Renato Rosa Rufus Sabine Samir Selma Sigrid Silvan "
    "Simone Sofia Stefan Sven Tabea Tilda Tobias Trude Ulrich Ursula Valentin Veit Viktor Wanda Wilma Xenia Yannick "
    "Yusuf Zelda Zoltan"
)
_OTHER_NAMES = (
    "Odile Bruno Tamsin Marten Salma Ingrid Piet Ruth Hugo Leila Anton Vera Nils Carla Jonas Petra Mabel Oren Sunniva "
    "Tiago Yara Basil Hedda Lorcan"
)
_CITIES = (
    "Accra Adelaide Algiers Amman Ankara Antwerp Baku Bangkok Baghdad Beirut Belgrade Bergen Bogota Bologna Boston "
    "Bremen Brisbane Bristol Brussels Budapest Calgary Caracas Chicago Cologne Dakar Dallas Damascus Denver Dresden "
    "Durban Edinburgh Florence Frankfurt Geneva Genoa Ghent Glasgow Graz Hamburg Helsinki Houston Istanbul Jakarta "
    "Kabul Karachi Kiev Krakow Kyoto Lagos Leipzig Lyon Manila Marseille Melbourne Memphis Miami Milan Montreal Moscow "
    "Mumbai Munich Nairobi Naples Nagoya Nice Odessa Osaka Ottawa Palermo Perth Porto Riga Rotterdam Salzburg Santiago "
    "Seattle Seoul Seville Shanghai Stockholm Sydney Tallinn Tehran Toronto Toulouse Trieste Turin Utrecht "
    "Valencia Vancouver Venice Verona Vilnius Warsaw Zagreb Zurich"
)
_OTHER_CITIES = (
    "Quito Lisbon Oslo Hanoi Tunis Lima Cairo Paris Rome Madrid Vienna Dublin Athens Prague Berlin Tokyo Delhi Havana "
    "Bern Nantes Tampa Leeds"
)
_ISLANDS = (
    "Aruba Barbados Bermuda Borneo Capri Corfu Corsica Curacao Dominica Elba Fiji Formosa Gotland Greenland Grenada "
    "Guam Guernsey Haiti Hawaii Ibiza Jersey Kauai Kodiak Kos Lanzarote Lesbos Luzon Madeira Mallorca Martinique Maui "
    "Mauritius Mindanao Minorca Mykonos Naxos Oahu Okinawa Penang Rhodes Samoa Samos Santorini Sardinia Skye Sumatra "
    "Tahiti Tasmania Tenerife Timor Tobago Tonga Trinidad Zanzibar"
)
_OTHER_ISLANDS = "Malta Cyprus Crete Java Cuba Bali Iceland Jamaica Madagascar Sicily Bornholm Mull"
_THINGS = (
    "anchor apron barrel basket bell blanket bottle bowl brooch broom bucket button candle carpet chair chest clock "
    "coat compass cradle crown cup cushion drum fan flag flute fork globe glove hammer harp hat helmet hourglass "
    "jacket jar kettle key kite ladder lamp lantern lute mask medal mirror necklace oar painting parcel pen pillow "
    "pitcher plate purse quilt racket ribbon ring rope saddle saw scarf scroll shawl shield shovel sickle spoon statue "
    "stool sword table telescope thimble trunk umbrella vase violin whistle wreath"
)
_OTHER_THINGS = (
    "abacus bagpipe banner bracelet cello goblet inkwell kayak locket loom mandolin padlock sextant tapestry"
)
_COLOURS = (
    "amber beige black blue bronze brown cream crimson golden green grey ivory lilac orange pink purple red silver tan "
    "teal violet white yellow"
)
_OTHER_COLOURS = "copper indigo maroon olive scarlet turquoise"


@dataclass(frozen=True, eq=False)
class Words:
    """What tasks are made of. Every group of the training part is disjoint from the same group of the other.

    Attributes:
        names: of people.
        cities: answers, as islands.
        islands: answers.
        things: to own or to look for.
        colours: that a thing may have.
        words: of no kind, some thousands.
    """

    names: tuple[str, ...]
    cities: tuple[str, ...]
    islands: tuple[str, ...]
    things: tuple[str, ...]
    colours: tuple[str, ...]
    words: tuple[str, ...]

    @classmethod
    def parts(cls, vocabulary: Iterable[str]) -> tuple[Words, Words]:
        """Return the training part and the validation part.

        Args:
            vocabulary: of a tokenizer; the words of no kind are those among its tokens. A tenth of them is kept
                for validation, chosen by checksum, so that a word never changes sides.

        Raises:
            ValueError: `vocabulary` holds fewer than 100 words of three or more lower-case letters.
        """
        words = sorted(
            {found[1] for token in vocabulary if (found := re.fullmatch("[Ġ▁]([a-z]{3,12})", token))}
        )
        if len(words) < 100:
            raise ValueError(f"vocabulary must hold at least 100 words such as 'Ġriver', got {len(words)}")
        kept = {word for word in words if zlib.crc32(word.encode()) % 10 == 0}
        training = [_NAMES, _CITIES, _ISLANDS, _THINGS, _COLOURS, " ".join(w for w in words if w not in kept)]
        others = [
            _OTHER_NAMES,
            _OTHER_CITIES,
            _OTHER_ISLANDS,
            _OTHER_THINGS,
            _OTHER_COLOURS,
            " ".join(sorted(kept)),
        ]
        return cls._of(training), cls._of(others)

    @classmethod
    def _of(cls, groups: list[str]) -> Words:
        names, cities, islands, things, colours, words = (tuple(group.split()) for group in groups)
        return cls(names, cities, islands, things, colours, words)
