"""What the linear layers of a block are for, by their names in the model families of transformers.

The role matters to `--beta` alone (LAMP Eqs. 3-4): it moves weights from q, k, v to fc2. A fused layer of query,
key and value is "qkv". A layer that is not in the table is pruned all the same, and beta is refused there.
"""

from __future__ import annotations

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
}


def role_of(path: str) -> str | None:
    """The role of the layer at `path` within its block, or None if the table does not know it."""
    parts = path.split(".")
    return ROLES.get(".".join(parts[-2:])) or ROLES.get(parts[-1])
