"""What does each rank hold of a model that transformers shards? Predicted from the model's own plans, before any weight is read.

    layout = DistributedConfig(tp_size=8, ep_size=8)
    held_parameters(AxK1Config.preset("k1"), layout, rank=0)    # times 2 bytes in bf16

Nothing here shards: `from_pretrained(..., distributed_config=layout)` does, and tests compare what it did with what this said.
"""

import math

import torch
from transformers.distributed import DistributedConfig

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1.quantization_axk1 import block_bytes

# The dimension that each style of a plan splits, counted from the end (a matrix's rows are -2, an expert's too) or the start.
SPLIT_DIMENSION = {
    "colwise": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "rowwise": -1,
    "embedding_rowwise": 0,
    "grouped_gemm": 0,
}
# gate and up are packed into one tensor, and each of them is split.
PACKED = {"packed_colwise": 2}


def chunk(size: int, parts: int, index: int) -> int:
    """Length of the `index`-th of `parts` pieces as torch cuts them: all of ceil(size / parts) until nothing is left."""
    piece = math.ceil(size / parts)
    return max(0, min(piece, size - index * piece))


def pipeline_stage(name: str, layers: int, stages: int) -> int:
    """The stage that holds a parameter: equal numbers of layers, the last stage takes what is left over.  [transformers]"""
    if name.startswith("model.embed_tokens."):
        return 0
    if not name.startswith("model.layers."):
        return stages - 1
    return min(int(name.split(".")[2]) // (layers // stages), stages - 1)


def held_shapes(config: AxK1Config, layout: DistributedConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter's part on `rank`, by name; a part with a 0 in its shape is empty. The model is not built."""
    with torch.device("meta"):
        model = AxK1ForCausalLM(config)
    tp_plan, ep_plan, _ = model._resolve_parallel_plans(layout)
    # Ranks count through tp first, then fsdp, replicas and stages; experts through ep, then what is left of fsdp * tp.
    inner = layout.fsdp_size * layout.tp_size
    stage = rank // (inner * layout.dp_replicate_size)
    held = {}
    for name, parameter in model.named_parameters():
        # Multi-token-prediction layers count among the layers.
        if layout.pp_size > 1 and pipeline_stage(name, len(model.model.layers), layout.pp_size) != stage:
            continue
        shape = list(parameter.shape)
        parts, outer, style = layout.tp_size, layout.fsdp_size, tp_plan.get(name)
        if name in ep_plan:
            parts, outer, style = layout.ep_size, layout.efsdp_size, ep_plan[name]
        # A bias is added after the ranks' partial products are summed, so each holds all of it.
        whole = style == "rowwise" and len(shape) == 1
        if style in SPLIT_DIMENSION and not whole:
            dimension, packed = SPLIT_DIMENSION[style], PACKED.get(style, 1)
            shape[dimension] = packed * chunk(shape[dimension] // packed, parts, rank % parts)
        # FSDP cuts what tensor or expert parallelism left, along the first dimension.
        shape[0] = chunk(shape[0], outer, rank % inner // parts)
        held[name] = tuple(shape)
    return held


def held_parameters(config: AxK1Config, layout: DistributedConfig, rank: int) -> int:
    """Number of parameters on `rank` of the ranks that `layout` spans; router biases are buffers and not counted."""
    return sum(math.prod(shape) for shape in held_shapes(config, layout, rank).values())


def four_bit_bytes(config: AxK1Config, ranks: int, form: str = "nf4 double") -> int:
    """Bytes of weights on each of `ranks` (`tp_size` and `ep_size`): linear layers in `form` (nf4, nf4 double), else bf16.

    Experts are dealt, the vocabulary is cut, the rest is whole on every rank.
    """
    dealt = block_bytes(config, form, expert=ranks)
    cut = block_bytes(config, form, tensor=ranks)
    return cut[0] + sum(dealt[1:-1]) + cut[-1]
