"""How is Megatron's torch_dist format read, and written: `.metadata`, `__R_N.distcp`, `metadata.json`, `common.pt`?

It is torch's distributed checkpoint. A tensor has a global shape and chunks; a chunk is a small file of torch.save at some byte
of a .distcp file. Experts are one tensor [E, ...], and so are layers that are all alike, [L, ...].
"""

import io
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.checkpoint import HashedFile, OutFile, deal
from conversion.megatron import LAYER, MegatronSource, arguments_in, drop_state, no_arguments, said_of
from conversion.ops import Mosaic, Tile, cat, filled, narrow, unstack
from conversion.torch_file import MAX_DIMENSIONS, Inert, is_size, numbers_in, open_pickle, open_torch_file, shown
from conversion.torch_writer import Frame, frame_of
from conversion.weight_map import Row, local_name, modules_with_state, te_name
from modeling_axk1.configuration_axk1 import AxK1Config

# Of the trained state, only the model is read; what these name is not even opened.
# (A MoE's optimizer is two in a chain, for dense parameters and for experts.)
SKIPPED = re.compile(r"(chained_\d{1,4}|optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)\b.*")
COMMON_STATE = re.compile(r"common_state/shard_\d+_\d+")
STACKED_LAYERS = re.compile(r"(decoder\.layers\.)([a-z_]\w*\..+)")
STACKED_EXPERTS = re.compile(r"(.+\.mlp\.experts\.)experts\.(linear_fc[12]\.weight)")
SINGLE_EXPERT = re.compile(r"(.+\.mlp\.experts\.)experts\.(\d+)\.(linear_fc[12]\.weight)")
LOCAL_EXPERT = re.compile(r"(.+\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12]\.weight)")
STATE_SHARD = re.compile(r"(.+\._extra_state)/shard_(\d+)_(\d+)")
HALF = re.compile(r"(.+\.weight)_([wv])")
# A chunk is what torch's own reader has to hold.
CHUNK_BYTES = 2**26


def open_dist(folder: Path, post_norm_names: tuple[str, ...], drop_fp8_state: bool) -> MegatronSource:
    """Open one torch_dist iteration. ValueError names what is missing, damaged or outside the folder."""
    entries, places = read_metadata(folder)
    common = read_common(folder, places)
    source = MegatronSource(folder, "torch_dist", arguments_in(common["args"]))
    source.facts = said_of(common, folder)
    skipped = {name: found[1] for name in entries if (found := SKIPPED.match(name))}
    source.facts["skipped"] = sorted(set(skipped.values()))
    names = [name for name in entries if name not in skipped]
    is_tensor = {name: hasattr(entries[name], "chunks") for name in names}
    for name in names:
        if is_tensor[name] or COMMON_STATE.fullmatch(name):
            continue
        if "_extra_state" not in name:
            raise ValueError(
                f"{folder} holds {name}, which is neither a tensor nor known state; nothing is left behind unsaid."
            )
        numbers = numbers_in(open_torch_file(*_place(folder, name, places.get((name, None)))))
        drop_state(name, numbers, folder, drop_fp8_state)
    tensors = {name: read_tensor(folder, name, entries[name], places) for name in names if is_tensor[name]}
    source.facts["files"] = len({tile.path for tensor in tensors.values() for tile in tensor.tiles})
    for name, tensor in _unstacked(_joined_halves(tensors)):
        name = local_name(name, post_norm_names)
        if name in source.parts:
            raise ValueError(f"{folder} holds {name} twice, under two names; it is damaged.")
        source.parts[name] = [tensor]
    return source


def read_metadata(folder: Path) -> tuple[dict[str, Inert], dict[tuple[str, tuple | None], Inert]]:
    """What is stored, by name, and where each piece of it lies, by (name, offsets)."""
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the save did not finish, or the file was not fetched.")
    metadata = open_pickle(path)
    try:
        places = {}
        for index, info in metadata.storage_data.items():
            # An attribute at its default is not in the pickle.
            offset = getattr(index, "offset", None)
            place = name, offset = index.fqn, None if offset is None else _sizes(offset)
            if not isinstance(name, str):
                raise TypeError(f"it names {shown(name)}")
            if place in places:
                raise ValueError(f"{path} places the chunk of {name} at {offset} twice; it is damaged.")
            places[place] = info
        return {str(name): entry for name, entry in metadata.state_dict_metadata.items()}, places
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no metadata of a distributed checkpoint ({error}).") from error


def arguments_of_dist(folder: Path) -> dict[str, Any]:
    """The arguments alone."""
    return arguments_in(read_common(folder, read_metadata(folder)[1])["args"])


def read_common(folder: Path, places: dict) -> dict[str, Any]:
    """The state besides tensors: a file of its own, since megatron-core 0.19 an object among the chunks."""
    if (folder / "common.pt").is_file():
        common, where = open_torch_file(folder / "common.pt"), folder / "common.pt"
    else:
        name = next((name for name, _ in places if COMMON_STATE.fullmatch(name)), None)
        if any(name == "args" for name, _ in places):
            raise ValueError(f"{folder} is of the format torch_dcp, that of FSDP2; have Megatron save it as torch_dist.")
        if name is None:
            raise ValueError(
                f"{folder} holds neither common.pt nor a common_state; its arguments are missing, fetch them."
            )
        path, start, length = _place(folder, name, places[name, None])
        common, where = open_torch_file(path, start, length), path
        if isinstance(common, list) and len(common) == 1:
            common = common[0]
    if not isinstance(common, dict) or not isinstance(common.get("args"), Inert):
        raise ValueError(no_arguments(where, common))
    return common


def read_tensor(folder: Path, name: str, entry: Inert, places: dict) -> Mosaic:
    """A tensor as its chunks. Whether they cover it is checked where the whole is put together."""
    dtype, size, chunks = _described(folder, name, entry)
    tiles: list[Tile] = []
    for offsets, sizes in chunks:
        info = places.get((name, offsets))
        found = open_torch_file(*_place(folder, name, info))
        if not isinstance(found, Mosaic) or (found.dtype, found.shape) != (dtype, sizes):
            raise ValueError(
                f"{folder / info.relative_path}: the chunk of {name} at {list(offsets)} is not the {dtype} {list(sizes)} "
                "that .metadata says; the file belongs to another checkpoint."
            )
        tiles += [replace(tile, origin=offsets) for tile in found.tiles]
    tensor = Mosaic(dtype, size, tuple(tiles))
    # Before it is cut into its layers and experts, as many as it says; that no two overlap is seen where the parts are joined.
    if sum(tile.elements for tile in tiles) != tensor.elements:
        raise ValueError(f"{folder}: the chunks of {name} do not cover its shape {list(size)}; one is missing.")
    return tensor


def _described(folder: Path, name: str, entry: Inert) -> tuple[Any, tuple[int, ...], list[tuple[tuple[int, ...], ...]]]:
    """What .metadata says of a tensor: dtype, shape, and (first entry, shape) of each chunk."""
    try:
        state = entry.properties.state
        dtype = state[0] if isinstance(state, tuple) else state.get("dtype")
        return dtype, _sizes(entry.size), [(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"{folder / '.metadata'} describes {name} as no version of torch does ({error}); it is damaged, fetch it again."
        ) from error


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape, or where a chunk begins: what else a pickle may say is neither hashed nor multiplied."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS or not all(map(is_size, value)):
        raise ValueError(f"{shown(value)} stands for a shape; .metadata is damaged.")
    return tuple(value)


def _place(folder: Path, name: str, info: Inert | None) -> tuple[Path, int, int]:
    """(path, first byte, length) of a chunk; never outside the folder, whatever the file says."""
    if info is None:
        raise ValueError(
            f"{folder / '.metadata'} does not say where a chunk of {name} is; the checkpoint is incomplete."
        )
    relative, offset, length = (getattr(info, part, None) for part in ("relative_path", "offset", "length"))
    if not isinstance(relative, str) or Path(relative).name != relative or relative in ("", ".", ".."):
        raise ValueError(f"{folder / '.metadata'} places {name} at {shown(relative)}; only files beside it are read.")
    if descriptors := getattr(info, "transform_descriptors", None):
        raise ValueError(f"{folder / relative}: {name} is stored as {shown(descriptors)}; save it plain.")
    if not (folder / relative).is_file():
        raise ValueError(f"{folder / relative} is missing, but .metadata places {name} in it; fetch it.")
    if not (is_size(offset) and is_size(length)):
        raise ValueError(f"{folder / '.metadata'} places {name} at byte {shown(offset)} + {shown(length)}; it is damaged.")
    return folder / relative, offset, length


def _joined_halves(tensors: dict[str, Mosaic]) -> dict[str, Mosaic]:
    """Gate and up are two tensors, `weight_w` and `weight_v`, where local shards are saved singly."""
    joined = {}
    for name, tensor in tensors.items():
        found = HALF.fullmatch(name)
        if not found:
            joined[name] = tensor
        elif found[2] == "w":
            if f"{found[1]}_v" not in tensors:
                raise ValueError(f"the checkpoint holds {name} but not {found[1]}_v; it is incomplete.")
            joined[found[1]] = cat([tensor, tensors[f"{found[1]}_v"]], 0)
        elif f"{found[1]}_w" not in tensors:
            raise ValueError(f"the checkpoint holds {name} but not {found[1]}_w; it is incomplete.")
    return joined


def _unstacked(tensors: dict[str, Mosaic]) -> Iterator[tuple[str, Mosaic]]:
    """One tensor a layer and an expert."""
    for name, tensor in tensors.items():
        if found := STACKED_LAYERS.fullmatch(name):
            layers = [(f"{found[1]}{i}.{found[2]}", sheet) for i, sheet in enumerate(unstack(tensor))]
        else:
            layers = [(name, tensor)]
        for layer_name, sheet in layers:
            if found := STACKED_EXPERTS.fullmatch(layer_name):
                for e, matrix in enumerate(unstack(sheet)):
                    yield f"{found[1]}local_experts.{e}.{found[2]}", matrix
            elif found := SINGLE_EXPERT.fullmatch(layer_name):
                yield f"{found[1]}local_experts.{found[2]}.{found[3]}", sheet
            else:
                yield layer_name, sheet


@dataclass(frozen=True)
class Chunk:
    """One piece of a stored tensor, or (without `tensor`) an object that is no tensor."""

    key: str
    tensor: Mosaic | None = None
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()  # the shape that the chunk is part of

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes if self.tensor else 0

    def in_stack(self, layers: int) -> "Chunk":
        """The same where the decoder's layers are one tensor with a first axis of their own."""
        found = LAYER.fullmatch(self.key)
        if not found:
            return self
        layer, key = int(found[1]), f"decoder.layers.{found[2]}"
        if self.tensor is not None:
            return Chunk(key, self.tensor, (layer, *self.offsets), (1, *self.sizes), (layers, *self.whole))
        module, expert, experts = STATE_SHARD.fullmatch(key).groups()
        axes = (f"{layer}.{expert}", f"{layers}.{experts}") if ".experts.experts." in key else (layer, layers)
        return Chunk(f"{module}/shard_{axes[0]}_{axes[1]}")


@dataclass
class DistFiles:
    """Everything that decides a torch_dist checkpoint of one model."""

    config: AxK1Config
    rows: list[Row]
    tensors: dict[str, Mosaic]  # whole, by Megatron's names, the vocabulary padded
    args: Namespace
    transformer_engine: bool
    iteration: int
    shard_bytes: int

    def files(self, block_bytes: int) -> list[OutFile]:
        """The .distcp files; `finish` writes what lies beside them."""
        state = [torch.empty(0, dtype=torch.uint8) if self.transformer_engine else None]
        write = partial(write_chunks, state=state, block_bytes=block_bytes)
        return [
            OutFile(name, sum(chunk.nbytes for chunk in chunks), partial(write, chunks=chunks))
            for name, chunks in self._groups().items()
        ]

    def _groups(self) -> dict[str, list[Chunk]]:
        chunks = self._chunks()
        # Megatron asks for one tensor over all layers where its argument is a number, for numbered layers where it is a list.
        if type(self.args.moe_layer_freq) is int:
            chunks = (chunk.in_stack(self.config.num_hidden_layers) for chunk in chunks)
        return {f"__0_{i}.distcp": group for i, group in enumerate(deal(chunks, self.shard_bytes))}

    def _chunks(self) -> Iterator[Chunk]:
        experts = self.config.n_routed_experts
        names = []
        for row in self.rows:
            name, tensor = row.megatron, self.tensors[row.megatron]
            if found := LOCAL_EXPERT.fullmatch(name):
                expert = int(found[2])
                key = f"{found[1]}experts.{found[3]}"
                yield Chunk(key, tensor, (expert, 0, 0), (1, *tensor.shape), (experts, *tensor.shape))
                yield Chunk(f"{key.removesuffix('weight')}_extra_state/shard_{expert}_{experts}")
                continue
            key = te_name(name, self._is_dense(name)) if self.transformer_engine else name
            names.append(key)
            rows = max(1, CHUNK_BYTES // (tensor.nbytes // tensor.shape[0]))
            for start in range(0, tensor.shape[0], rows):
                part = narrow(tensor, 0, start, min(rows, tensor.shape[0] - start))
                yield Chunk(key, part, (start, *(0,) * (len(part.shape) - 1)), part.shape, tensor.shape)
        for module in modules_with_state(names, self.transformer_engine):
            yield Chunk(f"{module}._extra_state/shard_0_1")

    def _is_dense(self, name: str) -> bool:
        found = LAYER.fullmatch(name)
        return found is not None and self.config.mlp_layer_types[int(found[1])] == "dense"

    def finish(self, folder: Path, done: Mapping[str, Mapping]) -> None:
        """Write `.metadata`, `metadata.json` and `common.pt` once all chunks are on the disk."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places = {}
        for filename, chunks in self._groups().items():
            for chunk, (start, length) in zip(chunks, done[filename]["places"], strict=True):
                offset = None if chunk.offsets is None else torch.Size(chunk.offsets)
                places[MetadataIndex(chunk.key, offset)] = _StorageInfo(filename, start, length)
                if offset is None:
                    entries[chunk.key] = BytesStorageMetadata()
                    continue
                properties = TensorProperties(dtype=chunk.tensor.dtype)
                empty = TensorStorageMetadata(properties, torch.Size(chunk.whole), [])
                entry = entries.setdefault(chunk.key, empty)
                entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.sizes)))
        with (folder / ".metadata").open("wb") as file:
            pickle.dump(Metadata(entries, storage_data=places), file)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common_backend = {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backend | common_backend))
        common = {"args": self.args, "checkpoint_version": 3.0, "iteration": self.iteration}
        content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        torch.save(
            {**common, "num_floating_point_operations_so_far": 0, "content_metadata": content}, folder / "common.pt"
        )


def write_chunks(
    path: Path,
    tick: Callable[[Tensor], None],
    *,
    chunks: list[Chunk],
    state: list[Tensor | None],
    block_bytes: int,
) -> dict[str, Any]:
    """Write one .distcp file, each chunk what torch.save makes of it; returns its sha256 and where each chunk lies."""
    frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = {}
    state_bytes = _saved(state)
    places = []
    with HashedFile(path, block_bytes) as file:
        for chunk in chunks:
            start = file.tell()
            if chunk.tensor is None:
                file.write(state_bytes)
            else:
                kind = chunk.tensor.dtype, chunk.sizes
                if kind not in frames:
                    frames[kind], _ = frame_of(filled(*kind, 0))
                frames[kind].write(file, [chunk.tensor], tick)
            places.append([start, file.tell() - start])
    return {"sha256": file.digest.hexdigest(), "places": places}


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
