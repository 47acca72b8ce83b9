"""LoadedModel: a model folder turned into a running engine with its tokenizer, template and defaults.

The one place that reads a model folder: graph.pbtxt, config.json, generation_config.json, tokenizer and IR.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.graph_pbtxt import parse_graph
from ovms_lora.core.request import AdapterUse
from ovms_lora.core.sampling_params import EarlyStopping
from ovms_lora.core.speculation import SpeculationOptions, take_prompt_lookup
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.engine.draft_folder import check_draft_vocabulary, load_draft_model
from ovms_lora.engine.drafts import Drafter
from ovms_lora.engine.engine import Deliver, Engine
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.lora_config import LoraConfig
from ovms_lora.engine.lora_runtime import LoraRuntime
from ovms_lora.engine.output_parsers.formats import check_parser_names
from ovms_lora.engine.prompt_lookup import PromptLookup
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.engine.structured import ConstraintCompiler
from ovms_lora.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

GRAPH_NAME = "graph.pbtxt"
_DEFAULT_MAX_LEN = 2048


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says; it stands between a request's own values and the dialect's defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that serves one model. `folder` is where IR and tokenizer lie; `lora` its runtime adapters, if any."""

    folder: Path
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults
    options: EngineOptions
    constraints: ConstraintCompiler
    lora: LoraRuntime | None = None

    def chat_template_for(self, adapters: Sequence[AdapterUse]) -> ChatTemplate | None:
        """Return the template for a request: its adapter's own, else the model's, None without either.

        A sum of several adapters speaks as the model does. Raises AdapterUnavailableError.
        """
        own = self.lora.chat_template(adapters) if self.lora else None
        return own or self.chat_template


@dataclass(frozen=True, slots=True)
class _Text:
    """What turns a model's tokens into text and back."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    constraints: ConstraintCompiler

    @classmethod
    def read(cls, folder: Path, defaults: GenerationDefaults) -> _Text:
        """Read a folder's. Raises ModelFolderError."""
        tokenizer = Tokenizer.from_folder(folder)
        return cls(tokenizer, ChatTemplate.from_folder(folder), ConstraintCompiler(tokenizer, defaults.eos_token_ids))


def load_model(
    folder: Path,
    *,
    deliver: Deliver,
    graph_path: str | None = None,
    device: str | None = None,
    plugin_config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    lora: LoraConfig | None = None,
    max_waiting: int = 256,
    on_compile: Callable[[], None] = lambda: None,
) -> LoadedModel:
    """Load a model folder and start its engine; takes seconds.

    `graph_path` is relative to the folder; `device` and `plugin_config` are laid over what the graph says, `overrides`
    replace other EngineOptions of it; `max_waiting` requests may wait. With `lora` the model takes runtime adapters;
    those that cannot be loaded are left out and stand in `LoraRuntime.failures`. `on_compile` is called when the device
    begins to compile, which leaves the interpreter to others. Raises ModelFolderError when the
    folder cannot be served.
    """
    folder, options = read_options(folder, graph_path)
    properties = {**options.plugin_config, **(plugin_config or {})}
    if (looks_up := take_prompt_lookup(properties)) is not None:
        options = replace(options, speculation=SpeculationOptions() if looks_up else None)
    options = replace(options, **(overrides or {}), device=device or options.device, plugin_config=properties)
    defaults = read_generation_defaults(folder, options.generation_config_path)
    max_model_len = read_max_model_len(folder)
    graphs = GraphSource(folder, options)
    plain_graph = graphs.prepare() if lora is None or graphs.affords_plain else None
    on_compile()
    # Compiling is the work of one thread for seconds: everything else is done beside it.
    with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
        compiling = pool.submit(plain_graph) if plain_graph else None
        reading = pool.submit(_Text.read, folder, defaults)
        runtime = LoraRuntime(graphs, lora) if lora else None
        text = reading.result()
        with_lora = runtime.compile() if runtime else None
        plain = compiling.result() if compiling else None
    graph = with_lora or plain or graphs.compile()
    runner = OpenVinoRunner(graph, options, max_model_len=max_model_len, plain=plain if with_lora else None)
    engine = Engine(
        runner,
        text.tokenizer,
        options,
        deliver=deliver,
        max_model_len=max_model_len,
        eos_token_ids=defaults.eos_token_ids,
        max_waiting=max_waiting,
        residency=runtime.graphs.residency if runtime else None,
        drafter=_drafter(options, text.tokenizer, graph.vocab_size),
    )
    if runtime:
        runtime.graphs.attach(engine, runner)
    engine.start()
    return LoadedModel(folder, engine, text.tokenizer, text.chat_template, defaults, options, text.constraints, runtime)


def _drafter(options: EngineOptions, tokenizer: Tokenizer, vocab_size: int) -> Drafter | None:
    speculation = options.speculation
    if speculation is None:
        return None
    if speculation.looks_up:
        return PromptLookup(speculation)
    folder = Path(speculation.draft_models_path)
    check_draft_vocabulary(folder, tokenizer)
    length = read_max_model_len(folder)
    return load_draft_model(folder, options, speculation, vocab_size=vocab_size, max_model_len=length)


def read_options(folder: Path, graph_path: str | None = None) -> tuple[Path, EngineOptions]:
    """Return the folder that holds the IR, and the options of the graph where there is one.

    `graph_path` is relative to the folder and has to exist; the default, graph.pbtxt, need not. `models_path` and
    `draft_models_path` of the graph are relative to the folder, as in OVMS, wherever the graph is; the latter is
    returned as an absolute path. Raises ModelFolderError.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder", hint="check base_path or --model_path")
    path = folder / (graph_path or GRAPH_NAME)
    if not path.is_file():
        if graph_path is not None:
            raise ModelFolderError(f"{path} is not a file", hint="correct graph_path in config.json")
        return folder, EngineOptions()
    try:
        graph = parse_graph(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"cannot read {path}: {error}", hint="export the model again") from error
    check_parser_names(graph.options.tool_parser, graph.options.reasoning_parser)
    if graph.without_effect:
        log.info("%s: without effect here: %s", path, ", ".join(graph.without_effect))
    models = _folder_of(folder, "models_path", graph.models_path, path)
    options, speculation = graph.options, graph.options.speculation
    if speculation and not speculation.looks_up:
        draft = _folder_of(folder, "draft_models_path", speculation.draft_models_path, path)
        options = replace(options, speculation=replace(speculation, draft_models_path=str(draft)))
    return models, options


def _folder_of(base: Path, key: str, value: str, graph: Path) -> Path:
    folder = (base / value).resolve()
    if not folder.is_dir():
        raise ModelFolderError(f"{key} {value!r} of {graph} is not a folder", hint="it is relative to base_path")
    return folder


def read_generation_defaults(folder: Path, path: str = "") -> GenerationDefaults:
    """Read generation_config.json, with config.json for the end-of-sequence tokens when it has none.

    `path`, absolute or relative to the folder, names another file, which then has to exist. Raises ModelFolderError.
    """
    if path and not (folder / path).is_file():
        raise ModelFolderError(f"{folder / path} is not a file", hint="correct generation_config_path in graph.pbtxt")
    values = _read_json(folder / (path or "generation_config.json"))
    eos = values.get("eos_token_id", _read_json(folder / "config.json").get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return GenerationDefaults(
        temperature=_number(values, "temperature"),
        top_p=_number(values, "top_p"),
        top_k=_integer(values, "top_k"),
        min_p=_number(values, "min_p"),
        repetition_penalty=_number(values, "repetition_penalty"),
        length_penalty=_number(values, "length_penalty"),
        early_stopping=_early_stopping(values.get("early_stopping")),
        max_new_tokens=_integer(values, "max_new_tokens"),
        do_sample=values.get("do_sample") if isinstance(values.get("do_sample"), bool) else None,
        eos_token_ids=tuple(token for token in eos_ids if isinstance(token, int)),
    )


def read_max_model_len(folder: Path) -> int:
    """Return the positions that the model was made for, in tokens."""
    config = _read_json(folder / "config.json")
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = source.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return _DEFAULT_MAX_LEN


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"cannot read {path}: {error}", hint="export the model again") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object", hint="export the model again")
    return value


def _early_stopping(value: object) -> EarlyStopping | None:
    if isinstance(value, bool):
        return value
    return "never" if value == "never" else None


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
