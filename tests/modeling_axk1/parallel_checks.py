"""What one rank of a sharded model computes, holds and reads; imported by the processes that test_parallel.py starts."""

from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, modeling_utils
from transformers.distributed import DistributedConfig

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.modeling_axk1 import AxK1Attention


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class CountedSlice:
    """A safetensors slice that adds up the bytes read through it."""

    def __init__(self, inner, read: list[int]):
        self.inner, self.read = inner, read

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, index):
        piece = self.inner[index]
        self.read.append(piece.nbytes)
        return piece


class CountedFile:
    def __init__(self, read: list[int], *args, **kwargs):
        self.inner, self.read = OPEN(*args, **kwargs), read

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def get_slice(self, name):
        return CountedSlice(self.inner.get_slice(name), self.read)


OPEN = modeling_utils.safe_open


def load_counted(path: str, **options) -> tuple[AxK1ForCausalLM, int]:
    """The model and the bytes that loading it read from its files."""
    read: list[int] = []
    with mock.patch.object(modeling_utils, "safe_open", lambda *args, **kwargs: CountedFile(read, *args, **kwargs)):
        return AxK1ForCausalLM.from_pretrained(path, **options), sum(read)


@torch.no_grad()
def infer(model: AxK1ForCausalLM, ids: Tensor, mask: Tensor) -> dict:
    """Logits of a full pass and of cached steps, padded tokens generated, and how often a step ran in the absorbed form."""
    model.eval()
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, :6], past_key_values=cache).logits]
    absorbed = mock.Mock(side_effect=AxK1Attention.attend_absorbed)
    with mock.patch.object(AxK1Attention, "attend_absorbed", lambda self, *a, **k: absorbed(self, *a, **k)):
        for i in range(6, ids.shape[1]):
            steps.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    full = model(ids, attention_mask=mask).logits
    return {"logits": full, "steps": torch.cat(steps, dim=1), "tokens": tokens, "absorbed": absorbed.call_count}


def infer_and_train(model: AxK1ForCausalLM, ids: Tensor, mask: Tensor, mine: Tensor) -> dict:
    # First of all: a forward pass leaves the head unsharded under FSDP2, and an optimizer has to get the shards.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    return infer(model, ids, mask) | train(model, optimizer, mine)


def train(model: AxK1ForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict:
    """Loss, whole gradients and whole updated weights of one step on these rows."""
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {
        "loss": loss.detach(),
        "gradients": gradients,
        "updated": {name: whole(p.detach()) for name, p in model.named_parameters()},
    }


def check_layouts(path: str, layouts: dict[str, dict], ids: Tensor, mask: Tensor) -> dict[str, dict]:
    """Of each layout, on this rank: what it reads and holds, infers, and learns from its share of the rows."""
    results = {}
    for name, sizes in layouts.items():
        model, read = load_counted(path, distributed_config=DistributedConfig(**sizes), dtype=torch.float32)
        results[name] = {"read": read, "held": sum(local(p).nbytes for p in model.parameters())}
        if "pp_size" in sizes:  # transformers' pipeline only infers
            results[name] |= infer(model, ids, mask)
        else:
            shares = sizes.get("fsdp_size", 1)
            share = dist.get_rank() // sizes.get("tp_size", 1) % shares
            results[name] |= infer_and_train(model, ids, mask, ids.chunk(shares)[share])
    return results
