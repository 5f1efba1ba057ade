"""Small texts stay small: aliases, depth, length, and values that cannot be read."""

import pytest
import yaml

from lolcats.config.strict_yaml import MOST_CHARACTERS, read_yaml


def bomb(first: str, other: str) -> str:
    lines = [f"a0: &a0 {first}"]
    for i in range(1, 10):
        lines.append(f"a{i}: &a{i} " + other.format(",".join([f"*a{i - 1}"] * 9)))
    return "\n".join(lines)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb("[x]", "[{}]"), "aliases stand for"),
        (bomb("{x: 1}", "{{<<: [{}]}}"), "aliases stand for"),
        ("&a [*a]", "stands for itself"),
        ("&a {x: *a}", "stands for itself"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("x" * (MOST_CHARACTERS + 1), "too many"),
        ("x: " + "9" * 5000, "cannot be read"),
        ("x: 2024-99-99", "cannot be read"),
        ("x: !!int ''", "cannot be read"),
        ('x: "\\0"', "unusable character"),
        ('x: "\\ud800"', "unusable character"),
        ("!!python/object/apply:os.system [ls]", "constructor"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        read_yaml(text)


def test_aliases_of_ordinary_files_are_read() -> None:
    assert read_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 1}") == {
        "a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2], "e": 1}
    }  # fmt: skip
    assert read_yaml("") is None
