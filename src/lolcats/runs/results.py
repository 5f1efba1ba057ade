"""results.json: what a run has measured so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError

NUMBERS = ("perplexity", "kl", "tokens", "tokens_per_second", "seconds")
"""Sections of numbers by name."""
SECTIONS = (*NUMBERS, "by_position", "evaluation", "generation", "best", "notes", "changes")
"""Sections that are mappings."""


def read_results(file: Path) -> dict[str, Any]:
    """The content of results.json; {} where there is none.

    Raises:
        LolcatsError: it is not what `lolcats` writes there.
    """
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_bytes())
    except OSError as error:
        raise LolcatsError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise _broken(file, f"it is not JSON ({error})") from error
    if not isinstance(results, dict):
        raise _broken(file, f"it holds {str(results)[:40]!r} where an object is expected")
    for name in SECTIONS:
        if not isinstance(section := results.get(name, {}), dict):
            raise _broken(file, f"{name} is {str(section)[:40]!r} where an object is expected")
        if name in NUMBERS and not all(isinstance(value, int | float) for value in section.values()):
            raise _broken(file, f"{name} holds something that is not a number")
    if not all(isinstance(text, str) for text in results.get("generation", {}).values()):
        raise _broken(file, "generation holds something that is not text")
    return results


def _broken(file: Path, what: str) -> LolcatsError:
    return LolcatsError(f"{file} cannot be used: {what}; delete it and resume: what it held is measured again")
