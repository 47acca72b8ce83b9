"""Text-to-SQL examples: a table schema and a question in, one SELECT statement out.

Owns: the prompt form, the columns and question phrasings of both splits, and how a question becomes SQL.
Does not know: models, training, or where the words of a value come from.

The held-out split shares no column, no word of a value and no question phrasing with the training split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from task import Example, Task
from word_pools import HELD_OUT, TRAIN, WordPool

PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE {table} ({columns})\n\n question: {question} [/user] [assistant]"
)


@dataclass(frozen=True, slots=True)
class Split:
    """One split of the task. `{s}` stands for the selected column, `{c}` for a condition's column, `{v}` for its value.

    `columns` are listed by the kind of their values; a name under `place` is also the last word of its values.
    """

    words: WordPool
    columns: Mapping[str, tuple[str, ...]]
    unnamed: tuple[str, ...]
    named: tuple[str, ...]
    two_conditions: tuple[str, ...]
    count: tuple[str, ...]
    extreme: Mapping[str, tuple[str, ...]]
    compare: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: str

    @property
    def sql_type(self) -> str:
        return "INTEGER" if self.kind == "number" else "VARCHAR"

    def spoken(self, random: Random) -> str:
        words = self.name.replace("_", " ")
        return random.choices((words, words.title(), words.upper()), (0.6, 0.2, 0.2))[0]

    def value(self, words: WordPool, random: Random) -> str:
        if self.kind == "number":
            return str(random.choice((random.randint(1, 40), random.randint(1950, 2024), random.randint(100, 99999))))
        if self.kind == "place":
            text = words.place(random, self.name.split("_")[-1])
        else:
            text = str(getattr(words, self.kind)(random))
        return text.title() if random.random() < 0.5 else text

    def literal(self, value: str) -> str:
        return value if self.kind == "number" else f"'{value}'"


def make_examples(split: Split, count: int, seed: int) -> list[Example]:
    """Return `count` different examples of a split, the same ones for the same seed."""
    random = Random(seed)
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = _example(split, random)
        examples[example.prompt] = example
    return list(examples.values())


def _example(split: Split, random: Random) -> Example:
    table = f"table_name_{random.randint(1, 99)}"
    make = random.choices((_unnamed, _named, _two_conditions, _aggregate, _compare), (30, 35, 12, 15, 8))[0]
    columns, question, query = make(split, random, table)
    random.shuffle(columns)
    schema = ", ".join(f"{column.name} {column.sql_type}" for column in columns)
    return Example(PROMPT.format(table=table, columns=schema, question=question), f" {query}")


def _columns(split: Split, random: Random, count: int, *, kind: str | None = None) -> list[_Column]:
    """Return different columns, the first one of the given kind; some of them have names that no table has."""
    first = [_Column(random.choice(split.columns[kind]), kind)] if kind else []
    rest = [_Column(name, of) for of, names in split.columns.items() for name in names]
    picked = random.sample([column for column in rest if column not in first], count)
    return [_renamed(column, split.words, random) for column in (first + picked)[:count]]


def _renamed(column: _Column, words: WordPool, random: Random) -> _Column:
    # A place's values end with the column's name, so that one has to stay.
    if column.kind == "place" or random.random() < 0.85:
        return column
    made_up = words.acronym(random) if random.random() < 0.8 else words.made_up_word(random)
    return _Column(made_up, column.kind)


def _unnamed(split: Split, random: Random, table: str) -> tuple[list[_Column], str, str]:
    """Ask without naming the condition's column: it is the only other one."""
    selected, other = columns = _columns(split, random, 2)
    if other.kind == "number" or random.random() < 0.4:
        other = next(c for c in _columns(split, random, 8, kind="place") if c != selected)
        columns = [selected, other]
    value = other.value(split.words, random)
    question = random.choice(split.unnamed).format(s=selected.spoken(random), v=value)
    return columns, question, f"SELECT {selected.name} FROM {table} WHERE {other.name} = {other.literal(value)}"


def _named(split: Split, random: Random, table: str) -> tuple[list[_Column], str, str]:
    columns = _columns(split, random, random.choice((2, 2, 3, 4)))
    selected, other = columns[:2]
    value = other.value(split.words, random)
    phrase = random.choice(split.named)
    question = phrase.format(s=selected.spoken(random), c=other.spoken(random), v=value)
    return columns, question, f"SELECT {selected.name} FROM {table} WHERE {other.name} = {other.literal(value)}"


def _two_conditions(split: Split, random: Random, table: str) -> tuple[list[_Column], str, str]:
    columns = _columns(split, random, random.choice((3, 3, 4)))
    selected, first, second = columns[:3]
    one, two = first.value(split.words, random), second.value(split.words, random)
    question = random.choice(split.two_conditions).format(
        s=selected.spoken(random), c=first.spoken(random), v=one, c2=second.spoken(random), v2=two
    )
    where = f"{first.name} = {first.literal(one)} AND {second.name} = {second.literal(two)}"
    return columns, question, f"SELECT {selected.name} FROM {table} WHERE {where}"


def _aggregate(split: Split, random: Random, table: str) -> tuple[list[_Column], str, str]:
    function = random.choice(("COUNT", *split.extreme))
    kind = None if function == "COUNT" else "number"
    columns = _columns(split, random, random.choice((2, 3)), kind=kind)
    selected, other = columns[:2]
    value = other.value(split.words, random)
    phrase = random.choice(split.count if function == "COUNT" else split.extreme[function])
    question = phrase.format(s=selected.spoken(random), c=other.spoken(random), v=value)
    where = f"{other.name} = {other.literal(value)}"
    return columns, question, f"SELECT {function}({selected.name}) FROM {table} WHERE {where}"


def _compare(split: Split, random: Random, table: str) -> tuple[list[_Column], str, str]:
    columns = _columns(split, random, random.choice((2, 3)), kind="number")
    number, selected = columns[:2]
    value = number.value(split.words, random)
    sign = random.choice(tuple(split.compare))
    question = random.choice(split.compare[sign]).format(s=selected.spoken(random), c=number.spoken(random), v=value)
    return columns, question, f"SELECT {selected.name} FROM {table} WHERE {number.name} {sign} {value}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN_SPLIT = Split(
    words=TRAIN,
    columns={
        "person": _words(
            "winner driver author director coach captain artist owner singer mayor lead_actor written_by manager"
            " runner_up designer opponent head_teacher president player architect publisher founder actress"
            " candidate challenger champion conductor defender incumbent presenter photographer principal"
            " translator pilot guest rider second_place prime_minister"
        ),
        "city": _words(
            "city country location home_town capital region origin county birthplace municipality neighborhood"
            " settlement state township village nation hometown constituency territory place_of_birth continent"
        ),
        "place": _words(
            "stadium school museum railway_station bridge church river theatre hotel park college temple palace"
            " circuit hospital mountain castle arena"
        ),
        "title": _words(
            "title album song film original_title episode newspaper language genre brand category character club"
            " company competition conference instrument label mascot name network nickname occupation organization"
            " party position programme religion species sponsor team theme type translation"
        ),
        "code": _words(
            "model call_sign flight registration engine postcode route isbn unit abbreviation callsign frequency"
            " identifier license_plate locomotive number_plate serial_number symbol version gdp vin rpm dvd_region"
            " fips_code bbc_rank"
        ),
        "date": _words(
            "date release_date born original_air_date opened date_of_birth founded elected established finished"
            " inaugurated launched"
        ),
        "score": _words("score result final_score aggregate first_leg record outcome"),
        "number": _words(
            "year points population rank attendance goals height laps round capacity age area channel depth"
            " distance elevation games gold grid matches medals members pick silver speed starts time total votes"
            " week width"
        ),
    },
    unnamed=(
        *("Name the {s} for {v}", "What is the {s} of {v}?", "Name the {s} with {v}", "Tell me the {s} for {v}."),
        *("What {s} does {v} have?", "Which {s} belongs to {v}?", "What was the {s} for {v}?", "I want the {s} of {v}"),
        *("For {v}, what is the {s}?", "Show me the {s} for {v}", "Find the {s} of {v}.", "Which {s} is for {v}?"),
        *("What is {v}'s {s}?", "Give the {s} of {v}", "List the {s} for {v}", "{v} has which {s}?"),
    ),
    named=(
        *("What is the {s} when the {c} is {v}?", "Which {s} has a {c} of {v}?", "Name the {s} for {c} of {v}"),
        *("What is the {s} with {v} as the {c}?", "When the {c} is {v}, what is the {s}?", "What {s} has {v} as {c}?"),
        *(
            "Name the {s} where {c} is {v}",
            "When {v} is the {c} what is the {s}?",
            "What is under {s} when {c} is {v}?",
        ),
        *("When {c} was {v} what was the {s}?", "Tell me the {s} that has {c} {v}.", "With {c} {v}, what is the {s}?"),
        *("If {v} is the {c}, what is the {s}?", "Where the {c} is {v}, what {s} is there?", "{s} for {c} {v}?"),
        *("When {v} is under {c}, what is the {s}?", "What {s} is listed when {v} is the {c}?"),
    ),
    two_conditions=(
        "What is the {s} when the {c} is {v} and the {c2} is {v2}?",
        "Which {s} has a {c} of {v}, and a {c2} of {v2}?",
        "Name the {s} for {c} of {v} and {c2} of {v2}",
        "What {s} has {v} as the {c} and {v2} as the {c2}?",
        "When {c} is {v} and {c2} is {v2}, what is the {s}?",
    ),
    count=(
        "How many {s} have a {c} of {v}?",
        "How many {s} are there when the {c} is {v}?",
        "What is the number of {s} for {c} {v}?",
        "How many {s} were there with {v} as the {c}?",
    ),
    extreme={
        "MAX": ("What is the highest {s} when {c} is {v}?", "Name the most {s} for {c} of {v}", "Max {s} for {c} {v}?"),
        "MIN": ("What is the lowest {s} when {c} is {v}?", "Name the least {s} for {c} of {v}", "Min {s} for {c} {v}?"),
        "AVG": ("What is the average {s} when {c} is {v}?", "Name the average {s} for {c} of {v}"),
        "SUM": ("What is the total {s} when {c} is {v}?", "What is the sum of {s} for {c} of {v}?"),
    },
    compare={
        ">": ("Which {s} has a {c} larger than {v}?", "What is the {s} when the {c} is more than {v}?"),
        "<": ("Which {s} has a {c} smaller than {v}?", "What is the {s} when the {c} is less than {v}?"),
    },
)

HELD_OUT_SPLIT = Split(
    words=HELD_OUT,
    columns={
        "person": ("producer", "chairman", "goalkeeper", "composer", "senator", "sculptor", "nominee", "co_pilot"),
        "city": ("district", "destination", "venue", "headquarters", "province"),
        "place": ("harbor", "library", "ferry_terminal", "cathedral", "university", "lake"),
        "title": ("novel", "magazine", "award", "tournament", "series"),
        "code": ("chassis", "catalog_number", "product_code", "vessel"),
        "date": ("premiere", "completed", "birthday"),
        "score": ("tie_break", "half_time"),
        "number": ("wins", "enrollment", "weight", "seats", "stories", "season"),
    },
    unnamed=(
        *("Could you tell me which {s} {v} has?", "Look up the {s} of {v}", "State the {s} for {v}."),
        *("What would be the {s} for {v}?", "Identify the {s} of {v}"),
    ),
    named=(
        *("Given that {c} is {v}, what is the {s}?", "State the {s} whose {c} is {v}.", "Which {s} goes with {c} {v}?"),
        *("When {v} was the {c} what is under {s}?", "Can you find the {s} having {v} for {c}?"),
    ),
    two_conditions=(
        "Given that {c} is {v} and {c2} is {v2}, what is the {s}?",
        "State the {s} whose {c} is {v} and whose {c2} is {v2}.",
    ),
    count=("Tell me how many {s} had {v} for {c}.", "Given that {c} is {v}, how many {s} are there?"),
    extreme={
        "MAX": ("Given that {c} is {v}, what is the highest {s}?", "State the highest {s} whose {c} is {v}."),
        "MIN": ("Given that {c} is {v}, what is the lowest {s}?", "State the lowest {s} whose {c} is {v}."),
        "AVG": ("Given that {c} is {v}, what is the average {s}?",),
        "SUM": ("Given that {c} is {v}, what is the sum of {s}?",),
    },
    compare={
        ">": ("State the {s} whose {c} is more than {v}.", "Given a {c} larger than {v}, what is the {s}?"),
        "<": ("State the {s} whose {c} is less than {v}.", "Given a {c} smaller than {v}, what is the {s}?"),
    },
)


TASK = Task(
    name="sql",
    train_examples=partial(make_examples, TRAIN_SPLIT),
    held_out_examples={"held-out": partial(make_examples, HELD_OUT_SPLIT)},
    rank=8,
    lora_alpha=16,
    target_modules=("q_proj", "v_proj"),
    layers=None,
    steps=400,
    batch_size=4,
    learning_rate=2e-3,
    longest_completion=64,
)
