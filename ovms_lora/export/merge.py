"""The PyTorch model of a source, with adapters merged into its weights by PEFT.

Owns: in which precision weights are loaded and merged, and that every tensor of an adapter is used.
Does not know: OpenVINO.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovms_lora.core.errors import ExportError
from ovms_lora.export.peft_folder import WEIGHTS, PeftFolder
from ovms_lora.export.source import read_json, tensor_shapes
from ovms_lora.export.weight_format import WeightFormat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers and PEFT raise for folders that they cannot use.
_LIBRARY_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder. Raises ExportError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*_LIBRARY_ERRORS, OSError) as error:
        raise ExportError(f"the tokenizer of {folder} cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ExportError(f"the tokenizer of {folder} has no tokenizer.json, and none can be made of it")
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model into host memory. Raises ExportError."""
    from transformers import AutoModelForCausalLM

    _refuse_remote_code(folder, trust_remote_code=trust_remote_code)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (*_LIBRARY_ERRORS, OSError) as error:
        raise ExportError(f"{folder} cannot be loaded: {first_line(error)}") from error
    # transformers fills what it does not find with random numbers and only warns.
    lost = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if lost:
        raise ExportError(f"{folder} does not fit its config.json: {', '.join(lost[:5])}", hint="fetch the model again")
    _refuse_non_finite(model, folder)
    return model.eval()


def choose_dtype(folder: Path, weight_format: WeightFormat, *, merging: bool) -> torch.dtype:
    """Return the precision to load in: the weights' own where that loses nothing, float32 otherwise.

    Merging wants float32, so that no adapter's change is rounded before it is added.
    """
    import torch

    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    own = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)
    if merging or weight_format is WeightFormat.FP32:
        return torch.float32
    if weight_format is WeightFormat.FP16 and own is torch.bfloat16:
        return torch.float32  # float16 does not hold bfloat16's range; OpenVINO clamps when it compresses
    return own


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model rows for the tokens that an adapter's own tokenizer adds."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def merge_adapter(model: PreTrainedModel, adapter: PeftFolder) -> PreTrainedModel:
    """Add `weight` times the adapter's change to the model's weights, in place, and return the plain model.

    Raises ExportError if PEFT cannot apply it, if a tensor of it would go unused, or if a weight comes out non-finite.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    _untie_head(model, adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=False)
        _check_all_used(adapted, adapter)
        if adapter.weight != 1.0:
            for module in adapted.modules():
                if isinstance(module, BaseTunerLayer):
                    module.scaling["default"] *= adapter.weight
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (*_LIBRARY_ERRORS, OSError) as error:
        raise ExportError(f"adapter {adapter.given} cannot be merged: {first_line(error)}") from error
    return merged


def first_line(error: Exception) -> str:
    """Return the first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _refuse_non_finite(model: PreTrainedModel, folder: Path) -> None:
    import torch

    for name, parameter in model.named_parameters():
        # Least and greatest carry NaN and infinity over, and take no memory as a mask would.
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise ExportError(f"{folder} is broken: {name} has values that are not finite", hint="fetch it again")


def _refuse_remote_code(folder: Path, *, trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(folder / "config.json")
    if config.get("model_type") in CONFIG_MAPPING_NAMES or trust_remote_code:
        return
    if config.get("auto_map"):
        raise ExportError(f"{folder} runs Python code of its own", hint="--trust-remote-code lets it, if you trust it")
    raise ExportError(f"{folder} has model_type {config.get('model_type')!r}, which transformers does not know")


def _untie_head(model: PreTrainedModel, adapter: PeftFolder) -> None:
    """Give a tied head weights of its own if the adapter changes one of the two: merging would change both."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    changed = {name for name in tensor_shapes([adapter.path / WEIGHTS]) if ".lora_" in name}
    if any(".lm_head." in name or ".embed_tokens." in name for name in changed):
        from torch.nn import Parameter

        head.weight = Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _check_all_used(adapted: Any, adapter: PeftFolder) -> None:
    from peft import get_peft_model_state_dict

    used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    stored = {name for name in tensor_shapes([adapter.path / WEIGHTS]) if ".lora_" in name}
    for name in sorted(stored - used):
        raise ExportError(f"adapter {adapter.given} does not fit the base model: {name} matches no layer")
    for name in sorted(name for name in used - stored if ".lora_" in name):
        raise ExportError(f"adapter {adapter.given} is incomplete: {name} is missing")
