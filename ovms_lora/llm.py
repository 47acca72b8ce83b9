"""LLM: a model in this process, asked from Python with vLLM's names, defaults and errors.

    prompts, sampling, adapters ──check all──► Asks ──Batch──► engine ──► RequestOutputs, in the order of the prompts

Everything that is wrong with a call is found before any of it runs.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from pydantic import ValidationError

from ovms_lora.core.config import LoraOptions
from ovms_lora.core.errors import ArgumentError, ConfigError, InvalidFieldError, UnavailableError
from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import SpeculationOptions, parse_speculative_config
from ovms_lora.engine.lora_config import LoraConfig
from ovms_lora.engine.model import GenerationDefaults, LoadedModel, load_model
from ovms_lora.offline.adapters import RequestedAdapters
from ovms_lora.offline.batch import Ask, Batch, OutputRouter
from ovms_lora.offline.lora_request import LoRARequest
from ovms_lora.offline.outputs import CompletionOutput, Logprob, RequestOutput
from ovms_lora.offline.progress import Progress, ShowProgress
from ovms_lora.offline.prompts import Message, Prompt, PromptType, read_conversations, read_prompts

__all__ = ["LLM", "CompletionOutput", "LoRARequest", "Logprob", "RequestOutput", "SamplingParams"]

T = TypeVar("T")

# One value for all prompts, or one for each of them.
SamplingChoice = SamplingParams | Sequence[SamplingParams] | None
LoRAChoice = LoRARequest | Sequence[LoRARequest | None] | None


class LLM:
    """A loaded model that generates text; safe to call from several threads.

    It ends with `close`, with the `with` block that it opened, or when nothing refers to it any more.
    """

    def __init__(  # noqa: PLR0913  # one flat list of settings, as in vLLM
        self,
        model: str | os.PathLike[str],
        *,
        enable_lora: bool = False,
        max_loras: int = 8,
        max_lora_rank: int = 64,
        max_cpu_loras: int = 64,
        total_rank: int | Literal["auto"] = "auto",
        lora_dtype: Literal["auto", "f32", "bf16"] = "auto",
        enable_prefix_caching: bool | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        cache_size: int | None = None,
        plugin_config: Mapping[str, Any] | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """Load a model folder; takes seconds.

        With `enable_lora` prompts may ask for adapters: at most `max_loras` of them, of rank `max_lora_rank` or less,
        stand in the graph at a time, and `max_cpu_loras` in memory. What is None is as the folder's graph.pbtxt says;
        `plugin_config` (OpenVINO properties) is laid over what it says. `cache_size` is the KV cache in GB, 0 sizes it
        from free memory. `speculative_config` lets it guess ahead, as vLLM's of the methods `ngram` and `draft_model`:
        it changes the speed and no answer. Raises ArgumentError, a ValueError, or ModelFolderError when the folder
        cannot be served.
        """
        overrides = {
            "enable_prefix_caching": enable_prefix_caching,
            "max_num_seqs": _at_least(1, "max_num_seqs", max_num_seqs),
            "max_num_batched_tokens": _at_least(1, "max_num_batched_tokens", max_num_batched_tokens),
            "cache_size": _at_least(0, "cache_size", cache_size),
            "speculation": None if speculative_config is None else _speculation(speculative_config),
        }
        lora = _lora_config(
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            max_cpu_loras=max_cpu_loras,
            total_rank=total_rank,
            lora_dtype=lora_dtype,
        )
        self._router = OutputRouter()
        loaded = load_model(
            Path(model).expanduser(),
            deliver=self._router,
            device=device,
            plugin_config=plugin_config,
            overrides={name: value for name, value in overrides.items() if value is not None},
            lora=lora if enable_lora else None,
        )
        self._model: LoadedModel | None = loaded
        self._adapters = RequestedAdapters(loaded.lora) if loaded.lora else None
        self._numbers = itertools.count()
        # The engine's thread knows the router but not this object, so that it does not keep it alive.
        self._stop = weakref.finalize(self, loaded.engine.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and free the model; calls that are running end with UnavailableError."""
        self._stop()
        self._model = self._adapters = None

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what is sampled with unless a call says otherwise: the model's generation_config.json."""
        return _default_sampling(self._loaded.generation_defaults)

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingChoice = None,
        use_tqdm: ShowProgress = True,
        lora_request: LoRAChoice = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or several; return the answers in the order of the prompts.

        A prompt is a text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": token ids}`. Sampling and
        adapter are one for all, or a list with one for each prompt. Raises ArgumentError, a ValueError, before anything
        runs; EngineError when the engine fails; UnavailableError after `close`.
        """
        return self._run(read_prompts(prompts, self._loaded.tokenizer), sampling_params, lora_request, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingChoice = None,
        use_tqdm: ShowProgress = True,
        lora_request: LoRAChoice = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered by the model's chat template; else as `generate`."""
        model = self._loaded
        variables = {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        prompts = read_conversations(messages, model.tokenizer, model.chat_template, tools=tools, variables=variables)
        return self._run(prompts, sampling_params, lora_request, use_tqdm)

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise UnavailableError("this LLM is closed")
        return self._model

    def _run(
        self, prompts: list[Prompt], sampling: SamplingChoice, lora: LoRAChoice, show: ShowProgress
    ) -> list[RequestOutput]:
        model, count = self._loaded, len(prompts)
        default = _default_sampling(model.generation_defaults) if sampling is None else sampling
        each_sampling = _for_each(default, SamplingParams, count, "params")
        each_lora = _for_each(lora, (LoRARequest, type(None)), count, "lora_request")
        parts = zip(prompts, each_sampling, each_lora, strict=True)
        asks = [self._ask(model, index, *each) for index, each in enumerate(parts)]
        self._load(each_lora)
        answers: dict[str, RequestOutput] = {}
        token_text = model.tokenizer.token_text
        with (
            Progress(show, count) as progress,
            Batch(model.engine, self._router, asks, uses=self._uses, token_text=token_text) as batch,
        ):
            for answer in batch:
                answers[answer.request_id] = answer
                progress.add(answer)
        return [answers[ask.request.request_id] for ask in asks]

    def _ask(
        self, model: LoadedModel, index: int, prompt: Prompt, sampling: SamplingParams, lora: LoRARequest | None
    ) -> Ask:
        if sampling.max_tokens is not None and sampling.max_tokens > model.engine.max_model_len - len(prompt.token_ids):
            sampling = replace(sampling, max_tokens=None)  # the model's length ends it, as in vLLM
        request = GenerationRequest(str(next(self._numbers)), prompt.token_ids, sampling)
        try:
            model.engine.check(request)
        except InvalidFieldError as error:
            raise ArgumentError(f"prompt {index}: {error.message}") from error
        return Ask(request, prompt.text, lora)

    def _load(self, requests: Sequence[LoRARequest | None]) -> None:
        adapters = self._adapters  # close() takes them away, in whatever thread
        for request in dict.fromkeys(requests):
            if request is not None:
                if adapters is None:
                    raise ArgumentError(
                        f"Got lora_request {request} but LoRA is not enabled!", hint="LLM(…, enable_lora=True)"
                    )
                adapters.load(request)

    def _uses(self, request: LoRARequest) -> tuple[AdapterUse, ...]:
        adapters = self._adapters
        if adapters is None:
            raise UnavailableError("this LLM is closed")
        return adapters.uses(request)


def _for_each(value: Any, kind: type[T] | tuple[type[T], ...], count: int, name: str) -> list[T]:
    """Return one value per prompt. Raises ArgumentError for another number of them, or for another type."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ArgumentError(f"{name} cannot be of type {type(value).__name__}")
    if len(value) != count:
        raise ArgumentError(f"The lengths of prompts and {name} must be the same.")
    for index, item in enumerate(value):
        if not isinstance(item, kind):
            raise ArgumentError(f"{name}[{index}] cannot be of type {type(item).__name__}")
    return list(value)


def _default_sampling(model: GenerationDefaults) -> SamplingParams:
    given = {
        "temperature": model.temperature,
        "top_p": model.top_p,
        "top_k": model.top_k,
        "min_p": model.min_p,
        "repetition_penalty": model.repetition_penalty,
        "max_tokens": model.max_new_tokens,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _lora_config(**options: Any) -> LoraConfig:
    try:
        return LoraConfig(LoraOptions(**options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArgumentError(f"{first['loc'][0]}: {first['msg']}") from error


def _speculation(config: Mapping[str, Any]) -> SpeculationOptions:
    try:
        return parse_speculative_config(config)
    except ConfigError as error:
        raise ArgumentError(f"speculative_config: {error.message}", hint=error.hint) from error


def _at_least(lowest: int, name: str, value: int | None) -> int | None:
    if value is not None and (type(value) is not int or value < lowest):
        raise ArgumentError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
    return value
