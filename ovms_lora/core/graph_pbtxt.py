"""graph.pbtxt: how OVMS writes down which model a graph serves and with which options.

Owns: the part of MediaPipe's and OVMS's message types that such a file uses, reading it and writing it.
Does not know: whether the models_path exists, or what the options do to an engine.

The types are declared here as descriptors, for protobuf's own text format to do the parsing. Text format goes by names,
so the field numbers are our own. The field names and defaults are those of OVMS's llm_calculator.proto.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from google.protobuf import any_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError

CALCULATOR: Final = "HttpLLMCalculator"
_ANY_PREFIX: Final = "type.googleapis.com/"
_OPTIONS: Final = "mediapipe.LLMCalculatorOptions"
_SYNC_SET: Final = "mediapipe.SyncSetInputStreamHandlerOptions.ext"
_HINT: Final = "compare it with the graph.pbtxt that export_model.py writes"

_SCALARS: Final = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "float": FieldDescriptorProto.TYPE_FLOAT,
}

# "label type name", one field a line; a type with a dot is a message or an enum declared below.
_MESSAGES: Final = {
    "CalculatorGraphConfig": """
        repeated .Node node
        repeated string input_stream
        repeated string output_stream
        repeated string input_side_packet
        repeated string output_side_packet
        optional int32 max_queue_size
        optional int32 num_threads
        optional bool report_deadlock
        optional string type
    """,
    "Node": """
        optional string name
        optional string calculator
        repeated string input_stream
        repeated string output_stream
        repeated string input_side_packet
        repeated string output_side_packet
        repeated .InputStreamInfo input_stream_info
        repeated .google.protobuf.Any node_options
        optional .StreamHandler input_stream_handler
        optional .StreamHandler output_stream_handler
        optional string executor
        optional int32 max_in_flight
    """,
    "InputStreamInfo": """
        optional string tag_index
        optional bool back_edge
    """,
    "StreamHandler": """
        optional string input_stream_handler
        optional string output_stream_handler
        optional .CalculatorOptions options
    """,
    "CalculatorOptions": "",
    "SyncSetInputStreamHandlerOptions": "repeated .SyncSet sync_set",
    "SyncSet": "repeated string tag_index",
    # models_path is required in OVMS; here its absence is reported in our own words. The last two fields are of older
    # releases; they stand in graphs that people still serve.
    "LLMCalculatorOptions": """
        optional string models_path
        optional uint64 max_num_batched_tokens 256
        optional uint64 cache_size 0
        optional uint64 max_num_seqs 256
        optional bool dynamic_split_fuse true
        optional string device
        optional string plugin_config
        optional uint32 best_of_limit 20
        optional uint32 max_tokens_limit
        optional bool enable_prefix_caching false
        optional string draft_models_path
        optional string draft_device
        optional uint64 draft_max_num_batched_tokens
        optional uint64 draft_cache_size
        optional uint64 draft_block_size
        optional uint64 draft_max_num_seqs
        optional bool draft_dynamic_split_fuse
        optional bool draft_eagle3_mode
        optional .PipelineType pipeline_type
        optional .CacheEvictionConfig cache_eviction_config
        optional string tool_parser
        optional string reasoning_parser
        optional bool enable_tool_guided_generation false
        optional .SparseAttentionConfig sparse_attention_config
        optional uint64 cache_interval_multiplier
        optional .ChatTemplateMode chat_template_mode
        optional string generation_config_path
        optional string response_parser
        optional uint64 block_size
    """,
    "CacheEvictionConfig": """
        optional .AggregationMode aggregation_mode
        optional uint64 start_size
        optional uint64 recent_size
        optional uint64 max_cache_size
        optional bool apply_rotation
        optional uint64 snapkv_window_size
        optional .KVCrushConfig kv_crush_config
    """,
    "KVCrushConfig": """
        optional uint64 budget
        optional .AnchorPointMode anchor_point_mode
        optional uint64 rng_seed
    """,
    "SparseAttentionConfig": """
        optional .SparseAttentionMode mode
        optional uint64 num_last_dense_tokens_in_prefill
        optional uint64 num_retained_start_tokens_in_cache
        optional uint64 num_retained_recent_tokens_in_cache
        optional float xattention_threshold
        optional uint64 xattention_block_size
        optional uint64 xattention_stride
    """,
}
_ENUMS: Final = {
    "PipelineType": ("LM", "VLM", "LM_CB", "VLM_CB", "AUTO"),
    "AggregationMode": ("SUM", "NORM_SUM"),
    "AnchorPointMode": ("RANDOM", "ZEROS", "ONES", "MEAN", "ALTERNATING"),
    "SparseAttentionMode": ("TRISHAPE", "XATTENTION"),
    "ChatTemplateMode": ("MINJA", "JINJA"),
}


@dataclass(frozen=True, slots=True)
class Graph:
    """What one graph.pbtxt says; `models_path` is relative to its folder unless absolute."""

    models_path: str
    options: EngineOptions


def render_graph(options: EngineOptions, *, models_path: str = "./") -> str:
    """Return the text of a graph.pbtxt that OVMS and this server accept."""
    pool = _pool()
    graph = _new("mediapipe.CalculatorGraphConfig")
    graph.input_stream.append("HTTP_REQUEST_PAYLOAD:input")
    graph.output_stream.append("HTTP_RESPONSE_PAYLOAD:output")
    node = graph.node.add(name="LLMExecutor", calculator=CALCULATOR)
    node.input_stream.extend(["LOOPBACK:loopback", "HTTP_REQUEST_PAYLOAD:input"])
    node.input_side_packet.append("LLM_NODE_RESOURCES:llm")
    node.output_stream.extend(["LOOPBACK:loopback", "HTTP_RESPONSE_PAYLOAD:output"])
    node.input_stream_info.add(tag_index="LOOPBACK:0", back_edge=True)
    packed = node.node_options.add(type_url=_ANY_PREFIX + _OPTIONS)
    packed.value = _options_message(options, models_path).SerializeToString()
    node.input_stream_handler.input_stream_handler = "SyncSetInputStreamHandler"
    sync_set = node.input_stream_handler.options.Extensions[pool.FindExtensionByName(_SYNC_SET)].sync_set
    sync_set.add().tag_index.append("LOOPBACK:0")
    return text_format.MessageToString(graph, descriptor_pool=pool)


def _options_message(options: EngineOptions, models_path: str) -> Message:
    message = _new(
        _OPTIONS,
        models_path=models_path,
        device=options.device,
        cache_size=options.cache_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        dynamic_split_fuse=options.dynamic_split_fuse,
        enable_prefix_caching=options.enable_prefix_caching,
        plugin_config=json.dumps(options.plugin_config) if options.plugin_config else "",
        best_of_limit=options.best_of_limit,
    )
    if options.max_tokens_limit is not None:
        message.max_tokens_limit = options.max_tokens_limit
    if options.tool_parser:
        message.tool_parser = options.tool_parser
    if options.reasoning_parser:
        message.reasoning_parser = options.reasoning_parser
    if options.enable_tool_guided_generation:
        message.enable_tool_guided_generation = True
    if options.generation_config_path:
        message.generation_config_path = options.generation_config_path
    return message  # type: ignore[no-any-return]  # the class is made at run time


def parse_graph(text: str) -> Graph:
    """Read a graph.pbtxt.

    Raises ModelFolderError with the line of what is malformed or not known, and for a graph that serves no LLM.
    """
    pool = _pool()
    graph = _new("mediapipe.CalculatorGraphConfig")
    try:
        text_format.Parse(text, graph, descriptor_pool=pool)
    except (text_format.ParseError, RecursionError) as error:
        raise ModelFolderError(f"graph.pbtxt cannot be read: line {_one_line(error)}", hint=_HINT) from error
    nodes = [node for node in graph.node if node.calculator == CALCULATOR]
    if len(nodes) != 1:
        raise ModelFolderError(
            f"graph.pbtxt has {len(nodes) or 'no'} nodes with calculator {CALCULATOR}", hint="it must have one"
        )
    packed = [option for option in nodes[0].node_options if option.type_url == _ANY_PREFIX + _OPTIONS]
    if len(packed) != 1:
        raise ModelFolderError(f"graph.pbtxt must give the LLM node one [{_ANY_PREFIX}{_OPTIONS}]", hint=_HINT)
    message = _new(_OPTIONS)
    message.ParseFromString(packed[0].value)
    if not message.models_path:
        raise ModelFolderError("graph.pbtxt has no models_path", hint='"./" is the folder of graph.pbtxt itself')
    return Graph(models_path=message.models_path, options=_engine_options(message))


def _engine_options(message: Any) -> EngineOptions:
    pipeline = message.PipelineType.Name(message.pipeline_type) if message.HasField("pipeline_type") else "AUTO"
    if pipeline.startswith("VLM"):
        raise ModelFolderError(f"graph.pbtxt asks for pipeline_type {pipeline}", hint="only text models are served")
    for name in ("max_num_seqs", "max_num_batched_tokens", "best_of_limit"):
        if getattr(message, name) < 1:
            raise ModelFolderError(f"graph.pbtxt: {name} must be at least 1")
    return EngineOptions(
        device=message.device or "CPU",
        plugin_config=_plugin_config(message.plugin_config),
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
    )


def _plugin_config(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        properties = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelFolderError(f"graph.pbtxt: plugin_config is not JSON: {error}") from error
    if not isinstance(properties, dict):
        raise ModelFolderError("graph.pbtxt: plugin_config must be a JSON object")
    return properties


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _new(type_name: str, **fields: Any) -> Any:
    """Make a message; Any, because its class exists at run time only."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(type_name))(**fields)


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    """Declare the types in a pool of their own, so that they never meet another declaration of MediaPipe's."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    file = FileDescriptorProto(name="ovms_graph.proto", package="mediapipe", dependency=["google/protobuf/any.proto"])
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        _add_fields(message, (line.split() for line in fields.strip().splitlines()))
    options = next(message for message in file.message_type if message.name == "CalculatorOptions")
    options.extension_range.add(start=1000, end=2000)
    llm = next(message for message in file.message_type if message.name == "LLMCalculatorOptions")
    for name, values in _ENUMS.items():
        enum = llm.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    sync_set = next(message for message in file.message_type if message.name == "SyncSetInputStreamHandlerOptions")
    sync_set.extension.add(
        name="ext",
        extendee=".mediapipe.CalculatorOptions",
        number=1000,
        label=FieldDescriptorProto.LABEL_OPTIONAL,
        type=FieldDescriptorProto.TYPE_MESSAGE,
        type_name=".mediapipe.SyncSetInputStreamHandlerOptions",
    )
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def _add_fields(message: DescriptorProto, fields: Iterable[list[str]]) -> None:
    for number, (label, type_name, name, *default) in enumerate(fields, start=1):
        field = message.field.add(name=name, number=number)
        field.label = getattr(FieldDescriptorProto, f"LABEL_{label.upper()}")
        if default:
            field.default_value = default[0]
        if type_name in _SCALARS:
            field.type = _SCALARS[type_name]
            continue
        short = type_name.removeprefix(".")
        field.type = FieldDescriptorProto.TYPE_ENUM if short in _ENUMS else FieldDescriptorProto.TYPE_MESSAGE
        parent = f"{_OPTIONS}." if short in _ENUMS else "mediapipe."
        field.type_name = f".{short}" if "." in short else f".{parent}{short}"
