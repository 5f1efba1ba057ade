"""Which families of the installed transformers lolcats understands: the self-check on a tiny random model of each.

python benchmarks/families.py [FAMILY ...] [--markdown]

Every family of AutoModelForCausalLM is made with a few layers of a few numbers, converted, and checked
(`lolcats.modeling.check_model`). A family is tried as its configuration is by default; where all its layers are local
then, it is tried once more without a sliding window.
"""

from __future__ import annotations

import argparse
import datetime
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
    "cohere_compass_text": {"head_dim": 8},
}


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
            settings[name] = type(inner)(**(_sizes(inner) | SPECIAL.get(f"{inner.model_type}", {}) | changes))
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
    if kinds and "full_attention" in default.layer_types:
        settings["layer_types"] = [*kinds, *["full_attention"] * LAYERS][: max(2, LAYERS // 2)] * 2
    return settings


def build(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def try_family(kind: str, **changes: Any) -> Outcome:
    """Build, convert, check."""
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
                return again._replace(note="with sliding_window: null; all layers are local otherwise")
        return Outcome("refused", "", str(error).partition(" cannot be linearized: ")[2] or str(error))
    layers, total = linearized_layers(model), model.config.get_text_config(decoder=True).num_hidden_layers
    converted = "all" if len(layers) == total else ", ".join(str(layer.layer_idx) for layer in layers) + f" of {total}"
    check = check_model(model)
    wrong = next((fact for fact in check.facts if not fact.ok), None)
    if wrong is not None:
        return Outcome("not understood", converted, f"{wrong.meaning}: {wrong.problem or f'{wrong.value:.2g}'}")
    return Outcome("understood", converted, f"off by {max(fact.value for fact in check.facts):.0e}")


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--markdown", action="store_true", help="Print rows of a table.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    date = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"{date}, transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32", flush=True)
    for kind in args.families:
        outcome = try_family(kind)
        row = (kind, outcome.result, outcome.converted, outcome.note.replace("|", "/"))
        print(f"| {' | '.join(row)} |" if args.markdown else "  ".join(row), flush=True)


if __name__ == "__main__":
    main()
