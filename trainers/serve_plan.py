"""Which GPUs hold which precision of a model, and how much context beside it?  Memory only: no speed is promised.

A GPU gives `USABLE` of its memory to weights, to one layer's activations of a chunk of prompt, and to the cache: of each token
the compressed latent and the rotary key of each layer (MLA), which every head reads and tensor parallelism cannot split.
Weights are counted where they are stored, in `modeling_axk1/quantization_axk1.py`; `axk1 info` counts them by the same.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from modeling_axk1 import AxK1Config, count_parameters
from modeling_axk1.configuration_axk1 import in_units
from modeling_axk1.quantization_axk1 import Card, deal, quantized_bytes, token_bytes
from trainers.cluster import GPUS, Gpu, find_gpu, linear_elements
from trainers.report import text_table
from trainers.sharding import four_bit_bytes

USABLE = 0.9  # vLLM's default gpu_memory_utilization; the rest is CUDA's, NCCL's and fragments'
# Prompt tokens computed at a time: vLLM's max_num_batched_tokens, transformers' generate(prefill_chunk_size=...).
CHUNK = 8192
# vLLM cuts heads and experts, so powers of two in a machine, then whole machines. transformers takes any count of a machine that
# the layers or, dealt over ranks, the experts allow.
GPU_COUNTS = {
    "vllm": (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64),
    "layers": tuple(range(1, 65)),
    "experts": tuple(range(2, 65)),
}
# A consumer card: 24 GB, no NVLink.  [NVIDIA Ada whitepaper; FLOP/s with fp32 accumulation]
RTX4090 = Gpu("rtx4090", 165.2e12, 330.3e12, 24e9, 1.008e12, 32e9, 32e9)
SERVING_GPUS = (RTX4090, *GPUS)


@dataclass(frozen=True)
class Precision:
    """How the linear layers are stored, by `matrix_bytes`' name; embedding, head, router and norms stay bf16."""

    name: str
    bits: int
    engines: tuple[str, ...]  # of GPU_COUNTS
    source: str


PRECISIONS = (
    Precision("bf16", 16, ("vllm",), "as released"),
    # vLLM's own quantisation of bf16 weights has fewer scales: one a tensor.
    Precision("fp8", 8, ("vllm",), "E4M3, an fp32 scale a block of 128 x 128 [DeepSeek-V3, 2412.19437, 3.3.2]"),
    Precision("int8", 8, ("layers",), "bitsandbytes LLM.int8(), an fp32 scale a row [2208.07339]"),
    Precision("nf4", 4, ("layers", "experts"), "bitsandbytes NF4, an fp32 scale 64 weights [2305.14314]"),
    Precision(
        "nf4 double", 4, ("layers", "experts"), "the same, scales in 8 bits, an fp32 one 256 of them [2305.14314]"
    ),
)


@dataclass(frozen=True)
class Serving:
    """One way that fits: `layout` in the engine's words, bytes of the GPU that fills up first, and the tokens of all caches."""

    gpu: str
    precision: str
    gpus: int
    layout: str
    weight_bytes: int
    weight_bytes_per_gpu: int
    activation_bytes: float
    cache_bytes_per_token: float
    cache_tokens: int
    sequences: int
    command: str


def activation_bytes(config: AxK1Config) -> float:
    """One layer's inputs and outputs of matrix products for a chunk, bf16: what lives at a time without gradients, at most."""
    return 2 * CHUNK * sum(linear_elements(config))


def layouts(
    config: AxK1Config, precision: Precision, engine: str, gpu: Gpu, gpus: int
) -> Iterator[tuple[str, list[Card], int, str]]:
    """(layout, what a GPU of each stage holds, groups of requests that have caches of their own, command).

    vLLM: tensor parallel inside a node, pipeline over nodes; or attention whole on each GPU, each with its own requests. In both
    the experts are dealt over the GPUs that share a layer. transformers: layers one after another (device_map="auto"), or 4-bit
    experts dealt over the ranks of a torchrun, which cache every layer.
    """
    layers = config.num_hidden_layers
    if engine == "layers" and gpus <= min(layers, gpu.node_gpus):
        command = f'from_pretrained(MODEL, device_map="auto", quantization_config={bitsandbytes(precision)})'
        yield f"layers over {gpus}", deal(config, precision.name, gpus), 1, command
    if engine == "experts" and gpus <= gpu.node_gpus and config.n_routed_experts % gpus == 0:
        sizes = f"DistributedConfig(tp_size={gpus}, ep_size={gpus})"
        command = f"from_pretrained(MODEL, distributed_config={sizes}, quantization_config={bitsandbytes(precision)})"
        held = Card(four_bit_bytes(config, gpus, precision.name), layers + config.num_nextn_predict_layers)
        yield f"experts over {gpus}", [held], 1, f"{command} under torchrun --nproc-per-node {gpus}"
    if engine != "vllm":
        return
    tensor = min(gpus, gpu.node_gpus)
    stages, expert_flag = gpus // tensor, " --enable-expert-parallel"
    fp8 = " --quantization fp8" * (precision.name == "fp8")
    if config.num_attention_heads % tensor == 0 and config.n_routed_experts % tensor == 0 and stages <= layers:
        command = f"vllm serve MODEL{fp8} --tensor-parallel-size {tensor}{expert_flag * (tensor > 1)}"
        command += f" --pipeline-parallel-size {stages}" * (stages > 1)
        dealt = deal(config, precision.name, stages, tensor=tensor, expert=tensor)
        yield f"TP{tensor} EP{tensor} PP{stages}", dealt, 1, command
    if gpus > 1 and config.n_routed_experts % gpus == 0:
        command = f"vllm serve MODEL{fp8} --data-parallel-size {gpus}{expert_flag}"
        yield f"DP{gpus} EP{gpus}", deal(config, precision.name, 1, expert=gpus), gpus, command


def bitsandbytes(precision: Precision) -> str:
    double = ", bnb_4bit_use_double_quant=True" * (precision.name == "nf4 double")
    kind = ', bnb_4bit_quant_type="nf4"' * (precision.bits == 4)
    return f"BitsAndBytesConfig(load_in_{precision.bits}bit=True{double}{kind})"


def fit(
    config: AxK1Config, precision: Precision, engine: str, gpu: Gpu, gpus: int, *, context: int, batch: int
) -> Iterator[Serving]:
    """The layouts on so many GPUs whose caches hold `batch` sequences of `context` tokens."""
    activations = activation_bytes(config)
    usable = USABLE * gpu.memory_bytes - activations
    for layout, dealt, groups, command in layouts(config, precision, engine, gpu, gpus):
        if max(card.weight_bytes for card in dealt) > usable:
            continue
        first = min(dealt, key=lambda card: card.tokens(config, usable))
        tokens = first.tokens(config, usable)
        sequences = groups * (tokens // context)
        if sequences >= batch:
            yield Serving(
                gpu.name, precision.name, gpus, layout, quantized_bytes(config, precision.name), first.weight_bytes,
                activations, token_bytes(config, first.layers), groups * tokens, sequences, command,
            )  # fmt: skip


def plan_serving(
    config: AxK1Config, *, gpu: str | None = None, context: int | None = None, batch: int = 1
) -> list[Serving]:
    """For each precision the fewest GPUs of a kind that hold it: of one kind in every layout, of all kinds in the roomiest.

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
            ways = [
                way for engine in precision.engines for way in fewest(config, precision, engine, kind, context, batch)
            ]
            found += ways if gpu else sorted(ways, key=lambda way: (way.gpus, -way.cache_tokens))[:1]
    return found


def fewest(config: AxK1Config, precision: Precision, engine: str, gpu: Gpu, context: int, batch: int) -> list[Serving]:
    """Every layout on the smallest number of GPUs that has one; none if none has."""
    tried = (
        list(fit(config, precision, engine, gpu, gpus, context=context, batch=batch)) for gpus in GPU_COUNTS[engine]
    )
    return next(filter(None, tried), [])


def derivation(config: AxK1Config, context: int, batch: int) -> list[str]:
    counts, layers = count_parameters(config), config.num_hidden_layers
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    return [
        f"{counts['total']:,} parameters; "
        + ", ".join(f"{p.name} {in_units(quantized_bytes(config, p.name))}" for p in PRECISIONS),
        *(f"{precision.name}: {precision.source}" for precision in PRECISIONS),
        "embedding, head, router and norms stay bf16",
        f"cache: {config.kv_lora_rank} + {config.qk_rope_head_dim} = {per_layer} values of 2 bytes a token and layer, {layers} "
        f"layers: {token_bytes(config, layers):,} bytes a token; {batch} x {context:,} tokens = "
        f"{in_units(token_bytes(config, layers) * batch * context)}. Each GPU of a TP group holds it whole; "
        "DP deals requests",
        f"activations: a chunk of {CHUNK:,} tokens through one layer, {in_units(activation_bytes(config))}",
        f"{USABLE:.0%} of a GPU's memory is counted (vLLM's gpu_memory_utilization)",
        f"GPU counts tried: vLLM {', '.join(map(str, GPU_COUNTS['vllm']))}; transformers every one of a machine's",
        "layers over N GPUs work one after another; experts over N work at once, and each GPU holds the rest and the cache whole",
        "GPUs are counted with the context's cache; `axk1 info` counts those that hold the weights alone",
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
            "weights": in_units(way.weight_bytes),
            "GPUs": str(way.gpus),
            "layout": way.layout,
            "weights/GPU": in_units(way.weight_bytes_per_gpu),
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
