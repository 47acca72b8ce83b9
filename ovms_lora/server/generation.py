"""The one handler behind completions and chat completions of both dialects.

    bytes ──► document ──► selection ──► checked fields ──► tokens ──► adapters ──► engine ──► whole answer, or events

What differs between dialects and endpoints comes in as a `Dialect` and an `Endpoint`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from ovms_lora.core.request import AdapterUse, SequenceOutput
from ovms_lora.server.adapter_choice import AdapterChoice
from ovms_lora.server.async_engine import OutputStream
from ovms_lora.server.body import parse_object
from ovms_lora.server.call import Call, Choices
from ovms_lora.server.dialects import Dialect, Endpoint
from ovms_lora.server.disconnect import unless_gone
from ovms_lora.server.fields import Table
from ovms_lora.server.large_json import dump_json
from ovms_lora.server.sampling import sampling_params, token_budget
from ovms_lora.server.shapes import Answer, ChoiceShape
from ovms_lora.server.sse import EventStream, event
from ovms_lora.server.state import ServerState, state_of

if TYPE_CHECKING:
    from ovms_lora.server.metrics import CallMetrics
    from ovms_lora.server.registry import Selection, ServedModel

log = logging.getLogger(__name__)

_TOKEN_BYTES = 16


async def read_document(request: Request, dialect: Dialect) -> tuple[dict[str, Any], int]:
    """Return the JSON object of a request, and its size in bytes. Raises MalformedBodyError and the like."""
    dialect.check_content_type(request.headers.get("content-type", "application/json"))
    body = await request.body()
    return await state_of(request).workers.run(len(body), parse_object, body), len(body)


async def generate(request: Request, dialect: Dialect, endpoint: Endpoint) -> Response:
    """Answer one request for text."""
    server = state_of(request)
    document, size = await read_document(request, dialect)
    selection = await server.select(dialect.model_name(document, server.registry))
    metrics = server.metrics.begin(dialect.name, selection.served.name, streamed=document.get("stream") is True)
    try:
        call = await server.workers.run(size, _call, document, selection.served, dialect, endpoint)
        uses = await server.uses(selection, call.adapters)
        metrics.use(call.adapters.names(selection), call.prompt_tokens)
        work = _Work(server, selection, call, uses, dialect, endpoint, metrics)
        return await (work.streamed(request) if call.stream else work.whole(request))
    except BaseException as error:
        metrics.end(error)
        raise


def _call(document: Mapping[str, Any], served: ServedModel, dialect: Dialect, endpoint: Endpoint) -> Call:
    """Return the request as this server works on it. Raises InvalidFieldError."""
    model = served.model
    values = endpoint.table.read(document, served.limits)
    tell_of_unknown(document, endpoint.table)
    options = values.get("stream_options", {})
    return Call(
        id=f"{endpoint.id_prefix}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=document.get("model") or served.name,
        prompts=endpoint.prompts(values, model),
        sampling=sampling_params(values, model.generation_defaults, dialect.defaults),
        budget=token_budget(values, model.generation_defaults, model.options.max_tokens_limit, endpoint.max_tokens),
        stream=values.get("stream", False),
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
        echo=values.get("echo", False),
        wants_prompt_logprobs="prompt_logprobs" in values,
        cache_salt=values.get("cache_salt", ""),
        adapters=AdapterChoice.of(values),
    )


def tell_of_unknown(document: Mapping[str, Any], table: Table) -> None:
    """Log the names of fields that the table does not know and that are ignored."""
    unknown = [name for name in document if name not in table.names and name != "model"]
    if unknown:
        log.info("ignored unknown request fields: %s", ", ".join(ascii(name)[:64] for name in unknown[:16]))


@dataclass(frozen=True, slots=True)
class _Work:
    """One call on its way through the engine."""

    server: ServerState
    selection: Selection
    call: Call
    uses: tuple[AdapterUse, ...]
    dialect: Dialect
    endpoint: Endpoint
    metrics: CallMetrics

    async def whole(self, request: Request) -> Response:
        """Wait for all of the answer."""
        stream, choices = self._open(), Choices(self.call)
        try:
            await unless_gone(request.receive, stream.overrun, self._collect(stream, choices))
        finally:
            stream.close()
        self.metrics.end()
        usage = choices.usage()
        answer = self._answer(self._shape())
        content = await self.server.workers.run(
            self._bytes_of(usage.completion_tokens) + self._echoed_bytes,
            lambda: dump_json(answer.whole(choices.all, usage)),
        )
        return Response(content, media_type="application/json")

    async def streamed(self, request: Request) -> Response:
        """Wait for the first output, so that an error before it keeps its status; then send events."""
        stream = self._open()
        try:
            await unless_gone(request.receive, stream.overrun, stream.ready())
        except BaseException:
            stream.close()
            raise
        events, errors = self._events(stream), self.dialect.errors
        return EventStream(events, stream, error_body=errors.body, on_end=self.metrics.end)

    def _open(self) -> OutputStream:
        served = self.selection.served
        deadline = time.monotonic() + self.server.options.limits.request_seconds
        requests = self.call.requests(served.model.engine.max_model_len, self.uses, deadline)
        return served.engine.open(requests)

    async def _collect(self, stream: OutputStream, choices: Choices) -> None:
        async for outputs in stream:
            self.metrics.tokens(outputs)
            for output in outputs:
                choices.of(output).add(output)

    async def _events(self, stream: OutputStream) -> AsyncGenerator[bytes]:
        choices, shape = Choices(self.call), self._shape()
        answer = self._answer(shape)
        async for outputs in stream:
            self.metrics.tokens(outputs)
            chunks = []
            for output in outputs:
                size = 0 if choices.of(output).started else self._echoed_bytes
                chunks += await self.server.workers.run(size, self._chunks, output, choices, shape, answer)
            if chunks:
                yield b"".join(chunks)
        if self.call.include_usage:
            yield event(answer.last_chunk(choices.usage()))

    def _chunks(self, output: SequenceOutput, choices: Choices, shape: ChoiceShape, answer: Answer) -> list[bytes]:
        """Return the events for one output: none while its text is held back."""
        choice = choices.of(output)
        choice.add(output)
        usage = choices.usage() if self.call.continuous_usage else None
        written = []
        if not choice.started:
            choice.started = True
            opening = shape.first_delta(choice)
            written += [opening] if opening else []
        if output.text or output.finished or output.logprobs:
            written.append(shape.delta(choice, output))
        return [event(answer.chunk(delta, usage)) for delta in written]

    @property
    def _echoed_bytes(self) -> int:
        """About how much of an answer repeats the prompts."""
        call = self.call
        repeats = call.sampling.n if call.echo or call.wants_prompt_logprobs else 0
        return repeats * self._bytes_of(call.prompt_tokens)

    def _bytes_of(self, tokens: int) -> int:
        """About how much some tokens make in an answer, with their alternatives."""
        sampling = self.call.sampling
        alternatives = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        return tokens * (1 + alternatives) * _TOKEN_BYTES

    def _shape(self) -> ChoiceShape:
        token_text = self.selection.served.model.tokenizer.token_text
        return self.endpoint.shape(self.call, self.dialect.style, token_text)

    def _answer(self, shape: ChoiceShape) -> Answer:
        return Answer(self.call, shape, self.dialect.style)
