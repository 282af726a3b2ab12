"""How are the tensors of one format made of another's, without reading a byte?

A `Mosaic` is a tensor whose numbers lie in files: boxes of it (`Tile`), each a strided view of one file. Every op here moves
boxes about and has its inverse; only `blocks` and `read` touch the disk.

    narrow, split   <->  cat        a shard of tensor parallelism, a padded vocabulary
    split_halves    <->  cat_halves  shards of [gate; up]: each holds its part of both
    unstack         <->  stack      experts or layers in one tensor
    swap, reshape                   their own inverses; GroupedMLP's transposed experts
"""

import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from pathlib import Path

import torch
from torch import Tensor

# Read at a time, at most: large enough that system calls cost nothing, small enough for a core's cache.
MAX_BLOCK_BYTES = 2**20
# Of a transposed tensor, whose every block lies all over the file: the more blocks, the shorter are the pieces that each reads.
TRANSPOSED_BLOCKS = 4
# Of such a block, so much is read before it is put in its place: what a core's cache holds.
ACROSS_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of a tensor: where it begins there, its shape, and where its numbers lie.

    Element (0, ...) is at byte `start` of `path`; `strides` count elements. Without a path the box holds `fill` everywhere.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path | None
    start: int
    strides: tuple[int, ...]
    fill: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last one in the file, both included."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides)) if self.elements else 0


@dataclass(frozen=True, slots=True)
class Mosaic:
    dtype: torch.dtype
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def largest_piece(tensors: Iterable[Mosaic]) -> int:
    """Bytes of the largest box that lies in one file: a whole tensor, or the shard that a rank wrote."""
    return max((tile.elements * t.dtype.itemsize for t in tensors for tile in t.tiles if tile.path), default=0)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(accumulate(shape[:0:-1], lambda a, b: a * b, initial=1))[::-1] if shape else ()


def stored(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None):
    """A tensor that lies in one file as one view; contiguous unless `strides` say otherwise."""
    shape = tuple(shape)
    tile = Tile((0,) * len(shape), shape, path, start, row_major(shape) if strides is None else tuple(strides))
    return Mosaic(dtype, shape, (tile,))


def filled(dtype: torch.dtype, shape: Sequence[int], value: float) -> Mosaic:
    """A constant tensor that lies in no file."""
    shape = tuple(shape)
    return Mosaic(dtype, shape, (Tile((0,) * len(shape), shape, None, 0, row_major(shape), value),))


def _at(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def narrow(tensor: Mosaic, dim: int, start: int, length: int) -> Mosaic:
    """Entries [start, start + length) of one dimension."""
    assert 0 <= start and start + length <= tensor.shape[dim], (tensor.shape, dim, start, length)
    tiles = []
    for tile in tensor.tiles:
        low = max(start, tile.origin[dim])
        high = min(start + length, tile.origin[dim] + tile.shape[dim])
        if low < high:
            skipped = (low - tile.origin[dim]) * tile.strides[dim] * tensor.dtype.itemsize
            origin, shape = _at(tile.origin, dim, low - start), _at(tile.shape, dim, high - low)
            tiles.append(replace(tile, origin=origin, shape=shape, start=tile.start + skipped))
    return Mosaic(tensor.dtype, _at(tensor.shape, dim, length), tuple(tiles))


def split(tensor: Mosaic, dim: int, parts: int) -> list[Mosaic]:
    """Equal parts along one dimension."""
    if tensor.shape[dim] % parts:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} does not split into {parts} along dimension {dim}.")
    size = tensor.shape[dim] // parts
    return [narrow(tensor, dim, i * size, size) for i in range(parts)]


def cat(parts: Sequence[Mosaic], dim: int) -> Mosaic:
    tiles, offset = [], 0
    for part in parts:
        if part.dtype != parts[0].dtype or _at(part.shape, dim, 0) != _at(parts[0].shape, dim, 0):
            shown = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in parts]
            raise ValueError(f"parts of one tensor do not fit each other: {', '.join(shown[:8])}.")
        tiles += [replace(tile, origin=_at(tile.origin, dim, tile.origin[dim] + offset)) for tile in part.tiles]
        offset += part.shape[dim]
    return Mosaic(parts[0].dtype, _at(parts[0].shape, dim, offset), tuple(tiles))


def cat_halves(shards: Sequence[Mosaic]) -> Mosaic:
    """[gate; up] of shards that are [part of gate; part of up]; plain concatenation would interleave the two."""
    halves = [split(shard, 0, 2) for shard in shards]
    return cat([gate for gate, _ in halves] + [up for _, up in halves], 0)


def split_halves(tensor: Mosaic, parts: int) -> list[Mosaic]:
    """The inverse of `cat_halves`."""
    gate, up = split(tensor, 0, 2)
    return [cat(pair, 0) for pair in zip(split(gate, 0, parts), split(up, 0, parts), strict=True)]


def unstack(tensor: Mosaic) -> list[Mosaic]:
    """The entries of the first dimension, without it."""
    sheets: list[list[Tile]] = [[] for _ in range(tensor.shape[0])]
    for tile in tensor.tiles:
        for i in range(tile.shape[0]):
            start = tile.start + i * tile.strides[0] * tensor.dtype.itemsize
            cut = Tile(tile.origin[1:], tile.shape[1:], tile.path, start, tile.strides[1:], tile.fill)
            sheets[tile.origin[0] + i].append(cut)
    return [Mosaic(tensor.dtype, tensor.shape[1:], tuple(tiles)) for tiles in sheets]


def stack(sheets: Sequence[Mosaic]) -> Mosaic:
    """The inverse of `unstack`."""
    assert all((s.dtype, s.shape) == (sheets[0].dtype, sheets[0].shape) for s in sheets), [s.shape for s in sheets]
    tiles = [
        Tile((i, *tile.origin), (1, *tile.shape), tile.path, tile.start, (0, *tile.strides), tile.fill)
        for i, sheet in enumerate(sheets)
        for tile in sheet.tiles
    ]
    return Mosaic(sheets[0].dtype, (len(sheets), *sheets[0].shape), tuple(tiles))


def swap(tensor: Mosaic) -> Mosaic:
    """The last two dimensions exchanged."""

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        return (*values[:-2], values[-1], values[-2])

    tiles = tuple(
        replace(t, origin=swapped(t.origin), shape=swapped(t.shape), strides=swapped(t.strides)) for t in tensor.tiles
    )
    return Mosaic(tensor.dtype, swapped(tensor.shape), tiles)


def reshape(tensor: Mosaic, shape: Sequence[int]) -> Mosaic:
    """The same numbers in the same order under another shape; of one contiguous view only."""
    (tile,) = tensor.tiles
    if tile.strides != row_major(tile.shape) or math.prod(shape) != tensor.elements:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} cannot be viewed as {list(shape)}.")
    return stored(tile.path, tile.start, tensor.dtype, shape)


def covers(tensor: Mosaic) -> bool:
    """Whether the boxes fill the tensor, each place once. Squared in the number of boxes: for tensors of few."""
    boxes = [zip(tile.origin, tile.shape, tensor.shape, strict=True) for tile in tensor.tiles]
    inside = all(o >= 0 and o + n <= s for box in boxes for o, n, s in box)
    apart = all(_disjoint(a, b) for a, b in combinations(tensor.tiles, 2))
    return inside and apart and sum(tile.elements for tile in tensor.tiles) == tensor.elements


def _disjoint(a: Tile, b: Tile) -> bool:
    boxes = zip(a.origin, a.shape, b.origin, b.shape)
    return any(oa + na <= ob or ob + nb <= oa for oa, na, ob, nb in boxes)


def room(nbytes: int) -> Tensor:
    """Bytes from the system, which has them back as soon as they are let go.

    The C library would keep a heap of freed blocks for each thread, and not find one again for an aligned block of the same size:
    of blocks of 1 MB, 4 MB lay there, or none, from run to run.
    """
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Rooms:
    """Memory for blocks, lent to several threads: as much of it as blocks were at hand at once, each from the system once."""

    def __init__(self, block_bytes: int = MAX_BLOCK_BYTES):
        self.block_bytes = min(block_bytes, MAX_BLOCK_BYTES)
        self._free: list[Tensor] = []

    @contextmanager
    def lend(self, nbytes: int = 0) -> Iterator[Tensor]:
        """A block's room, or a larger one of `nbytes`, which stays in its place."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8)
        if len(memory) < max(nbytes, self.block_bytes):
            memory = room(max(nbytes, self.block_bytes))
        try:
            yield memory
        finally:
            self._free.append(memory)


def read(tensor: Mosaic, memory: Tensor | None = None) -> Tensor:
    """The whole tensor, at the beginning of the bytes `memory`; in fresh ones if it and what is read around it do not fit."""
    needed = tensor.nbytes + _around_bytes(tensor)
    memory = room(needed) if memory is None or len(memory) < needed else memory
    out = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    for tile in tensor.tiles:
        _read_tile(tile, _box(out, tile), memory[tensor.nbytes :])
    return out


def _around_bytes(tensor: Mosaic) -> int:
    """What the largest part takes that is read as it lies in its file, before it is put in its place."""
    moved = [tile for tile in tensor.tiles if tile.path and not _is_in_place(tile, tensor.shape)]
    size = tensor.dtype.itemsize
    return max((_across_bytes(tile, size) if _lies_across(tile) else tile.span * size for tile in moved), default=0)


def _is_in_place(tile: Tile, whole: tuple[int, ...]) -> bool:
    """Whether the numbers lie in the file as they will in the tensor, without gaps in either."""
    # Strides of dimensions of size 1 say nothing.
    packed = all(n == 1 or s == p for n, s, p in zip(tile.shape, tile.strides, row_major(tile.shape)))
    return packed and tile.shape[1:] == whole[1:]


def blocks(tensor: Mosaic, rooms: Rooms | None = None) -> Iterator[Tensor]:
    """The numbers in order, as flat tensors that fill a room at most; of transposed tensors, a quarter at a time.

    All in the same memory: a block is gone when the next one comes.
    """
    rooms = rooms or Rooms()
    with rooms.lend(lent_bytes(tensor)) as memory:
        for (part,) in _row_blocks(rooms.block_bytes, tensor):
            yield read(part, memory).flatten()


def same_bits(a: Mosaic, b: Mosaic, rooms: Rooms | None = None) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, a block at a time."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), (a.dtype, a.shape, b.dtype, b.shape)
    rooms = rooms or Rooms()
    nbytes = lent_bytes(a, b)
    with rooms.lend(nbytes) as ours, rooms.lend(nbytes) as theirs:
        pairs = _row_blocks(rooms.block_bytes, a, b)
        return all(torch.equal(_bytes(read(x, ours)), _bytes(read(y, theirs))) for x, y in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _row_blocks(block_bytes: int, *tensors: Mosaic) -> Iterator[list[Mosaic]]:
    """The same blocks of rows of several tensors of one shape."""
    tensor = tensors[0]
    if not tensor.shape or not tensor.elements:
        yield list(tensors)
        return
    rows = max(1, block_bytes // max(_row_bytes(each) for each in tensors))
    if any(is_transposed(each) for each in tensors):
        rows = -(-tensor.shape[0] // TRANSPOSED_BLOCKS)
    for start in range(0, tensor.shape[0], rows):
        yield [narrow(each, 0, start, min(rows, tensor.shape[0] - start)) for each in tensors]


def lent_bytes(*tensors: Mosaic) -> int:
    """What a block of transposed tensors takes, in its place and around it; 0 for others, which fill a room."""
    tensor = tensors[0]
    if not tensor.elements or not any(is_transposed(each) for each in tensors):
        return 0
    return max(part.nbytes + _around_bytes(part) for parts in _row_blocks(0, *tensors) for part in parts)


def _row_bytes(tensor: Mosaic) -> int:
    """What a row takes: itself, and where it is a part of wider rows, what lies between it and the next one in the file."""
    wide = [tile.strides[0] for tile in tensor.tiles if tile.path and not _is_in_place(tile, tensor.shape)]
    return (tensor.elements // tensor.shape[0] + max(wide, default=0)) * tensor.dtype.itemsize


def is_transposed(tensor: Mosaic) -> bool:
    """Whether rows lie across the file: a block of them lies all over it, so that each would read nearly the whole."""
    return any(len(tile.shape) > 1 and tile.strides[0] < tile.strides[-1] for tile in tensor.tiles)


def _lies_across(tile: Tile) -> bool:
    """Whether a part of two dimensions can be read in pieces of its columns, each without a gap."""
    return len(tile.shape) == 2 and tile.strides[0] == 1 and tile.strides[1] > 1


def _across_bytes(tile: Tile, itemsize: int) -> int:
    """Some whole columns of such a part."""
    rows, columns = tile.shape
    return rows * itemsize * min(columns, max(1, ACROSS_BYTES // (rows * itemsize)))


def _box(out: Tensor, tile: Tile) -> Tensor:
    for dim, (origin, size) in enumerate(zip(tile.origin, tile.shape)):
        out = out.narrow(dim, origin, size)
    return out


def _read_tile(tile: Tile, out: Tensor, around: Tensor) -> None:
    """Read a part into its box of the whole, by way of the bytes `around` if it lies otherwise in its file."""
    if tile.path is None:
        out.fill_(tile.fill)
        return
    in_place = _is_in_place(tile, out.shape) and out.is_contiguous()
    if not in_place and tile.elements and _lies_across(tile):
        _read_across(tile, out, around)
        return
    flat = out.view(-1) if in_place else around[: tile.span * out.dtype.itemsize].view(out.dtype)
    if flat.numel():
        read_exactly(tile.path, tile.start, memoryview(flat.view(torch.uint8).numpy()), "a tensor")
    if not in_place:
        out.copy_(flat.as_strided(tile.shape, tile.strides, flat.storage_offset()))


def _read_across(tile: Tile, out: Tensor, around: Tensor) -> None:
    """Some columns at a time, each a piece of the file."""
    size, (rows, columns) = out.dtype.itemsize, tile.shape
    step = _across_bytes(tile, size) // (rows * size)
    for first in range(0, columns, step):
        count = min(step, columns - first)
        pieces = around[: count * rows * size]
        start = tile.start + first * tile.strides[1] * size
        read_pieces(tile.path, start, tile.strides[1] * size, rows * size, memoryview(pieces.numpy()), "a tensor")
        out.narrow(1, first, count).copy_(pieces.view(out.dtype).view(count, rows).t())


@contextmanager
def still_there(path: Path) -> Iterator[None]:
    """A source file that was found before: that it is gone says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        reason = f"{error.strerror}, but it was there before; put it back as it was and run the same again"
        raise OSError(error.errno, reason, str(path)) from error


def read_exactly(path: Path, start: int, buffer: memoryview, what: str) -> None:
    """Fill the buffer from byte `start` of a file. ValueError if the file ends inside it, OSError if it is gone.

    A plain read, not a memory map: a map of a file that shrinks meanwhile kills the process, a short read is an error.
    """
    read_pieces(path, start, 0, max(1, len(buffer)), buffer, what)


def read_pieces(path: Path, start: int, stride: int, piece_bytes: int, buffer: memoryview, what: str) -> None:
    """Fill the buffer with pieces of a file, one after the other: the first from byte `start`, each `stride` bytes further."""
    with still_there(path), path.open("rb", buffering=0) as file:
        for number, place in enumerate(range(0, len(buffer), piece_bytes)):
            file.seek(start + number * stride)
            piece = buffer[place : place + piece_bytes]
            # Linux hands out at most 2 GiB a call.
            while len(piece):
                count = file.readinto(piece)
                if not count:
                    raise ValueError(f"{path} ended inside {what}; it has changed since it was opened.")
                piece = piece[count:]
