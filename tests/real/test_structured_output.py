"""Structured output of the real SmolLM2 in int8: every text parses and validates, whoever else is in the batch."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.core.request import FinishReason, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.model import LoadedModel, load_model

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "sad", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"type": "string", "maxLength": 8},
                "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            },
            "required": ["label", "children"],
            "additionalProperties": False,
        },
        "leaf": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "boolean"}]},
    },
    "$ref": "#/$defs/node",
}
DATED = {
    "type": "object",
    "properties": {
        "when": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    },
    "required": ["when", "code"],
    "additionalProperties": False,
}
SCHEMAS = {"person": PERSON, "tree": TREE, "dated": DATED}

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 11},
    "wild": {"temperature": 2.0, "seed": 5, "top_p": 0.95},
    "penalised": {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_k": 40},
}


class Writer:
    """Runs requests together and collects their texts."""

    def __init__(self, model: LoadedModel, outputs: queue.SimpleQueue[Sequence[SequenceOutput]]) -> None:
        self.model, self._outputs = model, outputs

    def request(self, name: str, prompt: str, spec: ConstraintSpec | None, **sampling: Any) -> GenerationRequest:
        constraint = self.model.constraints.compile(spec, param="field") if spec else None
        params = SamplingParams(**{"max_tokens": 256, **sampling})
        return GenerationRequest(name, tuple(self.model.tokenizer.encode(prompt)), params, constraint=constraint)

    def write(self, *requests: GenerationRequest) -> dict[tuple[str, int], tuple[str, FinishReason]]:
        """Return text and end of every sequence."""
        for request in requests:
            self.model.engine.submit(request)
        texts = {(request.request_id, i): "" for request in requests for i in range(request.sampling.n)}
        ends: dict[tuple[str, int], FinishReason] = {}
        while len(ends) < len(texts):
            for output in self._outputs.get(timeout=60):
                assert output.error is None
                key = (output.request_id, output.index)
                texts[key] += output.text
                if output.finish_reason:
                    ends[key] = output.finish_reason
        return {key: (texts[key], ends[key]) for key in texts}


@pytest.fixture(scope="module")
def writer(int8_base: Path) -> Iterator[Writer]:
    outputs: queue.SimpleQueue[Sequence[SequenceOutput]] = queue.SimpleQueue()
    model = load_model(int8_base, deliver=outputs.put)
    yield Writer(model, outputs)
    model.engine.stop()


def schema(value: Any) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(value))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_texts_validate_beside_plain_ones(writer: Writer, sampling: str) -> None:
    plain = writer.request("plain", "Once upon a time", None, temperature=0.0, max_tokens=40)
    ((alone, _),) = writer.write(plain).values()
    asked = [
        writer.request(name, f"Describe a {name} as JSON:\n", schema(value), n=3, **SAMPLINGS[sampling])
        for name, value in SCHEMAS.items()
    ]
    written = writer.write(plain, *asked)
    assert written.pop(("plain", 0))[0] == alone
    for (name, index), (text, end) in written.items():
        assert end is FinishReason.STOP, (name, index, text)
        jsonschema.validate(json.loads(text), SCHEMAS[name])


OTHER_KINDS = [
    (
        ConstraintSpec(ConstraintKind.REGEX, r"[a-z]{2,10}@[a-z]{2,10}\.(com|org)"),
        r"[a-z]{2,10}@[a-z]{2,10}\.(com|org)",
    ),
    (ConstraintSpec(ConstraintKind.CHOICE, ("Paris", "London", "日本")), "Paris|London|日本"),
    (
        ConstraintSpec(ConstraintKind.GRAMMAR, 'root ::= num ("+" num){1,3}\nnum ::= [0-9]{1,3}'),
        r"\d{1,3}(\+\d{1,3}){1,3}",
    ),
]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(("spec", "pattern"), OTHER_KINDS)
def test_other_kinds_match(writer: Writer, spec: ConstraintSpec, pattern: str, temperature: float) -> None:
    asked = writer.request("r", "The answer is ", spec, n=4, temperature=temperature, seed=1)
    for text, end in writer.write(asked).values():
        assert re.fullmatch(pattern, text), text
        assert end is FinishReason.STOP


def test_any_json_object_parses_unless_it_is_cut(writer: Writer) -> None:
    spec = ConstraintSpec(ConstraintKind.JSON_OBJECT)
    asked = [
        writer.request(str(i), f"Number {i} as a JSON object:\n", spec, temperature=1.0, seed=i, max_tokens=48)
        for i in range(8)
    ]
    ends = set()
    for text, end in writer.write(*asked).values():
        ends.add(end)
        if end is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)
        else:
            assert text.startswith("{")
    assert FinishReason.STOP in ends
