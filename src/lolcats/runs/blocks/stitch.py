"""All blocks' results as one finished stage 1, from which the run goes on as from any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from lolcats.config.changes import differences, forbidden
from lolcats.errors import LolcatsError
from lolcats.files import read_json_object
from lolcats.identity import samples_digest, weight_sample
from lolcats.models.block import Part
from lolcats.runs.blocks.work import Work
from lolcats.training.checkpoint import damaged, load_tensors
from lolcats.training.resume import Checkpoints, Progress


def stitch(work: Work) -> None:
    """Write checkpoints of the whole stage from those of its blocks.

    Raises:
        LolcatsError: a block is missing, not finished, damaged, or was trained with other settings; the message says
            which command makes it.
    """
    counts, samples = _read_done(work)
    last, best = dict[str, Tensor](), dict[str, Tensor]()
    parts: list[tuple[int, dict[str, Any]]] = []
    for number, layers in enumerate(counts):
        folder = work.places.block(number)
        if (folder / "as_it_is.safetensors").exists():
            tensors = load_tensors(folder / "as_it_is.safetensors")[0]
            last, best = {**last, **tensors}, {**best, **tensors}
            continue
        if not layers:
            continue
        tensors, metadata = _read(work, number, "last")
        last |= tensors
        best |= _best(work, number, tensors, metadata)
        parts.append((layers, metadata))
    if not parts:
        raise LolcatsError("no block has anything to learn, so there is no first stage")
    _check_equal(work, [metadata for _, metadata in parts])
    first = parts[0][1]
    samples |= _samples_of_ends(work)
    settings = {**first["settings"], "transfer": work.config.transfer.model_dump(mode="json")}
    identity = {"settings": settings, "data": first["data"], "weights": samples_digest(samples)}
    checkpoints = Checkpoints(work.places.checkpoints, "transfer", first["steps"], work.config.seed, identity)
    progress = _progress(parts)
    checkpoints.save_best(best, progress)
    checkpoints.save_last(last, progress, first["schedule"])  # with it the stage counts as finished


def _read_done(work: Work) -> tuple[list[int], dict[str, bytes]]:
    """Linearized layers of each block, and samples of the weights of all."""
    counts: list[int] = []
    samples: dict[str, bytes] = {}
    for number in range(work.plan.count):
        file = work.places.done(number)
        again = f"delete its folder {file.parent} and start {work.command(number)}"
        if not file.exists():
            state = "is not finished" if work.places.block(number).exists() else "has not been trained"
            raise LolcatsError(f"block {number} of {work.plan.count} {state}: start {work.command(number)}")
        content = read_json_object(file, again)
        try:
            counts.append(int(content["layers"]))
            samples |= {str(name): bytes.fromhex(value) for name, value in content["samples"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LolcatsError(f"{file} cannot be used: it is not complete ({error}); {again}") from error
    return counts, samples


def _read(work: Work, number: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = work.places.block(number) / f"{name}.safetensors"
    if not file.exists():
        raise LolcatsError(f"{file} is missing: put it back, or delete its folder and start {work.command(number)}")
    tensors, metadata = load_tensors(file)
    if name == "last" and metadata.get("step") != metadata.get("steps"):
        raise damaged(file, f"it is at step {metadata.get('step')} of {metadata.get('steps')}, though it is finished")
    return tensors, metadata


def _best(work: Work, number: int, last: dict[str, Tensor], metadata: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of a block's best step."""
    file: Path = work.places.block(number) / "best.safetensors"
    if not file.exists() and metadata["best_step"] == metadata["step"]:
        return {name: tensor for name, tensor in last.items() if name.startswith("parameter:")}
    return _read(work, number, "best")[0]


def _check_equal(work: Work, parts: list[dict[str, Any]]) -> None:
    """Refuse blocks that were trained with other settings or text than the first."""
    for part in parts:
        wrong = [key for key in ("data", "seed", "steps") if part.get(key) != parts[0].get(key)]
        changes = differences(parts[0]["settings"], part["settings"])
        wrong += forbidden(changes, {"transfer": "begun"})  # how fast one learns may have been changed on the way
        if wrong:
            raise LolcatsError(f"the blocks in {work.places.checkpoints} were not all trained with the same "
                               f"{', '.join(wrong)}; delete the folders of those that are wrong, and start their jobs "
                               "again")  # fmt: skip


def _samples_of_ends(work: Work) -> dict[str, bytes]:
    """Of the weights before the first and behind the last layer."""
    model = work.load(Part(work.plan.layers, work.plan.layers, head=True)).model
    return {name: weight_sample(name, p) for name, p in model.named_parameters() if not p.is_meta}


def _progress(parts: list[tuple[int, dict[str, Any]]]) -> Progress:
    """Of the whole stage: its loss is the mean over layers, each with the best weights of its block."""
    total = sum(layers for layers, _ in parts)
    best: dict[str, Any] = {}
    for layers, metadata in parts:
        for name, value in metadata["best"].items():
            if isinstance(value, list):
                best.setdefault(name, []).extend(value)
            else:
                best[name] = best.get(name, 0.0) + value * layers / total
    assert math.isfinite(best["loss"])
    steps = [metadata["best_step"] for _, metadata in parts]
    first = parts[0][1]
    changes = [] if len(set(steps)) == 1 else [f"trained by blocks, whose best steps are {steps}"]
    seconds = sum(metadata["seconds"] for _, metadata in parts)
    gap, accuracy = first.get("gap"), first.get("accuracy")
    return Progress(first["step"], seconds, max(steps), best, None, changes, gap, accuracy)
