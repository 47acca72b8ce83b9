"""Dockerfiles, compose file and context: what they promise can be read in them."""

from __future__ import annotations

import re
import shlex
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovms_lora import __version__, cli
from ovms_lora.export.arguments import parse_request
from ovms_lora.server.serve_flags import model_source, serve_parser
from tests.docker.images import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.export")


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def last_stage(name: str) -> dict[str, str]:
    """Return the instructions of the stage that becomes the image; of several alike, the last."""
    found = instructions(name)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return dict(found[start:])


def entry(name: str) -> list[str]:
    words = yaml.safe_load(last_stage(name)["ENTRYPOINT"])
    assert words[0] == "/opt/ovms-lora/bin/ovms-lora"
    return list(words[1:])


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_stage_begins_at_the_base_that_the_caller_names(name: str) -> None:
    stages: set[str] = set()
    for word, rest in instructions(name):
        if word == "FROM":
            source, _, stage = rest.partition(" AS ")
            assert source == "${BASE_IMAGE}" or source in stages
            stages.add(stage)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_base_has_a_version(name: str) -> None:
    (base,) = (rest for word, rest in instructions(name) if word == "ARG" and rest.startswith("BASE_IMAGE="))
    tag = base.rpartition(":")[2]
    assert re.match(r"3\.\d+-", tag)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_user_is_a_number_and_not_root(name: str) -> None:
    uid, gid = last_stage(name)["USER"].split(":")
    assert int(uid) >= 1000
    assert int(gid) >= 1000


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_the_context_leaves_out_is_not_copied(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    for word, rest in instructions(name):
        if word == "COPY" and not rest.startswith("--from="):
            sources = [rest.replace("${PACKAGES}", packages).split()[:-1] for packages in ("serve", "ray")]
            for source in chain.from_iterable(sources):
                assert (ROOT / source).exists()
                assert any(source == path or source.startswith(f"{path}/") for path in kept), source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_packages_come_from_the_locks_with_hashes(name: str) -> None:
    lists = []
    for word, rest in instructions(name):
        for command in rest.split(" && ") if word == "RUN" else ():
            if "/pip " in command and " install " in command:
                locked = "--require-hashes" in command or "--no-index" in command
                assert locked or command.rstrip().endswith('"${TORCH}"'), command
                lists += re.findall(r"-r /(\S+)", command)
    wanted = "requirements/${PACKAGES}.txt" if name == "Dockerfile" else "requirements/export.txt"
    assert lists == ["requirements/build.txt", wanted]


def test_the_exporter_image_has_the_torch_of_the_makefile() -> None:
    (torch,) = re.findall(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert ("ARG", f"TORCH={torch}") in instructions("Dockerfile.export")


def test_the_build_list_is_part_of_the_resolution() -> None:
    wanted = (ROOT / "requirements" / "build.txt").read_text(encoding="utf-8").strip()
    assert wanted in (ROOT / "requirements" / "export.txt").read_text(encoding="utf-8")


def test_the_serving_image_has_a_health_command_that_is_in_it() -> None:
    health = last_stage("Dockerfile")["HEALTHCHECK"]
    words = yaml.safe_load(health.partition(" CMD ")[2])
    assert words == ["/opt/ovms-lora/bin/python", "/opt/ovms-lora/healthcheck.py"]
    assert ("COPY", f"docker/healthcheck.py {words[1]}") in instructions("Dockerfile")
    assert compose()["services"]["serve"]["healthcheck"]["test"] == ["CMD", *words]


@pytest.mark.parametrize(("given", "address"), [([], "0.0.0.0"), (["--rest-bind-address", "127.0.0.1"], "127.0.0.1")])
def test_the_server_of_the_image_listens_everywhere_unless_told_otherwise(given: list[str], address: str) -> None:
    command, *flags = entry("Dockerfile")
    assert command == "serve"
    assert serve_parser().parse_all([*flags, *given]).rest_bind_address == address


def test_the_services_take_their_commands() -> None:
    serve, export = (compose()["services"][name]["command"] for name in ("serve", "export"))
    flags = serve_parser().parse_all([*entry("Dockerfile")[1:], *serve])
    assert model_source(flags)
    assert entry("Dockerfile.export") == ["export"]
    request = parse_request(["org/base" if word.startswith("$") else word for word in export], "export").request
    assert request.model_name == "base_model"
    # The server reads the file that the exporter writes.
    assert flags.config_path == request.config_file


@pytest.mark.parametrize("name", ["serve", "export"])
def test_a_service_is_locked_down(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "user", "network_mode", "cap_add"} & service.keys()
    assert service["image"].rpartition(":")[2] == __version__
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()


def test_the_served_models_are_read_only_and_the_port_is_this_machines() -> None:
    serve = compose()["services"]["serve"]
    assert serve["volumes"] == ["models:/workspace:ro"]
    assert serve["ports"] == ["127.0.0.1:8000:8000"]
    assert serve["depends_on"] == {"export": {"condition": "service_completed_successfully"}}


def docker_lines() -> list[list[str]]:
    """Return the `docker` commands of README.md and docs/docker.md as words."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "docker.md")]
    lines = [line for text in texts for line in re.sub(r"\\\n", "", text).splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(\w+=\S+ )?docker ", line)]


def image_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Return the image of a `docker run` line and what stands after it."""
    at = next(i for i, word in enumerate(words) if re.fullmatch(r"ovms-lora(-export)?:\S+", word))
    return words[at], words[at + 1 :]


def test_the_documented_lines_take_flags_that_exist() -> None:
    seen: set[str] = set()
    for words in docker_lines():
        if words[:2] != ["docker", "run"]:
            continue
        image, arguments = image_and_arguments(words)
        name, _, version = image.partition(":")
        assert version == __version__
        seen.add(name)
        if "--entrypoint" in words:
            assert words[words.index("--entrypoint") + 1] == "ovms-lora"
            cli._check_parser().parse_all(arguments[1:])
        elif name == "ovms-lora":
            model_source(serve_parser().parse_all([*entry("Dockerfile")[1:], *arguments]))
        else:
            parse_request(arguments, "ovms-lora export")
    assert seen == {"ovms-lora", "ovms-lora-export"}


def test_the_documented_builds_name_files_that_exist() -> None:
    builds = [words for words in docker_lines() if "build" in words]
    assert {words[words.index("--file") + 1] for words in builds} == {f"docker/{name}" for name in DOCKERFILES}
    for words in builds:
        assert words[-1] == "."
        assert Path(words[words.index("--tag") + 1]).name.endswith(f":{__version__}")
