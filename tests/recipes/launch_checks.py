"""What one rank does in test_launch.py; imported by the processes that it starts."""

from recipes import generate_sharded, train_pipeline
from trainers.sft import run_sft


def run_recipes(chat: list[str], pipeline: list[str], sft: list[str]) -> tuple[list[str], list[float] | None, list[float]]:
    """(what the model said in full and in 4 bits, losses of the pipelined training, losses of the sharded SFT)."""
    said = [generate_sharded.main(chat), generate_sharded.main([*chat, "--four-bit"])]
    losses = train_pipeline.main(pipeline)
    log = run_sft(sft).state.log_history
    return said, losses, [entry["loss"] for entry in log if "loss" in entry]
