"""Text from elsewhere, made harmless."""

import pytest

from lolcats.printable import MOST_CHARACTERS, one_line, printable, reason, without_controls


@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]52;c;eA==\x07", "\x9b31m", "a\rb", "\u202eabc", "\ud800", "\u2028"])
def test_what_a_terminal_obeys_is_written_out(text: str) -> None:
    shown = printable(text)
    assert shown != text and shown.isprintable() and "\\" in shown
    assert printable(shown) == shown
    assert without_controls(text) in ("[2J", "]52;c;eA==", "31m", "ab", "abc", "")


@pytest.mark.parametrize("text", ["a\tb\nc", "[red]x[/red]", "žluťoučký 马 🏴 👩‍👧", "\u0633\u0644\u200c\u0647\u0627"])
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == without_controls(text) == text


def test_lines_are_joined_and_bounded() -> None:
    assert one_line("first:\n  second\nthird\n") == "first: second; third"
    line = one_line("\x1b" * 50_000_000 + "end")
    assert len(line) <= MOST_CHARACTERS and line.endswith("end")
    assert reason(KeyError()) == "KeyError"
