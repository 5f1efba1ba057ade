"""What all jobs of a block-wise stage 1 begin with: the model's shape, its text, and what was prepared for them."""

from __future__ import annotations

import json
import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig

from lolcats.config import RunConfig
from lolcats.config.changes import differences, forbidden, tell
from lolcats.data import build_datasets
from lolcats.errors import LolcatsError
from lolcats.files import atomic_folder, read_json_object
from lolcats.modeling.attention import LinearizedAttention, added_parameters, linearized_layers, measured_buffers
from lolcats.modeling.convert import check_supported, put_in_layers
from lolcats.modeling.modules import attention_modules, choose_layers
from lolcats.models.block import Block, Part, load_block
from lolcats.models.config import read_model_config
from lolcats.models.empty import empty_model
from lolcats.models.folder import check_files, check_place, expand_model, gguf_file
from lolcats.models.source_files import source_digest
from lolcats.models.teacher import load_teacher, load_tokenizer
from lolcats.runs.blocks.plan import Places, Plan, plan_of
from lolcats.runs.folder import RunFolder
from lolcats.training import TrainingData
from lolcats.training.blocks.store import HiddenStore
from lolcats.training.checkpoint import load_tensors
from lolcats.training.identity import data_digest
from lolcats.training.reading import check_reading


@dataclass
class Work:
    """A block-wise stage 1."""

    config: RunConfig
    """With the split of budgets, once it is found."""
    places: Places
    device: torch.device
    dtype: torch.dtype
    console: Console | None
    source: str
    """Of the safetensors."""
    model_config: PretrainedConfig
    data: TrainingData
    plan: Plan
    identity: dict[str, Any] = field(default_factory=dict)
    """What hidden states depend on, but for their boundary."""
    alone: bool = True
    """Whether no other process writes on the same terminal, so that progress can be drawn there."""

    def load(self, part: Part) -> Block:
        """Read a part of the teacher."""
        return load_block(self.source, part, self.dtype, self.device, self.config.quantization)

    def load_linearized(self, part: Part) -> Block:
        """A part of the teacher whose layers have their mixers, with the random start that they have in one piece."""
        set_seed(self.config.seed)
        block = self.load(part)
        put_in_layers(block.model, self.config.linearization)
        return block

    def precision(self) -> AbstractContextManager[object]:
        """In which the teacher computes while it is trained from; see `train`."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @property
    def autocast(self) -> torch.dtype | None:
        """Of stage 1."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None

    def store(self, boundary: int) -> HiddenStore:
        """The hidden states in front of a block."""
        remedy = f"delete it and start {self.command(boundary - 1)} again, or set transfer.blocks.hidden=recompute"
        return HiddenStore(self.places.boundary(boundary), {**self.identity, "boundary": boundary}, remedy=remedy)

    def command(self, what: int | str) -> str:
        """The command that does a part of the work."""
        return command(self.places, what)

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def open_work(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    dtype: torch.dtype,
    console: Console | None,
) -> Work:
    """Look at model and text. No weight is read, but of GGUF files, which are written out as safetensors once.

    Raises:
        LolcatsError: the settings ask for no blocks, or for such that cannot be made; or model or text is missing.
    """
    places = Places(config, folder)
    source = _source(config, places, console)
    model_config = read_model_config(source)
    plan = plan_of(config.transfer, model_config)
    shape = empty_model(model_config, dtype)
    check_supported(shape)
    choose_layers(list(attention_modules(shape)), config.linearization.layers)
    if "self" in config.data.source_names:
        raise LolcatsError('source "self" is written by the whole teacher, which block-wise training never loads; '
                           "name other text, or set transfer.blocks.size to null")  # fmt: skip
    set_seed(config.seed)
    tokenizer = load_tokenizer(expand_model(config.model))
    train_set, validation = build_datasets(
        config.data, tokenizer, config.seed, teacher=shape, console=console, others=config.evaluation.sources
    )
    data = TrainingData(train_set, validation, config.data.packing == "documents", tokenizer)
    check_reading(config.transfer, data, shape, config.seed)
    work = Work(config, places, device, dtype, console, source, model_config, data, plan)
    work.identity = {"model": source_digest(source), "data": data_digest(data), "settings": _settings(work)}
    return work


def command(places: Places, what: int | str) -> str:
    """The command that does a part of the work of a run."""
    settings = places.run.config_file
    return f"lolcats block {shlex.quote(str(settings)) if settings.exists() else 'CONFIG'} {what}"


def _source(config: RunConfig, places: Places, console: Console | None) -> str:
    """Where the model's safetensors are."""
    source = expand_model(config.model)
    if gguf_file(source) is None:
        check_place(source)
        check_files(source)
        return source
    if not (places.teacher / "config.json").is_file():
        if console is not None:
            console.print(f"{source} is one GGUF file: it is loaded whole, once, and written out as safetensors")
        with atomic_folder(places.teacher) as folder:
            load_teacher(source)[0].save_pretrained(folder)
    return str(places.teacher)


def _settings(work: Work) -> dict[str, Any]:
    """Settings that the teacher's hidden states, and the order in which they are read, depend on."""
    config, stage = work.config, work.config.transfer
    return {
        "dtype": str(work.dtype), "stored": stage.blocks.dtype, "quantization": config.quantization,
        "seed": config.seed, "size": stage.blocks.size, "tokens": stage.tokens, "batch_size": stage.batch_size,
        "micro_batch_size": stage.micro_batch_size, "recall": stage.recall.model_dump(mode="json"),
    }  # fmt: skip


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Settings by which the jobs of a stage must agree."""
    asked = config.model_dump(mode="json", include={"model", "seed", "quantization", "linearization", "transfer"})
    return json.loads(json.dumps(asked))


def read_prepared(places: Places) -> dict[str, Any]:
    """What `prepare` wrote.

    Raises:
        LolcatsError: nothing yet, or something else.
    """
    again = f"prepare it: {command(places, '--prepare')}"
    found = read_json_object(places.prepared, f"delete it and {again}")
    if not found:
        raise LolcatsError(f"{places.run.path} is not prepared for training by blocks yet; {again}")
    return found


def prepared(work: Work) -> Work:
    """The work with what was prepared for it.

    Raises:
        LolcatsError: nothing was, or with other settings, text or weights.
    """
    found = read_prepared(work.places)
    changes = differences(found.get("config") or {}, fixed_settings(work.config))
    if bad := forbidden(changes, {"transfer": "begun"}):
        raise LolcatsError(f"{work.places.prepared} was made with other settings: {tell(bad)}. Use those, or choose "
                           "another name=...")  # fmt: skip
    for key, what in (("model", "the weights of the teacher"), ("data", "the text")):
        if found.get(key) != work.identity[key]:
            raise LolcatsError(f"{work.places.prepared} was made with others: {what}; give back what was there, or "
                               "choose another name=...")  # fmt: skip
    if (split := found.get("split")) is None:
        return work
    return replace(work, config=with_found_split(work.config, split))


def with_found_split(config: RunConfig, split: list[Any]) -> RunConfig:
    """Settings whose layers have the sizes that were found for them."""
    return config.model_copy(update={"linearization": config.linearization.model_copy(update={"split": split})})


def own_layers(block: Block) -> list[LinearizedAttention]:
    """The linearized layers of a block."""
    return [layer for layer in linearized_layers(block.model) if not layer.is_meta]


def own_tensors(block: Block) -> dict[str, Tensor]:
    """All that the linearization added to the layers of a block."""
    added = {**added_parameters(block.model), **measured_buffers(block.model)}
    return {name: tensor for name, tensor in added.items() if not tensor.is_meta}


def restore_start(work: Work, block: Block) -> None:
    """Give layers that start from text what was found for them."""
    if not work.config.linearization.starts_from_text:
        return
    found = load_tensors(work.places.start)[0]
    with torch.no_grad():
        for name, tensor in own_tensors(block).items():
            tensor.copy_(found[name])
