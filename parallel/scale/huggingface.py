"""The `config.json` of a Hugging Face checkpoint as the numbers of a `Transformer`: each family names them its own way.

`parallel.scale.transformer` calls it for files of the user's.
"""

from typing import Any

from collectives.errors import UsageError

_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
    "seq": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
    "ffn": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token"),
}
_NEEDED = ("layers", "hidden", "heads", "vocab", "seq")
_GATED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "olmo",
    "cohere",
    "granite",
    "deepseek",
    "yi",
)
"""Beginnings of the model types with feed-forward blocks of three matrices."""
_UNTIED = ("llama", "mistral", "mixtral", "qwen", "phi3", "gpt_neox", "deepseek", "olmo", "granite", "yi")
"""Beginnings of the model types whose output layer has a table of its own, unless their config says otherwise."""
_OTHERWISE = {
    "kv_lora_rank": "attention with compressed keys and values",
    "n_shared_experts": "experts that every token visits",
    "shared_expert_intermediate_size": "experts that every token visits",
    "encoder_layers": "an encoder",
    "is_encoder_decoder": "an encoder",
    "ssm_state_size": "layers without attention",
    "layers_block_type": "layers of several kinds",
}
"""What a config may have that the model has not."""


def numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a transformer; an object that is no config of Hugging Face comes back as it is.

    Raises:
        UsageError: numbers are missing, or the model is of a kind that is not described by such numbers.

    """
    if "layers" in config or not any(name in config for name in (*_NAMES["hidden"], "model_type", "architectures")):
        return config
    config = config | (config.get("text_config") or {})
    kind = str(config.get("model_type", ""))
    if strange := [text for name, text in _OTHERWISE.items() if config.get(name)]:
        raise UsageError(f"a {kind or 'model'} with {strange[0]} is not what the formulas are of")
    found: dict[str, Any] = {}
    for field, names in _NAMES.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found[field] = value
    if missing := [field for field in _NEEDED if field not in found]:
        wanted = ", ".join(" or ".join(_NAMES[field][:2]) for field in missing)
        raise UsageError(f"it looks like a config.json of Hugging Face, but has no {wanted}")
    found.setdefault("ffn", 4 * found["hidden"])
    if config.get("multi_query"):
        found["kv_heads"] = found.get("kv_heads", 1) if config.get("new_decoder_architecture") else 1
    tied = config.get("tie_word_embeddings", not kind.startswith(_UNTIED))
    return found | {
        "gated": kind.startswith(_GATED),
        "tied": bool(tied),
        "name": str(config.get("_name_or_path") or kind),
    }
