"""One `.gguf` file becomes an ordinary Hugging Face folder that any later step can read.

Owns: the folder's files (config.json, model.safetensors, generation_config.json, the tokenizer, chat_template.jinja)
and the refusal of files that transformers would load only in part.
Does not know: OpenVINO, adapters, or what is exported from the folder.

Weights are dequantised by transformers and saved in float32, which holds every value of a block format exactly. The
tokenizer is rebuilt from the metadata (see gguf_tokenizer), because transformers builds a wrong one from GGUF.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ovms_lora.core.errors import ExportError
from ovms_lora.export.gguf_tokenizer import Vocabulary, build_tokenizer

_HINT_USE_FOLDER = "use the model's Hugging Face folder instead of the GGUF file"


_PATCHING = threading.Lock()

# The constants of Llama 3.1 and 3.2, which GGUF does not keep: it holds only the factors that come out of them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class _Header:
    """What the file says beside its weights, which `reader` has.

    `rope_factors` divide the rotary frequencies, one for each.
    """

    reader: Any
    metadata: dict[str, Any]
    architecture: str
    rope_factors: tuple[float, ...]


def to_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into the existing empty `folder`.

    Raises ExportError when the file is not a whole GGUF model, or when its architecture or tokenizer is not known.
    """
    header = _read_header(gguf_path)
    rope_scaling = _rope_scaling(header)
    # The tokenizer first: it is the likelier one to be refused, and takes a second where the weights take many.
    _save_tokenizer(header, folder)
    _save_model(gguf_path, header, rope_scaling, folder)


def count_weights(gguf_path: Path) -> int:
    """Return how many weights a GGUF file holds. Raises ExportError when it is not a whole one."""
    with _reading(gguf_path) as reader:
        return sum(int(tensor.n_elements) for tensor in reader.tensors)


@contextmanager
def _reading(gguf_path: Path) -> Iterator[Any]:
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc] # gguf has no types
        """Cuts plain arrays: cutting a memmap takes several times as long, and a vocabulary is cut 700,000 times."""

        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._plain = np.asarray(mapped)

    if not gguf_path.is_file():
        raise ExportError(f"no such GGUF file: {gguf_path}")
    try:
        yield Reader(gguf_path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The reader maps the file into numpy, so a cut or foreign file fails in as many ways as arrays do.
        raise ExportError(f"{gguf_path} is not a whole GGUF file: {error}") from error


def _read_header(gguf_path: Path) -> _Header:
    with _reading(gguf_path) as reader:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ExportError("the GGUF file does not name its architecture (general.architecture)")
    if metadata.get("split.count", 1) > 1:
        raise ExportError("the GGUF file is one part of a split model", hint="join it with llama-gguf-split --merge")
    return _Header(reader, metadata, architecture, tuple(float(x) for x in tensors.get("rope_freqs.weight", ())))


def _rope_scaling(header: _Header) -> dict[str, Any]:
    """Return the additions to `rope_parameters` that transformers would drop without a word.

    Raises ExportError for a kind of scaling that is not known.
    """
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if kind == "none" and not header.rope_factors:
        return {}
    base = header.metadata.get(f"{header.architecture}.rope.freq_base", 10000.0)
    if kind != "none" or not _is_llama3(header.rope_factors, base):
        raise ExportError(
            f"the GGUF file uses RoPE scaling that is not supported ({'rope_freqs' if kind == 'none' else kind})",
            hint=_HINT_USE_FOLDER,
        )
    return {
        "rope_type": "llama3",
        "factor": max(header.rope_factors),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _is_llama3(factors: tuple[float, ...], base: float) -> bool:
    """Say whether the factors are those of Llama 3.1's scaling: 1 for short waves, the largest one for long waves."""
    largest = max(factors)
    for position, factor in enumerate(factors):
        turns = _LLAMA3_CONTEXT / (2 * math.pi * base ** (position / len(factors)))
        smooth = min(max((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0), 1.0)
        if not math.isclose(factor, 1 / ((1 - smooth) / largest + smooth), rel_tol=1e-3):
            return False
    return True


def _save_tokenizer(header: _Header, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.from_metadata(header.metadata)
    names = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_id,
        "unk_token": vocabulary.unknown_id,
        "pad_token": vocabulary.padding_id if vocabulary.padding_id is not None else vocabulary.eos_id,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(vocabulary),
        clean_up_tokenization_spaces=False,
        model_max_length=header.metadata.get(f"{header.architecture}.context_length"),
        **{name: vocabulary.token(token_id) for name, token_id in names.items() if token_id is not None},
    )
    tokenizer.chat_template = header.metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _save_model(gguf_path: Path, header: _Header, rope_scaling: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _parsed_once(gguf_path, header):
            model, report = AutoModelForCausalLM.from_pretrained(
                gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, output_loading_info=True
            )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ExportError(f"{gguf_path.name} cannot be loaded: {error}", hint=_HINT_USE_FOLDER) from error
    # transformers fills what it does not find with random numbers and only warns.
    lost = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if lost:
        raise ExportError(f"{gguf_path.name} does not fit its architecture: {', '.join(lost[:5])}")
    if rope_scaling:
        model.config.rope_parameters = {**model.config.rope_parameters, **rope_scaling}
    model.generation_config = _generation_config(header.metadata)
    model.save_pretrained(folder)


@contextmanager
def _parsed_once(gguf_path: Path, header: _Header) -> Iterator[None]:
    """Let transformers have what is there already.

    It would parse the file twice more, and make gguf's map of names anew for each module: most of an unpacking's time.
    """
    import gguf

    def read(path: str) -> Any:
        return header.reader if Path(path) == gguf_path else make_reader(path)

    with _PATCHING:
        make_reader, make_names = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = read, cache(make_names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = make_reader, make_names


def _generation_config(metadata: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    return GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id", stops[0] if stops else None),
    )
