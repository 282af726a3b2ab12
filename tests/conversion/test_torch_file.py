"""Is a file of torch.save read as torch reads it, and does a hostile one do nothing but be refused by name?"""

import argparse
import collections
import functools
import io
import os
import pathlib
import pickle
import signal
import struct
import sys
import types
import zipfile

import pytest
import torch

from conversion.ops import Mosaic, read
from conversion.torch_file import Budget, Inert, numbers_in, open_pickle, open_torch_file, plain, unpickle


def saved(tmp_path, value, **options):
    torch.save(value, tmp_path / "x.pt", **options)
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16]
)
def test_tensors_are_what_torch_loads(tmp_path, dtype):
    base = torch.randn(6, 8).to(dtype)
    content = {"whole": base, "row": base[2], "column": base[:, 3:5], "turned": base.t(), "scalar": base[0, 0]}
    content["parameter"] = torch.nn.Parameter(torch.randn(3))
    # As optimizers keep their copies: a tensor with an attribute of its own.
    content["marked"] = torch.nn.Parameter(torch.randn(2, 2))
    content["marked"].shared = True
    path = saved(tmp_path, content)
    for name, truth in torch.load(path).items():
        mosaic = open_torch_file(path)[name]
        assert isinstance(mosaic, Mosaic) and (mosaic.dtype, mosaic.shape) == (truth.dtype, truth.shape)
        # Fancy comparisons are not there for every dtype.
        assert read(mosaic).tolist() == truth.tolist()


class Loud:
    def __reduce__(self):
        return (os.system, ("touch hostile-was-here",))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Loud(), r"(posix|nt)\.system"),
        ({"model": {}, "args": Loud()}, r"(posix|nt)\.system"),
        (eval, r"builtins\.eval"),
        (pickle.loads, r"_?pickle\.loads"),
        (sys.exit, r"sys\.exit"),
        (io.open, r"io\.open|_io\.open"),
        (torch.load, r"torch\.serialization\.load"),
        (bytearray, r"builtins\.bytearray"),
    ],
    ids=["system", "nested", "eval", "loads", "exit", "open", "load", "bytearray"],
)
def test_what_would_run_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, value, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"asks for ({named}), which is not allowed"):
        open_torch_file(saved(tmp_path, value))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=named), (tmp_path / "plain.pkl").open("rb") as file:
        unpickle(file, tmp_path / "plain.pkl")
    assert not (tmp_path / "hostile-was-here").exists()


def test_an_attribute_of_something_allowed_stays_inert(tmp_path, monkeypatch):
    """`getattr` is how Python 3.11 pickles enums, and how a hostile file would climb from a harmless name to os.system."""
    monkeypatch.chdir(tmp_path)
    # collections.OrderedDict.__init__.__globals__, then a call of what was found
    inner = b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nX\x08\x00\x00\x00__init__tR"
    climb = b"cbuiltins\ngetattr\n(" + inner + b"X\x0b\x00\x00\x00__globals__tR."
    found = unpickle(io.BytesIO(climb), tmp_path)
    assert isinstance(found, Inert) and plain(found) == "__globals__"
    with pytest.raises(ValueError, match="damaged pickle"):
        unpickle(io.BytesIO(climb[:-1] + b"(X\x02\x00\x00\x00lstR."), tmp_path)


class Rebuilt:
    """A tensor of a class of its own, which says itself how it is rebuilt."""

    def __reduce__(self):
        return (torch._tensor._rebuild_from_type_v2, (set, torch.Tensor, ([1, 2],), {}))


def test_a_tensor_is_rebuilt_by_torch_only(tmp_path):
    with pytest.raises(ValueError, match="a tensor is to be rebuilt by a builtins.set"):
        open_torch_file(saved(tmp_path, Rebuilt()))


def test_megatrons_classes_are_stand_ins_and_never_imported(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.core.transformer.enums")

    class AttnBackend:
        def __reduce__(self):
            return (AttnBackend, (5,))

        def __init__(self, value=5):
            raise AssertionError("constructed")

    AttnBackend.__module__, AttnBackend.__qualname__ = module.__name__, "AttnBackend"
    module.AttnBackend = AttnBackend
    args = argparse.Namespace(
        attention_backend=object.__new__(AttnBackend),
        exit_signal=signal.SIGTERM,
        dtype=torch.bfloat16,
        where=pathlib.PurePosixPath("a/b"),
        nested=argparse.Namespace(size=torch.Size([2, 3])),
        counts=collections.defaultdict(list, {"a": [1]}),
    )
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", "megatron.core.transformer"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        path = saved(tmp_path, {"args": args})
    read_back = plain(open_torch_file(path)["args"])
    assert "megatron" not in sys.modules
    assert read_back["attention_backend"] == 5 and read_back["exit_signal"] in (15, "signal.SIGTERM")
    assert (
        read_back["dtype"] is torch.bfloat16
        and read_back["nested"] == {"size": (2, 3)}
        and read_back["counts"] == {"a": [1]}
    )


def rewritten(path, change):
    """The same archive with its records passed through `change(name, data) -> data or None`."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in records:
            data = change(entry.filename, data)
            if data is not None:
                archive.writestr(entry.filename, data)
    return path


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda name, data: data[:-4] if "/data/0" in name else data,
            "should hold 12 numbers of torch.float32 but has 44 bytes",
        ),
        (
            lambda name, data: None if "/data/0" in name else data,
            "should hold 12 numbers of torch.float32 but has -1 bytes",
        ),
        (lambda name, data: b"big" if "byteorder" in name else data, "big-endian"),
        (lambda name, data: None if "data.pkl" in name else data, "not a whole file of torch.save"),
        (lambda name, data: data[:-9] if "data.pkl" in name else data, "damaged pickle"),
    ],
)
def test_damage_is_named(tmp_path, change, complaint):
    path = rewritten(saved(tmp_path, {"w": torch.zeros(3, 4)}), change)
    with pytest.raises(ValueError, match=complaint) as error:
        open_torch_file(path)
    assert str(path) in str(error.value)


def test_functions_among_the_arguments_stay_names(tmp_path):
    """An activation, or a part of one: neither is looked up, nor called."""
    gelu = torch.nn.functional.gelu
    functions = {"silu": torch.nn.functional.silu, "gelu": gelu, "part": functools.partial(gelu, approximate="tanh")}
    found = open_torch_file(saved(tmp_path, {"args": argparse.Namespace(num_layers=2, **functions)}))
    said = plain(found["args"])
    assert said["num_layers"] == 2 and not any(callable(value) and value is gelu for value in said.values())
    assert (said["silu"], said["gelu"]) == ("torch.nn.functional.silu", "torch._C._nn.gelu")


def test_truncated_compressed_and_old_files(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(300)})
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a whole file of torch.save"):
        open_torch_file(tmp_path / "short.pt")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="is compressed"):
        open_torch_file(tmp_path / "packed.pt")
    with pytest.raises(ValueError, match="not a whole file of torch.save .*; torch before 1.6 wrote it, load and save it"):
        open_torch_file(saved(tmp_path, {"w": 1}, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty: a save or a copy broke off, fetch or save it again, or take an earlier iteration"),
        (bytes(5000), "it holds zeros where it should begin: a save or a copy broke off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "it is a pointer of Git LFS and not the file"),
    ],
    ids=["empty", "zeros", "lfs"],
)
def test_a_file_that_is_not_there_yet_says_why(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    for opened in (open_torch_file, open_pickle, lambda path: open_torch_file(path, 0, 10**6)):
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'} .*; {reason}"):
            opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        # The shape (3, 4) with strides (4, 1) is pickled as K\x03 K\x04, K\x04 K\x01.
        (b"K\x03K\x04\x86", b"K\x03K\x05\x86", r"a tensor of 48 bytes has the offset, sizes and strides \(0, 3, 5"),
        (b"K\x04K\x01\x86", b"K\x09K\x01\x86", "reaches past its storage"),
    ],
)
def test_a_tensor_may_not_reach_past_its_storage(tmp_path, old, new, complaint):
    path = saved(tmp_path, {"w": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=complaint):
        open_torch_file(rewritten(path, lambda name, data: data.replace(old, new) if "data.pkl" in name else data))


def test_a_wrong_bit_in_the_pickle_is_seen(tmp_path):
    """In a key it would be another model: an argument that is not there has a default."""
    path = saved(tmp_path, {"moe_router_topk_scaling_factor": 2.5})
    path.write_bytes(path.read_bytes().replace(b"scaling_factor", b"scaling_fbctor"))
    with pytest.raises(ValueError, match="its pickle is damaged"):
        open_torch_file(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_may_be_there_once(tmp_path):
    """Torch would take one of the two, a zip reader the other."""
    path = saved(tmp_path, {"w": torch.zeros(2)})
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="holds the record data.pkl twice"):
        open_torch_file(path)


def test_small_files_cannot_ask_for_much(tmp_path):
    """A memo of 2**27 entries in ten bytes; a value that holds itself twice at each of many levels."""
    with pytest.raises(ValueError, match="damaged pickle"):
        unpickle(io.BytesIO(b"\x80\x02Nr" + (2**27).to_bytes(4, "little")), tmp_path)
    value = "x"
    for _ in range(60):
        value = [value, value]
    found = open_torch_file(saved(tmp_path, {"args": argparse.Namespace(bomb=value)}))
    assert plain(found["args"])["bomb"][0][0][0][0][0] is None
    path = saved(tmp_path, {"w": torch.zeros(8, 2)[:, :1].expand(8, 10**9)})
    with pytest.raises(ValueError, match="the file is damaged"):
        open_torch_file(path)


# A tuple that holds itself, as it was one level below, twice: hashed or shown, eighty levels never end.
NESTED = b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(80))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"}" + NESTED + b"K\x01s.", "a tuple is part of a dict's key"),
        (b"}(" + NESTED + b"K\x01u.", "a tuple is part of a dict's key"),
        (b"(" + NESTED + b"K\x01d.", "a tuple is part of a dict's key"),
        (b"}cbuiltins\nslice\n" + NESTED + b"\x85RK\x01s.", "a slice is part of a dict's key"),
        (b"}\x8b\x10\x00\x00\x00" + b"\x01" * 16 + b"K\x01s.", "a int is part of a dict's key"),
        (b"cargparse\nNamespace\n)\x81" + NESTED + b"K\x01s.", "a tuple is part of a dict's key"),
        (b"\x8f(" + NESTED + b"\x90.", "a tuple is part of a dict's key"),
        (b"(" + NESTED + b"\x91.", "a tuple is part of a dict's key"),
        (b"ccollections\nOrderedDict\n]" + NESTED + b"K\x01\x86a\x85R.", "an OrderedDict is made of entries"),
        (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + NESTED + b"K\x00K\x01tQ.", "refers to a tuple"),
        (NESTED + b"Q.", "refers to a tuple"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(" + NESTED + b"K\x01)K\x01tR.", "is to be rebuilt by a tuple"),
        # The second key of several.
        (b"}(NN" + NESTED + b"Nu.", "a tuple is part of a dict's key"),
        (b"(NN" + NESTED + b"Nd.", "a tuple is part of a dict's key"),
        (b"\x8f(N" + NESTED + b"\x90.", "a tuple is part of a dict's key"),
        (b"(N" + NESTED + b"\x91.", "a tuple is part of a dict's key"),
        # One more part than a key may have, and one more bit.
        (b"}(" + b"N" * 64 + b"tNs.", "a tuple is part of a dict's key"),
        (b"}\x8a\x09" + b"\x00" * 8 + b"\x01Ns.", "a int is part of a dict's key"),
        (b"\x96" + (2**34).to_bytes(8, "little") + b".", "asks for room for a bytearray"),
    ],
    ids=(
        "setitem setitems dict slice int attribute additems frozenset ordered storage id rebuilt setitems-2 dict-2 additems-2 "
        "frozenset-2 parts bits bytearray"
    ).split(),
)
def test_a_hundred_bytes_cannot_ask_for_a_lifetime(tmp_path, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        unpickle(io.BytesIO(b"\x80\x05" + content), tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "a",
        2**64 - 1,
        -1,
        0.5,
        None,
        True,
        torch.bfloat16,
        (None,) * 63,
        ((torch.bfloat16, torch.float32), ("a", 1)),
    ],
    ids=lambda key: str(key)[:30],
)
def test_every_key_of_a_checkpoint_is_one(tmp_path, key):
    """Buckets of optimizers are found by two dtypes, whatever else by anything plain."""
    assert open_torch_file(saved(tmp_path, {key: 1, "other": 2})) == {key: 1, "other": 2}


def test_arguments_that_an_older_python_pickled(tmp_path):
    """3.10 and older write a signal as a bare name, later ones as a call: Megatron's `--exit-signal` is one."""
    by_name, by_call = b"csignal\nSIGTERM\n", b"csignal\nSignals\nK\x0f\x85R"
    for pickled, value in ((by_name, "signal.SIGTERM"), (by_call, 15)):
        assert plain(unpickle(io.BytesIO(b"\x80\x02" + pickled + b"."), tmp_path)) == value
    with pytest.raises(ValueError, match="signal.raise_signal, which is not allowed"):
        unpickle(io.BytesIO(b"csignal\nraise_signal\n(I9\ntR."), tmp_path)


def test_stand_ins_are_keys(tmp_path):
    """An instance, as .metadata has them, and a class."""
    found = unpickle(io.BytesIO(b"}(cargparse\nNamespace\n)\x81K\x01csignal\nSignals\nK\x02u."), tmp_path)
    instance, kind = found
    assert isinstance(instance, Inert) and issubclass(kind, Inert) and [*found.values()] == [1, 2]
    # Of torch.save's own protocol, bytes are one too.
    assert unpickle(io.BytesIO(b"(N]C\x01aKkd."), tmp_path) == {None: [], b"a": 107}


def test_sets_are_stand_ins(tmp_path):
    found = unpickle(io.BytesIO(b"\x80\x02cbuiltins\nset\n]" + NESTED + b"a\x85R."), tmp_path)
    assert isinstance(found, Inert)
    assert plain(open_torch_file(saved(tmp_path, {"args": argparse.Namespace(a={1})}))["args"]) == {"a": [1]}


def test_wide_values_end_too(tmp_path):
    """A list of one list a thousand times, at each of six levels; a text of a megabyte a thousand times."""
    wide = "x"
    for _ in range(6):
        wide = [wide] * 1000
    found = open_torch_file(saved(tmp_path, {"args": argparse.Namespace(a=wide), "state": wide[0]}))
    with pytest.raises(ValueError, match="has more than 16,777,216 parts"):
        plain(argparse_of(["x" * 2**20] * 1000))
    with pytest.raises(ValueError, match="has more than 4,096 parts"):
        numbers_in(found["state"])
    with pytest.raises(ValueError, match="parts"):
        plain(found["args"], budget=Budget(10**4))


def argparse_of(value) -> Inert:
    namespace = Inert()
    namespace.kind, namespace.state = "argparse.Namespace", {"a": value}
    return namespace


def test_a_pickle_of_its_own_is_bounded(tmp_path, monkeypatch):
    (tmp_path / ".metadata").write_bytes(pickle.dumps("x" * 100))
    assert open_pickle(tmp_path / ".metadata") == "x" * 100
    monkeypatch.setattr("conversion.torch_file.MAX_PICKLE_BYTES", 100)
    with pytest.raises(ValueError, match=r"\.metadata is too large \(its pickle has \d+ bytes\)"):
        open_pickle(tmp_path / ".metadata")


def test_a_pickle_cannot_change_what_it_names(tmp_path):
    """BUILD sets attributes of whatever stands on the stack, a function that a name was replaced by included."""
    for name in (b"torch._utils\n_rebuild_tensor_v2\n", b"collections\ndefaultdict\n"):
        with pytest.raises(ValueError, match="damaged pickle"):
            unpickle(io.BytesIO(b"\x80\x02c" + name + b"N}X\x01\x00\x00\x00aK\x01s\x86b."), tmp_path)
    assert open_torch_file(saved(tmp_path, {"w": torch.zeros(2)}))["w"].dtype is torch.float32


def test_a_window_of_a_file(tmp_path):
    """A chunk of a distributed checkpoint: an archive between others."""
    buffer = io.BytesIO()
    torch.save(torch.arange(5), buffer)
    inner = buffer.getvalue()
    (tmp_path / "x.distcp").write_bytes(b"x" * 100 + inner + b"y" * 77)
    mosaic = open_torch_file(tmp_path / "x.distcp", 100, len(inner))
    assert read(mosaic).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="is truncated"):
        open_torch_file(tmp_path / "x.distcp", 100, len(inner) + 78)


def test_a_record_may_not_lie_in_the_next_chunk(tmp_path):
    """The record's own header says where it begins; a longer one moves it behind the window."""
    inner = saved(tmp_path, torch.arange(5)).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        header = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0")).header_offset
    name_bytes = struct.unpack_from("<H", inner, header + 26)[0]
    hostile = bytearray(inner)
    struct.pack_into("<H", hostile, header + 28, len(inner) - header - 30 - name_bytes)
    (tmp_path / "x.distcp").write_bytes(hostile + b"y" * 77)
    with pytest.raises(ValueError, match="data/0 reaches past the end"):
        open_torch_file(tmp_path / "x.distcp", 0, len(inner))
