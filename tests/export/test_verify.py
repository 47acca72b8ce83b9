"""`--verify`: figures of the drift that are right, kept in the manifest, and a threshold that stops the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ovms_lora.core.errors import ExportError
from ovms_lora.export import text_generation
from ovms_lora.export.manifest import Drift, read_manifest
from ovms_lora.export.merge import load_tokenizer
from ovms_lora.export.plan import Plan
from ovms_lora.export.progress import ExportProgress
from ovms_lora.export.verify import PROMPTS, Expected, expect, measure_drift
from tests.export import oracle
from tests.export.conftest import Fails, Sources, Workshop

FAR = Drift(mean_kl=0.5, max_kl=2.0, top1_agreement=0.25, positions=8)


def drift_of(folder: Path) -> Drift:
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.verified is not None
    return manifest.verified


@pytest.fixture
def far(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick exports whose measured drift is large."""
    monkeypatch.setattr("ovms_lora.export.verify.measure_drift", lambda *_: FAR)


def test_an_fp32_export_with_merged_adapters_does_not_drift(exported: Workshop) -> None:
    drift = drift_of(exported.repository / "merged")
    assert drift.max_kl < 1e-6
    assert drift.top1_agreement == 1.0
    assert drift.positions == 32 * len(PROMPTS)


def test_int8_drifts_a_little_and_the_manifest_says_how_far(exported: Workshop) -> None:
    drift = drift_of(exported.repository / "small")
    assert 1e-6 < drift.mean_kl < drift.max_kl < 0.5
    assert 0.8 < drift.top1_agreement <= 1.0


def test_an_export_that_was_not_asked_to_is_not_verified(exported: Workshop) -> None:
    manifest = read_manifest(exported.repository / "base")
    assert manifest is not None and manifest.verified is None


def test_the_figures_are_those_of_their_definition(exported: Workshop) -> None:
    ids = [5, 6, 7, 8]
    got = oracle.of_ir(exported.repository / "base", np.array([ids]))
    logits = np.random.default_rng(5).normal(size=got.shape).astype(np.float32)
    rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    divergences = [sum(np.exp(p) * (p - q)) for p, q in zip(rows, got, strict=True)]
    drift = measure_drift(exported.repository / "base", [Expected(ids, rows)])
    assert drift.mean_kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert drift.max_kl == pytest.approx(max(divergences), rel=1e-3)
    assert drift.top1_agreement == np.mean(rows.argmax(-1) == got.argmax(-1))


def test_a_model_that_computes_no_numbers_is_refused(sources: Sources) -> None:
    import torch

    model = oracle.plain(sources.base)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ExportError, match="the PyTorch model computes numbers that are not finite"):
        expect(model, load_tokenizer(sources.base))


def test_the_drift_is_printed_and_kept(
    workshop: Workshop, sources: Sources, far: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.export(sources.base, "--verify") == 0
    line = "verified: KL divergence 0.5 on average and 2 at most, same likeliest token at 25.0% of 8 positions"
    assert line in capsys.readouterr().err
    assert drift_of(workshop.repository / "tiny") == FAR
    assert workshop.export(sources.base, "--verify") == 0  # nothing to do, and said again
    assert line in capsys.readouterr().err


def test_above_the_threshold_nothing_is_published(
    workshop: Workshop, sources: Sources, far: None, fails: Fails
) -> None:
    cause, hint = fails(sources.base, "--verify_threshold", "0.4")
    assert "the mean KL divergence is 0.5, above --verify_threshold 0.4" in cause
    assert "--weight-format" in hint
    assert workshop.models == []
    assert not workshop.config.exists()
    assert workshop.export(sources.base, "--verify_threshold", "0.5") == 0
    # The threshold holds for a model that is there already, too.
    assert "above --verify_threshold 0.4" in fails(sources.base, "--verify_threshold", "0.4")[0]


def test_a_model_above_the_threshold_does_not_replace_the_one_that_is_served(
    workshop: Workshop, sources: Sources, far: None, fails: Fails
) -> None:
    assert workshop.export(sources.base) == 0
    before = (workshop.repository / "tiny" / "ovms_lora_manifest.json").read_bytes()
    fails(sources.base, "--verify_threshold", "0", "--overwrite_models")
    assert (workshop.repository / "tiny" / "ovms_lora_manifest.json").read_bytes() == before


def test_an_export_from_before_is_not_silently_taken_for_verified(
    workshop: Workshop, sources: Sources, far: None, fails: Fails
) -> None:
    assert workshop.export(sources.base) == 0
    cause, hint = fails(sources.base, "--verify")
    assert "was exported without --verify" in cause
    assert "--overwrite_models" in hint


def test_manifests_without_the_newer_entries_are_read(exported: Workshop, tmp_path: Path) -> None:
    shutil.copyfile(exported.repository / "base" / "ovms_lora_manifest.json", tmp_path / "ovms_lora_manifest.json")
    document = json.loads((tmp_path / "ovms_lora_manifest.json").read_text())
    del document["verified"], document["recipe"]["compression"], document["recipe"]["calibration"]
    (tmp_path / "ovms_lora_manifest.json").write_text(json.dumps(document))
    manifest = read_manifest(tmp_path)
    assert manifest == read_manifest(exported.repository / "base")


def test_the_pytorch_model_is_asked_before_conversion_changes_it(
    sources: Sources, progress: ExportProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def asked(*_: object) -> list[Expected]:
        order.append("expect")
        return []

    monkeypatch.setattr("ovms_lora.export.verify.expect", asked)
    monkeypatch.setattr("ovms_lora.export.convert.write_ir", lambda *_, **__: order.append("convert"))
    monkeypatch.setattr("ovms_lora.export.convert.write_tokenizer", lambda *_: True)
    from ovms_lora.export.arguments import parse_request
    from ovms_lora.export.plan import make_plan

    words = ["text_generation", "--source_model", str(sources.base), "--weight-format", "bf16", "--verify"]
    plan: Plan = make_plan(parse_request(words, "export_model.py").request, progress)
    text_generation._convert(plan, sources.base, sources.base.parent, progress)
    assert order == ["expect", "convert"]
