"""How does a model train with its layers spread over ranks? The loop on one page: torch's 1F1B schedule, AdamW, a checkpoint.

torchrun --nproc-per-node 4 -m recipes.train_pipeline MODEL TEXT OUT --micro-batches 16

TEXT is a file of plain text, cut into rows of equal length. OUT is a checkpoint like any other.
"""

import argparse

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.distributed import DistributedConfig

from modeling_axk1 import AxK1ForCausalLM
from trainers.pipeline import pipeline_loss, pipeline_schedule, save_pipeline


def rows_of(tokenizer, text: str, length: int) -> torch.Tensor:
    """Token ids [rows, length]; what does not fill a row is left out."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def clip_gradients(model, largest: float) -> None:
    """As clip_grad_norm_, by the norm over all stages."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
    dist.all_reduce(square, group=model._pp_stage.pp_group)
    for gradient in gradients:
        gradient.mul_((largest / (square.sqrt() + 1e-6)).clamp(max=1).to(gradient.dtype))


def train(
    path: str, text: str, out: str, *, batch: int, micro_batches: int, length: int, steps: int, rate: float
) -> list[float] | None:
    """The loss of each step, on the last rank; None on the others."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    layout = DistributedConfig(pp_size=dist.get_world_size())
    # fp32 weights, as AdamW wants them; under bf16 autocast the kernels are as fast as with bf16 weights.
    model = AxK1ForCausalLM.from_pretrained(path, distributed_config=layout, dtype="float32").train()
    rows = rows_of(tokenizer, text, length).to(model.device)
    if len(rows) < batch:
        raise ValueError(f"The text fills {len(rows)} rows of {length} tokens, a batch has {batch}; give more text.")
    schedule = pipeline_schedule(model, micro_batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step in tqdm(range(steps), unit="step", disable=dist.get_rank() > 0):
        # The same rows on every rank: the first reads them, the last predicts them.
        chosen = torch.randint(len(rows), (batch,), generator=torch.Generator().manual_seed(step))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            losses.append(pipeline_loss(schedule, rows[chosen.to(rows.device)]))
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_pipeline(model, out)
    if model._pp_stage.pp_is_first_stage:
        tokenizer.save_pretrained(out)
    return [loss.item() for loss in losses] if losses[-1] is not None else None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name")
    parser.add_argument("text", metavar="TEXT", help="a file of plain text, UTF-8")
    parser.add_argument("out", metavar="OUT", help="where the trained model goes, on a file system that all ranks see")
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument(
        "--micro-batches", type=int, default=16, help="pieces of a step; as many as ranks, better 4 times"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-5, help="AdamW's learning rate")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[float] | None:
    options = parse(arguments)
    if not dist.is_initialized():
        dist.init_process_group()
    with open(options.text, encoding="utf-8") as file:
        text = file.read()
    sizes = {"batch": options.batch, "micro_batches": options.micro_batches, "length": options.length}
    losses = train(options.model, text, options.out, **sizes, steps=options.steps, rate=options.rate)
    if losses:
        print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {options.out}")
    return losses


if __name__ == "__main__":
    main()
