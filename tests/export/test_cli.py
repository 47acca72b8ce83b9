"""The exporter as a process: streams, exit codes, signals. Nothing here goes by time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ovms_lora.core.config import read_server_config
from ovms_lora.core.errors import ExportError
from ovms_lora.export import text_generation
from ovms_lora.export.cli import main
from tests.export.conftest import Sources, Workshop

SCRIPT = Path(__file__).parents[2] / "export_model.py"


def start(workshop: Workshop, source: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *workshop.arguments(source, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> list[str]:
    """Read stderr up to a line; the process is then busy with what the line says."""
    assert process.stderr is not None
    read = []
    for text in process.stderr:
        read.append(text)
        if text.startswith(line):
            return read
    raise AssertionError(f"no {line!r} in {read}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_export_and_leaves_nothing(
    workshop: Workshop, sources: Sources, number: signal.Signals, code: int
) -> None:
    process = start(workshop, sources.base)
    wait_for(process, "load:")
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == "stopped: nothing was exported"
    assert "Traceback" not in err
    assert workshop.models == workshop.leftovers == []
    assert not workshop.config.exists()


def test_after_a_kill_nothing_is_taken_for_a_model_and_the_next_run_succeeds(
    workshop: Workshop, sources: Sources
) -> None:
    killed = start(workshop, sources.base)
    wait_for(killed, "load:")
    killed.kill()
    killed.communicate()
    assert workshop.models == []
    assert len(workshop.leftovers) == 1
    assert not workshop.config.exists()

    again = start(workshop, sources.base)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert out == f"{workshop.repository / 'tiny'}\n"
    assert workshop.models == ["tiny"]
    assert workshop.leftovers == []
    assert [model.name for model in read_server_config(workshop.config).models] == ["tiny"]
    # Only our own lines: no library's warning, log or progress bar.
    words = {line.partition(":")[0] for line in err.splitlines()}
    assert words <= {"find", "hash", "load", "convert", "compress", "check", str(workshop.config) + " now names tiny"}


def test_a_mistyped_flag_is_answered_at_once_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text_generation", "--sorce_model", "x"], prog="ovms-lora export") == 2
    captured = capsys.readouterr()
    assert captured.err == "error: unknown flag --sorce_model\nhint: did you mean --source_model?\n"
    assert captured.out == ""


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom ovms_lora.export.cli import main\n"
        "assert main(['text_generation', '--source_model', '/nothing', '--adapter', '/none']) == 1\n"
        "heavy = {'torch', 'transformers', 'peft', 'nncf', 'optimum', 'openvino'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verbose_shows_where_a_failure_comes_from(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.export("/nothing", "--verbose") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_still_one(
    workshop: Workshop, sources: Sources, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()  # until the handler has run, if it has not yet
        except KeyboardInterrupt as error:
            raise ExportError("the model cannot be converted") from error

    monkeypatch.setattr(text_generation, "_convert", convert)
    before = signal.getsignal(signal.SIGINT)
    assert workshop.export(sources.base) == 130
    assert capsys.readouterr().err.endswith("stopped: nothing was exported\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert workshop.leftovers == []
