"""`--dry_run` says what an export would do, refuses what it would refuse, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.export import text_generation
from tests.export.conftest import Fails, Sources, Workshop


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr(text_generation, "_convert", begun)


def plan(workshop: Workshop, capsys: pytest.CaptureFixture[str], source: Path | str, *flags: str) -> dict[str, str]:
    """Run the exporter with --dry_run and return the lines by their first word."""
    before = sorted(workshop.folder.rglob("*"))
    capsys.readouterr()
    assert workshop.export(source, "--dry_run", *flags) == 0
    assert sorted(workshop.folder.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    return {word: rest.strip() for word, _, rest in (line.partition(" ") for line in lines)}


def test_a_plan_names_every_step_and_its_size(
    workshop: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["--adapter", f"{sources.sql}=0.5", "--source_loras", f"tools={sources.tools}", "--verify"]
    lines = plan(workshop, capsys, sources.base, *merge, "--weight-format", "int4")
    assert list(lines) == ["read", "merge", "convert", "verify", "write", "needs", "adapter", "register"]
    assert lines["read"] == f"{sources.base}: 0.5 MB"
    assert lines["merge"].startswith(f"{sources.sql} at weight 0.5: ")
    assert lines["convert"] == "to OpenVINO IR with int4 weights"
    assert lines["write"].startswith(f"{workshop.repository / 'tiny'}: about 0.1 MB")
    assert lines["adapter"] == f"tools of rank 8 to {workshop.repository / 'loras' / 'tools'}, for run time"
    assert lines["register"] == f"{workshop.config} adds tiny"
    assert "of memory" in lines["needs"]


def test_the_size_is_about_that_of_the_export(exported: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "small", "rounded"):
        folder = exported.repository / name
        from ovms_lora.export.arguments import parse_request
        from ovms_lora.export.manifest import read_manifest
        from ovms_lora.export.plan import make_plan
        from ovms_lora.export.progress import ExportProgress
        from ovms_lora.export.resources import estimate

        manifest = read_manifest(folder)
        assert manifest is not None
        words = exported.arguments(manifest.recipe.source.source, "--weight-format", manifest.recipe.weight_format)
        needs = estimate(make_plan(parse_request([*words, "--model_name", "other"], "x").request, ExportProgress()))
        assert needs.written == pytest.approx((folder / "openvino_model.bin").stat().st_size, rel=0.15)
        assert needs.disk >= needs.written


def test_options_of_compression_are_part_of_the_plan(
    workshop: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--weight-format", "int4", "--extra_quantization_params", "--group-size 32 --awq"]
    assert plan(workshop, capsys, sources.base, *flags)["convert"].endswith("(group_size 32, awq True)")


def test_an_npu_gets_what_it_can_run(workshop: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]) -> None:
    converted = plan(workshop, capsys, sources.base, "--target_device", "NPU")["convert"]
    assert converted == "to OpenVINO IR with int4 weights (sym True, group_size -1, ratio 1.0)"


def test_an_openvino_model_is_copied(
    workshop: Workshop, exported: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = plan(workshop, capsys, exported.repository / "small")
    assert lines["copy"] == "the OpenVINO model as it is, with int8 weights"
    assert "convert" not in lines


def test_an_export_that_is_there_is_nothing_to_do_and_one_in_its_place_is_replaced(
    exported: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = plan(exported, capsys, sources.base, "--model_name", "small")
    assert list(lines) == ["nothing", "register"]
    assert lines["register"].endswith("has already small")
    lines = plan(exported, capsys, sources.base, "--model_name", "small", "--overwrite_models")
    assert lines["replace"].startswith(str(exported.repository / "small"))


def test_what_the_export_would_refuse_is_refused_in_the_same_words(
    workshop: Workshop, sources: Sources, fails: Fails
) -> None:
    for flags in (["--adapter", "/nothing"], ["--adapter", str(sources.base)]):
        assert fails(sources.base, *flags) == fails(sources.base, "--dry_run", *flags)
    assert fails("/nothing", "--dry_run") == fails("/nothing")
    assert not workshop.config.exists() and not workshop.repository.exists()


@dataclass(frozen=True)
class HubFile:
    """As huggingface_hub describes a file that it would fetch."""

    file_size: int
    will_download: bool


def test_what_is_on_the_hub_is_asked_for_its_size_and_not_fetched(
    workshop: Workshop, sources: Sources, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def snapshot(hub_id: str, *, dry_run: bool = False, **_: Any) -> list[HubFile]:
        asked.append((hub_id, dry_run))
        return [HubFile(2 * 10**9, will_download=True), HubFile(5 * 10**8, will_download=True), HubFile(7, False)]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    lines = plan(workshop, capsys, "org/base", "--adapter", str(sources.sql))
    assert asked == [("org/base", True)]
    assert lines["fetch"] == "model org/base: 2 files, 2.5 GB"
    assert "once these files are here" in lines["then"]


def test_without_a_network_the_cache_is_taken_or_the_lack_is_an_error(
    workshop: Workshop,
    sources: Sources,
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cached = {"org/base": sources.base}

    def snapshot(hub_id: str, *, dry_run: bool = False, **_: Any) -> str:
        if dry_run:
            raise OfflineModeIsEnabled("no network")
        if hub_id not in cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(cached[hub_id])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert plan(workshop, capsys, "org/base")["register"] == f"{workshop.config} adds org/base"
    assert "no such model from the hub: not in the cache" in fails("org/other", "--dry_run")[0]
