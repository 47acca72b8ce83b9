"""The names, places, titles and made-up words that fill the examples of both tasks.

Owns: two disjoint pools of words, one for training and one held out, and the values composed from them.
Does not know: SQL, tools, or how a question is phrased.

Made-up words make up a good part of the values, so that an adapter learns to copy what stands in the question
instead of recalling names it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class WordPool:
    """The words of one split; every value is composed from them."""

    first_names: tuple[str, ...]
    surnames: tuple[str, ...]
    cities: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    months: tuple[str, ...]
    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]
    code_letters: str

    def made_up_word(self, random: Random) -> str:
        """Return a word of two to four syllables that no dictionary has."""
        count = random.choice((2, 2, 3, 3, 4))
        return "".join(random.choice(self.onsets) + random.choice(self.vowels) for _ in range(count)) + random.choice(
            self.codas
        )

    def acronym(self, random: Random) -> str:
        """Return three to five letters that mean nothing."""
        return "".join(random.choice(self.code_letters) for _ in range(random.randint(3, 5)))

    def person(self, random: Random) -> str:
        """Return a first name and a surname, either of them perhaps made up."""
        first = self._maybe_made_up(random, self.first_names)
        last = self._maybe_made_up(random, self.surnames)
        return first if random.random() < 0.1 else f"{first} {last}"

    def city(self, random: Random) -> str:
        """Return one place name."""
        return self._maybe_made_up(random, self.cities)

    def place(self, random: Random, kind: str) -> str:
        """Return a place with its kind as part of the name: `old port bridge` for the kind `bridge`."""
        words = [self.city(random), kind]
        if random.random() < 0.5:
            words.insert(1, random.choice(self.adjectives))
        return " ".join(words)

    def title(self, random: Random) -> str:
        """Return a title of two to four words, as of a book or a song."""
        words = [random.choice(self.adjectives), random.choice(self.nouns)]
        if random.random() < 0.4:
            words = ["the", *words]
        if random.random() < 0.3:
            words += ["of", self.city(random)]
        return " ".join(words)

    def code(self, random: Random) -> str:
        """Return a short code such as `kt-204`."""
        letters = "".join(random.choice(self.code_letters) for _ in range(random.randint(1, 3)))
        return f"{letters}{random.choice(('-', '', ' '))}{random.randint(1, 999)}"

    def date(self, random: Random) -> str:
        """Return a date such as `march 4, 1987`."""
        month, day, year = random.choice(self.months), random.randint(1, 28), random.randint(1900, 2024)
        return random.choice((f"{month} {day}, {year}", f"{day} {month} {year}", f"{month} {day}"))

    def score(self, random: Random) -> str:
        """Return a result such as `3-1`."""
        return f"{random.randint(0, 9)}{random.choice(('-', ' - ', ':'))}{random.randint(0, 9)}"

    def _maybe_made_up(self, random: Random, words: tuple[str, ...]) -> str:
        return self.made_up_word(random) if random.random() < 0.5 else random.choice(words)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN = WordPool(
    first_names=_words(
        "anna peter maria john lucy omar helen pavel greta hugo nadia victor rosa martin ingrid samuel agnes bruno"
        " carmen dmitri edith felix gloria henrik irene jorge karin leon mabel nikolai oscar paula quentin ruth stefan"
        " theresa umberto vera walter yusuf zoe"
    ),
    surnames=_words(
        "smith garcia keller novak brown rossi jensen kovacs petrov lindgren moreau tanaka walsh okoro silva andersson"
        " baptiste carvalho donovan engel ferreira goldberg hughes ivanov johansson kaplan lombardi mcallister nakamura"
        " olsen papadopoulos quinn rodriguez schneider thompson ueda vasquez williams yilmaz zimmermann"
    ),
    cities=_words(
        "paris oslo denver lagos kyoto turin boston quito hanoi perth leeds cairo bergen dallas krakow porto antwerp"
        " barcelona chicago dakar edinburgh florence glasgow hamburg istanbul jakarta kampala liverpool madrid nagoya"
        " ottawa philadelphia rotterdam sarajevo toronto uppsala valencia warsaw yokohama zagreb"
    ),
    adjectives=_words(
        "old northern golden silent broken royal central long red hidden upper first lost ancestral brilliant crimson"
        " dusty elegant fearless gentle hollow invisible jealous knotted lonely magnetic narrow ordinary peculiar"
        " restless secret tender uncertain velvet wandering yellow cosmic electric federal industrial metropolitan"
    ),
    nouns=_words(
        "river winter garden road letter king mountain song shadow house night bridge fire anchor blossom canyon"
        " detective emperor feather guitar horizon innocence journey kingdom lantern machine neighbor orchard passenger"
        " question rainbow sailor telegram umbrella voyage whisper yesterday butterfly chronicle experiment paradise"
    ),
    months=("january", "march", "april", "june", "august", "october", "december"),
    onsets=_words("b br d dr f g gl h k kr l m n p pr r s st t tr v z"),
    vowels=_words("a e i o u ai ea ia"),
    codas=("", "", "n", "r", "s", "ck", "ld"),
    code_letters="abdefgklmprstz",
)

HELD_OUT = WordPool(
    first_names=_words("clara diego fatima george ivan julia kofi leila nils olga ravi tessa"),
    surnames=_words("adams becker castillo dubois eriksen fischer haddad ito mensah nguyen oconnor reyes"),
    cities=_words("lima vienna seattle nairobi osaka naples dublin tampa riga bogota geneva leipzig"),
    adjectives=_words("ancient western silver quiet frozen grand lower wild blue distant new eastern"),
    nouns=_words("island summer forest street promise queen valley dance mirror castle morning harvest"),
    months=("february", "may", "july", "september", "november"),
    onsets=_words("ch c cl fl fr gr j ph pl qu sc sh sl sp th w y"),
    vowels=_words("a e i o u ou ee io"),
    codas=("", "", "m", "l", "x", "nd", "rt"),
    code_letters="chjnqvwxy",
)
