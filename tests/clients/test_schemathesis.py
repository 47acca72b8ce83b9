"""schemathesis against a running server: requests that fit the OpenAPI document, and ones that do not.

Whatever is sent, the answer is one that the document describes, by status, media type and body. What does not fit the
document is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.process import running
from tests.server.serving import write_adapters, write_lora_config

EXAMPLES = 300
# OVMS refuses what is not JSON with 412, and methods with 406.
CONFIG = SchemathesisConfig.from_dict(
    # A stream that is cut off at the time limit is no longer taken for one text.
    {
        "request-timeout": 60,
        "checks": {"negative_data_rejection": {"expected-statuses": [400, 404, 406, 412, 413, 415, 422, 429, 503]}},
    }
)
# Those about methods and headers are left out: what a method that is not described gets is OVMS's 406 on `/v3`.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder / "found", "later")
    path = write_lora_config(folder, lora_options={"dynamic_lora_loading_path": "found"})
    flags = ("--config_path", str(path), "--rest_port", "0", "--allow-runtime-lora-updating")
    with running(*flags, MODEL_LENGTH="64") as process:
        yield schemathesis.openapi.from_url(f"{process.url}/openapi.json", config=CONFIG)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_is_described(document: BaseSchema, mode: GenerationMode) -> None:
    operations = [found.ok() for found in document.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 20
    cases = st.sampled_from(operations).flatmap(lambda operation: operation.as_strategy(generation_mode=mode))

    @given(case=cases)
    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    def answered_as_described(case: Case[Any]) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # Otherwise nearly every request would end at a model that nobody knows.
            case.body["model"] = "mix" if "lora_alphas" in case.body else "base"
        case.call_and_validate(checks=CHECKS)

    answered_as_described()
