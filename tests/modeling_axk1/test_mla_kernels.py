"""Does the decoding step's kernel attend as torch's operators do, and does it compile?  See test_moe_kernels.py for how."""

import pytest
import torch

from modeling_axk1 import mla_kernels

pytest.importorskip("triton", reason="Triton is not installed; pip install triton (Linux)")

from tests.modeling_axk1 import kernel_checks as checks  # noqa: E402

MASKS = ["none", "bool", "add", "nothing seen"]
CHECKS = [
    checks.check_decoding_steps,
    checks.check_attention_operator,
    checks.check_pages,
    checks.check_pages_operator,
]


@pytest.mark.parametrize("mask", MASKS)
def test_attention_over_latents_equals_torch(interpreted, mask):
    interpreted(checks.check_attention, mask=mask, heads=17, tokens=70, latent=36, rope=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_accurate_than_torch(interpreted, dtype):
    interpreted(checks.check_attention, mask="bool", heads=3, tokens=70, latent=36, rope=8, dtype=dtype)
    interpreted(checks.check_pages, dtype=dtype)


@pytest.mark.parametrize("check", CHECKS, ids=checks.check_name)
def test_in_the_interpreter(interpreted, check):
    interpreted(check)


def test_split_covers_the_cache_in_whole_tiles():
    for batch, heads, tokens in ((1, 64, 1), (1, 64, 16384), (1, 16, 131072), (300, 64, 33), (2, 3, 32)):
        for block in (mla_kernels.FEW_HEADS, *mla_kernels.MANY_HEADS.values()):
            parts, part_tokens = mla_kernels.split(block, batch, heads, tokens)
            assert part_tokens % block.tokens == 0
            assert (parts - 1) * part_tokens < tokens <= parts * part_tokens
    assert mla_kernels.split(mla_kernels.FEW_HEADS, 1, 64, 16384)[0] >= 60, "too few programs to fill a GPU"
    assert mla_kernels.split(mla_kernels.HOPPER_HEADS, 1, 64, 16384)[0] >= 120, "too few programs to fill a GPU"


@pytest.mark.parametrize("architecture", checks.TENSOR_CORES)
def test_kernels_compile(compiling, architecture):
    compiled = compiling(checks.compiled_attention, architecture, tokens=1)
    compiled += compiling(checks.compiled_attention, architecture)
    paged = compiling(checks.compiled_pages, architecture)
    assert [c.kernel for c in compiled + paged] == 7 * ["attend", "merge"]
    # Whole vectors go from the pages to shared memory, though none before the table's entry is there.
    assert "cp.async.cg.shared.global" in paged[0].ptx and "ld.global.b16" not in paged[0].ptx
    assert all(checks.LOADS_UNDER_WAY.search(c.ptx) for c in compiled if c.kernel == "attend")
    # The least that a supported GPU has.
    assert all(c.cubin_bytes and c.shared_bytes <= checks.SHARED_BYTES[80] for c in compiled + paged)
    long = compiling(checks.compiled_attention, architecture, tokens=mla_kernels.MANY_TOKENS)
    assert all(c.cubin_bytes and c.shared_bytes <= checks.SHARED_BYTES[architecture] for c in long)
    assert (max(c.shared_bytes for c in long) > checks.SHARED_BYTES[80]) == (architecture > 80)


def test_a_growing_cache_compiles_nothing_new(compiling):
    """Until the number of its parts passes a power of two."""
    before, after = ({c.hash for c in compiling(checks.compiled_attention, 90, tokens)} for tokens in (65, 112))
    assert before == after


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens, dtype", [(70, torch.float32), (5000, torch.bfloat16), (9000, torch.bfloat16)])
def test_on_gpu_attention_over_latents_equals_torch(mask, tokens, dtype):
    checks.check_attention("cuda", mask, heads=64, tokens=tokens, latent=512, rope=64, dtype=dtype)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_gpu_attention_over_pages_equals_torch(dtype):
    checks.check_pages("cuda", latent=512, rope=64, dtype=dtype)


@pytest.mark.gpu
@checks.on_gpu
@pytest.mark.parametrize("check", CHECKS, ids=checks.check_name)
def test_on_gpu(check):
    check("cuda")
