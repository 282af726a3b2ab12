"""How fast does the nano model train on CPU beside stock transformers: forward, loss, backward and AdamW?

Same configuration and weights; the loss and every gradient are compared before anything is timed.
"""

from collections.abc import Callable

import torch
from timing import interleaved_medians_ms, options_parser, record, show
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM


def models() -> tuple[AxK1ForCausalLM, AXK1ForCausalLM]:
    torch.manual_seed(0)
    ours = AxK1ForCausalLM(AxK1Config.preset("nano")).train()
    stock = AXK1ForCausalLM(AXK1Config(**ours.config.to_dict())).train()
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours, stock


def training_step(model: torch.nn.Module, input_ids: torch.Tensor, lr: float = 1e-4) -> Callable[[], float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)  # Trainer's default

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def check_equal(ours: torch.nn.Module, stock: torch.nn.Module, input_ids: torch.Tensor) -> None:
    for model in (ours, stock):
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
            assert error < 1e-4, f"{name}: gradients differ by {error:.1e}"


def main() -> None:
    parser = options_parser(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, stock = models()
    input_ids = torch.randint(0, ours.config.vocab_size, (options.rows, options.tokens))
    check_equal(ours, stock, input_ids)
    runs = {"ours": training_step(ours, input_ids), "stock": training_step(stock, input_ids)}
    case = f"nano, {options.rows} rows of {options.tokens} tokens"
    times = interleaved_medians_ms(runs, options.rounds, case)
    for name, ms in times.items():
        print(f"{name}: {1000 * input_ids.numel() / ms:,.0f} tokens/s")
    if options.record:
        record("training_cpu", case, times, peer="stock")
    show(f"one training step, {options.threads} threads", {case: times}, peer="stock")


if __name__ == "__main__":
    main()
