"""One tiny base with adapters, and its real exports, shared by all tests of the exporter."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovms_lora.export import compress, convert, text_generation
from ovms_lora.export.cli import main
from ovms_lora.export.plan import Plan
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.verify import Expected
from tests.tiny_llama import build_tiny_adapter, build_tiny_llama


@dataclass(frozen=True, slots=True)
class Sources:
    """Folders that an export can be given."""

    base: Path
    sql: Path
    tools: Path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    found = Sources(folder / "tiny", folder / "sql", folder / "tools")
    build_tiny_llama(found.base)
    build_tiny_adapter(found.sql, found.base)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    build_tiny_adapter(found.tools, found.base, seed=2, rank=8, alpha=4, target_modules=linears)
    return found


@dataclass(frozen=True, slots=True)
class Workshop:
    """A repository and a config.json of a test's own, and the exporter's command line on them."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "models"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    def arguments(self, source: Path | str, *flags: str) -> list[str]:
        places = ["--model_repository_path", str(self.repository), "--config_file_path", str(self.config)]
        return ["text_generation", "--source_model", str(source), *places, *flags]

    def export(self, source: Path | str, *flags: str) -> int:
        return main(self.arguments(source, *flags))

    @property
    def leftovers(self) -> list[str]:
        """Names in the repository's hidden folder, but for the locks."""
        hidden = self.repository / ".export"
        return [path.name for path in hidden.iterdir() if path.suffix != ".lock"] if hidden.exists() else []

    @property
    def models(self) -> list[str]:
        """What a server could take for a model."""
        return sorted(path.parent.name for path in self.repository.glob("*/openvino_model.xml"))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture(scope="session")
def exported(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Real exports: `base` in fp32 with runtime adapters, `small` in int8, `rounded` in bf16, `merged` in fp32.

    `small` and `merged` are verified.
    """
    workshop = Workshop(tmp_path_factory.mktemp("exported"))
    loras = f"sql={sources.sql},tools={sources.tools}:0.5,mix=@sql:0.7+@tools"
    exports = (
        ("--model_name", "base", "--weight-format", "fp32", "--source_loras", loras),
        ("--model_name", "small", "--verify"),
        ("--model_name", "rounded", "--weight-format", "bf16"),
        (
            *("--model_name", "merged", "--weight-format", "fp32", "--verify"),
            *("--adapter", f"{sources.sql}=0.5", "--adapter", str(sources.tools)),
        ),
    )
    for flags in exports:
        assert workshop.export(sources.base, *flags) == 0
    return workshop


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the conversion out: what is published is a folder with the files of a model, empty of sense."""

    def convert_quickly(plan: Plan, source: Path, folder: Path, progress: ExportProgress) -> list[Expected]:
        for name in ("openvino_model.xml", "openvino_model.bin", "tokenizer.json"):
            (folder / name).write_text(f"{name} of {plan.name}")
        return []

    monkeypatch.setattr(text_generation, "_convert", convert_quickly)
    monkeypatch.setattr(compress, "compress", lambda *_: None)
    monkeypatch.setattr(convert, "check_ir", lambda *_, **__: None)


@pytest.fixture
def progress() -> ExportProgress:
    return ExportProgress(stream=io.StringIO())


Fails = Callable[..., tuple[str, str]]


@pytest.fixture
def fails(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run an export that must fail, and return the cause and the hint that it prints."""

    def run(source: Path | str, *flags: str, code: int = 1) -> tuple[str, str]:
        before = sorted(workshop.repository.glob("*")) if workshop.repository.exists() else []
        capsys.readouterr()  # what earlier runs printed
        assert workshop.export(source, *flags) == code
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        cause = [line for line in lines if line.startswith("error: ")]
        hint = [line for line in lines if line.startswith("hint: ")]
        assert len(cause) == 1 and lines[-1] == hint[-1], captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        after = sorted(workshop.repository.glob("*")) if workshop.repository.exists() else []
        assert [path for path in after if path.name != ".export"] == [p for p in before if p.name != ".export"]
        assert workshop.leftovers == []
        return cause[0].removeprefix("error: "), hint[0].removeprefix("hint: ")

    return run
