"""The documentation says what is so: generated files, commands, requests, endpoints, links, the tree of the README."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import replica_profile
from ovms_lora import cli
from ovms_lora.core.config import parse_server_config, read_server_config
from ovms_lora.export import repository_cli
from ovms_lora.export.arguments import parse_request
from ovms_lora.scale.flags import ray_parser
from ovms_lora.scale.plan.plan_cli import plan_parser, scenario_of
from ovms_lora.server import v1_fields, v3_fields
from ovms_lora.server.app import build_app
from ovms_lora.server.model_source import SingleModel
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.serve_flags import model_source, serve_parser
from tests.server.serving import FakeModels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
WITH_COMMANDS = [page for page in PAGES if "```sh" in page.read_text(encoding="utf-8")]


@cache
def module(path: str) -> ModuleType:
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[loaded.__name__] = loaded  # dataclasses look there
    spec.loader.exec_module(loaded)
    return loaded


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the shell commands of a page as words; a quoted text may span lines."""
    for block in blocks(page.read_text(encoding="utf-8"), "sh"):
        text = ""
        for line in block.splitlines():
            if not text and (not line.strip() or line.lstrip().startswith("#")):
                continue
            text += line.removesuffix("\\") if line.endswith("\\") else line + "\n"
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(text)
            except ValueError:  # within a quotation
                continue
            text = ""
            yield words
        assert not text, f"{page.name}: a quotation is not closed in {block!r}"


def run_of(words: list[str]) -> list[str]:
    """Return a command without the environment that stands before it."""
    return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def check_command(words: list[str]) -> None:
    """Fail for a command that does not exist, or that its own parser refuses."""
    match run_of(words):
        case ["make", *arguments]:
            verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in arguments if "=" not in word} <= set(verbs)
        case ["curl", *_]:
            request_of(words)
        case [".venv/bin/python", "export_model.py", *arguments] | [".venv/bin/ovms-lora", "export", *arguments]:
            parse_request(arguments, "export_model.py")
        case [".venv/bin/ovms-lora", "serve" | "ray" as verb, *arguments]:
            model_source((serve_parser() if verb == "serve" else ray_parser()).parse_all(arguments))
        case [".venv/bin/ovms-lora", "check", *arguments]:
            cli._check_parser().parse_all(arguments)
        case [".venv/bin/ovms-lora", "list" | "remove" as verb, *arguments]:
            (repository_cli.list_parser() if verb == "list" else repository_cli.remove_parser()).parse_all(arguments)
        case [".venv/bin/ovms-lora", "plan", *arguments]:
            scenario_of(plan_parser().parse_all(arguments))
        case [".venv/bin/python", "-m", "bench.replica_profile", *arguments]:
            replica_profile.parser().parse_args(arguments)
        case ["python3", "-m", "venv", ".venv"] | ["docker", *_]:
            pass  # docker: tests/docker/test_docker_files.py
        case (
            ["export", "RAY_AUTH_MODE=token"]
            | [".venv/bin/ray", "get-auth-token", "--generate"]
            | [".venv/bin/ray", "start", "--head"]
            | [".venv/bin/serve", "deploy", "config/ray.yaml"]
        ):
            pass  # tests/scale/test_flags.py
        case [".venv/bin/pip", "install", *arguments]:
            lists = [word for word in arguments if word.endswith(".txt")]
            assert all((ROOT / name).is_file() for name in lists)
        case unknown:
            pytest.fail(f"not a command that this test knows: {shlex.join(unknown)}")


def request_of(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a curl command."""
    urls = [word for word in words if word.startswith("http://localhost:8000/")]
    assert len(urls) == 1
    assert "Content-Type: application/json" in words
    body = json.loads(words[words.index("-d") + 1])
    return urls[0].removeprefix("http://localhost:8000"), body


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Return the curl requests of the README."""
    return [request_of(words) for words in commands(ROOT / "README.md") if words[0] == "curl"]


@pytest.mark.parametrize("path", ["docs/cli.md", "docs/metrics.md", "config/config.schema.json"])
def test_a_generated_file_is_up_to_date(path: str) -> None:
    text = module("docs/generate.py").generated()[ROOT / path]
    assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is old: run make docs"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_exist_and_take_their_flags(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def test_the_verbs_are_described() -> None:
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    described = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(verbs) - {"help"} == set(described)


def test_the_demo_sends_the_first_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []

    def answer(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert isinstance(request.data, bytes)
        sent.append((request.full_url.removeprefix("http://127.0.0.1:8000"), json.loads(request.data)))
        return io.BytesIO(b'{"choices": [{"text": ""}]}')

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    demo = module("examples/demo.py")
    demo.ask_together(8000)
    first = requests()[:3]
    assert [body["model"] for _, body in first] == ["base_model", "merged_model", "tools"]
    assert [each for each in first if each not in sent] == []


def test_the_readme_shows_who_answers_in_the_demo() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", README.partition("## What you see")[2].partition("\n## ")[0], re.MULTILINE)
    assert shown == [question.model for question in module("examples/demo.py").QUESTIONS]


def test_the_requests_have_only_known_fields() -> None:
    known = {
        "/v3/completions": v3_fields.COMPLETIONS.names,
        "/v1/completions": v1_fields.COMPLETIONS.names,
        "/v1/chat/completions": v1_fields.CHAT.names,
        "/v1/load_lora_adapter": {"lora_name", "lora_path", "base_model_name", "load_inplace", "pinned"},
    }
    for path, body in requests():
        assert set(body) - {"model"} <= set(known[path]), path


def test_the_endpoints_are_those_of_the_server() -> None:
    options = ServerOptions(runtime_lora_updating=True)
    paths = build_app(options, SingleModel("m", Path("m"), {}), FakeModels()).openapi()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    rows = re.findall(r"^\| (GET|POST) \| (.*?) \|", README, re.MULTILINE)
    assert {(method, path) for method, cell in rows for path in re.findall(r"`(/.*?)`", cell)} == served


def test_the_python_examples_compile() -> None:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "python"):
            compile(block, page.name, "exec")


def test_the_configuration_examples_are_valid() -> None:
    for block in blocks(README, "json"):
        assert parse_server_config(block).models
    for path in (ROOT / "config").glob("*.json"):
        if path.name != "config.schema.json":
            assert read_server_config(path).models


def test_the_adapters_of_the_configuration_examples_exist() -> None:
    for path in (ROOT / "config").glob("*.json"):
        if path.name != "config.schema.json":
            for model in read_server_config(path).models:
                assert (path.parent / model.base_path).resolve().parent == ROOT / "models"
                for adapter in model.lora_adapters:
                    assert (path.parent / adapter.path / "adapter_config.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|txt|sh))`", page.read_text(encoding="utf-8")):
        roots = (ROOT, ROOT / "ovms_lora", page.parent)
        assert any((root / name).exists() for root in roots), name


def tree() -> dict[str, str]:
    """Return the paths of the README's tree, each with its remark."""
    rows: dict[str, str] = {}
    parents: list[str] = []
    for line in blocks(README, "text")[-1].splitlines():
        name, _, remark = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        rows["".join(parents[:depth]) + name] = remark.strip()
        parents[depth:] = [name]
    return rows


def tracked() -> list[str]:
    """Return the files of the repository: those that git knows, or all of the package outside of a checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    return [str(path.relative_to(ROOT)) for path in (ROOT / "ovms_lora").rglob("*.py")]


def test_the_tree_names_every_file() -> None:
    wanted = {
        name
        for name in tracked()
        if "/" not in name or re.match(r"(ovms_lora|docs|config|docker|requirements)/|examples/[^/]*$", name)
    }
    assert wanted - tree().keys() == set()


def test_the_tree_names_only_what_exists_with_a_remark() -> None:
    for name, remark in tree().items():
        assert (ROOT / name).exists(), name
        assert remark or name.endswith("/"), name


def test_the_tree_is_the_end_of_the_readme() -> None:
    assert README.rstrip().endswith("```")
    assert "## The whole tree" in README.rpartition("```text")[0].splitlines()[-2:]
