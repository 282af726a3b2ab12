"""Is torch_dist read without holding or running any of it, and written so that torch's own loader reads it?"""

import argparse
import dataclasses
import io
import os
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorProperties

from conversion import convert_to_hf, convert_to_megatron, inspect, verify
from conversion.convert import open_any
from conversion.megatron import find_iteration
from conversion.megatron_dist import CHUNK_BYTES, open_dist
from conversion.ops import read
from conversion.weight_map import POST_NORM_NAMES
from tests.conversion.megatron_files import FIXTURES

SOURCE = FIXTURES / "tp2_pp2_ep2_etp1" / "torch_dist"


@pytest.fixture
def copied(tmp_path):
    """A checkpoint that a test may damage."""
    shutil.copytree(SOURCE, tmp_path / "torch_dist")
    return tmp_path / "torch_dist" / "iter_0000010"


def open_it(folder, drop=False):
    return open_dist(find_iteration(folder), POST_NORM_NAMES, drop)


def edit_metadata(folder, change):
    """These files are our own fixtures: here torch's classes may be unpickled."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def torchs_own(folder):
    """Every tensor by torch's distributed checkpoint itself."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


@pytest.mark.parametrize("layout", ["tp2_pp2_ep2_etp1", "te_tp2_ep2_etp1", "mtp_pp2"])
def test_read_as_torch_reads_it(layout):
    folder = find_iteration(FIXTURES / layout / "torch_dist")
    truth = torchs_own(folder)
    parts = open_it(folder).parts
    for name, tensor in truth.items():
        if ".experts.experts." in name:
            for expert, matrix in enumerate(tensor):
                mine = parts[name.replace("experts.experts", f"experts.local_experts.{expert}")][0]
                assert torch.equal(read(mine), matrix)
    assert torch.equal(read(parts["embedding.word_embeddings.weight"][0]), truth["embedding.word_embeddings.weight"])


@pytest.mark.parametrize("transformer_engine", [False, True], ids=["local", "te"])
def test_what_is_written_torch_reads_and_holds_what_megatron_wrote(tmp_path, transformer_engine):
    layout = "te_tp2_ep2_etp1" if transformer_engine else "tp2_pp2_ep2_etp1"
    source = find_iteration(FIXTURES / layout / "torch_dist")
    options = {"tp": 2, "vocab_divisor": 16, "shard_bytes": 200_000, "progress": False}
    convert_to_megatron(source, tmp_path / "out", transformer_engine=transformer_engine, **options)
    out = tmp_path / "out" / "release"
    assert len(list(out.glob("*.distcp"))) > 3
    truth, written = torchs_own(source), torchs_own(out)
    assert written.keys() == truth.keys()
    for name, tensor in truth.items():
        rows = 131 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else len(tensor)
        assert written[name].shape == tensor.shape and torch.equal(written[name][:rows], tensor[:rows]), name
    keys = [set(FileSystemReader(folder).read_metadata().state_dict_metadata) for folder in (source, out)]
    assert keys[0] == keys[1]


def test_extra_state_is_what_megatron_core_wants(tmp_path):
    """A one-element list; without the keys, or with a bare None, megatron-core refuses the checkpoint."""
    for transformer_engine, truth in ((False, [None]), (True, [torch.empty(0, dtype=torch.uint8)])):
        name = f"out{transformer_engine}"
        convert_to_megatron(SOURCE, tmp_path / name, transformer_engine=transformer_engine, progress=False)
        reader = FileSystemReader(tmp_path / name / "release")
        places = {
            index.fqn: place
            for index, place in reader.read_metadata().storage_data.items()
            if "_extra_state" in index.fqn
        }
        assert len(places) > 50
        for place in places.values():
            data = (tmp_path / name / "release" / place.relative_path).read_bytes()[place.offset :][: place.length]
            held = torch.load(io.BytesIO(data))
            assert len(held) == 1 and (held[0] is None if truth[0] is None else torch.equal(held[0], truth[0]))


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.megatron_dist.CHUNK_BYTES", 4000)
    convert_to_megatron(SOURCE, tmp_path / "out", progress=False)
    entry = FileSystemReader(tmp_path / "out" / "release").read_metadata().state_dict_metadata["output_layer.weight"]
    assert len(entry.chunks) > 5 and CHUNK_BYTES > 4000
    assert verify(SOURCE, tmp_path / "out", progress=False) == []


def test_without_common_pt_the_state_is_among_the_chunks(copied, tmp_path):
    """As megatron-core 0.19 writes it."""
    common = (copied / "common.pt").read_bytes()
    (copied / "common.pt").unlink()
    with pytest.raises(ValueError, match="neither common.pt nor a common_state"):
        open_it(copied)
    (copied / "__9_0.distcp").write_bytes(common)

    def point(metadata):
        metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = _StorageInfo("__9_0.distcp", 0, len(common))

    edit_metadata(copied, point)
    convert_to_hf(copied, tmp_path / "hf", progress=False)
    assert verify(SOURCE, tmp_path / "hf", progress=False) == []


def test_torch_dcp_is_refused_by_name(tmp_path):
    """Megatron's other use of torch's distributed checkpoints: the whole state, with the arguments as one more entry."""
    state = {"args": argparse.Namespace(num_layers=1), "model": {"decoder.final_layernorm.weight": torch.ones(4)}}
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000010", no_dist=True)
    with pytest.raises(ValueError, match="is of the format torch_dcp, that of FSDP2; have Megatron save it as torch_dist"):
        open_it(tmp_path / "iter_0000010")


def test_the_trained_state_is_not_even_opened(copied, tmp_path):
    """Names as a real run with a distributed optimizer writes them: a MoE's is a chain of two."""

    def add(metadata):
        entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
        for name in (
            "chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param",
            "optimizer.state.exp_avg.decoder.layers.0.input_layernorm.weight",
        ):
            metadata.state_dict_metadata[name] = entry
            metadata.storage_data[MetadataIndex(name, torch.Size([0]))] = _StorageInfo("nowhere.distcp", 0, 10)
        for name in ("rng_state/shard_0.1.0_1.2.1", "rerun_state_machine_state/shard_1_2"):
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name)] = _StorageInfo("nowhere.distcp", 0, 10)

    edit_metadata(copied, add)
    assert open_it(copied).facts["skipped"] == ["chained_0", "optimizer", "rerun_state_machine_state", "rng_state"]
    convert_to_hf(copied, tmp_path / "hf", progress=False)


def test_state_of_no_known_kind_is_not_left_behind_unsaid(copied):
    def add(metadata):
        metadata.state_dict_metadata["decoder.layers.1.mlp.secret"] = BytesStorageMetadata()

    edit_metadata(copied, add)
    with pytest.raises(ValueError, match="decoder.layers.1.mlp.secret, which is neither a tensor nor known state"):
        open_it(copied)


class Pairs(dict):
    """Two equal keys: in a pickle they may stand, in a dictionary they are one."""

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self["pairs"])


def test_a_chunk_in_two_places_is_refused(copied):
    def twice(metadata):
        index = next(i for i in metadata.storage_data if i.fqn.endswith("final_layernorm.weight"))
        again = MetadataIndex(index.fqn, index.offset)
        pairs = [*metadata.storage_data.items(), (again, metadata.storage_data[index])]
        metadata.storage_data = Pairs(pairs=pairs)

    edit_metadata(copied, twice)
    with pytest.raises(ValueError, match="places the chunk of decoder.final_layernorm.weight at .* twice"):
        open_it(copied)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch hostile-was-here",))


def test_hostile_metadata_does_not_run(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (copied / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, which is not allowed"):
        open_it(copied)
    assert not (tmp_path / "hostile-was-here").exists()
    # The test can fail: torch's own reader runs it.
    with pytest.raises(AttributeError):
        FileSystemReader(copied).read_metadata()
    assert (tmp_path / "hostile-was-here").exists()


def test_hostile_common_and_chunks_do_not_run(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    common = (copied / "common.pt").read_bytes()
    torch.save(Evil(), copied / "common.pt")
    with pytest.raises(ValueError, match=r"system, which is not allowed"):
        open_it(copied)
    (copied / "common.pt").write_bytes(common)
    torch.save(Evil(), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    (copied / "__7_0.distcp").write_bytes(evil)

    def point(metadata):
        index = next(i for i in metadata.storage_data if i.fqn.endswith("final_layernorm.weight"))
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "__7_0.distcp", 0, len(evil)

    edit_metadata(copied, point)
    with pytest.raises(ValueError, match=r"__7_0.distcp asks for (posix|nt)\.system"):
        open_it(copied)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("relative", ["../outside.distcp", "/etc/passwd", "sub/x.distcp", "..", ""])
def test_no_file_outside_the_folder_is_read(copied, relative):
    def point(metadata):
        next(iter(metadata.storage_data.values())).relative_path = relative

    edit_metadata(copied, point)
    with pytest.raises(ValueError, match="only files beside it are read"):
        open_it(copied)


def test_a_tensor_of_no_properties_is_named(copied, monkeypatch):
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda properties: ())
    edit_metadata(copied, lambda metadata: None)
    with pytest.raises(ValueError, match="describes .* as no version of torch does .*; it is damaged, fetch it again"):
        open_it(copied)


def a_tensor(metadata, name="decoder.layers.1.mlp.shared_experts.linear_fc1.weight"):
    return metadata.state_dict_metadata[name]


def name_twice(metadata, name="decoder.layers.2.post_mlp_layernorm.weight"):
    """The norm once more under the name of another fork."""
    other = name.replace("mlp_layernorm", "mlp_norm")
    metadata.state_dict_metadata[other] = a_tensor(metadata, name)
    (place,) = [index for index in metadata.storage_data if index.fqn == name]
    metadata.storage_data[dataclasses.replace(place, fqn=other)] = metadata.storage_data[place]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: a_tensor(m).chunks.pop(), "do not cover its shape"),
        (lambda m: setattr(a_tensor(m), "size", torch.Size([66, 64])), "linear_fc1.weight"),
        (lambda m: a_tensor(m).chunks.append(a_tensor(m).chunks[0]), "do not cover its shape"),
        (lambda m: setattr(a_tensor(m).chunks[0], "sizes", torch.Size([17, 64])), "belongs to another checkpoint"),
        (
            lambda m: m.state_dict_metadata.pop("decoder.layers.2.input_layernorm.weight"),
            r"missing \[decoder.layers.2.input",
        ),
        (lambda m: m.storage_data.clear(), "does not say where"),
        (lambda m: setattr(a_tensor(m).properties, "dtype", torch.bfloat16), r"is not the torch.bfloat16 \[.*\] that"),
        (
            lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["zstd"]),
            r"is stored as \['zstd'\]",
        ),
        (lambda m: setattr(a_tensor(m), "chunks", 5), "describes .*linear_fc1.weight as no version of torch does"),
        (lambda m: delattr(a_tensor(m), "properties"), "describes .*linear_fc1.weight as no version of torch does"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", None), r"at byte 0 \+ None; it is damaged"),
        (name_twice, "layers.2.post_mlp_layernorm.weight twice, under two names"),
    ],
)
def test_holes_and_wrong_sizes_are_named(copied, tmp_path, change, complaint):
    edit_metadata(copied, change)
    with pytest.raises(ValueError, match=complaint):
        convert_to_hf(copied, tmp_path / "hf", progress=False)


def test_missing_and_truncated_files_are_named(copied):
    path = copied / "__1_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="__1_0.distcp has .* bytes, .* are needed; it is truncated"):
        open_it(copied)
    path.unlink()
    with pytest.raises(ValueError, match="__1_0.distcp is missing"):
        open_it(copied)
    metadata = (copied / ".metadata").read_bytes()
    (copied / ".metadata").write_bytes(metadata[:5000])
    with pytest.raises(ValueError, match=".metadata is not a whole pickle of 5,000 bytes; it lacks its end: a save or a copy"):
        open_it(copied)
    (copied / ".metadata").unlink()
    with pytest.raises(ValueError, match="the save did not finish"):
        open_it(copied)
    for name in ("metadata.json", "common.pt"):
        (copied / name).unlink()
    with pytest.raises(ValueError, match="holds neither .metadata and metadata.json nor rank files: its save broke off"):
        open_any(copied.parent)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("__0_0.distcp", r"places at byte .* of .*/__0_0.distcp is not a whole .*or of another save than .metadata"),
        (".metadata", "or of another save than .metadata; fetch it again"),
    ],
)
def test_a_file_of_another_run_is_named(copied, name, complaint):
    other = find_iteration(FIXTURES / "te_tp2_ep2_etp1" / "torch_dist")
    shutil.copy(other / name, copied / name)
    with pytest.raises(ValueError, match=complaint):
        open_it(copied)


def test_a_wrong_file_in_the_place_of_common_pt_is_named(copied):
    torch.save({"step": 3, "state": {}}, copied / "common.pt")
    with pytest.raises(ValueError, match=r"common.pt holds no Megatron arguments, only \[step, state\]; .* fetch the file that"):
        open_it(copied)


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor"])
def test_other_backends_are_refused_by_name(copied, tmp_path, backend):
    (copied / "metadata.json").write_text(f'{{"sharded_backend": "{backend}"}}')
    with pytest.raises(ValueError, match=f"of the format '{backend}'"):
        convert_to_hf(copied, tmp_path / "hf", progress=False)
    assert inspect(copied)["problem"]


def test_stacked_layers_and_single_experts(tmp_path):
    """How megatron-core saves layers that are all alike, and FSDP its experts: written here with torch's own writer."""
    truth = open_any(FIXTURES / "tp1_pp1_ep1" / "torch_dist")
    state, layers = {}, range(1, 4)
    flat = {name: read(parts[0]) for name, parts in open_it(FIXTURES / "tp1_pp1_ep1" / "torch_dist").parts.items()}
    for name, tensor in flat.items():
        if name.startswith("decoder.layers.1."):
            rest = name.removeprefix("decoder.layers.1.")
            stacked = torch.stack([flat[f"decoder.layers.{i}.{rest}"] for i in layers])
            if ".local_experts.0." in rest:
                local = [rest.replace("local_experts.0", f"local_experts.{e}") for e in range(8)]
                stacked = torch.stack([torch.stack([flat[f"decoder.layers.{i}.{e}"] for e in local]) for i in layers])
                rest = rest.replace("local_experts.0", "experts")
            elif ".local_experts." in rest:
                continue
            state[f"decoder.layers.{rest}"] = stacked
        elif not name.startswith("decoder.layers."):
            state[name] = tensor
    out = tmp_path / "iter_0000010"
    dcp.save(state, checkpoint_id=out, no_dist=True)
    args = dict(truth.args) | {"num_layers": 3, "moe_layer_freq": 1}
    for name in ("attention_backend", "model_type"):
        args.pop(name)
    torch.save({"args": argparse.Namespace(**args), "iteration": 10}, out / "common.pt")
    opened = open_any(out)
    assert opened.config.mlp_layer_types == ["sparse"] * 3
    for name, tensor in opened.tensors.items():
        original = name
        for i in reversed(layers):
            original = original.replace(f"layers.{i - 1}.", f"layers.{i}.") if f"layers.{i - 1}." in name else original
        assert torch.equal(read(tensor), read(truth.tensors[original])), name
    # Whoever trains with the number 1 has the layers stacked again; loaded by torch itself.
    convert_to_megatron(out, tmp_path / "again", progress=False)
    again = torchs_own(tmp_path / "again" / "release")
    assert again.keys() == state.keys() and sum(name.startswith("decoder.layers.") for name in state) > 10
    assert all(torch.equal(again[name], state[name]) for name in state if name.startswith("decoder."))
    names = FileSystemReader(tmp_path / "again" / "release").read_metadata().state_dict_metadata.keys() - state.keys()
    of_experts = {f"shard_{layer}.{expert}_3.8" for layer in range(3) for expert in range(8)}
    assert {name.partition("/")[2] for name in names if ".experts." in name} == of_experts
    assert {name.partition("/")[2] for name in names if ".linear_proj." in name} == {f"shard_{i}_3" for i in range(3)}
    assert verify(out, tmp_path / "again", progress=False) == []


def test_gate_and_up_as_two_tensors(tmp_path):
    """How megatron-core saves them with singleton local shards, and each expert by itself."""
    source = find_iteration(FIXTURES / "tp1_pp1_ep1" / "torch_dist")
    state = {}
    for name, (tensor,) in open_it(source).parts.items():
        name = name.replace("local_experts", "experts")
        if name.endswith("linear_fc1.weight"):
            state[f"{name}_w"], state[f"{name}_v"] = read(tensor).chunk(2)
        else:
            state[name] = read(tensor)
    assert {name.count("expert") for name in state if name.endswith("_v")} == {0, 1, 2}
    out = tmp_path / "iter_0000010"
    dcp.save(state, checkpoint_id=out, no_dist=True)
    shutil.copy(source / "common.pt", out)
    assert verify(source, out, progress=False) == []
    whole = (out / ".metadata").read_bytes()
    for half, other in ("wv", "vw"):
        (out / ".metadata").write_bytes(whole)
        name = "decoder.layers.0.mlp.linear_fc1.weight_"
        edit_metadata(out, lambda metadata, gone=name + half: metadata.state_dict_metadata.pop(gone))
        with pytest.raises(ValueError, match=f"holds {name}{other} but not {name}{half}"):
            open_it(out)
