"""The command line: flags, spellings, errors and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovms_lora import __version__, cli
from ovms_lora.server.model_source import ConfigFile, ModelSource, SingleModel
from ovms_lora.server.options import ServerOptions
from tests.server.serving import write_config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerOptions, ModelSource]]:
    started: list[tuple[ServerOptions, ModelSource]] = []

    def serve(options: ServerOptions, source: ModelSource, load: Any) -> None:
        started.append((options, source))

    monkeypatch.setattr("ovms_lora.server.serve.serve", serve)
    monkeypatch.delenv("API_KEY", raising=False)
    return started


Started = list[tuple[ServerOptions, ModelSource]]


def test_a_config_is_served(started: Started, tmp_path: Path) -> None:
    path = write_config(tmp_path, "a")
    assert cli.main(["serve", "--config_path", str(path), "--rest_port", "8123"]) == 0
    options, source = started[0]
    assert (options.host, options.port, options.poll_seconds) == ("127.0.0.1", 8123, 1.0)
    assert isinstance(source, ConfigFile)
    assert [spec.name for spec in source.read()] == ["a"]


@pytest.mark.parametrize("dash", ["-", "_"])
def test_both_spellings_of_a_flag_are_one(started: Started, tmp_path: Path, dash: str) -> None:
    flags = {
        "model_path": str(tmp_path),
        "model_name": "n",
        "plugin_config": '{"A": 1}',
        "rest_port": "1",
        "rest_bind_address": "::1",
        "file_system_poll_wait_seconds": "0",
        "log_level": "DEBUG",
        "allowed_origins": "http://a, http://b",
        "metrics_enable": "false",
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', dash)}", value)]
    assert cli.main(["serve", *arguments]) == 0
    options, source = started[0]
    assert options == ServerOptions(
        host="::1",
        port=1,
        poll_seconds=0,
        log_level="debug",
        allowed_origins=("http://a", "http://b"),
        metrics=False,
    )
    assert isinstance(source, SingleModel)
    (spec,) = source.read()
    assert (spec.name, spec.folder, spec.plugin_config) == ("n", tmp_path, {"A": 1})


def test_the_name_defaults_to_the_folders(started: Started, tmp_path: Path) -> None:
    assert cli.main(["serve", "--model_path", str(tmp_path / "base_model")]) == 0
    assert started[0][1].read()[0].name == "base_model"


def test_keys_of_a_file(started: Started, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n  two \n")
    assert cli.main(["serve", "--model_path", "m", "--api_key_file", str(path)]) == 0
    assert started[0][0].api_keys == ("one", "two")
    assert "one" not in repr(started[0][0])


def test_the_key_of_the_environment(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert cli.main(["serve", "--model_path", "m"]) == 0
    assert started[0][0].api_keys == ("secret",)


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        ([], 2, "the following arguments are required: command", None),
        (["serv"], 2, "invalid choice: 'serv'", "did you mean serve?"),
        (["serve", "--rest_prt", "1"], 2, "unknown flag --rest_prt", "did you mean --rest_port?"),
        (["serve", "--rest-prt=1"], 2, "unknown flag --rest-prt", "did you mean --rest-port?"),
        (["serve", "--zzz"], 2, "unknown flag --zzz", "ovms-lora serve --help lists the flags"),
        (["serve", "--rest_p", "1"], 2, "unknown flag --rest_p", "did you mean --rest_port?"),
        (["serve", "surplus"], 2, "unknown argument surplus", None),
        (["serve"], 2, "give either --config_path or --model_path", "--config_path models/config.json"),
        (["serve", "--config_path", "a", "--model_path", "b"], 2, "give either --config_path or --model_path", None),
        (["serve", "--config_path", "a", "--model_name", "b"], 2, "go with --model_path only", None),
        (["serve", "--rest_port", "x"], 2, "'x' is not a port", None),
        (["serve", "--rest_port", "65536"], 2, "'65536' is not a port", None),
        (["serve", "--rest_port"], 2, "expected one argument", None),
        (["serve", "--file_system_poll_wait_seconds", "nan"], 2, "'nan' is not a number of seconds", None),
        (["serve", "--log_level", "loud"], 2, "'loud' is not one of", None),
        (["serve", "--metrics_enable", "maybe"], 2, "'maybe' is neither true nor false", None),
        (["serve", "--model_path", "m", "--plugin_config", "{"], 2, "--plugin_config is not valid JSON", None),
        (["serve", "--model_path", "m", "--plugin_config", "[]"], 2, "--plugin_config must be a JSON object", None),
        (["serve", "--model_path", "m", "--api_key_file", "nope"], 2, "cannot read --api_key_file nope", "text file"),
        (["serve", "--model_path", "m", "--model_name", "a b"], 1, "model name 'a b' is not valid", "matches"),
    ],
)
def test_misuse(
    started: Started, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, error: str, hint: str | None
) -> None:
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    first, *rest = err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert out == ""
    if hint:
        assert len(rest) == 1
        assert rest[0].startswith("hint: ")
        assert hint in rest[0]
    assert not started


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", "is not valid JSON"), ("[]", "must hold a JSON object"), ('{"models": []}', "models")],
)
def test_a_broken_config_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["serve", "--config_path", str(path)]) == 1
    assert error in capsys.readouterr().err


def test_a_missing_config_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["serve", "--config_path", str(tmp_path / "nope.json")]) == 1
    assert capsys.readouterr().err.splitlines()[1] == "hint: give --config_path an existing file"


def test_an_empty_key_file_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("\n")
    assert cli.main(["serve", "--model_path", "m", "--api_key_file", str(path)]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], __version__),
        (["--help"], "serve"),
        (["serve", "--help"], "rest_port"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


def test_export_has_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def export_main(arguments: Any) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setattr("ovms_lora.export.cli.main", export_main)
    assert cli.main(["export", "text_generation", "--source_model", "x"]) == 3
    assert seen == [["text_generation", "--source_model", "x"]]
