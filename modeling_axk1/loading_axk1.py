"""How do ranks read what several of them hold whole?  A part each, gathered afterwards: every byte of a checkpoint once.

Of a tensor that a plan cuts, transformers reads the rank's part; any other it reads whole on every rank: under tensor parallelism
the down-projections to the latents, the routers and the norms. For the time of loading these are cut by rows as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# Dimensions of transformers' mesh along which ranks share what they read; stages hold nothing in common.
SHARING = ("fsdp", "tp")


class Uncut(NamedTuple):
    """A parameter or buffer that several ranks hold alike, as it was, and its stand-in on meta while loading."""

    path: str
    module: nn.Module
    name: str
    original: Tensor
    placements: tuple
    stand_in: Tensor


@contextmanager
def read_in_parts(model: nn.Module) -> Iterator[None]:
    """Around loading a model that transformers has spread over ranks; all of them come here. For any other it does nothing."""
    meshes = getattr(model, "_mesh_manager", None)
    if meshes is None or meshes.get_mesh(SHARING).size() == 1:
        yield
        return
    cut = [uncut for path, module in model.named_modules() for uncut in uncut_of(path, module, meshes)]
    for each in cut:
        own = each.module._buffers if each.name in each.module._buffers else each.module._parameters
        own[each.name] = each.stand_in
    yield
    loaded = [getattr(each.module, each.name) is not each.stand_in for each in cut]
    check_that_ranks_agree(cut, loaded, meshes.get_mesh(SHARING))
    for each, was_loaded in zip(cut, loaded):
        put_back(each, was_loaded)


def uncut_of(path: str, module: nn.Module, meshes) -> Iterator[Uncut]:
    """What ranks hold alike of a module's own parameters and of those of its buffers that checkpoints hold."""
    sharing = [dimension for dimension in SHARING if meshes.get_mesh(dimension).size() > 1]
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    for name, tensor in (module._parameters | buffers).items():
        if tensor is None or tensor.dim() == 0:
            continue
        dimensions, placements = SHARING, (Replicate(), Replicate())
        if isinstance(tensor, DTensor):
            dimensions, placements = tensor.device_mesh.mesh_dim_names, tensor.placements
            if dimensions[-1] == "fsdp":  # and whole along tp
                dimensions, placements = (*dimensions, "tp"), (*placements, Replicate())
        parts = [
            Shard(0) if dimension in sharing and placement == Replicate() else placement
            for dimension, placement in zip(dimensions, placements)
        ]
        if parts == list(placements):
            continue
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        stand_in = distribute_tensor(empty, meshes.get_mesh(dimensions), parts, src_data_rank=None)
        if isinstance(tensor, nn.Parameter):
            stand_in = nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
        yield Uncut(f"{path}.{name}", module, name, tensor, placements, stand_in)


def check_that_ranks_agree(cut: list[Uncut], loaded: list[bool], mesh) -> None:
    """Where the file's tensor has another number of rows, some ranks may find a part that fits, and would wait for the others."""
    counts = torch.tensor(loaded, dtype=torch.int32, device=mesh.device_type)
    for dimension in SHARING:
        dist.all_reduce(counts, group=mesh.get_group(dimension))
    for each, count in zip(cut, counts.tolist()):
        if count not in (0, mesh.size()):
            raise ValueError(
                f"The checkpoint's {each.path} is not {list(each.original.shape)}, as the configuration has it; use the "
                "config.json that belongs to these weights."
            )


@torch.no_grad()
def put_back(uncut: Uncut, was_loaded: bool) -> None:
    """The tensor in its own form again: whole, or as it was if no file holds it."""
    _, module, name, original, placements, _ = uncut
    tensor = original
    if was_loaded:
        tensor = getattr(module, name).detach().redistribute(placements=placements).to_local()
        if isinstance(original, DTensor):
            like = {"shape": original.shape, "stride": original.stride(), "run_check": False}
            tensor = DTensor.from_local(tensor.contiguous(), original.device_mesh, original.placements, **like)
        if isinstance(original, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=original.requires_grad)
        # Or transformers would initialise it.
        tensor._is_hf_initialized = True
    # Loading makes a parameter of all that is cut.
    module._parameters.pop(name, None)
    if isinstance(original, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)
