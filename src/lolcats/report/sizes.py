"""What a model takes and what was trained of it, counted from its configuration; its weights are not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.facts import ModelFacts, describe
from lolcats.models.config import read_model_config
from lolcats.models.empty import empty_model
from lolcats.planning.memory import trained_numbers
from lolcats.planning.shapes import shape_of

CONTEXTS = (1024, 4096, 16_384, 65_536, 131_072)
"""Tokens of the texts whose memory a report compares."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model."""

    facts: ModelFacts
    trained: dict[str, int]
    """Stage -> numbers that it trains."""

    @property
    def parameters(self) -> int:
        """All of the model's, what was added among them."""
        return self.facts.parameters

    def memory(self) -> list[tuple[int, int, int]]:
        """(tokens, bytes of the teacher's cache, bytes of the student) of one text, all layers together."""
        return [(n, self.facts.softmax_bytes(n), self.facts.own_bytes(n)) for n in CONTEXTS]


def read_sizes(folder: Path, config: RunConfig) -> Sizes:
    """The sizes of the model in a folder, which was made by a recipe.

    Raises:
        LolcatsError: its configuration cannot be used.
    """
    try:
        model = empty_model(read_model_config(str(folder)))
    except LolcatsError:
        raise
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise LolcatsError(f"no model can be made of the configuration in {folder}: {error}") from error
    facts = describe(model)
    trained = {"transfer": facts.added} if config.transfer.enabled else {}
    if config.finetune.enabled and facts.linearized:
        trained["finetune"] = trained_numbers(shape_of(model, config), config)
    return Sizes(facts, trained)
