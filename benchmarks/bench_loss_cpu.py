"""How much memory and time does the loss of the head take, forward and backward, from whole logits and in chunks?

    python benchmarks/bench_loss_cpu.py --tokens 2048 --vocab 163840 --hidden 512

plain: `lm_head`, then cross-entropy, as without `fused_linear_loss`; ours: loss_axk1.py; torch: its own `linear_cross_entropy`
where torch has it (2.13). Each value and gradient is checked against the plain one first. Memory is what a process of its own
needs at most beyond its inputs and the gradients that it returns, as Linux counts it.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from timing import forget_peak, interleaved_medians_ms, memory_bytes, options_parser, record, show
from torch import Tensor

from modeling_axk1.loss_axk1 import fused_linear_loss


def plain_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")


def torch_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": fused_linear_loss, "plain": plain_loss}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["torch"] = torch_loss


def inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, hidden, dtype=dtype) / hidden**0.5).requires_grad_()
    target = torch.randint(0, vocab, (tokens,))
    target[::7] = -100
    return x, weight, target


def step(loss: Callable, case: tuple) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, target = case
    value = loss(x, weight, target)
    return value.detach(), *torch.autograd.grad(value, [x, weight])


def peak_bytes(name: str, sizes: tuple, threads: int) -> int:
    """In a fresh process: the most memory while the loss runs, less what stood there before and what it returns."""
    torch.set_num_threads(threads)
    step(LOSSES[name], inputs(4, 8, 16, sizes[-1]))  # libraries load at the first call
    case = inputs(*sizes)
    forget_peak()
    before = memory_bytes("VmRSS")
    returned = sum(t.nbytes for t in step(LOSSES[name], case))
    return memory_bytes("VmHWM") - before - returned


def measured_alone(name: str, sizes: tuple, threads: int) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_bytes, name, sizes, threads).result()


def check(case: tuple, tolerance: float) -> None:
    truth = step(plain_loss, case)
    for name, loss in LOSSES.items():
        for got, wanted in zip(step(loss, case), truth):
            error = (got.float() - wanted.float()).norm() / wanted.float().norm()
            assert wanted.norm() > 0 and error < tolerance, (name, error)


def main() -> None:
    parser = options_parser(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=163_840, help="default: K1's, %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    sizes = options.tokens, options.hidden, options.vocab, dtype
    case = inputs(*sizes)
    check(case, 1e-5 if dtype == torch.float32 else 2e-2)
    label = f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}, {options.dtype}"
    print(f"{label}: value and gradients agree; memory beyond inputs and gradients")
    memory = {name: measured_alone(name, sizes, options.threads) for name in LOSSES}
    for name, peak in memory.items():
        print(f"  {name:6} {peak / 2**20:8.0f} MB")
    runs = {name: (lambda loss=loss: step(loss, case)) for name, loss in LOSSES.items()}
    times = interleaved_medians_ms(runs, options.rounds, label, burst=1)
    show("loss of the head, forward and backward", {label: times}, peer="plain")
    if options.record:
        peaks = ", ".join(f"{name} {peak / 2**20:.0f} MB" for name, peak in memory.items())
        record("loss_cpu", f"{label}; {peaks}", times, peer="plain")


if __name__ == "__main__":
    main()
