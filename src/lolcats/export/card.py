"""The model card: what the model is, how it was made, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml

from lolcats.config import FinetuneConfig, LinearizationConfig, RunConfig, TransferConfig
from lolcats.export.contents import REPORT_FILE
from lolcats.export.source import is_local, last_part
from lolcats.files import finite
from lolcats.runs.results import Results
from lolcats.variants import label, score_cells

Format = Literal["merged", "adapter", "remote-code"]

HUB_NAMES = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LOADING = {
    "merged": """\
import lolcats  # teaches transformers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "adapter": """\
import lolcats
model, tokenizer = lolcats.load_adapter("{name}")  # base=... if the base model lies elsewhere
model = model.merge_and_unload()  # only if the adapter is not needed apart""",
    "remote-code": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)""",
}
HOLDS = {
    "merged": "This folder holds the whole model; the package lolcats runs it.",
    "adapter": "This folder holds an adapter: the LoRA matrices and what the linearization added. The weights are "
    "those of the base model, which must be converted before the adapter is put on it; `load_adapter` does both.",
    "remote-code": "This folder holds the whole model and the code that runs it, which transformers executes only with "
    "`trust_remote_code=True`. Where the package lolcats is imported, its code is used instead.",
}
REPORT = f"""\
[{REPORT_FILE}]({REPORT_FILE}) shows what was kept and what was lost: training, quality and memory beside the
controls, and each layer and head. It is one file that needs no network; download it and open it in a browser."""
LIMITS = """\
* Text further back than the window is remembered in a state of fixed size, so exact recall over long distances suffers
  most. Perplexity hardly shows that: compare this model with the controls above, and test what you need.
* Of the cache only the tokens of the last call can be taken back (cropped), which is enough for assisted generation.
* It was trained on the text named above and keeps best what resembles it. It has the base model's faults and biases."""


def model_card(config: RunConfig, results: Results, format: Format, *, name: str = "PATH", report: bool = False) -> str:
    """The text of README.md for an exported model.

    Args:
        config: the recipe.
        results: what was measured; anything may be missing.
        format: what the folder holds.
        name: the folder or hub name that is loaded.
        report: whether the page of the run lies beside the card.
    """
    base = HUB_NAMES.get(config.model, last_part(config.model))
    parts = [
        front_matter(config, format),
        f"# {base.rpartition('/')[2]}, linearized",
        f"A linearized version of `{base}`, made by the LoLCATs method ([arXiv 2410.10254](https://arxiv.org/abs/"
        "2410.10254)): softmax attention over a short window and linear attention over everything before it. In a "
        "linearized layer time is linear in the length of the text, and the memory of a text does not grow with it.",
        HOLDS[format],
        f"## Load it\n\n```python\n{LOADING[format].format(name=name)}\n```",
        "## How it was made\n\n" + "\n".join(f"* {line}" for line in recipe_lines(config, results)),
        "## Measured\n\n" + measured(results),
        *([f"## Report\n\n{REPORT}"] if report else []),
        f"## Limits\n\n{LIMITS}",
        f"## License\n\nThe license of the base model `{base}` applies to this model too.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(config: RunConfig, format: Format) -> str:
    """What the hub reads, as YAML. A base model without a hub name is left out: the hub refuses such cards."""
    base = HUB_NAMES.get(config.model, config.model)
    data: dict[str, Any] = {} if is_local(base) else {"base_model": base}
    tags = ["lolcats", "linear-attention", "linearized"] + (["peft", "lora"] if format == "adapter" else [])
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if format == "remote-code":
        data["tags"] = [*tags, "custom_code"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def recipe_lines(config: RunConfig, results: Results) -> list[str]:
    """The settings in words, one fact a line."""
    text = ", ".join(f"`{last_part(source)}`" for source in config.data.source_names)
    template = "" if config.data.template == "auto" else f"{config.data.template} template, "
    trained = results.tokens
    where = ", ".join(filter(None, (results.device, results.dtype, results.date)))
    lines = [
        layer_line(config.linearization),
        f"Training text: {text}, in sequences of {config.data.sequence_length:,} tokens ({template}"
        f"{config.data.packing} packing).",
        transfer_line(config.transfer, trained),
        finetune_line(config.finetune, trained),
        f"Seed {config.seed}" + (f"; {where}." if where else "."),
    ]
    return [*lines, "All settings are in `lolcats_recipe.yaml`, all measured numbers in `lolcats_results.json`."]


def layer_line(layer: LinearizationConfig) -> str:
    """The attention layer."""
    which = {"all": "every global attention layer"}.get(str(layer.layers), f"layers {layer.layers}")
    if isinstance(layer.layers, float):
        which = f"{layer.layers:.0%} of the global attention layers"
    return f"Linearized: {which}. {layer.in_words()}."


def transfer_line(stage: TransferConfig, trained: Mapping[str, Any]) -> str:
    """Stage 1."""
    if not stage.enabled:
        return "Stage 1, attention transfer: left out."
    return f"Stage 1, attention transfer: {_tokens(stage.tokens, trained.get('transfer'))}, learning rate {stage.lr:g}."


def finetune_line(stage: FinetuneConfig, trained: Mapping[str, Any]) -> str:
    """Stage 2."""
    if not stage.enabled:
        return "Stage 2, fine-tuning: left out."
    targets = stage.targets if isinstance(stage.targets, str) else ", ".join(stage.targets)
    how = f"LoRA of rank {stage.rank}, alpha {stage.alpha:g}, on the linear layers: {targets}"
    how = how if stage.method == "lora" else "all weights"
    error = f" + {stage.error_factor:g} x squared error of attention outputs" if stage.error_factor else ""
    maps = ", feature maps trained too" if stage.train_feature_maps else ""
    return (
        f"Stage 2, fine-tuning: {_tokens(stage.tokens, trained.get('finetune'))}, {how}{maps}, learning rate "
        f"{stage.lr:g}, loss = {stage.cross_entropy_factor:g} x next-token cross-entropy + {stage.kl_factor:g} x "
        f"divergence from the teacher{error}."
    )


def _tokens(planned: int, trained: object) -> str:
    return f"{trained if isinstance(trained, int) else planned:,} tokens"


def measured(results: Results) -> str:
    """The table of perplexities and distances from the teacher."""
    perplexity = results.perplexity
    if not perplexity:
        return "Nothing was measured."
    e = results.evaluation
    counted = f"the last {e.last} tokens of each" if e.last else "all their tokens"
    lines = [f"On {e.segments or '?'} segments of {e.length or '?'} tokens, {counted} counted. KL is the "
             "divergence of the predictions from the teacher's, in nats a token.", "",
             "| | perplexity | ratio to teacher | KL to teacher |", "|---|---:|---:|---:|"]  # fmt: skip
    for row, cells in score_cells(finite(perplexity), finite(results.kl)):
        name = "**this model**" if row == "student" else label(row, "this model")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    memory = "" if results.memory is None else f"\n\nIts {results.memory.line()}."
    return "\n".join(lines) + memory
