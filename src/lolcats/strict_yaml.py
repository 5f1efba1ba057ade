"""YAML as settings need it: a key given twice is an error, and `1e-4` is a number."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if repeated:
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
        yaml.YAMLError: broken YAML, or a mapping with a key given twice.
    """
    return yaml.load(text, _Loader)


def write_yaml(value: dict[str, Any]) -> str:
    """Text that `read_yaml` reads back to an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
