"""The exporter's command line: OVMS's flags, the LoRA demo's and ours, as one typed request.

Owns: names, defaults and help of the flags, and their grammar.
Does not know: whether what they name exists.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.export.compression import default_format, parse_compression
from ovms_lora.export.request import ExportRequest, MergeSource, SourceLoras
from ovms_lora.export.source_loras import parse_source_loras, split_strength
from ovms_lora.export.weight_format import WeightFormat

_EXTRA: Final = "--extra_quantization_params"
_DEVICE: Final = re.compile(r"(CPU|GPU|NPU)(\.\d+)?|AUTO|(AUTO|HETERO|MULTI):[A-Z0-9.,()-]+")
_EPILOG: Final = """\
examples:
  a base, and the same base with an adapter merged into its weights:
    {prog} text_generation --source_model org/base --model_name base_model
    {prog} text_generation --source_model org/base --adapter org/sql-lora --model_name merged_model
  several adapters, each at a strength of its own:
    {prog} text_generation --source_model base.gguf --adapter sql=0.7 --adapter tools=0.5 --model_name mixed
  adapters that are applied per request:
    {prog} text_generation --source_model org/base --model_name base_model \\
        --source_loras "sql=loras/sql,tools=loras/tools,mix=@sql:0.7+@tools:0.5"
  small weights, and what they cost in accuracy:
    {prog} text_generation --source_model org/base --weight-format int4 --verify \\
        --extra_quantization_params "--group-size 64 --ratio 0.8 --awq --dataset samples.txt"
  only say what would be done, and how large it is:
    {prog} text_generation --source_model org/base --target_device GPU --dry_run
"""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What is to be exported, and how the exporter is to go about it."""

    request: ExportRequest
    verbose: bool
    dry_run: bool


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
    _add_weight_flags(task.add_argument_group("weights"))
    _add_adapter_flags(task.add_argument_group("adapters"))
    _add_speculation_flags(task.add_argument_group("guessing ahead (answers stay the same)"))
    _add_device_flags(task.add_argument_group("device (written to graph.pbtxt)"))
    _add_serving_flags(task.add_argument_group("serving (written to graph.pbtxt)"))
    _add_run_flags(task.add_argument_group("this run"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--source_model",
        required=True,
        metavar="SRC",
        help="a Hugging Face folder or id, a .gguf file, or an OpenVINO model",
    )
    add("--model_repository_path", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    add("--model_name", metavar="NAME", help="name to serve under, and folder in the repository; default: the source's")
    add(
        "--config_file_path",
        type=Path,
        default=Path("config.json"),
        metavar="FILE",
        help="the server's configuration, to which the model is added; default: config.json",
    )
    add("--overwrite_models", action="store_true", help="replace what the repository holds under this name")
    add("--trust-remote-code", action="store_true", help="let the source run Python code of its own")


def _add_weight_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--weight-format",
        type=WeightFormat,
        choices=list(WeightFormat),
        metavar="FORMAT",
        help="fp32, fp16, bf16, int8 or int4; default: int8, int4 for an NPU, and what an OpenVINO model has",
    )
    add(
        _EXTRA,
        type=parse_compression,
        metavar="FLAGS",
        help="how to compress: optimum-cli's flags in one quoted text, as \"--sym --group-size 64 --ratio 0.8 --awq "
        '--scale-estimation --dataset samples.txt"; a dataset is a text file with one sample on each line',
    )
    add("--verify", action="store_true", help="compare the exported model with the PyTorch model, and print the drift")
    add(
        "--verify_threshold",
        type=_number,
        metavar="KL",
        help="fail, and export nothing, above this mean KL divergence in nats; includes --verify",
    )


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


def _add_speculation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--draft_source_model",
        metavar="SRC",
        help="guess with this smaller model of the same tokenizer, which is exported into the model's folder",
    )
    add("--draft_model_name", metavar="NAME", help="its folder there; default: the source's name")
    add("--prompt_lookup_decoding", action="store_true", help="guess that a text goes on as it did before")


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--target_device", type=_device, default="CPU", metavar="DEVICE", help="CPU, GPU, NPU, HETERO:…; default: CPU")
    add("--plugin_config", type=_json_object, default={}, metavar="JSON", help="OpenVINO properties")
    add("--kv_cache_precision", choices=("u8", "f16", "bf16", "f32"), help="default: the device's choice")
    add("--ov_cache_dir", metavar="DIR", help="keep compiled graphs here, so that the next start is quicker")


def _add_serving_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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
    add("--tool_parser", default="", metavar="NAME", help="how the model writes tool calls")
    add("--reasoning_parser", default="", metavar="NAME", help="how the model writes its reasoning")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dry_run", action="store_true", help="only print what would be done; changes nothing")
    group.add_argument("--verbose", action="store_true", help="show what the libraries print, and tracebacks")


def parse_request(argv: Sequence[str], prog: str) -> CommandLine:
    """Parse the command line. Raises UsageError; `--help` raises SystemExit."""
    args = build_parser(prog).parse_all(_joined(argv))
    _check_weights(args)
    _check_speculation(args)
    request = ExportRequest(
        source_model=args.source_model,
        repository=args.model_repository_path,
        model_name=args.model_name,
        config_file=args.config_file_path,
        weight_format=args.weight_format,
        compression=args.extra_quantization_params,
        adapters=tuple(args.adapter),
        tokenizer=args.tokenizer,
        loras=args.source_loras,
        engine=_engine_options(args),
        overwrite=args.overwrite_models,
        trust_remote_code=args.trust_remote_code,
        verify=args.verify or args.verify_threshold is not None,
        max_drift=args.verify_threshold,
        draft_source=args.draft_source_model,
        draft_name=args.draft_model_name,
    )
    return CommandLine(request, verbose=args.verbose, dry_run=args.dry_run)


def _joined(argv: Sequence[str]) -> list[str]:
    """Join `--extra_quantization_params` and its value, which looks like a flag where it is a single one."""
    words = list(argv)
    for place in range(len(words) - 2, -1, -1):
        if words[place].replace("-", "_") == _EXTRA.replace("-", "_"):
            words[place : place + 2] = [f"{_EXTRA}={words[place + 1]}"]
    return words


def _check_weights(args: argparse.Namespace) -> None:
    """Raise UsageError for a format and a compression that do not go together, or not with the device."""
    weight_format = args.weight_format or default_format(args.target_device)
    if args.target_device.startswith("NPU") and weight_format is not WeightFormat.INT4:
        raise UsageError(f"an NPU runs int4 weights, not {weight_format}", hint="leave --weight-format out")
    if args.extra_quantization_params is not None:
        args.extra_quantization_params.check(weight_format)


def _check_speculation(args: argparse.Namespace) -> None:
    if args.draft_model_name is not None and args.draft_source_model is None:
        raise UsageError("--draft_model_name goes with --draft_source_model")
    if args.prompt_lookup_decoding and args.draft_source_model is not None:
        raise UsageError(
            "--prompt_lookup_decoding and --draft_source_model exclude each other", hint="give one of them"
        )


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
        speculation=SpeculationOptions() if args.prompt_lookup_decoding else None,
    )


def _plugin_config(args: argparse.Namespace) -> dict[str, Any]:
    """Put the flags that stand for OpenVINO properties into `--plugin_config`."""
    properties = dict(args.plugin_config)
    if args.target_device.startswith("HETERO"):
        properties.setdefault("MODEL_DISTRIBUTION_POLICY", "PIPELINE_PARALLEL")  # as OVMS's exporter sets it
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


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
