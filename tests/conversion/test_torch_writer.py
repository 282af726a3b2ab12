"""Is a file written as a stream what torch.save would have written, to the last CRC?"""

import argparse
import io
import zipfile

import pytest
import torch

from conversion.checkpoint import HashedFile
from conversion.ops import filled, stored, swap
from conversion.torch_file import open_torch_file
from conversion.torch_writer import frame_of


@pytest.fixture
def numbers(tmp_path):
    """fp32 [3, 700_000] on the disk, as a Mosaic and as itself; more than one block."""
    truth = torch.randn(3, 700_000, generator=torch.Generator().manual_seed(0))
    (tmp_path / "numbers").write_bytes(truth.numpy().tobytes())
    return stored(tmp_path / "numbers", 0, torch.float32, truth.shape), truth


def test_what_is_streamed_is_what_torch_saves(tmp_path, numbers):
    mosaic, truth = numbers
    others = {"turned": swap(mosaic), "none": None}
    others |= {"empty": filled(torch.uint8, (0,), 0), "ones": filled(torch.bfloat16, (7,), 1)}
    args = argparse.Namespace(tp=2, dtype=torch.bfloat16)
    frame, tensors = frame_of({"args": args, "iteration": 7, "model": {"whole": mosaic, **others}})
    ticked = []
    with HashedFile(tmp_path / "x.pt", 2**16) as file:
        frame.write(file, tensors, lambda block: ticked.append(block.nbytes))
    expected = {"whole": truth, "turned": truth.t().contiguous(), "none": None}
    expected |= {"empty": torch.empty(0, dtype=torch.uint8), "ones": torch.ones(7, dtype=torch.bfloat16)}
    found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert found["args"] == args and found["iteration"] == 7 and found["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor is found["model"][name] is None or torch.equal(found["model"][name], tensor), name
    assert sum(ticked) == 2 * truth.nbytes + 14
    torch.save({"args": args, "iteration": 7, "model": expected}, tmp_path / "frame")
    records = []
    for name in ("x.pt", "frame"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None, name
            records.append({e.filename: (e.file_size, e.CRC) for e in archive.infolist() if "/data/" in e.filename})
    assert records[0] == records[1] and len(records[0]) == 4


def test_one_frame_serves_every_tensor_of_its_kind(tmp_path):
    frame, _ = frame_of(filled(torch.float32, (1, 5), 0))
    for value in (1.0, 2.0):
        with HashedFile(tmp_path / "x.pt") as file:
            file.write(b"before")
            frame.write(file, [filled(torch.float32, (5,), value)], lambda block: None)
        content = (tmp_path / "x.pt").read_bytes()[6:]
        assert torch.equal(torch.load(io.BytesIO(content)), torch.full((1, 5), value))
        assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        assert open_torch_file(tmp_path / "x.pt", 6, len(content)).shape == (1, 5)
