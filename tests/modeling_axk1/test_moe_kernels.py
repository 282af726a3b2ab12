"""Do the GPU kernels compute what the obvious loop computes, and do they compile?

The checks of kernel_checks.py run in Triton's interpreter on CPU, and the same ones on a GPU where there is one. Every
kernel is compiled for three architectures, for which no GPU has to be there. On one, also under
`compute-sanitizer python -m pytest -m gpu`, which finds reads and writes out of bounds.
"""

import pytest
import torch

from modeling_axk1 import moe_kernels

triton = pytest.importorskip("triton", reason="Triton is not installed; pip install triton (Linux)")

from tests.modeling_axk1 import kernel_checks as checks  # noqa: E402

CASES = [
    dict(routing="random", tokens=1, experts=6, top_k=2, hidden=64, width=32),
    dict(routing="foreign", tokens=63, experts=6, top_k=2, **checks.UNEVEN),
    # 514 pairs: the dispatch takes more than one block of them.
    dict(routing="random", tokens=257, experts=5, top_k=2, hidden=24, width=20),
    # 48: tiles of half the columns fit.
    dict(routing="one", tokens=66, experts=3, top_k=1, hidden=40, width=48),
    dict(routing="random", tokens=9, experts=6, top_k=6, hidden=24, width=20),
    dict(routing="same", tokens=5, experts=3, top_k=3, hidden=24, width=20),
    # More experts than pairs, and than the fewest that are counted at once (32).
    dict(routing="random", tokens=4, experts=40, top_k=8, hidden=24, width=20),
]
# As many experts as K1 has take the interpreter five seconds.
GPU_CASES = [*CASES, CASES[-1] | {"experts": 192}]
ROUTING = [
    # method, experts, groups, top_groups, top_k, biased, normalise
    ("noaux_tc", 192, 8, 4, 8, True, True),
    ("group_limited_greedy", 192, 8, 3, 8, False, True),
    ("greedy", 512, 1, 1, 16, False, True),
    ("noaux_tc", 6, 3, 2, 3, True, False),
    ("noaux_tc", 5, 1, 1, 5, True, True),
]
CHECKS = [
    checks.check_nothing_to_do,
    checks.check_weights_are_read_once,
    checks.check_same_bits_again,
    checks.check_other_strides,
    checks.check_keeps_what_a_dense_layer_would,
    checks.check_some_columns_at_a_time,
    checks.check_frozen,
    checks.check_operator,
    checks.check_ties_go_to_the_lowest_id,
    checks.check_routing_operator,
    checks.check_recomputation_keeps_the_routing,
    checks.check_in_models,
    checks.check_refusals,
]
MATMULS = {"up", "rows", "act_backward", "outer"}


def case_name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_outputs_and_gradients_equal_the_reference(interpreted, case):
    interpreted(checks.check_against_reference, **case)


def test_bf16_is_no_less_accurate_than_the_reference(interpreted):
    interpreted(checks.check_half_precision, dtype=torch.bfloat16, tokens=65, **checks.UNEVEN)


@pytest.mark.parametrize("tokens, rows", [(7, 16), (20, 16), (100, 16), (300, 16), (300, 64)])
def test_dispatch_is_a_stable_sort_and_its_tiles_cover_it(interpreted, tokens, rows):
    interpreted(checks.check_schedule, tokens=tokens, experts=5, top_k=4, rows=rows)


@pytest.mark.parametrize("method, experts, groups, top_groups, top_k, biased, normalise", ROUTING)
def test_routing_equals_the_router(interpreted, method, experts, groups, top_groups, top_k, biased, normalise):
    interpreted(
        checks.check_routing, method=method, experts=experts, groups=groups, top_groups=top_groups, top_k=top_k,
        biased=biased, normalise=normalise,
    )  # fmt: skip


def test_tiles_of_gpus_compute_the_same(interpreted):
    interpreted(checks.check_tiles_of_gpus)


@pytest.mark.parametrize("check", CHECKS, ids=checks.check_name)
def test_in_the_interpreter(interpreted, check):
    interpreted(check)


@pytest.mark.parametrize("architecture", checks.TENSOR_CORES)
def test_kernels_compile_to_tensor_cores(compiling, architecture):
    compiled = compiling(checks.compiled_experts, architecture, torch.bfloat16, tokens=300, hidden=256, width=256)
    assert {c.kernel for c in compiled} == {"count", "place", "combine", *MATMULS}
    for kernel, ptx, shared_bytes, cubin_bytes, _ in compiled:
        assert cubin_bytes and shared_bytes <= checks.SHARED_BYTES[architecture], kernel
        if kernel in MATMULS:
            assert checks.TENSOR_CORES[architecture] in ptx, kernel
            assert checks.LOADS_UNDER_WAY.search(ptx), f"{kernel}: no loads are under way behind a step's own"


@pytest.mark.parametrize(
    "architecture, dtype, tokens, hidden, width",
    [
        (80, torch.bfloat16, 64, 256, 256),
        (90, torch.bfloat16, 1, 256, 256),
        (90, torch.bfloat16, 32, 256, 256),
        (100, torch.bfloat16, 64, 256, 256),
        (80, torch.float16, 65, 40, 36),
        (90, torch.bfloat16, 150, 256, 256),
        (90, torch.float32, 65, 64, 64),
    ],
)
def test_kernels_compile_for_other_sizes_and_dtypes(compiling, architecture, dtype, tokens, hidden, width):
    compiled = compiling(checks.compiled_experts, architecture, dtype, tokens, hidden, width)
    assert {c.kernel for c in compiled} == {"place", "combine", *MATMULS}
    assert all(c.cubin_bytes and c.shared_bytes <= checks.SHARED_BYTES[architecture] for c in compiled)


def test_other_numbers_of_tokens_compile_nothing_new(compiling):
    few, more = (
        {c.hash for c in compiling(checks.compiled_experts, 90, torch.bfloat16, tokens, hidden=256, width=256)}
        for tokens in (257, 300)
    )
    assert few == more


@pytest.mark.parametrize("rows_an_expert, rows", [(0.1, 64), (21, 64), (65, 128), (128, 192), (171, 192), (200, 128), (683, 192)])
def test_tiles_follow_the_rows_of_an_expert(rows_an_expert, rows):
    tiles = moe_kernels.tiles_for((9, 0), torch.bfloat16, 4096, rows_an_expert)
    assert tiles.up.rows == tiles.down.rows == rows
    assert moe_kernels.tiles_for((8, 0), torch.bfloat16, 4096, rows_an_expert).up.rows == 128


@pytest.mark.parametrize("architecture", checks.TENSOR_CORES)
def test_routing_compiles(compiling, architecture):
    compiled = compiling(checks.compiled_routing, architecture)
    assert [c.kernel for c in compiled] == 2 * ["route", "route_backward"] and all(c.cubin_bytes for c in compiled)


@pytest.mark.parametrize(
    "error, expected",
    [
        (triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"), moe_kernels.CompileError),
        (RuntimeError("Failed to find C compiler."), moe_kernels.CompileError),
        (RuntimeError("PassManager::run failed"), moe_kernels.CompileError),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError),
    ],
)
def test_only_a_failed_compile_is_called_one(error, expected):
    class Kernel(dict):
        __name__ = "kernel"

        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs):
            raise error

    with pytest.raises(RuntimeError) as caught:
        moe_kernels.launch(Kernel(), (1,), torch.zeros(1))
    assert caught.type is expected


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=case_name)
def test_on_gpu_outputs_and_gradients_equal_the_reference(case):
    checks.check_against_reference("cuda", **case)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, hidden, width", [(5, 256, 128), (100, 256, 128), (300, 256, 128), (300, 200, 72), (513, 256, 128)]
)
def test_on_gpu_half_precision_is_no_less_accurate_than_the_reference(dtype, tokens, hidden, width):
    checks.check_half_precision("cuda", dtype, tokens, hidden=hidden, width=width)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("method, experts, groups, top_groups, top_k, biased, normalise", ROUTING)
def test_on_gpu_routing_equals_the_router(method, experts, groups, top_groups, top_k, biased, normalise):
    checks.check_routing("cuda", method, experts, groups, top_groups, top_k, biased, normalise)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("rows", [16, 128])
def test_on_gpu_dispatch_is_a_stable_sort(rows):
    checks.check_schedule("cuda", tokens=5000, experts=192, top_k=8, rows=rows)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("check", [*CHECKS, checks.check_cuda_graph], ids=checks.check_name)
def test_on_gpu(check):
    check("cuda")


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_on_gpu_random_shapes(first):
    checks.check_random_shapes("cuda", range(first, first + 100))
