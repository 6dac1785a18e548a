"""The weight table of Qwen3-VL, dense and mixture of experts, under the names on disk of published checkpoints."""

from __future__ import annotations

from typing import Literal

from megatron_r1reward.model_folder.shape import Experts, ModelShape, TextShape, VisionShape
from megatron_r1reward.model_folder.weight_table import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Entry,
    GatedMLP,
    GroupedQKV,
    Plain,
    Tie,
    Vocabulary,
    WeightTable,
    one_to_one,
    score_entries,
)

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
LAYERS = "language_model.decoder.layers."
# How a folder holds the experts of a layer. Published: stacked, gate and up together as [E, in, 2 * out], down as
# [E, in, out]. modules: transformers' own modules, as newer versions save them: [E, 2 * out, in] and [E, out, in].
# separate: one gate_proj, up_proj and down_proj per expert, [out, in].
ExpertStorage = Literal["published", "modules", "separate"]


def _language_layer(index: int, text: TextShape, storage: ExpertStorage) -> list[Entry]:
    hf, megatron = f"model.language_model.layers.{index}.", f"{LAYERS}{index}."
    hidden, attention = text.hidden, f"{megatron}self_attention."
    entries = [
        Entry(
            megatron=f"{attention}linear_qkv.weight",
            hf=tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv"),
            shapes=tuple((n, hidden) for n in (text.query, text.key_value // 2, text.key_value // 2)),
            layout=GroupedQKV(groups=text.groups, head_dim=text.head_dim),
        ),
        one_to_one(f"{attention}linear_proj.weight", f"{hf}self_attn.o_proj.weight", (hidden, text.query), ROW),
        one_to_one(f"{attention}q_layernorm.weight", f"{hf}self_attn.q_norm.weight", (text.head_dim,)),
        one_to_one(f"{attention}k_layernorm.weight", f"{hf}self_attn.k_norm.weight", (text.head_dim,)),
        _norm(megatron, "input_layernorm", "weight", f"{hf}input_layernorm", hidden),
    ]
    after_attention = f"{hf}post_attention_layernorm"
    if text.is_sparse(index):
        assert text.experts is not None
        norm = one_to_one(f"{megatron}pre_mlp_layernorm.weight", f"{after_attention}.weight", (hidden,))
        return [*entries, norm, *_experts(f"{megatron}mlp.", f"{hf}mlp.", text.experts, hidden, storage)]
    return [
        *entries,
        _norm(megatron, "pre_mlp_layernorm", "weight", after_attention, hidden),
        Entry(
            megatron=f"{megatron}mlp.linear_fc1.weight",
            hf=(f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            shapes=((text.ffn, hidden),) * 2,
            layout=GATED,
        ),
        one_to_one(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", (hidden, text.ffn), ROW),
    ]


def _experts(megatron: str, hf: str, experts: Experts, hidden: int, storage: ExpertStorage) -> list[Entry]:
    """Router and experts; the entries of one stacked tensor stand next to each other."""
    entries = [one_to_one(f"{megatron}router.weight", f"{hf}gate.weight", (experts.count, hidden))]
    swapped = storage == "published"
    up, down = (2 * experts.ffn, hidden), (hidden, experts.ffn)
    for linear, stacked, shape, layout in (
        ("linear_fc1", "gate_up_proj", up, GatedMLP(fused=True, transposed=swapped)),
        ("linear_fc2", "down_proj", down, Plain(partition_dim=1, transposed=swapped)),
    ):
        for expert in range(experts.count):
            name = f"{megatron}experts.local_experts.{expert}.{linear}.weight"
            if storage != "separate":
                entries.append(
                    Entry(
                        megatron=name,
                        hf=(f"{hf}experts.{stacked}",),
                        shapes=((experts.count, *(shape[::-1] if swapped else shape)),),
                        layout=layout,
                        expert=expert,
                        stacked=True,
                    )
                )
                continue
            projections = ("gate_proj", "up_proj") if linear == "linear_fc1" else ("down_proj",)
            entries.append(
                Entry(
                    megatron=name,
                    hf=tuple(f"{hf}experts.{expert}.{projection}.weight" for projection in projections),
                    shapes=((shape[0] // len(projections), shape[1]),) * len(projections),
                    layout=GATED if len(projections) == 2 else ROW,
                    expert=expert,
                )
            )
    return entries


def _vision_block(index: int, vision: VisionShape) -> list[Entry]:
    hf, megatron = f"model.visual.blocks.{index}.", f"vision.decoder.layers.{index}."
    hidden, ffn = vision.hidden, vision.ffn
    attention, mlp = f"{megatron}self_attention.linear_", f"{megatron}mlp.linear_"
    qkv = GroupedQKV(groups=vision.heads, head_dim=hidden // vision.heads, stacked=True)
    entries = []
    for kind, inner, wide in (("weight", (hidden,), (ffn,)), ("bias", (), ())):
        row = ROW if kind == "weight" else REPLICATED
        entries += [
            _norm(megatron, "input_layernorm", kind, f"{hf}norm1", hidden),
            one_to_one(f"{attention}qkv.{kind}", f"{hf}attn.qkv.{kind}", (3 * hidden, *inner), qkv),
            one_to_one(f"{attention}proj.{kind}", f"{hf}attn.proj.{kind}", (hidden, *inner), row),
            _norm(megatron, "pre_mlp_layernorm", kind, f"{hf}norm2", hidden),
            one_to_one(f"{mlp}fc1.{kind}", f"{hf}mlp.linear_fc1.{kind}", (ffn, *inner), COLUMN),
            one_to_one(f"{mlp}fc2.{kind}", f"{hf}mlp.linear_fc2.{kind}", (hidden, *wide), row),
        ]
    return entries


def _merger(megatron: str, hf: str, vision: VisionShape, *, norm_size: int) -> list[Entry]:
    wide = vision.hidden * vision.unit
    entries, mlp = [], f"{megatron}mlp.encoder.linear_"
    for kind, inner in (("weight", (wide,)), ("bias", ())):
        row = ROW if kind == "weight" else REPLICATED
        entries += [
            one_to_one(f"{megatron}norm.{kind}", f"{hf}norm.{kind}", (norm_size,)),
            one_to_one(f"{mlp}fc1.{kind}", f"{hf}linear_fc1.{kind}", (wide, *inner), COLUMN),
            one_to_one(f"{mlp}fc2.{kind}", f"{hf}linear_fc2.{kind}", (vision.out, *inner), row),
        ]
    return entries


def _norm(layer: str, norm: str, kind: str, hf: str, size: int) -> Entry:
    """Checkpoints store the norms of a layer where Transformer Engine has them: in the linear that follows."""
    linear = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}[norm]
    return Entry(
        megatron=f"{layer}{norm}.{kind}",
        hf=(f"{hf}.{kind}",),
        shapes=((size,),),
        layout=REPLICATED,
        saved_as=f"{layer}{linear}.layer_norm_{kind}",
    )


def weight_table(shape: ModelShape, storage: ExpertStorage = "published") -> WeightTable:
    """Every weight of the model exactly once; tied models have no entry for `lm_head`."""
    text, vision = shape.text, shape.vision
    kernel = (vision.channels, vision.frames, vision.patch, vision.patch)
    vocabulary, embedding = Vocabulary(rows=text.vocab), (text.vocab, text.hidden)
    patch_embed = Plain(megatron_shape=(vision.hidden, -1), hf_shape=(vision.hidden, *kernel))
    hidden, visual = vision.hidden, "model.visual."
    entries = [
        one_to_one(EMBEDDING, "model.language_model.embed_tokens.weight", embedding, vocabulary),
        one_to_one("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight", (text.hidden,)),
        one_to_one("vision.patch_embed.weight", f"{visual}patch_embed.proj.weight", (hidden, *kernel), patch_embed),
        one_to_one("vision.patch_embed.bias", f"{visual}patch_embed.proj.bias", (hidden,)),
        one_to_one("vision.pos_embed.weight", f"{visual}pos_embed.weight", (vision.position_embeddings, hidden)),
        *_merger("vision.merger.", f"{visual}merger.", vision, norm_size=hidden),
    ]
    if shape.score_layers:
        entries += score_entries(text.hidden, shape.score_layers)
    elif not text.tied:
        entries.append(one_to_one(HEAD, "lm_head.weight", embedding, vocabulary))
    for level in range(vision.deepstack):
        names = f"vision.deepstack_mergers.{level}.", f"{visual}deepstack_merger_list.{level}."
        entries += _merger(*names, vision, norm_size=hidden * vision.unit)
    for index in range(text.layers):
        entries += _language_layer(index, text, storage)
    for index in range(vision.blocks):
        entries += _vision_block(index, vision)
    return WeightTable(
        entries=tuple(entries),
        tie=Tie(to=EMBEDDING, megatron=HEAD, hf="lm_head.weight") if text.tied else None,
        separate_layers=(LAYERS,) if text.sparse_layers else (),
    )
