"""A model and its adapters as GGUF files, for llama.cpp: weights in Q8_0, adapters in f16.

The tokenizer comes from another GGUF file of the same vocabulary. For models of the Llama architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from ovms_lora.adapters.safetensors_file import WEIGHTS_NAME

_Q8 = gguf.GGMLQuantizationType.Q8_0
_Array = npt.NDArray[Any]


def write_model(source: Path, vocabulary: Path, target: Path) -> Path:
    """Write a Hugging Face folder as one GGUF file, unless it is there."""
    if target.is_file():
        return target
    config = _config(source)
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _add_hyperparameters(writer, config)
    _add_tokenizer(writer, vocabulary)
    for name, array in _tensors(source, source / "model.safetensors", ""):
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, _Q8), raw_dtype=_Q8)
        else:
            writer.add_tensor(name, array)
    _finish(writer)
    return part.rename(target)


def write_adapter(source: Path, adapter: Path, target: Path) -> Path:
    """Write a PEFT folder for the model in `source` as a GGUF file."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, array in _tensors(source, adapter / WEIGHTS_NAME, "base_model.model."):
        writer.add_tensor(name, array.astype(np.float16))
    _finish(writer)
    return target


def _config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return config


def _add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Path) -> None:
    for key, field in gguf.GGUFReader(vocabulary).fields.items():
        if key.startswith("tokenizer.ggml."):
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            else:
                writer.add_key_value(key, field.contents(), field.types[0])


def _tensors(source: Path, path: Path, prefix: str) -> Iterator[tuple[str, _Array]]:
    """Yield the tensors under GGUF's names; those of LoRA end in .weight.lora_a and .weight.lora_b."""
    config = _config(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(path, "pt") as file:
        for full in file.keys():  # noqa: SIM118  # it is no dict
            array = file.get_tensor(full).float().numpy()
            module, _, part = full.removeprefix(prefix).removesuffix(".weight").partition(".lora_")
            found = names.get_name(module)
            assert found, f"{module} is no part of a Llama"
            if part != "A":
                array = _in_order(module, array, config)
            yield f"{found}.weight.lora_{part.lower()}" if part else f"{found}.weight", array


def _in_order(module: str, array: _Array, config: dict[str, Any]) -> _Array:
    """Return rows of q and k as llama.cpp rotates them: the halves of each head interleaved."""
    name = module.rsplit(".", 1)[-1]
    if name not in {"q_proj", "k_proj"}:
        return array
    heads = config["num_attention_heads" if name == "q_proj" else "num_key_value_heads"]
    halves = array.reshape(heads, 2, -1, array.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
