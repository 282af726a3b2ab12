"""What one rank of a sharded model computes, holds and reads; imported by the processes that test_parallel.py starts."""

from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.big_modeling import _attach_context_parallel_hooks
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from transformers import BitsAndBytesConfig, DynamicCache, modeling_utils
from transformers.distributed import DistributedConfig

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.modeling_axk1 import AxK1Attention
from modeling_axk1.quantization_axk1 import load_quantized
from tests.cpu_ring import install_ring
from trainers.adapters import lora_config
from trainers.pipeline import pipeline_loss, pipeline_schedule, save_pipeline

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


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


def train_pipeline(path: str, out: str, ids: Tensor, micro_batches: int) -> tuple[Tensor | None, dict]:
    """(loss, gradients of this rank's parameters) of one pipelined step on all rows; the updated model is left in `out`."""
    model = AxK1ForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(pp_size=dist.get_world_size()))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = pipeline_loss(pipeline_schedule(model, micro_batches), ids)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    save_pipeline(model, out)
    return loss, gradients


def train_context_parallel(path: str, ids: Tensor) -> tuple[Tensor, dict]:
    """(loss, gradients), both means over ranks, of a step in which each rank holds a part of every row's tokens.

    As accelerate arranges it: rows, positions and shifted labels are cut by `context_parallel`, masks dropped for causality.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))

    install_ring()
    model = AxK1ForCausalLM.from_pretrained(path, attn_implementation="sdpa").train()
    _attach_context_parallel_hooks(model)
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    tokens = (labels != -100).sum()
    with context_parallel(mesh, buffers=[ids, positions, labels], buffer_seq_dims=[1, 1, 1]):
        assert ids.shape[1] * dist.get_world_size() == 16
        output = model(ids, position_ids=positions, labels=labels, shift_labels=labels, num_items_in_batch=tokens)
        output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for tensor in (loss := output.loss.detach(), *gradients.values()):
        dist.all_reduce(tensor)
    return loss, gradients


@torch.no_grad()
def check_unlike_files(sparse: str, other: str, ids: Tensor) -> dict:
    """Under tensor parallelism: logits from a file that lacks what may be lacking; what is said of one of other sizes."""
    layout = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}
    refused = refusal(lambda: AxK1ForCausalLM.from_pretrained(other, **layout))
    return {"logits": AxK1ForCausalLM.from_pretrained(sparse, **layout)(ids).logits, "refused": refused}


def check_pair(
    path: str,
    equal_heads: str,
    out: str,
    unlike: tuple[str, str],
    mixtures: list[tuple[str, type, str]],
    layouts: dict,
    ids: Tensor,
    mask: Tensor,
) -> tuple:
    """All that two ranks are asked, in one start of them."""
    return (
        check_layouts(path, layouts, ids, mask),
        train_pipeline(path, out, ids, micro_batches=2),
        train_context_parallel(equal_heads, ids_of_16(ids)),
        check_unlike_files(*unlike, ids),
        [check_quantized(*mixture, ids) for mixture in mixtures],
    )


def ids_of_16(ids: Tensor) -> Tensor:
    """Rows of 16 tokens: what two ranks with two pieces each can share."""
    return torch.cat([ids, ids], dim=1)[:, :16].contiguous()


def infer_quantized(model: AxK1ForCausalLM | PeftModel, ids: Tensor) -> dict:
    """Logits, tokens generated, and a loss with its gradients for all that is not quantised."""
    with torch.no_grad():
        found = {"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=6, do_sample=False)}
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach(), "gradients": gradients}


def refusal(act) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def check_quantized(path: str, kind: type, adapter: str, ids: Tensor) -> dict:
    """On this rank: what a model infers and learns with quantised experts of the rank's own, which they are, what it refuses."""
    ranks = dist.get_world_size()
    ways = {"model_class": kind, "distributed_config": DistributedConfig(tp_size=ranks, ep_size=ranks)}
    model = load_quantized(path, BitsAndBytesConfig(**NF4), **ways)
    acts = (lambda: model.save_pretrained("nowhere"), model.dequantize, lambda: lora_config(model, targets=["routed"]))
    names = [name for name in model.state_dict() if ".experts." in name]
    found = infer_quantized(model, ids) | {"experts": names, "refused": [refusal(act) for act in acts]}
    tuned = adapted(model)
    # On every rank: PEFT gathers what is cut over them, the vocabulary, and then leaves it out.
    tuned.save_pretrained(adapter, is_main_process=dist.get_rank() == 0)
    half = load_quantized(path, BitsAndBytesConfig(**NF4), **ways, dtype=torch.bfloat16)
    return found | {"adapted": infer_quantized(tuned, ids), "held": quantized_model_bytes(half)}


def adapted(model: AxK1ForCausalLM) -> PeftModel:
    """Under an adapter beside the routed experts that changes the output, the same one on every rank."""
    parts = ["attention", "shared"] if model.config.model_type == "axk1" else ["attention"]
    tuned = get_peft_model(model, lora_config(model, targets=parts, r=4))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(tuned.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(std=0.08, generator=generator)
    return tuned.eval()


def quantized_model_bytes(model: AxK1ForCausalLM) -> int:
    """Of this rank's weights, scales and code books, in NF4 with double quantisation."""
    # The text holds names of sizes and types, and the offset of a matrix's scales: 4 bytes.
    held = {name: local(t).nbytes for name, t in model.state_dict().items() if "quant_state.bitsandbytes" not in name}
    return sum(held.values()) + 4 * sum("nested_absmax" in name for name in held)
