"""What must be true of the GPU kernels, on any device that runs them?  Checks for the tests: each raises or is silent.

Functions and not tests, because Triton settles when it is imported whether it interprets: a process of its own runs these.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from triton.backends.compiler import GPUTarget

from modeling_axk1 import mla_kernels, moe_dispatch, moe_kernels
from modeling_axk1.mla_kernels import kernels_attend_latents
from modeling_axk1.moe_dispatch import experts_op, forward_op, route_op, run_experts, torch_route
from modeling_axk1.moe_reference import moe_reference
from tests.random_experts import outputs_and_gradients, poisoned_memory, problem, relative_error
from tests.random_models import ours, padded_ids, random_config
from tests.tolerances import CACHED_STEP, EXPERTS, GRADIENT, PREFILL, ROUTING

# A step's matmul waits for its own loads and not for those of the steps to come.
LOADS_UNDER_WAY = re.compile(r"cp\.async\.wait_group\s+[1-9]")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# The tiles for sm_80 serve its successors with less shared memory too (8.6, 8.9, 12.0).
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
# Neither is a multiple of the interpreter's tiles (32), both have more than one.
UNEVEN = {"hidden": 40, "width": 36}


def on(device: str, inputs: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in inputs]


def check_name(check: Callable) -> str:
    return check.__name__.removeprefix("check_")


def check_against_reference(device: str, routing: str, tokens: int, experts: int, top_k: int, **sizes: int) -> None:
    inputs = problem(tokens, experts, top_k, routing, **sizes)
    expected = outputs_and_gradients(moe_reference, inputs)
    with poisoned_memory():
        results = outputs_and_gradients(run_experts, on(device, inputs))
    for name, result, truth in zip(("output", "x", "weights", "gate_up", "down"), results, expected):
        assert truth.abs().max() > 0, f"vacuous comparison of {name}"
        error = relative_error(result, truth)
        assert error <= EXPERTS, f"{name}: relative error {error:.1e}"


def check_half_precision(device: str, dtype: torch.dtype, tokens: int, **sizes: int) -> None:
    # Divided, so that no gradient leaves the range of float16.
    inputs = [t / 2 if t.is_floating_point() else t for t in problem(tokens, 6, 2, "random", dtype=dtype, **sizes)]
    truth = outputs_and_gradients(moe_reference, [t.float() if t.is_floating_point() else t for t in inputs])
    reference = outputs_and_gradients(lambda x, i, w, g, d: moe_reference(x, i, w.to(dtype), g, d), inputs)
    for result, theirs, exact in zip(outputs_and_gradients(run_experts, on(device, inputs)), reference, truth):
        error, allowed = relative_error(result, exact), 1.5 * relative_error(theirs, exact)
        assert 0 < error <= allowed, f"relative error {error:.1e}, allowed {allowed:.1e}"


def check_tiles_of_gpus(device: str) -> None:
    """The tiles that GPUs get, in the interpreter: even sizes, so that nothing is masked but the rows."""
    for tiles in (*moe_kernels.HOPPER.values(), *moe_kernels.AMPERE.values()):
        half_more = tiles.up.rows == 192
        inputs = problem(380 if half_more else 70, 2, 1, "foreign", hidden=256, width=128)
        rows = [int((inputs[1] == expert).sum()) for expert in range(2)]
        assert not half_more or min(rows) <= 128 < max(rows) <= 192, "the last 64 rows would always, or never, be needed"
        with mock.patch.object(moe_dispatch, "missing_for_kernels", lambda device: "the oracle is the CPU loop"):
            expected = outputs_and_gradients(run_experts, inputs)
        with mock.patch.object(moe_kernels, "INTERPRETER", {tiles.up.rows: tiles}), poisoned_memory():
            results = outputs_and_gradients(run_experts, inputs)
        for result, truth in zip(results, expected):
            assert relative_error(result, truth) <= EXPERTS


def check_nothing_to_do(device: str) -> None:
    """No tokens, and tokens whose experts are all on other ranks."""
    for tokens, routing in ((0, "random"), (5, "absent")):
        with poisoned_memory():
            output, *gradients = outputs_and_gradients(run_experts, on(device, problem(tokens, 4, 2, routing)))
        assert output.shape == (tokens, 24)
        assert all((t == 0).all() for t in (output, *gradients)), "something of nothing"


def check_schedule(device: str, tokens: int, experts: int, top_k: int, rows: int) -> None:
    """The sort is torch's stable one; the tiles cover each expert's rows once; pairs of other ranks have no tile."""
    _, ids, *_ = on(device, problem(tokens, experts, top_k, "foreign"))
    with poisoned_memory():
        pair_P, start_E1, tile_M3 = (t.cpu().long() for t in moe_kernels.sort_pairs(ids, experts, rows))
    expert_P = ids.flatten().cpu()
    local = int((expert_P < experts).sum())
    assert torch.equal(pair_P[:local], expert_P.argsort(stable=True)[:local])
    counts = expert_P[expert_P < experts].bincount(minlength=experts)
    assert torch.equal(start_E1, torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))))
    expected = [
        (e, first, int(start_E1[e + 1]))
        for e in range(experts)
        for first in range(int(start_E1[e]), int(start_E1[e + 1]), rows)
    ]
    assert [tuple(tile) for tile in tile_M3.tolist() if tile[0] >= 0] == expected
    assert (tile_M3[len(expected) :, 0] == -1).all()


def check_weights_are_read_once(device: str) -> None:
    """Up to SMALL_BATCH tokens a hit expert has one tile, even if every token chooses it."""
    for tokens in (1, 7, 17, 64):
        _, ids, *_ = on(device, problem(tokens, 6, 1, "one"))
        rows = moe_kernels.tiles_for(moe_kernels.capability(ids), torch.bfloat16, tokens, tokens / 6).up.rows
        tile_M3 = moe_kernels.sort_pairs(ids, 6, rows)[2]
        assert (tile_M3[:, 0] >= 0).sum() == 1, f"{tokens} tokens, tiles of {rows} rows"


def check_same_bits_again(device: str) -> None:
    inputs = on(device, problem(9, 6, 3, "foreign", **UNEVEN))
    first, second = (outputs_and_gradients(run_experts, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def check_other_strides(device: str) -> None:
    inputs = on(device, problem(9, 4, 2, "random"))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(outputs_and_gradients(run_experts, inputs), outputs_and_gradients(run_experts, strided)):
        assert torch.equal(a, b)


def check_keeps_what_a_dense_layer_would(device: str) -> None:
    """For backward: layer input, gate/up output, and the routing itself."""
    leaves = [t.requires_grad_(t.is_floating_point()) for t in on(device, problem(7, 3, 2, "random"))]
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_experts(*leaves)
    given = {t.untyped_storage().data_ptr() for t in leaves}
    assert [t.shape for place, t in kept.items() if place not in given] == [(7 * 2, 2 * 20)]


def check_some_columns_at_a_time(device: str) -> None:
    """Many pairs are multiplied and summed in passes as wide as an expert: the same bits, and never all rows at once."""
    inputs = on(device, problem(9, 6, 3, "foreign", hidden=100, width=30))
    whole = outputs_and_gradients(run_experts, inputs)
    with (
        mock.patch.object(moe_kernels, "HELD_AT_ONCE", 0),
        mock.patch.object(moe_kernels, "sum_pairs", wraps=moe_kernels.sum_pairs) as sums,
        poisoned_memory(),
    ):
        passes = outputs_and_gradients(run_experts, inputs)
        held = [call.args[0].shape[1] for call in sums.call_args_list]
    # Forward and backward, in the interpreter's and in fp32's tiles of 32 columns.
    assert held == 2 * [32, 32, 32, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole, passes))


def check_frozen(device: str) -> None:
    """A frozen input changes no other gradient."""
    inputs = on(device, problem(7, 3, 2, "random"))
    every = dict(zip((0, 2, 3, 4), outputs_and_gradients(run_experts, inputs)[1:]))
    for needed in ((0,), (2,), (3,), (4,)):
        for i, gradient in zip(needed, outputs_and_gradients(run_experts, inputs, needed)[1:]):
            assert torch.equal(gradient, every[i])


def check_operator(device: str) -> None:
    """Fake kernels, autograd, and torch.compile(fullgraph=True) of forward and backward."""
    leaves = [t.requires_grad_(t.is_floating_point()) for t in on(device, problem(5, 4, 2, "random"))]
    torch.library.opcheck(forward_op, (*leaves, True))
    inputs = on(device, problem(5, 4, 2, "foreign"))
    compiled = torch.compile(experts_op, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(run_experts, inputs)):
        assert torch.equal(a, b)


def check_routing(
    device: str, method: str, experts: int, groups: int, top_groups: int, top_k: int, biased: bool, normalise: bool
) -> None:
    """The same experts, weights and gradient of the logits as torch's operators, in whatever order."""
    logits_TE, bias_E = torch.randn(5, experts), 0.3 * torch.randn(experts) if biased else None
    options = (method, groups, top_groups, top_k, normalise, 2.5)
    results = []
    for run, place in ((torch_route, "cpu"), (route_op, device)):
        leaf = logits_TE.clone().to(place).requires_grad_()
        with poisoned_memory():
            weight_TK, expert_TK = run(leaf, None if bias_E is None else bias_E.to(place), *options)
            # By expert, so that an order of the choices does not count.
            dense_TE = torch.zeros_like(leaf).scatter(1, expert_TK, weight_TK)
            dense_TE.backward(torch.arange(dense_TE.numel(), device=place).view_as(dense_TE).sin())
        results.append((expert_TK.sort().values.cpu(), dense_TE.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] > 0).sum() == 5 * top_k
    for theirs, result in zip(results[0][1:], results[1][1:]):
        assert (result - theirs).abs().max() <= ROUTING


def check_ties_go_to_the_lowest_id(device: str) -> None:
    bias_E = torch.tensor([0.0, 1, 1, 0, 1, 1, 0, 1], device=device)
    logits_TE = torch.zeros(1, 8, device=device)
    assert route_op(logits_TE, bias_E, "greedy", 1, 1, 3, True, 1.0)[1].tolist() == [[1, 2, 4]]
    # Groups of two, best scores 1.5 each: the first two stay eligible.
    assert route_op(logits_TE, bias_E, "group_limited_greedy", 4, 2, 3, True, 1.0)[1].tolist() == [[1, 2, 0]]
    assert route_op(logits_TE[:0], bias_E, "greedy", 1, 1, 3, True, 1.0)[1].shape == (0, 3)


def check_routing_operator(device: str) -> None:
    logits_TE = torch.randn(3, 6, device=device, requires_grad=True)
    torch.library.opcheck(route_op, (logits_TE, None, "noaux_tc", 3, 2, 2, True, 2.5))


def check_recomputation_keeps_the_routing(device: str) -> None:
    """Gradient checkpointing routes once, and the gradients are the same."""
    model = ours(random_config(8, num_hidden_layers=2)).to(device).train()
    sparse = model.config.mlp_layer_types.count("sparse")
    input_ids = padded_ids(model.config, tokens=5)[0].to(device)
    gradients = []
    for recompute in (False, True):
        model.recompute_selectively(recompute)
        model.zero_grad()
        with mock.patch.object(moe_dispatch, "kernels_route", wraps=moe_dispatch.kernels_route) as routings:
            model(input_ids, labels=input_ids).loss.backward()
        assert routings.call_count == sparse, f"{routings.call_count} routings of {sparse} layers"
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def check_in_models(device: str) -> None:
    """Through `experts_implementation`: our model and a stock one, logits and gradients beside "eager"."""
    qwen = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, intermediate_size=40,
    )  # fmt: skip
    for model in (ours(random_config(8, num_hidden_layers=2)), Qwen3MoeForCausalLM(qwen).eval()):
        model.to(device)
        input_ids = padded_ids(model.config)[0].to(device) % model.config.vocab_size
        results = {}
        for name in ("eager", "axk1"):
            model.set_experts_implementation(name)
            model.zero_grad()
            logits = model(input_ids).logits
            logits.sin().sum().backward()
            results[name] = (logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert (results["axk1"][0] - results["eager"][0]).abs().max() <= PREFILL
        assert results["axk1"][1].keys() == results["eager"][1].keys()
        largest = max(gradient.abs().max() for gradient in results["eager"][1].values())
        for name, truth in results["eager"][1].items():
            error = (results["axk1"][1][name] - truth).abs().max() / max(truth.abs().max(), 1e-3 * largest)
            assert error <= GRADIENT, f"{name}: {error:.1e}"


def check_refusals(device: str) -> None:
    x, ids, weights, gate_up, down = on(device, problem(3, 4, 2, "random"))
    for inputs, words in (
        ((x.double(), ids, weights, gate_up.double(), down.double()), "float64 but the kernels"),
        ((x.half(), ids, weights, gate_up, down), "float16, torch.float32 but the kernels"),
        ((x, ids.float(), weights, gate_up, down), "ids as torch.int64"),
        ((x, ids, weights.long(), gate_up, down), "weights as floating point"),
    ):
        try:
            run_experts(*inputs)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error that says {words!r}")


def check_attention(
    device: str, mask: str, heads: int, tokens: int, latent: int, rope: int, dtype: torch.dtype = torch.float32
) -> None:
    """One new token a row over a cache with room to grow; the first row is padded on the left."""
    query_BNL, query_BND = torch.randn(2, heads, latent).to(dtype), torch.randn(2, heads, rope).to(dtype)
    latent_BSL, rope_BSD = (torch.randn(2, tokens + 9, size).to(dtype)[:, :tokens] for size in (latent, rope))
    seen_BS = torch.ones(2, tokens, dtype=torch.bool)
    seen_BS[0, : tokens if mask == "nothing seen" else 2 * tokens // 3] = False
    added_BS = torch.zeros(2, tokens).masked_fill(~seen_BS, torch.finfo(torch.float32).min)
    mask_BS = {"none": None, "bool": seen_BS, "add": added_BS, "nothing seen": seen_BS}[mask]
    inputs = [query_BNL, query_BND, latent_BSL, rope_BSD]
    expected = mla_kernels.torch_attend_latents(*(t.double() for t in inputs), mask_BS, 0.3)
    inputs = [*on(device, inputs), None if mask_BS is None else mask_BS.to(device)]
    with poisoned_memory():
        context_BNL = mla_kernels.attend_latents_op(*inputs, 0.3)
    allowed = max(EXPERTS, 1.5 * relative_error(mla_kernels.torch_attend_latents(*inputs, 0.3), expected))
    error = relative_error(context_BNL, expected)
    assert error <= allowed, f"relative error {error:.1e}, allowed {allowed:.1e}"


def check_attention_operator(device: str) -> None:
    inputs = on(device, [torch.randn(2, 3, 12), torch.randn(2, 3, 4), torch.randn(2, 5, 12), torch.randn(2, 5, 4)])
    torch.library.opcheck(mla_kernels.attend_latents_op, (*inputs, None, 0.3))


def check_pages(device: str, latent: int = 36, rope: int = 9, page: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """Rows of any length out of pages in any order; as in transformers, a page's second halves stand behind its first ones."""
    half, lengths = -(-(latent + rope) // 2), [0, 1, 37, 70, 72]
    table_BM = torch.full((len(lengths), 18), -1, dtype=torch.int32)
    spare = iter((2 * torch.randperm(len(lengths) * 18)).tolist())
    pages_CTW = torch.full((2 * len(lengths) * 18, page, half), float("nan"), dtype=dtype)
    query_BNL, query_BND = (torch.randn(len(lengths), 17, size).to(dtype) for size in (latent, rope))
    expected = torch.zeros(query_BNL.shape)
    for row, length in enumerate(lengths):
        tokens = torch.randn(length, 2 * half).to(dtype)
        for place, part in enumerate(tokens.split(page)):
            table_BM[row, place] = first = next(spare)
            pages_CTW[first, : len(part)], pages_CTW[first + 1, : len(part)] = part.chunk(2, dim=1)
        if length:
            cache = tokens[None, :, :latent].float(), tokens[None, :, latent : latent + rope].float()
            queries = query_BNL[row : row + 1].float(), query_BND[row : row + 1].float()
            expected[row] = mla_kernels.torch_attend_latents(*queries, *cache, None, 0.3)[0]
    inputs = [query_BNL, query_BND, pages_CTW[:-1], pages_CTW[1:], table_BM, torch.tensor(lengths, dtype=torch.int32)]
    reference = mla_kernels.torch_attend_pages(*inputs, 0.3)
    allowed = EXPERTS if dtype == torch.float32 else 1.5 * relative_error(reference, expected)
    assert relative_error(reference, expected) <= max(allowed, EXPERTS)
    pages_CTW = pages_CTW.to(device)
    inputs = [query_BNL, query_BND, pages_CTW[:-1], pages_CTW[1:], *inputs[4:]]
    with poisoned_memory():
        context_BNL = mla_kernels.attend_pages_op(*on(device, inputs[:2]), *inputs[2:4], *on(device, inputs[4:]), 0.3)
    assert relative_error(context_BNL, expected) <= allowed and not context_BNL[0].any()


def check_pages_operator(device: str) -> None:
    inputs = on(device, [torch.randn(2, 3, 12), torch.randn(2, 3, 4), *torch.randn(2, 6, 4, 8)])
    table_BM, length_B = on(device, [torch.tensor([[1, 4], [0, 2]]).int(), torch.tensor([3, 8]).int()])
    torch.library.opcheck(mla_kernels.attend_pages_op, (*inputs, table_BM, length_B, 0.3))


def check_decoding_steps(device: str) -> None:
    """Cached steps of a left-padded batch are the full pass, and each attends by the kernels."""
    model = ours(random_config(3)).to(device)
    input_ids, mask = (t.to(device) for t in padded_ids(model.config, tokens=9))
    with (
        torch.no_grad(),
        mock.patch.object(mla_kernels, "kernels_attend_latents", wraps=kernels_attend_latents) as used,
    ):
        expected = model(input_ids, attention_mask=mask).logits
        cache = model(input_ids[:, :7], attention_mask=mask[:, :7]).past_key_values
        for end in (8, 9):
            step = model(input_ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            assert (step.logits[:, 0] - expected[:, end - 1]).abs().max() <= CACHED_STEP
    assert used.call_count == 2 * model.config.num_hidden_layers


def check_cuda_graph(device: str) -> None:
    """Forward and backward captured once, replayed on other tokens and another routing."""
    inputs = on(device, problem(40, 6, 2, "random", dtype=torch.bfloat16, hidden=64, width=32))
    others = on(device, problem(40, 6, 2, "foreign", dtype=torch.bfloat16, seed=1, hidden=64, width=32))
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    floats = [t for t in leaves if t.requires_grad]

    def step() -> list[Tensor]:
        output = run_experts(*leaves)
        return [output, *torch.autograd.grad(output, floats, output.detach().sin())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in (inputs, others):
        with torch.no_grad():
            for leaf, value in zip(leaves, values):
                leaf.copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def check_random_shapes(device: str, seeds: range) -> None:
    """Outputs and gradients beside the CPU loop, which test_moe_dispatch.py compares with the reference."""
    for seed in seeds:
        rng = random.Random(seed)
        experts = rng.randint(1, 200)
        options = dict(
            tokens=rng.randint(1, 400), experts=experts, top_k=rng.randint(1, min(8, experts)), seed=seed,
            routing=rng.choice(["random", "foreign", "one", "same"] if experts > 1 else ["random"]),
            hidden=rng.randint(1, 200), width=rng.randint(1, 100),
        )  # fmt: skip
        inputs = problem(**options)
        truths = outputs_and_gradients(run_experts, inputs)
        with poisoned_memory():
            results = outputs_and_gradients(run_experts, on(device, inputs))
        for result, truth in zip(results, truths):
            assert relative_error(result, truth) <= 2 * EXPERTS, options


class Compiled(NamedTuple):
    kernel: str
    ptx: str
    shared_bytes: int
    cubin_bytes: int
    hash: str


class NoDevice:
    """What Triton asks a driver before it compiles a launch: the target, and no more."""

    def __init__(self, architecture: int):
        self.get_current_target = lambda: GPUTarget("cuda", architecture, 32)
        # A kernel keeps what it has compiled by the device's number.
        self.get_current_device = self.get_current_stream = lambda *_: architecture


@contextmanager
def compiling_for(architecture: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for a GPU that need not be there, from their own arguments; nothing runs."""
    compiled = []

    def compile_launch(kernel, grid, *arguments, warps=4, stages=1, **constants) -> None:
        options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        binary = kernel.warmup(*arguments, grid=grid, **options, **constants)
        asm, shared_bytes = binary.asm, binary.metadata.shared
        compiled.append(Compiled(kernel.__name__, asm["ptx"], shared_bytes, len(asm["cubin"]), binary.hash))

    triton.runtime.driver.set_active(NoDevice(architecture))
    with (
        mock.patch.object(moe_kernels, "launch", compile_launch),
        mock.patch.object(mla_kernels, "launch", compile_launch),
        mock.patch.object(moe_kernels, "capability", lambda tensor: divmod(architecture, 10)),
        mock.patch.object(mla_kernels, "capability", lambda tensor: divmod(architecture, 10)),
    ):
        yield compiled


def compiled_experts(architecture: int, dtype: torch.dtype, tokens: int, hidden: int, width: int) -> list[Compiled]:
    """Every kernel of a layer's forward and backward."""
    x, *layer = problem(tokens, 4, 2, "random", dtype=dtype, hidden=hidden, width=width)
    with compiling_for(architecture) as compiled:
        _, gate_up = moe_kernels.kernels_forward(x, *layer, keep=True)
        moe_kernels.kernels_backward(x, x, *layer, gate_up, True, True)
    return compiled


def compiled_routing(architecture: int) -> list[Compiled]:
    """Grouped with a bias, and plain."""
    with compiling_for(architecture) as compiled:
        for bias_E, options in (
            (torch.zeros(192), ("noaux_tc", 8, 4, 8, True, 2.5)),
            (None, ("greedy", 1, 1, 1, False, 1.0)),
        ):
            weight_TK, expert_TK = moe_kernels.kernels_route(torch.zeros(5, 192), bias_E, *options)
            moe_kernels.kernels_route_backward(weight_TK, torch.zeros(5, 192), expert_TK, *options[-2:])
    return compiled


def compiled_attention(architecture: int, tokens: int = 64) -> list[Compiled]:
    """At K1's sizes, with every kind of mask."""
    masks_BS = (None, torch.ones(1, tokens, dtype=torch.bool), torch.zeros(1, tokens))
    with compiling_for(architecture) as compiled:
        for mask_BS in masks_BS:
            query_BNL, query_BND, latent_BSL, rope_BSD = (
                torch.empty(1, rows, size, dtype=torch.bfloat16) for rows in (64, tokens) for size in (512, 64)
            )
            mla_kernels.kernels_attend_latents(query_BNL, query_BND, latent_BSL, rope_BSD, mask_BS, 0.3)
    return compiled


def compiled_pages(architecture: int) -> list[Compiled]:
    """At K1's sizes, out of pages of 256 tokens as transformers has them."""
    query_BNL, query_BND = (torch.empty(2, 64, size, dtype=torch.bfloat16) for size in (512, 64))
    pages_CTW = torch.empty(9, 256, 288, dtype=torch.bfloat16)
    table_BM, length_B = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with compiling_for(architecture) as compiled:
        mla_kernels.kernels_attend_pages(query_BNL, query_BND, pages_CTW[:-1], pages_CTW[1:], table_BM, length_B, 0.3)
    return compiled
