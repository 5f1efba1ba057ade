"""YAML as settings need it: a key given twice is an error, `1e-4` is a number, and small files stay small.

Settings come with models from anywhere. Aliases that refer to aliases could stand for gigabytes, so what a text stands
for when they are written out is bounded, and so are its length and its depth.
"""

import re
from collections import Counter
from typing import Any

import yaml

MOST_CHARACTERS = 250_000
"""Of a text, and of what it stands for."""
MOST_LEVELS = 30


class _Loader(yaml.SafeLoader):
    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.level >= MOST_LEVELS:  # here already, since the scanner takes long over many open brackets
            raise yaml.YAMLError(f"it is nested too deeply; expected {MOST_LEVELS} levels at most")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {', '.join(repeated)}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


# PyYAML reads 1e-4 as text because YAML 1.1 wants 1.0e-4. The dumper must agree, or the text "1e4" would not be quoted.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(text: str) -> Any:
    """The value that `text` holds.

    Raises:
        yaml.YAMLError: broken YAML, a mapping with a key given twice, a value that cannot be read, or more text or
            levels than settings have.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(
            f"{len(text):,} characters are too many for settings; expected {MOST_CHARACTERS:,} at most"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _size(node, {}, 1)) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"its aliases stand for {size:,} characters; expected {MOST_CHARACTERS:,} at most")
        return loader.construct_document(node)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:  # 2024-99-99, !!int "", ...
        raise yaml.YAMLError(f"it holds a value that cannot be read: {error}") from error


def write_yaml(value: dict[str, Any]) -> str:
    """Text that `read_yaml` reads back to an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _size(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """Characters that a node stands for when aliases are written out; `known` holds those of finished nodes.

    Raises:
        yaml.YAMLError: a node inside itself, too many levels, or a character that no file can hold.
    """
    if level > MOST_LEVELS:
        raise yaml.YAMLError(
            f"an alias stands for itself, or for too many levels; expected {MOST_LEVELS} levels at most"
        )
    if isinstance(node, yaml.ScalarNode):
        if bad := re.search("[\x00\ud800-\udfff]", node.value):
            raise yaml.MarkedYAMLError(problem=f"unusable character {bad[0]!r}", problem_mark=node.start_mark)
        return 1 + len(node.value)
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(part, known, level + 1) for part in parts)
    return known[id(node)]
