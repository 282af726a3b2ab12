"""How fast and in how much memory does LoRA train attention, shared and routed experts, beside stock PEFT's target_parameters?

One training step: forward, loss, backward and AdamW of the adapters. "stock" is transformers' model under stock PEFT, "our model"
ours under stock PEFT. The losses of the same steps from the same start are compared before anything is measured; the memory is
each candidate's own peak in a fresh process, weights included, beyond its libraries'.
"""

import json
import subprocess
import sys
from functools import partial

import torch
from bench_training_cpu import training_step
from peft import LoraConfig, PeftModel, get_peft_model
from timing import forget_peak, interleaved_medians_ms, memory_bytes, options_parser, record, show
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from trainers.adapters import lora_config, target_names

CANDIDATES = ("ours", "our model", "stock")
STEPS = 6
MEBIBYTE = 2**20
lora_step = partial(training_step, lr=1e-3)
SIZES = {
    "small": {"hidden_size": 512, "n_routed_experts": 64, "moe_intermediate_size": 256, "num_experts_per_tok": 8},
    "wide": {"hidden_size": 1024, "n_routed_experts": 64, "moe_intermediate_size": 512, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 64, "n_routed_experts": 8, "moe_intermediate_size": 32},
}


def adapted(candidate: str, size: str, layers: int, rank: int) -> PeftModel:
    """One of CANDIDATES, all with the same weights and the same adapter, which changes the output from the first step on."""
    torch.manual_seed(0)
    config = AxK1Config.preset("nano", num_hidden_layers=layers, first_k_dense_replace=0, **SIZES[size])
    names = {"task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    if candidate == "stock":
        model = AXK1ForCausalLM(AXK1Config(**config.to_dict()))
    else:
        model = AxK1ForCausalLM(config)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02)
    lora = LoraConfig(**names, **target_names(model, ["attention", "shared", "routed"]))
    tuned = get_peft_model(model, lora_config(model, r=rank, alpha=2 * rank) if candidate == "ours" else lora)
    for _, parameter in sorted(tuned.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    return tuned.train()


def batch(options) -> torch.Tensor:
    return torch.randint(0, 512, (1, options.tokens), generator=torch.Generator().manual_seed(1))


def check_same_losses(options) -> dict[str, list[float]]:
    """Losses of the first steps; AssertionError unless they fall and every candidate's are the same."""
    losses = {}
    for name in CANDIDATES:
        run = lora_step(adapted(name, options.size, options.layers, options.rank), batch(options))
        losses[name] = [run() for _ in range(STEPS)]
    ours = losses["ours"]
    assert ours[-1] < ours[0] - 0.01, f"nothing is learned: {ours}"
    for name, peer in losses.items():
        differences = [abs(mine - other) for mine, other in zip(ours, peer)]
        assert max(differences) < 1e-4, f"losses beside {name} differ by {max(differences):.1e}: {ours}, {peer}"
    return losses


def peak_bytes(options) -> int:
    """The most that this process holds over three steps, weights included, beyond what it holds after a step of a tiny model."""
    lora_step(adapted(options.peak_of, "tiny", layers=1, rank=1), batch(options)[:, :16])()
    forget_peak()
    before = memory_bytes("VmRSS")
    run = lora_step(adapted(options.peak_of, options.size, options.layers, options.rank), batch(options))
    for _ in range(3):
        run()
    return memory_bytes("VmHWM") - before


def peaks_in_fresh_processes(options) -> dict[str, int]:
    peaks = {}
    for name in CANDIDATES:
        sizes = [f"--{key}={getattr(options, key)}" for key in ("size", "layers", "rank", "tokens", "threads")]
        command = [sys.executable, __file__, "--peak-of", name, *sizes]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"{name} could not train:\n{child.stderr[-3000:]}")
        peaks[name] = json.loads(child.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    parser = options_parser(__doc__, rounds=5)
    parser.add_argument(
        "--size", choices=SIZES, default="wide", help="64 experts, top-8: of 512 x 256 or 1024 x 512; or tiny"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--peak-of", choices=CANDIDATES, help="only print this candidate's peak in bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_bytes(options))
        return
    losses = check_same_losses(options)
    print("losses:", *(f"{name} {values[0]:.5f} -> {values[-1]:.5f}" for name, values in losses.items()), sep="\n  ")
    peaks = peaks_in_fresh_processes(options)
    runs = {
        name: lora_step(adapted(name, options.size, options.layers, options.rank), batch(options))
        for name in CANDIDATES
    }
    case = f"{options.size}, {options.layers} layers, r = {options.rank}, {options.tokens} tokens"
    times = interleaved_medians_ms(runs, options.rounds, case, burst=1)
    if options.record:
        record("lora_cpu", case, times, peer="stock")
    for peer in CANDIDATES[1:]:
        show(f"a LoRA step, routed experts included, {options.threads} threads", {case: times}, peer=peer)
    weights = sum(p.nbytes for p in adapted("ours", options.size, options.layers, options.rank).parameters())
    for name, peak in peaks.items():
        ratios = f"{peak / peaks['ours']:.2f} times ours, {(peak - weights) / (peaks['ours'] - weights):.2f} beyond the weights"
        print(f"{name}: peak {peak / MEBIBYTE:,.0f} MiB, {weights / MEBIBYTE:,.0f} of them weights; {ratios}")


if __name__ == "__main__":
    main()
