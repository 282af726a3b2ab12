"""Do the GPU kernels compute what the obvious loop computes, and do they compile?

The checks of kernel_checks.py run in Triton's interpreter on CPU, and the same ones on a GPU where there is one. Every
kernel is compiled for three architectures, for which no GPU has to be there.
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
    dict(routing="random", tokens=9, experts=192, top_k=8, hidden=24, width=20),
]
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
    checks.check_frozen,
    checks.check_operator,
    checks.check_ties_go_to_the_lowest_id,
    checks.check_routing_operator,
    checks.check_recomputation_keeps_the_routing,
    checks.check_in_models,
    checks.check_refusals,
]
# Each matmul of a layer: its tile, its kernel, its constants.
MATMULS = {
    "up": ("up", "up", dict(KEEP=True)),
    "down": ("down", "rows", dict(TRANSPOSED=False)),
    "down backward": ("down", "rows", dict(TRANSPOSED=True)),
    "act_backward": ("act_backward", "act_backward", dict(ACT=True)),
    "outer, a gathered": ("outer", "outer", dict(GATHER_A=True)),
    "outer, b gathered": ("outer", "outer", dict(GATHER_A=False)),
}
# The other kernels: their warps and constants.
SORT = dict(ROWS=128, BINS=256, BLOCK=moe_kernels.PAIR_BLOCK, COMPARED=moe_kernels.COMPARED)
GROUPED = dict(GROUPS=8, TOP_GROUPS=4, TOP_K=8, PADDED_GROUPS=8, PADDED_SIZE=32, PADDED_K=8)
OTHERS = {
    "route": ("route", 1, dict(BIASED=True, NORMALISE=True, TOP_TWO=True, **GROUPED)),
    "route_backward": ("route_backward", 4, dict(NORMALISE=True, PADDED_K=8, BINS=256)),
    "count": ("count", 4, dict(BINS=256, BLOCK=moe_kernels.PAIR_BLOCK)),
    "place": ("place", 8, dict(ALONE=False, **SORT)),
    "place, one block": ("place", 8, dict(ALONE=True, **SORT)),
    "combine": ("combine", 4, dict(WEIGHTED=True, PAIRS=8, COLUMNS=moe_kernels.COMBINED // 8)),
}


def case_name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_outputs_and_gradients_equal_the_reference(interpreted, case):
    interpreted(checks.check_against_reference, **case)


def test_bf16_is_no_less_accurate_than_the_reference(interpreted):
    interpreted(checks.check_half_precision, dtype=torch.bfloat16, tokens=65, **checks.UNEVEN)


@pytest.mark.parametrize("tokens, rows", [(100, 16), (300, 16), (300, 64)])
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


def compiled_matmul(compiling, name: str, architecture: int, dtype: torch.dtype, tokens: int, even: bool = True):
    part, kernel, constants = MATMULS[name]
    tile = getattr(moe_kernels.tiles_for(divmod(architecture, 10), dtype, tokens), part)
    constants = constants | dict(
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=moe_kernels.TILE_GROUP, EVEN=even,
        PRECISION="ieee",
    )  # fmt: skip
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return compiling("moe_kernels", kernel, architecture, short, tile.warps, tile.stages, constants)


@pytest.mark.parametrize("architecture", checks.TENSOR_CORES)
@pytest.mark.parametrize("name", MATMULS)
def test_matmuls_compile_to_tensor_cores(compiling, name, architecture):
    ptx, shared_bytes, cubin = compiled_matmul(compiling, name, architecture, torch.bfloat16, tokens=16384)
    assert cubin and checks.TENSOR_CORES[architecture] in ptx
    assert "cp.async" in ptx, "loads do not overlap with the matmul"
    assert shared_bytes <= checks.SHARED_BYTES[architecture]


@pytest.mark.parametrize(
    "name, architecture, dtype, tokens, even",
    [
        ("up", 80, torch.bfloat16, 64, True),
        ("down", 90, torch.bfloat16, 1, True),
        ("up", 90, torch.float16, 16384, False),
        ("act_backward", 90, torch.float32, 16384, False),
    ],
)
def test_matmuls_compile_for_other_sizes_and_dtypes(compiling, name, architecture, dtype, tokens, even):
    _, shared_bytes, cubin = compiled_matmul(compiling, name, architecture, dtype, tokens, even)
    assert cubin and shared_bytes <= checks.SHARED_BYTES[architecture]


@pytest.mark.parametrize("architecture", checks.TENSOR_CORES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_compile(compiling, name, architecture):
    kernel, warps, constants = OTHERS[name]
    _, shared_bytes, cubin = compiling("moe_kernels", kernel, architecture, "bf16", warps, 1, constants)
    assert cubin and shared_bytes <= checks.SHARED_BYTES[architecture]


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
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_on_gpu_outputs_and_gradients_equal_the_reference(case):
    checks.check_against_reference("cuda", **case)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, hidden, width", [(5, 256, 128), (300, 256, 128), (300, 200, 72)])
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
@pytest.mark.parametrize("check", [*CHECKS, checks.check_cuda_graph, checks.check_random_shapes], ids=checks.check_name)
def test_on_gpu(check):
    check("cuda")
