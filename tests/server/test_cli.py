"""The command line: flags, spellings, errors and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovms_lora import __version__, cli
from ovms_lora.core.config import LoraOptions
from ovms_lora.core.speculation import parse_speculative_config
from ovms_lora.server.keys import plain_keys
from ovms_lora.server.model_source import ConfigFile, ModelSource, ModelSpec, SingleModel
from ovms_lora.server.options import ServerOptions
from tests.server.serving import FakeGraphs, write_adapters, write_config, write_lora_config


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


@pytest.mark.parametrize(
    ("monitoring", "flags", "metrics"),
    [
        ({}, [], True),
        ({"metrics": {"enable": True}}, [], True),
        ({"metrics": {"enable": False}}, [], False),
        ({"metrics": {"enable": False}}, ["--metrics_enable"], True),
        ({"metrics": {"enable": True}}, ["--metrics_enable", "false"], False),
    ],
)
def test_the_config_may_turn_metrics_off(
    started: Started, tmp_path: Path, monitoring: Any, flags: list[str], metrics: bool
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_config_list": [], "monitoring": monitoring}))
    assert cli.main(["serve", "--config_path", str(path), *flags]) == 0
    assert started[0][0].metrics is metrics


@pytest.mark.parametrize("dash", ["-", "_"])
def test_both_spellings_of_a_flag_are_one(started: Started, tmp_path: Path, dash: str) -> None:
    flags = {
        "model_path": str(tmp_path),
        "model_name": "n",
        "plugin_config": '{"A": 1}',
        "speculative_config": '{"model": "d", "num_speculative_tokens": 4}',
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
    assert spec.speculation == parse_speculative_config({"model": "d", "num_speculative_tokens": 4})


def test_the_name_defaults_to_the_folders(started: Started, tmp_path: Path) -> None:
    assert cli.main(["serve", "--model_path", str(tmp_path / "base_model")]) == 0
    assert started[0][1].read()[0].name == "base_model"


def test_keys_of_a_file(started: Started, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n  two \n")
    assert cli.main(["serve", "--model_path", "m", "--api_key_file", str(path)]) == 0
    assert started[0][0].api_keys == plain_keys("one", "two")
    assert "one" not in repr(started[0][0])


def test_the_key_of_the_environment(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert cli.main(["serve", "--model_path", "m"]) == 0
    assert started[0][0].api_keys == plain_keys("secret")


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
        (
            ["serve", "--model_path", "m", "--speculative_config", "{}"],
            2,
            "num_speculative_tokens: is missing",
            "add it",
        ),
        (
            ["serve", "--model_path", "m", "--speculative-config", "{"],
            2,
            "--speculative_config is not valid JSON",
            None,
        ),
        (["serve", "--config_path", "c", "--speculative-config", "{}"], 2, "--speculative_config go with", None),
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
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {path}")
    assert error in first
    assert second.startswith("hint: ")


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

    def export_main(arguments: Any, *, prog: str) -> int:
        seen.append((prog, arguments))
        return 3

    monkeypatch.setattr("ovms_lora.export.cli.main", export_main)
    assert cli.main(["export", "text_generation", "--source_model", "x"]) == 3
    assert seen == [("ovms-lora export", ["text_generation", "--source_model", "x"])]


def spec_of(started: Started) -> ModelSpec:
    (spec,) = started[-1][1].read()
    return spec


@pytest.mark.parametrize("dash", ["-", "_"])
def test_flags_of_adapters(started: Started, tmp_path: Path, dash: str) -> None:
    flags = [
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "16", "--max-cpu-loras", "5"),
        *("--lora-total-rank", "48", "--lora-dtype", "f32", "--dynamic-lora-loading-path", str(tmp_path)),
        *("--lora-modules", "a=loras/a", '{"name": "b", "path": "/b", "base_model_name": "m"}'),
        *("--lora-modules", '[{"name": "c", "path": "/c"}]'),
        *("--allow-runtime-lora-updating", "--lora-path-prefix", str(tmp_path)),
    ]
    flags = [flag.replace("-", dash).replace(dash * 2, "--", 1) if flag.startswith("--") else flag for flag in flags]
    assert cli.main(["serve", "--model_path", "m", *flags]) == 0
    lora = spec_of(started).lora
    assert lora is not None
    assert lora.options == LoraOptions(max_loras=3, max_lora_rank=16, max_cpu_loras=5, total_rank=48, lora_dtype="f32")
    assert [(spec.alias, spec.folder) for spec in lora.adapters] == [
        ("a", Path("loras/a").absolute()),
        ("b", Path("/b")),
        ("c", Path("/c")),
    ]
    assert lora.loading_path == tmp_path
    options = started[-1][0]
    assert options.runtime_lora_updating
    assert options.lora_path_prefixes == (tmp_path,)


def test_flags_are_defaults_for_the_adapters_of_a_config(started: Started, tmp_path: Path) -> None:
    path = write_lora_config(tmp_path, lora_options={"max_loras": 2})
    arguments = ["serve", "--config_path", str(path), "--max-loras", "5", "--max-lora-rank", "32", "--lora-modules"]
    assert cli.main([*arguments, "extra=/x"]) == 0
    plain, base = started[0][1].read()
    assert plain.lora is None
    assert base.lora is not None
    assert (base.lora.options.max_loras, base.lora.options.max_lora_rank) == (2, 32)
    assert base.aliases == ("sql", "tools", "extra", "mix")
    assert base.lora.adapters[0].folder == tmp_path / "loras" / "sql"
    assert started[0][0].lora_path_prefixes == (tmp_path,)
    assert cli.main(["serve", "--config_path", str(path), "--enable-lora"]) == 0
    assert all(spec.lora for spec in started[1][1].read())


def test_admin_keys(started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("secret")
    assert cli.main(["serve", "--model_path", "m", "--admin_key_file", str(path)]) == 0
    monkeypatch.setenv("ADMIN_API_KEY", "other")
    assert cli.main(["serve", "--model_path", "m"]) == 0
    assert [options.admin_keys for options, _ in started] == [plain_keys("secret"), plain_keys("other")]


@pytest.mark.parametrize(
    ("flags", "code", "error", "hint"),
    [
        (["--max-loras", "0"], 2, "'0' is not a number of 1 or more", None),
        (["--max-loras", "3"], 2, "without --enable-lora", "add --enable-lora"),
        (["--enable-lora", "--lora-modules", "sql"], 2, "'sql' is not name=path", "write sql=loras/sql"),
        (["--enable-lora", "--lora-modules", "{"], 2, "is not valid JSON", None),
        (["--enable-lora", "--lora-modules", '{"name": "a", "paht": "b"}'], 2, "takes objects of name", None),
        (["--enable-lora", "--lora-modules", "a b=c"], 1, "adapter alias 'a b' is not valid", None),
        (["--enable-lora", "--lora-modules", "text=c"], 1, "adapter alias 'text' is reserved", None),
        (["--enable-lora", "--lora-modules", "m=c"], 1, "the name 'm' is used twice", None),
        (["--enable-lora", "--max-lora-rank", "257"], 1, "lora_options of 'm'", None),
        (["--enable-lora", "--lora-dtype", "f64"], 2, "invalid choice: 'f64'", None),
        (
            ["--enable-lora", "--dynamic-lora-loading-path", "ftp://bucket/loras"],
            2,
            "adapters are not loaded from ftp://",
            "s3://bucket/loras",
        ),
        (["--lora-path-prefix", "/"], 2, "needs --allow-runtime-lora-updating", None),
        (["--allow-runtime-lora-updating", "--lora-path-prefix", "/nope"], 2, "/nope is not a folder", None),
    ],
)
def test_misuse_of_the_flags_of_adapters(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
    error: str,
    hint: str | None,
) -> None:
    def serve(_: ServerOptions, source: ModelSource, __: Any) -> None:
        source.read()

    monkeypatch.setattr("ovms_lora.server.serve.serve", serve)
    assert cli.main(["serve", "--model_path", "m", *flags]) == code
    err = capsys.readouterr().err
    assert error in err
    assert (hint or "") in err


def test_check_of_an_adapter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_adapters(tmp_path, "sql") / "sql"
    assert cli.main(["check", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("adapter of rank 2 for 4 linear layers, float32")
    assert err == ""
    (folder / "adapter_model.safetensors").unlink()
    assert cli.main(["check", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.startswith("error: ")) == ("", True)


def test_check_against_a_base_and_of_a_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovms_lora.check.GraphSource", lambda folder, options: FakeGraphs())
    monkeypatch.setattr("ovms_lora.check.Tokenizer", SimpleNamespace(from_folder=lambda folder: None))
    path = write_lora_config(tmp_path)
    for name in ("plain", "base"):
        (tmp_path / name).mkdir()
    assert cli.main(["check", str(tmp_path / "loras" / "sql"), "--base", str(tmp_path / "base")]) == 0
    assert f"fits {tmp_path / 'base'}" in capsys.readouterr().out
    assert cli.main(["check", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "plain",
        "base",
        "base:sql",
        "base:tools",
        "base:mix",
        str(path),
    ]
    (tmp_path / "loras" / "tools" / "adapter_config.json").write_text("{}")
    assert cli.main(["check", str(path)]) == 1
    assert "adapter 'tools' of 'base'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["{}/nope"], 1, "does not exist"),
        (["{}"], 1, "error: "),
        (["{}/config.json"], 1, "is not valid JSON"),
        (["{}/config.json", "--base", "{}"], 2, "--base goes with an adapter folder"),
        (["{}", "--base", "{}/nope"], 1, "is not a folder"),
        ([], 2, "required: PATH"),
    ],
)
def test_check_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], code: int, error: str
) -> None:
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["check", *(argument.format(tmp_path) for argument in arguments)]) == code
    assert error in capsys.readouterr().err
