"""docs/habits.md names every test of this folder that is a habit, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "habits.md"
ROW = re.compile(r"^\| [^|]+ \| ([^|]+) \| `(test_\w+\.py)::(test_\w+)` \|$", re.M)
INDEXED = ("saving", "generating", "caches", "placing", "training", "scoring")
"""Files whose tests are all in the index; of the others, which go further, it names some."""


def functions_of(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.M))


def test_the_index_names_tests() -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    named = {(file, test) for _, file, test in rows}
    assert len(named) == len(rows) >= 40
    assert not [(file, test) for file, test in named if test not in functions_of(FOLDER / file)]
    all_tests = {(f"test_{name}.py", test) for name in INDEXED for test in functions_of(FOLDER / f"test_{name}.py")}
    assert all_tests <= named


def test_versions_are_no_wishes() -> None:
    """No row says that it was seen with a release later than that in the list of versions for development."""
    constraints = (PAGE.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", constraints, flags=re.M))
    for seen, _, _ in ROW.findall(PAGE.read_text(encoding="utf-8")):
        for library in seen.split(", "):
            name, version = library.split(" ")
            assert Version(version) <= Version(pinned[name]), library
