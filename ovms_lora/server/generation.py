"""The one handler behind completions and chat completions of both dialects.

    bytes ──► document ──► selection ──► checked fields ──► adapters ──► tokens ──► constraint ──► engine
    engine ──► whole answer, or events

What differs between dialects and endpoints comes in as a `Dialect` and an `Endpoint`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ovms_lora.core.constraint import TokenConstraint
from ovms_lora.core.request import AdapterUse, SequenceOutput
from ovms_lora.server.adapter_choice import AdapterChoice
from ovms_lora.server.async_engine import OutputStream
from ovms_lora.server.body import parse_object
from ovms_lora.server.call import Call, Choices
from ovms_lora.server.constraints import asked_constraint
from ovms_lora.server.dialects import Dialect, Endpoint
from ovms_lora.server.disconnect import ClientGoneError, unless_gone
from ovms_lora.server.fields import ModelLimits, Table, Values
from ovms_lora.server.large_json import dump_json
from ovms_lora.server.sampling import assistance, sampled_candidates, sampling_params, token_budget
from ovms_lora.server.shapes import Answer, ChoiceShape
from ovms_lora.server.sse import EventStream, event
from ovms_lora.server.state import ServerState, state_of
from ovms_lora.server.tenants import Tenant, tenant_of
from ovms_lora.server.tool_use import ToolUse

if TYPE_CHECKING:
    from ovms_lora.engine.model import LoadedModel
    from ovms_lora.server.metrics import CallMetrics
    from ovms_lora.server.registry import Selection, ServedModel

log = logging.getLogger(__name__)

_TOKEN_BYTES = 16


async def read_document(request: Request, dialect: Dialect) -> tuple[dict[str, Any], int]:
    """Return the JSON object of a request, and its size in bytes.

    Raises MalformedBodyError and the like, or ClientGoneError when the client leaves before it has sent everything.
    """
    dialect.check_content_type(request.headers.get("content-type", "application/json"))
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return await state_of(request).workers.run(len(body), parse_object, body), len(body)


async def generate(request: Request, dialect: Dialect, endpoint: Endpoint) -> Response:
    """Answer one request for text."""
    server = state_of(request)
    document, size = await read_document(request, dialect)
    tenant = tenant_of(request)
    selection = await server.select(dialect.model_name(document, server.registry), tenant)
    metrics = server.metrics.begin(dialect.name, selection.served.name, streamed=document.get("stream") is True)
    try:
        with selection.served.engine.preparing():
            # Before anything is worked out for it: refusing must cost less than serving.
            selection.served.model.engine.check_room(tenant.name, tenant.queue_share)
            values = await server.workers.run(
                size, _values, document, selection.served.limits(server.options.limits), endpoint
            )
            tenant.check_blend(selection.served.name, AdapterChoice.of(values).blended)
            uses = await server.uses(selection, AdapterChoice.of(values))
            asked = _Asked(values, document.get("model") or selection.served.name, uses, tenant)
            if endpoint.is_chat:
                call = await server.render(uses, _call, asked, selection.served, dialect, endpoint)
            else:
                call = await server.workers.run(size, _call, asked, selection.served, dialect, endpoint)
            constraint = await server.constraint(selection, call.constraint)
            metrics.use(call.adapters.names(selection), call.prompt_tokens)
            work = _Work(server, selection, call, uses, constraint, dialect, endpoint, metrics)
            stream = work.open()
        return await (work.streamed(request, stream) if call.stream else work.whole(request, stream))
    except BaseException as error:
        metrics.end(error)
        raise


@dataclass(frozen=True, slots=True)
class _Asked:
    """The checked fields of a request, the model as it names it, its adapters, and whose it is."""

    values: Values
    model: str
    uses: tuple[AdapterUse, ...]
    tenant: Tenant


def _values(document: Mapping[str, Any], limits: ModelLimits, endpoint: Endpoint) -> Values:
    """Return the checked fields. Raises InvalidFieldError."""
    values = endpoint.table.read(document, limits)
    tell_of_unknown(document, endpoint.table)
    return values


def _call(asked: _Asked, served: ServedModel, dialect: Dialect, endpoint: Endpoint) -> Call:
    """Return the request as this server works on it. Raises InvalidFieldError."""
    model, values = served.model, asked.values
    options = values.get("stream_options", {})
    prompts = endpoint.prompts(values, model, asked.uses)
    sampling = sampling_params(values, model.generation_defaults, dialect.defaults)
    call = Call(
        id=f"{endpoint.id_prefix}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=asked.model,
        prompts=prompts,
        sampling=sampling,
        candidates=sampled_candidates(values, dialect.defaults),
        budget=token_budget(values, model.generation_defaults, model.options.max_tokens_limit, endpoint.max_tokens),
        stream=values.get("stream", False),
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
        echo=values.get("echo", False),
        wants_prompt_logprobs="prompt_logprobs" in values,
        cache_salt=values.get("cache_salt", ""),
        tenant=asked.tenant,
        adapters=AdapterChoice.of(values),
        constraint=asked_constraint(values),
        assistance=assistance(values),
    )
    return _with_tools(call, ToolUse.of(values), model) if endpoint.is_chat else call


def _with_tools(call: Call, tools: ToolUse, model: LoadedModel) -> Call:
    """Add how a chat's answer is forced to be and read."""
    sampling = call.sampling
    if tools.needs_special_tokens(model):
        sampling = replace(sampling, skip_special_tokens=False)
    constraint = tools.constraint() or call.constraint
    grammar = tools.grammar(model, call.prompts[0].text, constrained=constraint is not None)
    return replace(call, sampling=sampling, constraint=constraint, grammar=grammar)


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
    constraint: TokenConstraint | None
    dialect: Dialect
    endpoint: Endpoint
    metrics: CallMetrics

    def open(self) -> OutputStream:
        """Submit the call to its engine. Raises what `AsyncEngine.open` does."""
        served = self.selection.served
        deadline = time.monotonic() + self.server.options.limits.request_seconds
        requests = self.call.requests(served.model.engine.max_model_len, self.uses, deadline, self.constraint)
        return served.engine.open(requests)

    async def whole(self, request: Request, stream: OutputStream) -> Response:
        """Wait for all of the answer."""
        try:
            choices = Choices(self.call)
            await unless_gone(request.receive, stream.overrun, self._collect(stream, choices))
        finally:
            stream.close()
        self.metrics.end()
        usage = choices.usage()
        answer = self._answer(self._shape())
        content = await self.server.workers.run(
            self._bytes_of(usage.completion_tokens) + self._echoed_bytes,
            lambda: dump_json(answer.whole(choices.best(), usage)),
        )
        return Response(content, media_type="application/json")

    async def streamed(self, request: Request, stream: OutputStream) -> Response:
        """Wait for the first output, so that an error before it keeps its status; then send events."""
        with ExitStack() as undo:
            undo.callback(stream.close)
            await unless_gone(request.receive, stream.overrun, stream.ready())
            undo.pop_all()
        events, errors = self._events(stream), self.dialect.errors
        return EventStream(events, stream, error_body=errors.body, on_end=self.metrics.end)

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
        written += shape.deltas(choice, output)
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
        return self.endpoint.shape(self.call, self.dialect.style, self.selection.served.model.tokenizer)

    def _answer(self, shape: ChoiceShape) -> Answer:
        return Answer(self.call, shape, self.dialect.style)
