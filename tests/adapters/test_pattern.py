"""Patterns match what `re` matches, in a time that no pattern can stretch."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.adapters.pattern import Pattern, StepBudget
from ovms_lora.core.errors import AdapterError, AdapterErrorCode
from tests.processor_time import at_most

PATHS = [
    "",
    "lm_head",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.gate_proj",
    "model.language_model.layers.3.self_attn.v_proj",
    "model.visual.blocks.0.attn.qkv",
]
PATTERNS = [
    "q_proj",
    "",
    "()",
    "a|",
    ".*",
    ".*?q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z_]+",
    r"(.*\.)?(q_proj|lm_head)$",
    r"(.*\.)?(^model\.layers\.0\.self_attn\.q_proj)$",
    r"^(?!.*visual).*(?:q_proj|v_proj|qkv)$",
    r"^(model\.layers(?=\.).*\.(q_proj|gate_proj))$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)",
    r"(?P<block>.*)\.q_proj",
    r"[^.]*\.[^.]*\.\d{1,2}\..*",
    r"model\.layers\.([0-9]|1[01])\..+",
    r".{5,20}",
    r".{,9}",
    r".{7}",
    r"(?:[a-z_]+\.?|\d+\.){3,6}",
    r"x{y}|{}|q_proj",
    r"[]a]|[a\]-]+|[-q][\w]+",
    r"\Amodel\W.*\Z",
    r".*\Bproj",
    r"((a|b)*)*q_proj",
    r"(x*)*lm_head",
    r"(a|(b|(c|.*)))",
    "\\.\\-\\_q",
]


def pattern(text: str, budget: StepBudget | None = None) -> Pattern:
    return Pattern(text, field="target_modules", budget=budget or StepBudget())


@pytest.mark.parametrize("text", PATTERNS)
def test_matches_what_re_matches(text: str) -> None:
    ours = pattern(text)
    for path in PATHS:
        assert ours.fullmatch(path) is bool(re.fullmatch(text, path)), path


ATOMS = st.sampled_from([*"ab.", r"\w", r"\d", "[ab]", "[^a]", r"\.", "^", "$", r"\b", r"\B"])


def _wrap(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.sampled_from(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)"])
    quantifiers = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{0,}"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join).map("(?:{})".format),
        st.tuples(groups, inner).map(lambda pair: pair[0] % pair[1]),
        st.tuples(inner, quantifiers).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


@settings(max_examples=400, deadline=None)
@given(text=st.recursive(ATOMS, _wrap, max_leaves=6), path=st.text("ab1.", max_size=6))
def test_any_pattern_matches_what_re_matches(text: str, path: str) -> None:
    assert pattern(text).fullmatch(path) is bool(re.fullmatch(text, path))


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab()[]{}|*+?^$.\\-,:!=<Pd19", max_size=12))
def test_what_re_refuses_is_refused(text: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expected = re.compile(text)
    except re.error:
        expected = None
    try:
        ours = pattern(text)
    except AdapterError as error:
        assert error.code in (AdapterErrorCode.CONFIG_INVALID, AdapterErrorCode.UNSUPPORTED)
        assert expected is None or error.code is AdapterErrorCode.UNSUPPORTED
    else:
        assert expected is not None
        assert ours.fullmatch("ab.1") is bool(expected.fullmatch("ab.1"))


BOMBS = [
    "(a+)+$",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+$",
    "(.*a){12}b",
    "((a+)+)+b",
    "(?=(a+)+b)a*",
    "(?=(?=(?=a*a*a*b)a*b)a*b).*",
    "a?" * 60 + "a" * 60,
    "(" * 25 + "a*" + ")*" * 25 + "b",
    ".*" * 400 + "b",
    "(((((a{10}){10}){10}){10}){10})",
    "(a{99999}){99999}",
    "|" * 4000,
    "(" * 4000,
    "(?=" * 28 + "a*" + ")" * 28,
]


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: text[:30])
def test_a_bomb_is_matched_or_refused_at_once(text: str) -> None:
    budget = StepBudget()
    with at_most(0.5):
        try:
            bomb = pattern(text, budget)
            for _ in range(300):
                bomb.fullmatch("a" * 60)
        except AdapterError as error:
            assert error.code in (AdapterErrorCode.CONFIG_INVALID, AdapterErrorCode.UNSUPPORTED)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("(", "adapter_config_invalid"),
        (")", "adapter_config_invalid"),
        ("a**", "adapter_config_invalid"),
        ("*", "adapter_config_invalid"),
        ("^*", "adapter_config_invalid"),
        ("{1}", "adapter_config_invalid"),
        ("a|{,2}b", "adapter_config_invalid"),
        ("[b-a]", "adapter_config_invalid"),
        ("[a", "adapter_config_invalid"),
        ("a{3,2}", "adapter_config_invalid"),
        ("\\", "adapter_config_invalid"),
        ("(?P<1>a)", "adapter_config_invalid"),
        ("a" * 5000, "adapter_config_invalid"),
        (r"(a)\1", "adapter_unsupported"),
        ("(?i)a", "adapter_unsupported"),
        ("(?<=a)b", "adapter_unsupported"),
        ("(?>a)", "adapter_unsupported"),
        ("a++", "adapter_unsupported"),
        (r"\x41", "adapter_unsupported"),
        ("a{4001}" * 3, "adapter_unsupported"),
        ("(" * 40 + ")" * 40, "adapter_unsupported"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_field(text: str, code: str) -> None:
    with pytest.raises(AdapterError, match=r"^target_modules: ") as caught:
        pattern(text)
    assert caught.value.code == code
    assert len(caught.value.message) < 300


def test_one_budget_bounds_all_patterns() -> None:
    budget = StepBudget(30)
    first, second = pattern(".*a", budget), pattern(".*b", budget)
    with pytest.raises(AdapterError, match="takes too long"):
        for _ in range(10):
            first.fullmatch("c" * 10)
            second.fullmatch("c" * 10)


def test_real_patterns_on_a_large_model_stay_far_below_the_budget() -> None:
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    budget = StepBudget()
    compiled = pattern(unsloth, budget)
    for layer in range(80):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            assert compiled.fullmatch(f"model.layers.{layer}.self_attn.{name}")
    assert budget.left > 10_000
