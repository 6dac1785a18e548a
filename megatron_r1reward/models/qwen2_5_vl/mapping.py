"""The weight table of Qwen2.5-VL, under the names that published checkpoints use on disk."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig

from megatron_r1reward.models.mapping import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Entry,
    GroupedQKV,
    Layout,
    Plain,
    Tie,
    Vocabulary,
    WeightTable,
)

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
# transformers 4.52 and later name the parts of a saved model differently from the published folders.
SPELLINGS = (("model.language_model.", "model."), ("model.visual.", "visual."))


def _language_layer(index: int, qkv: GroupedQKV) -> list[Entry]:
    hf, megatron = f"model.layers.{index}.", f"language_model.decoder.layers.{index}."
    attention = [
        Entry(
            megatron=f"{megatron}self_attention.linear_qkv.{kind}",
            hf=tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"),
            layout=qkv,
        )
        for kind in ("weight", "bias")
    ]
    gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
    return [
        *attention,
        _same(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", ROW),
        Entry(megatron=f"{megatron}mlp.linear_fc1.weight", hf=gate_up, layout=GATED),
        _same(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", ROW),
        *_norms(megatron, f"{hf}input_layernorm.weight", f"{hf}post_attention_layernorm.weight"),
    ]


def _vision_block(index: int, qkv: GroupedQKV) -> list[Entry]:
    hf, megatron = f"visual.blocks.{index}.", f"vision.decoder.layers.{index}."
    entries = []
    for kind in ("weight", "bias"):
        row = ROW if kind == "weight" else REPLICATED
        gate_up = (f"{hf}mlp.gate_proj.{kind}", f"{hf}mlp.up_proj.{kind}")
        entries += [
            _same(f"{megatron}self_attention.linear_qkv.{kind}", f"{hf}attn.qkv.{kind}", qkv),
            _same(f"{megatron}self_attention.linear_proj.{kind}", f"{hf}attn.proj.{kind}", row),
            Entry(megatron=f"{megatron}mlp.linear_fc1.{kind}", hf=gate_up, layout=GATED),
            _same(f"{megatron}mlp.linear_fc2.{kind}", f"{hf}mlp.down_proj.{kind}", row),
        ]
    return entries + _norms(megatron, f"{hf}norm1.weight", f"{hf}norm2.weight")


def _norms(layer: str, before_attention: str, before_mlp: str) -> list[Entry]:
    """Checkpoints store the two norms of a layer where Transformer Engine has them: in the linear that follows."""
    places = (
        ("input_layernorm", "self_attention.linear_qkv", before_attention),
        ("pre_mlp_layernorm", "mlp.linear_fc1", before_mlp),
    )
    return [
        Entry(
            megatron=f"{layer}{norm}.weight",
            hf=(hf,),
            layout=REPLICATED,
            saved_as=f"{layer}{linear}.layer_norm_weight",
        )
        for norm, linear, hf in places
    ]


def _same(megatron: str, hf: str, layout: Layout) -> Entry:
    return Entry(megatron=megatron, hf=(hf,), layout=layout)


def weight_table(config: Qwen2_5_VLConfig) -> WeightTable:
    """Every weight of the model exactly once; tied models have no entry for `lm_head`."""
    text, vision = config.text_config, config.vision_config
    text_qkv = GroupedQKV(groups=text.num_key_value_heads, head_dim=text.hidden_size // text.num_attention_heads)
    vision_qkv = GroupedQKV(groups=vision.num_heads, head_dim=vision.hidden_size // vision.num_heads, stacked=True)
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    vocabulary = Vocabulary(rows=text.vocab_size)
    patch_embed = Plain(megatron_shape=(vision.hidden_size, -1), hf_shape=(vision.hidden_size, *kernel))
    entries = [
        _same(EMBEDDING, "model.embed_tokens.weight", vocabulary),
        _same("language_model.decoder.final_layernorm.weight", "model.norm.weight", REPLICATED),
        _same("vision.patch_embed.weight", "visual.patch_embed.proj.weight", patch_embed),
        _same("vision.decoder.final_layernorm.weight", "visual.merger.ln_q.weight", REPLICATED),
        _same("vision.merger.encoder.linear_fc1.weight", "visual.merger.mlp.0.weight", COLUMN),
        _same("vision.merger.encoder.linear_fc1.bias", "visual.merger.mlp.0.bias", COLUMN),
        _same("vision.merger.encoder.linear_fc2.weight", "visual.merger.mlp.2.weight", ROW),
        _same("vision.merger.encoder.linear_fc2.bias", "visual.merger.mlp.2.bias", REPLICATED),
    ]
    if not config.tie_word_embeddings:
        entries.append(_same(HEAD, "lm_head.weight", vocabulary))
    for index in range(text.num_hidden_layers):
        entries += _language_layer(index, text_qkv)
    for index in range(vision.depth):
        entries += _vision_block(index, vision_qkv)
    tie = Tie(to=EMBEDDING, megatron=HEAD, hf="lm_head.weight") if config.tie_word_embeddings else None
    return WeightTable(entries=tuple(entries), tie=tie, spellings=SPELLINGS)
