"""The weight table of Qwen2.5-VL, under the names that published checkpoints use on disk."""

from __future__ import annotations

from megatron_r1reward.model_folder.shape import ModelShape, TextShape, VisionShape
from megatron_r1reward.model_folder.weight_table import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Entry,
    GroupedQKV,
    Plain,
    Tie,
    Vocabulary,
    WeightTable,
    one_to_one,
    score_entries,
)

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
# transformers 4.52 and later name the parts of a saved model differently from the published folders.
SPELLINGS = (("model.language_model.", "model."), ("model.visual.", "visual."))


def _language_layer(index: int, text: TextShape) -> list[Entry]:
    hf, megatron = f"model.layers.{index}.", f"language_model.decoder.layers.{index}."
    hidden, rows = text.hidden, (text.query, text.key_value // 2, text.key_value // 2)
    qkv = GroupedQKV(groups=text.groups, head_dim=text.head_dim)
    return [
        Entry(
            megatron=f"{megatron}self_attention.linear_qkv.weight",
            hf=tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv"),
            shapes=tuple((n, hidden) for n in rows),
            layout=qkv,
        ),
        Entry(
            megatron=f"{megatron}self_attention.linear_qkv.bias",
            hf=tuple(f"{hf}self_attn.{x}_proj.bias" for x in "qkv"),
            shapes=tuple((n,) for n in rows),
            layout=qkv,
        ),
        one_to_one(
            f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", (hidden, text.query), ROW
        ),
        Entry(
            megatron=f"{megatron}mlp.linear_fc1.weight",
            hf=(f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            shapes=((text.ffn, hidden),) * 2,
            layout=GATED,
        ),
        one_to_one(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (hidden, text.ffn), ROW),
        *_norms(megatron, f"{hf}input_layernorm.weight", f"{hf}post_attention_layernorm.weight", hidden),
    ]


def _vision_block(index: int, vision: VisionShape) -> list[Entry]:
    hf, megatron = f"visual.blocks.{index}.", f"vision.decoder.layers.{index}."
    hidden, ffn = vision.hidden, vision.ffn
    qkv = GroupedQKV(groups=vision.heads, head_dim=hidden // vision.heads, stacked=True)
    entries = []
    for kind, inner in (("weight", (hidden,)), ("bias", ())):
        row = ROW if kind == "weight" else REPLICATED
        wide = (ffn,) if kind == "weight" else ()
        attention, mlp = f"{megatron}self_attention.linear_", f"{megatron}mlp.linear_"
        entries += [
            one_to_one(f"{attention}qkv.{kind}", f"{hf}attn.qkv.{kind}", (3 * hidden, *inner), qkv),
            one_to_one(f"{attention}proj.{kind}", f"{hf}attn.proj.{kind}", (hidden, *inner), row),
            Entry(
                megatron=f"{mlp}fc1.{kind}",
                hf=(f"{hf}mlp.gate_proj.{kind}", f"{hf}mlp.up_proj.{kind}"),
                shapes=((ffn, *inner),) * 2,
                layout=GATED,
            ),
            one_to_one(f"{mlp}fc2.{kind}", f"{hf}mlp.down_proj.{kind}", (hidden, *wide), row),
        ]
    return entries + _norms(megatron, f"{hf}norm1.weight", f"{hf}norm2.weight", hidden)


def _norms(layer: str, before_attention: str, before_mlp: str, size: int) -> list[Entry]:
    """Checkpoints store the two norms of a layer where Transformer Engine has them: in the linear that follows."""
    places = (
        ("input_layernorm", "self_attention.linear_qkv", before_attention),
        ("pre_mlp_layernorm", "mlp.linear_fc1", before_mlp),
    )
    return [
        Entry(
            megatron=f"{layer}{norm}.weight",
            hf=(hf,),
            shapes=((size,),),
            layout=REPLICATED,
            saved_as=f"{layer}{linear}.layer_norm_weight",
        )
        for norm, linear, hf in places
    ]


def weight_table(shape: ModelShape) -> WeightTable:
    """Every weight of the model exactly once; tied models have no entry for `lm_head`."""
    text, vision = shape.text, shape.vision
    kernel = (vision.channels, vision.frames, vision.patch, vision.patch)
    vocabulary, embedding = Vocabulary(rows=text.vocab), (text.vocab, text.hidden)
    patch_embed = Plain(megatron_shape=(vision.hidden, -1), hf_shape=(vision.hidden, *kernel))
    wide, merger = vision.hidden * vision.unit, "vision.merger.encoder.linear_"
    entries = [
        one_to_one(EMBEDDING, "model.embed_tokens.weight", embedding, vocabulary),
        one_to_one("language_model.decoder.final_layernorm.weight", "model.norm.weight", (text.hidden,)),
        one_to_one(
            "vision.patch_embed.weight", "visual.patch_embed.proj.weight", (vision.hidden, *kernel), patch_embed
        ),
        one_to_one("vision.decoder.final_layernorm.weight", "visual.merger.ln_q.weight", (vision.hidden,)),
        one_to_one(f"{merger}fc1.weight", "visual.merger.mlp.0.weight", (wide, wide), COLUMN),
        one_to_one(f"{merger}fc1.bias", "visual.merger.mlp.0.bias", (wide,), COLUMN),
        one_to_one(f"{merger}fc2.weight", "visual.merger.mlp.2.weight", (vision.out, wide), ROW),
        one_to_one(f"{merger}fc2.bias", "visual.merger.mlp.2.bias", (vision.out,)),
    ]
    if shape.score_layers:
        entries += score_entries(text.hidden, shape.score_layers)
    elif not text.tied:
        entries.append(one_to_one(HEAD, "lm_head.weight", embedding, vocabulary))
    for index in range(text.layers):
        entries += _language_layer(index, text)
    for index in range(vision.blocks):
        entries += _vision_block(index, vision)
    tie = Tie(to=EMBEDDING, megatron=HEAD, hf="lm_head.weight") if text.tied else None
    return WeightTable(entries=tuple(entries), tie=tie, spellings=SPELLINGS)
