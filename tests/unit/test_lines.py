from __future__ import annotations

import pytest

from ctrport.lines import one_line, pair


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("default/web", "k=default/web"),
        ("[2001:db8::1]:8080:80/tcp", "k=[2001:db8::1]:8080:80/tcp"),
        (7, "k=7"),
        ("", 'k=""'),
        ("two words", 'k="two words"'),
        ("a=b", 'k="a=b"'),
        ('say "no"', 'k="say \\"no\\""'),
        ("C:\\x", 'k="C:\\\\x"'),
        ("a\nb\x1b[2J", 'k="a\\nb\\x1b[2J"'),
        ("caf\u00e9", "k=caf\u00e9"),
        ("\u2028", 'k="\\u2028"'),
    ],
)
def test_values_are_quoted_where_they_need_it(value: object, line: str) -> None:
    assert pair("k", value) == line


def test_what_is_printable_is_one_line_as_it_is() -> None:
    assert one_line("it's \u00e9") == "it's \u00e9"
    assert one_line("a\tb\udcff") == "a\\tb\\udcff"
