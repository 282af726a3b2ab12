"""How does a model lie on a cluster: memory a GPU, pipeline and expert parallelism, bytes on the wires, expected FLOP/s?

A training token costs each layer matrix products (at the tensor cores' peak), passes over memory, and all-to-alls to its experts
and back. What no formula here knows (kernels below peak, launches, ranks that wait for the fullest one) is one factor on the
products and the wires, fitted to DeepSeek-V2's published GPU hours, not to A.X K1.
"""

import functools
import math
from dataclasses import dataclass

from modeling_axk1 import AxK1Config, count_flops, count_parameters
from modeling_axk1.configuration_axk1 import in_units

MICRO_BATCH = 4096  # tokens of one micro-batch: a sequence of stages 1 and 2
# Steps of a run: DeepSeek-V3's 14.8T tokens in batches of 15,360 x 4,096, Kimi K2's 15.5T in batches of 67M.
STEPS = 233_000
# Share of memory left for NCCL, CUDA and fragments.
RESERVED = 0.05
# Bytes a logit moves over memory, by `fused`. Op by op: to fp32 (2 + 4), max (4), minus (8), exp (8), sum (4), divide and
# keep (8), its gradient (8), to bf16 (4 + 2). Fused: read it twice, write its gradient, in bf16.
LOGIT_BYTES = {False: 52, True: 6}
# Units in which figures are shown, from the largest.
COUNTS = {"T": 1e12, "B": 1e9, "M": 1e6}
TIMES = {"days": 86400, "hours": 3600, "minutes": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def scaled(number: float, units: dict[str, float]) -> str:
    """In the largest unit that leaves 1 or more, else in the smallest."""
    unit = next((unit for unit, size in units.items() if number >= size), [*units][-1])
    return f"{number / units[unit]:,.1f} {unit}"


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, a second; links are bytes a second and direction of one GPU.  [vendor data sheets]"""

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    infiniband_bytes_per_s: float
    node_gpus: int = 8


# One InfiniBand port a GPU: 200 Gb/s beside A100, 400 Gb/s beside the others. The A100 has no FP8.
GPUS = (
    Gpu("a100", 312e12, 312e12, 80e9, 2.039e12, 300e9, 25e9),
    Gpu("h100", 989.5e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9),
    Gpu("h800", 989.5e12, 1979e12, 80e9, 3.35e12, 200e9, 50e9),
    Gpu("h200", 989.5e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9),
    Gpu("b200", 2250e12, 4500e12, 180e9, 8e12, 900e9, 50e9),
)


def find_gpu(name: str) -> Gpu:
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise ValueError(f"gpu={name!r} is unknown; use one of {', '.join(gpu.name for gpu in GPUS)}.")


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    gpus: int

    def __post_init__(self):
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus} is no cluster; give a positive number of GPUs.")


@dataclass(frozen=True)
class Layout:
    """Ranks of each kind (`context` at 4,096 tokens); `costs`: bytes and seconds by name; `derivation`: how they come about."""

    pipeline: int
    expert: int
    context: int
    replicas: int
    flops_per_s: float
    batch_tokens: int
    costs: dict[str, float]
    derivation: tuple[str, ...] = ()


def linear_elements(config: AxK1Config) -> tuple[int, int]:
    """(inputs, outputs) of a MoE layer's matrix products for one token, in elements; a routed expert counts for each visit."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    latents = config.q_lora_rank + config.kv_lora_rank
    visits = config.num_experts_per_tok + config.n_shared_experts
    keys_values = config.qk_nope_head_dim + config.v_head_dim
    inputs = hidden + latents + heads * config.v_head_dim + visits * (hidden + width)
    outputs = latents + config.qk_rope_head_dim + heads * (config.qk_head_dim + keys_values) + hidden
    return inputs, outputs + visits * (2 * width + hidden)


def kept_bytes(config: AxK1Config) -> int:
    """Activations of one token in one MoE layer kept for backward, bf16, with A.X K1's selective recomputation.

    Kept: five residual or norm inputs, the latents, the attention output, and of each visited expert input, gate, up and their
    product. Queries, keys and values are recomputed from the latents (the MLA up-projections).  [A.X K1 report]
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    latents = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    routed = config.num_experts_per_tok * (hidden + 3 * width)
    shared = config.n_shared_experts * 3 * width
    return 2 * (5 * hidden + latents + config.num_attention_heads * config.v_head_dim + routed + shared)


def memory_bytes(config: AxK1Config, cluster: Cluster, pipeline: int, expert: int, context: int) -> dict[str, float]:
    """By part, of the fullest GPU: the first stage's, with `pipeline` micro-batches in flight and the embedding; the last stage
    has one in flight, beside head and MTP layer.

    bf16 weights and fp32 gradients (6 bytes a parameter), fp32 master weights and two AdamW moments (12 bytes) split over
    all GPUs that hold the same.
    """
    counts = count_parameters(config)
    layers = math.ceil(config.num_hidden_layers / pipeline)
    per_layer = layers / config.num_hidden_layers
    routed = counts["routed_experts"] * per_layer / expert
    elsewhere = counts["routed_experts"] + counts["embedding"] + counts["lm_head"]
    rest = (counts["total"] - elsewhere) * per_layer + counts["embedding"]
    sharers = cluster.gpus // pipeline
    in_flight = pipeline * layers * MICRO_BATCH / context
    return {
        "weights_and_gradients": 6 * (routed + rest),
        "optimizer": 12 * (routed * expert + rest) / sharers,
        "activations": in_flight * kept_bytes(config),
    }


def all_to_all_bytes(config: AxK1Config, expert: int, node_gpus: int) -> tuple[float, float]:
    """(NVLink, InfiniBand) bytes that one token of one MoE layer sends: dispatch and combine, forward and backward, bf16.

    Every visited expert gets its copy; experts are spread evenly over `expert` GPUs, so 1/expert of them is at home.
    """
    sent = 4 * config.num_experts_per_tok * config.hidden_size * 2
    near = min(expert, node_gpus)
    return sent * (near - 1) / expert, sent * (expert - near) / expert


def ring_bytes(config: AxK1Config, context: int) -> int:
    """Bytes that one token of one layer sends to the GPUs that share its sequence: its keys and values in bf16, forward,
    and again with their gradients backward."""
    keys_values = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 3 * 2 * keys_values * (context - 1)


def wire_seconds(config: AxK1Config, gpu: Gpu, pipeline: int, expert: int, context: int) -> float:
    """A token's all-to-alls in all MoE layers, its rings, and its passes between stages (forward and back, over InfiniBand).

    Expert and context ranks are a node's neighbours, as far as it reaches.
    """
    near, far = all_to_all_bytes(config, expert, gpu.node_gpus)
    layers = config.mlp_layer_types.count("sparse")
    exchange = layers * (near / gpu.nvlink_bytes_per_s + far / gpu.infiniband_bytes_per_s)
    link = gpu.nvlink_bytes_per_s if context <= gpu.node_gpus else gpu.infiniband_bytes_per_s
    exchange += config.num_hidden_layers * ring_bytes(config, context) / link
    return exchange + (pipeline - 1) * 2 * 2 * config.hidden_size / gpu.infiniband_bytes_per_s


def product_seconds(config: AxK1Config, gpu: Gpu, model_flops: float, *, fp8: bool) -> float:
    """A token's matrix products at peak. In FP8 all linear layers but router and head; attention's core stays bf16.

    The MLA up-projections and the dense MLP run forward once more (recomputation).
    """
    parts = count_flops(config, queries=MICRO_BATCH, backward=True)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    up = config.q_lora_rank * config.qk_head_dim + latent * (config.qk_nope_head_dim + config.v_head_dim)
    again = 2 * config.num_hidden_layers * heads * up + parts["dense_mlp"] / 3 / MICRO_BATCH
    linear = ("attention_projections", "latent_expansion", "dense_mlp", "shared_experts", "routed_experts")
    light = sum(parts[name] for name in linear) / MICRO_BATCH + again if fp8 else 0.0
    return light / gpu.fp8_flops + (model_flops + again - light) / gpu.bf16_flops


def pass_seconds(config: AxK1Config, gpu: Gpu, expert: int, context: int, *, fp8: bool) -> float:
    """A token's passes over memory outside the products, in all layers.

    A read and a write of 2 bytes, forward and twice backward, of the residuals and norms (5 widths), queries, keys and
    values, the experts' gated products, and four times the dispatched copies (permute, sort, and back); the fp32 accumulation of
    the experts' weight gradients, once a micro-batch; in FP8 the casts (2 bytes in, 1 out as it is and 1 transposed).
    """
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    visits = config.num_experts_per_tok + config.n_shared_experts
    attention = heads * (2 * config.qk_head_dim + config.v_head_dim)
    elements = 5 * hidden + attention + visits * 3 * width + 4 * config.num_experts_per_tok * hidden
    moved = 3 * 2 * 2 * elements
    moved += 8 * 3 * hidden * width * config.n_routed_experts / expert * context / MICRO_BATCH
    moved += 4 * sum(linear_elements(config)) if fp8 else 0
    return config.num_hidden_layers * moved / gpu.memory_bytes_per_s


def loss_seconds(config: AxK1Config, gpu: Gpu, pipeline: int, heads: int, *, fused: bool) -> float:
    """The cross-entropy's passes over the logits: on the last stage alone, while all others wait."""
    return pipeline * heads * LOGIT_BYTES[fused] * config.vocab_size / gpu.memory_bytes_per_s


def unevenness(config: AxK1Config, pipeline: int, mtp_layers: int) -> float:
    layers = config.num_hidden_layers + mtp_layers
    return pipeline * math.ceil(layers / pipeline) / layers


def token_seconds(
    config: AxK1Config,
    gpu: Gpu,
    model_flops: float,
    *,
    pipeline: int,
    expert: int,
    context: int,
    fp8: bool,
    fused: bool,
    waste: float,
    mtp_layers: int = 1,
) -> float:
    """GPU seconds a trained token, bubbles aside.

    `waste` multiplies the wires and the products' bf16 time: ranks wait for the fullest one's products and copies alike, and
    FP8 shortens neither launches nor waiting.
    """
    exact = product_seconds(config, gpu, model_flops, fp8=fp8)
    dense = product_seconds(config, gpu, model_flops, fp8=False)
    wires = wire_seconds(config, gpu, pipeline, expert, context)
    passes = pass_seconds(config, gpu, expert, context, fp8=fp8)
    layers = exact + wires + (waste - 1) * (dense + wires) + passes
    return unevenness(config, pipeline, mtp_layers) * layers + loss_seconds(
        config, gpu, pipeline, 1 + mtp_layers, fused=fused
    )


def deepseek_v2() -> AxK1Config:
    """DeepSeek-V2 in our terms; its softmax routing and missing post-norm change no cost here.  [arXiv 2405.04434, 3.1.2]"""
    return AxK1Config(
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        topk_group=3,
    )


@functools.cache
def fitted_waste() -> float:
    """The one fitted number: what explains DeepSeek-V2's 172,800 H800 hours a trillion tokens in bf16, PP 16, EP 8.

    Its pipeline has no bubbles, and it no MTP layer.  [arXiv 2405.04434, 3.1.3, 3.2.3]
    """
    measured_s = 172_800 * 3600 / 1e12
    config, gpu = deepseek_v2(), find_gpu("h800")
    parts = count_flops(config, queries=MICRO_BATCH, backward=True)
    model_flops = (parts["total"] - parts["attention_core"] / 2) / MICRO_BATCH
    setting = {"pipeline": 16, "expert": 8, "context": 1, "fp8": False, "fused": False, "mtp_layers": 0}
    lean = token_seconds(config, gpu, model_flops, waste=1.0, **setting)
    slope = token_seconds(config, gpu, model_flops, waste=2.0, **setting) - lean
    return 1 + (measured_s - lean) / slope


def micro_batches_of(tokens: float, replicas: int, pipeline: int) -> int:
    """A replica's micro-batches a step, the run being `STEPS` long; at least one for each stage of the pipeline."""
    return max(pipeline, round(tokens / STEPS / MICRO_BATCH / replicas))


def expected_flops(config, cluster, tokens, model_flops, *, pipeline, expert, context, fp8, fused) -> float:
    """Model FLOPs a second and GPU, after the bubble of (stages - 1) / micro-batches.  [Narayanan et al., 2104.04473]"""
    setting = {"pipeline": pipeline, "expert": expert, "context": context, "fp8": fp8, "fused": fused}
    seconds = token_seconds(config, cluster.gpu, model_flops, waste=fitted_waste(), **setting)
    micro_batches = micro_batches_of(tokens, cluster.gpus // (pipeline * context), pipeline)
    return model_flops / seconds / (1 + (pipeline - 1) / micro_batches)


def throughput_ladder(
    config: AxK1Config, cluster: Cluster, tokens: float, model_flops: float
) -> tuple[tuple[str, float], ...]:
    """The report's four settings, as (name, FLOP/s a GPU), memory aside; what the cluster cannot run is left out."""
    has_fp8, rungs = cluster.gpu.fp8_flops > cluster.gpu.bf16_flops, []
    for pipeline, expert, fp8, fused in ((8, 32, 0, 0), (16, 8, 0, 0), (16, 8, 1, 0), (16, 8, 1, 1)):
        divides = cluster.gpus % (pipeline * expert) == 0 and pipeline <= config.num_hidden_layers
        if not divides or (fp8 and not has_fp8):
            continue
        setting = {"pipeline": pipeline, "expert": expert, "context": 1, "fp8": bool(fp8), "fused": bool(fused)}
        name = f"EP{expert}/PP{pipeline}" + " + FP8" * fp8 + " + fused cross-entropy" * fused
        rungs.append((name, expected_flops(config, cluster, tokens, model_flops, **setting)))
    return tuple(rungs)


def choose_layout(config: AxK1Config, cluster: Cluster, tokens: float, model_flops: float) -> Layout:
    """Within 5% of the fastest layout that fits, since the model above knows no finer difference: sequences of 4,096 cut over the
    fewest GPUs, then the shortest pipeline.

    Powers of two; FP8 where the GPU has it; fused cross-entropy. Tensor parallelism is not used: NVLink is the experts' here,
    and MLA's latents do not split. ValueError if none fits, with the least memory any needs.
    """
    limit = (1 - RESERVED) * cluster.gpu.memory_bytes
    modern, fitting, least = {"fp8": cluster.gpu.fp8_flops > cluster.gpu.bf16_flops, "fused": True}, [], math.inf
    for pipeline, expert, context in possible_ranks(config, cluster):
        needed = sum(memory_bytes(config, cluster, pipeline, expert, context).values())
        least = min(least, needed)
        if needed <= limit:
            ranks = {"pipeline": pipeline, "expert": expert, "context": context}
            fitting.append((*ranks.values(), expected_flops(config, cluster, tokens, model_flops, **ranks, **modern)))
    if not fitting:
        total = count_parameters(config)["total"]
        raise ValueError(
            f"{scaled(total, COUNTS)} parameters fit no layout on {cluster.gpus} x {cluster.gpu.name}: the leanest needs "
            f"{in_units(least)} of {in_units(limit)} a GPU; use more GPUs (a power of two), larger ones, or fewer "
            "FLOPs."
        )
    fastest = max(rate for *_, rate in fitting)
    near = [each for each in fitting if each[-1] >= 0.95 * fastest]
    pipeline, expert, context, rate = min(near, key=lambda each: (each[2], each[0], each[1]))
    return describe(config, cluster, tokens, model_flops, pipeline, expert, context, rate)


def possible_ranks(config: AxK1Config, cluster: Cluster):
    powers = [2**power for power in range(11)]
    for pipeline in (each for each in powers if each <= config.num_hidden_layers and cluster.gpus % each == 0):
        sharers = cluster.gpus // pipeline
        for expert in (each for each in powers if config.n_routed_experts % each == 0 and sharers % each == 0):
            for context in (each for each in powers if each <= cluster.gpu.node_gpus and sharers % each == 0):
                yield pipeline, expert, context


def describe(config, cluster, tokens, model_flops, pipeline: int, expert: int, context: int, rate: float) -> Layout:
    gpu, memory = cluster.gpu, memory_bytes(config, cluster, pipeline, expert, context)
    near, far = all_to_all_bytes(config, expert, gpu.node_gpus)
    fp8 = gpu.fp8_flops > gpu.bf16_flops
    waste, replicas = fitted_waste(), cluster.gpus // (pipeline * context)
    micro_batches = micro_batches_of(tokens, replicas, pipeline)
    batch = micro_batches * replicas * MICRO_BATCH
    costs = {
        "memory_bytes_per_gpu": sum(memory.values()),
        "weights_and_gradients_bytes": memory["weights_and_gradients"],
        "optimizer_bytes": memory["optimizer"],
        "activations_bytes": memory["activations"],
        "all_to_all_nvlink_bytes_per_token_layer": near,
        "all_to_all_infiniband_bytes_per_token_layer": far,
        "context_parallel_bytes_per_token_layer": ring_bytes(config, context),
        "pipeline_bytes_per_token_stage": 2 * 2 * config.hidden_size,
        # fp32 gradients out (4 bytes a parameter) and bf16 weights back (2), once a step; hidden behind backward.
        "data_parallel_bytes_per_step": memory["weights_and_gradients"],
        "pipeline_bubble": (pipeline - 1) / (micro_batches + pipeline - 1),
        "product_seconds_per_token": product_seconds(config, gpu, model_flops, fp8=fp8),
        "wire_seconds_per_token": wire_seconds(config, gpu, pipeline, expert, context),
        "memory_pass_seconds_per_token": pass_seconds(config, gpu, expert, context, fp8=fp8),
        "fitted_waste": waste,
    }
    derivation = (
        f"layout: PP {pipeline}, EP {expert}, CP {context} at 4,096 tokens (longer sequences: more, taken from DP), TP 1, "
        f"DP {replicas}; within 5% of the fastest layout that fits, the least CP, then the shortest pipeline",
        describe_memory(memory, gpu, pipeline),
        f"all-to-all: {in_units(near)} over NVLink ({gpu.nvlink_bytes_per_s / 1e9:.0f} GB/s) and {in_units(far)} over "
        f"InfiniBand ({gpu.infiniband_bytes_per_s / 1e9:.0f} GB/s) a token and MoE layer",
        f"batch: {batch:,} tokens (tokens / {STEPS:,} steps, as DeepSeek-V3 and Kimi K2), {micro_batches} micro-batches a "
        f"replica, bubble {costs['pipeline_bubble']:.1%} [2104.04473]",
        describe_time(costs, fp8, rate),
    )
    return Layout(pipeline, expert, context, replicas, rate, batch, costs, derivation)


def describe_memory(memory: dict[str, float], gpu: Gpu, pipeline: int) -> str:
    shown = {name: in_units(value) for name, value in memory.items()}
    return (
        f"memory of the fullest GPU: weights and gradients {shown['weights_and_gradients']} (6 bytes a parameter), AdamW "
        f"in fp32 {shown['optimizer']} (12, split over GPUs that hold the same), activations {shown['activations']} "
        f"({pipeline} micro-batches in flight, MLA up-projections recomputed) = {in_units(sum(memory.values()))} of "
        f"{gpu.memory_bytes / 1e9:.0f} GB"
    )


def describe_time(costs: dict[str, float], fp8: bool, rate: float) -> str:
    shown = {name: scaled(value, TIMES) for name, value in costs.items() if "seconds" in name}
    return (
        f"GPU time a token: products {shown['product_seconds_per_token']} at {'FP8' if fp8 else 'bf16'} peak, wires "
        f"{shown['wire_seconds_per_token']}, memory passes {shown['memory_pass_seconds_per_token']}; "
        f"{costs['fitted_waste'] - 1:.2f} x products (as bf16) and wires on top for what no formula here knows, fitted to "
        "DeepSeek-V2's 172.8K H800 hours a trillion tokens [2405.04434]; then uneven stages, cross-entropy and the bubble: "
        f"{rate / 1e12:.1f} TFLOP/s a GPU"
    )
