"""Does context parallelism run where there are CPUs only?  torch's ring attention, around the CPU's flash kernel.

torch registers its ring for three CUDA kernels; `install_ring()` registers it for the CPU's, in this process.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# The tokens' dimension: [batch, heads, tokens, width].
TOKENS = 2


def install_ring() -> None:
    """From here on `context_parallel` takes attention to CPU tensors over the ranks, too."""
    _attention.custom_ops[FORWARD.default] = attend
    _attention.custom_ops[BACKWARD.default] = attend_backward


def attend(op, args, kwargs) -> list[DTensor]:
    query, key, value, _, is_causal = args
    pieces = [piece.to_local() for piece in (query, key, value)]
    mesh = query.device_mesh
    found = _attention._templated_ring_attention(mesh.get_group(), TOKENS, FORWARD, *pieces, is_causal=is_causal, **kwargs)
    return over_ranks(found, mesh)


def attend_backward(op, args, kwargs) -> list[DTensor]:
    names = ("grad_out", "query", "key", "value", "out", "logsumexp")
    pieces = {name: piece.to_local().contiguous() for name, piece in zip(names, args)}
    mesh = args[0].device_mesh
    found = _attention._templated_ring_attention_backward(
        mesh.get_group(), TOKENS, BACKWARD, grad_out_name="grad_out", **pieces, dropout_p=args[6], is_causal=args[7], **kwargs
    )
    return over_ranks(found, mesh)


def over_ranks(pieces: list[Tensor], mesh) -> list[DTensor]:
    return [DTensor.from_local(piece, mesh, [Shard(TOKENS)], run_check=False) for piece in pieces]
