"""What does a folder hold: its tensors by name, its files byte by byte, and are two folders' tensors the same bits?"""

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
