"""How is a file of torch.save written whose numbers come as a stream, held by nobody?

Torch itself saves the object with its tensors left out; their numbers go in between as they come, and the CRC-32 of each behind
them, where a zip archive has it: in a descriptor that follows the record, and in the directory at the end.
"""

import errno
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from conversion.checkpoint import HashedFile, bytes_of
from conversion.ops import Mosaic, Rooms, blocks
from conversion.torch_file import open_torch_file

DESCRIPTOR = b"PK\x07\x08"
# The fixed part of a directory's entry, where in it the CRC is and where the lengths of its three texts are.
ENTRY_BYTES, ENTRY_CRC, ENTRY_LENGTHS = 46, 16, 28


@dataclass(frozen=True)
class Frame:
    """What torch.save writes besides numbers: a piece before the first tensor's, one between two, one behind the last's."""

    pieces: tuple[bytes, ...]
    crc_places: tuple[int, ...]  # where in the last piece the directory has the CRC of each tensor

    def write(self, file: HashedFile, tensors: Sequence[Mosaic], tick: Callable[[Tensor], None]) -> None:
        """The whole file; `tensors` in the order of their bytes."""
        *pieces, last = self.pieces
        crcs: list[int] = []
        rooms = Rooms(file.block_bytes)
        for piece, tensor in zip(pieces, tensors, strict=True):
            file.write(_described(piece, crcs))
            crc = 0
            for block in blocks(tensor, rooms):
                crc = zlib.crc32(bytes_of(block), crc)
                file.write(bytes_of(block))
                tick(block)
            crcs.append(crc)
        last = bytearray(_described(last, crcs))
        for place, crc in zip(self.crc_places, crcs, strict=True):
            struct.pack_into("<I", last, place, crc)
        file.write(last)


def _described(piece: bytes, crcs: list[int]) -> bytes:
    """A piece that follows numbers begins with their descriptor."""
    if not crcs:
        return piece
    assert piece.startswith(DESCRIPTOR), piece[:8]
    return DESCRIPTOR + struct.pack("<I", crcs[-1]) + piece[8:]


def frame_of(content: Any) -> tuple[Frame, list[Mosaic]]:
    """The frame of `content`, in which Mosaics (also in dicts) stand for tensors, and these in the order of their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame"
        _save_hollow(path, content)
        placed = sorted(_placed(open_torch_file(path), content), key=lambda pair: pair[0])
        entries = _directory(path)
        pieces, place = [], 0
        with path.open("rb") as hollow:
            for start, tensor in placed:
                hollow.seek(place)
                pieces.append(hollow.read(start - place))
                place = start + tensor.nbytes
            hollow.seek(place)
            pieces.append(hollow.read())
    crc_places = tuple(entries[start] + ENTRY_CRC - place for start, _ in placed)
    return Frame(tuple(pieces), crc_places), [tensor for _, tensor in placed]


def _save_hollow(path: Path, content: Any) -> None:
    """A sparse file of torch.save in which the numbers of all tensors are left out."""
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        try:
            torch.save(_hollow(content), path)
        except RuntimeError as error:
            # Torch's writer has no other name for a disk that is full.
            reason = f"torch could not write it ({error}); mend this and run the same again"
            raise OSError(errno.EIO, reason, str(path)) from error


def _hollow(content: Any) -> Any:
    if isinstance(content, Mosaic):
        return torch.empty(content.shape, dtype=content.dtype)
    if isinstance(content, dict):
        return type(content)((key, _hollow(value)) for key, value in content.items())
    return content


def _placed(found: Any, content: Any) -> Iterator[tuple[int, Mosaic]]:
    """(where its numbers begin, tensor) of every tensor that has numbers."""
    if isinstance(content, Mosaic) and content.elements:
        yield found.tiles[0].start, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _placed(found[key], value)


def _directory(path: Path) -> dict[int, int]:
    """Where the archive's directory has the entry of the record that begins at a byte."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        place = archive.start_dir
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            # An empty record begins where nothing of its own is; it has no CRC to be mended.
            if entry.file_size:
                places[start] = place
            file.seek(place + ENTRY_LENGTHS)
            place += ENTRY_BYTES + sum(struct.unpack("<HHH", file.read(6)))
    return places
