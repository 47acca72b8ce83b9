"""The flags of `ovms-lora ray`, and the same as `args` of a Serve config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovms_lora import cli
from ovms_lora.core.errors import UsageError
from ovms_lora.scale.config import ScaleConfig
from ovms_lora.scale.flags import config_of, ray_parser, scale_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_config_list": []}))
    return path


def parsed(*flags: object) -> ScaleConfig:
    return scale_config(ray_parser().parse_all([str(flag) for flag in flags]))


@pytest.mark.parametrize(
    ("flags", "scaling"),
    [
        ((), {"num_replicas": 1}),
        (("--num_replicas", 3), {"num_replicas": 3}),
        (("--max-replicas", 4), {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16}),
        (
            ("--min_replicas", 2, "--max_replicas", 4, "--target_ongoing_requests", 8),
            {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 8},
        ),
    ],
)
def test_how_many_replicas(config_path: Path, flags: tuple[object, ...], scaling: dict[str, Any]) -> None:
    told = parsed("--config_path", config_path, *flags).scaling
    assert told.get("autoscaling_config", told) == scaling


def test_more_of_serves_own_settings(config_path: Path) -> None:
    told = parsed("--config_path", config_path, "--max_replicas", 2, "--autoscaling_config", '{"upscale_delay_s": 3}')
    assert told.scaling["autoscaling_config"]["upscale_delay_s"] == 3


def test_adapters_per_replica_are_max_loras(config_path: Path) -> None:
    flags = ["--config_path", str(config_path), "--max_num_adapters_per_replica", "5"]
    assert ray_parser().parse_all(flags).max_loras == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_replicas", 1, "--max_replicas", 2), "beside --min_replicas or --max_replicas"),
        (("--min_replicas", 2), "--min_replicas needs --max_replicas"),
        (("--min_replicas", 3, "--max_replicas", 2), "is more than"),
        (("--num_replicas", 0), "not a number of 1 or more"),
        (("--num_cpus", "nan"), "not a number of processors"),
        (("--autoscaling_config", '{"upscale_delay_s": 3}'), "goes with --max_replicas only"),
        (("--autoscaling_config", "["), "not valid JSON"),
        (("--max_replicas", 2, "--autoscaling_config", '{"max_replicas": 3}'), "does not stand in"),
    ],
)
def test_misuse(config_path: Path, flags: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parsed("--config_path", config_path, *flags)


def test_a_file_for_serve_has_the_flags_as_keys(config_path: Path) -> None:
    args = {
        "config_path": str(config_path),
        "max_replicas": 3,
        "num_cpus": 0.5,
        "autoscaling_config": {"upscale_delay_s": 1},
        "limit": ["drain_seconds=5", "body_bytes=100"],
        "allow_runtime_lora_updating": True,
        "metrics_enable": True,
    }
    told = config_of(args)
    assert (told.max_replicas, told.num_cpus, told.autoscaling) == (3, 0.5, {"upscale_delay_s": 1})
    assert (told.options.limits.drain_seconds, told.options.limits.body_bytes) == (5, 100)
    assert told.options.runtime_lora_updating
    assert not config_of({**args, "allow_runtime_lora_updating": False}).options.runtime_lora_updating


@pytest.mark.parametrize(
    ("args", "message"), [({"rest_port": 1}, "does not stand in args"), ({"num_replica": 1}, "unknown flag")]
)
def test_a_file_with_what_is_not_for_it(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        config_of({"config_path": "config.json", **args})
    assert error.value.hint


def test_the_file_in_config_is_one() -> None:
    application = yaml.safe_load((ROOT / "config" / "ray.yaml").read_text())["applications"][0]
    assert application["import_path"] == "ovms_lora.scale:build_app"
    arguments = ray_parser().parse_all([f"--{key}={value}" for key, value in application["args"].items()])
    assert (arguments.min_replicas, arguments.max_replicas) == (1, 4)


def test_without_ray_the_command_says_what_to_install(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda _name: None)
    assert cli.main(["ray", "--config_path", str(config_path)]) == 2
    assert 'hint: pip install "ovms-lora[ray]"' in capsys.readouterr().err
