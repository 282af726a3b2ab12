"""Weights between worlds: torch and safetensors only; no model is built."""

from conversion.merging import merge_checkpoints

__all__ = ["merge_checkpoints"]
