"""How does a policy reach vLLM while it trains?  As its checkpoint would store it.

TRL hands vLLM the parameters as they lie in memory, where routed experts are stacked and a norm has another name, and vLLM's
loader knows neither. In one process with the trainer it also writes them past what vLLM derived at load (latent attention's two
halves of kv_b_proj, packed experts), which then stays as it was.
"""

from collections.abc import Iterator
from itertools import chain

from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from trl.generation.vllm_generation import VLLMGeneration


class StoredWeightsGeneration(VLLMGeneration):
    """TRL's, which has been made and is taken over."""

    def __init__(self, made: VLLMGeneration):
        vars(self).update(vars(made))

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if self.mode == "colocate":
            # vLLM's own way to take other weights, with all that it derives from them. It leaves TRL's loop nothing to do.
            self.llm.llm_engine.model_executor.driver_worker.reload_weights(weights_iterator=self._iter_stored())
        else:
            yield from self._iter_stored()

    def _iter_stored(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a checkpoint, a layer's stacked experts at most at a time."""
        adapted = is_peft_model(self.model)
        model = self.model.get_base_model() if adapted else self.model
        for name, tensor in chain(self._iter_balancing_biases(), super()._iter_named_params()):
            for stored, part in revert_weight_conversion(model, {name: tensor}).items():
                # vLLM keeps some until all are there, and by then the adapter is out of the weights again.
                yield stored, part.clone() if adapted else part

    def _iter_balancing_biases(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers, which TRL leaves out; vLLM counts them among a router's weights, and takes all of those or none."""
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias") and "original_module" not in name:
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield self._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."]), buffer
