"""graph.pbtxt: how OVMS writes down which model a graph serves and with which options.

Owns: reading such a file into EngineOptions, and writing one that a stock OVMS accepts.
Does not know: whether the models_path exists, or what the options do to an engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import text_format
from google.protobuf.message import Message

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.graph_messages import GRAPH, LLM_OPTIONS, SYNC_SET_EXTENSION, message_pool, new_message
from ovms_lora.core.speculation import SpeculationOptions, take_prompt_lookup

CALCULATOR: Final = "HttpLLMCalculator"
_OPTIONS_URL: Final = f"type.googleapis.com/{LLM_OPTIONS}"
# Ways of OVMS to compute the same answers faster, or nearly the same with less memory; here they are computed exactly.
_WITHOUT_EFFECT: Final = (
    *("pipeline_type", "cache_eviction_config", "sparse_attention_config"),
    *("cache_interval_multiplier", "chat_template_mode", "block_size"),
    *("draft_max_num_batched_tokens", "draft_block_size", "draft_max_num_seqs", "draft_dynamic_split_fuse"),
)
# Of the same kind, and no property of a device although it stands among these.
_PIPELINE_PROPERTIES: Final = ("ATTENTION_BACKEND",)
_JSON_HINT: Final = """write it like plugin_config: '{"KV_CACHE_PRECISION": "u8"}'"""
_HINT: Final = "compare it with the graph.pbtxt that export_model.py writes"


@dataclass(frozen=True, slots=True)
class Graph:
    """What one graph.pbtxt says; `models_path` is relative to its folder unless absolute.

    `without_effect` are the options that it gives and that change nothing here.
    """

    models_path: str
    options: EngineOptions
    without_effect: tuple[str, ...] = ()


def render_graph(options: EngineOptions, *, models_path: str = "./") -> str:
    """Return the text of a graph.pbtxt that OVMS and this server accept.

    Of `speculation` it holds which method it is; OVMS has the numbers in requests.
    """
    pool = message_pool()
    graph = new_message(GRAPH)
    graph.input_stream.append("HTTP_REQUEST_PAYLOAD:input")
    graph.output_stream.append("HTTP_RESPONSE_PAYLOAD:output")
    node = graph.node.add(name="LLMExecutor", calculator=CALCULATOR)
    node.input_stream.extend(["LOOPBACK:loopback", "HTTP_REQUEST_PAYLOAD:input"])
    node.input_side_packet.append("LLM_NODE_RESOURCES:llm")
    node.output_stream.extend(["LOOPBACK:loopback", "HTTP_RESPONSE_PAYLOAD:output"])
    node.input_stream_info.add(tag_index="LOOPBACK:0", back_edge=True)
    packed = node.node_options.add(type_url=_OPTIONS_URL)
    packed.value = _options_message(options, models_path).SerializeToString()
    node.input_stream_handler.input_stream_handler = "SyncSetInputStreamHandler"
    sync_set = node.input_stream_handler.options.Extensions[pool.FindExtensionByName(SYNC_SET_EXTENSION)].sync_set
    sync_set.add().tag_index.append("LOOPBACK:0")
    return text_format.MessageToString(graph, descriptor_pool=pool)


def _options_message(options: EngineOptions, models_path: str) -> Message:
    speculation, properties = options.speculation, dict(options.plugin_config)
    if speculation and speculation.looks_up:
        properties["prompt_lookup"] = True
    message = new_message(
        LLM_OPTIONS,
        models_path=models_path,
        device=options.device,
        cache_size=options.cache_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        dynamic_split_fuse=options.dynamic_split_fuse,
        enable_prefix_caching=options.enable_prefix_caching,
        plugin_config=json.dumps(properties) if properties else "",
        best_of_limit=options.best_of_limit,
    )
    if options.device.startswith("HETERO"):
        # A stock OVMS splits a model over devices only in its pipeline without paged attention.
        message.pipeline_type = message.PipelineType.Value("LM")
    if options.max_tokens_limit is not None:
        message.max_tokens_limit = options.max_tokens_limit
    if options.tool_parser:
        message.tool_parser = options.tool_parser
    if options.reasoning_parser:
        message.reasoning_parser = options.reasoning_parser
    if options.enable_tool_guided_generation:
        message.enable_tool_guided_generation = True
    if speculation and not speculation.looks_up:
        message.draft_models_path = speculation.draft_models_path
        message.draft_device = speculation.draft_device
        message.draft_cache_size = speculation.draft_cache_size
    if options.generation_config_path:
        message.generation_config_path = options.generation_config_path
    return message  # type: ignore[no-any-return]  # the class is made at run time


def parse_graph(text: str) -> Graph:
    """Read a graph.pbtxt.

    Raises ModelFolderError with the line of what is malformed or not known, and for a graph that serves no LLM.
    """
    pool = message_pool()
    graph = new_message(GRAPH)
    try:
        text_format.Parse(text, graph, descriptor_pool=pool)
    except (text_format.ParseError, RecursionError) as error:
        raise ModelFolderError(f"graph.pbtxt cannot be read: line {_one_line(error)}", hint=_HINT) from error
    nodes = [node for node in graph.node if node.calculator == CALCULATOR]
    if len(nodes) != 1:
        raise ModelFolderError(
            f"graph.pbtxt has {len(nodes) or 'no'} nodes with calculator {CALCULATOR}", hint="it must have one"
        )
    packed = [option for option in nodes[0].node_options if option.type_url == _OPTIONS_URL]
    if len(packed) != 1:
        raise ModelFolderError(f"graph.pbtxt must give the LLM node one [{_OPTIONS_URL}]", hint=_HINT)
    message = new_message(LLM_OPTIONS)
    message.ParseFromString(packed[0].value)
    if not message.models_path:
        raise ModelFolderError("graph.pbtxt has no models_path", hint='"./" is the folder of graph.pbtxt itself')
    properties = _plugin_config(message.plugin_config)
    ignored = [name for name in _WITHOUT_EFFECT if message.HasField(name)]
    if message.draft_eagle3_mode:
        ignored += ["draft_models_path", "draft_eagle3_mode"]  # its draft is no language model by itself
    ignored += [name for name in _PIPELINE_PROPERTIES if properties.pop(name, None) is not None]
    return Graph(message.models_path, _engine_options(message, properties), tuple(ignored))


def _speculation(message: Any, plugin_config: dict[str, Any]) -> SpeculationOptions | None:
    looks_up = take_prompt_lookup(plugin_config)
    path = "" if message.draft_eagle3_mode else message.draft_models_path
    if not path:
        return SpeculationOptions() if looks_up else None
    if looks_up:
        raise ModelFolderError(
            "graph.pbtxt asks for prompt_lookup and for a draft model",
            hint="remove one of prompt_lookup and draft_models_path",
        )
    return SpeculationOptions(
        draft_models_path=path, draft_device=message.draft_device, draft_cache_size=message.draft_cache_size
    )


def _engine_options(message: Any, plugin_config: dict[str, Any]) -> EngineOptions:
    pipeline = message.PipelineType.Name(message.pipeline_type) if message.HasField("pipeline_type") else "AUTO"
    if pipeline.startswith("VLM"):
        raise ModelFolderError(f"graph.pbtxt asks for pipeline_type {pipeline}", hint="only text models are served")
    for name in ("max_num_seqs", "max_num_batched_tokens", "best_of_limit"):
        if getattr(message, name) < 1:
            raise ModelFolderError(f"graph.pbtxt: {name} must be at least 1", hint="remove it for OVMS's default")
    speculation = _speculation(message, plugin_config)
    return EngineOptions(
        device=message.device or "CPU",
        plugin_config=plugin_config,
        cache_size=message.cache_size,
        max_num_seqs=message.max_num_seqs,
        max_num_batched_tokens=message.max_num_batched_tokens,
        dynamic_split_fuse=message.dynamic_split_fuse,
        enable_prefix_caching=message.enable_prefix_caching,
        best_of_limit=message.best_of_limit,
        max_tokens_limit=message.max_tokens_limit if message.HasField("max_tokens_limit") else None,
        tool_parser=message.tool_parser or message.response_parser,
        reasoning_parser=message.reasoning_parser,
        enable_tool_guided_generation=message.enable_tool_guided_generation,
        generation_config_path=message.generation_config_path,
        speculation=speculation,
    )


def _plugin_config(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        properties = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"graph.pbtxt: plugin_config is not JSON: {error}", hint=_JSON_HINT) from error
    if not isinstance(properties, dict):
        raise ModelFolderError("graph.pbtxt: plugin_config must be a JSON object", hint=_JSON_HINT)
    return properties


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
