import re
from pathlib import Path

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import UsageError
from ovms_lora.export.arguments import build_parser, parse_request
from ovms_lora.export.request import ExportRequest, MergeSource


def parse(*flags: str) -> ExportRequest:
    return parse_request(["text_generation", "--source_model", "org/base", *flags], "export_model.py").request


def test_defaults_are_those_of_ovms() -> None:
    assert parse() == ExportRequest(
        source_model="org/base",
        repository=Path("models"),
        config_file=Path("config.json"),
        weight_format=None,
        compression=None,
        engine=EngineOptions(device="CPU", max_num_seqs=256, max_num_batched_tokens=256),
    )


VALUES = {
    "source_model": "org/other",
    "model_repository_path": "repo",
    "model_name": "m",
    "weight_format": "fp16",
    "config_file_path": "c.json",
    "adapter": "a",
    "tokenizer": "t",
    "source_loras": "a=b",
    "target_device": "GPU",
    "plugin_config": "{}",
    "cache_size": "1",
    "max_num_seqs": "1",
    "max_num_batched_tokens": "1",
    "kv_cache_precision": "u8",
    "ov_cache_dir": "d",
    "tool_parser": "x",
    "reasoning_parser": "x",
    "enable_prefix_caching": None,
    "disable_dynamic_split_fuse": None,
    "overwrite_models": None,
    "trust_remote_code": None,
    "draft_source_model": "org/small",
    "prompt_lookup_decoding": None,
}


@pytest.mark.parametrize(("flag", "value"), VALUES.items())
def test_every_flag_has_both_spellings(flag: str, value: str | None) -> None:
    words = [f"--{flag}", f"--{flag.replace('_', '-')}"]
    requests = [parse(word, value) if value else parse(word) for word in words]
    if value:
        requests += [parse(f"{word}={value}") for word in words]
    assert all(request == requests[0] for request in requests)


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser("export_model.py").parse_all(["text_generation", "--help"])
    assert stop.value.code == 0
    shown = {flag.replace("-", "_") for flag in re.findall(r"--([a-z_-]+)", capsys.readouterr().out)}
    assert set(VALUES) <= shown


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--sauce_model", "x"], "unknown flag --sauce_model", "did you mean --source_model?"),
        (["--adaptor=x"], "unknown flag --adaptor", "did you mean --adapter?"),
        (["--weight_fromat", "int8"], "unknown flag --weight_fromat", "did you mean --weight-format?"),
        (["--frobnicate"], "unknown flag --frobnicate", "--help"),
        (["--source"], "unknown flag --source", "did you mean"),
        (["stray"], "unknown argument stray", "--help"),
        (["--weight-format", "int3"], "invalid choice|invalid WeightFormat", "--help"),
        (["--cache_size", "-1"], "not a whole number of at least 0", "--help"),
        (["--max_num_seqs", "0"], "not a whole number of at least 1", "--help"),
        (["--plugin_config", "{"], "not JSON", "--help"),
        (["--plugin_config", "[]"], "not a JSON object", "--help"),
        (["--target_device", "TOASTER"], "'TOASTER' is not a device", "--help"),
        (["--adapter", "sql=nan"], "nan is not between -1000 and 1000", "1.0"),
        (["--draft_model_name", "d"], "--draft_model_name goes with --draft_source_model", ""),
        (["--prompt_lookup_decoding", "--draft_source_model", "d"], "exclude each other", "one"),
        (["--adapter", ""], "--adapter is empty", "folder"),
        (
            ["--kv_cache_precision", "u8", "--plugin_config", '{"KV_CACHE_PRECISION": "f32"}'],
            "--kv_cache_precision u8 and --plugin_config KV_CACHE_PRECISION f32 disagree",
            "one",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_hint(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(*words)
    assert hint in (error.value.hint or "")


def test_a_missing_source_is_named() -> None:
    with pytest.raises(UsageError, match="--source_model"):
        parse_request(["text_generation"], "export_model.py")


@pytest.mark.parametrize("task", [[], ["image_generation", "--source_model", "x"]])
def test_another_task_is_refused(task: list[str]) -> None:
    with pytest.raises(UsageError, match="text_generation"):
        parse_request(task, "export_model.py")


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("org/sql", "org/sql", 1.0),
        ("org/sql=0.5", "org/sql", 0.5),
        ("runs/lr=1e-4/best", "runs/lr=1e-4/best", 1.0),
        ("runs/lr=1e-4/best=-2", "runs/lr=1e-4/best", -2.0),
    ],
)
def test_adapters_may_have_a_weight(text: str, source: str, weight: float) -> None:
    assert parse("--adapter", text, "--adapter", "b").adapters == (MergeSource(source, weight), MergeSource("b"))


@pytest.mark.parametrize(("words", "on"), [([], True), (["true"], True), (["false"], False)])
def test_prefix_caching_is_on_unless_it_is_said_to_be_off(words: list[str], on: bool) -> None:
    assert parse("--enable_prefix_caching", *words).engine.enable_prefix_caching is on
