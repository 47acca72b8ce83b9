"""Function-calling examples: a request and the schemas of some tools in, one JSON call out.

Owns: the prompt form, and how a tool, its schema, a request for it and the right call belong together.
Does not know: models, training, or which tools there are (see tool_catalog).

Two held-out splits: tools that training saw, asked for in phrasings and with names and titles that it never saw; and
tools that it never saw, of which the argument names are new too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from functools import partial
from random import Random

from task import Example, Task
from tool_catalog import HELD_OUT_TOOLS, TRAIN_TOOLS, Parameter, Tool
from word_pools import HELD_OUT, TRAIN, WordPool

PROMPT = "<user>{request}</user>\n\n<tools>{tools}</tools>\n\n"


class Phrasings(Enum):
    """Which of a tool's requests are used: training sees all but the last one."""

    TRAIN = slice(None, -1)
    HELD_OUT = slice(-1, None)
    ALL = slice(None)


def make_examples(tools: Sequence[Tool], phrasings: Phrasings, words: WordPool, count: int, seed: int) -> list[Example]:
    """Return `count` different examples with these tools, the same ones for the same seed."""
    random = Random(seed)
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = _example(tools, phrasings, words, random)
        examples[example.prompt] = example
    return list(examples.values())


def _example(tools: Sequence[Tool], phrasings: Phrasings, words: WordPool, random: Random) -> Example:
    offered = random.sample(tools, random.choice((1, 2, 2, 3)))
    chosen = offered[0]
    names = {tool.names: random.choice(tool.names) for tool in offered}
    spoken = {parameter: random.choice(parameter.names) for tool in offered for parameter in tool.parameters}
    values = [_value(parameter, words, random) for parameter in chosen.parameters]
    phrase = random.choice(chosen.requests[phrasings.value])
    request = phrase.format(*values)
    if random.random() < 0.2:
        request = request.lower()
        # A choice keeps the spelling of its schema, whatever the request writes.
        values = [
            value.lower() if isinstance(value, str) and not parameter.choices else value
            for parameter, value in zip(chosen.parameters, values, strict=True)
        ]
    arguments = {
        spoken[parameter]: value
        for position, (parameter, value) in enumerate(zip(chosen.parameters, values, strict=True))
        if f"{{{position}}}" in phrase
    }
    random.shuffle(offered)
    schemas = [_schema(tool, names[tool.names], spoken) for tool in offered]
    call = json.dumps({"name": names[chosen.names], "arguments": arguments}, ensure_ascii=False)
    return Example(PROMPT.format(request=request, tools=json.dumps(schemas)), call)


def _schema(tool: Tool, name: str, spoken: dict[Parameter, str]) -> dict[str, object]:
    required = [
        spoken[parameter]
        for position, parameter in enumerate(tool.parameters)
        if all(f"{{{position}}}" in phrase for phrase in tool.requests)
    ]
    properties = {spoken[parameter]: _type(parameter) for parameter in tool.parameters}
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": tool.description, "parameters": parameters}


def _type(parameter: Parameter) -> dict[str, object]:
    if parameter.choices:
        return {"type": "string", "enum": list(parameter.choices)}
    return {"type": "integer" if parameter.kind == "number" else "string"}


def _value(parameter: Parameter, words: WordPool, random: Random) -> str | int:
    if parameter.choices:
        return random.choice(parameter.choices)
    if parameter.kind == "number":
        return random.choice((random.randint(2, 30), random.randint(2, 30), random.randint(31, 5000)))
    value = str(getattr(words, parameter.kind)(random))
    return value if parameter.kind in ("code", "date") else value.title()


TASK = Task(
    name="tools",
    train_examples=partial(make_examples, TRAIN_TOOLS, Phrasings.TRAIN, TRAIN),
    held_out_examples={
        "known tools": partial(make_examples, TRAIN_TOOLS, Phrasings.HELD_OUT, HELD_OUT),
        "new tools": partial(make_examples, HELD_OUT_TOOLS, Phrasings.ALL, HELD_OUT),
    },
    rank=16,
    lora_alpha=32,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    # 9 of 30 layers: all of them at this rank would be 9.8 MB in bf16.
    layers=tuple(range(5, 30, 3)),
    steps=240,
    batch_size=4,
    learning_rate=2e-3,
    longest_completion=80,
)
