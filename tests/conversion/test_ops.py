"""Does moving boxes about give what the same moves give on tensors, and does each op undo its inverse?"""

import random
import struct

import pytest
import torch

from conversion.ops import (
    Mosaic,
    Rooms,
    Tile,
    blocks,
    cat,
    cat_halves,
    covers,
    filled,
    narrow,
    read,
    reshape,
    room,
    same_bits,
    split,
    split_halves,
    stack,
    stored,
    swap,
    unstack,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@pytest.fixture
def on_disk(tmp_path):
    """Puts tensors into files, each behind bytes that are not its own."""
    generator, count = torch.Generator().manual_seed(0), iter(range(1000))

    def make(*shape, dtype=torch.float32):
        tensor = (100 * torch.randn(shape, generator=generator)).to(dtype)
        path = tmp_path / f"{next(count)}.bin"
        path.write_bytes(b"\xff" * 13 + bytes(tensor.flatten().view(torch.uint8).tolist()) + b"\xff" * 5)
        return tensor, stored(path, 13, dtype, shape)

    return make


def assert_same(mosaic, tensor):
    assert mosaic.shape == tensor.shape and mosaic.dtype == tensor.dtype
    assert torch.equal(read(mosaic), tensor)
    assert covers(mosaic) or not mosaic.elements
    for block_bytes in (1, 64, 10**6):
        flat = torch.cat([tensor.new_empty(0), *(block.clone() for block in blocks(mosaic, Rooms(block_bytes)))])
        assert torch.equal(flat, tensor.flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (6, 10), (4, 6, 5), (1, 1), (3, 1)], ids=str)
def test_what_is_stored_is_read(on_disk, shape, dtype):
    tensor, mosaic = on_disk(*shape, dtype=dtype)
    assert_same(mosaic, tensor)


@pytest.mark.parametrize("seed", range(30))
def test_chains_of_ops_equal_torch(on_disk, seed):
    rng = random.Random(seed)
    tensor, mosaic = on_disk(6, 12)
    other, other_mosaic = on_disk(6, 12)
    for _ in range(6):
        op = rng.choice(["narrow", "cat", "swap", "halves", "split", "stack"])
        dim = rng.randrange(2)
        if op == "narrow" and tensor.shape[dim] > 2:
            start = rng.randrange(tensor.shape[dim] - 1)
            length = rng.randint(1, tensor.shape[dim] - start)
            tensor, mosaic = tensor.narrow(dim, start, length), narrow(mosaic, dim, start, length)
            other, other_mosaic = other.narrow(dim, start, length), narrow(other_mosaic, dim, start, length)
        elif op == "cat":
            tensor, mosaic = torch.cat([tensor, other], dim), cat([mosaic, other_mosaic], dim)
            other, other_mosaic = torch.cat([other, other], dim), cat([other_mosaic, other_mosaic], dim)
        elif op == "swap":
            tensor, mosaic = tensor.mT, swap(mosaic)
            other, other_mosaic = other.mT, swap(other_mosaic)
        elif op == "split" and tensor.shape[dim] % 2 == 0:
            tensor, mosaic = tensor.chunk(2, dim)[1], split(mosaic, dim, 2)[1]
            other, other_mosaic = other.chunk(2, dim)[0], split(other_mosaic, dim, 2)[0]
        elif op == "stack":
            tensor, mosaic = torch.stack([other, tensor])[1], unstack(stack([other_mosaic, mosaic]))[1]
        assert_same(mosaic, tensor)


def test_halves_are_not_interleaved(on_disk):
    tensor, mosaic = on_disk(8, 3)
    shards = split_halves(mosaic, 2)
    assert torch.equal(read(shards[0]), torch.cat([tensor[0:2], tensor[4:6]]))
    assert_same(cat_halves(shards), tensor)
    # The classic bug: plain concatenation of such shards is another matrix.
    assert not torch.equal(read(cat(shards, 0)), tensor)


def test_grouped_experts_are_viewed_not_sliced(on_disk):
    """GroupedMLP's weight1: memory of [E, H, F] under the shape [H, E * F]."""
    tensor, mosaic = on_disk(4, 6)
    truth = tensor.view(3, 4, 2).transpose(1, 2)
    for expert, matrix in enumerate(unstack(reshape(mosaic, (3, 4, 2)))):
        assert_same(swap(matrix), truth[expert])


def test_constants_and_padding(on_disk):
    tensor, mosaic = on_disk(3, 4)
    padded = cat([mosaic, filled(torch.float32, (2, 4), 0.0)], 0)
    assert_same(padded, torch.cat([tensor, torch.zeros(2, 4)]))
    assert_same(narrow(padded, 0, 0, 3), tensor)
    assert_same(filled(torch.bfloat16, (5,), 1.0), torch.ones(5, dtype=torch.bfloat16))


def test_holes_and_overlaps_are_seen(on_disk):
    _, mosaic = on_disk(4, 4)
    upper, lower = (narrow(mosaic, 0, start, 2).tiles[0] for start in (0, 2))

    def moved(tile, row):
        return Tile((row, 0), tile.shape, tile.path, tile.start, tile.strides)

    def of(*tiles):
        return Mosaic(torch.float32, (4, 4), tiles)

    assert covers(of(moved(upper, 0), moved(lower, 2)))
    assert not covers(of(moved(upper, 0)))
    assert not covers(of(moved(upper, 0), moved(lower, 1)))
    assert not covers(of(moved(upper, 0), moved(lower, 3)))
    assert not covers(of(moved(upper, -1), moved(lower, 2)))
    assert not covers(of(moved(upper, 0), moved(lower, 2), moved(lower, 2)))


def test_a_block_and_what_is_read_around_it_fit_one_room(on_disk):
    """A rank's columns of a matrix: seven eighths of what is read belong to others."""
    tensor, mosaic = on_disk(300, 128)
    part = narrow(mosaic, 1, 16, 16)
    held, rooms = [], Rooms(2**13)
    for block in blocks(part, rooms):
        held.append(block.clone())
        assert block.untyped_storage().nbytes() == 2**13
    assert torch.equal(torch.cat(held), tensor[:, 16:32].flatten()) and len(rooms._free) == 1
    # 64 bytes of a row and the 512 to the next one
    assert max(block.numel() for block in held) == 2**13 // 576 * 16


def test_same_bits_tells_one_bit_and_nan_payloads(tmp_path):
    values = [0x3F800000, 0x7FC00000, 0x80000000]
    paths = [tmp_path / name for name in "abc"]
    for path, changed in zip(paths, (values, values, [0x3F800000, 0x7FC00001, 0x80000000])):
        path.write_bytes(struct.pack("<3I", *changed))
    a, b, c = (stored(path, 0, torch.float32, (3,)) for path in paths)
    # NaN differs from itself as a number, and -0.0 equals 0.0: neither matters here.
    assert same_bits(a, b) and not same_bits(a, c)


def test_a_file_that_shrinks_is_an_error(on_disk):
    _, mosaic = on_disk(50, 50)
    mosaic.tiles[0].path.write_bytes(b"short")
    with pytest.raises(ValueError, match="it has changed since it was opened"):
        read(mosaic)


def test_a_transposed_tensor_is_read_by_quarters(on_disk, monkeypatch):
    """GroupedMLP's experts: a quarter of one at a time and a few columns as they lie in the file, in memory asked for once."""
    monkeypatch.setattr("conversion.ops.ACROSS_BYTES", 5 * 6 * 4 + 1)
    matrix, mosaic = on_disk(96, 42)
    gate = narrow(swap(mosaic), 0, 0, 21)
    sizes, rooms = [], Rooms(64)
    monkeypatch.setattr("conversion.ops.room", lambda nbytes: sizes.append(nbytes) or room(nbytes))
    for _ in range(2):
        assert torch.cat([block.clone() for block in blocks(gate, rooms)]).equal(matrix[:, :21].t().flatten())
    assert sizes == [6 * 96 * 4 + 5 * 6 * 4]
    assert same_bits(gate, gate, rooms) and len(sizes) == 2 and max(sizes) == sizes[0]
