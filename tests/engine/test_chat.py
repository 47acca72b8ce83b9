"""A chat template renders messages as transformers would, and can do nothing else."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.chat_template import TemplateSource
from ovms_lora.core.errors import InvalidFieldError, ModelFolderError
from ovms_lora.engine import template_program
from ovms_lora.engine.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi <b>&'\" you"}]


def render(source: str, messages: list[Any] | None = None, **variables: Any) -> str:
    return ChatTemplate(source).render(MESSAGES if messages is None else messages, **variables)


# What templates expect.


def test_messages_become_one_text_with_nothing_escaped() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <b>&'\" you<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_generation_prompt_can_be_left_out() -> None:
    assert render(CHATML, add_generation_prompt=False).endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("tojson", '{"b": "<é\'&>", "a": [1, null]}'),
        ("tojson(ensure_ascii=true)", '{"b": "<\\u00e9\'&>", "a": [1, null]}'),
        ("tojson(separators=(',', ':'))", '{"b":"<é\'&>","a":[1,null]}'),
        ("tojson(sort_keys=true)", '{"a": [1, null], "b": "<é\'&>"}'),
        ("tojson(indent=1)", '{\n "b": "<é\'&>",\n "a": [\n  1,\n  null\n ]\n}'),
    ],
)
def test_tojson_writes_plain_json(expression: str, text: str) -> None:
    assert render(f"{{{{ value | {expression} }}}}", value={"b": "<é'&>", "a": [1, None]}) == text


def test_blocks_leave_no_blank_lines_and_loops_can_break() -> None:
    source = "{% for i in range(9) %}\n    {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\nend"
    assert render(source) == "0\n1\nend"


def test_tools_are_none_when_there_are_none() -> None:
    source = "{{ 'none' if tools is none else tools[0].name }}"
    assert [render(source), render(source, tools=[]), render(source, tools=[{"name": "f"}])] == ["none", "none", "f"]


def test_variables_of_the_request_reach_the_template() -> None:
    assert render("{{ enable_thinking }}{{ missing }}", enable_thinking=False) == "False"


def test_generation_blocks_only_group() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.role }};{% endgeneration %}{% endfor %}"
    assert render(source) == "system;user;"


def test_requests_with_tools_take_the_tool_template() -> None:
    template = ChatTemplate(TemplateSource("plain", "with {{ tools | length }}"))
    assert [template.render([]), template.render([], tools=[]), template.render([], tools=[{}])] == [
        "plain",
        "plain",
        "with 1",
    ]


def test_a_tool_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="does not compile"):
        ChatTemplate(TemplateSource("plain", "{% for %}"))


def test_strftime_now_is_today() -> None:
    year = datetime.now(tz=UTC).year
    assert render("{{ strftime_now('%Y') }}") in {str(year - 1), str(year), str(year + 1)}


@pytest.mark.parametrize("name", ["self", "messages", "environment", "context"])
def test_a_variable_of_any_name_does_no_harm(name: str) -> None:
    variables: Any = {name: 1}
    try:
        text = ChatTemplate("{{ messages[0].content }}").render(MESSAGES, **variables)
    except InvalidFieldError as refused:
        assert refused.param == "messages"
    else:
        assert text == "Be kind."


# Messages that a template refuses.


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[0].content | int(base=99) }}{{ 'x'.index('y') }}", ""),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ missing | tojson }}", "JSON"),
    ],
)
def test_an_error_in_a_template_is_an_invalid_field(source: str, reason: str) -> None:
    with pytest.raises(InvalidFieldError, match="the chat template refused the messages") as refused:
        render(source)
    assert reason in refused.value.message
    assert refused.value.param == "messages"


# The sandbox.


@pytest.mark.parametrize(
    "expression",
    [
        "messages.__class__.__mro__",
        "cycler.__init__.__globals__",
        "raise_exception.__globals__.x",
        "strftime_now.__code__.x",
        "self.__init__.x",
        "messages.append(1)",
        "messages[0].update(role='x')",
        "messages[0].pop('role')",
        "range(100001)",
        "(''|attr('__class__')).x",
        "('{0.__class__}').format(messages).x.y",
        "(messages | map(attribute='__class__') | first).x",
    ],
)
def test_attributes_and_changes_are_refused(expression: str) -> None:
    with pytest.raises(InvalidFieldError):
        render(f"{{{{ {expression} }}}}")


@pytest.mark.parametrize("expression", ["''.__class__", "messages|attr('append')", "'{0.__class__}'.format(messages)"])
def test_what_is_out_of_reach_reads_as_nothing(expression: str) -> None:
    assert render(f"{{{{ {expression} }}}}") == ""


@pytest.mark.parametrize("statement", ["include '/etc/passwd'", "import 'os' as os", "extends 'x'"])
def test_other_files_are_out_of_reach(statement: str) -> None:
    with pytest.raises(InvalidFieldError, match="no loader"):
        render(f"{{% {statement} %}}")


def test_messages_are_as_before() -> None:
    messages = [{"role": "user", "content": "x", "parts": [1]}]
    with pytest.raises(InvalidFieldError):
        render("{{ messages[0].parts.append(2) }}", messages)
    assert messages == [{"role": "user", "content": "x", "parts": [1]}]


def test_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_program, "_MAX_OUTPUT_CHARS", 1000)
    request = {"source": "{% for i in range(n) %}x{% endfor %}", "values": {"n": 1000}}
    assert template_program.answer(request) == {"text": "x" * 1000}
    request = {**request, "values": {"n": 1001}}
    assert template_program.answer(request) == {"refused": "its output is too long"}


# What spends without end.

HOSTILE = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{{ 9**(n * 10**9) }}",
    "{{ 'x' * (n * 10**11) }}",
    "{{ [1] * (n * 10**11) }}",
    "{{ '%99999999999d' % n }}",
    "{{ 'x'.center(10**12) }}",
    "{{ 'x' | indent(n * 10**12) }}",
    "{{ lipsum(n=n * 10**9) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n) if n else '' }}{% endfor %}{% endmacro %}{{ f(500) }}",
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(50) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_time_and_memory_are_bounded(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidFieldError, match=r"too much time or memory|recursion|too long") as refused:
        render(source, n=1)
    assert refused.value.param == "messages"
    assert time.monotonic() - started < 10  # of a busy machine; half a second of processor time


@pytest.mark.parametrize("source", ["{{ 9**(10**9) }}", "{{ 'x' * 10**11 }}"])
def test_constants_are_bounded_where_they_are_folded(source: str) -> None:
    with pytest.raises((ModelFolderError, InvalidFieldError), match="too much time or memory"):
        render(source)


def test_after_a_hostile_template_others_render() -> None:
    template = ChatTemplate(CHATML)
    with pytest.raises(InvalidFieldError):
        render(HOSTILE[0])
    assert template.render(MESSAGES) == render(CHATML)


# Templates that are none.


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{% nothing %}",
        "{{ x | no_such_filter }}",
        "{% for a in x %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_a_template_that_does_not_compile_is_refused(source: str) -> None:
    with pytest.raises(ModelFolderError, match="the chat template does not compile"):
        ChatTemplate(source)


# The folder.


def write(folder: Path, config: Any = None, template: str | None = None) -> None:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def from_folder(folder: Path) -> str | None:
    template = ChatTemplate.from_folder(folder)
    return template.render([]) if template else None


@pytest.mark.parametrize(
    ("config", "template", "text"),
    [
        (None, None, None),
        ({}, None, None),
        ({"chat_template": "config"}, None, "config"),
        ({"chat_template": "config"}, "file é", "file é"),
        (None, "file", "file"),
        ([1], "file", "file"),
        ({"chat_template": 5}, None, None),
        ({"chat_template": []}, None, None),
        ({"chat_template": ["x", {"name": "rag", "template": "rag"}]}, None, None),
        (
            {"chat_template": [{"name": "rag", "template": "rag"}, {"name": "default", "template": "usual"}]},
            None,
            "usual",
        ),
    ],
)
def test_the_template_is_found(tmp_path: Path, config: Any, template: str | None, text: str | None) -> None:
    write(tmp_path, config, template)
    assert from_folder(tmp_path) == text


def test_special_tokens_are_texts_or_objects(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None, "unk_token": 3}
    write(tmp_path, config, "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}")
    assert from_folder(tmp_path) == "<s>|</s>||"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_broken_tokenizer_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_that_is_no_text_or_far_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFolderError, match="cannot read"):
        ChatTemplate.from_folder(tmp_path)
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(ModelFolderError, match="larger than"):
        ChatTemplate.from_folder(tmp_path)


def test_a_tokenizer_config_with_many_added_tokens_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template": "x", "added_tokens_decoder": {str(n): "y" * 90 for n in range(20_000)}})
    assert from_folder(tmp_path) == "x"
