"""How fast are routed experts on CPU, forward and backward, beside transformers' own implementations and the bare matmuls?

512 hidden, 64 experts of 256, top-8, as in the project's stated goals; correctness is checked first, against the eager loop.
"""

from collections.abc import Callable

import torch
from moe_dispatch import step
from timing import interleaved_medians_ms, options_parser, record, show

from modeling_axk1 import AxK1Config
from modeling_axk1.modeling_axk1 import AxK1Experts

PEERS = ("eager", "grouped_mm", "batched_mm")
BATCHED_MM_TOKENS = 8  # it copies the weights of every token's experts: 64 tokens take seconds, 2,048 would take 25 GB


def layer(dtype: torch.dtype) -> AxK1Experts:
    config = AxK1Config.preset(
        "nano", hidden_size=512, n_routed_experts=64, moe_intermediate_size=256, num_experts_per_tok=8
    )
    experts = AxK1Experts(config)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.05)
    return experts.to(dtype)


def bare_matmuls(experts: AxK1Experts, inputs, backward: bool) -> Callable[[], None]:
    """The same matmuls and nothing else: the floor. Backward has twice the forward's."""
    x, ids, _ = inputs
    counts = ids.flatten().bincount(minlength=64).tolist()
    rows = x.repeat(8, 1)
    gate_up = rows.new_empty(len(rows), 512)
    act = rows.new_empty(len(rows), 256)
    grads = [torch.empty_like(p) for p in (experts.gate_up_proj, experts.down_proj)]

    @torch.no_grad()
    def run() -> None:
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            part = slice(start, start + count)
            start += count
            torch.mm(rows[part], experts.gate_up_proj[expert].t(), out=gate_up[part])
            torch.mm(act[part], experts.down_proj[expert].t())
            if backward:
                torch.mm(rows[part], experts.down_proj[expert])
                torch.mm(rows[part].t(), act[part], out=grads[1][expert])
                torch.mm(gate_up[part].t(), rows[part], out=grads[0][expert])
                torch.mm(gate_up[part], experts.gate_up_proj[expert])

    return run


def main() -> None:
    parser = options_parser(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    experts = layer(getattr(torch, options.dtype))
    tables: dict[str, dict[str, float]] = {}
    for tokens in options.tokens:
        ids = torch.rand(tokens, 64).topk(8, dim=1).indices
        inputs = torch.randn(tokens, 512, dtype=experts.gate_up_proj.dtype), ids, torch.rand(tokens, 8)
        for backward in (False, True):
            names = {"ours": "axk1"} | {p: p for p in PEERS if p != "batched_mm" or tokens <= BATCHED_MM_TOKENS}
            runs = {name: step(experts, implementation, inputs, backward) for name, implementation in names.items()}
            truth = runs["eager"]().float()
            error = (runs["ours"]().float() - truth).norm() / truth.norm()
            assert truth.norm() > 0 and error < (1e-5 if options.dtype == "float32" else 1e-2), error
            runs["matmuls alone"] = bare_matmuls(experts, inputs, backward)
            case = f"{tokens} tokens, {'forward + backward' if backward else 'forward'}, {options.dtype}"
            # Eager's backward takes seconds: it builds a full-size zero gradient for each expert.
            times = interleaved_medians_ms(runs, options.rounds, case, burst=2 if backward else 20 if tokens < 8 else 5)
            times.setdefault("batched_mm", float("nan"))
            times["best peer"] = min(times[p] for p in PEERS if times[p] == times[p])
            tables[case] = times
            if options.record:
                record("experts_cpu", case, times, peer="best peer")
    show(f"routed experts, {options.threads} threads", tables, peer="best peer")


if __name__ == "__main__":
    main()
