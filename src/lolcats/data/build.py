"""Training and validation sequences from the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lolcats.config import DataConfig, SourceConfig
from lolcats.data.documents import Documents
from lolcats.data.named import COLLECTIONS, NAMED
from lolcats.data.packing import PackedDataset, pack
from lolcats.data.reading import Context, Part, load_parts, parts_of
from lolcats.data.sources import check_source
from lolcats.errors import DataError
from lolcats.models.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    teacher: PreTrainedModel | None = None,
    console: Console | None = None,
    others: Sequence[str] = (),
) -> tuple[PackedDataset, PackedDataset]:
    """Build (training, validation) sequences from separate documents, the same ones for the same seed.

    Documents are shuffled. Data sets with a rule (the first 200 records of alpaca-cleaned, say) hold out all documents
    that it names. Of the others the first ones are held out until they fill `config.validation_sequences`, or their
    share of it. Where that would take more than half of the tokens (one long text, say), the last document held out is
    divided instead: its end is validation and its beginning training. No token is in both.

    Args:
        config: sources and settings.
        tokenizer: a tokenizer with an end token.
        seed: of all shuffles, and of what "passkey" and "self" make up.
        teacher: writes the text of the source "self", and says which tokens there are.
        console: where progress is shown; None is silent.
        others: see `check_sources`.

    Raises:
        DataError: less than one training sequence is left, or a source that is missing, empty or broken.
    """
    check_sources(config, others)
    size = None if teacher is None else vocabulary_size(teacher)
    context = Context(tokenizer, config.template, config.sequence_length, seed, config.local, teacher, console, size)
    groups = [parts_of(source, context) for source in config.sources]
    held_by_rule, training, ruled = _read_mixture(config, groups, seed, console)
    length, count = config.sequence_length, config.validation_sequences
    order = np.random.default_rng(seed).permutation(len(training))
    training, ruled = training[order], ruled[order]
    if held_by_rule is None:
        _check_size(training.tokens, length, count)
        rest, held = _hold_out(training, count * length)
    else:
        rest, held = _hold_out_beside(training, ruled, held_by_rule, count * length, seed)
        count = None  # all that the rule names
    pad_id = _pad_id(tokenizer, size)
    return pack(rest, length, config.packing, pad_id), pack(held, length, config.packing, pad_id)[:count]


def _pad_id(tokenizer: PreTrainedTokenizerBase, size: int | None) -> int:
    """Padding is masked, so any id that the model has will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if isinstance(i, int) and (size is None or i < size)), 0)


def check_sources(config: DataConfig, others: Sequence[str] = ()) -> None:
    """See that the files which the settings name are there, before anything slow begins.

    Args:
        others: sources that are read elsewhere (`evaluation.sources`), of which `data.local` may name copies too.

    Raises:
        DataError: see `check_source`; or `data.local` names a data set that no source uses.
    """
    for source in [*config.sources, *others]:
        check_source(source, config.local)
    used = local_names([*config.source_names, *others])
    if strays := [name for name in config.local if name not in used]:
        raise DataError(
            f"data.local names {', '.join(strays)}, which no source uses; expected one of {', '.join(sorted(used))}"
        )


def local_names(sources: Sequence[str]) -> set[str]:
    """What the data sets among `sources` may be called in `data.local`."""
    names: set[str] = set()
    for source in sources:
        for part in COLLECTIONS.get(source, (source,)):
            names |= {part} | ({NAMED[part].hub} if part in NAMED else set())
            if part.startswith("hf:"):
                names.add(part.removeprefix("hf:").split(":")[0])
    return names


def _check_size(tokens: int, length: int, count: int) -> None:
    if tokens < (count + 1) * length:
        raise DataError(
            f"data too small: {tokens} tokens, need {(count + 1) * length} ({count} validation sequences and one to "
            f"train on, of {length} tokens); lower data.sequence_length or data.validation_sequences, or add data"
        )


def _read_mixture(
    config: DataConfig, groups: Sequence[Sequence[Part]], seed: int, console: Console | None
) -> tuple[Documents | None, Documents, np.ndarray]:
    """(Held out by rules, None without any; the rest; of each document there, whether its data set has a rule)."""
    weights = [source.weight if isinstance(source, SourceConfig) else None for source in config.sources]
    mixed = any(weight is not None for weight in weights)
    shares = np.array([1.0 if weight is None else weight for weight in weights])
    shares /= shares.sum()
    held: list[Documents] = []
    rest: list[tuple[Documents, np.ndarray]] = []
    left = config.max_tokens
    for group, share in zip(groups, shares, strict=True):
        cap = left if not mixed or left is None else int(np.ceil(left * share))
        found: list[tuple[Documents, bool]] = []
        for part in group:
            documents = load_parts([part], cap)
            cap = None if cap is None else cap - documents.tokens
            if part.validation is not None:
                held.append(documents[: part.validation])
                documents = documents[part.validation :]
            found.append((documents, part.validation is not None))
        left = left if mixed else cap
        flags = np.concatenate([np.full(len(documents), rule) for documents, rule in found])
        rest.append((Documents.join([documents for documents, _ in found]), flags))
    if mixed:
        rest = _mix(rest, shares, config, seed, console)
    training = Documents.join([documents for documents, _ in rest])
    ruled = any(part.validation is not None for group in groups for part in group)
    return Documents.join(held) if ruled else None, training, np.concatenate([flags for _, flags in rest])


def _mix(
    rest: Sequence[tuple[Documents, np.ndarray]],
    shares: np.ndarray,
    config: DataConfig,
    seed: int,
    console: Console | None,
) -> list[tuple[Documents, np.ndarray]]:
    """Take of each source its share of as many tokens as all shares allow, chosen by the seed; nothing is repeated."""
    total = min(documents.tokens / share for (documents, _), share in zip(rest, shares, strict=True))
    total = total if config.max_tokens is None else min(total, config.max_tokens)
    taken: list[tuple[Documents, np.ndarray]] = []
    for index, ((documents, flags), share) in enumerate(zip(rest, shares, strict=True)):
        order = np.random.default_rng([seed, index]).permutation(len(documents))
        part = documents[order].split(int(total * share))[0]
        taken.append((part, flags[order][: len(part)]))
        if console is not None:
            name = config.source_names[index]
            text = f"mixture: {share:.1%} {name}, {part.tokens:,} of {documents.tokens:,} tokens"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    return taken


def _hold_out_beside(
    training: Documents, ruled: np.ndarray, held: Documents, tokens: int, seed: int
) -> tuple[Documents, Documents]:
    """As `_hold_out`, beside documents that a rule holds out already: the others give their share of `tokens`."""
    free = training[~ruled]
    wanted = min(round(tokens * free.tokens / max(1, training.tokens)), free.tokens // 2)
    if wanted:
        free, more = _hold_out(free, wanted)
        held = Documents.join([held, more])
        training = Documents.join([training[ruled], free])
        training = training[np.random.default_rng([seed, 1]).permutation(len(training))]
        held = held[np.random.default_rng([seed, 2]).permutation(len(held))]
    return training, held


def _hold_out(documents: Documents, tokens: int) -> tuple[Documents, Documents]:
    """Divide documents into (rest, held out), with at least `tokens` tokens held out."""
    ends = np.cumsum(documents.length)
    last = int(np.searchsorted(ends, tokens))
    held, rest = documents[: last + 1], documents[last + 1 :]
    spare = int(ends[last]) - tokens
    if 2 * ends[last] > ends[-1] and spare > 0:
        beginning, end = held[last:].split(spare)
        rest = Documents.join([rest, beginning])
        held = Documents.join([held[:last], end])
    return rest, held
