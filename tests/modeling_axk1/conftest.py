"""Processes for Triton, which settles when it is imported whether it interprets."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
import torch


@contextmanager
def process(interpret: str):
    """A function that runs another one in a process of its own, started with TRITON_INTERPRET set so."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", interpret)
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def interpreted():
    with process(interpret="1") as run:
        yield lambda check, **kwargs: run(check, "cpu", **kwargs)


@pytest.fixture(scope="session")
def compiling():
    with process(interpret="0") as run:
        yield run
