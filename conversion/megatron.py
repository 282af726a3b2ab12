"""What does a Megatron checkpoint hold, whichever of its formats it is in?

    legacy      one file a rank, `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`
    torch_dist  one checkpoint over all ranks, `.metadata` and `*.distcp`

Both become a `MegatronSource`: tensors under the local spec's names, layers and experts counted over the whole model, each as the
parts that tensor parallelism left of it. Optimizer and random states are never read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion.checkpoint import listed
from conversion.config_map import argument, check_numbers, config_from_arguments
from conversion.ops import Mosaic, cat, cat_halves, covers, narrow
from conversion.torch_file import Inert, plain, shown
from conversion.weight_map import COLUMNS, HALVES, POST_NORM, POST_NORM_NAMES, REPLICATED, VOCAB, Row, add_absent
from modeling_axk1.configuration_axk1 import AxK1Config

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_\d{7,}|release")
BIAS = re.compile(r"decoder\.layers\.\d+\.mlp\.router\.expert_bias")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


@dataclass
class MegatronSource:
    """A checkpoint opened but unread. `parts` maps a name to its shards by tensor-parallel rank (one, if it is whole)."""

    folder: Path
    kind: str  # "legacy" or "torch_dist"
    args: dict[str, Any]
    parts: dict[str, list[Mosaic]] = field(default_factory=dict)
    replicas: list[tuple[str, Mosaic, Mosaic]] = field(default_factory=list)  # the same numbers in two places
    facts: dict[str, Any] = field(default_factory=dict)  # version, iteration, files, what was skipped


def find_iteration(source: str | Path) -> Path:
    """The folder of one iteration: `source` itself, or the one that its tracker file names."""
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give one with {TRACKER}, or an iter_* or release folder.")
    tracker = source / TRACKER
    if not tracker.is_file():
        if kind_of(source) is None:
            raise ValueError(f"{source} holds neither {TRACKER} nor a checkpoint of Megatron's; give one that does.")
        return source
    said = tracker.read_bytes()[:100].decode(errors="replace").strip()
    name = f"iter_{int(said):07d}" if said.isascii() and said.isdigit() else said
    if not ITERATION.fullmatch(name):
        raise ValueError(f"{tracker} says {said!r}, which is neither an iteration nor 'release'; correct it.")
    if not (source / name).is_dir():
        raise ValueError(f"{tracker} names {name}, which is not there; fetch it, or give an iteration folder itself.")
    return source / name


def kind_of(folder: Path) -> str | None:
    """ "legacy", "torch_dist", the unreadable backend that metadata.json names, or None."""
    if (folder / "metadata.json").exists():
        try:
            return json.loads((folder / "metadata.json").read_text())["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'metadata.json'} names no backend ({error!r}); fetch it again.") from error
    if (folder / ".metadata").exists():
        return "torch_dist"
    return "legacy" if any(folder.glob("mp_rank_*")) else None


def arguments_in(namespace: Inert) -> dict[str, Any]:
    """The arguments of a run by name. ValueError for one that is to be reckoned with and no number."""
    args = plain(namespace)
    check_numbers(args)
    return args


def no_arguments(path: Path, held: Any) -> str:
    """The sentence for a file that should say what run it is of and does not."""
    if isinstance(held, dict):
        what = f"{shown(held['args'])} as args" if "args" in held else f"only [{listed(map(str, held), 4)}]"
    else:
        what = f"only {shown(held)}"
    return f"{path} holds no Megatron arguments, {what}; it is no model checkpoint of Megatron-LM, fetch the file that is."


def said_of(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Version and iteration. ValueError for what is no number: a list that holds itself twice could be compared for ever."""
    said = {name: state.get(name) for name in ("checkpoint_version", "iteration")}
    for name, value in said.items():
        if value is not None and not (type(value) in (int, float) and abs(value) < 2**63):
            raise ValueError(f"{path} says {name}={shown(value)}, which is no number; it is damaged, fetch it again.")
    return said


def layer_types_found(parts: Mapping[str, Any]) -> list[str]:
    """ "sparse" for a layer with a router, else "dense"; ValueError if a layer has no tensors at all."""
    layers: dict[int, str] = {}
    for name in parts:
        if found := LAYER.fullmatch(name):
            layer, rest = int(found[1]), found[2]
            layers[layer] = "sparse" if rest == "mlp.router.weight" else layers.get(layer, "dense")
    if not layers:
        held = f"only [{listed(parts)}]" if parts else "no weights at all"
        raise ValueError(
            f"the checkpoint holds no decoder layers, {held}; it is no whole Megatron GPT model: fetch the model's own files."
        )
    if len(layers) != max(layers) + 1:
        raise ValueError(
            f"the checkpoint holds {len(layers)} layers, the last of them number {max(layers)}; files are missing."
        )
    return [layers[layer] for layer in sorted(layers)]


def config_of(source: MegatronSource, vocab_size: int | None = None) -> AxK1Config:
    """The config that the checkpoint's arguments and tensors describe together."""
    types = layer_types_found(source.parts)
    if source.args.get("num_layers") not in (None, len(types)):
        raise ValueError(
            f"{source.folder} holds {len(types)} layers, its arguments say num_layers={source.args['num_layers']}; "
            "some of its files are missing."
        )
    experts = argument(source.args, "num_experts", 0)
    if "sparse" in types and (type(experts) is not int or experts > len(source.parts)):
        raise ValueError(
            f"{source.folder} says num_experts={experts!r} and holds {len(source.parts)} tensors; it is damaged."
        )
    sparse = [i for i, kind in enumerate(types) if kind == "sparse"]
    normed = [i for i in sparse if f"decoder.layers.{i}.{POST_NORM}" in source.parts]
    if normed and normed != sparse:
        raise ValueError(f"only the layers {normed} of {sparse} have a post-MLP norm; some tensors are missing.")
    mtp_layers = {int(found[1]) for name in source.parts if (found := MTP_LAYER.match(name))}
    if source.args.get("mtp_num_layers") not in (None, 0, len(mtp_layers)):
        raise ValueError(
            f"{source.folder} holds {len(mtp_layers)} prediction layers, its arguments say mtp_num_layers="
            f"{source.args['mtp_num_layers']}; its last stage was not saved whole, or the arguments are another run's."
        )
    return config_from_arguments(
        source.args,
        vocab_size=vocab_size,
        layer_types=types,
        has_bias=any(BIAS.fullmatch(name) for name in source.parts),
        post_mlp_norm=bool(normed) or any(name.endswith(POST_NORM) for name in source.parts),
        mtp_layers=len(mtp_layers),
    )


def assemble(source: MegatronSource, config: AxK1Config, rows: Sequence[Row]) -> tuple[dict[str, Mosaic], list[str]]:
    """Whole tensors by Megatron's names, and the names of those that were absent and are constants now.

    Copies of a tensor that several ranks hold whole join `source.replicas`. ValueError if the parts of one do not make the tensor
    that the config describes, or do not cover it.
    """
    by_name = {row.megatron: row for row in rows}
    whole = {}
    for name, parts in source.parts.items():
        tensor, copies = join(by_name[name], parts) if name in by_name else (parts[0], parts[1:])
        if not covers(tensor):
            raise ValueError(
                f"{source.folder}: the pieces of {name} do not cover its shape {list(tensor.shape)} exactly once; "
                "a file is missing or belongs to another checkpoint."
            )
        whole[name] = tensor
        source.replicas += [(name, tensor, copy) for copy in copies]
    added = add_absent(config, rows, whole, lambda row: row.megatron)
    return whole, added


def join(row: Row, parts: Sequence[Mosaic]) -> tuple[Mosaic, Sequence[Mosaic]]:
    """One tensor of its tensor-parallel shards, and the copies of it. By shape: what each rank holds whole is replicated."""
    dtypes = dict.fromkeys(part.dtype for part in parts)
    if len(dtypes) > 1:
        raise ValueError(
            f"{row.megatron} is {' on one rank, '.join(map(str, dtypes))} on another; their files are of different runs."
        )
    if row.split == VOCAB and all(len(part.shape) == 2 for part in parts) and len({p.shape[1] for p in parts}) == 1:
        tensor = cat(parts, 0)
        if tensor.shape[0] < row.shape[0] or tensor.shape[1:] != row.shape[1:]:
            raise ValueError(
                f"{row.megatron} is {list(tensor.shape)}, too small for a vocabulary of {row.shape[0]} at hidden size "
                f"{row.shape[1]}; correct --vocab-size."
            )
        return narrow(tensor, 0, 0, row.shape[0]), ()
    if all(part.shape == row.shape for part in parts):
        return parts[0], parts[1:]
    shapes = [list(part.shape) for part in parts]
    if row.split != REPLICATED and len({part.shape for part in parts}) == 1 and len(shapes[0]) == len(row.shape):
        tensor = cat_halves(parts) if row.split == HALVES else cat(parts, 1 if row.split == COLUMNS else 0)
        if tensor.shape == row.shape:
            return tensor, ()
    raise ValueError(
        f"{row.megatron}: parts of shapes {shapes} do not make the {list(row.shape)} that the arguments describe; "
        "a file belongs to another checkpoint, or the arguments are wrong."
    )


def drop_state(name: str, numbers: int, place: Path, allowed: bool) -> None:
    """Transformer Engine's `_extra_state` is empty unless the model computes in FP8: then a warning is owed, and consent."""
    if numbers and not allowed:
        raise ValueError(
            f"{place}: {name} holds {numbers} numbers of FP8 scaling state, which has no place in safetensors; the weights "
            "themselves are whole, give --drop-fp8-state to leave it behind."
        )


def all_post_norm_names(extra: str | None) -> tuple[str, ...]:
    return (*POST_NORM_NAMES, extra.removesuffix(".weight")) if extra else POST_NORM_NAMES


def listed_ranks(ranks: Sequence[tuple[int, ...]]) -> str:
    return listed("mp_rank_" + "_".join(f"{n:0{2 if i == 0 else 3}d}" for i, n in enumerate(rank)) for rank in ranks)
