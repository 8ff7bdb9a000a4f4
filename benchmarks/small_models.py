"""Every causal language model that the installed transformers can build, made small by rules over its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shallowflow.runtime.build import DTYPES, empty_model

VOCABULARY = 256
WIDTH, HEADS, HEAD_SIZE = 64, 4, 16
MAX_LAYERS = 4

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "shape_vocab_size"), VOCABULARY),
    "pronunciation_vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "embedding_dim", "dim_model_base"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("dense_intermediate_size", "dff", "dim_ff", "d_inner", "feed_forward_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads", "linear_num_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("linear_num_value_heads", "n_mamba_heads", "index_n_heads"), HEADS),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "linear_head_dim", "dim_head", "d_head"), HEAD_SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size"), HEAD_SIZE),
    **dict.fromkeys(("kv_channels", "rotary_dim", "index_head_dim", "query_pre_attn_scalar"), HEAD_SIZE),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size", "adapter_rank"), HEAD_SIZE),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), HEAD_SIZE),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    "zero_expert_num": 2,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("local_attention", "index_topk", "block_size", "index_block_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "first_k_dense_replace", "num_dense_layers"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128),
    **dict.fromkeys(("max_target_positions", "model_max_length"), 128),
}
"""What a field becomes if it is larger."""

NESTED = (
    *("text_config", "vision_config", "audio_config", "vq_config", "attn_config", "ffn_config", "patcher_config"),
    *("encoder_config", "decoder_config", "global_config", "audio_encoder_config", "depth_decoder_config"),
    *("text_encoder", "audio_encoder", "decoder"),
)
"""Configurations within a configuration."""

KEY_VALUE_HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "num_kv_heads": "num_attention_heads",
}
"""As many as query heads, one, or a group's: what a model has, it keeps."""

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "num_layers_per_stack",
    "encoder_layers",
    "num_encoder_layers",
)

WHERE_NONE = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
"""Fields that some configurations leave open though their models need them."""

DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_head_dim": 2 * HEAD_SIZE,
    "swa_qk_nope_head_dim": HEAD_SIZE,
    "swa_qk_rope_head_dim": HEAD_SIZE,
    "swa_v_head_dim": HEAD_SIZE,
    "swa_q_lora_rank": HEAD_SIZE,
    "swa_kv_lora_rank": HEAD_SIZE,
}
INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_SIZE,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
HYBRIDS = {"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "patching_mode": "fixed",  # patches of one size; the default asks a second model where they end
        "encoder_hash_byte_group_vocab": VOCABULARY,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
        "text_config": DOTS3,
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 128,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "flint": {"mlp_only_layers": [0]},
    "got_ocr2": {"vision_config": {"mlp_dim": 32, "output_channels": 32}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_SIZE},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 2,
    },
    "rwkv": {"attention_hidden_size": WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**HYBRIDS, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_SIZE},
    "zamba2": HYBRIDS,
}
"""What the rules do not suffice for."""

DECODERS = frozenset({"musicgen", "musicgen_melody"})
"""Those whose class takes the configuration of the decoder within the one that it is registered for."""

FLOAT32 = frozenset({"xlstm"})
"""Those whose own code keeps or makes float32 where the rest is half precision."""


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` in ``MODEL_FOR_CAUSAL_LM_MAPPING``."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> PreTrainedConfig:
    """The configuration of *model_type* with few and narrow layers, one of each kind that it names."""
    exceptions = EXCEPTIONS.get(model_type, {})
    original = AutoConfig.for_model(model_type).to_dict()
    return AutoConfig.for_model(model_type, **merged(shrunk(original), exceptions))


def small_model(model_type: str, compute_dtype: str, device: str) -> PreTrainedModel:
    """A model of *model_type* with all weights learning."""
    config = small_config(model_type)
    if model_type not in DECODERS:
        model = empty_model(config, compute_dtype, device)
    else:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        with torch.device(device):
            model = model_class._from_config(config.decoder, dtype=DTYPES[compute_dtype])
    trained: PreTrainedModel = model.requires_grad_(True).train()
    return trained


def batch(model_type: str, model: PreTrainedModel, device: str, shape: tuple[int, int]) -> dict[str, Any]:
    """What one forward pass of *model* takes, its labels included."""
    tokens = torch.randint(0, VOCABULARY, shape, device=device)
    if model_type in DECODERS:  # as many streams of tokens as there are codebooks
        streams = tokens.repeat(model.config.num_codebooks, 1)
        return {"input_ids": streams, "labels": tokens.unsqueeze(-1).repeat(1, 1, model.config.num_codebooks)}
    made: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if model_type == "git":  # reads tokens only behind an image
        size = model.config.vision_config.image_size
        made["pixel_values"] = torch.zeros(shape[0], 3, size, size, device=device, dtype=model.dtype)
    return made


def merged(facts: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """*facts* with *others* in their place, nested ones too."""
    made = dict(facts)
    for name, value in others.items():
        nested = isinstance(value, Mapping) and isinstance(made.get(name), Mapping)
        made[name] = merged(made[name], value) if nested else value
    return made


def shrunk(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change, and what they become."""
    made: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, dict) and name in NESTED:
            made[name] = {**_kind(value), **shrunk(value)}
        elif value is None and name in WHERE_NONE:
            made[name] = SIZES.get(name, HEADS)
        elif isinstance(value, int) and name in KEY_VALUE_HEADS:
            made[name] = HEADS if value == facts.get(KEY_VALUE_HEADS[name]) else min(value, 2)
        elif isinstance(value, int) and name in SIZES:
            made[name] = min(value, SIZES[name])
        elif isinstance(value, int) and name.endswith(("token_id", "token_index")):
            made[name] = value % VOCABULARY
    return {**made, **_layers(facts)}


def _kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": facts["model_type"]} if facts.get("model_type") else {}


def _layers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The depths, and what is listed per layer: the first layer of each kind."""
    depths = {name: facts[name] for name in DEPTHS if isinstance(facts.get(name), int)}
    depth = max(depths.values(), default=0)
    listed = {
        name: value
        for name, value in facts.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > MAX_LAYERS
    }
    kept: dict[Any, int] = {}
    for index in range(depth):
        kept.setdefault(tuple(str(value[index]) for value in listed.values()), index)
    indices = sorted(kept.values())[:MAX_LAYERS]
    if len(indices) < 2:
        indices = list(range(min(2, depth)))
    made: dict[str, Any] = {name: min(value, len(indices)) for name, value in depths.items()}
    made.update({name: [value[i] for i in indices] for name, value in listed.items()})
    return made
