"""From sources to documents: which parts a source has, what their tokens depend on, and the cache that keeps them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, Literal

from lolcats.config import SourceConfig
from lolcats.data.cache import Batches, TokenCache
from lolcats.data.documents import Documents
from lolcats.data.encoding import RECORDS, encode_texts, token_file
from lolcats.data.files import TOKEN_SUFFIXES, find_data, find_files, has_ending, is_saved_dataset
from lolcats.data.named import COLLECTIONS, NAMED
from lolcats.data.passkey import passkey_samples
from lolcats.data.progress import show_reading
from lolcats.data.records import Record
from lolcats.data.sources import HINT, check_settings, hub_place, iter_placed, local_copy
from lolcats.data.templates import Template, render
from lolcats.errors import DataError
from lolcats.identity import digest, tokenizer_identity

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Placed = Iterator[tuple[Record, str]]  # records, each with where it was read

PASSKEY_SAMPLES = 10_000
SELF_SAMPLES = 2_000


@dataclass(frozen=True)
class Context:
    """What reading needs to know beside the sources.

    Attributes:
        tokenizer: a tokenizer with an end token.
        template: for sources that choose none; "auto" is the data set's own, else plain.
        length: tokens of a sample of "passkey" and "self" that says nothing else.
        seed: of the sources that are made up.
        local: see `iter_records`.
        teacher: writes the source "self".
        console: where progress is shown; None is silent.
        vocabulary: tokens of the model that reads the text; None leaves that to the tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Literal["auto"] | Template = "auto"
    length: int = 1024
    seed: int = 0
    local: Mapping[str, str] = field(default_factory=dict)
    teacher: PreTrainedModel | None = None
    console: Console | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Part:
    """One data set."""

    name: str
    validation: int | None
    """Its first documents that are held out; None if it has no such rule."""
    load: Callable[[int | None], Documents]
    """Its documents, at most so many tokens of them (None: all)."""


def read_documents(
    sources: Sequence[str | SourceConfig],
    template: Literal["auto"] | Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    *,
    local: Mapping[str, str] | None = None,
    vocabulary: int | None = None,
) -> Documents:
    """Tokenise whole sources, one after the other; with `max_tokens` the document that crosses it is cut there.

    Tokens are kept in the cache (see `lolcats.data.cache`) and read from there the next time.

    Args:
        sources: what `iter_records` takes, and paths or globs of token files, which end in .u16, .u32 or .bin.
        template: how records become text, see `render`; "auto" is the data set's own, else plain.
        tokenizer: a tokenizer with an end token.
        max_tokens: the cap on all sources together; None reads everything.
        local: see `iter_records`.
        vocabulary: tokens of the model that reads the text; None leaves that to the tokenizer.

    Raises:
        DataError: a source that is missing, empty, broken or of another vocabulary, see `iter_records`, `encode` and
            `token_file`.
    """
    context = Context(tokenizer, template, local=local or {}, vocabulary=vocabulary)
    return load_parts([part for source in sources for part in parts_of(source, context)], max_tokens)


def load_parts(parts: Sequence[Part], max_tokens: int | None) -> Documents:
    """The documents of all parts in order, up to `max_tokens` tokens together."""
    found: list[Documents] = []
    left = max_tokens
    for part in parts:
        if left == 0:
            break
        found.append(part.load(left))
        left = None if left is None else left - found[-1].tokens
    return Documents.join(found)


def parts_of(source: str | SourceConfig, context: Context) -> list[Part]:
    """The data sets that a source stands for; nothing is read yet but names and sizes of files.

    Raises:
        DataError: a file that is missing, or "self" without a teacher.
    """
    settings = SourceConfig(name=source) if isinstance(source, str) else source
    if settings.name in COLLECTIONS:
        names = COLLECTIONS[settings.name]
        return [part for name in names for part in parts_of(settings.model_copy(update={"name": name}), context)]
    check_settings(settings)
    named = NAMED.get(settings.name)
    validation = settings.validation
    if validation is None and named is not None:
        validation = named.validation
    if has_ending(settings.name, TOKEN_SUFFIXES):
        files = find_files(settings.name, TOKEN_SUFFIXES, HINT)
        return [Part(settings.name, validation, lambda cap: _load_token_files(files, context, cap))]
    make, identity, template = _text_of(settings, context)
    key = {"text": identity, "template": template, "tokenizer": tokenizer_identity(context.tokenizer, template)}
    cache = TokenCache(key, wide=len(context.tokenizer) > 1 << 16)

    def produce(skip: int) -> Batches:
        size = 1 if settings.name == "self" else RECORDS  # what is written slowly is shown as it comes
        texts = _render_all(islice(make(), skip, None), template, context.tokenizer)
        return encode_texts(texts, context.tokenizer, batch_size=size)

    def load(cap: int | None) -> Documents:
        with show_reading(settings.name, cache, context.console) as tell:
            documents = cache.read(produce, cap, tell)
        documents = documents if cap is None else documents.split(cap)[0]
        _check_vocabulary(documents, settings.name, context)
        return documents

    return [Part(settings.name, validation, load)]


def _render_all(
    records: Iterable[tuple[Record, str]], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    for record, where in records:
        try:
            yield render(record, template, tokenizer)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _check_vocabulary(documents: Documents, name: str, context: Context) -> None:
    """Refuse tokens that the model does not have; only a tokenizer that is larger than the model can give them."""
    size = context.vocabulary
    if size is None or len(context.tokenizer) <= size:
        return
    highest = max((int(document.ids.max()) for document in documents), default=0)
    if highest >= size:
        token = context.tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"{name} holds token {highest} ({token!r}), and the model has {size} of the tokenizer's "
            f"{len(context.tokenizer)} tokens; take the tokenizer of the model, or text without that token"
        )


def _load_token_files(files: Sequence[Path], context: Context, cap: int | None) -> Documents:
    found: list[Documents] = []
    for path in files:
        left = None if cap is None else cap - sum(part.tokens for part in found)
        if left == 0:
            break
        found.append(token_file(path, context.tokenizer, left))
        _check_vocabulary(found[-1], str(path), context)
    return Documents.join(found)


def _text_of(settings: SourceConfig, context: Context) -> tuple[Callable[[], Placed], dict, Template]:
    """A function that gives placed records, what they depend on, and the template that makes them text."""
    length = settings.length or context.length
    if settings.name == "passkey":
        return _passkey(settings.limit or PASSKEY_SAMPLES, length, context)
    template = settings.template or (None if context.template == "auto" else context.template)
    if settings.name == "self":
        from lolcats.data.self_text import SelfText

        if context.teacher is None:
            raise DataError('source "self" is written by the teacher of a run; here there is none, name other text')
        text = SelfText(context.teacher, context.tokenizer, settings.limit or SELF_SAMPLES, length, context.seed)
        own: Template = "chat" if context.tokenizer.chat_template else "plain"
        return (
            lambda: ((r, f"text {n} of the teacher") for n, r in enumerate(text.records())),
            text.identity,
            template or own,
        )
    named = NAMED.get(settings.name)
    identity = source_identity(settings, context.local)
    return lambda: iter_placed(settings, context.local), identity, template or (named.template if named else "plain")


def _passkey(count: int, length: int, context: Context) -> tuple[Callable[[], Placed], dict, Template]:
    def make() -> Placed:
        # The end token that closes a document, and a little room: prompt and answer are tokenised as one text.
        samples = passkey_samples(context.tokenizer, length - 1, seed=context.seed, count=count)
        for number, sample in enumerate(samples):
            yield {"prompt": sample.prompt, "completion": sample.answer}, f"passkey {number}"

    tokenizer = tokenizer_identity(context.tokenizer, "raw")
    return make, {"passkey": 1, "seed": context.seed, "count": count, "length": length, "for": tokenizer}, "raw"


def source_identity(settings: SourceConfig, local: Mapping[str, str]) -> dict[str, Any]:
    """What the records of a source depend on: file names with sizes and times, or a name and revision of the hub.

    Raises:
        DataError: a file that is missing.
    """
    source, named = settings.name, NAMED.get(settings.name)
    identity: dict[str, Any] = {"columns": settings.columns, "limit": settings.limit or (named and named.limit)}
    if source == "python-docs":
        return identity | {"topics": digest(topics)}
    place = hub_place(source) if named is not None or source.startswith("hf:") else None
    copy = local_copy(source, local)
    if place is not None and copy is None and not os.path.exists(Path(place[0]).expanduser()):
        return identity | {"hub": place, "revision": settings.revision, "named": named and source}
    folder = copy if copy is not None else place[0] if place is not None else source
    if os.path.isdir(Path(folder).expanduser()) and (place is not None or is_saved_dataset(folder)):
        files = sorted(file for file in Path(folder).expanduser().rglob("*") if file.is_file())
    else:
        files = find_data(folder, HINT)
    facts = [(str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    return identity | {"named": named and source, "place": place, "files": digest(facts), "folder": folder}
