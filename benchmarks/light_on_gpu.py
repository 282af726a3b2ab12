"""How many tokens a second on a GPU, end to end, beside stock transformers: prefill, decode, a training step?

  python benchmarks/light_on_gpu.py --record

The Light preset cut to 4 layers, bf16, batch 1: prefill of 4,096 tokens, one decoding step at 1,024 and 16,384 cached tokens,
forward + backward of 4,096 tokens. Both models hold the same weights; their logits and one gradient are compared in fp32 before
anything is timed, because in bf16 two right models choose other experts wherever two scores are near. Without a GPU it says so
and ends.
"""

import argparse
from collections.abc import Callable

import torch
from moe_dispatch import in_graph, medians_ms
from rich.console import Console
from rich.table import Table
from timing import record
from transformers import StaticCache
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM

PREFILL, CACHED, TRAINING = 4096, (1024, 16384), 4096
# Of fp32 results, in norm: a token whose two best scores are equal to six digits may still choose otherwise.
CLOSE = 1e-3


def models(device: str, **sizes) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    config = AxK1Config.preset("light", **{"num_hidden_layers": 4, **sizes})
    with torch.device(device):
        ours = AxK1ForCausalLM(config)
        stock = AXK1ForCausalLM(AXK1Config(**config.to_dict()))
    stock.load_state_dict(ours.state_dict(), strict=False)
    return {"ours": ours, "stock": stock}


def prefill(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(input_ids, use_cache=True, logits_to_keep=1).logits

    return run


def decode(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    with torch.no_grad():
        cache = model(input_ids, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits = model(input_ids[:, -1:], past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return run


def graph(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A decoding step on a static cache, as one CUDA graph where there is a GPU: what a compiled generation replays."""
    cache = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + 1)
    with torch.no_grad():
        model(input_ids, use_cache=True, past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits = model(input_ids[:, -1:], past_key_values=cache).logits
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        return logits

    return in_graph(run) if input_ids.is_cuda else run


def train(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        return model.model.layers[-1].mlp.experts.down_proj.grad

    return run


def cases(
    pair: dict[str, torch.nn.Module], prefill_tokens: int, cached: tuple[int, ...], training_tokens: int, graphs: bool
) -> list[tuple[str, int, dict[str, Callable]]]:
    """Name, tokens a call, and what each model does. A graph's replay returns nothing: there is nothing to compare."""
    vocabulary, device = pair["ours"].config.vocab_size, pair["ours"].device
    kinds = [(f"prefill {prefill_tokens:,}", prefill, prefill_tokens, prefill_tokens)]
    kinds += [(f"decode at {tokens:,}", decode, tokens, 1) for tokens in cached]
    kinds += [(f"decode at {tokens:,} in a CUDA graph", graph, tokens, 1) for tokens in cached if graphs]
    kinds += [(f"training step {training_tokens:,}", train, training_tokens, training_tokens)]
    found = []
    for name, kind, tokens, counted in kinds:
        input_ids = torch.randint(0, vocabulary, (1, tokens), device=device)
        runs = {}
        for model in pair:
            try:
                runs[model] = kind(pair[model], input_ids)
            except RuntimeError as error:
                if model == "ours":
                    raise
                print(f"{name}: {model} does not run: {str(error).splitlines()[0]}")
        found.append((name, counted, runs))
    return found


def check(pair: dict[str, torch.nn.Module], *sizes) -> None:
    for name, _, runs in cases(pair, *sizes, graphs=False):
        result, truth = (runs[model]() for model in ("ours", "stock"))
        error = ((result - truth).norm() / truth.norm()).item()
        print(f"{name}: relative error {error:.1e} in fp32")
        assert truth.norm() > 0 and error < CLOSE, f"{name}: relative error {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing measured: there is no CUDA device.")
        return
    machine = torch.cuda.get_device_name()
    table = Table(
        "case", "ours [tokens/s]", "stock [tokens/s]", "ours / stock", title=f"Light, 4 layers, bf16, {machine}"
    )
    pair = models("cuda")
    check(pair, PREFILL, CACHED, TRAINING)
    pair = {name: model.zero_grad(set_to_none=True) or model.to(torch.bfloat16) for name, model in pair.items()}
    for name, tokens, runs in cases(pair, PREFILL, CACHED, TRAINING, graphs=True):
        times = medians_ms(runs, options.rounds, name)
        print(name, times, flush=True)
        rates = {model: 1e3 * tokens / ms for model, ms in times.items()}
        theirs = (f"{rates['stock']:,.0f}", f"{rates['ours'] / rates['stock']:.2f}x") if "stock" in rates else ("-", "-")
        table.add_row(name, f"{rates['ours']:,.0f}", *theirs)
        if options.record:
            peer = "stock" if "stock" in times else "ours"
            record("light_on_gpu", f"{name}, 4 layers, bf16", times, peer=peer, machine=machine)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
