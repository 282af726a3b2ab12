"""Small A.X K1 models to compare: random configurations, and ours beside stock transformers' with the same weights."""

import random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def adapt(model, config: LoraConfig) -> PeftModel:
    """Under an adapter that changes its output, the same one however the experts are stored."""
    tuned = get_peft_model(model, config)
    randomise(tuned, 5)
    return tuned.eval()


def randomise(tuned: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(tuned.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(std=0.08, generator=generator)


def random_config(seed: int, **overrides) -> AxK1Config:
    """A small configuration, all sizes different where they may be; even seeds are grouped, every third has YaRN."""
    rng = random.Random(seed)
    groups = 1 if seed % 2 else rng.choice([2, 3, 4])
    experts = groups * rng.choice([2, 3, 4]) if groups > 1 else rng.choice([3, 5, 8])
    top_groups = rng.randint(1, groups)
    layers = rng.randint(2, 3)
    rope = {"rope_type": "default", "rope_theta": rng.choice([100.0, 10000.0])}
    if seed % 3 == 0:
        rope = YARN | {"mscale": 1.0, "mscale_all_dim": rng.choice([0.0, 1.0])}
    fields = {
        "vocab_size": 67,
        "hidden_size": rng.choice([40, 48, 56]),
        "intermediate_size": rng.choice([44, 60]),
        "moe_intermediate_size": rng.choice([20, 28]),
        "num_hidden_layers": layers,
        "num_attention_heads": (heads := rng.choice([1, 2, 3])),
        "num_key_value_heads": heads,
        "n_shared_experts": rng.choice([1, 2]),
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(4, experts // groups * top_groups)),
        "n_group": groups,
        "topk_group": top_groups,
        "kv_lora_rank": rng.choice([12, 24, 36]),
        "q_lora_rank": rng.choice([14, 22]),
        "qk_nope_head_dim": rng.choice([10, 18]),
        "qk_rope_head_dim": rng.choice([4, 8]),
        "v_head_dim": rng.choice([6, 16]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "norm_topk_prob": rng.random() < 0.8,
        "rope_interleave": rng.random() < 0.8,
        "attention_bias": rng.random() < 0.3,
        "tie_word_embeddings": rng.random() < 0.2,
        "rope_parameters": rope,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AxK1Config(**fields | overrides)


def shake(model: torch.nn.Module) -> None:
    """Give norms and router biases values that a wrong use of them would show."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("norm.weight"):
            tensor.data += 0.2 * torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)


def ours(config: AxK1Config) -> AxK1ForCausalLM:
    torch.manual_seed(0)
    model = AxK1ForCausalLM(config).eval()
    shake(model)
    return model


def stock_twin(model: AxK1ForCausalLM) -> AXK1ForCausalLM:
    """Stock transformers' model with the same configuration and weights (in memory the two have the same names)."""
    fields = model.config.to_dict()
    fields.pop("architectures", None)
    twin = AXK1ForCausalLM._from_config(
        AXK1Config(**fields), attn_implementation=model.config._attn_implementation, experts_implementation="eager"
    )
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all("layers.0.mlp.post_mlp_layernorm" in name for name in unexpected), (missing, unexpected)
    return twin.eval()


def padded_ids(config: AxK1Config, rows: int = 2, tokens: int = 13, side: str = "left") -> tuple[Tensor, Tensor]:
    """Random token ids [rows, tokens] and an attention mask: row i has 3 * i padding tokens on `side`."""
    input_ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(input_ids)
    for row in range(rows):
        hidden = slice(0, 3 * row) if side == "left" else slice(tokens - 3 * row, tokens)
        mask[row, hidden] = 0
    return input_ids, mask


def tiny_chat_config(vocab_size: int) -> AxK1Config:
    """The smallest model that a chat tokenizer can drive."""
    return AxK1Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
