"""The exporter's command line: OVMS's flags, the LoRA demo's and ours, as one typed request.

Owns: names, defaults and help of the flags, and their grammar.
Does not know: whether what they name exists.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.export.request import ExportRequest, MergeSource, SourceLoras, WeightFormat
from ovms_lora.export.source_loras import parse_source_loras, split_strength

_DEVICE: Final = re.compile(r"(CPU|GPU|NPU)(\.\d+)?|AUTO|(AUTO|HETERO|MULTI):[A-Z0-9.,()-]+")
_EPILOG: Final = """\
examples:
  {prog} text_generation --source_model org/base --model_name base_model
  {prog} text_generation --source_model org/base --adapter org/sql-lora --model_name merged_model
  {prog} text_generation --source_model base.gguf --adapter sql=0.7 --adapter tools=0.5 --model_name mixed
  {prog} text_generation --source_model org/base --model_name base_model \\
      --source_loras "sql=loras/sql,tools=loras/tools,mix=@sql:0.7+@tools:0.5"
"""


def build_parser(prog: str) -> FlagParser:
    """Build the parser of `export_model.py` and `ovms-lora export`."""
    parser = FlagParser(
        prog=prog,
        description="Turn a model into a folder that ovms-lora and OpenVINO Model Server serve.",
        epilog=_EPILOG.format(prog=prog),
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="text_generation")
    task = tasks.add_parser(
        "text_generation",
        help="export a model for completions and chat",
        epilog=_EPILOG.format(prog=prog),
    )
    _add_model_flags(task.add_argument_group("model"))
    _add_adapter_flags(task.add_argument_group("adapters"))
    _add_serving_flags(task.add_argument_group("serving (written to graph.pbtxt)"))
    task.add_argument("--verbose", action="store_true", help="show what the libraries print, and tracebacks")
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--source_model", required=True, metavar="SRC", help="a Hugging Face folder or id, or a .gguf file")
    add("--model_repository_path", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    add("--model_name", metavar="NAME", help="name to serve under, and folder in the repository; default: the source's")
    add(
        "--weight-format",
        type=WeightFormat,
        choices=list(WeightFormat),
        default=WeightFormat.INT8,
        metavar="FORMAT",
        help="fp32, fp16, bf16, int8 or int4; default: int8",
    )
    add(
        "--config_file_path",
        type=Path,
        default=Path("config.json"),
        metavar="FILE",
        help="the server's configuration, to which the model is added; default: config.json",
    )
    add("--overwrite_models", action="store_true", help="replace what the repository holds under this name")
    add("--trust-remote-code", action="store_true", help="let the source run Python code of its own")


def _add_adapter_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--adapter",
        action="append",
        default=[],
        type=_merge_source,
        metavar="SRC[=WEIGHT]",
        help="merge this adapter (folder or Hugging Face id) into the weights; may be given several times",
    )
    add("--tokenizer", metavar="SRC", help="take the tokenizer from here; only with one --adapter")
    add(
        "--source_loras",
        type=parse_source_loras,
        default=SourceLoras(),
        metavar="LIST",
        help='register adapters to be applied per request: "alias=SRC[:alpha],mix=@a:0.7+@b:0.5"',
    )


def _add_serving_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--target_device", type=_device, default="CPU", metavar="DEVICE", help="CPU, GPU, NPU, HETERO:…; default: CPU")
    add("--plugin_config", type=_json_object, default={}, metavar="JSON", help="OpenVINO properties")
    add("--cache_size", type=_count(0), default=0, metavar="GB", help="KV cache; default: 0, sized from free memory")
    add("--max_num_seqs", type=_count(1), default=256, metavar="N", help="sequences run at once; default: 256")
    add("--max_num_batched_tokens", type=_count(1), default=256, metavar="N", help="tokens per step; default: 256")
    add(
        "--enable_prefix_caching",
        nargs="?",
        choices=("true", "false"),
        const="true",
        default="true",
        help="keep the KV cache of prompts for those that begin alike; default: true",
    )
    add("--disable_dynamic_split_fuse", action="store_true", help="never mix prompts and generation in one step")
    add("--kv_cache_precision", choices=("u8", "f16", "bf16", "f32"), help="default: the device's choice")
    add("--ov_cache_dir", metavar="DIR", help="keep compiled models here, to start quicker")
    add("--tool_parser", default="", metavar="NAME", help="how the model writes tool calls")
    add("--reasoning_parser", default="", metavar="NAME", help="how the model writes its reasoning")


def parse_request(argv: Sequence[str], prog: str) -> tuple[ExportRequest, bool]:
    """Parse the command line into (request, verbose). Raises UsageError; `--help` raises SystemExit."""
    args = build_parser(prog).parse_all(argv)
    request = ExportRequest(
        source_model=args.source_model,
        repository=args.model_repository_path,
        model_name=args.model_name,
        config_file=args.config_file_path,
        weight_format=args.weight_format,
        adapters=tuple(args.adapter),
        tokenizer=args.tokenizer,
        loras=args.source_loras,
        engine=_engine_options(args),
        overwrite=args.overwrite_models,
        trust_remote_code=args.trust_remote_code,
    )
    return request, args.verbose


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        device=args.target_device,
        plugin_config=_plugin_config(args),
        cache_size=args.cache_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        dynamic_split_fuse=not args.disable_dynamic_split_fuse,
        enable_prefix_caching=args.enable_prefix_caching == "true",
        tool_parser=args.tool_parser,
        reasoning_parser=args.reasoning_parser,
    )


def _plugin_config(args: argparse.Namespace) -> dict[str, Any]:
    """Put the flags that stand for OpenVINO properties into `--plugin_config`."""
    properties = dict(args.plugin_config)
    for flag, name in (("kv_cache_precision", "KV_CACHE_PRECISION"), ("ov_cache_dir", "CACHE_DIR")):
        value = getattr(args, flag)
        if value is None:
            continue
        if properties.get(name, value) != value:
            raise UsageError(
                f"--{flag} {value} and --plugin_config {name} {properties[name]} disagree", hint="give one of them"
            )
        properties[name] = value
    return properties


def _merge_source(text: str) -> MergeSource:
    source, weight = split_strength(text, "=")
    if not source:
        raise UsageError("--adapter is empty", hint="it takes a folder or a hub id, perhaps with =WEIGHT")
    return MergeSource(source, 1.0 if weight is None else weight)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device such as CPU, GPU, GPU.1 or HETERO:GPU,CPU")
    return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return count
