"""nncf compresses the weights of an IR, with samples of text where that is asked for.

Owns: the call into nncf, and what it is given.
Does not know: where the IR comes from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export.compression import Compression
from ovms_lora.export.convert import IR_FILES, LIBRARY_ERRORS, MODEL, conversion_failed
from ovms_lora.export.device import openvino_core
from ovms_lora.export.ir_inputs import inputs_of
from ovms_lora.export.weight_format import WeightFormat

_SAMPLES: Final = 128
_SAMPLE_TOKENS: Final = 256


def compress(folder: Path, work: Path, weight_format: WeightFormat, compression: Compression) -> None:
    """Compress the weights of the IR in `folder`; the uncompressed IR passes through `work`. Raises ExportError."""
    import nncf
    import openvino

    for name in IR_FILES:
        shutil.move(folder / name, work / name)
    core = openvino_core()  # before nncf makes Cores of its own
    try:
        model = core.read_model(work / MODEL)
        options = _nncf_options(weight_format, compression)
        if compression.dataset is not None:
            options |= _calibration(model, folder, compression)
        compressed = nncf.compress_weights(model, **options)
        compressed.set_rt_info(nncf.__version__, ["optimum", "nncf_version"])
        openvino.save_model(compressed, folder / MODEL, compress_to_fp16=False)
    except _nncf_errors() as error:
        raise conversion_failed("compressed", folder, error) from error
    except LIBRARY_ERRORS as error:
        raise conversion_failed("compressed", folder, error) from error
    for name in IR_FILES:
        (work / name).unlink()


def _nncf_options(weight_format: WeightFormat, compression: Compression) -> dict[str, Any]:
    from optimum.intel import OVWeightQuantizationConfig

    # Layers narrower than int4's group take a smaller one instead of failing the export.
    fallback = "adjust" if weight_format is WeightFormat.INT4 else None
    config = OVWeightQuantizationConfig(
        bits=weight_format.bits,
        sym=compression.sym,
        group_size=compression.group_size,
        group_size_fallback=compression.group_size_fallback or fallback,
        ratio=1.0 if compression.ratio is None else compression.ratio,
        all_layers=compression.all_layers or None,
        backup_precision=compression.backup_precision,
        sensitivity_metric=compression.sensitivity_metric,
        quant_method="awq" if compression.awq else "default",
        scale_estimation=compression.scale_estimation or None,
        gptq=compression.gptq or None,
    )
    return {name: value for name, value in config.to_nncf_dict().items() if value is not None}


def _calibration(model: Any, folder: Path, compression: Compression) -> dict[str, Any]:
    import nncf

    assert compression.dataset is not None
    samples = list(_samples(compression.dataset, folder, compression.num_samples or _SAMPLES))
    if not samples:
        raise ExportError(f"{compression.dataset} holds no text", hint="write one sample on each line")
    return {"dataset": nncf.Dataset([inputs_of(model, ids) for ids in samples]), "subset_size": len(samples)}


def _samples(path: Path, folder: Path, limit: int) -> Iterator[list[int]]:
    """Yield the token ids of the first `limit` lines of a file that are not empty, each cut to a bounded length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        with path.open(encoding="utf-8") as lines:
            texts = (line.strip() for line in lines)
            for text in islice(filter(None, texts), limit):
                yield tokenizer.encode(text).ids[:_SAMPLE_TOKENS]
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not UTF-8 text", hint="write one sample on each line") from error


def _nncf_errors() -> tuple[type[Exception], ...]:
    """nncf's own errors, which have no common base."""
    import nncf

    return (
        nncf.ValidationError,
        nncf.InternalError,
        nncf.UnsupportedModelError,
        nncf.InvalidGroupSizeError,
        nncf.ParameterNotSupportedError,
    )
