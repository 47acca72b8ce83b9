"""The serving image, built and run: what is in it, what it may do, and that it answers. Runs with --image, as root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.docker.images import Container, Image, Images, running
from tests.real.client import PROMPT, ROOT
from tests.real.exports import export

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

WORKSPACE = "/workspace"
CONFIG = {
    "model_config_list": [
        {
            "config": {
                "name": "base_model",
                "base_path": "base_model",
                "lora_adapters": [{"alias": "sql", "path": "loras/sql"}],
            }
        }
    ]
}


@pytest.fixture(scope="module")
def image(images: Images) -> Image:
    return images.build("docker/Dockerfile")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that anyone may read: a base in int8, and an adapter for run time."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(export("int8_base"), folder / "base_model")
    shutil.copytree(ROOT / "examples" / "adapters" / "sql", folder / "loras" / "sql")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(image: Image, models: Path, *arguments: str, port: int, user: str | None = None) -> Iterator[Container]:
    """Run the image as OVMS's documentation runs OVMS's, and wait until it is healthy."""
    with running(
        image, "--rest_port", str(port), *arguments, volume=f"{models}:{WORKSPACE}:ro", user=user
    ) as container:
        until = time.monotonic() + 120
        while container.health().returncode != 0:
            assert container.process.poll() is None, container.log()
            assert time.monotonic() < until, container.log()
            time.sleep(0.2)
        yield container


def post(port: int, body: dict[str, Any], host: str = "127.0.0.1", path: str = "completions") -> Any:
    """Send a request; return the open answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{host}:{port}/v3/{path}", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def complete(port: int, model: str, host: str = "127.0.0.1") -> str:
    with post(port, {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}, host) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def chat(port: int) -> str:
    """Ask in the form that takes the model's chat template, which runs in a process of its own."""
    body = {"model": "base_model", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    with post(port, body | {"max_tokens": 24, "temperature": 0}, path="chat/completions") as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def test_the_image_is_small(image: Image) -> None:
    assert image.size < 400e6


@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "nncf", "optimum", "setuptools", "pip"])
def test_a_package_is_not_in_it(image: Image, package: str) -> None:
    found = [path for path in (image.root / "opt").rglob(f"{package}*") if path.parent.name == "site-packages"]
    assert found == []


@pytest.mark.parametrize("tool", ["cc", "gcc", "c++", "make", "git", "curl"])
def test_a_tool_is_not_in_it(image: Image, tool: str) -> None:
    assert [folder for folder in ("usr/bin", "usr/local/bin") if (image.root / folder / tool).exists()] == []


def test_another_list_of_packages_has_ray_and_the_libraries_of_object_stores(images: Images) -> None:
    image = images.build("docker/Dockerfile", PACKAGES="ray")
    (packages,) = (image.root / "opt/ovms-lora/lib").glob("python3*/site-packages")
    wanted = {"ovms_lora", "ray", "s3fs", "gcsfs", "adlfs"}
    assert wanted <= {path.name for path in packages.iterdir()}
    assert not (packages / "torch").exists()
    nobody = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    settings = [f"{name}={value}" for name, value in nobody.items()]
    check = [*image.enter(), *settings, "/opt/ovms-lora/bin/ovms-lora", "check", "s3://nobodys-bucket/sql"]
    asked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (asked.returncode, "ImportError" in asked.stderr) == (1, False), asked.stderr
    assert "cannot be read now" in asked.stderr


def test_nothing_of_the_build_is_left(image: Image) -> None:
    assert [path.name for path in (image.root / "opt").iterdir()] == ["ovms-lora"]
    left = ("requirements", "source", "wheels", "package", "etc/pip.conf", "root/.cache")
    assert [name for name in left if (image.root / name).exists()] == []


def test_the_documented_line_of_ovms_serves_base_and_adapter_under_a_read_only_root(image: Image, models: Path) -> None:
    port = free_port()
    with serving(image, models, "--config_path", f"{WORKSPACE}/config.json", port=port) as container:
        status = container.status()
        assert (status["Uid"], status["Gid"]) == (["10001"] * 4, ["10001"] * 4)
        assert (status["CapEff"], status["NoNewPrivs"]) == (["0" * 16], ["1"])
        for place in ("/opt/ovms-lora/x", f"{WORKSPACE}/x"):
            assert "Read-only file system" in container.execute(["touch", place], as_root=True).stderr
        # An address of the loopback range that only a listener on 0.0.0.0 has.
        base, sql = complete(port, "base_model", "127.0.0.2"), complete(port, "sql")
        assert base.strip()
        assert sql.strip().startswith("SELECT")
        assert base != sql
        assert "Paris" in chat(port)


def test_one_model_by_its_path_any_user_and_another_address(image: Image, models: Path) -> None:
    port = free_port()
    flags = ["--model_path", f"{WORKSPACE}/base_model", "--model_name", "m", "--log_level", "DEBUG"]
    flags += ["--rest_bind_address=127.0.0.1"]
    with serving(image, models, *flags, port=port, user="1234:5678") as container:
        assert container.status()["Uid"] == ["1234"] * 4
        assert complete(port, "m").strip()
        with pytest.raises(OSError, match="refused"):
            complete(port, "m", "127.0.0.2")


def test_sigterm_makes_it_unhealthy_lets_streams_end_and_exits_with_0(image: Image, models: Path) -> None:
    port = free_port()
    body = {"model": "base_model", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with serving(image, models, "--config_path", f"{WORKSPACE}/config.json", port=port) as container:
        with post(port, body) as stream:
            stream.readline()
            os.kill(container.pid, signal.SIGTERM)
            health = container.health()
            assert (health.returncode, health.stdout.rpartition(": ")[2]) == (1, "503\n")
            assert stream.read().endswith(b"data: [DONE]\n\n")
        assert container.process.wait(timeout=30) == 0, container.log()


def test_a_mistake_ends_it_with_an_error_and_a_hint(image: Image, models: Path) -> None:
    with running(image, "--rest_prot", "8000", volume=f"{models}:{WORKSPACE}:ro") as container:
        assert container.process.wait(timeout=30) == 2
        assert container.log() == "error: unknown flag --rest_prot\nhint: did you mean --rest_port?\n"
