"""What is an A.X K1, in numbers: every field with its source, three presets, validation, exact parameter and FLOP counts."""

import copy
import math
from numbers import Integral
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "n_shared_experts n_routed_experts topk_group kv_lora_rank q_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim max_position_embeddings"
).split()
# No model has more, and lists are made of as many: a config from outside must not ask for a thousand million.
MAX_LAYERS = 4096
# Of layers: 0 or more.
COUNTS = ("first_k_dense_replace", "num_nextn_predict_layers")
# The smallest and the largest value.
RANGES = {
    "rms_norm_eps": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "routed_scaling_factor": (0.0, math.inf),
    "router_aux_loss_coef": (0.0, math.inf),
    "mtp_loss_weight": (0.0, math.inf),
    "initializer_range": (0.0, math.inf),
}

# Yes or no; None is no.
FLAGS = "norm_topk_prob post_mlp_norm rope_interleave attention_bias tie_word_embeddings".split()
# Of `rope_parameters`, where they are there: above 0, and 0 or more. The first is never None, the second where it is read.
ROPE_ANCHORS = ("rope_theta", "original_max_position_embeddings")
ROPE_POSITIVE = (*ROPE_ANCHORS, "factor", "beta_fast", "beta_slow", "attention_factor")
ROPE_NUMBERS = (*ROPE_POSITIVE, "mscale", "mscale_all_dim")

# YaRN of the released 131,072-token context: factor 4 over 32,768.  [released config]
K1_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}

# light: the paper gives only "20B-A3B". Derived from K1 at 3/8 of its width: hidden 2688 = 7 * 384, so the granularity
# stays 7 (expert width 768 = 2 * 2688 / 7) and the dense FFN, heads and query latent shrink by the same 3/8. Head sizes, the
# 512-wide latent, 8 groups, top-8 + 1 shared and the vocabulary stay K1's. 96 experts and 32 layers then give 20.1 B / 3.2 B;
# K1's own 192 experts would reach 20 B at half that depth with only 2 B active.
# nano: about 0.9 M parameters. Equal query/key and value head sizes let the CPU's flash kernel run.
PRESETS: dict[str, dict[str, Any]] = {
    "k1": {"max_position_embeddings": 131072, "rope_parameters": K1_ROPE},
    "light": {
        "hidden_size": 2688,
        "intermediate_size": 6912,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "q_lora_rank": 576,
        "n_routed_experts": 96,
        "max_position_embeddings": 131072,
        "rope_parameters": K1_ROPE,
    },
    "nano": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


class AxK1Config(PreTrainedConfig):
    """Configuration of an A.X K1 model; the defaults are the released 519B-A33B one, short of its YaRN (see `preset`).

    Sources: "count" = the field is fixed by the released checkpoint's exact 518,983,059,456 parameters; "paper" = arXiv
    2601.09200; "upstream" = transformers' own `axk1`.

    topk_method: "noaux_tc" (grouped choice by the sum of a group's two best biased scores; has the correction bias),
        "group_limited_greedy" (grouped choice by a group's best score; no bias) or "greedy" (ungrouped, no bias).
        None means noaux_tc, which is what transformers runs whatever the file says.
    n_group, topk_group: None and 1 both mean ungrouped; written as 1, since stock transformers cannot read null.
    mlp_layer_types: "dense" or "sparse" a layer; derived from `first_k_dense_replace` and `moe_layer_freq` where absent.
    post_mlp_norm: RMSNorm on the MoE output, the second half of "dual normalization" [paper]; False is for experiments,
        neither stock transformers nor vLLM can run it.
    router_aux_loss_coef: weight of the sequence-wise balance loss [DeepSeek-V3, eq. 17-20]; 0.0 switches it off.
    num_nextn_predict_layers: multi-token-prediction layers in the checkpoint; the release ships none. Where the file asks for
        them and holds no weight of theirs, `from_pretrained` warns and sets 0: they are never left random.
    mtp_loss_weight: of the mean over those layers of their loss [DeepSeek-V3, 4.2: 0.3, later 0.1; see mtp_weight].
    fused_linear_loss: take the loss in chunks of tokens and give no logits while training (`skip_logits=False` asks for
        them). Off by default, because TRL's trainers read the logits of a training step; for pre-training switch it on.

    Raises ValueError, one sentence, for values that no checkpoint can have.
    """

    model_type = "axk1"
    # Trainer takes everything else for predictions; a balance loss asks for router logits by itself.
    keys_to_ignore_at_inference = ["past_key_values", "mtp_loss", "aux_loss", "router_logits"]
    attribute_map = {"num_local_experts": "n_routed_experts"}
    # Heads over ranks, which stock's plan for axk1 leaves whole: the two up-projections by rows, the output by columns. The
    # down-projections to the latents are small and stay on every rank; "mla_kv_a_proj" adds up the shared key's gradient.
    base_model_tp_plan = {
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 163840  # paper
    hidden_size: int = 7168  # paper, count
    intermediate_size: int = 18432  # dense FFN of the first layer; count (the card's 7168 is the hidden size)
    moe_intermediate_size: int = 2048  # count
    num_hidden_layers: int = 61  # paper
    num_attention_heads: int = 64  # upstream, count
    num_key_value_heads: int | None = 64  # MLA has no key/value groups; kept for libraries that ask
    n_shared_experts: int = 1  # count ("8 shared" in summaries would give 537 B)
    n_routed_experts: int = 192  # paper
    num_experts_per_tok: int = 8  # paper
    n_group: int | None = 8  # upstream, not verified for the release
    topk_group: int | None = 4  # upstream, not verified for the release
    topk_method: str | None = None
    scoring_func: str = "sigmoid"  # paper
    norm_topk_prob: bool | None = True  # upstream
    routed_scaling_factor: float = 2.5  # upstream
    kv_lora_rank: int = 512  # count
    q_lora_rank: int = 1536  # count
    qk_nope_head_dim: int = 128  # count
    qk_rope_head_dim: int = 64  # count
    v_head_dim: int = 128  # count
    first_k_dense_replace: int | None = None
    moe_layer_freq: int | list[int] | None = None
    mlp_layer_types: list[str] | None = None
    post_mlp_norm: bool = True  # paper, "dual normalization"
    num_nextn_predict_layers: int | None = 0
    mtp_loss_weight: float = 0.3  # DeepSeek-V3, section 4.2; the paper gives none
    fused_linear_loss: bool = False
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_parameters: RopeParameters | dict | None = None
    rope_interleave: bool | None = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pretraining_tp: int | None = 1
    pad_token_id: int | None = None
    bos_token_id: int | None = 163691
    eos_token_id: int | list[int] | None = 163691

    @classmethod
    def preset(cls, name: str, **overrides) -> "AxK1Config":
        """The named size ("k1" 519B-A33B, "light" 20B-A3B, "nano" for a laptop CPU), with any field overridden."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} does not exist; use one of {', '.join(PRESETS)}.")
        return cls(**{**copy.deepcopy(PRESETS[name]), **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Copies of the release on the Hub say "AXK1".
        if config_dict.get("model_type") == "AXK1":
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        # Derived below; a stale value from a file would bend the RoPE.
        kwargs.pop("head_dim", None)
        kwargs.pop("qk_head_dim", None)
        self.topk_method = "noaux_tc" if self.topk_method is None else self.topk_method
        if self.topk_method == "greedy":
            # Ungrouped by definition; written 1/1 so that libraries which always group agree.
            self.n_group = self.topk_group = 1
        absent = {"n_group": 1, "topk_group": 1, "num_key_value_heads": self.num_attention_heads}
        for field, value in {**absent, "num_nextn_predict_layers": 0, "attention_dropout": 0.0}.items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        check_fields(self, kwargs.get("rope_scaling"))
        for field in RANGES:
            # Written with its point: transformers' own config refuses a file that says 1.
            setattr(self, field, float(getattr(self, field)))
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim  # what transformers' RoPE functions read
        if self.mlp_layer_types is None:
            self.mlp_layer_types = layer_types_of(
                self.num_hidden_layers, self.first_k_dense_replace, self.moe_layer_freq
            )
        check(self)
        self.first_k_dense_replace, self.moe_layer_freq = dense_rule_of(self.mlp_layer_types)
        super().__post_init__(**kwargs)
        check_rope(self.rope_parameters)

    @property
    def has_router_bias(self) -> bool:
        """Whether routers hold `e_score_correction_bias`: vLLM creates it if and only if the method is noaux_tc."""
        return self.topk_method == "noaux_tc"

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if output.get("architectures"):
            # The name under which transformers and vLLM look the classes up.
            output["architectures"] = [name.replace("AxK1", "AXK1", 1) for name in output["architectures"]]
        if self._auto_class is None:
            # Leftover of a repository with remote code: a reload with trust_remote_code would look for its files here.
            output.pop("auto_map", None)
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        for warning in compatibility_warnings(self):
            logger.warning(warning)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class HubAxK1Config(AxK1Config):
    """Reads `model_type: "AXK1"`, as copies of the release say it, and gives an `AxK1Config`: files are written as axk1."""

    model_type = "AXK1"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return AxK1Config.from_dict({**config_dict, "model_type": AxK1Config.model_type}, **kwargs)


def check_fields(config: AxK1Config, rope_scaling: Any) -> None:
    """Raise ValueError for a field that is wrong by itself: fact, value, remedy. `rope_scaling` is an older name of one."""
    for field in SIZES:
        value = getattr(config, field)
        if type(value) is not int or value < 1:
            raise ValueError(f"{field}={value!r} is not a positive whole number; give one.")
    for field in COUNTS:
        value = getattr(config, field)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{field}={value!r} counts layers; use 0 or more.")
    for field in ("num_hidden_layers", "num_nextn_predict_layers"):
        # Not the value itself: it may have any number of digits.
        if getattr(config, field) > MAX_LAYERS:
            raise ValueError(f"{field} is above {MAX_LAYERS:,}, more layers than any model has; correct the config.")
    for name in ("mlp_layer_types", "moe_layer_freq"):
        if isinstance(getattr(config, name), list) and len(getattr(config, name)) > MAX_LAYERS:
            raise ValueError(f"{name} names more than {MAX_LAYERS:,} layers, more than any model has; correct the config.")
    for field, (low, high) in RANGES.items():
        value = getattr(config, field)
        if not (_is_finite(value) and low <= value <= high):
            raise ValueError(f"{field}={value!r} is outside {low:g} to {high:g}; choose a number inside.")
    for field in FLAGS:
        value = getattr(config, field)
        if value is not None and type(value) is not bool:
            raise ValueError(f"{field}={value!r} is neither true nor false; use one of them.")
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, field)
        each = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(number, Integral) and type(number) is not bool for number in each):
            raise ValueError(f"{field}={value!r} is no token's number; give one, or null.")
    for name, rope in {"rope_parameters": config.rope_parameters, "rope_scaling": rope_scaling}.items():
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"{name}={rope!r} has no fields; give those of a RoPE, or null.")
    if type(config.hidden_act) is not str or config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is no activation of transformers; the release has 'silu'.")
    freq = config.moe_layer_freq
    if not (freq is None or type(freq) is int and freq > 0 or type(freq) is list and all(flag in (0, 1) for flag in freq)):
        raise ValueError(f"moe_layer_freq={freq!r} is no rule; use a number or a list of 0 and 1, 1 for all layers.")


def _is_finite(value: Any) -> bool:
    """A number, and none of JSON's NaN and Infinity. A comparison, unlike isfinite, takes an integer of any size."""
    return type(value) in (int, float) and -math.inf < value < math.inf


def check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError for a value of RoPE's that is none: transformers would warn, or not even that."""
    kind, truncate = rope["rope_type"], rope.get("truncate", True)
    if type(kind) is not str or kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"rope_type={kind!r} is none of transformers'; use 'default', or 'yarn' as the release.")
    if truncate is not None and type(truncate) is not bool:
        raise ValueError(f"rope_parameters has truncate={truncate!r}, neither true nor false; use one of them.")
    needed = ROPE_ANCHORS if kind in ("yarn", "longrope", "llama3") else ROPE_ANCHORS[:1]
    for name in ROPE_NUMBERS:
        value, positive = rope.get(name), name in ROPE_POSITIVE
        if name not in rope or (value is None and name not in needed):
            continue
        if not (_is_finite(value) and (0 < value if positive else 0 <= value)):
            kind = "a number above 0" if positive else "a number of 0 or more"
            raise ValueError(f"rope_parameters has {name}={value!r}, not {kind}; give the one that was trained with.")


def layer_types_of(layers: int, first_dense: int | None, freq: int | list[int] | None) -> list[str]:
    """Layer i is sparse from `first_dense` (default 1) on if i % freq == 0, or where the list `freq` holds a 1."""
    if isinstance(freq, list):
        return ["sparse" if flag else "dense" for flag in freq]
    first_dense, freq = 1 if first_dense is None else first_dense, 1 if freq is None else freq
    return ["sparse" if i >= first_dense and i % freq == 0 else "dense" for i in range(layers)]


def dense_rule_of(types: list[str]) -> tuple[int, int | list[int]]:
    """The (`first_k_dense_replace`, `moe_layer_freq`) that gives `types`; the frequency is a 0/1 list if no number does."""
    first = next((i for i, kind in enumerate(types) if kind == "sparse"), len(types))
    for freq in range(1, len(types) + 1):
        if layer_types_of(len(types), first, freq) == types:
            return first, freq
    return first, [int(kind == "sparse") for kind in types]


def check(config: AxK1Config) -> None:
    """Raise ValueError for values that no model can have: fact, value, remedy."""
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    groups, top_groups = config.n_group, config.topk_group
    if config.topk_method not in TOPK_METHODS:
        raise ValueError(f"topk_method={config.topk_method!r} is unknown; use one of {', '.join(TOPK_METHODS)}.")
    if config.scoring_func != "sigmoid":
        raise ValueError(f"scoring_func={config.scoring_func!r} is not A.X K1's router; use 'sigmoid'.")
    if type(groups) is not int or groups < 1:
        raise ValueError(f"n_group={groups!r} is not a number of groups; use 1 for ungrouped.")
    if experts % groups:
        raise ValueError(
            f"n_routed_experts={experts} does not split into n_group={groups}; use a divisor of {experts}."
        )
    if not 1 <= top_groups <= groups:
        raise ValueError(f"topk_group={top_groups} is outside 1..n_group={groups}; choose one inside.")
    if groups > 1 and config.topk_method == "noaux_tc" and experts // groups < 2:
        raise ValueError(
            f"noaux_tc scores a group by its two best experts but n_routed_experts={experts} in n_group={groups} groups "
            "leaves one a group; use fewer groups."
        )
    allowed = experts // groups * top_groups
    if type(top_k) is not int or not 1 <= top_k <= allowed:
        raise ValueError(
            f"num_experts_per_tok={top_k!r} is outside 1..{allowed}, the experts in topk_group={top_groups} of "
            f"n_group={groups} groups; lower it or allow more groups."
        )
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim={config.qk_rope_head_dim} is odd but RoPE rotates pairs; use an even size.")
    if not isinstance(config.mlp_layer_types, list | tuple):
        raise ValueError(f"mlp_layer_types={config.mlp_layer_types!r} is no list; name each layer 'dense' or 'sparse'.")
    if len(config.mlp_layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"mlp_layer_types (or the list moe_layer_freq) names {len(config.mlp_layer_types)} layers but "
            f"num_hidden_layers={config.num_hidden_layers}; make them equal."
        )
    unknown = sorted({str(kind) for kind in config.mlp_layer_types} - {"dense", "sparse"})
    if unknown:
        raise ValueError(f"mlp_layer_types holds {unknown}; use 'dense' and 'sparse' only.")


def compatibility_warnings(config: AxK1Config) -> list[str]:
    """What stock transformers or vLLM would run differently from us, one sentence each."""
    warnings = []
    if not config.post_mlp_norm:
        warnings.append("post_mlp_norm=False: stock transformers and vLLM cannot run this model, they need the norm.")
    if config.topk_method == "group_limited_greedy" and config.n_group > 1:
        warnings.append(
            f"topk_method='group_limited_greedy' with n_group={config.n_group}: stock transformers scores a group by the "
            "sum of its two best experts, we and vLLM by the best one, so stock routes differently; use 'noaux_tc' if it matters."
        )
    if config.num_key_value_heads != config.num_attention_heads:
        warnings.append(
            f"num_key_value_heads={config.num_key_value_heads}: stock transformers repeats heads by it and cannot run this "
            f"model, whose latents serve all {config.num_attention_heads} heads; write {config.num_attention_heads}."
        )
    if isinstance(config.moe_layer_freq, list):
        warnings.append(
            f"mlp_layer_types={config.mlp_layer_types} follows no first_k_dense_replace/moe_layer_freq rule: vLLM cannot run it."
        )
    return warnings


def count_parameters(config: AxK1Config) -> dict[str, int]:
    """Exact parameter counts by part, with `total` and `active`; router biases are buffers and not counted.

    Multi-token-prediction layers are the part `mtp`, where the configuration has any.

    `active` is `total` minus the routed experts that a token does not visit (embedding and head counted whole).
    """
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    sparse = config.mlp_layer_types.count("sparse")
    latent_rope = config.kv_lora_rank + config.qk_rope_head_dim
    attention = (
        hidden * config.q_lora_rank
        + config.q_lora_rank * heads * config.qk_head_dim
        + hidden * latent_rope
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    if config.attention_bias:
        attention += config.q_lora_rank + latent_rope + hidden
    layer_norms = (2 + config.post_mlp_norm) * hidden + config.q_lora_rank + config.kv_lora_rank
    expert = 3 * hidden * config.moe_intermediate_size
    parts = {
        "embedding": config.vocab_size * hidden,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
        "attention": layers * attention,
        "norms": layers * layer_norms + hidden,
        "dense_mlp": (layers - sparse) * 3 * hidden * config.intermediate_size,
        "router": sparse * config.n_routed_experts * hidden,
        "shared_experts": sparse * config.n_shared_experts * expert,
        "routed_experts": sparse * config.n_routed_experts * expert,
    }
    predicting, sparse_predicting = config.num_nextn_predict_layers, 0
    if predicting:
        sparse_predicting = predicting * (config.mlp_layer_types[-1] == "sparse")
        mlp = 3 * hidden * config.intermediate_size
        if sparse_predicting:
            mlp = config.n_routed_experts * (hidden + expert) + config.n_shared_experts * expert
        parts["mtp"] = predicting * (attention + layer_norms + mlp + 2 * hidden * hidden + 3 * hidden)
    total = sum(parts.values())
    unvisited = (sparse + sparse_predicting) * (config.n_routed_experts - config.num_experts_per_tok) * expert
    return {**parts, "total": total, "active": total - unvisited}


def count_flops(
    config: AxK1Config,
    *,
    batch: int = 1,
    queries: int,
    keys: int | None = None,
    absorbed: bool = False,
    logits: int | None = None,
    backward: bool = False,
    mtp: bool = False,
) -> dict[str, int]:
    """Exact matmul FLOPs (2 a multiply-add) of one forward pass by part, with `total`; backward doubles on top.

    queries: new tokens a row; keys: tokens attended a row, cached ones included (default: queries). The attention core is
    counted whole, masked half included, as it is computed without a causal kernel. absorbed: the decode form of MLA.
    logits: positions a row that reach the head (default: all). mtp: count the multi-token-prediction layers and their logits too.
    """
    keys = queries if keys is None else keys
    logits = queries if logits is None else logits
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    nope, rope, value, latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    tokens, pairs = batch * queries, batch * queries * keys
    sparse = config.mlp_layer_types.count("sparse")
    projections = hidden * (config.q_lora_rank + latent + rope)
    projections += config.q_lora_rank * heads * config.qk_head_dim + heads * value * hidden
    # Absorbed, kv_b_proj meets the queries and the outputs; expanded, every cached latent.
    expansion = (tokens if absorbed else batch * keys) * latent * heads * (nope + value)
    core = pairs * heads * ((2 * latent + rope) if absorbed else (nope + rope + value))
    expert = 3 * hidden * config.moe_intermediate_size
    parts = {
        "attention_projections": 2 * layers * tokens * projections,
        "latent_expansion": 2 * layers * expansion,
        "attention_core": 2 * layers * core,
        "dense_mlp": 2 * (layers - sparse) * tokens * 3 * hidden * config.intermediate_size,
        "router": 2 * sparse * tokens * hidden * config.n_routed_experts,
        "shared_experts": 2 * sparse * tokens * config.n_shared_experts * expert,
        "routed_experts": 2 * sparse * tokens * config.num_experts_per_tok * expert,
        "lm_head": 2 * batch * logits * hidden * config.vocab_size,
    }
    if mtp and config.num_nextn_predict_layers:
        # A layer of the last one's kind, the joining projection, the head once more.
        kind = (
            ("shared_experts", "routed_experts", "router") if config.mlp_layer_types[-1] == "sparse" else ("dense_mlp",)
        )
        block = sum(parts[name] // layers for name in ("attention_projections", "latent_expansion", "attention_core"))
        block += sum(parts[name] // config.mlp_layer_types.count(config.mlp_layer_types[-1]) for name in kind)
        join = 2 * tokens * 2 * hidden * hidden
        parts["mtp"] = config.num_nextn_predict_layers * (block + join + parts["lm_head"])
    if backward:
        parts = {name: 3 * flops for name, flops in parts.items()}
    return {**parts, "total": sum(parts.values())}


def in_units(size: float) -> str:
    """Bytes for people, down to kilobytes: a model on a laptop has megabytes."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if size >= each[0]), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"
