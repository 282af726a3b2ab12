"""What is in a file that torch.save or pickle wrote, when nothing in it may run?

Unpickling calls what the file names. Here a name is on a list, or of a package on a list, or refused; and whatever is not refused
is a stand-in that does nothing: classes become `Inert` records, tensors `Mosaic`s, whose numbers stay on the disk.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conversion.checkpoint import LFS_POINTER
from conversion.ops import Mosaic, stored

# No checkpoint's tensor has more, nor any file a larger pickle (a whole K1 in one rank file: 20 MB): more is an attack.
MAX_DIMENSIONS = 8
MAX_PICKLE_BYTES = 2**30
# A few bytes of a pickle can hold a list a thousand times in each of many lists. Looking ends here instead: at a key of a
# dict (the longest is two dtypes), an `_extra_state`, all arguments of a run with their texts.
MAX_KEY_PARTS, MAX_STATE_PARTS, MAX_ARGUMENT_PARTS = 64, 2**12, 2**24
# What is to be done where a file is not whole; and how one of torch before 1.6 begins.
CUT_OFF = "a save or a copy broke off, fetch or save it again, or take an earlier iteration"
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
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
# torch's distributed checkpoints, activation functions, and plain values. None of these names is ever looked up.
INERT_PACKAGES = ("megatron", "transformer_engine", "torch.distributed.checkpoint", "torch.nn.functional", "torch._C._nn")
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
    *(f"builtins.{name}" for name in "list dict tuple set frozenset int float bool str bytes object".split()),
    "torch.device",
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.Generator",
    "torch._C.Generator",
    "torch.serialization._get_layout",
    "collections.Counter",
    "functools.partial",
    "datetime.timedelta",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
class Record(NamedTuple):
    """Where an archive's record lies in the file, and the CRC-32 that the archive says it has."""

    start: int
    size: int
    crc: int


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
        # Without its arguments: their text may have no end.
        return f"a {self.kind}"


class InertDict(dict):
    """For `collections.defaultdict`, without the factory it would call."""

    def __init__(self, *args):
        super().__init__()

    @staticmethod
    def __setstate__(state):
        # Of an instance or of the class itself, which a pickle could otherwise change for everyone.
        raise ValueError("a defaultdict has no state")


class StateDict(InertDict):
    """For `collections.OrderedDict`. Its attributes (a module's `_metadata`) say nothing of the weights."""

    def __init__(self, *args):
        if args:
            raise ValueError("an OrderedDict is made of entries that it should be filled with")

    @staticmethod
    def __setstate__(state):
        pass


PLAIN = {
    "collections.OrderedDict": StateDict,
    "collections.defaultdict": InertDict,
    "builtins.slice": slice,
    "builtins.complex": complex,
    "torch.Size": tuple,
}


class Rebuilder:
    """One of torch's functions that rebuild a tensor. No function of ours: a pickle may set attributes of what it names."""

    __slots__ = ("rebuild",)

    def __init__(self, rebuild: Callable[..., Mosaic]):
        object.__setattr__(self, "rebuild", rebuild)

    def __call__(self, *args) -> Mosaic:
        return self.rebuild(*args)

    def __setattr__(self, name, value):
        raise ValueError("a function has no state")

    def __setstate__(self, state):
        raise ValueError("a function has no state")


# Of what a dict's keys may be made; each is hashed once, or at a glance.
KEYS = (str, bytes, int, float, type(None), torch.dtype, type, Inert)


def check_key(key: Any) -> None:
    """ValueError for a dict's key that may never be hashed, as a tuple that holds one tuple twice, at each of many levels."""
    left, parts = [key], 0
    while left:
        one, parts = left.pop(), parts + 1
        if type(one) is tuple and len(one) + parts <= MAX_KEY_PARTS:
            left += one
        elif type(one) is int and one.bit_length() > 64 or not isinstance(one, KEYS):
            raise ValueError(f"a {type(one).__name__} is part of a dict's key")


def _checked(load: Callable, keys: slice) -> Callable:
    """A step of the pickle machine whose keys, so many of the stack's topmost part, are looked at first."""

    def step(machine: pickle._Unpickler) -> None:
        for key in machine.stack[keys]:
            check_key(key)
        load(machine)

    return step


def _refused(machine: pickle._Unpickler) -> None:
    raise ValueError("it asks for room for a bytearray")


# The machine in Python: the one in C reserves memory for whatever number a pickle gives to its memo.
class InertUnpickler(pickle._Unpickler):
    """Builds plain values, `Inert` records and `Mosaic`s; ValueError names whatever else the pickle asks for."""

    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: _checked(pickle._Unpickler.load_setitem, slice(-2, -1)),
        pickle.SETITEMS[0]: _checked(pickle._Unpickler.load_setitems, slice(None, None, 2)),
        pickle.DICT[0]: _checked(pickle._Unpickler.load_dict, slice(None, None, 2)),
        pickle.ADDITEMS[0]: _checked(pickle._Unpickler.load_additems, slice(None)),
        pickle.FROZENSET[0]: _checked(pickle._Unpickler.load_frozenset, slice(None)),
        pickle.BYTEARRAY8[0]: _refused,
    }

    def __init__(self, file, path: Path, storages: dict[str, Record]):
        super().__init__(file)
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes Python 2's names.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full in PLAIN:
            return PLAIN[full]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if full in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
            return torch.uint8
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in REBUILDERS:
            return REBUILDERS[full]
        inside = any(module == package or module.startswith(package + ".") for package in INERT_PACKAGES)
        # Python 3.10 and older pickle a signal, of Megatron's arguments, by its name alone.
        named = (module == "numpy.dtypes" and name.endswith("DType")) or (module == "signal" and name.startswith("SIG"))
        if inside or full in INERT_NAMES or named:
            return type(name, (Inert,), {"kind": full})
        raise ValueError(f"{self.path} asks for {full}, which is not allowed in a checkpoint; do not trust this file.")

    def persistent_load(self, pid: Any) -> Mosaic:
        kind, dtype, key, _, elements = pid if isinstance(pid, tuple) and len(pid) == 5 else (None,) * 5
        if not (kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)):
            raise ValueError(f"{self.path} refers to {shown(pid)}, which is not a torch storage; do not trust this file.")
        start, size, _ = self.storages.get(key, (0, -1, 0))
        if not is_size(elements) or elements * dtype.itemsize != size:
            raise ValueError(
                f"{self.path}: storage {key!r} should hold {shown(elements)} numbers of {dtype} but has {size} bytes; "
                "the file is damaged, fetch it again."
            )
        return stored(self.path, start, dtype, (elements,))


def is_size(value: Any) -> bool:
    """Whether this is a number that can count bytes or numbers of a file."""
    return type(value) is int and 0 <= value < 2**63


def shown(value: Any) -> str:
    """What an error says of a value from a pickle: a text, a number or a few of them as they are, else only its kind."""
    entries = value if type(value) in (list, tuple) else (value,)
    # Python writes no whole number of more than 4,300 digits.
    simple = len(entries) <= 32 and all(
        entry is None or isinstance(entry, str | float) or (isinstance(entry, int) and entry.bit_length() < 1000)
        for entry in entries
    )
    return repr(value)[:300] if simple else f"a {getattr(value, 'kind', type(value).__name__)}"


def _rebuild_tensor(storage: Mosaic, offset: int, shape, strides, *_, dtype: torch.dtype | None = None) -> Mosaic:
    """A tensor as a view of its storage, with the checks that torch makes in C++."""
    dtype = storage.dtype if dtype is None else dtype
    numbers = (offset, *shape, *strides)
    wrong = not all(map(is_size, numbers)) or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS
    # A tensor of more numbers than its storage repeats some: no weight does, and its size may be anything.
    if wrong or math.prod(shape) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"{storage.tiles[0].path}: a tensor of {storage.nbytes} bytes has the offset, sizes and strides "
            f"{shown(numbers[:17])}; the file is damaged."
        )
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
    if not isinstance(rebuild, Rebuilder):
        raise ValueError(f"a tensor is to be rebuilt by {shown(rebuild)}")
    return rebuild(*args)


REBUILDERS = {
    "torch._utils._rebuild_tensor": Rebuilder(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Rebuilder(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Rebuilder(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": Rebuilder(_first),
    "torch._utils._rebuild_parameter_with_state": Rebuilder(_first),
    "torch._tensor._rebuild_from_type_v2": Rebuilder(_rebuild_from_type),
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


def records_of(file, start: int, stop: int) -> dict[str, Record]:
    """The records of a torch zip archive, by their names without the root folder. ValueError for what torch never writes."""
    archive = zipfile.ZipFile(io.BufferedReader(_Window(file, start, stop)))
    places: dict[str, Record] = {}
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
        record = entry.filename.partition("/")[2]
        if record in places:
            raise ValueError(f"it holds the record {record} twice")
        places[record] = Record(begin, entry.file_size, entry.CRC)
    return places


def open_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote at bytes [start, start + length) of a file: tensors as `Mosaic`s, classes as `Inert`s.

    ValueError if it is no torch zip archive, is truncated, compressed or big-endian, or names anything that is not allowed.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if length is None else start + length
        if not 0 <= start <= stop <= size:
            reason = _reason(file, size) or "it is truncated, fetch it again"
            raise ValueError(f"{path} has {size:,} bytes, {stop:,} are needed; {reason}.")
        try:
            records = records_of(file, start, stop)
            content = _read_pickle(file, records["data.pkl"])
            if "byteorder" in records:
                file.seek(records["byteorder"].start)
                if file.read(records["byteorder"].size) != b"little":
                    raise ValueError("its numbers are big-endian")
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, NotImplementedError, struct.error) as error:
            reason, where = _reason(file, size) or CUT_OFF, str(path)
            if length is not None:
                reason = "the file is damaged, or of another save than .metadata; fetch it again"
                where = f"what .metadata places at byte {start:,} of {path}"
            raise ValueError(f"{where} is not a whole file of torch.save ({error}); {reason}.") from error
    storages = {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}
    return unpickle(io.BytesIO(content), path, storages)


def _reason(file, size: int) -> str | None:
    """What the first bytes say of a file that cannot be read, and what to do; None if nothing."""
    file.seek(0)
    begins = file.read(24)
    if not size:
        return f"it is empty: {CUT_OFF}"
    if begins.startswith(LFS_POINTER):
        return "it is a pointer of Git LFS and not the file itself, run git lfs pull"
    if not any(begins):
        return f"it holds zeros where it should begin: {CUT_OFF}"
    if begins.startswith(OLD_TORCH):
        return "torch before 1.6 wrote it, load and save it again with a newer one"
    return None


def _read_pickle(file, record: Record) -> bytes:
    file.seek(record.start)
    content = _read_some(file, record.size)
    # 0 where torch was told to leave it out. A single wrong bit in a key would be another model.
    if record.crc and zlib.crc32(content) != record.crc:
        raise ValueError("its pickle is damaged: another CRC than the archive says")
    return content


def _read_some(file, size: int) -> bytes:
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {size:,} bytes")
    return file.read(size)


def open_pickle(path: Path) -> Any:
    """The object in a file that is one pickle, as `.metadata` is."""
    with path.open("rb") as file:
        try:
            content = _read_some(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise ValueError(f"{path} is too large ({error}); fetch or save it again.") from error
        whole = content.rstrip(b"\0\r\n ").endswith(pickle.STOP)
        if reason := _reason(file, len(content)) or (not whole and f"it lacks its end: {CUT_OFF}"):
            raise ValueError(f"{path} is not a whole pickle of {len(content):,} bytes; {reason}.")
    return unpickle(io.BytesIO(content), path)


def unpickle(file, path: Path, storages: dict[str, Record] | None = None) -> Any:
    """One pickle, inertly. ValueError for whatever is not a sound pickle of allowed names.

    file: in memory. Of a real file a few bytes could ask to read any number of bytes, for which there would have to be room.
    """
    try:
        return InertUnpickler(file, path, storages or {}).load()
    except ValueError as error:
        # Ours already names the file; the pickle machine's do not.
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} holds a damaged pickle ({error}); fetch or save it again.") from error
    except Exception as error:
        # A pickle from outside can fail in any way its bytes please: as a stand-in called wrongly, as a missing key.
        reason = f"{type(error).__name__}: {shown(error.args[0])}" if error.args else type(error).__name__
        raise ValueError(f"{path} holds a damaged pickle ({reason}); fetch or save it again.") from error


class Budget:
    """How much of a value may still be looked at: one list a thousand times in each of many lists would never end."""

    def __init__(self, parts: int):
        self.left = self.parts = parts

    def spend(self, parts: int = 1) -> None:
        self.left -= parts
        if self.left < 0:
            raise ValueError(f"a value in it has more than {self.parts:,} parts; it is damaged, do not trust it")


def plain(value: Any, depth: int = 6, budget: Budget | None = None) -> Any:
    """Namespaces as dicts, members of enums as names or values, what is named as its name; what lies deeper is None."""
    budget = budget or Budget(MAX_ARGUMENT_PARTS)
    budget.spend(len(value) + 1 if isinstance(value, str | bytes) else 1)
    if depth == 0:
        return None
    if isinstance(value, Inert):
        if value.kind in ("argparse.Namespace", "types.SimpleNamespace"):
            value = value.__dict__.get("state")
            value = value if isinstance(value, dict) else {}
        elif value.kind == "builtins.getattr" and len(value.args) == 2:
            return plain(value.args[1], depth - 1, budget)
        else:
            return plain(value.args[0], depth - 1, budget) if len(value.args) == 1 else value.kind
    if isinstance(value, type) and issubclass(value, Inert):
        return value.kind
    if isinstance(value, dict):
        return {key: plain(entry, depth - 1, budget) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry, depth - 1, budget) for entry in value)
    return value


def numbers_in(value: Any, depth: int = 6, budget: Budget | None = None) -> int:
    """How many numbers the tensors of an unpickled object hold: in lists, tuples and dicts, and in files saved inside it."""
    budget = budget or Budget(MAX_STATE_PARTS)
    budget.spend()
    if isinstance(value, Mosaic):
        return value.elements
    if depth == 0:
        return 0
    if isinstance(value, Inert) and value.kind.endswith("io.BytesIO"):
        state = value.__dict__.get("state")
        return _numbers_in_file(_bytes_in(state[0])) if isinstance(state, tuple) and state else 0
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(numbers_in(entry, depth - 1, budget) for entry in entries)


def _bytes_in(value: Any) -> bytes:
    """Bytes as they are, or as pickle's protocol 2 writes them: a text to be encoded."""
    if isinstance(value, Inert) and value.kind == "_codecs.encode" and value.args and isinstance(value.args[0], str):
        return value.args[0].encode("latin1", errors="replace")
    return value if isinstance(value, bytes) else b""


def _numbers_in_file(content: bytes) -> int:
    """Bytes of tensors in a file of torch.save (Transformer Engine's older state); in any other, the bytes beyond a None's."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    except zipfile.BadZipFile:
        return max(0, len(content) - len(pickle.dumps(None)))
