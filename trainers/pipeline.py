"""How does a model train as a pipeline? transformers puts each rank's layers on it, torch.distributed.pipelining runs the schedule.

    model = AxK1ForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(pp_size=ranks))
    schedule = pipeline_schedule(model, micro_batches=8)
    loss = pipeline_loss(schedule, ids)    # forward and backward; the loss on the last rank, None on the others

transformers' own forward of such a model is for inference: it returns no loss and lets one rank work at a time.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers.core_model_loading import revert_weight_conversion

from modeling_axk1 import AxK1ForCausalLM


class StageForward(nn.Module):
    """A rank's part of the model as one function: token ids [B, Q] or hidden states [B, Q, H] in, hidden states or logits out."""

    def __init__(self, model: AxK1ForCausalLM):
        super().__init__()
        self.model = model
        self.first, self.last = model._pp_stage.pp_is_first_stage, model._pp_stage.pp_is_last_stage

    def forward(self, x: Tensor) -> Tensor:
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        # What a rank does not hold (embedding, other ranks' layers, norm) is an identity in its model.
        hidden = self.model.model(**given, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden) if self.last else hidden


def next_token_loss(logits_BQV: Tensor, ids_BQ: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of each token from the second on; micro-batches of equal size average to the batch's."""
    return F.cross_entropy(logits_BQV[:, :-1].float().flatten(0, 1), ids_BQ[:, 1:].flatten())


def pipeline_schedule(model: AxK1ForCausalLM, micro_batches: int, loss=next_token_loss) -> Schedule1F1B:
    """One forward, one backward in turn, on the ranks over which `model` was loaded with `pp_size`. ValueError for another model.

    Gradients are of the mean over micro-batches. There have to be at least as many micro-batches as ranks.
    """
    if getattr(model.config, "distributed_config", None) is None or model.config.distributed_config.pp_size == 1:
        raise ValueError("This model is on no pipeline; load it with distributed_config=DistributedConfig(pp_size=N).")
    place = model._pp_stage
    stage = PipelineStage(StageForward(model), place.pp_rank, place.pp_size, model.device, group=place.pp_group)
    return Schedule1F1B(stage, micro_batches, loss_fn=loss)


def pipeline_loss(schedule: PipelineScheduleSingle, ids_BQ: Tensor) -> Tensor | None:
    """Forward and backward of one batch, which every rank is given; returns the mean loss on the last rank, None elsewhere."""
    stage, losses = schedule._stage, []
    given = (ids_BQ,) if stage.is_first else ()
    wanted = {"target": ids_BQ, "losses": losses} if stage.is_last else {}
    schedule.step(*given, **wanted)
    return torch.stack(losses).mean().detach() if stage.is_last else None


def save_pipeline(model: AxK1ForCausalLM, folder: str) -> None:
    """Write each rank's weights as one file of a checkpoint that loads anywhere; all ranks call this, on one file system."""
    place, out = model._pp_stage, Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in revert_weight_conversion(model, model.state_dict()).items()}
    file = f"model-{place.pp_rank + 1:05d}-of-{place.pp_size:05d}.safetensors"
    save_file(tensors, out / file, metadata={"format": "pt"})
    mine = ({name: file for name in tensors}, sum(t.nbytes for t in tensors.values()))
    all_files = [None] * place.pp_size
    dist.all_gather_object(all_files, mine, group=place.pp_group)
    if place.pp_is_first_stage:
        weight_map = {name: file for names, _ in all_files for name, file in names.items()}
        index = {"metadata": {"total_size": sum(size for _, size in all_files)}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
