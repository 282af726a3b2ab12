"""Does the reader refuse what is corrupt, and does the writer write what the safetensors library reads?"""

import errno
import fcntl
import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.checkpoint import (
    DTYPES,
    FILE_BLOCK_BYTES,
    HashedFile,
    Job,
    file_block_bytes,
    open_checkpoint,
    plan_shards,
    read_elements,
    read_header,
    sha256_of,
    write_index,
    write_shard,
)


def every_dtype():
    """One tensor of each stored dtype, of odd and of zero sizes."""
    torch.manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    odd = torch.ones(1, dtype=torch.uint8)
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "odd": odd}


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path):
    save_file(every_dtype(), tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path)
    assert stored.keys() == every_dtype().keys()
    for name, truth in every_dtype().items():
        flat = read_elements(stored[name])
        assert flat.dtype == truth.dtype and torch.equal(flat.view(torch.uint8), truth.flatten().view(torch.uint8))
    assert torch.equal(read_elements(stored["F32"], 4, 7), every_dtype()["F32"].flatten()[4:7])


@pytest.mark.parametrize("shard_bytes", [1, 64, 10**9])
def test_what_is_written_the_library_reads(tmp_path, shard_bytes):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    save_file(every_dtype(), source / "model.safetensors")
    # Narrow dtypes first, the order in which the wide ones would not be aligned.
    shards = plan_shards(reversed(open_checkpoint(source).values()), shard_bytes)
    for shard in shards:
        write_shard(out / shard.filename, shard, lambda tensor: iter([read_elements(tensor)]))
        assert all(tensor.start % tensor.dtype.itemsize == 0 for tensor in read_header(out / shard.filename))
    write_index(out, shards)
    read = {name: tensor for shard in shards for name, tensor in load_file(out / shard.filename).items()}
    assert read.keys() == every_dtype().keys() == open_checkpoint(out).keys()
    for name, truth in every_dtype().items():
        assert read[name].dtype == truth.dtype and read[name].shape == truth.shape
        assert torch.equal(read[name].flatten().view(torch.uint8), truth.flatten().view(torch.uint8))
    assert (len(shards) == 1) == (shard_bytes == 10**9)
    assert all(shard.nbytes <= shard_bytes or len([t for t in shard.tensors if t.nbytes]) == 1 for shard in shards)


def test_index_is_the_standard_one(tmp_path):
    tensors = {f"w{i}": torch.randn(4, 4) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = plan_shards(open_checkpoint(tmp_path).values(), 128)
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [shard.filename for shard in shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index["metadata"] == {"total_size": 4 * 64}
    assert index["weight_map"] == {t.name: shard.filename for shard in shards for t in shard.tensors}


@pytest.mark.parametrize("kept", [0, 5, 30, -1], ids="kept{}".format)
def test_truncated_file_is_named(tmp_path, kept):
    save_file({"w": torch.randn(8)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors (is not a whole|is truncated)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"not json", b"", "corrupt safetensors header"),
        (b"[1]", b"", "corrupt safetensors header"),
        ({"w": entry(0, 8)}, b"\0" * 9, "bytes to spare"),
        ({"w": entry(4, 12)}, b"\0" * 12, "hole or an overlap before tensor w"),
        ({"v": entry(0, 8), "w": entry(4, 12)}, b"\0" * 12, "hole or an overlap before tensor w"),
        ({"w": entry(0, 8, (3,))}, b"\0" * 8, "w of 12 bytes is given 8"),
        ({"w": entry(0, 8, (-2,))}, b"\0" * 8, "not a whole number"),
        ({"w": entry(0, 8, ("2",))}, b"\0" * 8, "not a whole number"),
        ({"w": entry(0, 8, dtype="F31")}, b"\0" * 8, "unknown dtype 'F31'"),
        ({"w": {"shape": [2]}}, b"\0" * 8, "data_offsets"),
        ({"w": entry(0, 2**70, (2**68,))}, b"", "truncated"),
    ],
)
def test_corrupt_header_is_refused(tmp_path, header, data, complaint):
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=complaint):
        open_checkpoint(tmp_path)


def test_header_length_beyond_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**31 + 8)  # sparse: nothing is on the disk
    with pytest.raises(ValueError, match="cannot hold its header"):
        open_checkpoint(tmp_path)


def test_file_that_shrinks_after_opening_is_an_error(tmp_path):
    save_file({"w": torch.randn(8)}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path)["w"]
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="ended inside tensor w"):
        read_elements(stored)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "code.bin", 7])
def test_index_may_not_point_outside(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"w": torch.randn(8)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="only .safetensors files beside it"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"w": "a.safetensors"}, "disagree on v"),
        ({"w": "a.safetensors", "v": "a.safetensors", "u": "a.safetensors"}, "disagree on u"),
        ({"w": "a.safetensors", "v": "gone.safetensors"}, "gone.safetensors is missing"),
        (None, "not a safetensors index"),
    ],
)
def test_index_that_disagrees_with_its_shards(tmp_path, weight_map, complaint):
    save_file({"w": torch.randn(8), "v": torch.randn(8)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=complaint):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in "ab":
        save_file({"w": torch.randn(8), name: torch.randn(8)}, tmp_path / f"{name}.safetensors")
    weight_map = {"w": "b.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="disagree"):
        open_checkpoint(tmp_path)


def test_folder_without_or_with_two_kinds_of_weights(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(ValueError, match="both"):
        open_checkpoint(tmp_path)


def test_job_resumes_only_its_own_plan(tmp_path):
    job = Job(tmp_path / "out", {"alpha": 0.8, "sizes": (1, 2)})
    for part in ("one", "gone"):
        (job.folder / part).touch()
        job.record(part, sha256="abc")
    with pytest.raises(ValueError, match="another process"):
        Job(tmp_path / "out", {"alpha": 0.8, "sizes": (1, 2)})
    job.close()
    with pytest.raises(ValueError, match=r"its alpha differ"):
        Job(tmp_path / "out", {"alpha": 0.7, "sizes": (1, 2)})
    (job.folder / "gone").unlink()
    with job.journal.open("ab") as journal:
        journal.write(b'{"part": "two", "sha')  # the process died here
    job = Job(tmp_path / "out", {"alpha": 0.8, "sizes": (1, 2)})
    assert job.done == {"one": {"part": "one", "sha256": "abc"}}
    (job.folder / "two").touch()
    job.record("two")
    job.close()
    job = Job(tmp_path / "out", {"alpha": 0.8, "sizes": (1, 2)})
    assert job.done.keys() == {"one", "two"}
    job.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_job_never_overwrites(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    with pytest.raises(ValueError, match="exists already"):
        Job(tmp_path / "out", {})
    assert [path.name for path in tmp_path.rglob("*")] == [name, "precious"]


def test_a_files_hash_needs_no_newer_python(tmp_path, monkeypatch):
    """hashlib.file_digest is absent in 3.10."""
    data = os.urandom(FILE_BLOCK_BYTES + 7)
    (tmp_path / "file").write_bytes(data)
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_an_error_of_the_source_is_not_said_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError) as error, HashedFile(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()
    assert error.value.filename == str(tmp_path / "gone") and "what is written" not in str(error.value)


def failing_write(monkeypatch, refused: int, number: int) -> list[int]:
    """os.write that fails with the error `number` where one of the `refused` flags is set, or always if it is 0."""
    write, flags_seen = os.write, []

    def checked(descriptor, block):
        flags_seen.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & refused)
        if flags_seen[-1] or not refused:
            raise OSError(number, os.strerror(number))
        return write(descriptor, block)

    monkeypatch.setattr(os, "write", checked)
    return flags_seen


def test_a_failing_write_names_the_output(tmp_path, monkeypatch):
    failing_write(monkeypatch, 0, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left on device; what is written is kept") as error:
        with HashedFile(tmp_path / "out") as file:
            file.write(b"x")
    assert error.value.filename == str(tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system writes through its cache only")
def test_where_the_file_system_cannot_write_past_the_cache_it_writes_through_it(tmp_path, monkeypatch):
    data = os.urandom(2 * FILE_BLOCK_BYTES)
    seen = failing_write(monkeypatch, os.O_DIRECT, errno.EINVAL)
    with HashedFile(tmp_path / "out") as file:
        if not fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            pytest.skip("this file system does not open files past the cache")
        file.write(data)
    assert (tmp_path / "out").read_bytes() == data and seen[0] and file.digest.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize(("largest", "expected"), [(0, 2**16), (10**6, 2**16), (20 * 2**20, 2**21), (2**40, 2**22)])
def test_what_is_under_way_to_the_disk_is_as_small_as_the_checkpoint(tmp_path, largest, expected):
    """Of four files at a time at most 1.2 of the largest tensor; the same bytes whatever the size of a block."""
    assert file_block_bytes(largest) == expected
    data = os.urandom(3 * expected + 5) if expected < 2**22 else b"x" * 5
    with HashedFile(tmp_path / "out", expected) as file:
        file.write(data)
    assert (tmp_path / "out").read_bytes() == data and file.digest.hexdigest() == hashlib.sha256(data).hexdigest()
