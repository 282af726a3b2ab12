"""Run one function in several processes that talk over gloo on the loopback, and collect what each returns."""

import gc
import os
import socket
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rank_main(rank: int, world: int, port: int, folder: str, function, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    # As in conftest.py; what the server imported would be copied, too.
    gc.freeze()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(function(*arguments), f"{folder}/rank{rank}.pt")
    # Trainer's end_training has already done it, after a barrier of its own.
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# What every rank's process finds imported, whichever file asks first.
PRELOADED = ["tests.modeling_axk1.parallel_checks", "tests.recipes.launch_checks"]


def forking():
    """A server that has imported the libraries, and forks: a process that is spawned takes seconds to import them."""
    context = get_context("forkserver")
    # Counts where the server does not run yet, so that all who fork have to ask here.
    context.set_forkserver_preload(PRELOADED)
    return context


def run_on_ranks(world: int, folder: Path, function, *arguments) -> list:
    """What `function(*arguments)` returned on each of `world` ranks. It has to be importable: none of a test file's own."""
    forking()
    place = (world, free_port(), str(folder), function, arguments)
    mp.start_processes(rank_main, place, world, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
