"""What every test runs under: one thread, no Hub, and a collector that leaves the libraries alone."""

import gc
import os

# Two OpenMP threads on a contended 2-core machine can be 100 times slower; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# Imports leave no garbage, and looking for it took a second of each process.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_finish():
    # Trainers and accelerate collect garbage often, and each time went through the half million objects of the libraries: 0.3 s.
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    # Else Triton's bindings complain at the end of what was never freed.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
