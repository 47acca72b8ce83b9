"""The examples of the two adapters are reproducible, well-formed, and held-out ones share nothing with training."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DOCS_WORDS = ("lilongwe", "icao", "airport", "elector", "nationality", "anchero", "pantaleone", "international")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    # The examples are scripts beside each other, so they are imported as a script would import them.
    from importlib import import_module

    sys.path.insert(0, str(EXAMPLES))
    yield {name: import_module(name) for name in ("sql_task", "tools_task", "word_pools", "tool_catalog")}
    sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("name", ["sql_task", "tools_task"])
def test_the_same_seed_gives_the_same_examples(modules: dict[str, ModuleType], name: str) -> None:
    task = modules[name].TASK
    assert task.train_examples(50, 3) == task.train_examples(50, 3)
    assert task.train_examples(50, 3) != task.train_examples(50, 4)
    for held_out_examples in task.held_out_examples.values():
        assert len({example.prompt for example in held_out_examples(200, 1)}) == 200


def test_the_two_pools_share_no_word(modules: dict[str, ModuleType]) -> None:
    train, held_out = modules["word_pools"].TRAIN, modules["word_pools"].HELD_OUT
    for field in ("first_names", "surnames", "cities", "adjectives", "nouns", "months", "onsets", "code_letters"):
        assert not set(getattr(train, field)) & set(getattr(held_out, field)), field


def test_sql_splits_share_neither_columns_nor_phrasings(modules: dict[str, ModuleType]) -> None:
    train, held_out = modules["sql_task"].TRAIN_SPLIT, modules["sql_task"].HELD_OUT_SPLIT
    assert not _columns(train) & _columns(held_out)
    assert not _phrases(train) & _phrases(held_out)


def test_sql_training_never_saw_the_words_of_the_documented_prompts(modules: dict[str, ModuleType]) -> None:
    task = modules["sql_task"].TASK
    examples = task.train_examples(task.steps * task.batch_size, 0) + task.held_out_examples["held-out"](500, 1)
    text = " ".join(example.prompt + example.completion for example in examples).lower()
    assert not [word for word in DOCS_WORDS if word in text]


def test_sql_answers_use_only_the_schema_and_the_question(modules: dict[str, ModuleType]) -> None:
    for example in modules["sql_task"].TASK.train_examples(300, 5):
        table, selected, where = re.fullmatch(
            r" SELECT (?:(?:COUNT|MIN|MAX|AVG|SUM)\()?(\w+)\)? FROM (\w+) WHERE (.+)", example.completion
        ).group(2, 1, 3)  # type: ignore[union-attr]
        assert f"CREATE TABLE {table} (" in example.prompt
        assert re.search(rf"[(, ]{selected} (?:VARCHAR|INTEGER)", example.prompt)
        question = example.prompt.split("question: ")[1]
        for condition in where.split(" AND "):
            column, value = re.fullmatch(r"(\w+) [=<>] '?(.*?)'?", condition).groups()  # type: ignore[union-attr]
            assert re.search(rf"[(, ]{column} (?:VARCHAR|INTEGER)", example.prompt)
            assert value in question


def test_tool_splits_share_neither_tools_nor_arguments_nor_phrasings(modules: dict[str, ModuleType]) -> None:
    train, held_out = modules["tool_catalog"].TRAIN_TOOLS, modules["tool_catalog"].HELD_OUT_TOOLS
    for names in (_tool_names, _argument_names, _requests):
        assert not names(train) & names(held_out)


def test_tool_calls_fit_one_of_the_schemas(modules: dict[str, ModuleType]) -> None:
    for example in modules["tools_task"].TASK.train_examples(300, 5):
        tools = json.loads(example.prompt.split("<tools>")[1].removesuffix("</tools>\n\n"))
        call = json.loads(example.completion)
        schema = next(tool for tool in tools if tool["name"] == call["name"])["parameters"]
        assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
        for name, value in call["arguments"].items():
            kind = schema["properties"][name]
            assert isinstance(value, int if kind["type"] == "integer" else str)
            assert value in kind.get("enum", [value])


def test_every_tool_keeps_a_request_for_evaluation_that_names_what_is_required(modules: dict[str, ModuleType]) -> None:
    for tool in modules["tool_catalog"].TRAIN_TOOLS:
        assert len(tool.requests) >= 4
        assert tool.requests[-1] not in tool.requests[:-1]


def _columns(split: Any) -> set[str]:
    return {name for names in split.columns.values() for name in names}


def _phrases(split: Any) -> set[str]:
    lists = [split.unnamed, split.named, split.two_conditions, split.count]
    return {phrase for phrases in [*lists, *split.extreme.values(), *split.compare.values()] for phrase in phrases}


def _tool_names(tools: Any) -> set[str]:
    return {name for tool in tools for name in tool.names}


def _argument_names(tools: Any) -> set[str]:
    return {name for tool in tools for parameter in tool.parameters for name in parameter.names}


def _requests(tools: Any) -> set[str]:
    return {phrase for tool in tools for phrase in tool.requests}
