"""The table of the census: every kind of model that lampctl opens, and those that it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests import multimodal_models, small_encoders, small_sam
from tests.census.configuration import Configuration, Kind, tiny
from tests.census.verdicts import verdict_of

_ONLY_VOCABULARY = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
)
_NO_GROUPS = "num_key_value_heads head_dim"
_GPT2 = {"without": _ONLY_VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
_ROTARY_GPT = {**_GPT2, "rotary_dim": 4}
_MLA = {
    "without": "head_dim",
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_MAMBA = {
    "without": "head_dim",
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# By the names of several families: each takes its own.
_ANY_EXPERTS = {
    **_EXPERTS,
    **_ROUTED,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "expert_dim": 16,
}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_SHARED = {
    **_WINDOWS,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
}

_INDEXED = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
_RELATIVE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 2,
    "rel_extent": 8,
}
_ENCODER_AND_DECODER = {
    "without": _ONLY_VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}

_TINY: list[tuple[Kind, str, dict[str, Any]]] = [
    ("dense", "opt", {"without": _NO_GROUPS, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("dense", "gpt2", _GPT2),
    ("dense", "gpt-sw3", _GPT2),
    ("dense", "openai-gpt", _GPT2),
    ("dense", "gpt_neo", {"without": f"{_ONLY_VOCABULARY}", "hidden_size": 32, "num_layers": 3, "num_heads": 4,
                          "max_position_embeddings": 128, "window_size": 8,
                          "attention_types": [[["global", "local", "global"], 1]]}),
    ("dense", "bloom", {"without": _ONLY_VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    ("dense", "mpt", {"without": _ONLY_VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    ("dense", "biogpt", {"without": _NO_GROUPS}),
    ("dense", "xglm", {"without": _ONLY_VOCABULARY, "d_model": 32, "ffn_dim": 64, "num_layers": 3,
                       "attention_heads": 4, "max_position_embeddings": 128}),
    ("dense", "ctrl", {**_GPT2, "dff": 64}),
    ("dense", "persimmon", {"without": _NO_GROUPS}),
    ("dense", "llama", {"num_key_value_heads": 4}),
    ("dense", "nemotron", {"num_key_value_heads": 4}),
    ("dense", "nanochat", {"num_key_value_heads": 4}),
    ("dense", "minicpm3", _MLA),
    ("dense", "modernbert-decoder", {"without": _NO_GROUPS}),
    ("dense", "trocr", {"without": f"{_ONLY_VOCABULARY}", "d_model": 32, "decoder_layers": 3,
                        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 128}),
    ("dense", "cpmant", {"without": _NO_GROUPS, "dim_head": 8, "dim_ff": 64}),
    ("dense", "xlm", {"without": _ONLY_VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4,
                      "max_position_embeddings": 128}),
    ("dense", "xlnet", {"without": _ONLY_VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64}),
    ("dense", "gpt_neox_japanese", {"without": _NO_GROUPS}),
    ("GQA", "llama-gqa", {"tie_word_embeddings": True}),
    ("GQA", "qwen2", {}),
    ("GQA", "qwen3", {}),
    ("GQA", "gemma", {}),
    ("GQA", "granite", {}),
    ("GQA", "helium", {}),
    ("GQA", "smollm3", {}),
    ("GQA", "arcee", {}),
    ("GQA", "olmo", {}),
    ("GQA", "exaone", {}),
    ("GQA", "internlm3", {}),
    ("GQA", "iquestcoder", {}),
    ("GQA", "apertus", {}),
    ("GQA", "seed_oss", {}),
    ("GQA", "ernie4_5", {}),
    ("GQA", "glm", {}),
    ("GQA", "hunyuan_v1_dense", {}),
    ("GQA", "bitnet", {}),
    ("GQA", "diffllama", {}),
    ("GQA", "doge", {"without": "head_dim"}),
    ("GQA", "hyperclovax", {}),
    ("GQA", "jais2", {}),
    ("GQA", "phi3", {}),
    ("GQA", "stablelm", {}),
    ("GQA", "gpt_bigcode", _GPT2),
    ("GQA", "hrm_text", {}),
    ("GQA", "apertus1p5_text", {}),
    ("GQA", "beam", {}),
    ("GQA", "dory", {}),
    ("GQA", "ministral3_text", {}),
    # No padding: transformers overwrites its row of the embeddings with zeros when it opens this family.
    ("GQA", "youtu", {**_MLA, "pad_token_id": None}),
    ("sliding window", "mistral", {"sliding_window": 8}),
    ("sliding window", "ministral", _WINDOWS),
    ("sliding window", "gemma2", _WINDOWS),
    ("sliding window", "gemma3_text", _WINDOWS),
    ("sliding window", "vaultgemma", _WINDOWS),
    ("sliding window", "starcoder2", {"sliding_window": 8}),
    ("sliding window", "cwm", _WINDOWS),
    ("sliding window", "granite_swa", _WINDOWS),
    ("sliding window", "cohere2", _WINDOWS),
    ("sliding window", "cohere_compass_text", {**_WINDOWS, "rope_parameters": {
        name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")}}),
    ("post-norm", "opt-350m", {"without": _NO_GROUPS, "ffn_dim": 64, "word_embed_proj_dim": 16,
                               "do_layer_norm_before": False}),
    ("post-norm", "olmo2", {}),
    ("post-norm", "olmo3", _WINDOWS),
    ("post-norm", "exaone4", _WINDOWS),
    ("post-norm", "glm4", {}),
    ("parallel", "gpt_neox", {"without": _NO_GROUPS, "use_parallel_residual": True}),
    ("parallel", "gptj", _ROTARY_GPT),
    ("parallel", "codegen", _ROTARY_GPT),
    ("parallel", "falcon", {"without": _NO_GROUPS, "alibi": False}),
    ("parallel", "phi", {"num_key_value_heads": 4, "without": "head_dim"}),
    ("parallel", "cohere", {}),
    ("MoE", "mixtral", {"num_local_experts": 4}),
    ("MoE", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    ("MoE", "qwen3_moe", _EXPERTS),
    ("MoE", "olmoe", _EXPERTS),
    ("MoE", "gpt_oss", {**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("MoE", "granitemoe", {"num_local_experts": 4}),
    ("MoE", "granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 16}),
    ("MoE", "phimoe", {"num_local_experts": 4}),
    ("MoE", "jetmoe", {"num_local_experts": 4, "kv_channels": 8}),
    ("MoE", "deepseek_v2", {**_MLA, **_ROUTED}),
    ("MoE", "deepseek_v3", {**_MLA, **_ROUTED}),
    ("MoE", "glm4_moe", _ROUTED),
    ("MoE", "dots1", {**_ROUTED, "n_shared_experts": 1}),
    ("MoE", "llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64, "without": ""}),
    ("MoE", "minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("MoE", "flex_olmo", _EXPERTS),
    ("MoE", "ernie4_5_moe", {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2}),
    ("MoE", "hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    ("MoE", "dbrx", {"without": _ONLY_VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
                     "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                     "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}}),
    *(
        ("MoE", name, _ANY_EXPERTS)
        for name in (
            "afmoe", "aria_text", "cohere2_moe", "exaone_moe", "flint", "granitemoe_swa", "hy_v3", "kolibri1", "laguna",
            "mellum", "solar_open",
        )
    ),
    ("MoE", "axk1", {**_MLA, **_ROUTED}),
    ("MoE", "axk2", {**_MLA, **_ROUTED}),
    ("MoE", "deepseek_v32", {**_MLA, **_ROUTED, **_INDEXED}),
    ("MoE", "glm_moe_dsa", {**_MLA, **_ROUTED, **_INDEXED}),
    ("MoE", "dots3_note_text", {
        **_MLA, **_ANY_EXPERTS, **_INDEXED, "shared_experts_intermediate_size": 16, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "sliding_window": 8,
    }),
    ("MoE", "mimo_v2_flash", {**_ANY_EXPERTS, **_WINDOWS}),
    ("MoE", "sarvam_mla", {**_MLA, **_ANY_EXPERTS}),
    ("MoE", "sarvam_moe", _ANY_EXPERTS),
    ("MoE", "longcat_flash", {**_MLA, **_ANY_EXPERTS, "num_hidden_layers": 4, "ffn_hidden_size": 32, "moe_topk": 2,
                              "expert_ffn_hidden_size": 16, "zero_expert_num": 1}),
    ("MoE", "hy_v4", {**_MLA, **_ANY_EXPERTS, **_INDEXED, "num_local_experts": 16, "intermediate_size": 256,
                      "hc_mult": 2}),
    ("MoE", "zaya", {**_ANY_EXPERTS, "num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
                     "router_hidden_size": 8}),
    ("MoE", "inkling2_text", {**_ANY_EXPERTS, **_RELATIVE, "unpadded_vocab_size": 300}),
    ("MoE", "inkling2_loop_text", {**_ANY_EXPERTS, **_RELATIVE, "unpadded_vocab_size": 300}),
    # Each kind of attention and of router that the family has; compressed entries from the fourth token on.
    ("MoE", "deepseek_v4", {
        **_ANY_EXPERTS, "num_key_value_heads": 1, "num_hidden_layers": 4, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "hc_mult": 2, "sliding_window": 8,
        "partial_rotary_factor": 0.5, "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"] * 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    }),
    ("MoE", "glm4_moe_lite", {**_MLA, **_ROUTED}),
    ("MoE", "inkling_text", {
        **_ANY_EXPERTS, **_RELATIVE, "num_local_experts": 32, "n_shared_experts": 1,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    }),
    ("MoE", "minimax_m3_vl_text", {**_ANY_EXPERTS, "dense_intermediate_size": 64, "shared_intermediate_size": 16,
                                   "index_head_dim": 8, "rotary_dim": 8}),
    ("hybrid state", "bailing_hybrid", {**_ANY_EXPERTS, **_MLA, "linear_head_dim": 8, "linear_num_heads": 4,
                                        "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    ("hybrid state", "kimi_linear", {**_ANY_EXPERTS, **_MLA, "linear_head_dim": 8, "linear_num_heads": 4,
                                     "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    ("hybrid state", "lfm3", {}),
    ("hybrid state", "mamba", {"without": _NO_GROUPS, "state_size": 2, "conv_kernel": 2}),
    ("hybrid state", "mamba2", {"without": "num_key_value_heads", "state_size": 8, "num_heads": 8, "n_groups": 2,
                                "chunk_size": 8}),
    ("hybrid state", "falcon_mamba", {"without": _NO_GROUPS, "state_size": 2, "conv_kernel": 2}),
    ("hybrid state", "bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    ("hybrid state", "falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}),
    ("hybrid state", "jamba", {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 2}),
    ("hybrid state", "zamba", {"without": "head_dim", "num_hidden_layers": 6, "attn_layer_period": 2,
                               "attn_layer_offset": 1, "num_key_value_heads": 4, "mamba_d_state": 8}),
    ("hybrid state", "zamba2", {"without": "head_dim", "num_hidden_layers": 4, "num_key_value_heads": 4,
                                "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8,
                                "chunk_size": 8}),
    ("hybrid state", "granitemoehybrid", {**_MAMBA, "num_local_experts": 0, "shared_intermediate_size": 64,
                                          "layer_types": ["mamba", "attention", "mamba"]}),
    ("hybrid state", "nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"], "without":
                                    "num_hidden_layers", "ssm_state_size": 8, "mamba_num_heads": 8,
                                    "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    ("hybrid state", "recurrent_gemma", {"lru_width": 32, "intermediate_size": 256, "attention_window_size": 8,
                                         "block_types": ["recurrent", "recurrent", "attention"]}),
    ("hybrid state", "rwkv", {"without": _NO_GROUPS, "context_length": 128, "attention_hidden_size": 32,
                              "rescale_every": 2}),
    ("hybrid state", "qwen3_next", {**_DELTA, "num_experts": 0}),
    ("hybrid state", "qwen3_5_text", _DELTA),
    ("hybrid state", "qwen3_5_moe_text", {**_DELTA, **_ANY_EXPERTS}),
    ("hybrid state", "qwen4_exp_text", {
        **_ANY_EXPERTS, **_DELTA, "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    }),
    ("hybrid state", "lara_mini", {**_DELTA, **_ANY_EXPERTS}),
    ("hybrid state", "olmo_hybrid", {}),
    ("hybrid state", "minimax", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    ("hybrid state", "lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    ("hybrid state", "lfm2_moe", {**_ANY_EXPERTS, "layer_types": ["conv", "full_attention", "conv"],
                                  "block_multiple_of": 16}),
    ("hybrid state", "xlstm", {"without": _NO_GROUPS, "num_heads": 4, "num_blocks": 3}),
    ("shared KV", "gemma3n_text", {**_SHARED, "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": 64,
                                   "activation_sparsity_pattern": None}),
    ("shared KV", "gemma4_text", {**_SHARED, "global_head_dim": 16}),
    ("shared KV", "gemma4_unified_text", {**_WINDOWS, "global_head_dim": 16}),
    ("encoder", "bert", {"without": _NO_GROUPS}),
    ("encoder", "roberta", {"without": _NO_GROUPS}),
    ("encoder", "electra", {"without": _NO_GROUPS, "embedding_size": 32}),
    ("encoder", "rembert", {"without": _NO_GROUPS, "input_embedding_size": 32, "output_embedding_size": 32}),
    ("encoder", "xlm-roberta", {"without": _NO_GROUPS}),
    *(
        ("encoder", name, {"without": _NO_GROUPS})
        for name in (
            "bert-generation", "big_bird", "camembert", "data2vec-text", "ernie", "megatron-bert",
            "roberta-prelayernorm", "roformer", "xlm-roberta-xl", "xmod",
        )
    ),
    ("encoder", "roc_bert", {"without": _NO_GROUPS, "shape_vocab_size": 20, "pronunciation_vocab_size": 20}),
    *(
        ("encoder-decoder", name, _ENCODER_AND_DECODER)
        for name in (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
        )
    ),
    ("encoder-decoder", "prophetnet", {
        "without": _ONLY_VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 64, "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_decoder_layers": 3,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 128,
    }),
    ("dense", "reformer", {"without": _NO_GROUPS, "is_decoder": True, "axial_pos_embds": False, "feed_forward_size": 64,
                           "attention_head_size": 8, "attn_layers": ["local", "local", "local"]}),
]  # fmt: skip
TYPE_OF = {"llama-gqa": "llama", "opt-350m": "opt", "ministral3_text": "ministral3"}

CENSUS: tuple[Configuration, ...] = (
    *(
        Configuration(name, kind, config=tiny(TYPE_OF.get(name, name), **changes), verdict=verdict_of(name, kind))
        for kind, name, changes in _TINY
    ),
    *(
        Configuration(name, "multimodal", saved=partial(multimodal_models.save, family=name))
        for name in (*multimodal_models.FAMILIES, *multimodal_models.MIXTURES)
    ),
    *(
        Configuration(
            name,
            "image encoder",
            saved=partial(small_encoders.save, name=name),
            verdict=verdict_of(name, "image encoder"),
        )
        for name in (*small_encoders.BUILDERS, *small_encoders.REFUSED)
    ),
    Configuration("sam", "segmentation", saved=small_sam.save),
)
# One of each kind: what the default tests take.
ONE_OF_EACH = (
    "gpt2",
    "qwen3",
    "gemma2",
    "olmo2",
    "gptj",
    "mixtral",
    "bamba",
    "gemma4_text",
    "gemma3",
    "vit",
    "sam",
    "bert",
    "bart",
)
