"""A random Llama small enough to export and run in seconds, with everything that a real model folder has."""

from __future__ import annotations

import json
from pathlib import Path

HIDDEN = 64
INTERMEDIATE = 128
LAYERS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [/{{ message['role'] }}]\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
_CORPUS = (
    "Once upon a time there was a king who had three daughters.",
    "SELECT icao FROM table_name_74 WHERE airport = 'lilongwe international airport'",
    "[user] What is the capital of France? [/user] [assistant] The capital of France is Paris.",
)


def build_tiny_llama(folder: Path, *, seed: int = 0, hidden: int = HIDDEN, tied: bool = False) -> None:
    """Write a Hugging Face folder: float32 weights from `seed`, a byte-level BPE tokenizer of about 300 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size, bos, eos = write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        tie_word_embeddings=tied,
        # Larger than usual: with tiny random weights the logits would else be too close to each other to compare.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def write_tokenizer(folder: Path) -> tuple[int, int, int]:
    """Train the tokenizer and save it; returns (vocabulary size, id of `<s>`, id of `</s>`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = 512
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size(), bos, eos


def build_tiny_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: float = 8.0,
    target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
    scale: float = 0.2,
) -> None:
    """Write a PEFT LoRA folder for a folder of `build_tiny_llama`: both A and B random, so that it changes answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    adapted.save_pretrained(str(folder))
    # PEFT notes the absolute path of the base; a folder that moves must not depend on it.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "tiny-llama"
    path.write_text(json.dumps(config))
