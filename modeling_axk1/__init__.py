"""A.X K1 for Transformers: the public names, and the one place where they are registered with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_axk1 import AxK1Config, HubAxK1Config, count_flops, count_parameters
from .generation_axk1 import ThinkingSplit, ThinkingStreamer, set_thinking_tokens, split_thinking
from .modeling_axk1 import (
    AxK1ForCausalLM,
    AxK1ForSequenceClassification,
    AxK1ForTokenClassification,
    AxK1Model,
    AxK1PreTrainedModel,
)

# Transformers ships an `axk1` of its own: exist_ok lets ours take its place, for this process only.
AutoConfig.register("axk1", AxK1Config, exist_ok=True)
AutoConfig.register("AXK1", HubAxK1Config, exist_ok=True)
AutoModel.register(AxK1Config, AxK1Model, exist_ok=True)
AutoModelForCausalLM.register(AxK1Config, AxK1ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(AxK1Config, AxK1ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(AxK1Config, AxK1ForTokenClassification, exist_ok=True)

__all__ = [
    "AxK1Config",
    "AxK1ForCausalLM",
    "AxK1ForSequenceClassification",
    "AxK1ForTokenClassification",
    "AxK1Model",
    "AxK1PreTrainedModel",
    "ThinkingSplit",
    "ThinkingStreamer",
    "count_flops",
    "count_parameters",
    "set_thinking_tokens",
    "split_thinking",
]
