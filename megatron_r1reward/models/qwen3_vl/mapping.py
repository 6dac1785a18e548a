"""The weight table of Qwen3-VL, dense and mixture of experts, under the names on disk of published checkpoints."""

from __future__ import annotations

from megatron_r1reward.models.mapping import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Entry,
    GatedMLP,
    GroupedQKV,
    Layout,
    Plain,
    Tie,
    Vocabulary,
    WeightTable,
)
from megatron_r1reward.models.qwen3_vl.config import HfConfig, moe_layers

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
LAYERS = "language_model.decoder.layers."
# Published folders stack the experts of a layer: gate and up together as [E, in, 2 * out], down as [E, in, out].
EXPERT_GATE_UP = GatedMLP(fused=True, transposed=True)
EXPERT_DOWN = Plain(partition_dim=1, transposed=True)


def _language_layer(index: int, qkv: GroupedQKV, experts: int) -> list[Entry]:
    hf, megatron = f"model.language_model.layers.{index}.", f"{LAYERS}{index}."
    entries = [
        Entry(
            megatron=f"{megatron}self_attention.linear_qkv.weight",
            hf=tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv"),
            layout=qkv,
        ),
        _same(f"{megatron}self_attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", ROW),
        _same(f"{megatron}self_attention.q_layernorm.weight", f"{hf}self_attn.q_norm.weight", REPLICATED),
        _same(f"{megatron}self_attention.k_layernorm.weight", f"{hf}self_attn.k_norm.weight", REPLICATED),
        _norm(megatron, "input_layernorm", "weight", f"{hf}input_layernorm"),
    ]
    after_attention = f"{hf}post_attention_layernorm"
    if experts:
        norm = _same(f"{megatron}pre_mlp_layernorm.weight", f"{after_attention}.weight", REPLICATED)
        return [*entries, norm, *_experts(f"{megatron}mlp.", f"{hf}mlp.", experts)]
    gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
    return [
        *entries,
        _norm(megatron, "pre_mlp_layernorm", "weight", after_attention),
        Entry(megatron=f"{megatron}mlp.linear_fc1.weight", hf=gate_up, layout=GATED),
        _same(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", ROW),
    ]


def _experts(megatron: str, hf: str, experts: int) -> list[Entry]:
    """Router and experts; the entries of one stacked tensor stand next to each other."""
    entries = [_same(f"{megatron}router.weight", f"{hf}gate.weight", REPLICATED)]
    for linear, stacked, layout in (
        ("linear_fc1", "gate_up_proj", EXPERT_GATE_UP),
        ("linear_fc2", "down_proj", EXPERT_DOWN),
    ):
        entries += [
            Entry(
                megatron=f"{megatron}experts.local_experts.{expert}.{linear}.weight",
                hf=(f"{hf}experts.{stacked}",),
                layout=layout,
                expert=expert,
                stacked=True,
            )
            for expert in range(experts)
        ]
    return entries


def _vision_block(index: int, qkv: GroupedQKV) -> list[Entry]:
    hf, megatron = f"model.visual.blocks.{index}.", f"vision.decoder.layers.{index}."
    entries = []
    for kind in ("weight", "bias"):
        row = ROW if kind == "weight" else REPLICATED
        entries += [
            _norm(megatron, "input_layernorm", kind, f"{hf}norm1"),
            _same(f"{megatron}self_attention.linear_qkv.{kind}", f"{hf}attn.qkv.{kind}", qkv),
            _same(f"{megatron}self_attention.linear_proj.{kind}", f"{hf}attn.proj.{kind}", row),
            _norm(megatron, "pre_mlp_layernorm", kind, f"{hf}norm2"),
            _same(f"{megatron}mlp.linear_fc1.{kind}", f"{hf}mlp.linear_fc1.{kind}", COLUMN),
            _same(f"{megatron}mlp.linear_fc2.{kind}", f"{hf}mlp.linear_fc2.{kind}", row),
        ]
    return entries


def _merger(megatron: str, hf: str) -> list[Entry]:
    return [
        entry
        for kind in ("weight", "bias")
        for entry in (
            _same(f"{megatron}norm.{kind}", f"{hf}norm.{kind}", REPLICATED),
            _same(f"{megatron}mlp.encoder.linear_fc1.{kind}", f"{hf}linear_fc1.{kind}", COLUMN),
            _same(
                f"{megatron}mlp.encoder.linear_fc2.{kind}",
                f"{hf}linear_fc2.{kind}",
                ROW if kind == "weight" else REPLICATED,
            ),
        )
    ]


def _norm(layer: str, norm: str, kind: str, hf: str) -> Entry:
    """Checkpoints store the norms of a layer where Transformer Engine has them: in the linear that follows."""
    linear = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}[norm]
    return Entry(
        megatron=f"{layer}{norm}.{kind}",
        hf=(f"{hf}.{kind}",),
        layout=REPLICATED,
        saved_as=f"{layer}{linear}.layer_norm_{kind}",
    )


def _same(megatron: str, hf: str, layout: Layout) -> Entry:
    return Entry(megatron=megatron, hf=(hf,), layout=layout)


def weight_table(config: HfConfig) -> WeightTable:
    """Every weight of the model exactly once; tied models have no entry for `lm_head`."""
    text, vision = config.text_config, config.vision_config
    text_qkv = GroupedQKV(groups=text.num_key_value_heads, head_dim=text.head_dim)
    vision_qkv = GroupedQKV(groups=vision.num_heads, head_dim=vision.hidden_size // vision.num_heads, stacked=True)
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    vocabulary = Vocabulary(rows=text.vocab_size)
    patch_embed = Plain(megatron_shape=(vision.hidden_size, -1), hf_shape=(vision.hidden_size, *kernel))
    entries = [
        _same(EMBEDDING, "model.language_model.embed_tokens.weight", vocabulary),
        _same("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight", REPLICATED),
        _same("vision.patch_embed.weight", "model.visual.patch_embed.proj.weight", patch_embed),
        _same("vision.patch_embed.bias", "model.visual.patch_embed.proj.bias", REPLICATED),
        _same("vision.pos_embed.weight", "model.visual.pos_embed.weight", REPLICATED),
        *_merger("vision.merger.", "model.visual.merger."),
    ]
    if not config.tie_word_embeddings:
        entries.append(_same(HEAD, "lm_head.weight", vocabulary))
    for level in range(len(vision.deepstack_visual_indexes)):
        entries += _merger(f"vision.deepstack_mergers.{level}.", f"model.visual.deepstack_merger_list.{level}.")
    is_moe = moe_layers(config)
    for index, moe in enumerate(is_moe):
        entries += _language_layer(index, text_qkv, text.num_experts if moe else 0)
    for index in range(vision.depth):
        entries += _vision_block(index, vision_qkv)
    return WeightTable(
        entries=tuple(entries),
        tie=Tie(to=EMBEDDING, megatron=HEAD, hf="lm_head.weight") if config.tie_word_embeddings else None,
        separate_layers=(LAYERS,) if any(is_moe) else (),
    )
