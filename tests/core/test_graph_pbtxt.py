import json
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.graph_pbtxt import parse_graph, render_graph
from ovms_lora.core.speculation import SpeculationOptions
from tests import ovms_repository

# As OVMS's own exporter writes it: spaces in the type's name, colons before braces, commas, single quotes.
OVMS_GRAPH = """
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"
node: {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: { tag_index: 'LOOPBACK:0', back_edge: true }
  node_options: {
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {
      models_path: "./model",
      plugin_config: '{"KV_CACHE_PRECISION": "u8"}',
      cache_size: 10,
      # a remark
      max_num_batched_tokens: 512,
      OPTION
    }
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options { [mediapipe.SyncSetInputStreamHandlerOptions.ext] { sync_set { tag_index: "LOOPBACK:0" } } }
  }
}
"""


def graph(option: str = "") -> str:
    return OVMS_GRAPH.replace("OPTION", option)


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(
            device="HETERO:GPU,CPU",
            plugin_config={"INFERENCE_PRECISION_HINT": "f32", "quote": 'a "b" \\ ü'},
            cache_size=3,
            max_num_seqs=17,
            max_num_batched_tokens=1024,
            dynamic_split_fuse=False,
            enable_prefix_caching=False,
            best_of_limit=4,
            max_tokens_limit=100,
            tool_parser="hermes3",
            reasoning_parser="qwen3",
            enable_tool_guided_generation=True,
            generation_config_path="other.json",
            speculation=SpeculationOptions(draft_models_path="./draft", draft_device="GPU", draft_cache_size=2),
        ),
        EngineOptions(speculation=SpeculationOptions()),
    ],
)
def test_what_is_written_is_read_back(options: EngineOptions) -> None:
    graph = parse_graph(render_graph(options, models_path="../model"))
    assert (graph.models_path, graph.options) == ("../model", options)


def test_a_written_graph_has_what_ovms_looks_for() -> None:
    text = render_graph(EngineOptions())
    for part in (
        'calculator: "HttpLLMCalculator"',
        'name: "LLMExecutor"',
        'input_side_packet: "LLM_NODE_RESOURCES:llm"',
        "[type.googleapis.com/mediapipe.LLMCalculatorOptions]",
        "[mediapipe.SyncSetInputStreamHandlerOptions.ext]",
        'models_path: "./"',
        "back_edge: true",
    ):
        assert part in text


def test_a_graph_of_ovms_is_read_with_ovms_defaults() -> None:
    graph_ = parse_graph(graph())
    assert graph_.models_path == "./model"
    assert graph_.options == EngineOptions(
        plugin_config={"KV_CACHE_PRECISION": "u8"},
        cache_size=10,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({}, EngineOptions(enable_prefix_caching=False)),
        ({"cache_size": 10}, EngineOptions(enable_prefix_caching=False, cache_size=10)),
        ({"enable_prefix_caching": True}, EngineOptions()),
        (
            {"max_num_batched_tokens": 4096, "dynamic_split_fuse": False},
            EngineOptions(enable_prefix_caching=False, max_num_batched_tokens=4096, dynamic_split_fuse=False),
        ),
        ({"max_num_seqs": 7}, EngineOptions(enable_prefix_caching=False, max_num_seqs=7)),
        ({"device": "HETERO:GPU,CPU"}, EngineOptions(enable_prefix_caching=False, device="HETERO:GPU,CPU")),
        (
            {"plugin_config": {"KV_CACHE_PRECISION": "u8", "CACHE_DIR": "/c"}},
            EngineOptions(enable_prefix_caching=False, plugin_config={"KV_CACHE_PRECISION": "u8", "CACHE_DIR": "/c"}),
        ),
        ({"response_parser": "hermes3"}, EngineOptions(enable_prefix_caching=False, tool_parser="hermes3")),
        (
            {"tool_parser": "llama3", "reasoning_parser": "qwen3", "enable_tool_guided_generation": True},
            EngineOptions(
                enable_prefix_caching=False,
                tool_parser="llama3",
                reasoning_parser="qwen3",
                enable_tool_guided_generation=True,
            ),
        ),
        (
            {"best_of_limit": 3, "max_tokens_limit": 100},
            EngineOptions(enable_prefix_caching=False, best_of_limit=3, max_tokens_limit=100),
        ),
        ({"pipeline_type": "LM"}, EngineOptions(enable_prefix_caching=False)),
        (
            {"draft_models_path": "./draft"},
            EngineOptions(enable_prefix_caching=False, speculation=SpeculationOptions(draft_models_path="./draft")),
        ),
        (
            {"plugin_config": {"prompt_lookup": True, "CACHE_DIR": "/c"}},
            EngineOptions(
                enable_prefix_caching=False, plugin_config={"CACHE_DIR": "/c"}, speculation=SpeculationOptions()
            ),
        ),
        ({"plugin_config": {"prompt_lookup": False}}, EngineOptions(enable_prefix_caching=False)),
    ],
)
def test_what_ovms_s_exporter_writes_is_read(written: dict[str, Any], read: EngineOptions) -> None:
    assert parse_graph(ovms_repository.graph(**written)).options == read


def test_the_older_response_parser_is_the_tool_parser() -> None:
    assert parse_graph(graph('response_parser: "hermes3"')).options.tool_parser == "hermes3"


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("draft_max_num_batched_tokens: 32", "draft_max_num_batched_tokens"),
        ("draft_block_size: 32", "draft_block_size"),
        ("draft_max_num_seqs: 32", "draft_max_num_seqs"),
        ("draft_dynamic_split_fuse: false", "draft_dynamic_split_fuse"),
        ("pipeline_type: LM_CB", "pipeline_type"),
        ("block_size: 32", "block_size"),
        (
            "cache_eviction_config { aggregation_mode: SUM start_size: 32 recent_size: 64 max_cache_size: 128 }",
            "cache_eviction_config",
        ),
        ("sparse_attention_config { mode: XATTENTION xattention_threshold: 0.8 }", "sparse_attention_config"),
        ("cache_interval_multiplier: 2", "cache_interval_multiplier"),
        ("chat_template_mode: MINJA", "chat_template_mode"),
    ],
)
def test_options_that_change_no_answer_are_let_pass_and_named(option: str, named: str) -> None:
    read = parse_graph(graph(option))
    assert read.options == parse_graph(graph()).options
    assert read.without_effect == (named,)


def test_properties_of_ovms_s_pipeline_are_no_properties_of_the_device() -> None:
    properties = '{"prompt_lookup": true, "ATTENTION_BACKEND": "PA", "NUM_STREAMS": "1"}'
    read = parse_graph(graph().replace('{"KV_CACHE_PRECISION": "u8"}', properties))
    assert read.options.plugin_config == {"NUM_STREAMS": "1"}
    assert read.options.speculation == SpeculationOptions()
    assert read.without_effect == ("ATTENTION_BACKEND",)


def test_a_draft_that_is_no_language_model_is_not_used() -> None:
    read = parse_graph(graph('draft_models_path: "./draft", draft_eagle3_mode: true'))
    assert read.options.speculation is None
    assert read.without_effect == ("draft_models_path", "draft_eagle3_mode")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (graph("cash_size: 1"), 'line 20:7 .*no field named "cash_size"'),
        (graph("cache_size: many"), "line 20"),
        (graph("cache_size: -1"), "line 20"),
        (graph("max_num_seqs: 0"), "max_num_seqs must be at least 1"),
        (
            graph('draft_models_path: "./d"').replace('"KV_CACHE_PRECISION": "u8"', '"prompt_lookup": true'),
            "prompt_lookup and for a draft model",
        ),
        (graph().replace('"KV_CACHE_PRECISION": "u8"', '"prompt_lookup": 1'), "prompt_lookup must be true or false"),
        (graph("pipeline_type: VLM"), "pipeline_type VLM"),
        (graph('models_path: "./twice"'), 'line 20.*"models_path"'),
        (graph().replace('models_path: "./model",', ""), "no models_path"),
        (graph().replace("HttpLLM", "Embeddings"), "no nodes with calculator HttpLLMCalculator"),
        (graph().replace('u8"}', 'u8"'), "plugin_config is not JSON"),
        (graph().replace('{"KV_CACHE_PRECISION": "u8"}', json.dumps([1])), "plugin_config must be a JSON object"),
        (graph() + "}", "line 28"),
        ("node { calculator: 'HttpLLMCalculator' }", "must give the LLM node one"),
        ("", "no nodes"),
        ("\0\1", "line 1"),
    ],
)
def test_a_graph_that_cannot_be_served_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        parse_graph(text)


@pytest.mark.parametrize(("device", "pipeline"), [("CPU", False), ("GPU.1", False), ("HETERO:GPU.0,GPU.1", True)])
def test_a_split_over_devices_is_written_as_the_pipeline_that_ovms_has_for_it(device: str, pipeline: bool) -> None:
    text = render_graph(EngineOptions(device=device))
    assert ("pipeline_type: LM" in text) is pipeline
    assert parse_graph(text).options.device == device
