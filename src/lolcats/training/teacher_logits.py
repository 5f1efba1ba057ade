"""The teacher's k likeliest tokens at each position, on disk: its pass is paid once, over epochs and runs.

CACHE/teacher_logits/KEY/identity.json       what the numbers depend on: the teacher, its number format, k
                         NAME.safetensors    some sequences: a digest of each, its tokens, log-probabilities, checksum

A sequence is found by its content, so runs with another seed or batch size use it. A file appears when it is whole, and
those of several processes do not meet, so a cache after any interruption is a correct beginning.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig, OptimConfig
from lolcats.errors import LolcatsError
from lolcats.files import atomic_file, cache_root, remove_leftovers_in, write_text
from lolcats.identity import NOT_COMPUTING, digest, weights_digest
from lolcats.modeling.hf import is_added
from lolcats.models.vocabulary import vocabulary_size
from lolcats.training.losses import HEAD_CHUNK, TeacherStates

VERSION = 1
SHARD_BYTES = 1 << 28
SHARD_SECONDS = 60.0  # no more work than this is lost when the process is killed
ENTRY = 8
"""Bytes of a token with its log-probability."""
OF_STUDENTS = {"linearization", "model_type", "base_model_type"}
"""Settings that a linearized model has and its teacher has not, or otherwise."""


class TopK(NamedTuple):
    """What the teacher predicts, as far as it is kept; a `Teacher` of `next_token_loss`."""

    tokens: Tensor
    """[..., k] int64, the likeliest."""
    log_t: Tensor
    """[..., k] float32, their log-probabilities."""
    rest: Tensor
    """[...] float32, the log-probability of all other tokens together; -inf where there are none."""

    def take(self, index: Any) -> TopK:
        """Some of the positions."""
        return TopK(*(tensor[index] for tensor in self))

    def flat(self) -> TopK:
        """The positions of all rows in one."""
        return TopK(*(tensor.flatten(0, 1) for tensor in self))

    def divergence(self, log_p: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over positions, times their weights, of KL(teacher || student), all other tokens as one class.

        Args:
            log_p: [T, vocabulary], the student's.
            weights: [T], None for 1.
        """
        kl = (self.log_t.exp() * (self.log_t - log_p.gather(-1, self.tokens))).sum(-1)
        if self.tokens.shape[-1] < log_p.shape[-1]:
            kl = kl + self.rest.exp() * (self.rest - _others(log_p, self.tokens))
        return kl.sum() if weights is None else kl @ weights


def _others(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of all tokens but these together."""
    return log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)


@torch.no_grad()
def top_k(teacher: TeacherStates, k: int) -> TopK:
    """Of all positions [B, N] of a teacher, the logits of some thousand at a time."""
    rows = teacher.hidden.flatten(0, 1)
    parts = []
    for part in rows.split(HEAD_CHUNK):
        log_t = teacher.head(part).log_softmax(-1)
        values, tokens = log_t.topk(k, -1)
        parts.append(TopK(tokens, values, _others(log_t, tokens)))
    shape = teacher.hidden.shape[:2]
    return TopK(*(torch.cat(some).unflatten(0, shape) for some in zip(*parts, strict=True)))


def teacher_identity(model: PreTrainedModel, k: int, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What the numbers depend on; the same for all linearizations of a teacher, before adapters are put on it.

    `gather` is as in `weights_digest`.
    """
    names = [(name.replace(".inner.", "."), p) for name, p in model.named_parameters() if not is_added(name)]
    left_out = NOT_COMPUTING | OF_STUDENTS
    settings = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    facts = {"version": VERSION, "k": k, "dtype": str(model.dtype), "weights": weights_digest(names, gather)}
    return facts | {"settings": digest(json.loads(json.dumps(settings, default=str)))}


def keys_of(ids: np.ndarray, document: np.ndarray | None) -> list[bytes]:
    """A digest of each sequence [S, N]; of its documents too, where attention stops at them."""
    parts = [np.ascontiguousarray(ids, "<i4")]
    if document is not None:
        parts.append(np.ascontiguousarray(document, "<i4"))
    return [hashlib.sha256(b"".join(part[row].tobytes() for part in parts)).digest() for row in range(len(ids))]


class LogitsCache:
    """The numbers of one teacher.

    Args:
        identity: see `teacher_identity`.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity, self.k = digest(identity), int(identity["k"])
        self.folder = cache_root() / "teacher_logits" / self.identity
        self.about = json.dumps(identity, indent=1) + "\n"
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._files: dict[Path, Any] = {}
        self._waiting: list[tuple[bytes, TopK]] = []
        self._since = time.monotonic()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def sequence_bytes(self, length: int) -> int:
        """On disk, of a sequence of `length` tokens."""
        return length * (ENTRY * self.k + 4) + 40

    def scan(self, mend: bool = False) -> None:
        """See what is there; `mend` removes files that are not whole, which one process may do."""
        self._places, self._files = {}, {}
        if mend and self.folder.is_dir():
            remove_leftovers_in(self.folder)
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    if (opened.metadata() or {}).get("identity") != self.identity:
                        raise ValueError(f"{file} is of another teacher")
                    keys = opened.get_tensor("keys").numpy()
            except (OSError, SafetensorError, ValueError):
                if mend:
                    file.unlink(missing_ok=True)
                continue
            self._places |= {key.tobytes(): (file, row) for row, key in enumerate(keys)}

    def read(self, key: bytes) -> TopK | None:
        """The numbers of a sequence [N], None where it is not there.

        Raises:
            LolcatsError: they are not as they were written.
        """
        if (place := self._places.get(key)) is None:
            return None
        file, row = place
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt").__enter__()
            opened = self._files[file]
            found = [opened.get_slice(name)[row] for name in ("tokens", "log_t", "rest")]
            whole = int(opened.get_slice("crc32")[row]) == _checksum(found)
        except (OSError, SafetensorError) as error:
            raise LolcatsError(f"cannot read {file}: {error}; delete it, and what was in it is made again") from error
        if not whole:
            raise LolcatsError(
                f"{file} is damaged (its checksum is another); delete it, and what was in it is made again"
            )
        tokens, log_t, rest = found
        return TopK(tokens.long(), log_t, rest)

    def add(self, keys: Sequence[bytes], found: TopK) -> None:
        """Keep the numbers of sequences [S, N]; they are on disk after `flush` at the latest."""
        self._waiting += [(key, found.take(row)) for row, key in enumerate(keys)]
        size = len(self._waiting) * self.sequence_bytes(found.rest.shape[1])
        if size > SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            LolcatsError: the disk is full or the place cannot be written.
        """
        waiting, self._waiting, self._since = self._waiting, [], time.monotonic()
        if not waiting:
            return
        rows = [[top.tokens.int(), top.log_t, top.rest] for _, top in waiting]
        rows = [[tensor.cpu().contiguous() for tensor in row] for row in rows]
        tensors = {name: torch.stack(some) for name, some in zip(("tokens", "log_t", "rest"), zip(*rows, strict=True))}  # noqa: B905
        tensors["keys"] = torch.from_numpy(np.frombuffer(b"".join(k for k, _ in waiting), np.uint8).copy()).view(-1, 32)
        tensors["crc32"] = torch.tensor([_checksum(row) for row in rows])
        name = hashlib.sha256(tensors["keys"].numpy().tobytes()).hexdigest()[:24]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "identity.json", self.about)
            with atomic_file(self.folder / f"{name}.safetensors", apart=True) as temporary:
                save_file(tensors, temporary, metadata={"identity": self.identity})
        except OSError as error:
            raise LolcatsError(
                f"cannot write {self.folder}: {error.strerror or error}; set LOLCATS_CACHE=FOLDER to have it elsewhere"
            ) from error


def _checksum(row: Sequence[Tensor]) -> int:
    value = 0
    for tensor in row:
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def from_cache(
    cache: LogitsCache, keys: Sequence[bytes], device: torch.device, compute: Callable[[list[int]], TopK]
) -> TopK:
    """The teacher's numbers of a batch [B, N, ...]; those of rows that are not on disk are computed.

    Args:
        cache: where the others are.
        keys: of the rows.
        device: of the result.
        compute: numbers of some rows.
    """
    found = [cache.read(key) for key in keys]
    if missing := [row for row, top in enumerate(found) if top is None]:
        computed = compute(missing)
        for place, row in enumerate(missing):
            found[row] = computed.take(place)
    parts = zip(*(top for top in found if top is not None), strict=True)
    return TopK(*(torch.stack([t.to(device, non_blocking=True) for t in some]) for some in parts))


def check_logits(config: OptimConfig, model: PreTrainedModel) -> None:
    """See that a model has as many tokens as are to be kept, before anything is trained.

    Raises:
        LolcatsError: it has fewer.
    """
    kept = config.teacher_logits if isinstance(config, FinetuneConfig) and config.enabled else None
    vocabulary = vocabulary_size(model)
    if kept is not None and kept.cache == "topk" and vocabulary is not None and kept.k > vocabulary:
        raise LolcatsError(
            f"finetune.teacher_logits.k {kept.k:,} is more than the {vocabulary:,} tokens of the model; lower it"
        )
