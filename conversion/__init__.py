"""Weights between worlds: torch and safetensors only; no model is built, no Megatron needed."""

from conversion.adapters import export_adapter, merge_adapter
from conversion.convert import Reading, convert_to_hf, convert_to_megatron, inspect, to_hf, to_megatron, verify
from conversion.merging import merge_checkpoints

__all__ = [
    "Reading",
    "convert_to_hf",
    "convert_to_megatron",
    "export_adapter",
    "inspect",
    "merge_adapter",
    "merge_checkpoints",
    "to_hf",
    "to_megatron",
    "verify",
]
