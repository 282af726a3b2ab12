"""How is a model fine-tuned in both modes at once? TRL's SFTTrainer, with each mode's loss seen and both ways to load.

Axes: B rows, S tokens.
"""

from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

# Importing the package is what makes AutoModelForCausalLM build our class for model type axk1.
from modeling_axk1.generation_axk1 import set_thinking_tokens
from trainers.tokenizer import END_THINK, THINK

THINKING, NON_THINKING, NO_MODE = 1, 0, -1


@dataclass
class ThinkFusionConfig(SFTConfig):
    """SFTConfig for Mode-Overlap rows (see `trainers.mode_overlap`): the loss falls on completions only."""

    # Said outright: with None, TRL decides by the columns of the first row.
    completion_only_loss: bool | None = True
    # The default of TRL 1.16; that of 1.14 keeps no per-token loss to split by mode.
    loss_type: str = "nll"


class ThinkFusionTrainer(SFTTrainer):
    """SFTTrainer for any causal LM whose tokenizer has `<think>` and `</think>` as single tokens.

    Logs besides TRL's metrics `loss_thinking`, `loss_non_thinking` (mean over the mode's trained tokens since the last
    log) and `thinking_token_share`. Writes the control-token ids into the model's generation config, so that what is
    saved can `generate(enable_thinking=...)`.

    `model` may be a path: it is then loaded through AutoModelForCausalLM. TRL's own loader takes the class that
    transformers itself has under the name in `architectures`, which for axk1 is not ours.
    """

    def __init__(self, model, args: ThinkFusionConfig, *, processing_class=None, **kwargs):
        if isinstance(model, (str, PathLike)):
            settings = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
            settings |= args.model_init_kwargs or {}
            # Both are used up here: TRL warns about them when it is handed a built model.
            args.model_init_kwargs = None
            if (quantization := kwargs.pop("quantization_config", None)) is not None:
                settings["quantization_config"] = quantization
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, **settings)
        elif processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        set_thinking_tokens(model.generation_config, processing_class)
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.think_token_id, self.end_think_token_id = processing_class.convert_tokens_to_ids([THINK, END_THINK])
        # Rows thinking, non-thinking; columns summed loss, trained tokens.
        self._mode_sums = {"train": torch.zeros(2, 2), "eval": torch.zeros(2, 2)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The parent keeps the per-token losses to itself: a hook is the way to them without a second forward pass or a
        # copy of its method.
        outputs, labels_BS = [], inputs["labels"]
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        modes_BS = mode_of_tokens(inputs["input_ids"], labels_BS, self.think_token_id, self.end_think_token_id)
        sums = loss_by_mode(loss_of_tokens(outputs[0], labels_BS), modes_BS[:, 1:])
        phase = "train" if self.model.training else "eval"
        self._mode_sums[phase] += self.accelerator.reduce(sums, "sum").cpu()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        phase = "train" if self.model.training else "eval"
        prefix = "eval_" if phase == "eval" else ""
        sums = self._mode_sums[phase]
        tokens = {"thinking": sums[0, 1].item(), "non_thinking": sums[1, 1].item()}
        for row, mode in enumerate(tokens):
            if tokens[mode]:
                logs[f"{prefix}loss_{mode}"] = (sums[row, 0] / sums[row, 1]).item()
        if total := sum(tokens.values()):
            logs[f"{prefix}thinking_token_share"] = tokens["thinking"] / total
        sums.zero_()
        super().log(logs, start_time)


def mode_of_tokens(input_ids_BS: Tensor, labels_BS: Tensor, think_id: int, end_think_id: int) -> Tensor:
    """The mode of every trained token [B, S]: THINKING, NON_THINKING, or NO_MODE (untrained, or no control token).

    A stretch of labels other than -100 is a completion, the token before it its control token; a packed row has many.
    """
    trained_BS = labels_BS != -100
    begins_BS = trained_BS.clone()
    begins_BS[:, 1:] &= ~trained_BS[:, :-1]
    position_S = torch.arange(labels_BS.shape[1], device=labels_BS.device)
    begin_BS = torch.where(begins_BS, position_S, 0).cummax(dim=1).values
    control_BS = input_ids_BS.gather(1, (begin_BS - 1).clamp(min=0))
    modes_BS = torch.full_like(labels_BS, NO_MODE)
    # A completion at the very start has no token before it.
    known_BS = trained_BS & (begin_BS > 0)
    modes_BS[known_BS & (control_BS == think_id)] = THINKING
    modes_BS[known_BS & (control_BS == end_think_id)] = NON_THINKING
    return modes_BS


def loss_of_tokens(output, labels_BS: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first [B, S-1], detached; of no meaning where the label is -100."""
    # TRL 1.16 computes it in its fused head and never builds the logits, 1.14 leaves it to the model.
    if "log_probs" in output:
        return -output.log_probs.detach()
    logits_BSV = output.logits.detach()[:, :-1].float()
    return F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS[:, 1:], ignore_index=-100, reduction="none")


def loss_by_mode(loss_BS: Tensor, modes_BS: Tensor) -> Tensor:
    """[[thinking loss, thinking tokens], [non-thinking loss, non-thinking tokens]], sums over all tokens, fp32."""
    rows = []
    for mode in (THINKING, NON_THINKING):
        chosen_BS = modes_BS == mode
        rows.append(torch.stack([loss_BS.float()[chosen_BS].sum(), chosen_BS.sum().float()]))
    return torch.stack(rows)
