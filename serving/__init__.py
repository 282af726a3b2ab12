"""Talking to a checkpoint: a terminal chat and an OpenAI-compatible endpoint. Import from the modules themselves."""
