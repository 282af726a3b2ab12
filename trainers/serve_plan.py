"""Which GPUs hold which precision of a model, and how much context beside it?  Memory only: no speed is promised.

A GPU gives `USABLE` of its memory to weights, to one layer's activations of a chunk of prompt, and to the cache: of each token
the compressed latent and the rotary key of each layer (MLA), which every head reads and tensor parallelism cannot split.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from modeling_axk1 import AxK1Config, count_parameters
from trainers.cluster import GPUS, Gpu, find_gpu, linear_elements
from trainers.report import text_table

USABLE = 0.9  # vLLM's default gpu_memory_utilization; the rest is CUDA's, NCCL's and fragments'
# Prompt tokens computed at a time: vLLM's max_num_batched_tokens, transformers' generate(prefill_chunk_size=...).
CHUNK = 8192
GPU_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# A consumer card: 24 GB, no NVLink.  [NVIDIA Ada whitepaper; FLOP/s with fp32 accumulation]
RTX4090 = Gpu("rtx4090", 165.2e12, 330.3e12, 24e9, 1.008e12, 32e9, 32e9)
SERVING_GPUS = (RTX4090, *GPUS)


@dataclass(frozen=True)
class Precision:
    """How the linear layers are stored; embedding, head, router and norms stay bf16.

    scale_bytes of scales for every `block` weights; a block of 0 is a row of the matrix.
    """

    name: str
    bits: int
    block: int
    scale_bytes: float
    engine: str
    source: str


PRECISIONS = (
    Precision("bf16", 16, 1, 0, "vllm", "as released"),
    # vLLM's own quantisation of bf16 weights has fewer scales: one a tensor.
    Precision(
        "fp8", 8, 128 * 128, 4, "vllm", "E4M3, an fp32 scale a block of 128 x 128 [DeepSeek-V3, 2412.19437, 3.3.2]"
    ),
    Precision("int8", 8, 0, 4, "transformers", "bitsandbytes LLM.int8(), an fp32 scale a row [2208.07339]"),
    Precision("nf4", 4, 64, 4, "transformers", "bitsandbytes NF4, an fp32 scale 64 weights [2305.14314]"),
    Precision(
        "nf4-dq", 4, 64, 1 + 4 / 256, "transformers", "the same, scales in 8 bits, an fp32 one 256 of them [2305.14314]"
    ),
)


@dataclass(frozen=True)
class Serving:
    """One way that fits: `layout` in the engine's words, bytes of the fullest GPU, and the tokens that all caches hold."""

    gpu: str
    precision: str
    gpus: int
    layout: str
    weight_bytes: float
    weight_bytes_per_gpu: float
    activation_bytes: float
    cache_bytes_per_token: float
    cache_tokens: int
    sequences: int
    command: str


def layer_matrices(config: AxK1Config, kind: str) -> dict[str, list[tuple[int, int]]]:
    """(rows, columns) of a layer's linear layers by how they are shared: `whole`, by `heads`, by `width`; of one `expert`."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    by_heads = [
        (heads * config.qk_head_dim, config.q_lora_rank),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        (hidden, heads * config.v_head_dim),
    ]
    whole = [(config.q_lora_rank, hidden), (latent + config.qk_rope_head_dim, hidden)]
    if kind == "dense":
        return {"whole": whole, "heads": by_heads, "width": _gated(hidden, config.intermediate_size), "expert": []}
    width = _gated(hidden, config.n_shared_experts * config.moe_intermediate_size)
    expert = _gated(hidden, config.moe_intermediate_size)
    return {"whole": whole, "heads": by_heads, "width": width, "expert": expert}


def _gated(hidden: int, width: int) -> list[tuple[int, int]]:
    return [(width, hidden), (width, hidden), (hidden, width)]


def stored_bytes(matrices: list[tuple[int, int]], precision: Precision) -> float:
    """Weights and scales; a block that a matrix does not fill is a block."""
    total = 0.0
    for rows, columns in matrices:
        scales = rows if precision.block == 0 else math.ceil(rows * columns / precision.block)
        total += rows * columns * precision.bits / 8 + scales * precision.scale_bytes
    return total


def plain_bytes(config: AxK1Config, kind: str) -> float:
    """A layer's norms and router in bf16, its router bias in fp32."""
    norms = (2 + config.post_mlp_norm) * config.hidden_size + config.q_lora_rank + config.kv_lora_rank
    router = config.n_routed_experts * config.hidden_size if kind == "sparse" else 0
    bias = 4 * config.n_routed_experts if kind == "sparse" and config.has_router_bias else 0
    return 2 * (norms + router) + bias


def layer_bytes(config: AxK1Config, precision: Precision, kind: str, *, tensor: int, expert: int) -> float:
    """One layer on one of `tensor` GPUs that share its heads and widths and of `expert` that share its experts."""
    parts = {name: stored_bytes(each, precision) for name, each in layer_matrices(config, kind).items()}
    shared = (parts["heads"] + parts["width"]) / tensor + config.n_routed_experts * parts["expert"] / expert
    return plain_bytes(config, kind) + parts["whole"] + shared


def vocabulary_bytes(config: AxK1Config) -> tuple[float, float]:
    """Embedding (none of its own if tied) and head, bf16."""
    matrix = 2 * config.vocab_size * config.hidden_size
    return (0 if config.tie_word_embeddings else matrix), matrix


def weight_bytes(config: AxK1Config, precision: Precision) -> float:
    """The whole model's."""
    sizes = {kind: layer_bytes(config, precision, kind, tensor=1, expert=1) for kind in set(config.mlp_layer_types)}
    layers = sum(sizes[kind] for kind in config.mlp_layer_types)
    return layers + sum(vocabulary_bytes(config)) + 2 * config.hidden_size


def activation_bytes(config: AxK1Config) -> float:
    """One layer's inputs and outputs of matrix products for a chunk, bf16: what lives at a time without gradients, at most."""
    return 2 * CHUNK * sum(linear_elements(config))


def token_bytes(config: AxK1Config, layers: int) -> int:
    """A token's cache in so many layers, bf16."""
    return 2 * layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def fullest_stage(
    config: AxK1Config, precision: Precision, stages: int, *, tensor: int, expert: int
) -> tuple[float, int]:
    """Weight bytes a GPU of the fullest of `stages` stages, and the most layers that one holds.

    The first stage has the embedding, the last the last norm and the head; both matrices lie over `tensor` GPUs. Layers are
    dealt as evenly as they go.
    """
    kinds, most = config.mlp_layer_types, math.ceil(config.num_hidden_layers / stages)
    embedding, head = (each / tensor for each in vocabulary_bytes(config))
    sizes = {kind: layer_bytes(config, precision, kind, tensor=tensor, expert=expert) for kind in set(kinds)}
    bounds = [round(stage * len(kinds) / stages) for stage in range(stages + 1)]
    loads = []
    for stage, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        ends = embedding * (stage == 0) + (head + 2 * config.hidden_size) * (stage == stages - 1)
        loads.append(sum(sizes[kind] for kind in kinds[start:stop]) + ends)
    return max(loads), most


def layouts(
    config: AxK1Config, precision: Precision, gpu: Gpu, gpus: int
) -> Iterator[tuple[str, float, float, int, str]]:
    """(layout, weight bytes a GPU, cache bytes a token, groups of requests that have caches of their own, command).

    vLLM: tensor parallel inside a node, pipeline over nodes; or attention whole on each GPU, each with its own requests. In both
    the experts are dealt over the GPUs that share a layer. transformers: layers one after another (device_map="auto").
    """
    layers = config.num_hidden_layers
    if precision.engine == "transformers":
        if gpus <= min(layers, gpu.node_gpus):
            load, most = fullest_stage(config, precision, gpus, tensor=1, expert=1)
            bits = f"load_in_{precision.bits}bit=True" + (
                ", bnb_4bit_use_double_quant=True" * (precision.name == "nf4-dq")
            )
            kind = ', bnb_4bit_quant_type="nf4"' * (precision.bits == 4)
            command = f'from_pretrained(MODEL, device_map="auto", quantization_config=BitsAndBytesConfig({bits}{kind}))'
            yield f"layers over {gpus}", load, token_bytes(config, most), 1, command
        return
    tensor = min(gpus, gpu.node_gpus)
    stages, expert_flag = gpus // tensor, " --enable-expert-parallel"
    fp8 = " --quantization fp8" * (precision.name == "fp8")
    if config.num_attention_heads % tensor == 0 and config.n_routed_experts % tensor == 0 and stages <= layers:
        load, most = fullest_stage(config, precision, stages, tensor=tensor, expert=tensor)
        command = f"vllm serve MODEL{fp8} --tensor-parallel-size {tensor}{expert_flag * (tensor > 1)}"
        command += f" --pipeline-parallel-size {stages}" * (stages > 1)
        yield f"TP{tensor} EP{tensor} PP{stages}", load, token_bytes(config, most), 1, command
    if gpus > 1 and config.n_routed_experts % gpus == 0:
        load, most = fullest_stage(config, precision, 1, tensor=1, expert=gpus)
        command = f"vllm serve MODEL{fp8} --data-parallel-size {gpus}{expert_flag}"
        yield f"DP{gpus} EP{gpus}", load, token_bytes(config, most), gpus, command


def fit(
    config: AxK1Config, precision: Precision, gpu: Gpu, gpus: int, *, context: int, batch: int
) -> Iterator[Serving]:
    """The layouts on so many GPUs whose caches hold `batch` sequences of `context` tokens."""
    activations = activation_bytes(config)
    for layout, load, per_token, groups, command in layouts(config, precision, gpu, gpus):
        free = USABLE * gpu.memory_bytes - load - activations
        tokens = max(0, math.floor(free / per_token))
        sequences = groups * (tokens // context)
        if sequences >= batch:
            yield Serving(
                gpu.name, precision.name, gpus, layout, weight_bytes(config, precision), load, activations, per_token,
                groups * tokens, sequences, command,
            )  # fmt: skip


def plan_serving(
    config: AxK1Config, *, gpu: str | None = None, context: int | None = None, batch: int = 1
) -> list[Serving]:
    """For each precision the fewest GPUs of a kind that hold it: of one kind every layout, of all kinds the roomiest.

    context: tokens of a sequence, thought and answer included (default: the model's longest). Nothing for what fits on none of
    `GPU_COUNTS`. ValueError for an unknown GPU or a context that the model does not have.
    """
    context = config.max_position_embeddings if context is None else context
    if not 1 <= context <= config.max_position_embeddings:
        raise ValueError(f"context={context} is outside 1..{config.max_position_embeddings:,}, the model's longest.")
    if batch < 1:
        raise ValueError(f"batch={batch} serves nobody; use 1 or more.")
    found = []
    for kind in SERVING_GPUS if gpu is None else [RTX4090 if gpu.lower() == RTX4090.name else find_gpu(gpu)]:
        for precision in PRECISIONS:
            for gpus in GPU_COUNTS:
                ways = list(fit(config, precision, kind, gpus, context=context, batch=batch))
                if ways:
                    found += ways if gpu else [max(ways, key=lambda way: way.cache_tokens)]
                    break
    return found


def derivation(config: AxK1Config, context: int, batch: int) -> list[str]:
    counts, layers = count_parameters(config), config.num_hidden_layers
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    return [
        f"{counts['total']:,} parameters; "
        + ", ".join(f"{p.name} {weight_bytes(config, p) / 1e9:,.1f} GB" for p in PRECISIONS),
        *(f"{precision.name}: {precision.source}" for precision in PRECISIONS),
        "embedding, head, router and norms stay bf16",
        f"cache: {config.kv_lora_rank} + {config.qk_rope_head_dim} = {per_layer} values of 2 bytes a token and layer, {layers} "
        f"layers: {token_bytes(config, layers):,} bytes a token; {batch} x {context:,} tokens = "
        f"{token_bytes(config, layers) * batch * context / 1e9:.2f} GB. Each GPU of a TP group holds it whole; DP deals requests",
        f"activations: a chunk of {CHUNK:,} tokens through one layer, {activation_bytes(config) / 1e9:.2f} GB",
        f"{USABLE:.0%} of a GPU's memory is counted (vLLM's gpu_memory_utilization); GPU counts tried: {GPU_COUNTS}",
        "fp8 on an A100 saves memory only: it has no FP8 units",
    ]


def text_of_serving(
    config: AxK1Config, ways: list[Serving], *, gpu: str | None, context: int | None, batch: int
) -> str:
    """The table, one command for each precision, and where each figure comes from."""
    context = config.max_position_embeddings if context is None else context
    rows = [
        {
            "GPU": way.gpu,
            "precision": way.precision,
            "weights": f"{way.weight_bytes / 1e9:,.1f} GB",
            "GPUs": str(way.gpus),
            "layout": way.layout,
            "weights/GPU": f"{way.weight_bytes_per_gpu / 1e9:,.1f} GB",
            "cached tokens": f"{way.cache_tokens:,}",
            f"x {context:,}": f"{way.sequences:,}",
        }
        for way in ways
    ]
    kinds = [kind.name for kind in SERVING_GPUS] if gpu is None else [gpu.lower()]
    held = {(way.gpu, way.precision) for way in ways}
    absent = [
        f"{precision.name} on {kind}"
        for kind in kinds
        for precision in PRECISIONS
        if (kind, precision.name) not in held
    ]
    lines = [text_table(rows)] if rows else []
    lines += ["", f"in no layout tried: {', '.join(absent)}"] if absent else []
    if gpu is not None:
        lines += ["", *(f"{way.precision}, {way.layout}: {way.command}" for way in ways)]
    lines += ["", "Where each figure comes from:", *(f"- {reason}" for reason in derivation(config, context, batch))]
    return "\n".join(lines)


def json_of_serving(ways: list[Serving]) -> str:
    return json.dumps([asdict(way) for way in ways], indent=2)
