import pytest

from ovms_lora.core.errors import UsageError
from ovms_lora.export.request import RuntimeSource
from ovms_lora.export.source_loras import parse_source_loras


def test_adapters_and_composites_are_read() -> None:
    loras = parse_source_loras("sql=loras/sql, tools=org/tools:0.8,mix=@sql:0.7+@tools:-0.5,both=@sql+@tools")
    assert loras.adapters == (RuntimeSource("sql", "loras/sql", 1.0), RuntimeSource("tools", "org/tools", 0.8))
    assert [
        (composite.alias, [(part.adapter_alias, part.alpha) for part in composite.components])
        for composite in loras.composites
    ] == [("mix", [("sql", 0.7), ("tools", -0.5)]), ("both", [("sql", None), ("tools", None)])]


def test_a_colon_that_no_number_follows_is_part_of_the_path() -> None:
    assert parse_source_loras("sql=a:b").adapters == (RuntimeSource("sql", "a:b"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not alias=SOURCE"),
        ("sql", "'sql' is not alias=SOURCE"),
        ("sql=", "is not alias=SOURCE"),
        ("a=x,", "'' is not alias=SOURCE"),
        ("../x=y", "adapter alias '../x' is not valid"),
        ("text=y", "'text' is reserved"),
        ("a=x,a=y", "names 'a' twice"),
        ("a=x,a=@a", "names 'a' twice"),
        ("mix=@a", "'a', which is not in the list"),
        ("a=@b,b=@a", "'b', which is a composite itself, and not an adapter"),
        ("a=x,mix=@a+b", "'b' of 'mix' is not @alias:alpha"),
        ("a=x,mix=@a:much", "'@a:much' of 'mix' is not @alias:alpha"),
        ("a=x:inf", "inf is not between -1000 and 1000"),
        ("a=x,mix=@a:-1e9", "-1e9 is not between -1000 and 1000"),
        ("a=x,mix=@", "not valid"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source_loras(text)
