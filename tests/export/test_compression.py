"""`--extra_quantization_params`: optimum-cli's flags, refused by name where they mean nothing."""

from pathlib import Path

import pytest

from ovms_lora.core.errors import UsageError
from ovms_lora.export.arguments import parse_request
from ovms_lora.export.compression import Compression, default_compression, default_format, parse_compression
from ovms_lora.export.request import ExportRequest
from ovms_lora.export.weight_format import WeightFormat


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "my samples.txt"
    path.write_text("one\ntwo\n")
    return path


def parse(*flags: str) -> ExportRequest:
    return parse_request(["text_generation", "--source_model", "org/base", *flags], "export_model.py").request


def test_the_example_of_ovms_is_understood(dataset: Path) -> None:
    text = f"--sym --group-size -1 --ratio 1.0 --awq --scale-estimation --dataset '{dataset}'"
    assert parse_compression(text) == Compression(
        sym=True, group_size=-1, ratio=1.0, awq=True, scale_estimation=True, dataset=dataset
    )


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", {}),
        ("--group_size 64", {"group_size": 64}),
        ("--ratio 0.8 --all-layers", {"ratio": 0.8, "all_layers": True}),
        (
            "--backup-precision none --gptq --num-samples 4",
            {"backup_precision": "none", "gptq": True, "num_samples": 4},
        ),
        ("--group-size-fallback ignore", {"group_size_fallback": "ignore"}),
        ("--sensitivity-metric max_activation_variance", {"sensitivity_metric": "max_activation_variance"}),
    ],
)
def test_what_is_chosen(text: str, chosen: dict[str, object]) -> None:
    assert parse_compression(text).chosen == chosen


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("--frobnicate 3", "unknown flag --frobnicate", "--group-size"),
        ("--group-sise 64", "unknown flag --group-sise", "did you mean --group-size?"),
        ("--lora-correction", "unknown flag --lora-correction", "known are"),
        ("64", "unknown argument 64", "known are"),
        ("--group-size 0", "'0' is not a whole number of at least 1", ""),
        ("--ratio 1.5", "'1.5' is not a number from 0 to 1", ""),
        ("--ratio nan", "'nan' is not a number from 0 to 1", ""),
        ("--backup-precision int2", "invalid choice: 'int2'", "known are"),
        ("--dataset wikitext2", "'wikitext2' is not a file: datasets are not fetched", ""),
        ("--dataset 'x", "No closing quotation", "shell"),
    ],
)
def test_what_is_not_known_is_named(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match="--extra_quantization_params: ") as error:
        parse("--weight-format", "int4", "--extra_quantization_params", text)
    assert message in error.value.message
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize(
    ("weight_format", "text", "message"),
    [
        ("fp16", "--sym", "--sym: fp16 weights are not compressed"),
        ("bf16", "--ratio 1.0", "--ratio 1.0: bf16 weights are not compressed"),
        ("int8", "--group-size 64", "--group-size 64 is not for int8"),
        ("int8", "--awq", "--awq is not for int8"),
        ("int8", "--ratio 0.5", "--ratio 0.5 is not for int8"),
        ("int4", "--scale-estimation", "--scale-estimation needs --dataset"),
        ("int4", "--gptq", "--gptq needs --dataset"),
        ("int4", "--num-samples 4", "--num-samples needs --dataset"),
        ("int4", "--ratio 0.5 --sensitivity-metric hessian_input_activation", "--sensitivity-metric needs --dataset"),
        ("int4", "--sensitivity-metric weight_quantization_error", "--sensitivity-metric is used by nothing"),
        ("int4", "--dataset DATA", "--dataset is used by nothing"),
        ("int4", "--dataset DATA --ratio 0.5 --sensitivity-metric weight_quantization_error", "used by nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(weight_format: str, text: str, message: str, dataset: Path) -> None:
    text = text.replace("DATA", f"'{dataset}'")
    with pytest.raises(UsageError, match=message) as error:
        parse("--weight-format", weight_format, "--extra_quantization_params", text)
    assert error.value.hint


@pytest.mark.parametrize("text", ["", "--sym", "--sym --group-size -1 --ratio 1.0"])
def test_int8_may_be_symmetric(text: str) -> None:
    compression = parse("--extra_quantization_params", text).compression
    assert compression is not None and compression.sym is ("--sym" in text)


@pytest.mark.parametrize("words", [["--extra_quantization_params", "--sym"], ["--extra-quantization-params=--sym"]])
def test_a_value_of_one_flag_is_still_a_value(words: list[str]) -> None:
    assert parse("--weight-format", "int4", *words).compression == Compression(sym=True)


def test_an_npu_takes_int4_with_one_scale_for_each_channel_as_in_ovms() -> None:
    request = parse("--target_device", "NPU")
    assert (request.weight_format, request.compression) == (None, None)
    assert default_format("NPU") is WeightFormat.INT4
    assert default_compression("NPU") == Compression(sym=True, ratio=1.0, group_size=-1)
    request = parse("--target_device", "NPU", "--extra_quantization_params", "--sym --group-size 128")
    assert request.compression == Compression(sym=True, group_size=128)
    with pytest.raises(UsageError, match="an NPU runs int4 weights, not int8"):
        parse("--target_device", "NPU", "--weight-format", "int8")


def test_a_split_over_devices_is_a_pipeline_as_in_ovms() -> None:
    engine = parse("--target_device", "HETERO:GPU.0,GPU.1").engine
    assert engine.plugin_config == {"MODEL_DISTRIBUTION_POLICY": "PIPELINE_PARALLEL"}
