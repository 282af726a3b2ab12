"""Which Megatron tensor is which of Hugging Face's?  One table, read in both directions.

Megatron names are those of its local spec over the whole model: layers and experts counted globally, nothing sharded. The names
of the Transformer Engine spec, and of older and newer versions, are the aliases below. Sources: megatron-core 0.16.1 and 0.19,
whose own files the tests read; transformers' `axk1`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from conversion.checkpoint import listed
from conversion.ops import Mosaic, cat, filled, split, split_halves
from modeling_axk1.configuration_axk1 import AxK1Config

# What a weight can be computed with as it is stored. 8 bits want a scale, which no checkpoint of Megatron's has beside it.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How tensor parallelism splits a tensor.
REPLICATED = "replicated"
ROWS = "rows"
COLUMNS = "columns"
HALVES = "halves"  # [gate; up]: each rank holds its rows of both
VOCAB = "vocab"  # rows, padded to a multiple that depends on the number of ranks
DOWN = "down"  # rows in the local spec, replicated in Transformer Engine's

# Megatron name, Hugging Face name, shape, split. `gate_up` stands for two names, halves of one Megatron tensor; # for a number.
BLOCK = """
input_layernorm.weight                         input_layernorm.weight                hidden             replicated
self_attention.linear_proj.weight              self_attn.o_proj.weight               hidden values      columns
self_attention.linear_q_down_proj.weight       self_attn.q_a_proj.weight             q_latent hidden    down
self_attention.linear_q_up_proj.weight         self_attn.q_b_proj.weight             queries q_latent   rows
self_attention.linear_kv_down_proj.weight      self_attn.kv_a_proj_with_mqa.weight   kv_down hidden     down
self_attention.linear_kv_up_proj.weight        self_attn.kv_b_proj.weight            kv_up kv_latent    rows
self_attention.q_layernorm.weight              self_attn.q_a_layernorm.weight        q_latent           replicated
self_attention.kv_layernorm.weight             self_attn.kv_a_layernorm.weight       kv_latent          replicated
pre_mlp_layernorm.weight                       post_attention_layernorm.weight       hidden             replicated
"""
DENSE = """
mlp.linear_fc1.weight                          mlp.gate_up_proj.weight               2*dense hidden     halves
mlp.linear_fc2.weight                          mlp.down_proj.weight                  hidden dense       columns
"""
ROUTER = """
mlp.router.weight                              mlp.gate.weight                       experts hidden     replicated
"""
ROUTER_BIAS = """
mlp.router.expert_bias                         mlp.gate.e_score_correction_bias      experts            replicated
"""
EXPERT = """
mlp.experts.local_experts.#.linear_fc1.weight  mlp.experts.#.gate_up_proj.weight     2*expert hidden    halves
mlp.experts.local_experts.#.linear_fc2.weight  mlp.experts.#.down_proj.weight        hidden expert      columns
"""
SHARED = """
mlp.shared_experts.linear_fc1.weight           mlp.shared_experts.gate_up_proj.weight   2*shared hidden halves
mlp.shared_experts.linear_fc2.weight           mlp.shared_experts.down_proj.weight   hidden shared      columns
"""
POST_NORM = "post_mlp_layernorm.weight"
OUTPUT_NORM = f"""
{POST_NORM}                      {POST_NORM}             hidden             replicated
"""
MTP_HEAD = """
enorm.weight                                   enorm.weight                          hidden             replicated
hnorm.weight                                   hnorm.weight                          hidden             replicated
eh_proj.weight                                 eh_proj.weight                        hidden 2*hidden    rows
"""
MTP_TAIL = """
final_layernorm.weight                         shared_head.norm.weight               hidden             replicated
"""
EMBEDDING = """
embedding.word_embeddings.weight               model.embed_tokens.weight             vocab hidden       vocab
"""
FINAL_NORM = """
decoder.final_layernorm.weight                 model.norm.weight                     hidden             replicated
"""
HEAD = """
output_layer.weight                            lm_head.weight                        vocab hidden       vocab
"""

# Megatron has no such norm of its own; forks name it so (slime, MindSpeed-LLM, ms-swift), or as other models do.
POST_NORM_NAMES = (
    "post_mlp_layernorm",
    "post_mlp_norm",
    "post_feedforward_layernorm",
    "mlp.post_mlp_layernorm",
)
# Transformer Engine fuses a norm into the linear layer behind it, and keeps a layer's experts as numbered weights.
TE_NAMES = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
TE_DENSE_NAMES = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
FUSED_NORM = {"input_layernorm.weight": "self_attention.linear_qkv_down_proj.layer_norm_weight"}
LOCAL_NAMES = {te: local for local, te in (TE_NAMES | TE_DENSE_NAMES | FUSED_NORM).items()}
TE_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
IN_BLOCK = re.compile(r"(decoder\.layers\.\d+\.|mtp\.layers\.\d+\.transformer_layer\.)(.*)")
LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table for one model: `shape` is the whole Megatron tensor's, with the true vocabulary."""

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    split: str

    def to_megatron(self, tensors: Mapping[str, Mosaic]) -> Mosaic:
        return cat([tensors[name] for name in self.hf], 0)

    def to_hf(self, tensor: Mosaic) -> dict[str, Mosaic]:
        return dict(zip(self.hf, split(tensor, 0, len(self.hf)), strict=True))


def sizes_of(config: AxK1Config) -> dict[str, int]:
    heads, value = config.num_attention_heads, config.v_head_dim
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "queries": heads * config.qk_head_dim,
        "values": heads * value,
        "q_latent": config.q_lora_rank,
        "kv_latent": config.kv_lora_rank,
        "kv_down": config.kv_lora_rank + config.qk_rope_head_dim,
        "kv_up": heads * (config.qk_nope_head_dim + value),
        "dense": config.intermediate_size,
        "expert": config.moe_intermediate_size,
        "shared": config.moe_intermediate_size * config.n_shared_experts,
        "experts": config.n_routed_experts,
    }


def rows_of(config: AxK1Config) -> list[Row]:
    """The whole table for one model, in Megatron's order of modules."""
    sizes = sizes_of(config)
    rows = list(_parse(EMBEDDING, sizes))
    for layer, kind in enumerate(config.mlp_layer_types):
        rows += _block(config, kind, f"decoder.layers.{layer}.", f"model.layers.{layer}.", sizes)
    rows += _parse(FINAL_NORM, sizes)
    for mtp in range(config.num_nextn_predict_layers):
        megatron, hf = f"mtp.layers.{mtp}.", f"model.layers.{config.num_hidden_layers + mtp}."
        rows += _parse(MTP_HEAD, sizes, megatron, hf)
        rows += _block(config, config.mlp_layer_types[-1], f"{megatron}transformer_layer.", hf, sizes)
        rows += _parse(MTP_TAIL, sizes, megatron, hf)
    return rows if config.tie_word_embeddings else [*rows, *_parse(HEAD, sizes)]


def _block(config: AxK1Config, kind: str, megatron: str, hf: str, sizes: dict[str, int]) -> Iterator[Row]:
    yield from _parse(BLOCK, sizes, megatron, hf)
    if kind == "dense":
        yield from _parse(DENSE, sizes, megatron, hf)
    else:
        yield from _parse(ROUTER + (ROUTER_BIAS if config.has_router_bias else ""), sizes, megatron, hf)
        for expert in range(config.n_routed_experts):
            yield from _parse(EXPERT.replace("#", str(expert)), sizes, megatron, hf)
        yield from _parse(SHARED, sizes, megatron, hf)
    if config.post_mlp_norm:
        yield from _parse(OUTPUT_NORM, sizes, megatron, hf)


def _parse(table: str, sizes: dict[str, int], megatron: str = "", hf: str = "") -> Iterator[Row]:
    for line in filter(str.strip, table.splitlines()):
        name, hf_name, *dimensions, split_kind = line.split()
        names = [hf_name.replace("gate_up", half) for half in ("gate", "up")] if "gate_up" in hf_name else [hf_name]
        shape = tuple(_size(dimension, sizes) for dimension in dimensions)
        yield Row(megatron + name, tuple(hf + each for each in names), shape, split_kind)


def _size(dimension: str, sizes: dict[str, int]) -> int:
    factor, _, name = dimension.rpartition("*")
    return sizes[name] * int(factor or 1)


def megatron_to_hf(rows: Iterable[Row], tensors: Mapping[str, Mosaic]) -> dict[str, Mosaic]:
    """Hugging Face's tensors, in the table's order. ValueError lists what is missing, left over or of another size."""
    rows = list(rows)
    _account({row.megatron: row.shape for row in rows}, tensors, "Megatron")
    return {name: part for row in rows for name, part in row.to_hf(tensors[row.megatron]).items()}


def hf_to_megatron(rows: Iterable[Row], tensors: Mapping[str, Mosaic]) -> dict[str, Mosaic]:
    """The inverse of `megatron_to_hf`."""
    rows = list(rows)
    _account(hf_shapes(rows), tensors, "Hugging Face")
    return {row.megatron: row.to_megatron(tensors) for row in rows}


def hf_shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the table and its shape."""
    return {name: (row.shape[0] // len(row.hf), *row.shape[1:]) for row in rows for name in row.hf}


def _account(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Mosaic], whose: str) -> None:
    """Every tensor has its place and every place its tensor, of the size that the config gives it and a dtype of weights."""
    missing = [name for name in wanted if name not in tensors]
    left = [name for name in tensors if name not in wanted]
    if missing or left:
        said = [f"{what} [{listed(names)}]" for what, names in (("missing", missing), ("left over", left)) if names]
        raise ValueError(
            f"the {whose} checkpoint does not match its config: {', '.join(said)}; correct the config, or convert with the "
            "settings it was trained with."
        )
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"the {whose} checkpoint has tensors of other sizes than its config: {listed(wrong)}.")
    others = [f"{name} ({tensors[name].dtype})" for name in wanted if tensors[name].dtype not in WEIGHT_DTYPES]
    if others:
        raise ValueError(
            f"the {whose} checkpoint holds {listed(others)} where the model has weights of fp64, fp32, bf16 or fp16; the file "
            "is damaged or quantised, save it again unquantised."
        )


def add_absent(
    config: AxK1Config, rows: Iterable[Row], tensors: dict[str, Mosaic], name_of: Callable[[Row], str]
) -> list[str]:
    """Constants for what checkpoints leave out and loaders want; returns the names added. `name_of` picks a row's name.

    A router bias of zeros chooses as no bias does. A dense layer's output norm is never applied, but vLLM wants it.
    """
    dense = {f"model.layers.{i}.{POST_NORM}" for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"}
    added = []
    for row in rows:
        name = name_of(row)
        if name in tensors:
            continue
        if row.hf[0].endswith(".e_score_correction_bias"):
            tensors[name] = filled(torch.float32, row.shape, 0.0)
        elif row.hf[0] in dense and (beside := name.replace("post_mlp", "input")) in tensors:
            tensors[name] = filled(tensors[beside].dtype, row.shape, 1.0)
        else:
            continue
        added.append(name)
    return added


def local_name(name: str, post_norm_names: Sequence[str] = POST_NORM_NAMES) -> str:
    """The local spec's name of a tensor under whatever name Megatron gave it; other names come back as they are."""
    name = name.removeprefix("module.").replace(".mtp_model_layer.", ".transformer_layer.")
    found = IN_BLOCK.fullmatch(name)
    if not found:
        return name
    block, rest = found.groups()
    if rest.removesuffix(".weight") in post_norm_names:
        rest = POST_NORM
    rest = LOCAL_NAMES.get(rest, rest)
    return block + TE_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", rest)


def te_name(name: str, dense: bool) -> str:
    """Transformer Engine's name of a tensor of the local spec; `dense` says of which kind its layer is."""
    block, rest = IN_BLOCK.fullmatch(name).groups() if IN_BLOCK.fullmatch(name) else ("", name)
    names = TE_NAMES | TE_DENSE_NAMES if dense else TE_NAMES
    return block + LOCAL_EXPERT.sub(r"mlp.experts.\2.weight\1", names.get(rest, rest))


def shards_of(row: Row, tensor: Mosaic, ranks: int, replicate_down: bool) -> list[Mosaic]:
    """One tensor for each tensor-parallel rank, the inverse of joining them; a vocabulary has to be padded already.

    replicate_down: as Transformer Engine's spec does with the two down projections. ValueError if it does not divide.
    """
    if row.split == REPLICATED or (row.split == DOWN and replicate_down):
        return [tensor] * ranks
    dim = 1 if row.split == COLUMNS else 0
    size = tensor.shape[dim] // (2 if row.split == HALVES else 1)
    if size % ranks:
        raise ValueError(f"{row.megatron}: {size} does not split over {ranks} tensor-parallel ranks; use a divisor.")
    return split_halves(tensor, ranks) if row.split == HALVES else split(tensor, dim, ranks)


def modules_with_state(names: Iterable[str], transformer_engine: bool) -> list[str]:
    """The modules that keep an `_extra_state`: linear layers, in Transformer Engine's spec norms too; never the router."""
    modules = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        linear = "linear_" in module.rpartition(".")[2] or module.endswith("eh_proj")
        norm = transformer_engine and leaf == "weight" and module.rpartition(".")[2].endswith("norm")
        if linear or norm:
            modules.append(module)
    return list(dict.fromkeys(modules))
