"""The rule of imports: DESIGN.md states it, the sources keep it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lolcats

ROOT = Path(lolcats.__file__).parent
DESIGN = (ROOT.parents[1] / "DESIGN.md").read_text(encoding="utf-8")
GROUND = "the ground floor"
ALONE = {"ops": {"ops"}, "mixers": {"mixers", "ops", "errors"}}
"""Parts that know tensors only, and what they may import of the package."""


def layers() -> list[list[str]]:
    """The layers as DESIGN.md draws them, from left to right; the ground floor is not named there."""
    drawn = re.search(r"^    (cli -> .*\n(?:        -> .*\n)*)", DESIGN, re.MULTILINE)
    assert drawn is not None
    return [[name.strip() for name in layer.split(",")] for layer in " ".join(drawn[1].split()).split(" -> ")]


def part_of(module: str) -> str:
    """`lolcats.training.loop` -> "training"."""
    return module.split(".")[1] if "." in module else ""


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, its part of the package, part that it imports) of every import, those inside functions too."""
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT)
        if place == Path("__init__.py"):
            continue
        own = place.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "lolcats":
                found = [f"lolcats.{alias.name}" for alias in node.names if alias.name != "__version__"]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place}: expected `from lolcats... import`"
                found = [node.module or ""]
            else:
                continue
            parts = {part_of(name) for name in found if name.split(".")[0] == "lolcats"}
            yield from ((str(place), own, part) for part in sorted(parts - {own}))


def broken(edges: Iterator[tuple[str, str, str]]) -> list[str]:
    """The imports that do not point to the right."""
    level = {name: number for number, names in enumerate(layers()) for name in names}
    found = []
    for file, own, part in edges:
        up = part in level and level[part] <= level.get(own, len(level))
        if up or (own in ALONE and part not in ALONE[own]):
            found.append(f"{file} ({own if own in level else GROUND}) imports {part}")
    return found


def test_imports_point_one_way() -> None:
    assert not broken(imports())


def test_all_that_is_drawn_is_there() -> None:
    named = [name for layer in layers() for name in layer]
    assert len(set(named)) == len(named) > 8
    assert not [name for name in named if not (ROOT / name).is_dir() and not (ROOT / f"{name}.py").is_file()]
    folders = {item.name for item in ROOT.iterdir() if item.is_dir() and any(item.glob("*.py"))}
    assert folders <= {*named}, "the ground floor has no folders"


@pytest.mark.parametrize(
    ("own", "part"),
    [("ops", "modeling"), ("ops", "errors"), ("mixers", "config"), ("mixers", "files"), ("ops", "mixers"),
     ("data", "modeling"), ("training", "evaluation"), ("sweep", "cli"), ("export", "sweep"),
     ("files", "training"), ("config", "ops"), ("ops", "config"), ("models", "modeling")],
)  # fmt: skip
def test_an_import_against_the_rule_is_seen(own: str, part: str) -> None:
    assert broken(iter([("x.py", own, part)]))
    assert part == "cli" or not broken(iter([("x.py", "cli", part)]))


def test_the_operation_needs_torch_alone() -> None:
    """No configuration and no transformers."""
    for file in [*(ROOT / "ops").rglob("*.py"), *(ROOT / "mixers").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"transformers", "pydantic", "peft"}, file


def module_of(file: Path) -> str:
    """`lolcats/ops/types.py` -> "lolcats.ops.types"."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, within functions too.

    `from lolcats.ops import x` is an import of `lolcats.ops.x` where that is a module, and else of `lolcats.ops`. That
    the package of a module is imported before it is left out, but for what is taken from it by name.
    """
    files = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in files:
                inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {full if full in files else node.module for full in inner.values()}
    # What the package itself offers lies at the end of everything, but for its version.
    graph["lolcats"] = set()
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or by others: the strongly connected sets of more than one."""
    reach = {name: set(found) for name, found in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    sets = {frozenset({name, *(o for o in reach[name] if name in reach[o])}) for name in graph if name in reach[name]}
    return sorted(sorted(members) for members in sets)


def test_no_module_imports_in_a_circle() -> None:
    assert not circles(module_imports())


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_nothing_that_runs_code_reads_a_file() -> None:
    """Pickle, `torch.load`, `eval` and the like are nowhere in the package."""
    readers = r"pickle\.(loads?|Unpickler)\(|torch\.load\(|allow_pickle=True|(?<![.\w])(eval|exec)\("
    forbidden = re.compile(readers + r"|yaml\.(unsafe_|full_)?load\(")
    allowed = {"strict_yaml.py", "own_tasks.py"}  # their loaders are SafeLoader's subclasses
    for file in ROOT.rglob("*.py"):
        found = forbidden.findall(ast.unparse(_without_texts(file)))
        assert not found or file.name in allowed, file
    for name in allowed:
        (file,) = ROOT.rglob(name)
        assert "yaml.SafeLoader" in file.read_text(encoding="utf-8")


def _without_texts(file: Path) -> ast.Module:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return tree
