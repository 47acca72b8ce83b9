"""A model repository as OVMS's own exporter leaves it: the text of its graph.pbtxt, and the list of config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BEFORE = """\
# OVMS_GRAPH_QUEUE_MAX_SIZE: AUTO
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_side_packet: "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {
    tag_index: 'LOOPBACK:0',
    back_edge: true
  }
  node_options: {
      [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {
"""
_AFTER = """\
      }
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {
        sync_set {
          tag_index: "LOOPBACK:0"
        }
      }
    }
  }
}"""
_ENUMS = ("pipeline_type", "chat_template_mode")


def graph(*, models_path: str = "./", plugin_config: Mapping[str, Any] | None = None, **options: Any) -> str:
    """Return a graph.pbtxt with some of LLMCalculatorOptions."""
    lines = [f'models_path: "{models_path}"', f"plugin_config: '{json.dumps(plugin_config or {})}'"]
    lines += [f"{name}: {_value(name, value)}" for name, value in options.items()]
    return _BEFORE + "".join(f"          {line},\n" for line in lines) + _AFTER


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return " true" if value else "false"
    return str(value) if isinstance(value, int) or name in _ENUMS else f'"{value}"'


def write_config(folder: Path, *names: str) -> Path:
    """Write the config.json of these graphs, each in a folder of its own name."""
    graphs = [{"name": name, "base_path": name} for name in names]
    path = folder / "config.json"
    path.write_text(json.dumps({"mediapipe_config_list": graphs, "model_config_list": []}, indent=4))
    return path
