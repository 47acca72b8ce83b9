"""A PyTorch model becomes an OpenVINO IR, and a tokenizer its files.

Owns: the calls into optimum-intel, and the check that the IR is one that can be served.
Does not know: where the model comes from, or where the folder goes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export.merge import first_line
from ovms_lora.export.weight_format import WeightFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL: Final = "openvino_model.xml"
IR_FILES: Final = (MODEL, "openvino_model.bin")
_FULL: Final = 2**20  # bytes
_TASK: Final = "text-generation-with-past"
# What optimum, nncf and OpenVINO raise for models that they cannot convert, and for failed writes.
LIBRARY_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)


def write_ir(model: PreTrainedModel, folder: Path, weight_format: WeightFormat, *, trust_remote_code: bool) -> None:
    """Convert the model into `folder`: a stateful IR, config.json and generation_config.json.

    int8 and int4 are still uncompressed afterwards; compress.py is the next step. Raises ExportError.
    """
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVWeightQuantizationConfig
    from optimum.intel.openvino.configuration import OVConfig

    if weight_format is WeightFormat.BF16:
        # Parameters only: model.to() would round the rotary frequencies too, which are a buffer kept in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if weight_format.compressed:
        config = OVConfig(quantization_config=OVWeightQuantizationConfig(bits=weight_format.bits))
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
    except LIBRARY_ERRORS as error:
        raise conversion_failed("converted", folder, error) from error


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


def check_ir(folder: Path, *, module_names: bool = True) -> None:
    """Raise ExportError unless the IR on disk is whole and takes the paged attention that serving needs.

    With `module_names` it must also have what runtime adapters are matched by.
    """
    import openvino
    from openvino._offline_transformations import paged_attention_transformation

    try:
        model = openvino.Core().read_model(folder / MODEL)
        names = {op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"}
        paged_attention_transformation(model)
    except LIBRARY_ERRORS as error:
        raise conversion_failed("served with paged attention", folder, error) from error
    if not any("block_indices" in port.get_names() for port in model.inputs):
        raise ExportError("the model cannot be served with paged attention: no attention was found in it")
    if module_names and not any(name.startswith("__module.") for name in names):
        raise ExportError("the exported graph has lost its module names, which adapters are matched by")


def conversion_failed(what: str, folder: Path, error: Exception) -> ExportError:
    """Return the error for a model that a library cannot handle; `what` could not be done to it."""
    # OpenVINO reports a full disk as a failed stream.
    if shutil.disk_usage(folder).free < _FULL:
        return ExportError(f"no space left in {folder}", hint="free some space, or choose another repository")
    return ExportError(
        f"the model cannot be {what}: {first_line(error)}", hint="--verbose shows what the libraries say"
    )
