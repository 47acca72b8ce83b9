"""One `.gguf` file becomes an ordinary Hugging Face folder that any later step can read.

Owns: the folder's files (config.json, model.safetensors, generation_config.json, the tokenizer, chat_template.jinja)
and the refusal of files that transformers would load only in part.
Does not know: OpenVINO, adapters, or what is exported from the folder.

Weights are dequantised by transformers and saved in float32, which holds every value of a block format exactly. The
tokenizer is rebuilt from the metadata (see gguf_tokenizer), because transformers builds a wrong one from GGUF.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovms_lora.core.errors import ExportError
from ovms_lora.export.gguf_tokenizer import Vocabulary, build_tokenizer

_HINT_USE_FOLDER = "use the model's Hugging Face folder instead of the GGUF file"


def to_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into the existing empty `folder`.

    Raises ExportError when the file is not a whole GGUF model, or when its architecture or tokenizer is not known.
    """
    metadata, tensor_names = _read_header(gguf_path)
    _refuse_what_would_be_lost(metadata, tensor_names)
    # The tokenizer first: it is the likelier one to be refused, and takes a second where the weights take many.
    _save_tokenizer(metadata, folder)
    _save_model(gguf_path, metadata, folder)


def _read_header(gguf_path: Path) -> tuple[dict[str, Any], list[str]]:
    from gguf import GGUFReader

    if not gguf_path.is_file():
        raise ExportError(f"no such GGUF file: {gguf_path}")
    try:
        reader = GGUFReader(gguf_path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensor_names = [tensor.name for tensor in reader.tensors]
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The reader maps the file into numpy, so a cut or foreign file fails in as many ways as arrays do.
        raise ExportError(f"{gguf_path} is not a whole GGUF file: {error}") from error
    return metadata, tensor_names


def _refuse_what_would_be_lost(metadata: dict[str, Any], tensor_names: Sequence[str]) -> None:
    """Raise ExportError for a file of which transformers would drop a part without a word."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ExportError("the GGUF file does not name its architecture (general.architecture)")
    if metadata.get("split.count", 1) > 1:
        raise ExportError("the GGUF file is one part of a split model", hint="join it with llama-gguf-split --merge")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factors = [name for name in tensor_names if name.startswith(("rope_freqs", "rope_factors"))]
    if scaling != "none" or factors:
        raise ExportError(
            f"the GGUF file uses RoPE scaling ({factors[0] if factors else scaling}), which transformers ignores there",
            hint=_HINT_USE_FOLDER,
        )


def _save_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.from_metadata(metadata)
    architecture = metadata["general.architecture"]
    names = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_id,
        "unk_token": vocabulary.unknown_id,
        "pad_token": vocabulary.padding_id if vocabulary.padding_id is not None else vocabulary.eos_id,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(vocabulary),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{architecture}.context_length"),
        **{name: vocabulary.token(token_id) for name, token_id in names.items() if token_id is not None},
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _save_model(gguf_path: Path, metadata: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ExportError(f"{gguf_path.name} cannot be loaded: {error}", hint=_HINT_USE_FOLDER) from error
    # transformers fills what it does not find with random numbers and only warns.
    lost = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if lost:
        raise ExportError(f"{gguf_path.name} does not fit its architecture: {', '.join(lost[:5])}")
    model.generation_config = _generation_config(metadata)
    model.save_pretrained(folder)


def _generation_config(metadata: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    return GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id", stops[0] if stops else None),
    )
