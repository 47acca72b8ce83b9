"""The protobuf message types that a graph.pbtxt uses: a part of MediaPipe's and OVMS's LLMCalculatorOptions.

Owns: their declaration. Does not know: what the fields mean (graph_pbtxt.py does).

They are declared here as descriptors, for protobuf's own text format to do the parsing. Text format goes by names, so
the field numbers are our own; the field names and defaults are those of OVMS's llm_calculator.proto.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from google.protobuf import any_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

GRAPH: Final = "mediapipe.CalculatorGraphConfig"
LLM_OPTIONS: Final = "mediapipe.LLMCalculatorOptions"
SYNC_SET_EXTENSION: Final = "mediapipe.SyncSetInputStreamHandlerOptions.ext"

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


def new_message(type_name: str, **fields: Any) -> Any:
    """Make a message; Any, because its class exists at run time only."""
    return message_factory.GetMessageClass(message_pool().FindMessageTypeByName(type_name))(**fields)


@cache
def message_pool() -> descriptor_pool.DescriptorPool:
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
        parent = f"{LLM_OPTIONS}." if short in _ENUMS else "mediapipe."
        field.type_name = f".{short}" if "." in short else f".{parent}{short}"
