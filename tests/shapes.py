"""Configs of tiny models: dimensions by the names that architectures give them, and a layer of each kind."""

import tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What the common names of `tiny.model` leave large, or must fit each other; other architectures take those alone.
SMALL = dict(
    bos_token_id=0,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    experts_per_token=2,
    moe_k=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    decoder_layers=2,
    n_head=2,
    n_heads=2,
    num_heads=2,
    decoder_attention_heads=2,
    n_embd=32,
    d_model=32,
    n_positions=256,
    ffn_dim=64,
    decoder_ffn_dim=64,
    n_inner=64,
    word_embed_proj_dim=32,
    state_size=8,
    expand=2,
    time_step_rank=4,
    conv_kernel=4,
    ssm_state_size=8,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=1,
    attention_hidden_size=32,
    context_length=256,
    block_size=8,
    chunk_size=8,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    rotary_dim=8,
    sliding_window=64,
    attention_window=64,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=300,
    unpadded_vocab_size=300,
    altup_num_inputs=2,
    laurel_rank=4,
    lru_width=32,
    num_kv_shared_layers=0,
    d_kv=16,
    d_ff=64,
    is_decoder=True,
    tie_word_embeddings=True,
)


# What an architecture's parts must be to fit each other, where the rules above do not know.
FITTING: dict[str, dict] = dict(
    bamba=dict(attn_layer_indices=[1]),
    cohere_compass_text=dict(
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=10000.0) for kind in ("full_attention", "sliding_attention")
        }
    ),
    dbrx=dict(
        tie_word_embeddings=False,
        attn_config=dict(rope_theta=10000.0, kv_n_heads=1, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    diffllama=dict(num_key_value_heads=2),
    dory=dict(
        num_hidden_layers=6,
        layer_types=["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
        n_input_layers=2,
        n_recurrent_layers=2,
        n_output_layers=2,
    ),
    dots1=dict(n_shared_experts=1),
    falcon_h1=dict(mamba_d_ssm=64),
    # It divides by the size of a token's embedding, and a new model's is 0 for the pad token that its config names.
    gemma3n_text=dict(pad_token_id=299),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    lfm2_moe=dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    granitemoehybrid=dict(layer_types=["mamba", "attention"]),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1),
    longcat_flash=dict(
        head_dim=8, qk_head_dim=16, ffn_hidden_size=64, expert_ffn_hidden_size=16, moe_topk=2, zero_expert_num=2
    ),
    mamba2=dict(num_heads=4, head_dim=16),
    qwen4_exp_text=dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
        hc_lowrank=8,
    ),
    recurrent_gemma=dict(num_hidden_layers=3),
    reformer=dict(
        axial_pos_shape=[16, 16],
        axial_pos_embds_dim=[16, 16],
        attention_head_size=16,
        attn_layers=["local", "lsh"],
        feed_forward_size=64,
    ),
    xmod=dict(default_language="en_XX"),
    zamba=dict(
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        attention_hidden_size=64,
        attention_head_dim=32,
        num_key_value_heads=2,
    ),
    zamba2=dict(
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"],
        attention_hidden_size=64,
        attention_head_dim=32,
        num_key_value_heads=2,
        n_mamba_heads=4,
        mamba_headdim=16,
        hybrid_layer_ids=[2],
    ),
    zaya=dict(num_experts_per_tok=1, router_hidden_size=16),
)
FITTING["qwen4_exp"] = FITTING["qwen4_exp_text"]


def config_of(kind: str):
    """The architecture's config, with those of the small dimensions that it knows; text part first."""
    made = CONFIG_MAPPING[kind]
    known = made().to_dict()
    if isinstance(known.get("text_config"), dict):
        return made(text_config={**_small(known["text_config"]), **FITTING.get(kind, {})})
    names = set(known) | set(made.attribute_map)
    return made(**{**_small({name: known.get(name) for name in names}), **FITTING.get(kind, {})})


def _small(known: dict) -> dict:
    """A layer of each kind that the architecture mixes, and two at least."""
    small = {key: value for key, value in {**tiny.shape(), **SMALL}.items() if key in known}
    if "qk_rope_head_dim" in known:  # attention by latents has heads of its own sizes, and a key for each
        small.pop("head_dim", None)
        small["num_key_value_heads"] = small["num_attention_heads"]
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if len(kinds) > 1:
        small |= dict(num_hidden_layers=len(kinds), layer_types=kinds)
    return small
