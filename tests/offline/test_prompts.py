"""Every form of a prompt that vLLM takes, and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.errors import ArgumentError
from ovms_lora.engine.chat import ChatTemplate
from ovms_lora.offline.prompts import Prompt, read_conversations, read_prompts
from tests.engine.harness import TOKENIZER
from tests.offline.fake_llm import TEMPLATE

HI, HO = Prompt((104, 105), "hi"), Prompt((104, 111), "ho")
IDS = Prompt((104, 105))
USER = {"role": "user", "content": "hi"}


def conversations(messages: Any, template: str = TEMPLATE, **variables: Any) -> list[str | None]:
    variables = {"add_generation_prompt": False, **variables}
    found = read_conversations(messages, TOKENIZER, ChatTemplate(template), tools=None, variables=variables)
    assert all(prompt.text and prompt.token_ids == tuple(prompt.text.encode()) for prompt in found)
    return [prompt.text for prompt in found]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", [HI]),
        ("", [Prompt((), "")]),
        (["hi"], [HI]),
        (("hi", "ho"), [HI, HO]),
        ([104, 105], [IDS]),
        ((104, 105), [IDS]),
        (np.array([104, 105]), [IDS]),
        ([[104, 105]], [IDS]),
        ([[104, 105], [1]], [IDS, Prompt((1,))]),
        (np.array([[104, 105], [104, 105]]), [IDS, IDS]),
        ({"prompt": "hi"}, [HI]),
        ({"prompt_token_ids": [104, 105]}, [IDS]),
        ({"prompt_token_ids": np.array([104, 105])}, [IDS]),
        ({"prompt_token_ids": [104, 105], "prompt": "as shown"}, [Prompt((104, 105), "as shown")]),
        (["hi", [104, 105], {"prompt": "ho"}, {"prompt_token_ids": (1,)}], [HI, IDS, HO, Prompt((1,))]),
        ([[]], [Prompt(())]),
        ([], []),
    ],
)
def test_forms_of_prompts(given: Any, prompts: list[Prompt]) -> None:
    assert read_prompts(given, TOKENIZER) == prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts cannot be of type NoneType"),
        (5, "prompts cannot be of type int"),
        (["hi", 5], "prompt 1: a text or a list of token ids is expected"),
        (["hi", None], "prompt 1: neither a text nor token ids"),
        ([["hi"]], "prompt 0: a text or a list of token ids is expected"),
        ([[1, 2.5]], "prompt 0: a text or a list of token ids is expected"),
        ({}, "prompt 0: neither a text nor token ids"),
        ({"prompt": 5}, "prompt 0: a text is expected, not int"),
        ({"prompt_token_ids": "hi"}, "prompt 0: a text or a list of token ids is expected"),
        (["hi", {"prompt": "x", "multi_modal_data": {}}], "prompt 1: 'multi_modal_data' is not supported in a prompt"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_index(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        read_prompts(given, TOKENIZER)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([USER], ["<user>hi"]),
        ((USER, {"role": "assistant", "content": "ho"}), ["<user>hi<assistant>ho"]),
        ([[USER], [USER, USER]], ["<user>hi", "<user>hi<user>hi"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}], ["<user>a\nb"]),
        ([{"role": "user", "content": None}], ["<user>"]),
        ([{"role": "user"}], ["<user>"]),
        ([], []),
    ],
)
def test_conversations_are_rendered(messages: Any, rendered: list[str]) -> None:
    assert conversations(messages) == rendered


def test_messages_keep_what_else_they_hold() -> None:
    assert conversations([{**USER, "name": "Ann"}], "{{ messages[0].name }}") == ["Ann"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([[]], "conversation 0: a list of messages is expected"),
        (["hi"], "conversation 0: a list of messages is expected"),
        ("hi", "messages cannot be of type str"),
        (USER, "messages cannot be of type dict"),
        (None, "messages cannot be of type NoneType"),
        ([[USER], [{"content": "hi"}]], "conversation 1: every message is a mapping with a 'role'"),
        ([[USER, "hi"]], "conversation 0: every message is a mapping with a 'role'"),
        ([{"role": "user", "content": 5}], "conversation 0: content is a text, or a list of texts in parts"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "conversation 0: content is a text, or a list of texts in parts",
        ),
    ],
)
def test_what_is_no_conversation_is_named_by_its_index(messages: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        conversations(messages)
    assert str(refused.value) == message


def test_what_a_template_refuses_is_named_by_its_index() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}x"
    with pytest.raises(ArgumentError, match=r"^conversation 1: the chat template refused the messages: one only$"):
        conversations([[USER], [USER, USER]], template)


@pytest.mark.parametrize("variables", [{"messages": []}, {"tools": []}])
def test_variables_cannot_replace_the_messages(variables: Mapping[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="chat_template_kwargs cannot hold"):
        read_conversations([USER], TOKENIZER, ChatTemplate(TEMPLATE), tools=None, variables=variables)
