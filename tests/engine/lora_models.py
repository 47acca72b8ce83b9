"""Tiny random models of several families, exported once, with PEFT's adapters for them; and an engine to ask.

PyTorch with PEFT says what every number should be.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from ovms_lora.core.config import EngineOptions, LoraOptions
from ovms_lora.core.graph_pbtxt import render_graph
from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine import runner
from ovms_lora.engine.lora_config import AdapterSpec, LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.model import LoadedModel, load_model
from tests.engine.harness import Answer, Answers
from tests.tiny_llama import build_tiny_llama

PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
VOCABULARY = 280
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
# family: class of transformers, what differs from _SIZES
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
}
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: in PyTorch, and exported in fp32 to `folder`."""

    name: str
    torch: Any
    folder: Path

    def adapter(
        self, folder: Path, *, seed: int = 1, strength: float = 1.0, dtype: str = "float32", **settings: Any
    ) -> Path:
        """Let PEFT save an adapter whose A and B are both random; `strength` 0 leaves B zero."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings})
            made = get_peft_model(copy.deepcopy(self.torch), config, autocast_adapter_dtype=False)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in made.named_parameters():
                    if "lora_" in name:
                        # An output of A has the size of its input, one of B about that of the layer, whatever the rank.
                        size = parameter.shape[1] ** -0.5 * (strength if "lora_B" in name else 1)
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
                        parameter.data = parameter.data.to(getattr(torch, dtype))
            made.save_pretrained(str(folder))
        return folder

    def with_peft(self, *parts: tuple[Path, float]) -> Any:
        """The base with adapters, all active and unmerged, each with its strength on top of PEFT's own scaling."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import PeftModel
            from peft.tuners.lora import LoraLayer

            model = copy.deepcopy(self.torch)
            if not parts:
                return model
            model = PeftModel.from_pretrained(model, str(parts[0][0]), adapter_name="0")
            for number, (folder, _) in enumerate(parts[1:], start=1):
                model.load_adapter(str(folder), adapter_name=str(number))
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    for name in module.scaling:
                        module.scaling[name] *= parts[int(name)][1]
            model.base_model.set_adapter([str(number) for number in range(len(parts))])
        return model

    def merged(self, folder: Path, adapter: Path) -> Path:
        """Merge an adapter with PEFT and export the result to `folder`."""
        model = self.with_peft((adapter, 1.0)).merge_and_unload()
        _export(model, folder)
        shutil.copyfile(self.folder / "tokenizer.json", folder / "tokenizer.json")
        return folder


class Bases:
    """Makes each base when it is first wanted."""

    def __init__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(1)  # so small are these models
        self._folder = folder
        self.get: Callable[[str], Base] = functools.cache(self._make)

    def _make(self, name: str) -> Base:
        folder = self._folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = self._llama()
            model = _family(name) if name in FAMILIES else _loaded(source)
            _export(model, folder)
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        return Base(name, model, folder)

    def _llama(self) -> Path:
        """The folder of the tiny llama with two layers, whose tokenizer serves all."""
        source = self._folder / "source"
        if not source.exists():
            build_tiny_llama(source)
        return source


def _loaded(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source).eval()


def _family(name: str) -> Any:
    import torch
    import transformers

    kind, differences = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **differences)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):  # else they are zero
                    parameter.normal_()
    return model


def _export(model: Any, folder: Path) -> None:
    with warnings.catch_warnings(), ExitStack() as patches:
        for config in _gemmas():
            patches.enter_context(mock.patch.object(config, "MAX_TRANSFORMERS_VERSION", "999"))
        warnings.simplefilter("ignore")
        from ovms_lora.export.convert import write_ir
        from ovms_lora.export.weight_format import WeightFormat

        folder.mkdir(parents=True)
        gc.freeze()  # the exporter collects garbage twice, which takes as long as all else when so much is imported
        write_ir(copy.deepcopy(model), folder, WeightFormat.FP32, trust_remote_code=False)
        gc.unfreeze()


def _gemmas() -> tuple[Any, ...]:
    # optimum-intel 2.2 refuses Gemma (1 and 2) beside transformers above 5.0, but converts it rightly.
    from optimum.exporters.openvino.model_configs import Gemma2OpenVINOConfig, GemmaOpenVINOConfig

    return GemmaOpenVINOConfig, Gemma2OpenVINOConfig


def log_probabilities(model: Any, tokens: Sequence[int]) -> Array:
    """Of PyTorch: row i predicts token i + 1."""
    import torch

    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([tokens])).logits[0]
        result: Array = torch.log_softmax(logits.float(), -1).numpy()
    return result


def drift(answer: Answer, prompt: Sequence[int], expected: Array) -> float:
    """The largest difference of any log-probability in an answer: of prompt, generated tokens, best alternatives."""
    (of_prompt,) = answer.prompt_logprobs
    found = [*of_prompt[1:], *answer.logprobs]
    assert len(found) == len(prompt) + len(answer.token_ids) - 1
    differences = []
    for row, entry in zip(expected, found, strict=False):
        assert entry is not None
        differences += [abs(row[token] - value) for token, value in ((entry.token_id, entry.logprob), *entry.top)]
    return float(max(differences))


@dataclass(frozen=True)
class Ask:
    """One greedy request."""

    prompt: tuple[int, ...]
    adapters: tuple[AdapterUse, ...] = ()
    max_tokens: int = 12
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(eq=False)
class Served:
    """A loaded model and what it answers."""

    model: LoadedModel
    answers: Answers
    _names: Iterator[str] = field(default_factory=lambda: (str(number) for number in itertools.count()))

    @property
    def lora(self) -> LoraRuntime:
        assert self.model.lora
        return self.model.lora

    def submit(self, ask: Ask) -> GenerationRequest:
        """Send a request and do not wait for it."""
        sampling = SamplingParams(
            temperature=0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=ask.logprobs,
            prompt_logprobs=ask.prompt_logprobs,
        )
        request = GenerationRequest(next(self._names), ask.prompt, sampling, ask.adapters)
        self.model.engine.submit(request)
        return request

    def wait(self, *requests: GenerationRequest) -> list[Answer]:
        """Return the answers to requests that were submitted."""
        self.answers.wait(*requests)
        answers = [self.answers[request.request_id] for request in requests]
        assert all(answer.error is None for answer in answers), answers
        return answers

    def together(self, *asks: Ask) -> list[Answer]:
        """Send requests so that they run in one batch, as far as there is room; return their answers."""
        requests = self.model.engine.call(lambda: [self.submit(ask) for ask in asks])
        return self.wait(*requests)

    def tokens(self, *asks: Ask) -> list[list[int]]:
        """The tokens that requests sent together give."""
        return [answer.token_ids for answer in self.together(*asks)]

    def alone(self, *asks: Ask) -> list[list[int]]:
        """The tokens that requests give one after another."""
        return [self.tokens(ask)[0] for ask in asks]


@contextmanager
def serving(
    folder: Path,
    adapters: Mapping[str, Path] | Sequence[AdapterSpec] | None = None,
    *,
    num_blocks: int | None = None,
    plugin_config: Mapping[str, Any] = PRECISE,
    lora: LoraConfig | None = None,
    engine: Mapping[str, Any] | None = None,
    speculation: SpeculationOptions | None = None,
    **lora_options: Any,
) -> Iterator[Served]:
    """Serve an exported model with adapters. `engine` are EngineOptions; `num_blocks` makes the KV cache small."""
    if adapters is not None:
        specs = [AdapterSpec(*each) for each in adapters.items()] if isinstance(adapters, Mapping) else adapters
        lora = LoraConfig(LoraOptions(**{"lora_dtype": "f32", **lora_options}), tuple(specs))
    answers = Answers()
    if engine is not None:
        folder = _with_graph(folder, EngineOptions(**engine))
    counting = mock.patch.object(runner, "_count_blocks", lambda *_: num_blocks or 128)
    with counting:
        config = {"INFERENCE_NUM_THREADS": 1, **plugin_config}  # several models are loaded at once
        guessing = {"speculation": speculation} if speculation else {}
        model = load_model(folder, deliver=answers, plugin_config=config, lora=lora, overrides=guessing)
    try:
        assert not model.lora or not model.lora.failures, model.lora.failures
        yield Served(model, answers)
    finally:
        model.engine.stop()


def _with_graph(folder: Path, options: EngineOptions) -> Path:
    """Return a folder whose graph.pbtxt serves `folder` with these options."""
    name = "-".join(f"{key}={value}" for key, value in sorted(_differences(options).items()))
    made = folder.parent / f"{folder.name}-{name}"
    made.mkdir(exist_ok=True)
    (made / "graph.pbtxt").write_text(render_graph(options, models_path=str(folder)))
    return made


def _differences(options: EngineOptions) -> dict[str, Any]:
    default = EngineOptions()
    names = EngineOptions.__dataclass_fields__
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(int(token) for token in np.random.default_rng([seed, length]).integers(2, VOCABULARY, length))
