"""What is in a file that torch.save or pickle wrote, when nothing in it may run?

Unpickling calls what the file names. Here every name is on a list or refused, and what is on the list is a stand-in that does
nothing: Megatron's classes become `Inert` records, tensors become `Mosaic`s, whose numbers stay on the disk.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from conversion.ops import Mosaic, stored

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DTYPES = {
    name: getattr(torch, name)
    for name in """float64 double float32 float float16 half bfloat16 int64 long int32 int int16 short int8 uint8 uint16 uint32
    uint64 bool complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu""".split()
}
# What Megatron checkpoints hold besides tensors: its own enums and configs, numpy's and torch's random states, plans of
# torch's distributed checkpoints, and plain values. None of these names is ever looked up.
INERT_PACKAGES = ("megatron", "transformer_engine", "torch.distributed.checkpoint")
INERT_NAMES = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "_io.BytesIO",
    "io.BytesIO",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    "_codecs.encode",
    # How Python 3.11 pickles the members of an enum: the stand-in gets the class and the name, and looks nothing up.
    "builtins.getattr",
    *(f"builtins.{name}" for name in "list dict tuple int float bool str bytes object".split()),
    "torch.device",
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.Generator",
    "torch._C.Generator",
    "torch.serialization._get_layout",
    "collections.Counter",
    "datetime.timedelta",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
PLAIN = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.slice": slice,
    "builtins.complex": complex,
    "torch.Size": tuple,
}


class Inert:
    """A stand-in for an object of a class that is never imported: keeps its arguments, attributes and items, does nothing."""

    kind = "?"

    def __new__(cls, *args, **kwargs):
        instance = super().__new__(cls)
        instance.args, instance.items = args, {}
        return instance

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        self.state = state
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def append(self, item):
        self.items[len(self.items)] = item

    def extend(self, items):
        for item in items:
            self.append(item)

    def __setitem__(self, key, value):
        self.items[key] = value

    def __repr__(self):
        return f"{self.kind}{self.args}"


class InertDict(dict):
    """For `collections.defaultdict`, without the factory it would call."""

    def __init__(self, *args):
        super().__init__()


class InertUnpickler(pickle.Unpickler):
    """Builds plain values, `Inert` records and `Mosaic`s; ValueError names whatever else the pickle asks for."""

    def __init__(self, file, path: Path, storages: dict[str, tuple[int, int]]):
        super().__init__(file)
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes Python 2's names.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full in PLAIN:
            return PLAIN[full]
        if full == "collections.defaultdict":
            return InertDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if full in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
            return torch.uint8
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in REBUILDERS:
            return REBUILDERS[full]
        inside = any(module == package or module.startswith(package + ".") for package in INERT_PACKAGES)
        if inside or full in INERT_NAMES or (module == "numpy.dtypes" and name.endswith("DType")):
            return type(name, (Inert,), {"kind": full})
        raise ValueError(f"{self.path} asks for {full}, which is not allowed in a checkpoint; do not trust this file.")

    def persistent_load(self, pid: Any) -> Mosaic:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise ValueError(f"{self.path} refers to {pid!r}, which is not a torch storage; do not trust this file.")
        _, dtype, key, _, elements = pid
        start, size = self.storages.get(key, (0, -1))
        if type(elements) is not int or elements < 0 or elements * dtype.itemsize != size:
            raise ValueError(
                f"{self.path}: storage {key!r} should hold {elements} numbers of {dtype} but has {size} bytes; "
                "the file is damaged, fetch it again."
            )
        return stored(self.path, start, dtype, (elements,))


def _rebuild_tensor(storage: Mosaic, offset: int, shape, strides, *_, dtype: torch.dtype | None = None) -> Mosaic:
    """A tensor as a view of its storage, with the checks that torch makes in C++."""
    dtype = storage.dtype if dtype is None else dtype
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
        raise ValueError(f"{storage.tiles[0].path}: a tensor has the sizes {numbers}; the file is damaged.")
    start = storage.tiles[0].start + offset * dtype.itemsize
    tensor = stored(storage.tiles[0].path, start, dtype, shape, strides)
    if (offset + tensor.tiles[0].span) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"{storage.tiles[0].path}: a tensor of shape {list(shape)} reaches past its storage; the file is damaged."
        )
    return tensor


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Mosaic:
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype)


def _first(data, *_):
    return data


def _rebuild_from_type(rebuild, kind, args, state, *_) -> Mosaic:
    """A tensor with attributes, as optimizers keep; only torch's own ways to rebuild one are gone."""
    if rebuild not in REBUILDERS.values():
        raise ValueError(f"a tensor is to be rebuilt by {rebuild!r}")
    return rebuild(*args)


REBUILDERS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}


class _Window(io.RawIOBase):
    """The bytes [start, stop) of a file, as a file."""

    def __init__(self, file, start: int, stop: int):
        self.file, self.start, self.stop, self.place = file, start, stop, start

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + {os.SEEK_SET: self.start, os.SEEK_CUR: self.place, os.SEEK_END: self.stop}[whence]
        return self.place - self.start

    def tell(self):
        return self.place - self.start

    def readinto(self, buffer):
        self.file.seek(self.place)
        wanted = max(0, min(len(buffer), self.stop - self.place))
        count = self.file.readinto(memoryview(buffer)[:wanted])
        self.place += count
        return count


def storage_places(file, start: int, stop: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """Where the records of a torch zip archive begin: the name of its root folder, and {record: (byte, size)}."""
    archive = zipfile.ZipFile(io.BufferedReader(_Window(file, start, stop)))
    places = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {entry.filename} is compressed")
        file.seek(start + entry.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError(f"its record {entry.filename} has no header")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        begin = start + entry.header_offset + 30 + name_bytes + extra_bytes
        if begin + entry.file_size > stop:
            raise ValueError(f"its record {entry.filename} reaches past the end")
        root, _, record = entry.filename.partition("/")
        places[record] = (begin, entry.file_size)
    return root, places


def open_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote at bytes [start, start + length) of a file: tensors as `Mosaic`s, classes as `Inert`s.

    ValueError if it is no torch zip archive, is truncated, compressed or big-endian, or names anything that is not allowed.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if length is None else start + length
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{path} has {size:,} bytes, {stop:,} are needed; it is truncated, fetch it again.")
        try:
            _, places = storage_places(file, start, stop)
            begin, count = places["data.pkl"]
            if "byteorder" in places:
                file.seek(places["byteorder"][0])
                if file.read(places["byteorder"][1]) != b"little":
                    raise ValueError("its numbers are big-endian")
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, struct.error) as error:
            raise ValueError(f"{path} is not a whole file of torch.save ({error}); fetch or save it again.") from error
        file.seek(begin)
        storages = {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}
        return unpickle(io.BytesIO(file.read(count)), path, storages)


def unpickle(file, path: Path, storages: dict[str, tuple[int, int]] | None = None) -> Any:
    """One pickle, inertly. ValueError for whatever is not a sound pickle of allowed names."""
    try:
        return InertUnpickler(file, path, storages or {}).load()
    except ValueError as error:
        # Ours already names the file; the pickle machine's do not.
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} holds a damaged pickle ({error}); fetch or save it again.") from error
    except Exception as error:
        # A pickle from outside can fail in any way its bytes please: as a stand-in called wrongly, as a missing key.
        raise ValueError(f"{path} holds a damaged pickle ({error!r}); fetch or save it again.") from error


def plain(value: Any) -> Any:
    """Namespaces as dicts, members of enums as their names or values, the rest as it is: what JSON or a comparison can hold."""
    if isinstance(value, Inert):
        if value.kind in ("argparse.Namespace", "types.SimpleNamespace"):
            return {name: plain(entry) for name, entry in getattr(value, "state", {}).items()}
        if value.kind == "builtins.getattr" and len(value.args) == 2:
            return plain(value.args[1])
        return plain(value.args[0]) if len(value.args) == 1 else repr(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def numbers_in(value: Any) -> int:
    """How many numbers the tensors of an unpickled object hold, in lists and tuples too."""
    if isinstance(value, Mosaic):
        return value.elements
    return sum(map(numbers_in, value)) if isinstance(value, list | tuple) else 0
