"""From what a request says to tokens: rendering the chat template, encoding prompts.

This takes time for long texts, so it runs off the event loop. Owns nothing but the order of these steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.engine.special_tokens import unmark
from ovms_lora.server.call import Prompt
from ovms_lora.server.tool_use import ToolUse

if TYPE_CHECKING:
    from ovms_lora.core.request import AdapterUse
    from ovms_lora.engine.model import LoadedModel
    from ovms_lora.server.fields import Values

# What the template gets from elsewhere, so that chat_template_kwargs cannot say it again.
_OWN_VARIABLES = frozenset({"self", "messages", "tools", "add_generation_prompt"})


def completion_prompts(values: Values, model: LoadedModel, _: Sequence[AdapterUse]) -> tuple[Prompt, ...]:
    """Return the prompts of `/completions`, from texts or token ids."""
    special = values.get("add_special_tokens", True)
    return tuple(
        Prompt(tuple(model.tokenizer.encode(prompt, add_special_tokens=special)), prompt)
        if isinstance(prompt, str)
        else Prompt(prompt, _decoded(prompt, model) if values.get("echo") else "")
        for prompt in values["prompt"]
    )


def _decoded(token_ids: tuple[int, ...], model: LoadedModel) -> str:
    if len(token_ids) > model.engine.max_model_len:
        return ""  # the engine refuses it; decoding much of it would hold up all other threads
    if max(token_ids) >= model.tokenizer.vocab_size:
        raise InvalidFieldError("prompt holds a token id outside of the vocabulary", param="prompt")
    return model.tokenizer.decode(token_ids, skip_special_tokens=False)


def chat_prompts(values: Values, model: LoadedModel, uses: Sequence[AdapterUse]) -> tuple[Prompt, ...]:
    """Return the one prompt of `/chat/completions`, rendered by the template of the model or its adapter.

    What clients write stays text, whatever it looks like. Raises InvalidFieldError without a template, or when it
    refuses the messages.
    """
    template = model.chat_template_for(uses)
    if template is None:
        raise InvalidFieldError("this model has no chat template; use completions", param="messages")
    variables = values.get("chat_template_kwargs", {})
    if twice := _OWN_VARIABLES & variables.keys():
        raise InvalidFieldError(f"chat_template_kwargs cannot hold {min(twice)}", param="chat_template_kwargs")
    if "reasoning_effort" in values:
        variables = {"reasoning_effort": values["reasoning_effort"], **variables}
    mark = model.tokenizer.special_tokens.mark
    rendered = unmark(
        template.render(
            mark(values["messages"]),
            tools=mark(list(ToolUse.of(values).tools)),
            add_generation_prompt=values.get("add_generation_prompt", True),
            **{name: mark(value) for name, value in variables.items()},
        )
    )
    # The template has written the special tokens already.
    return (Prompt(tuple(model.tokenizer.encode_rendered(rendered)), rendered.text),)
