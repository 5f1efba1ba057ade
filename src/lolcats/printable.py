"""Text from elsewhere (names, paths, messages, what a model wrote) on its way to a terminal.

A terminal obeys escape sequences, and a reader believes what stands in a line. So control characters, marks that
reorder the text around them, and halves of characters are written out or left out before anything is shown.
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 2_000
"""Of a line about an error."""
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen, or reordering
    "\ud800-\udfff"  # halves of characters, which no encoding can write
    "\U000e0000-\U000e007f]"  # tags
)

MOST_PROBLEMS = 20
"""Wrong settings that one message explains."""


def printable(text: str) -> str:
    """`text` with what a terminal would obey written out, ESC as \\x1b; newlines and tabs stay."""
    return _UNSAFE.sub(lambda found: _written_out(found[0]), text)


def without_controls(text: str) -> str:
    """`text` without what a terminal would obey; newlines and tabs stay."""
    return _UNSAFE.sub("", text)


def one_line(text: str) -> str:
    """The lines of `text` as one printable line of bounded length.

    After a colon they go on, else a semicolon parts them. What is too long loses its middle.
    """
    head, tail = text[:MOST_CHARACTERS], text[MOST_CHARACTERS:][-MOST_CHARACTERS // 4 :]
    line = shorten(_joined(head) + (f" ... {_joined(tail)}" if tail else ""))
    return shorten(printable(line))


def reason(error: BaseException, most: int = 400) -> str:
    """What an exception of another library says, as one printable line; its type where it says nothing."""
    return shorten(one_line(str(error)), most) or type(error).__name__


def show_bytes(count: float) -> str:
    """Bytes in the unit that fits, such as 1.5 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"


def show_number(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals; very large ones in powers of ten, one that is not there as a dash."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text` without its middle if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def _joined(text: str) -> str:
    joined = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        gap = " " if joined.endswith((":", ";", ",", ".")) else "; "
        joined += (gap if joined else "") + line
    return joined


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
