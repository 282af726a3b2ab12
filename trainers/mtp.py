"""How does multi-token prediction take part in transformers' Trainer?  A callback: its weight in time, its loss in the log."""

from collections.abc import Sequence

from transformers import TrainerCallback

from modeling_axk1.mtp_axk1 import MTP_SCHEDULE, AxK1CausalLMOutput, mtp_weight


class MTPCallback(TrainerCallback):
    """Sets `config.mtp_loss_weight` before every step and logs `mtp_loss` and `mtp_loss_weight`.

    schedule: (share of training done, weight from there on). The logged loss is what Trainer's own is: of one update, the mean
    over the updates since the last log, this process's tokens only. Pass it with `callbacks=[MTPCallback()]`.
    """

    def __init__(self, schedule: Sequence[tuple[float, float]] = MTP_SCHEDULE):
        self.schedule = tuple(schedule)
        self.total, self.updates, self.hook = 0.0, 0, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not model.config.num_nextn_predict_layers:
            raise ValueError(
                "MTPCallback has nothing to log, as the model has num_nextn_predict_layers=0; leave the callback out."
            )

        def add(module, args_, kwargs_, output):
            if module.training and not isinstance(output, AxK1CausalLMOutput):
                raise ValueError(
                    "this trainer takes the head's loss by itself, as TRL's do, so no prediction layer is trained; leave "
                    "MTPCallback out."
                )
            if module.training and output.mtp_loss is not None:
                # Where the batch's size is known, over all ranks, the losses are shares of one sum, else means.
                ranks = args.world_size if args.average_tokens_across_devices else 1
                shares = 1 / ranks if kwargs_.get("num_items_in_batch") is not None else args.gradient_accumulation_steps
                self.total = self.total + output.mtp_loss / shares

        self.hook = model.register_forward_hook(add, with_kwargs=True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.config.mtp_loss_weight = mtp_weight(state.global_step / max(1, state.max_steps), self.schedule)

    def on_step_end(self, args, state, control, **kwargs):
        self.updates += 1

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self.updates or "loss" not in logs:
            return
        added = {"mtp_loss": float(self.total) / self.updates, "mtp_loss_weight": model.config.mtp_loss_weight}
        logs.update(added)
        # Trainer has kept a copy of the log already.
        state.log_history[-1].update(added)
        self.total, self.updates = 0.0, 0

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()
