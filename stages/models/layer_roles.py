"""What the linear layers of a block are for, by their names in the model families of transformers.

The role matters to `--beta` (LAMP Eqs. 3-4), which moves weights from q, k, v to fc2. A fused layer of query, key and
value is "qkv". A layer that is not in the table is pruned all the same, and beta is refused there.

"vital" are small projections that steer a whole block: the step and the gates of a state space, the input of each layer
in Gemma 3n and 4. They hold few weights and stay dense unless the user says otherwise. Projections of attention and of
an MLP are never among them, however small.
"""

from __future__ import annotations

VITAL = "vital"

# The last part of a layer's path, or its last two where one is not enough.
ROLES = {
    # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM, StableLM, Cohere, Granite, ...
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "fc2",
    # OPT, Phi
    "out_proj": "out",
    "fc1": "fc1",
    "fc2": "fc2",
    "self_attn.dense": "out",
    # Phi-3, fused
    "qkv_proj": "qkv",
    "gate_up_proj": "fc1",
    # GPT-NeoX, Bloom, Falcon
    "query_key_value": "qkv",
    "attention.dense": "out",
    "self_attention.dense": "out",
    # Segment Anything
    "qkv": "qkv",
    "attn.proj": "out",
    "mlp.lin1": "fc1",
    "mlp.lin2": "fc2",
    "dense_h_to_4h": "fc1",
    "dense_4h_to_h": "fc2",
    # GPT-2, GPT-BigCode, Starcoder2
    "c_attn": "qkv",
    "attn.c_proj": "out",
    "c_fc": "fc1",
    "mlp.c_proj": "fc2",
    # GPT-J, CodeGen
    "fc_in": "fc1",
    "fc_out": "fc2",
    # MPT
    "Wqkv": "qkv",
    "ffn.up_proj": "fc1",
    "ffn.down_proj": "fc2",
    # LFM2
    "feed_forward.w1": "gate",
    "feed_forward.w3": "up",
    "feed_forward.w2": "fc2",
    # ModernBERT
    "attn.Wo": "out",
    "mlp.Wi": "fc1",
    "mlp.Wo": "fc2",
    # RWKV
    "attention.output": "out",
    "feed_forward.key": "fc1",
    "feed_forward.value": "fc2",
    # Granite 4
    "shared_mlp.input_linear": "fc1",
    "shared_mlp.output_linear": "fc2",
    # Mamba, Jamba, Falcon-Mamba, Doge: the step and the selection of the state
    "x_proj": VITAL,
    "dt_proj": VITAL,
    # Linear attention of Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear; xLSTM: gates and decay of the state
    "in_proj_a": VITAL,
    "in_proj_b": VITAL,
    "in_proj_ba": VITAL,
    "linear_attn.a_proj": VITAL,
    "linear_attn.b_proj": VITAL,
    "self_attn.b_proj": VITAL,
    "igate_preact": VITAL,
    "fgate_preact": VITAL,
    # Gemma 3n, Gemma 4: the embedding of each layer, and how several hidden states are mixed
    "per_layer_input_gate": VITAL,
    "per_layer_projection": VITAL,
    "correction_coefs": VITAL,
    "prediction_coefs": VITAL,
    "modality_router": VITAL,
    "linear_left": VITAL,
    "linear_right": VITAL,
}


def role_of(path: str) -> str | None:
    """The role of the layer at `path` within its block, or None if the table does not know it."""
    parts = path.split(".")
    return ROLES.get(".".join(parts[-2:])) or ROLES.get(parts[-1])
