"""How fast is one decoding step on CPU beside stock transformers, at growing context, and how far from the floor?

Batch 1, fp32, 2 layers of hidden 2048 and 16 heads with K1's head sizes. The MLPs are small, since it is the attention that is
compared: its projections are five sixths of the weights that a step reads. Both models hold the same weights and cached
latents; their logits are compared before anything is timed. The floor, measured in the same run: our step at 16 cached tokens
(weights and operators) plus the bare matmuls of the absorbed attention core at the full context. Memory: what a step adds
to the resident set at its peak.
"""

from collections.abc import Callable

import torch
from timing import forget_peak, interleaved_medians_ms, memory_bytes, options_parser, record, show
from transformers import DynamicCache
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM

HEADS, LATENT, ROPE = 16, 512, 64


def models() -> tuple[AxK1ForCausalLM, AXK1ForCausalLM]:
    config = AxK1Config(
        vocab_size=512, hidden_size=2048, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, n_routed_experts=16, num_experts_per_tok=2, n_group=1,
        topk_group=1, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = AxK1ForCausalLM(config).eval()
    stock = AXK1ForCausalLM(AXK1Config(**config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours, stock


def filled_cache(model: torch.nn.Module, tokens: int) -> DynamicCache:
    """Random latents of plausible size, the same for every model, fed through a forward pass's own cache layers."""
    generator = torch.Generator().manual_seed(tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    for layer in range(2):
        latents = torch.randn(1, 1, tokens - 1, LATENT, generator=generator)
        cache.update(latents, torch.randn(1, 1, tokens - 1, ROPE, generator=generator), layer)
    return cache


def step(model: torch.nn.Module, cache: DynamicCache) -> Callable[[], torch.Tensor]:
    token = torch.full((1, 1), 7)

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits = model(token, past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return run


def attention_core(tokens: int) -> Callable[[], None]:
    """The absorbed form's matmuls over the cache, two layers: scores from latents and rotated keys, context from latents."""
    latents = [torch.randn(1, tokens, LATENT) for _ in range(2)]
    ropes = [torch.randn(1, tokens, ROPE) for _ in range(2)]
    query, query_rope, weights = (
        torch.randn(1, HEADS, LATENT),
        torch.randn(1, HEADS, ROPE),
        torch.rand(1, HEADS, tokens),
    )

    def run() -> None:
        for latent, rope in zip(latents, ropes):
            torch.baddbmm(latent @ query.mT, rope, query_rope.mT)
            weights @ latent

    return run


def added_memory_mb(run: Callable[[], object]) -> float:
    """Peak resident set during `run` beyond that before it (Linux)."""
    forget_peak()
    before = memory_bytes("VmRSS")
    run()
    return (memory_bytes("VmHWM") - before) / 2**20


def main() -> None:
    parser = options_parser(__doc__, rounds=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 1024, 16384], help="cached tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, stock = models()
    short = step(ours, filled_cache(ours, 16))
    tables: dict[str, dict[str, float]] = {}
    for tokens in options.tokens:
        runs = {"ours": step(ours, filled_cache(ours, tokens)), "stock": step(stock, filled_cache(stock, tokens))}
        expected = runs["stock"]()
        error = (runs["ours"]() - expected).abs().max() / expected.abs().max()
        assert expected.abs().max() > 0 and error < 1e-4, f"{tokens} cached tokens: relative error {error:.1e}"
        memory = {name: added_memory_mb(run) for name, run in runs.items()}
        print(f"{tokens} cached: a step adds {memory['ours']:.1f} MB (ours), {memory['stock']:.1f} MB (stock)")
        runs |= {"at 16": short, "attention core": attention_core(tokens)}
        case = f"{tokens} cached tokens"
        times = interleaved_medians_ms(runs, options.rounds, case, burst=1 if tokens > 4096 else 10)
        times["floor"] = times["at 16"] + times["attention core"]
        tables[case] = times
        print(f"{tokens} cached: {times['ours'] / times['floor']:.2f}x of the floor")
        if options.record:
            record("decode_cpu", case, times, peer="stock")
    show(f"one decoding step, batch 1, {options.threads} threads", tables, peer="stock")


if __name__ == "__main__":
    main()
