"""From a draft model's folder to a DraftModel: its vocabulary is compared, its IR compiled. The IR has no LoRA part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.draft_model import DraftModel
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.runner import OpenVinoRunner
from ovms_lora.engine.tokenizer import Tokenizer

_SAME = "take a draft model of the same family, with the same tokenizer"


def check_draft_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ModelFolderError unless a draft model's tokens are those of the served model, each with the same id."""
    draft = Tokenizer.from_folder(folder)
    if draft.vocab_size != tokenizer.vocab_size:
        raise ModelFolderError(
            f"the draft model {folder} has {draft.vocab_size} tokens, not {tokenizer.vocab_size} as the model",
            hint=_SAME,
        )
    for token_id in range(tokenizer.vocab_size):
        ours, theirs = tokenizer.token_text(token_id), draft.token_text(token_id)
        if ours != theirs:
            raise ModelFolderError(
                f"the draft model {folder} has other tokens than the model: {token_id} is {theirs!a}, not {ours!a}",
                hint=_SAME,
            )


def load_draft_model(
    folder: Path, options: EngineOptions, speculation: SpeculationOptions, *, vocab_size: int, max_model_len: int
) -> DraftModel:
    """Compile a draft model; takes seconds. `options` are those of the served model. Raises ModelFolderError."""
    device = speculation.draft_device or options.device
    own = replace(
        options,
        device=device,
        # Properties of one device may mean nothing to another.
        plugin_config=options.plugin_config if device == options.device else {},
        cache_size=speculation.draft_cache_size,
    )
    runner = OpenVinoRunner(GraphSource(folder, own).compile(), own, max_model_len=max_model_len)
    return DraftModel(
        runner,
        vocab_size=vocab_size,
        max_model_len=min(max_model_len, runner.num_blocks * runner.block_size),
        max_tokens=options.max_num_batched_tokens,
        prefix_caching=options.enable_prefix_caching,
    )
