"""Which families of the installed transformers lolcats understands: the self-check on a tiny random model of each.

python benchmarks/families.py [FAMILY ...] [--markdown]

Every family of AutoModelForCausalLM is made with a few layers of a few numbers, converted, and checked
(`lolcats.modeling.check_model`). A family is tried as its configuration is by default; where all its layers are local
then, it is tried once more without a sliding window.
"""

from __future__ import annotations

import argparse
import datetime
import re
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lolcats import LinearizationConfig, LolcatsError, convert
from lolcats.modeling import check_model, linearized_layers

LAYERS = 4
TINY: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 128),
    **dict.fromkeys(["initializer_range", "init_std"], 0.2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **{"vocab_size": 97, "encoder_layers": 1, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 6, "attention_dropout": 0.0, "vocab_size_per_layer_input": 97},
    **{"hidden_size_per_layer_input": 8, "global_head_dim": 16, "expert_ffn_hidden_size": 24, "rotary_dim": 4},
}
LATENT = {"num_key_value_heads": 4, "head_dim": 4}
"""Multi-head latent attention: `head_dim` is that of the rotated part there."""
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * LAYERS,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"num_kv_shared_layers": 2},
    "hyperclovax": {"logits_scaling": 0.25},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    "whisper": {"num_key_value_heads": 4},  # another name of the heads
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"n_shared_experts": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "cohere_compass_text": {
        "head_dim": 8,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 48}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 1,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "xmod": {"default_language": "en_XX"},
}


UNTRIED = {
    "gemma3n": "its encoder of images needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts for another model and reads that model's keys",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's keys",
    "musicgen": "its tokens are sound; AutoModelForCausalLM cannot build it from its configuration",
    "musicgen_melody": "its tokens are sound; AutoModelForCausalLM cannot build it from its configuration",
}
"""Families of which no tiny model is built, and why."""


class Outcome(NamedTuple):
    """What became of a family."""

    result: str
    """"understood", "refused", "not understood" or "not built"."""
    converted: str
    note: str


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a family with tiny sizes; nested ones too."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    settings = _sizes(default) | SPECIAL.get(kind, {}) | changes
    for name in getattr(config_class, "sub_configs", {}) or {}:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            given = settings.get(name) or SPECIAL.get(f"{inner.model_type}", {})
            settings[name] = type(inner)(**(_sizes(inner) | given | changes))
    return config_class(**settings)


def _sizes(default: PretrainedConfig) -> dict[str, Any]:
    values = default.to_dict()  # attributes of a configuration with layers of different sizes cannot be read
    names = set(values) | set(getattr(type(default), "attribute_map", {}))
    settings = {name: value for name, value in TINY.items() if name in names and values.get(name) != 0}
    if "qk_rope_head_dim" in names:
        settings |= LATENT
    if "q_lora_rank" in names and default.q_lora_rank is not None:
        settings["q_lora_rank"] = 12
    if getattr(default, "sliding_window", None):
        settings["sliding_window"] = 6
    if "is_decoder" in names and not default.is_encoder_decoder:
        settings["is_decoder"] = True
    kinds = sorted(set(getattr(default, "layer_types", None) or []) - {"full_attention"})
    fixed = getattr(getattr(type(default), "layer_types", None), "fset", True) is None  # a property without a setter
    if kinds and "full_attention" in default.layer_types and not fixed:
        settings["layer_types"] = [*kinds, *["full_attention"] * LAYERS][: max(2, LAYERS // 2)] * 2
    return settings


def build(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def try_family(kind: str, **changes: Any) -> Outcome:
    """Build, convert, check."""
    if kind in UNTRIED:
        return Outcome("not built", "", UNTRIED[kind])
    try:
        model = build(kind, **changes)
    except Exception as error:  # a family may ask for anything that its tiny configuration does not give
        return Outcome("not built", "", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    try:
        convert(model, LinearizationConfig(window=5, sinks=2))
    except LolcatsError as error:
        if "are local" in str(error) and not changes:
            again = try_family(kind, sliding_window=None)
            if again.result == "understood":
                return again._replace(converted=f"{again.converted}, where sliding_window is null")
        return Outcome("refused", "", str(error).partition(" cannot be linearized: ")[2] or str(error))
    converted = describe_layers(model)
    check = check_model(model)
    wrong = next((fact for fact in check.facts if not fact.ok), None)
    if wrong is not None:
        return Outcome("not understood", converted, f"{wrong.meaning}: {wrong.problem or f'{wrong.value:.2g}'}")
    return Outcome("understood", converted, f"off by {max(fact.value for fact in check.facts):.0e}")


def describe_layers(model: PreTrainedModel) -> str:
    """Which layers were converted, and of what kind the others are."""
    config = model.config.get_text_config(decoder=True)
    converted = {layer.layer_idx for layer in linearized_layers(model)}
    rest = sorted(set(range(config.num_hidden_layers)) - converted)
    if not rest:
        return "all layers"
    kinds = getattr(config, "layer_types", None) or []
    kept = sorted({str(kinds[index]) for index in rest}) if len(kinds) == config.num_hidden_layers else ["others"]
    return f"layers of full attention; {' and '.join(kept)} stay"


def reason(outcome: Outcome) -> str:
    """Why a family was refused or not tried, without names that only it has."""
    if outcome.result == "understood":
        return outcome.converted
    return re.sub(r" \([^)]*\)", "", outcome.note).partition(", where ")[0].replace("|", "/")


def print_table(outcomes: dict[str, Outcome]) -> None:
    """Rows of a table in Markdown: families with the same outcome are one row, large rows first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, outcome in outcomes.items():
        groups.setdefault((outcome.result, reason(outcome)), []).append(kind)
    for result in ("understood", "not understood", "refused", "not built"):
        rows = [(why, kinds) for (found, why), kinds in groups.items() if found == result]
        print(f"\n{result}, {sum(len(kinds) for _, kinds in rows)}\n")
        for why, kinds in sorted(rows, key=lambda row: -len(row[1])):
            print(f"| {', '.join(kinds)} | {why} |")


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--markdown", action="store_true", help="Print the tables of docs/families.md at the end.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    date = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"{date}, transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32", flush=True)
    outcomes = {}
    for kind in args.families:
        outcomes[kind] = try_family(kind)
        print("  ".join((kind, *outcomes[kind])), flush=True)
    if args.markdown:
        print_table(outcomes)


if __name__ == "__main__":
    main()
