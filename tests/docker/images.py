"""Builds images and runs containers without a container engine: buildah, a base of debootstrap's, and namespaces.

Owns: the store of one test session, which is removed with all that it holds; and containers, each an image's own file
system, user, environment and entry, under a read-only root, in a process namespace of its own, on the host's network.
Needs root, as buildah's chroot isolation does. Does not know: what the images are for.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
_BASE = "localhost/base:bookworm"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# What a container engine sets up, with `docker run --read-only --tmpfs /tmp --security-opt no-new-privileges`.
_START = """
root=$1 source=$2 target=$root$3 mode=$4
shift 4
mount --bind "$root" "$root"
mount --options remount,bind,ro "$root"
mount --types proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount --types tmpfs --options size=64m tmpfs "$root/tmp"
mount --bind "$source" "$target"
mount --options "remount,bind,$mode" "$target"
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its file system, and what it says of itself."""

    root: Path
    config: Mapping[str, Any]
    size: int
    """Bytes of its layers, uncompressed, without those of the base."""

    def enter(self, user: str | None = None) -> list[str]:
        """Return the words that put a command into the image's file system, as its user, with its environment alone."""
        uid, gid = (user or self.config["User"]).split(":")
        chroot = ["chroot", f"--userspec={uid}:{gid}", "--groups=", str(self.root)]
        environment = ["env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}", *self.config["Env"]]
        return ["setpriv", "--no-new-privs", *chroot, *environment]


class Container:
    """A running container; `pid` is its process 1, as the host counts."""

    def __init__(self, image: Image, process: subprocess.Popen[bytes], log: TextIO) -> None:
        self.image = image
        self.process = process
        self._log = log
        self.pid = _only_child(process)

    def execute(self, words: Sequence[str], *, as_root: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command beside process 1, as `docker exec` does."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        user = "0:0" if as_root else None
        return subprocess.run([*enter, *self.image.enter(user), *words], check=False, capture_output=True, text=True)

    def health(self) -> subprocess.CompletedProcess[str]:
        """Run the image's health command."""
        kind, *words = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.execute(words)

    def kill(self) -> None:
        """Kill process 1, and so all that is in its namespace, and wait for its end."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait()

    def log(self) -> str:
        """Return what it has written to stdout and stderr."""
        self._log.seek(0)
        return self._log.read()

    def status(self) -> dict[str, list[str]]:
        """Return what the kernel says of process 1."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


class Images:
    """buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base_size = 0
        self._words = ["buildah", "--root", f"{folder}/store", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]

    def make_base(self) -> None:
        """Make the image that stands in for `BASE_IMAGE`: Debian with Python, and the certificates of this machine."""
        base = self._folder / "base"
        packages = "--include=python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", packages, "bookworm", str(base))
        shutil.copyfile(_CERTIFICATES, base / _CERTIFICATES.relative_to("/"))
        for left in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(base / left)
        recipe = self._folder / "Dockerfile.base"
        recipe.write_text("FROM scratch\nCOPY . /\n")
        self._buildah("build", "--isolation=chroot", f"--tag={_BASE}", f"--file={recipe}", str(base))
        shutil.rmtree(base)
        self._base_size = _layer_bytes(self._inspect(_BASE))

    def build(self, dockerfile: str, **arguments: str) -> Image:
        """Build one of the repository's images on that base, with the words of `IMAGE_BUILD_OPTIONS`."""
        tag = f"localhost/{Path(dockerfile).name.lower()}:{'-'.join(('test', *arguments.values()))}"
        flags = ["--format=docker", "--isolation=chroot", f"--build-arg=BASE_IMAGE={_BASE}", f"--tag={tag}"]
        flags += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        options = shlex.split(os.environ.get("IMAGE_BUILD_OPTIONS", ""))
        self._buildah("build", *flags, *options, f"--file={ROOT / dockerfile}", str(ROOT))
        about = self._inspect(tag)
        root = self._buildah("mount", self._buildah("from", tag).strip()).strip()
        return Image(Path(root), about["Docker"]["config"], _layer_bytes(about) - self._base_size)

    def remove(self) -> None:
        """Remove all containers and images, and the store."""
        self._buildah("rm", "--all")
        self._buildah("rmi", "--all", "--force")
        shutil.rmtree(self._folder)

    def _inspect(self, tag: str) -> dict[str, Any]:
        about: dict[str, Any] = json.loads(self._buildah("inspect", "--type=image", tag))
        return about

    def _buildah(self, *words: str) -> str:
        return _run(*self._words, *words)


@contextmanager
def running(image: Image, *arguments: str, volume: str, user: str | None = None) -> Iterator[Container]:
    """Run the image's entry, as `docker run --read-only --tmpfs /tmp -v VOLUME IMAGE …` does; kill it at the end.

    The volume is `SOURCE:TARGET:MODE`; the image has a folder of that name.
    """
    namespaces = ["unshare", "--mount", "--pid", "--fork"]
    shell = ["sh", "-euc", _START, "sh", str(image.root), *volume.split(":")]
    words = [*image.enter(user), *image.config["Entrypoint"], *arguments]
    with TemporaryFile("a+") as log, subprocess.Popen([*namespaces, *shell, *words], stdout=log, stderr=log) as process:
        container = Container(image, process, log)
        try:
            yield container
        finally:
            container.kill()


def _only_child(process: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = children.read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.01)
    raise AssertionError("no namespace for the container")


def _layer_bytes(about: Mapping[str, Any]) -> int:
    return sum(layer["size"] for layer in json.loads(about["Manifest"])["layers"])


def _run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
