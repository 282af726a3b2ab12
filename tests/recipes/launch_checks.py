"""What one rank does in test_launch.py; imported by the processes that it starts."""

import os
import runpy
import sys
from unittest import mock

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from recipes import generate_sharded, train_pipeline
from tests.cpu_ring import install_ring
from trainers import pretrain_run, rl  # noqa: F401  (imported before ranks are forked)
from trainers.sft import run_sft


def run_recipes(
    folder: str, chats: list[list[str]], pipeline: list[str], sft: list[str]
) -> tuple[list[str], list[float] | None, list[float]]:
    """(what the model said to each, losses of the pipelined training, losses of the sharded SFT)."""
    os.chdir(folder)
    said = [generate_sharded.main(chat) for chat in chats]
    losses = train_pipeline.main(pipeline)
    log = run_sft(sft).state.log_history
    return said, losses, [entry["loss"] for entry in log if "loss" in entry]


def run_module(folder: str, module: str, arguments: list[str]) -> None:
    """As `python -m module` in that folder. A command that fails raises."""
    os.chdir(folder)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{module} ended with {end.code}"


def run_as_on_gpus(folder: str, module: str, arguments: list[str], environment: dict[str, str]) -> None:
    """`run_module` with what accelerate's launcher puts into the environment.

    accelerate has FSDP and context parallelism for GPUs, and refuses both where it finds processes on CPUs: here it finds GPUs,
    which are to be reached by gloo and as device "cpu". All else is its own, and torch's ring goes around the CPU's kernel.
    """
    os.environ |= environment | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    install_ring()
    found = ("gloo", DistributedType.MULTI_GPU)
    with mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: found):
        run_module(folder, module, arguments)


def run_code(folder: str, code: str) -> str:
    """The name of the class that the block's `model` has, and how many heads this rank computes."""
    os.chdir(folder)
    names = {}
    exec(code, names)
    return f"{type(names['model']).__name__}, {names['model'].model.layers[0].self_attn.q_b_proj.weight.to_local().shape[0]}"
