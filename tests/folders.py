"""What does a folder hold: tensors by name, files byte by byte, are two folders' tensors the same bits? And a full disk."""

import resource
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file


def on_disk(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_bits(out, truth):
    assert out.keys() == truth.keys()
    for name in truth:
        assert out[name].dtype == truth[name].dtype and out[name].shape == truth[name].shape, name
        assert torch.equal(out[name].flatten().view(torch.uint8), truth[name].flatten().view(torch.uint8)), name


@contextmanager
def full_disk(room_bytes: int):
    """No file grows beyond this, which a process sees as it sees a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
