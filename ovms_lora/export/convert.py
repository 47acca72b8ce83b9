"""A PyTorch model becomes an OpenVINO IR with compressed weights, and a tokenizer its files.

Owns: the calls into optimum-intel and nncf, and the check that the IR is one that can be served.
Does not know: where the model comes from, or where the folder goes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export.merge import first_line
from ovms_lora.export.request import WeightFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL: Final = "openvino_model.xml"
_FULL: Final = 2**20  # bytes
_TASK: Final = "text-generation-with-past"
# What optimum, nncf and OpenVINO raise for models that they cannot convert, and for failed writes.
_LIBRARY_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)


def write_ir(model: PreTrainedModel, folder: Path, weight_format: WeightFormat, *, trust_remote_code: bool) -> None:
    """Convert the model into `folder`: a stateful IR, config.json and generation_config.json.

    int8 and int4 are still uncompressed afterwards; `compress` is the next step. Raises ExportError.
    """
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel.openvino.configuration import OVConfig

    if weight_format is WeightFormat.BF16:
        # Parameters only: model.to() would round the rotary frequencies too, which are a buffer kept in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if weight_format.compressed:
        config = OVConfig(quantization_config=_compression(weight_format))
    else:
        config = OVConfig(dtype="fp16" if weight_format is WeightFormat.FP16 else "fp32")
    try:
        export_from_model(
            model,
            output=folder,
            task=_TASK,
            ov_config=config,
            stateful=True,
            trust_remote_code=trust_remote_code,
            patch_16bit_model=model.dtype in (torch.float16, torch.bfloat16),
        )
    except _LIBRARY_ERRORS as error:
        raise _failed("converted", folder, error) from error


def compress(folder: Path, work: Path, weight_format: WeightFormat) -> None:
    """Compress the weights of the IR in `folder` with nncf; the uncompressed IR passes through `work`."""
    import nncf
    import openvino

    for name in (MODEL, "openvino_model.bin"):
        shutil.move(folder / name, work / name)
    options = {name: value for name, value in _compression(weight_format).to_nncf_dict().items() if value is not None}
    try:
        model = openvino.Core().read_model(work / MODEL)
        compressed = nncf.compress_weights(model, **options)
        compressed.set_rt_info(nncf.__version__, ["optimum", "nncf_version"])
        openvino.save_model(compressed, folder / MODEL, compress_to_fp16=False)
    except _nncf_errors() as error:
        raise _failed("compressed", folder, error) from error
    except _LIBRARY_ERRORS as error:
        raise _failed("compressed", folder, error) from error
    (work / MODEL).unlink()
    (work / "openvino_model.bin").unlink()


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> bool:
    """Write the tokenizer's files and OpenVINO's form of it; returns whether OpenVINO has one for its kind."""
    from optimum.exporters.openvino.convert import export_tokenizer

    tokenizer.save_pretrained(folder)
    if (source / "tokenizer.json").is_file():
        # The source's own file: what transformers saves has passed through its idea of the model's tokenizer class.
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"the tokenizer of {source} gives no tokenizer.json")
    export_tokenizer(tokenizer, folder, task=_TASK)
    return (folder / "openvino_tokenizer.xml").is_file() and (folder / "openvino_detokenizer.xml").is_file()


def check_ir(folder: Path) -> None:
    """Raise ExportError unless the IR on disk is whole and takes the paged attention that serving needs."""
    import openvino
    from openvino._offline_transformations import paged_attention_transformation

    try:
        model = openvino.Core().read_model(folder / MODEL)
        names = {op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"}
        paged_attention_transformation(model)
    except _LIBRARY_ERRORS as error:
        raise _failed("served with paged attention", folder, error) from error
    if not any("block_indices" in port.get_names() for port in model.inputs):
        raise ExportError("the model cannot be served with paged attention: no attention was found in it")
    if not any(name.startswith("__module.") for name in names):
        raise ExportError("the exported graph has lost its module names, which adapters are matched by")


def _compression(weight_format: WeightFormat) -> Any:
    from optimum.intel import OVWeightQuantizationConfig

    # Layers narrower than int4's group take a smaller one instead of failing the export.
    fallback = "adjust" if weight_format is WeightFormat.INT4 else None
    return OVWeightQuantizationConfig(bits=weight_format.bits, sym=False, group_size_fallback=fallback)


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


def _failed(what: str, folder: Path, error: Exception) -> ExportError:
    # OpenVINO reports a full disk as a failed stream.
    if shutil.disk_usage(folder).free < _FULL:
        return ExportError(f"no space left in {folder}", hint="free some space, or choose another repository")
    return ExportError(
        f"the model cannot be {what}: {first_line(error)}", hint="--verbose shows what the libraries say"
    )
