"""How are Megatron's rank files read, and written: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`?

Layers are counted from 0 in every pipeline chunk, experts from 0 on every expert-parallel rank. The set of files is not
TP x PP x EP: a rank file holds one attention shard and one set of experts, and only as many exist as either needs.
"""

import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.checkpoint import HashedFile, OutFile, listed
from conversion.config_map import DESCRIBING
from conversion.megatron import MegatronSource, arguments_in, drop_state, listed_ranks, no_arguments, said_of
from conversion.ops import Mosaic, filled, narrow, reshape, swap, unstack
from conversion.torch_file import Inert, numbers_in, open_torch_file, shown
from conversion.torch_writer import frame_of
from conversion.weight_map import Row, local_name, modules_with_state, shards_of, te_name
from modeling_axk1.configuration_axk1 import AxK1Config

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
# The second name is of older versions with a distributed optimizer.
FILENAMES = ("model_optim_rng.pt", "model_rng.pt")
IN_CHUNK = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")
IN_EXPERTS = re.compile(r"(.+\.mlp\.experts\.)local_experts\.(\d+)(\..+)")
GROUPED = re.compile(r"(.+\.mlp\.experts\.)weight([12])")
# megatron-core 0.19, mla_down_proj_fusion.
FUSED_DOWN = re.compile(r"(.+\.self_attention\.)linear_qkv_down_proj\.weight")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Layout:
    """Numbers of ranks: tensor, pipeline, virtual pipeline chunks a stage, expert, and tensor parallelism inside experts."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self):
        for name, size in vars(self).items():
            if type(size) is not int or not 1 <= size <= 65536:
                raise ValueError(f"{name.upper()}={size!r} is not a number of ranks; use 1 or more.")

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Layout":
        tp = args.get("tensor_model_parallel_size") or 1
        return cls(
            tp=tp,
            pp=args.get("pipeline_model_parallel_size") or 1,
            vpp=args.get("virtual_pipeline_model_parallel_size") or 1,
            ep=args.get("expert_model_parallel_size") or 1,
            # Before there was such an argument, experts were split as everything else.
            etp=args.get("expert_tensor_parallel_size") or tp,
        )

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} VPP{self.vpp} EP{self.ep} ETP{self.etp}"

    def folder(self, tp: int, pp: int, ep: int) -> str:
        return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "") + (f"_{ep:03d}" if self.ep > 1 else "")

    def ranks(self) -> list[tuple[int, int]]:
        """The (tp, ep) whose files exist in each stage."""
        count = max(self.tp, self.ep * self.etp)
        return [(rank % self.tp, rank // self.etp % self.ep) for rank in range(count)]


def open_legacy(folder: Path, post_norm_names: tuple[str, ...], drop_fp8_state: bool) -> MegatronSource:
    """Open all rank files of one iteration. ValueError names a missing or damaged one."""
    paths = rank_files(folder)
    files = {numbers: _rank_file(path) for numbers, path in paths.items()}
    said = {numbers: arguments_in(file["args"]) for numbers, file in files.items()}
    (first_numbers, first), *others = files.items()
    args = said[first_numbers]
    layout = Layout.of(args)
    for numbers, file in others:
        check_same_run(paths[numbers], said[numbers], file, paths[first_numbers], args, first)
    check_ranks(folder, layout, {_rank(layout, numbers) for numbers in files})
    check_places(layout, {_rank(layout, numbers): (paths[numbers], said[numbers].get("rank")) for numbers in files})
    source = MegatronSource(folder, "legacy", args)
    source.facts = {name: first[name] for name in ("checkpoint_version", "iteration")}
    source.facts["files"] = len(paths)
    skipped = sorted(key for key in first if key in ("optimizer", "opt_param_scheduler", "rng_state"))
    source.facts["skipped"] = [*skipped, *sorted({path.name for path in folder.glob("mp_rank_*/distrib_optim.pt")})]
    ranks = {_rank(layout, numbers): (file, paths[numbers]) for numbers, file in files.items()}
    offset = 0
    for v in range(layout.vpp):
        for p in range(layout.pp):
            stage = {(tp, ep): _chunk(*ranks[tp, p, ep], v, layout) for tp, pp, ep in ranks if pp == p}
            offset += _add_chunk(source, layout, stage, offset, post_norm_names, drop_fp8_state)
    if not args.get("untie_embeddings_and_output_weights", True) and HEAD in source.parts:
        # Tied weights: the last pipeline stage keeps a copy of the embedding under this name.
        for copy, original in zip(source.parts.pop(HEAD), source.parts[EMBEDDING]):
            source.replicas.append((EMBEDDING, original, copy))
    return source


def arguments_of_legacy(folder: Path) -> dict[str, Any]:
    """The arguments alone, from the first rank file."""
    return arguments_in(_rank_file(next(iter(rank_files(folder).values())))["args"])


def check_same_run(
    path: Path, args: Mapping, file: Mapping, first_path: Path, first_args: Mapping, first: Mapping
) -> None:
    """ValueError if a rank file is of another iteration, model or layout than the first one."""
    facts, truth = (
        {
            "iteration": state.get("iteration"),
            "layout": str(Layout.of(said)),
            **{name: said.get(name) for name in (*DESCRIBING, "bf16", "fp16")},
        }
        for state, said in ((file, args), (first, first_args))
    )
    differing = [f"{name} ({shown(facts[name])} and {shown(truth[name])})" for name in facts if facts[name] != truth[name]]
    if differing:
        raise ValueError(
            f"{path} is of another checkpoint than {first_path.parent.name}: {listed(differing)}; fetch the one that does not "
            "belong here again."
        )


def _rank_file(path: Path) -> dict[str, Any]:
    file = open_torch_file(path)
    if not isinstance(file, dict) or not isinstance(file.get("args"), Inert):
        raise ValueError(no_arguments(path, file))
    return file | said_of(file, path)


def rank_files(folder: Path) -> dict[tuple[int, ...], Path]:
    """The rank files by the numbers in their folders' names, in order."""
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        numbers = RANK_FOLDER.fullmatch(path.name)
        if not numbers:
            raise ValueError(
                f"{path} is not named mp_rank_TT[_PPP][_EEE]; move what is not a rank file out of the way."
            )
        file = next((path / name for name in FILENAMES if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path} holds no {FILENAMES[0]}; the rank file is missing, fetch it.")
        rank = tuple(int(n) for n in numbers.groups() if n is not None)
        if rank in found:
            raise ValueError(
                f"{path} and {found[rank].parent} are the same rank; remove the one that does not belong here."
            )
        found[rank] = file
    return found


def _rank(layout: Layout, numbers: tuple[int, ...]) -> tuple[int, int, int]:
    """(tp, pp, ep). Of two numbers only the arguments say whether the second is a stage or an expert rank."""
    expected = 1 + (layout.pp > 1) + (layout.ep > 1)
    if len(numbers) != expected:
        raise ValueError(
            f"{listed_ranks([numbers])} does not fit PP={layout.pp}, EP={layout.ep}, which the arguments say; "
            "the folder mixes two checkpoints."
        )
    tp, *rest = numbers
    rank = tp, (rest.pop(0) if layout.pp > 1 else 0), (rest.pop(0) if layout.ep > 1 else 0)
    if any(number >= size for number, size in zip(rank, (layout.tp, layout.pp, layout.ep))):
        raise ValueError(
            f"{listed_ranks([numbers])} is no rank of TP={layout.tp} PP={layout.pp} EP={layout.ep}, which the arguments say; "
            "remove what does not belong here."
        )
    return rank


def check_ranks(folder: Path, layout: Layout, present: set[tuple[int, int, int]]) -> None:
    """ValueError unless every attention shard and every expert shard of every stage is there."""
    if layout.pp * max(layout.tp, layout.ep * layout.etp) > 1000 * len(present):
        raise ValueError(f"{folder} holds {len(present)} rank files, the arguments say {layout}; most are missing.")
    missing = []
    for p in range(layout.pp):
        here = {(tp, ep) for tp, pp, ep in present if pp == p}
        shards, experts = {tp for tp, _ in here}, {(ep, tp % layout.etp) for tp, ep in here}
        for tp, ep in layout.ranks():
            if tp not in shards or (ep, tp % layout.etp) not in experts:
                missing.append(layout.folder(tp, p, ep))
    if missing:
        raise ValueError(
            f"{folder} lacks the rank files {listed(dict.fromkeys(missing))} of TP={layout.tp} PP={layout.pp} "
            f"EP={layout.ep} ETP={layout.etp}; fetch them, or save again as torch_dist or with ETP=TP (Megatron-LM issue "
            "4200: some versions do not write them)."
        )


def check_places(layout: Layout, places: Mapping[tuple[int, int, int], tuple[Path, Any]]) -> None:
    """ValueError for a rank file in another one's folder. places: by (tp, pp, ep) the file, and the process's rank that it says.

    Tensor-parallel ranks lie next to each other, stages and expert ranks in order, whatever the order of the groups.
    [megatron-core, RankGenerator]
    """
    numbers = [number for _, number in places.values()]
    # A tool that is one process writes one number into all of them.
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        return
    wrong = [path for (tp, _, _), (path, number) in places.items() if number % layout.tp != tp]
    for axis in (1, 2):
        lines: dict[tuple[int, ...], list[tuple[Path, int]]] = {}
        for place in sorted(places):
            lines.setdefault((*place[:axis], *place[axis + 1 :]), []).append(places[place])
        wrong += [path for line in lines.values() for (_, a), (path, b) in pairwise(line) if a > b]
    if wrong:
        number = dict(places.values())[wrong[0]]
        raise ValueError(
            f"{wrong[0]} says that rank {number} wrote it, which is not the one that its folder is named after; folders were "
            "renamed, fetch them again."
        )


def _chunk(file: dict, path: Path, v: int, layout: Layout) -> dict[str, Any]:
    key = "model" if layout.vpp == 1 else f"model{v}"
    if not isinstance(file.get(key), dict):
        held = listed(sorted(str(name) for name in file))
        raise ValueError(
            f"{path} holds no {key!r} of VPP={layout.vpp}, only [{held}]; it was saved without the model, or its arguments are "
            "another run's: fetch the rank file of the model."
        )
    return file[key]


def _add_chunk(
    source: MegatronSource,
    layout: Layout,
    stage: dict[tuple[int, int], dict[str, Any]],
    offset: int,
    post_norm_names: tuple[str, ...],
    drop_fp8_state: bool,
) -> int:
    """Add one pipeline chunk's tensors of all ranks; returns the number of its layers."""
    layers = set()
    shards: dict[str, dict[int, list[Mosaic]]] = {}
    for (tp, ep), state in sorted(stage.items(), key=lambda item: (item[0][1], item[0][0])):
        for name, value in state.items():
            if not isinstance(name, str):
                raise ValueError(f"{source.folder}: {shown(name)} names a tensor; the file is damaged, fetch it again.")
            if name.endswith("_extra_state"):
                drop_state(name, numbers_in(value), source.folder, drop_fp8_state)
                continue
            if not isinstance(value, Mosaic):
                remedy = "fetch it again"
                if name == "language_model":
                    remedy = "Megatron-LM wrote it before Megatron core, load it with --use-mcore-models and save it again"
                raise ValueError(
                    f"{source.folder}: {name} is not a tensor but {type(value).__name__}, which no model of Megatron core "
                    f"holds; {remedy}."
                )
            name = name.removeprefix("module.")
            if found := IN_CHUNK.fullmatch(name):
                layers.add(int(found[2]))
                name = f"{found[1]}{int(found[2]) + offset}{found[3]}"
            for global_name, shard, tensor in _expert_shards(
                source, layout, local_name(name, post_norm_names), value, tp, ep
            ):
                shards.setdefault(global_name, {}).setdefault(shard, []).append(tensor)
    for name, by_rank in shards.items():
        parts = [copies[0] for _, copies in sorted(by_rank.items())]
        source.replicas += [(name, copies[0], copy) for copies in by_rank.values() for copy in copies[1:]]
        if name not in source.parts:
            source.parts[name] = parts
        elif name == EMBEDDING:
            # With multi-token prediction, or tied, the last stage has a copy of its own.
            source.replicas += [(name, a, b) for a, b in zip(source.parts[name], parts)]
        else:
            raise ValueError(
                f"{source.folder}: two pipeline chunks hold {name}; the files are of different checkpoints."
            )
    if layers != set(range(len(layers))):
        raise ValueError(
            f"{source.folder}: a pipeline chunk holds the layers {sorted(layers)}, not 0, 1, ...; it is damaged."
        )
    return len(layers)


def _expert_shards(
    source: MegatronSource, layout: Layout, name: str, value: Mosaic, tp: int, ep: int
) -> Iterator[tuple[str, int, Mosaic]]:
    """(global name, rank of the shard, tensor): one for most tensors, one for each local expert of a grouped weight."""
    if (GROUPED.fullmatch(name) or FUSED_DOWN.fullmatch(name)) and len(value.shape) != 2:
        raise ValueError(f"{source.folder}: {name} is of shape {list(value.shape)}, no matrix; fetch the file again.")
    if found := IN_EXPERTS.fullmatch(name):
        local = _local_experts(source, layout)
        yield f"{found[1]}local_experts.{ep * local + int(found[2])}{found[3]}", tp % layout.etp, value
    elif found := GROUPED.fullmatch(name):
        local = _local_experts(source, layout)
        # Viewed, not sliced: [H, E * F] holds E matrices [H, F] one after the other, [E * F, H] E matrices [F, H].
        width = value.shape[1] // local if found[2] == "1" else value.shape[0] // local
        shape = (local, value.shape[0], width) if found[2] == "1" else (local, width, value.shape[1])
        for i, matrix in enumerate(unstack(reshape(value, shape))):
            yield f"{found[1]}local_experts.{ep * local + i}.linear_fc{found[2]}.weight", tp % layout.etp, swap(matrix)
    elif found := FUSED_DOWN.fullmatch(name):
        # Each rank's rows of both down projections, one above the other, as gate and up are.
        query, latent = (source.args.get(key) or 0 for key in ("q_lora_rank", "kv_lora_rank"))
        rows = query * value.shape[0] // (query + latent + (source.args.get("qk_pos_emb_head_dim") or 0))
        yield f"{found[1]}linear_q_down_proj.weight", tp, narrow(value, 0, 0, rows)
        yield f"{found[1]}linear_kv_down_proj.weight", tp, narrow(value, 0, rows, value.shape[0] - rows)
    else:
        yield name, tp, value


def _local_experts(source: MegatronSource, layout: Layout) -> int:
    experts = source.args.get("num_experts") or source.args.get("num_moe_experts") or 0
    if not experts or experts % layout.ep:
        raise ValueError(
            f"{source.folder}: num_experts={experts} does not split over EP={layout.ep}; the arguments are wrong."
        )
    return experts // layout.ep


def check_layout(layout: Layout, config: AxK1Config) -> None:
    """ValueError for a layout that Megatron's rank files cannot hold, or that does not divide the model."""
    if layout.etp > layout.tp:
        raise ValueError(
            f"ETP={layout.etp} over TP={layout.tp}: Megatron names rank files by TP and EP, so two would collide."
        )
    if max(layout.tp, layout.ep * layout.etp) % min(layout.tp, layout.ep * layout.etp):
        raise ValueError(
            f"TP={layout.tp} and EP*ETP={layout.ep * layout.etp} do not fit one set of ranks; use multiples."
        )
    if layout.tp % layout.etp or config.n_routed_experts % layout.ep or config.num_attention_heads % layout.tp:
        raise ValueError(
            f"TP={layout.tp} EP={layout.ep} ETP={layout.etp} do not divide {config.num_attention_heads} heads and "
            f"{config.n_routed_experts} experts; use divisors, and an ETP that divides TP."
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise ValueError(f"VPP={layout.vpp} with PP=1: Megatron interleaves only several pipeline stages; use --pp.")


def stage_layers(layers: int, layout: Layout, first: int | None, last: int | None) -> list[list[range]]:
    """The layers of each chunk, by stage and virtual stage. `first` and `last` are the sizes of the outer stages, if uneven."""
    given = {0: first, layout.pp - 1: last} if layout.pp > 1 else {}
    sizes = {stage: size for stage, size in given.items() if size is not None}
    others, rest = layout.pp - len(sizes), layers - sum(sizes.values())
    if (others and rest % others) or (not others and rest) or rest < 0 or any(size < 0 for size in sizes.values()):
        raise ValueError(
            f"{layers} layers do not split over PP={layout.pp} with first={first}, last={last}; give --first-stage-layers "
            "or --last-stage-layers so that the other stages are alike."
        )
    per_stage = [sizes.get(stage, rest // max(others, 1)) for stage in range(layout.pp)]
    if any(size % layout.vpp for size in per_stage):
        raise ValueError(
            f"stages of {per_stage} layers do not split into VPP={layout.vpp} chunks each; choose another split."
        )
    chunks: list[list[range]] = [[] for _ in range(layout.pp)]
    start = 0
    for _ in range(layout.vpp):
        for stage, size in enumerate(per_stage):
            chunks[stage].append(range(start, start + size // layout.vpp))
            start += size // layout.vpp
    return chunks


@dataclass
class RankFiles:
    """Everything that decides Megatron's rank files of one model."""

    config: AxK1Config
    rows: list[Row]
    tensors: dict[str, Mosaic]  # whole, by Megatron's names, the vocabulary padded
    args: Namespace
    transformer_engine: bool
    iteration: int
    layout: Layout
    chunks: list[list[range]]
    # From megatron-core 0.17 on a rank file says mtp_model_layer; torch_dist never does.
    mtp_layer_name: str = "transformer_layer"

    def files(self, block_bytes: int) -> list[OutFile]:
        shards = {row.megatron: self._shards(row) for row in self.rows}
        files = []
        for stage in range(self.layout.pp):
            for tp, ep in self.layout.ranks():
                models = {
                    "model" if self.layout.vpp == 1 else f"model{v}": self._chunk(shards, tp, stage, ep, v)
                    for v in range(self.layout.vpp)
                }
                nbytes = sum(m.nbytes for model in models.values() for m in model.values() if isinstance(m, Mosaic))
                name = f"{self.layout.folder(tp, stage, ep)}/{FILENAMES[0]}"
                write = partial(write_rank_file, models=models, head=self._head(), block_bytes=block_bytes)
                files.append(OutFile(name, nbytes, write))
        return files

    def _head(self) -> dict[str, Any]:
        return {"args": self.args, "checkpoint_version": 3.0, "iteration": self.iteration}

    def _shards(self, row: Row) -> list[Mosaic]:
        ranks = self.layout.etp if IN_EXPERTS.fullmatch(row.megatron) else self.layout.tp
        return shards_of(row, self.tensors[row.megatron], ranks, replicate_down=self.transformer_engine)

    def _chunk(self, shards: dict[str, list[Mosaic]], tp: int, stage: int, ep: int, v: int) -> dict[str, Mosaic | None]:
        layers = self.chunks[stage][v]
        is_first = stage == 0 and v == 0
        is_last = stage == self.layout.pp - 1 and v == self.layout.vpp - 1
        has_copy = (
            is_last and not is_first and (self.config.num_nextn_predict_layers or self.config.tie_word_embeddings)
        )
        local = self.config.n_routed_experts // self.layout.ep
        held: dict[str, Mosaic | None] = {}
        for row in self.rows:
            name, parts = row.megatron, shards[row.megatron]
            dense = False
            if found := IN_CHUNK.fullmatch(name):
                layer = int(found[2])
                if layer not in layers:
                    continue
                name, dense = (
                    f"{found[1]}{layer - layers.start}{found[3]}",
                    self.config.mlp_layer_types[layer] == "dense",
                )
            elif not (is_first or has_copy if name == EMBEDDING else is_last):
                continue
            if expert := IN_EXPERTS.fullmatch(name):
                if int(expert[2]) // local != ep:
                    continue
                name = f"{expert[1]}local_experts.{int(expert[2]) % local}{expert[3]}"
            name = te_name(name, dense) if self.transformer_engine else name
            held[name.replace(".transformer_layer.", f".{self.mtp_layer_name}.")] = parts[tp % len(parts)]
        if has_copy and self.config.tie_word_embeddings:
            held[HEAD] = held[EMBEDDING]
            if not self.config.num_nextn_predict_layers:
                del held[EMBEDDING]
        state = filled(torch.uint8, (0,), 0) if self.transformer_engine else None
        held |= {f"{module}._extra_state": state for module in modules_with_state(list(held), self.transformer_engine)}
        if HEAD in held:
            held["output_layer._extra_state"] = None
        return held


def write_rank_file(
    path: Path,
    tick: Callable[[Tensor], None],
    *,
    models: dict[str, dict[str, Mosaic | None]],
    head: dict[str, Any],
    block_bytes: int,
) -> dict[str, Any]:
    """Write one rank file: what torch.save makes of it, the numbers as they come."""
    frame, tensors = frame_of({**head, **{key: OrderedDict(model) for key, model in models.items()}})
    with HashedFile(path, block_bytes) as file:
        frame.write(file, tensors, tick)
    return {"sha256": file.digest.hexdigest()}
