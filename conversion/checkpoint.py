"""How do a checkpoint's tensors come off the disk and get back onto it, a block at a time, whatever its size?

A checkpoint is a mapping from tensor name to `StoredTensor`; opening one reads headers only.
Output goes to the folder `OUT.partial`, with a journal beside it; one rename at the end makes it `OUT`.
"""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from conversion.ops import read_exactly, still_there
from modeling_axk1.configuration_axk1 import in_units

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The limit of the safetensors library itself: a longer header is an attack or a corrupt length.
MAX_HEADER_BYTES = 100_000_000
# How the file begins that a clone without git-lfs has in the place of a large one.
LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of a tensor, but for its place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """One tensor in a safetensors file; `start` is its first byte, counted from the beginning of the file."""

    path: Path
    start: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name and the tensors it will hold, in the order of their bytes."""

    filename: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes, checked against the size of the file.

    ValueError names the file and what is wrong: truncated, not safetensors, holes or overlaps, unknown dtypes.
    """
    header, data_start = _read_json_header(path)
    header.pop("__metadata__", None)
    try:
        tensors = [_parse_entry(path, name, entry, data_start) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from error
    return _check_layout(path, tensors, data_start, path.stat().st_size)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, as `{"format": "pt"}`."""
    metadata = _read_json_header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_json_header(path: Path) -> tuple[dict, int]:
    """The header, and where the data begin."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8]:
            raise ValueError(f"{path} is a pointer of Git LFS and not the weights; run git lfs pull, or hf download.")
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else file_bytes
        if 8 + header_bytes > file_bytes or header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} is not a whole safetensors file: {file_bytes:,} bytes cannot hold its header; fetch it again."
            )
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise _corrupt(path, error) from error
    if not isinstance(header, dict):
        raise _corrupt(path, f"it is a {type(header).__name__}")
    return header, 8 + header_bytes


def _corrupt(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} has a corrupt safetensors header ({why}); fetch or save it again.")


def _parse_entry(path: Path, name: str, entry: dict, data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']!r}")
    shape = tuple(entry["shape"])
    if len(shape) > 8 or not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a shape or an offset that is not a whole number")
    tensor = StoredTensor(name, DTYPES[entry["dtype"]], shape, path, data_start + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"tensor {name} of {tensor.nbytes:,} bytes is given {end - begin:,}")
    return tensor


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, file_bytes: int) -> list[StoredTensor]:
    tensors = sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes))
    expected = data_start
    for tensor in tensors:
        if tensor.start != expected:
            raise ValueError(f"{path} has a hole or an overlap before tensor {tensor.name}; fetch or save it again.")
        expected += tensor.nbytes
    if expected != file_bytes:
        raise ValueError(
            f"{path} is truncated or has bytes to spare: its header describes {expected:,} bytes, "
            f"the file has {file_bytes:,}; fetch or save it again."
        )
    return tensors


def open_checkpoint(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder with `model.safetensors` or an index and its shards, by name, in the order on disk.

    ValueError if a file is missing, corrupt or outside the folder, or if index and shards disagree.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is out of date.")
    if single.exists():
        return {tensor.name: tensor for tensor in read_header(single)}
    if not index.exists():
        raise ValueError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a folder of safetensors.")
    weight_map = _read_weight_map(index)
    tensors = [tensor for name in sorted(set(weight_map.values())) for tensor in read_header(folder / name)]
    found = {tensor.name: tensor.path.name for tensor in tensors}
    wrong = sorted(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
    if wrong or len(found) != len(tensors):
        raise ValueError(f"{index} and its shards disagree on {listed(wrong)}; save the checkpoint again.")
    return {tensor.name: tensor for tensor in tensors}


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        filenames = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error!r}); save the checkpoint again.") from error
    for filename in filenames:
        # A name with a folder in it could point anywhere on the disk: indexes are downloaded, hence untrusted.
        if type(filename) is not str or Path(filename).name != filename or not filename.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {filename!r}; only .safetensors files beside it are read.")
        if not (index.parent / filename).is_file():
            raise ValueError(f"{index.parent / filename} is missing, but {index.name} names it; fetch it.")
    return weight_map


def read_elements(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Elements [start, stop) of a stored tensor, flat, in its own dtype, in fresh memory."""
    stop = tensor.elements if stop is None else stop
    assert 0 <= start <= stop <= tensor.elements, (tensor.name, start, stop)
    flat = torch.empty(stop - start, dtype=tensor.dtype)
    place = tensor.start + start * tensor.dtype.itemsize
    read_exactly(tensor.path, place, bytes_of(flat), f"tensor {tensor.name}")
    return flat


def read_json(path: Path) -> dict:
    """The fields of a JSON file; ValueError if it is missing or holds something else."""
    try:
        said = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; give the folder of a model, or fetch it whole.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or save it again.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds a {type(said).__name__} instead of fields; fetch or save it again.")
    return said


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a flat contiguous tensor as bytes, without a copy."""
    return memoryview(flat.view(torch.uint8).numpy())


def deal(pieces: Iterable, limit_bytes: int) -> list[list]:
    """Pieces (with `nbytes`) in their order, in groups of at most so many bytes; a larger piece is alone."""
    groups: list[list] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.nbytes > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.nbytes
    return groups


def plan_shards(tensors: Iterable[TensorSpec], shard_bytes: int) -> list[Shard]:
    """Deal tensors, in their order, to files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes={shard_bytes} is not positive; 5 GB is {5 * 10**9}.")
    groups = deal(tensors, shard_bytes)
    # Wide dtypes first: then every tensor starts at a multiple of its item size, as a memory map needs it.
    ordered = [tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)) for group in groups]
    if len(ordered) == 1:
        return [Shard(WEIGHTS_NAME, ordered[0])]
    return [Shard(f"model-{i:05d}-of-{len(ordered):05d}.safetensors", group) for i, group in enumerate(ordered, 1)]


# Handed to the hash and the disk at a time, at least and at most, and how many of them a file has: one is filled, one hashed,
# one written.
MIN_BLOCK_BYTES, FILE_BLOCK_BYTES, FILE_BLOCKS = 2**16, 2**22, 3


def file_block_bytes(largest_bytes: int) -> int:
    """The size of a file's blocks, of the largest of a checkpoint's tensors: a tenth of it, within bounds.

    Four files at a time, each with the block that is read for it, then hold less than twice the largest tensor, whatever its
    size.
    """
    tenth = largest_bytes // 10
    return max(MIN_BLOCK_BYTES, min(FILE_BLOCK_BYTES, tenth // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES))


class HashedFile:
    """A file in the making: what it is given is hashed by one thread and written by another, while the caller reads on.

    It goes past the system's cache where the file system can (O_DIRECT): the disk then works all along instead of at the end,
    no core copies the bytes once more, and a checkpoint larger than memory does not drive everything else out of it.
    OSError of a write says which file, and that nothing is lost. `digest` is whole once the file is closed.
    """

    def __init__(self, path: Path, block_bytes: int = FILE_BLOCK_BYTES):
        self.path, self.block_bytes = path, block_bytes
        self.digest, self._written, self._filled = hashlib.sha256(), 0, 0

    def __enter__(self) -> "HashedFile":
        self._descriptor = open_uncached(self.path)
        # Anonymous maps begin at a page, as O_DIRECT wants it; private ones are counted as what they are, this process's memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._blocks = deque(mmap.mmap(-1, self.block_bytes, flags=flags) for _ in range(FILE_BLOCKS))
        self._underway: deque[tuple[Future, Future]] = deque()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def write(self, piece: bytes | memoryview) -> None:
        piece = memoryview(piece)
        while len(piece):
            count = min(len(piece), self.block_bytes - self._filled)
            self._blocks[0][self._filled : self._filled + count] = piece[:count]
            piece, self._filled = piece[count:], self._filled + count
            if self._filled == self.block_bytes:
                self._hand_over()

    def tell(self) -> int:
        return self._written + self._filled

    def _hand_over(self) -> None:
        block = memoryview(self._blocks[0])[: self._filled]
        self._underway.append((self._hasher.submit(self.digest.update, block), self._writer.submit(self._put, block)))
        self._blocks.rotate(-1)
        self._written, self._filled = self._written + self._filled, 0
        if len(self._underway) == FILE_BLOCKS:
            self._await_oldest()

    def _await_oldest(self) -> None:
        for future in self._underway.popleft():
            future.result()

    def _put(self, block: memoryview) -> None:
        while len(block):
            if len(block) % mmap.PAGESIZE:
                # The end of the file, which O_DIRECT cannot write.
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno == errno.EINVAL and self._is_uncached():
                    # Opened past the cache, and yet the file system cannot write so.
                    fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)
                    continue
                reason = f"{error.strerror}; what is written is kept: mend this and run the same again"
                raise OSError(error.errno, reason, str(self.path)) from error

    def _is_uncached(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None:
                if self._filled:
                    self._hand_over()
                while self._underway:
                    self._await_oldest()
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)
            os.close(self._descriptor)


def open_uncached(path: Path) -> int:
    """A descriptor that writes a new file past the system's cache; through it where the file system has no other way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)


def write_shard(
    path: Path,
    shard: Shard,
    blocks: Callable[[TensorSpec], Iterator[Tensor]],
    block_bytes: int = FILE_BLOCK_BYTES,
) -> str:
    """Write one safetensors file, header first, then each tensor's flat `blocks` as they come; return its sha256.

    Nothing is held but the block at hand and what is under way to the disk.
    """
    with HashedFile(path, block_bytes) as file:
        for piece in _pieces(shard, blocks):
            file.write(piece)
    return file.digest.hexdigest()


def _pieces(shard: Shard, blocks: Callable[[TensorSpec], Iterator[Tensor]]) -> Iterator[bytes | memoryview]:
    yield shard_header(shard)
    for tensor in shard.tensors:
        written = 0
        for block in blocks(tensor):
            assert block.dtype == tensor.dtype, (tensor.name, block.dtype)
            written += block.nbytes
            yield bytes_of(block)
        assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)


def shard_header(shard: Shard) -> bytes:
    """The length and the JSON that open a safetensors file."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in shard.tensors:
        offsets = [begin, begin + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype_name, "shape": tensor.shape, "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, shards: list[Shard]) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.filename for shard in shards for tensor in shard.tensors}
    total_bytes = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


# The journal's last line.
PUBLISHING = {"publishing": True}


def _is_taken(path: Path) -> bool:
    """Whether something is there that a rename would not replace, or should not."""
    return path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))


class Job:
    """An output folder in the making, which a killed process can take up again.

    `plan` is all that decides the output's bytes: a job left behind by another plan is a ValueError, not a mixture.
    `done` maps each finished file in `folder` to what `record` was told of it; `published` says that the last process
    died between the final rename and the cleaning up. One process at a time: the journal is locked.
    """

    def __init__(self, out: str | Path, plan: Mapping):
        # Absolute, so that "." has a name.
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.journal = self.out.with_name(self.out.name + ".partial.jsonl")
        if not self.journal.exists():
            self._check_free()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.journal.open("a+b")
        except OSError as error:
            reason = f"{error.strerror}; nothing can be written there, choose another place"
            raise OSError(error.errno, reason, str(self.out)) from error
        try:
            self._lock()
            self._take_up(json.loads(json.dumps(plan)))
        except ValueError:
            self.close()
            raise

    def _check_free(self) -> None:
        for path in (self.out, self.folder):
            if _is_taken(path):
                raise ValueError(f"{path} exists already; choose another name or remove it.")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{self.folder} is being written by another process; wait for it or stop it.") from error

    def _take_up(self, plan: dict) -> None:
        self._file.seek(0)
        # A line without its end was being written when the process died: that part counts as not done.
        whole = [line for line in self._file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self._file.truncate(sum(map(len, whole)))
        try:
            first, *parts = [json.loads(line) for line in whole] or [plan]
            done = {line["part"]: line for line in parts if "part" in line}
            changed = sorted(key for key in plan.keys() | first.keys() if plan.get(key) != first.get(key))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.journal} is no journal of ours ({error!r}); delete it and {self.folder.name}."
            ) from error
        if changed:
            raise ValueError(
                f"{self.folder} was left by another job (its {listed(changed)} differ); "
                f"finish that one, or delete the folder and {self.journal.name}."
            )
        # Said before the rename: a folder of that name that somebody else made is not the result.
        self.published = PUBLISHING in parts and _is_taken(self.out) and not self.folder.exists()
        if not self.published:
            if whole and _is_taken(self.out):
                raise ValueError(f"{self.out} has appeared meanwhile; move it out of the way and run the same again.")
            self.folder.mkdir(exist_ok=True)
        if not whole:
            self._check_free()
            self._append(plan)
        self.done = {name: line for name, line in done.items() if (self.folder / name).is_file()}

    def _append(self, line: Mapping) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self, part: str, **facts) -> None:
        """Note that the file `part` is written, whole."""
        self.done[part] = {"part": part, **facts}
        self._append(self.done[part])

    def publish(self) -> None:
        """Make the finished folder `out`, in one rename, and forget the journal."""
        if not self.published:
            for path in [*self.folder.rglob("*"), self.folder]:
                _sync(path)
            if _is_taken(self.out):
                reason = "it has appeared meanwhile; move it out of the way and run the same again"
                raise OSError(errno.EEXIST, reason, str(self.out))
            self._append(PUBLISHING)
            self.folder.rename(self.out)
            _sync(self.out.parent)
        self.journal.unlink()

    def abandon(self) -> None:
        """Forget the journal and all that was written."""
        self.journal.unlink()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let go of the lock; what is written stays for the next process."""
        self._file.close()


class Stopped(Exception):
    """Another file has failed, and this one need not be finished."""


@dataclass(frozen=True)
class OutFile:
    """A file to be written: `write(path, tick)` writes it, calls `tick(block)` behind each block of tensors, and returns facts
    for the journal, its sha256 among them."""

    name: str
    nbytes: int
    write: Callable[[Path, Callable[[Tensor], None]], Mapping]


def shard_file(
    shard: Shard, blocks: Callable[[TensorSpec], Iterator[Tensor]], block_bytes: int = FILE_BLOCK_BYTES
) -> OutFile:
    """The output file of a shard whose tensors come as flat `blocks`."""

    def write(path: Path, tick: Callable[[Tensor], None]) -> Mapping:
        def ticked(tensor: TensorSpec) -> Iterator[Tensor]:
            for block in blocks(tensor):
                yield block
                tick(block)

        return {"sha256": write_shard(path, shard, ticked, block_bytes)}

    return OutFile(shard.filename, shard.nbytes, write)


def write_files(job: Job, files: list[OutFile], *, workers: int, progress: bool, label: str) -> None:
    """Write the files that the job has not yet, `workers` at a time, each recorded as soon as it is whole.

    What an earlier process recorded is read once more: a power cut may have taken what was in the cache. OSError before the
    first byte if the disk cannot hold the rest; an error in one file stops all.
    """
    check_space(job.folder, sum(file.nbytes for file in files if file.name not in job.done))
    lock, stopped = threading.Lock(), threading.Event()
    with progress_bar(label, sum(file.nbytes for file in files), progress) as bar:

        def tick(block: Tensor) -> None:
            if stopped.is_set():
                raise Stopped
            with lock:
                bar.update(block.nbytes)

        def write(file: OutFile) -> Mapping:
            path = job.folder / file.name
            if file.name in job.done and sha256_of(path) == job.done[file.name].get("sha256"):
                with lock:
                    bar.update(file.nbytes)
                return job.done[file.name]
            path.parent.mkdir(parents=True, exist_ok=True)
            return file.write(path, tick)

        for name, facts in _written(write, files, workers, stopped):
            if facts is not job.done.get(name):
                job.record(name, **facts)


def _written(
    write: Callable[[OutFile], Mapping], files: list[OutFile], workers: int, stopped: threading.Event
) -> Iterator[tuple[str, Mapping]]:
    """(name, facts) of each file as soon as it is written; one worker is this thread itself."""
    if workers == 1:
        yield from ((file.name, write(file)) for file in files)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(write, file): file.name for file in files}
        try:
            yield from ((waiting[future], future.result()) for future in as_completed(waiting))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def progress_bar(label: str, total_bytes: int, progress: bool) -> tqdm:
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label, disable=not progress)


# In blocks, as hashlib.file_digest came with Python 3.11. trainers/safeguards.py has its own: neither room imports the other.
def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(FILE_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def identity(paths: Iterable[Path]) -> list[list]:
    """What stands for the content of source files in a job's plan: names, sizes and times."""
    facts = []
    for path in sorted(set(paths)):
        with still_there(path):
            stat = path.stat()
        facts.append([f"{path.parent.name}/{path.name}", stat.st_size, stat.st_mtime_ns])
    return facts


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed_bytes: int) -> None:
    """OSError before the first byte rather than hours later, if the disk cannot hold what is still to be written."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        reason = f"{in_units(needed_bytes)} are still to be written and {in_units(free_bytes)} are free"
        raise OSError(errno.ENOSPC, f"{reason}; free some space and run the same again", str(folder))


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
