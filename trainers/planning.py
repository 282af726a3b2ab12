"""Which model should a compute budget train, on how many tokens, in which vocabulary?  Every law with its source.

Two accountings of compute, never mixed: *GPU time* is GPUs x seconds x sustained FLOP/s, as clusters are booked and as the
A.X K1 report's 2.548e24 counts; *model FLOPs* are what the model itself needs (three forward passes a token). Of the GPU time
`EFFECTIVE_TIME` trains, the rest restarts, checkpoints and waits. Where it runs is `trainers/cluster.py`'s question.

The sources leave choices open, and ours were made with A.X K1's figures in sight: that a plan of its budget comes near them is
consistency, not prediction. What other choices would plan there (measured): 35 tokens a parameter, as the field takes, 385 B; the
sparsity of models with MLA alone, 595 B; the width/depth of all of them, 79 layers of 6272 and a vocabulary of 196,608; Tao et
al.'s approach 2 or 3 alone, 131,072 or 229,376; no time lost, 553 B; granularity by training FLOPs instead of parameters, 6.
"""

import json
import math
import statistics
from dataclasses import dataclass

from modeling_axk1 import AxK1Config, count_flops, count_parameters
from modeling_axk1.configuration_axk1 import in_units
from trainers.cluster import (
    COUNTS,
    TIMES,
    Cluster,
    Layout,
    choose_layout,
    find_gpu,
    scaled,
    throughput_ladder,
)

# "Higher than 90% effective training time".  [Llama 3, arXiv 2407.21783, 3.3.4]
EFFECTIVE_TIME = 0.90
# Chinchilla's tokens a parameter [arXiv 2203.15556], found on dense models and read here as tokens a *total* parameter: what an
# MoE can store grows with all of its experts. An assumption: of an allocation law for MoEs no coefficients were to be had.
TOKENS_PER_PARAMETER = 20.0
# The granularity G = 2 * d_model / d_expert is near-best between these, whatever the compute.  [Tian et al., arXiv 2507.17702]
BEST_GRANULARITY = (8, 12)
# 8 routed + 1 shared: the point at which the same paper reports over 7x the efficiency of a dense model.
EXPERTS_PER_TOKEN, SHARED_EXPERTS = 8, 1
# Eight groups of experts, and groups that split over a node of eight.  [DeepSeek-V3, arXiv 2412.19437]
EXPERT_STEP = 64
STAGES = (
    # name, tokens in trillions, sequence lengths in equal parts, learning rate.  [A.X K1 report, pre-training]
    ("1 general", 7.0, (4096,), "warm-up, then stable (WSD)"),
    ("2 reasoning-heavy", 1.66, (4096,), "decay (WSD)"),
    ("3 long context", 0.6, (4096, 16384, 32768), "not reported"),
)
# What the report says of A.X K1. Printed beside a plan, never read by one.
REPORTED = {
    "flops": 2.548e24,
    "total_parameters": 518_983_059_456,
    "active_parameters": 33e9,
    "tokens": 9.26e12,
    "vocab_size": 163_840,
    "granularity": 7,
}
REPORTED_LADDER = (95.29, 261.27, 288.97, 301.72)


@dataclass(frozen=True)
class Published:
    """A fine-grained MoE (6 or more routed experts a token); A.X K1 itself is left out."""

    name: str
    total_parameters: float
    active_parameters: float
    tokens: float
    layers: int
    hidden_size: int
    expert_width: int
    mla: bool
    source: str

    @property
    def sparsity(self) -> float:
        return self.total_parameters / self.active_parameters

    @property
    def granularity(self) -> float:
        return 2 * self.hidden_size / self.expert_width


PUBLISHED = (
    Published("DeepSeek-V2", 236e9, 21e9, 8.1e12, 60, 5120, 1536, True, "arXiv 2405.04434"),
    Published("DeepSeek-V3", 671e9, 37e9, 14.8e12, 61, 7168, 2048, True, "arXiv 2412.19437"),
    Published("Qwen3-235B", 235e9, 22e9, 36e12, 94, 4096, 1536, False, "arXiv 2505.09388"),
    Published("Pangu Ultra MoE", 718e9, 39e9, 19e12, 61, 7680, 2048, True, "arXiv 2505.04519, its model card"),
    Published("Kimi K2", 1.04e12, 32.6e9, 15.5e12, 61, 7168, 2048, True, "arXiv 2507.20534"),
    Published("GLM-4.5", 355e9, 32e9, 23e12, 92, 5120, 1536, False, "arXiv 2508.06471"),
    Published("Ling-1T", 1e12, 50e9, 20e12, 80, 8192, 2048, False, "arXiv 2510.22115"),
    Published("OLMoE", 6.9e9, 1.3e9, 5.1e12, 16, 2048, 1024, False, "arXiv 2409.02060"),
    Published("DeepSeek-V2-Lite", 15.7e9, 2.4e9, 5.7e12, 27, 2048, 1408, True, "arXiv 2405.04434"),
    Published("Moonlight", 16e9, 3e9, 5.7e12, 27, 2048, 1408, True, "arXiv 2502.16982"),
    Published("Qwen3-30B", 30.5e9, 3.3e9, 36e12, 48, 2048, 768, False, "arXiv 2505.09388"),
    Published("GLM-4.5-Air", 106e9, 12e9, 23e12, 46, 4096, 1408, False, "arXiv 2508.06471"),
)
# What is not read over sizes is read of these.
LARGE = tuple(model for model in PUBLISHED if model.total_parameters > 200e9)


def geometric_mean(values) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def published_sparsity() -> float:
    """Total over active parameters in the field, since Tian et al.'s law has no optimum: sparser is always better."""
    return geometric_mean(model.sparsity for model in LARGE)


def published_aspect() -> float:
    """Width over depth of the models with MLA, whose layer is ours; the other attentions' shapes do not carry over."""
    return geometric_mean(model.hidden_size / model.layers for model in LARGE if model.mla)


def published_granularity(total_parameters: float) -> float:
    """2 * d_model / d_expert of published MoEs of that size: the line of least squares through their logarithms.

    Below the smallest and above the largest of them as at these: nothing is read where nobody has trained.
    """
    sizes = [math.log(model.total_parameters) for model in PUBLISHED]
    slope, height = statistics.linear_regression(sizes, [math.log(model.granularity) for model in PUBLISHED])
    return math.exp(height + slope * min(max(math.log(total_parameters), min(sizes)), max(sizes)))


def affordable_parameters(model_flops: float, tokens_per_parameter: float) -> float:
    """Total parameters where 6 x active x tokens spends the compute, at the field's total/active: before there is a shape."""
    return math.sqrt(model_flops * published_sparsity() / (6 * tokens_per_parameter))


def granularity(model_flops: float, tokens_per_parameter: float) -> int:
    """The field's at the size that the budget buys, in whole numbers.

    Tian et al.'s law has its best at 8 to 12 at any compute: EL = A^(a + d log C + gamma (log G)^2 + beta log G) is greatest
    at log G = -beta / (2 gamma), without C. The field stays coarser, the more so the smaller the model, and the report gives
    stability under imperfect balance as its reason: at equal active width the experts a token visits grow with G, so do the
    copies that are dispatched and the experts whose fullest one everybody waits for. What that costs no paper's formula
    says; how far models that were trained stayed below the best, their shapes do.
    """
    total = affordable_parameters(model_flops, tokens_per_parameter)
    return round(published_granularity(total))


def least(function, low: float, high: float) -> float:
    """Where a function that falls and then rises is least, by thirds."""
    for _ in range(80):
        third = (high - low) / 3
        if function(low + third) < function(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def vocabulary_by_flops(flops: float, hidden_size: int) -> float:
    """Approach 1: rows at `flops` (model FLOPs), of the loss-optimal dense model.  [Tao et al., arXiv 2407.13623]"""
    return math.exp(-1.58903) * flops**0.416362 / hidden_size


def vocabulary_by_parameters(parameters: float, hidden_size: int) -> float:
    """Approach 2: rows for `parameters` outside the vocabulary, trained compute-optimally.  [Tao et al.]"""
    return 3_145_728 * (parameters / 33e6) ** 0.835397 / hidden_size


def vocabulary_by_loss(parameters: float, tokens: float, hidden_size: int) -> float:
    """Approach 3: rows of least loss for `parameters` outside the vocabulary at the compute they spend on `tokens`.  [Tao et al.]

    L = -E + A1/N^a1 + A2/Nv^a2 + B/D^b at C = 6 (N + Nv) D; the root of dL/dNv, by bisection, in the authors' units
    (N in 1e6, D in 1e9).
    """
    a2_scale, a2, b_scale, b = 0.195842, 0.670737, 2.12411, 0.446606
    nonvocab = parameters / 1e6
    compute = 6 * nonvocab * tokens / 1e9

    def slope(log_rows: float) -> float:
        vocab = math.exp(log_rows)
        data_lost = b_scale * b * (6 / compute) ** b * (nonvocab + vocab) ** (b - 1)
        return data_lost - a2_scale * a2 * vocab ** (-a2 - 1)

    low, high = math.log(1e-6), math.log(1e9)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp(low) * 1e6 / hidden_size


def estimate_vocabulary(parameters: float, tokens: float, hidden_size: int) -> float:
    """The geometric mean of approaches 2 and 3.

    Approach 2 is the report's (132.5K for A.X K1) but knows nothing of the tokens, for which the report then adds a quarter.
    Approach 3 knows them but was fitted on models up to 3 B. Approach 1 describes dense models of the whole compute.
    """
    by_loss = vocabulary_by_loss(parameters, tokens, hidden_size)
    return math.sqrt(vocabulary_by_parameters(parameters, hidden_size) * by_loss)


def round_vocabulary(rows: float) -> int:
    """Down to m * 2^k with m in 4..7, at least 512: split 2^(k - 7) ways, its shards still are multiples of 128 rows, the
    tensor cores' tile; down, since the rows weigh on the first and last pipeline stage."""
    unit = 2 ** max(7, math.floor(math.log2(max(rows, 512))) - 2)
    return max(512, int(rows // unit) * unit)


def shape_of(step: int, layers: int, experts: int, vocab_size: int, fine: int) -> AxK1Config:
    """A config of width 64 * fine * step: a multiple of 64 whose experts (2 / fine of it) are 128-wide tiles.

    As in DeepSeek-V3: query latents 3/14 of the width, key/value latents 512, heads of 128 + 64 (as many as fill the width,
    to a power of two), and a dense layer as wide as one token's experts together.
    """
    hidden, expert = 64 * fine * step, 128 * step
    heads = 2 ** round(math.log2(hidden / 128))
    return AxK1Config(
        architectures=["AxK1ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=(EXPERTS_PER_TOKEN + SHARED_EXPERTS) * expert,
        moe_intermediate_size=expert,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=max(64, round(hidden * 3 / 14 / 64) * 64),
        kv_lora_rank=min(512, hidden),
        n_routed_experts=experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        n_shared_experts=SHARED_EXPERTS,
        bos_token_id=None,
        eos_token_id=None,
    )


def nonvocab_active(config: AxK1Config) -> int:
    counts = count_parameters(config)
    return counts["active"] - counts["embedding"] - counts["lm_head"]


def flops_per_token(config: AxK1Config, sequence: int, mtp_layers: int = 1) -> float:
    """Model FLOPs of training one token: forward and backward, causal attention (half the square), with the MTP layers
    (a block, the 2d -> d projection and the head once more each)."""

    def causal(each: AxK1Config) -> float:
        parts = count_flops(each, queries=sequence, backward=True)
        return parts["total"] - parts["attention_core"] / 2

    deeper = AxK1Config(**{**_fields(config), "num_hidden_layers": config.num_hidden_layers + 1})
    head = count_flops(config, queries=sequence, backward=True)["lm_head"]
    projection = 3 * 2 * sequence * 2 * config.hidden_size**2
    return (causal(config) + mtp_layers * (causal(deeper) - causal(config) + head + projection)) / sequence


def _fields(config: AxK1Config) -> dict:
    derived = ("mlp_layer_types", "first_k_dense_replace", "moe_layer_freq", "transformers_version", "model_type")
    return {name: value for name, value in config.to_dict().items() if name not in derived}


def mean_flops_per_token(config: AxK1Config) -> float:
    """Over the stages' tokens and sequence lengths."""
    tokens = sum(stage[1] for stage in STAGES)
    total = 0.0
    for _, share, sequences, _ in STAGES:
        total += share / tokens * sum(flops_per_token(config, length) for length in sequences) / len(sequences)
    return total


def with_vocabulary(step: int, layers: int, experts: int, fine: int, tokens_per_parameter: float) -> AxK1Config:
    """The shape with the vocabulary of its size and tokens; these depend on the vocabulary a little, hence twice."""
    config = shape_of(step, layers, experts, 512, fine)
    for _ in range(2):
        tokens = tokens_per_parameter * count_parameters(config)["total"]
        rows = estimate_vocabulary(nonvocab_active(config), tokens, config.hidden_size)
        config = shape_of(step, layers, experts, round_vocabulary(rows), fine)
    return config


def choose_experts(step: int, layers: int, fine: int, tokens_per_parameter: float) -> int:
    """The multiple of 64 that comes nearest to the field's total/active parameters."""

    def miss(experts: int) -> float:
        counts = count_parameters(with_vocabulary(step, layers, experts, fine, tokens_per_parameter))
        return abs(math.log(counts["total"] / counts["active"] / published_sparsity()))

    return min(range(EXPERT_STEP, 8 * EXPERT_STEP + 1, EXPERT_STEP), key=miss)


def choose_shape(model_flops: float, tokens_per_parameter: float) -> AxK1Config:
    """The width whose natural depth costs nearest to the budget, then the depth that spends it.

    Cost = FLOPs a token x total parameters x tokens a parameter. ValueError below the narrowest and above the widest shape.
    """

    fine = granularity(model_flops, tokens_per_parameter)

    def build(step: int, layers: int) -> AxK1Config:
        experts = choose_experts(step, layers, fine, tokens_per_parameter)
        return with_vocabulary(step, layers, experts, fine, tokens_per_parameter)

    def miss(config: AxK1Config) -> float:
        cost = flops_per_token(config, 4096) * count_parameters(config)["total"] * tokens_per_parameter
        return math.log(cost / model_flops)

    def natural(step: int) -> AxK1Config:
        return build(step, max(2, round(64 * fine * step / published_aspect())))

    low, high = 1, 64
    # Half the natural depth is the least that is tried below; parameters and FLOPs a token fall with it, to about an eighth.
    if miss(natural(low)) > math.log(8):
        raise ValueError(f"{model_flops:.4g} model FLOPs are too small for any shape planned here; use more FLOPs.")
    if miss(natural(high)) < 0:
        raise ValueError(f"{model_flops:.4g} model FLOPs are too large for any shape planned here; use fewer FLOPs.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if miss(natural(middle)) > 0 else (middle, high)
    config = min(natural(low), natural(high), key=lambda each: abs(miss(each)))
    step, depth, experts = config.hidden_size // (64 * fine), config.num_hidden_layers, config.n_routed_experts
    depths = range(max(2, depth // 2), 2 * depth + 1)
    candidates = (with_vocabulary(step, layers, experts, fine, tokens_per_parameter) for layers in depths)
    return min(candidates, key=lambda each: abs(miss(each)))


@dataclass(frozen=True)
class Plan:
    """A budget's model, data and layout; `derivation` says in order where each figure comes from."""

    flops: float
    config: AxK1Config
    tokens: float
    flops_per_token: float
    tokens_per_parameter: float
    cluster: Cluster
    layout: Layout
    ladder: tuple[tuple[str, float], ...]

    @property
    def days(self) -> float:
        return self.flops / (self.cluster.gpus * self.layout.flops_per_s * 86400)

    def figures(self) -> dict:
        """Every result by name, as plain numbers (and `stages`, `ladder`, `derivation` as lists) for JSON."""
        config, layout, counts = self.config, self.layout, count_parameters(self.config)
        return {
            "gpu_time_flops": self.flops,
            "model_flops": self.tokens * self.flops_per_token,
            "model_flops_6nd": 6 * counts["active"] * self.tokens,
            "model_flops_per_token": self.flops_per_token,
            "total_parameters": counts["total"],
            "active_parameters": counts["active"],
            "tokens": self.tokens,
            "vocab_size": config.vocab_size,
            "vocab_size_unrounded": estimate_vocabulary(nonvocab_active(config), self.tokens, config.hidden_size),
            "vocab_size_approach_1": vocabulary_by_flops(6 * counts["active"] * self.tokens, config.hidden_size),
            "vocab_size_approach_2": vocabulary_by_parameters(nonvocab_active(config), config.hidden_size),
            "vocab_size_approach_3": vocabulary_by_loss(nonvocab_active(config), self.tokens, config.hidden_size),
            "granularity": 2 * config.hidden_size / config.moe_intermediate_size,
            "routed_experts": config.n_routed_experts,
            "experts_per_token": config.num_experts_per_tok,
            "shared_experts": config.n_shared_experts,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "expert_width": config.moe_intermediate_size,
            "attention_heads": config.num_attention_heads,
            "gpus": self.cluster.gpus,
            "days": self.days,
            "tflops_per_gpu": layout.flops_per_s / 1e12,
            "pipeline_parallel": layout.pipeline,
            "expert_parallel": layout.expert,
            "context_parallel": layout.context,
            "tensor_parallel": 1,
            "data_parallel": layout.replicas,
            "batch_tokens": layout.batch_tokens,
            **layout.costs,
            "stages": self.stages(),
            "ladder": [{"setting": name, "tflops_per_gpu": flops / 1e12} for name, flops in self.ladder],
            "derivation": self.derivation(),
        }

    def json(self) -> str:
        return json.dumps(self.figures(), indent=2)

    def stages(self) -> list[dict]:
        reported = sum(stage[1] for stage in STAGES)
        return [
            {
                "stage": name,
                "tokens": self.tokens * share / reported,
                "sequence_lengths": list(sequences),
                # A GPU keeps as many tokens of a micro-batch as at 4,096.
                "context_parallel": [self.layout.context * length // 4096 for length in sequences],
                "learning_rate": phase,
            }
            for name, share, sequences, phase in STAGES
        ]

    def derivation(self) -> list[str]:
        config, counts, nonvocab = self.config, count_parameters(self.config), nonvocab_active(self.config)
        trained, hidden = self.tokens * self.flops_per_token, config.hidden_size
        return [
            f"compute: {self.flops:.4g} FLOPs of GPU time x {EFFECTIVE_TIME} effective training time [Llama 3, 2407.21783] = "
            f"{trained:.4g} model FLOPs; 6 x active x tokens, which counts the embedding but neither attention nor MTP, would "
            f"say {6 * counts['active'] * self.tokens:.4g}",
            f"FLOPs a token: {self.flops_per_token:.4g}, forward and backward, causal attention at each stage's lengths, one "
            "MTP layer [modeling_axk1.count_flops]",
            self._why_tokens(trained / self.flops_per_token / counts["total"]),
            f"experts: {config.n_routed_experts}, top {EXPERTS_PER_TOKEN} + {SHARED_EXPERTS} shared, the multiple of "
            f"{EXPERT_STEP} nearest to the {published_sparsity():.1f} total/active of {len(LARGE)} published fine-grained "
            f"MoEs (here {counts['total'] / counts['active']:.1f}); Tian et al. [2507.17702] find sparser always better, and "
            "their coefficients were not to be had",
            self._why_granularity(trained),
            f"shape: {config.num_hidden_layers} layers of {hidden}, width/depth {hidden / config.num_hidden_layers:.0f}: the "
            f"width whose depth at {published_aspect():.0f} (published MoEs with MLA) costs nearest to the budget, then the "
            "depth that spends it",
            f"parameters: {counts['total']:,} total, {counts['active']:,} active [modeling_axk1.count_parameters]",
            "vocabulary [Tao et al., 2407.13623]: approach 1 (dense models of all the compute) "
            f"{vocabulary_by_flops(6 * counts['active'] * self.tokens, hidden):,.0f}, approach 2 (by the "
            f"{scaled(nonvocab, COUNTS)} active parameters outside the vocabulary) "
            f"{vocabulary_by_parameters(nonvocab, hidden):,.0f}, approach 3 (by least loss at these tokens) "
            f"{vocabulary_by_loss(nonvocab, self.tokens, hidden):,.0f}; used: the geometric mean of 2, which ignores the tokens, "
            f"and 3, which was fitted on models up to 3 B = {estimate_vocabulary(nonvocab, self.tokens, hidden):,.0f}",
            "vocabulary, rounded for tensor cores: down to m x 2^k with m in 4..7, so that up to 2^(k - 7) shards stay multiples "
            f"of 128 = {config.vocab_size:,}",
            *self.layout.derivation,
        ]

    def _why_tokens(self, per_total: float) -> str:
        field = [model.tokens / model.total_parameters for model in LARGE]
        usual = geometric_mean(field)
        return (
            f"tokens: model FLOPs / FLOPs a token = {self.tokens:.4g}, {per_total:.1f} a total parameter for the "
            f"{self.tokens_per_parameter:g} asked for (default: Chinchilla's 20 [2203.15556], found on dense models; that it "
            f"holds for an MoE's total parameters is assumed). Published MoEs took {min(field):.0f} to {max(field):.0f}, "
            f"geometric mean {usual:.0f}: that would plan {math.sqrt(per_total / usual):.2f} x these parameters"
        )

    def _why_granularity(self, model_flops: float) -> str:
        config, found = self.config, [model.granularity for model in PUBLISHED]
        total = affordable_parameters(model_flops, self.tokens_per_parameter)
        chosen = 2 * config.hidden_size // config.moe_intermediate_size
        low, high = BEST_GRANULARITY
        return (
            f"granularity: 2 x {config.hidden_size} / {config.moe_intermediate_size} = {chosen}, in whole numbers the "
            f"{published_granularity(total):.2f} of {len(PUBLISHED)} published MoEs (from {min(found):.1f} to {max(found):.1f}, "
            f"finer with their size) at the {scaled(total, COUNTS)} parameters that 6 x active x tokens of this compute buys. "
            f"Tian et al.'s law is best at {low} to {high} whatever the compute [2507.17702]; the field stays coarser, for "
            f"stability under imperfect balance: at equal active width G = {low} or {high} would visit "
            f"{EXPERTS_PER_TOKEN * low / chosen:.1f} or {EXPERTS_PER_TOKEN * high / chosen:.1f} routed experts a token, not "
            f"{EXPERTS_PER_TOKEN}, dispatch as many more copies, and wait for the fullest of as many more experts. What that "
            "costs no formula of the papers says"
        )

    def misses(self) -> list[tuple[str, float, float]]:
        """(figure, planned, reported by A.X K1), of the report's own budget only: empty at any other."""
        if abs(self.flops / REPORTED["flops"] - 1) > 0.01:
            return []
        figures = self.figures()
        rows = [(name, figures[name], value) for name, value in REPORTED.items() if name != "flops"]
        # 9.26T is the sum of its stages; its abstract rounds.
        rows += [("tokens, by its abstract", figures["tokens"], 10e12)]
        rows += [("vocabulary, approach 2", figures["vocab_size_approach_2"], 132_500)]
        # The report raises 132.5K by about a quarter for its 10T tokens.
        rows += [("vocabulary, with the tokens, unrounded", figures["vocab_size_unrounded"], 1.25 * 132_500)]
        if self.cluster.gpu.name == "h200":
            rows += [
                (f"TFLOP/s, {name}", flops / 1e12, value) for (name, flops), value in zip(self.ladder, REPORTED_LADDER)
            ]
        return rows


def plan_flops(
    flops: float, *, gpus: int = 1024, gpu: str = "h200", tokens_per_parameter: float = TOKENS_PER_PARAMETER
) -> Plan:
    """The plan of `flops` of GPU time on `gpus` GPUs. ValueError for a budget, GPU or cluster that cannot be planned."""
    if not (flops > 0 and math.isfinite(flops)):
        raise ValueError(f"flops={flops:g} is no compute budget; give a positive number, such as 2.548e24.")
    if not (tokens_per_parameter > 0 and math.isfinite(tokens_per_parameter)):
        raise ValueError(f"tokens_per_parameter={tokens_per_parameter:g} is not positive; Chinchilla's is 20.")
    cluster = Cluster(find_gpu(gpu), gpus)
    config = choose_shape(EFFECTIVE_TIME * flops, tokens_per_parameter)
    per_token = mean_flops_per_token(config)
    tokens = EFFECTIVE_TIME * flops / per_token
    model_flops = flops_per_token(config, 4096)
    layout = choose_layout(config, cluster, tokens, model_flops)
    ladder = throughput_ladder(config, cluster, tokens, model_flops)
    return Plan(flops, config, tokens, per_token, tokens_per_parameter, cluster, layout, ladder)


def plan_days(gpus: int, days: float, *, tflops: float | None = None, gpu: str = "h200", **options) -> Plan:
    """The plan of `gpus` GPUs for `days`, at `tflops` sustained a GPU, or at what the layout's own model expects.

    The expectation depends on the model that is planned, so both are found by bisection; as layouts come in steps they may
    never meet: the plan whose `days` came nearest is returned.
    """
    if not (days > 0 and math.isfinite(days)):
        raise ValueError(f"days={days:g} is no duration; give a positive number of days.")
    kind, seconds = find_gpu(gpu), Cluster(find_gpu(gpu), gpus).gpus * days * 86400
    if tflops is not None:
        if not 0 < tflops <= kind.fp8_flops / 1e12:
            raise ValueError(
                f"tflops={tflops:g} is outside 0 to a {gpu}'s peak, {kind.fp8_flops / 1e12:g}; give one inside."
            )
        return plan_flops(seconds * tflops * 1e12, gpus=gpus, gpu=gpu, **options)
    low, high, plans = 0.1 * kind.bf16_flops, 0.5 * kind.bf16_flops, []
    for _ in range(8):
        rate = math.sqrt(low * high)
        plans.append(plan_flops(seconds * rate, gpus=gpus, gpu=gpu, **options))
        low, high = (rate, high) if plans[-1].layout.flops_per_s > rate else (low, rate)
    return min(plans, key=lambda plan: abs(math.log(plan.days / days)))


def plan_budget(
    flops: float | None, days: float | None, gpus: int, gpu: str, tflops: float | None, tokens_per_parameter: float
) -> Plan:
    """The plan of `flops`, or of `gpus` GPUs for `days`. ValueError unless it is exactly one of the two."""
    if (flops is None) == (days is None):
        given = "both" if days is not None else "neither"
        raise ValueError(f"a budget is --flops or --days but {given} was given; give one of them.")
    options = {"gpus": gpus, "gpu": gpu, "tokens_per_parameter": tokens_per_parameter}
    if days is not None:
        return plan_days(days=days, tflops=tflops, **options)
    if tflops is not None:
        raise ValueError(f"tflops={tflops:g} turns days into FLOPs, which --flops gives already; drop one of them.")
    return plan_flops(flops, **options)


def text_of_plan(plan: Plan) -> str:
    """Results, stages, throughput, derivations and, at the report's budget, how far each figure misses."""
    figures, config = plan.figures(), plan.config
    rows = [
        (
            "model",
            f"{scaled(figures['total_parameters'], COUNTS)} parameters, {scaled(figures['active_parameters'], COUNTS)} active",
        ),
        ("tokens", scaled(plan.tokens, COUNTS)),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("shape", f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads"),
        (
            "experts",
            f"{config.n_routed_experts} of {config.moe_intermediate_size}, top {config.num_experts_per_tok} + 1 shared",
        ),
        ("granularity", f"{figures['granularity']:g}"),
        ("cluster", f"{plan.cluster.gpus} x {plan.cluster.gpu.name} for {scaled(86400 * plan.days, TIMES)}"),
        (
            "layout",
            f"PP {plan.layout.pipeline}, EP {plan.layout.expert}, CP {plan.layout.context}, TP 1, DP {plan.layout.replicas}",
        ),
        (
            "memory",
            f"{in_units(figures['memory_bytes_per_gpu'])} of {plan.cluster.gpu.memory_bytes / 1e9:.0f} GB a GPU",
        ),
        ("throughput", f"{figures['tflops_per_gpu']:.1f} TFLOP/s a GPU"),
    ]
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += ["", f"{'stage':<20}{'tokens':>10}  {'sequence':<24}{'context parallel':<18}learning rate"]
    for stage in figures["stages"]:
        lengths, ranks = (" -> ".join(map(str, stage[key])) for key in ("sequence_lengths", "context_parallel"))
        lines += [
            f"{stage['stage']:<20}{scaled(stage['tokens'], COUNTS):>10}  {lengths:<24}{ranks:<18}{stage['learning_rate']}"
        ]
    lines += ["", "TFLOP/s a GPU, by the same model:"] if plan.ladder else []
    lines += [f"  {name:<40}{rate / 1e12:>8.2f}" for name, rate in plan.ladder]
    lines += ["", "Where each figure comes from:", *(f"- {reason}" for reason in figures["derivation"])]
    if plan.misses():
        lines += ["", f"{'beside the A.X K1 report':<52}{'planned':>14}{'reported':>14}{'miss':>9}"]
        lines += [
            f"  {name:<50}{ours:>14.5g}{theirs:>14.5g}{ours / theirs - 1:>+9.1%}"
            for name, ours, theirs in plan.misses()
        ]
        lines += [
            "Choices that the sources leave open were made with these figures in sight: consistency, not prediction."
        ]
    return "\n".join(lines)
