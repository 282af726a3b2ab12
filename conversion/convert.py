"""How does an A.X K1 get from Hugging Face to Megatron and back, on a machine that holds neither Megatron nor a GPU?

A source of any format is opened as Hugging Face's tensors, unread; the target's files are planned from those, then written as a
stream, compared with the source and moved into place. Everything that is long resumes.
"""

import hashlib
import json
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from conversion.checkpoint import (
    FILE_BLOCKS,
    INDEX_NAME,
    Job,
    OutFile,
    Shard,
    TensorSpec,
    bytes_of,
    file_block_bytes,
    identity,
    listed,
    open_checkpoint,
    plan_shards,
    progress_bar,
    shard_file,
    write_files,
    write_index,
)
from conversion.config_map import arguments_from_config, arguments_from_rope
from conversion.megatron import TRACKER, all_post_norm_names, assemble, config_of, find_iteration, kind_of
from conversion.megatron_dist import DistFiles, arguments_of_dist, open_dist
from conversion.megatron_legacy import Layout, RankFiles, arguments_of_legacy, check_layout, open_legacy, stage_layers
from conversion.ops import Mosaic, Rooms, blocks, cat, filled, largest_piece, lent_bytes, same_bits, still_there, stored
from conversion.torch_file import shown
from conversion.weight_map import VOCAB, Row, add_absent, hf_to_megatron, megatron_to_hf, rows_of
from modeling_axk1.configuration_axk1 import AxK1Config
from modeling_axk1.generation_axk1 import set_thinking_tokens

MANIFEST = "manifest.json"
# What lies beside the numbers and says what they are.
DESCRIPTIONS = ("config.json", "generation_config.json", INDEX_NAME, ".metadata", "metadata.json", "common.pt")
RUN_OPTIONS = ("workers", "verify", "check_nan", "progress")
# Read to foretell a conversion's time.
MEASURED_BYTES = 2**26
# Beside its blocks a worker has what the C library keeps for each of its threads, measured; and so much is allowed in all where
# tensors are smaller than that.
WORKER_BYTES, LEAST_BYTES = 2 * 10**5, 2**21
# What a tensor costs before anything of it is read: its names, places and plan. Measured on K1: 67 MB for 46,868 tensors.
BYTES_A_TENSOR = 2048
TOKENIZER_FILES = (
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Opened:
    """A checkpoint of any format as Hugging Face's tensors, unread."""

    folder: Path
    kind: str  # "hf", "legacy" or "torch_dist"
    config: AxK1Config
    tensors: dict[str, Mosaic]
    rows: list[Row]
    args: dict[str, Any] = field(default_factory=dict)  # Megatron's, if it is Megatron's
    replicas: list[tuple[str, Mosaic, Mosaic]] = field(default_factory=list)
    added: list[str] = field(default_factory=list)  # constants for what the source leaves out
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def files(self) -> list[Path]:
        """Every file that says what the checkpoint is: those of its numbers and those that describe them."""
        described = [self.folder / name for name in DESCRIPTIONS if (self.folder / name).is_file()]
        return [*described, *{tile.path for tensor in self.tensors.values() for tile in tensor.tiles if tile.path}]


@dataclass(frozen=True)
class Reading:
    """How a source is to be understood where its own files do not say."""

    vocab_size: int | None = None
    tokenizer: Path | None = None
    config: Path | None = None
    post_norm: str | None = None
    drop_fp8_state: bool = False

    def __post_init__(self):
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} is not a number of tokens; give the true one.")
        for name in ("tokenizer", "config"):
            folder = getattr(self, name)
            # Transformers would take a name that is no folder for one on the Hub.
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{name}={folder} is not a folder; give one.")


AS_STORED = Reading()


# -- opening ----------------------------------------------------------------------------------------------------------
def open_any(source: str | Path, reading: Reading = AS_STORED) -> Opened:
    """Open a Hugging Face folder, or a Megatron checkpoint of either format. ValueError says what is wrong with it."""
    source = Path(source)
    try:
        return _open_hf(source) if is_hf(source) else _open_megatron(find_iteration(source), reading)
    except OSError:
        raise
    except ValueError as error:
        if str(source) in str(error) or str(error).startswith("--config"):
            raise
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:
        # What is in a file from outside can be wrong in any way; here it is said in one sentence.
        raise ValueError(
            f"{source} holds what no known version writes ({error!r}); it is damaged or too new."
        ) from error


def is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def local_tokenizer(folder: Path):
    """The tokenizer of a folder: no code of its own is run, nothing is fetched."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _open_hf(folder: Path) -> Opened:
    said = json.loads((folder / "config.json").read_text())
    if said.get("model_type") not in ("axk1", "AXK1"):
        raise ValueError(f"{folder} holds a model of type {said.get('model_type')!r}; only axk1 is converted.")
    if "quantization_config" in said:
        raise ValueError(f"{folder} is quantised: Megatron has no place for packed weights; convert the bf16 ones.")
    config = AxK1Config.from_pretrained(folder)
    tensors = {name: stored(t.path, t.start, t.dtype, t.shape) for name, t in open_checkpoint(folder).items()}
    layers = config.num_hidden_layers
    # The release says that it has a prediction layer and ships none: the tensors decide.
    config.num_nextn_predict_layers = sum(
        f"model.layers.{layers + i}.enorm.weight" in tensors for i in range(len(tensors))
    )
    if max(config.num_hidden_layers, config.n_routed_experts) > len(tensors):
        raise ValueError(
            f"{folder} holds {len(tensors)} tensors, fewer than its config has layers or experts; it is incomplete."
        )
    opened = Opened(folder, "hf", config, tensors, rows_of(config))
    if config.tie_word_embeddings and HEAD in tensors:
        opened.replicas.append((HEAD, tensors[EMBEDDING], tensors.pop(HEAD)))
    opened.added = add_absent(config, opened.rows, tensors, lambda row: row.hf[0])
    # Named, counted and measured, and put in the table's order.
    opened.tensors = megatron_to_hf(opened.rows, hf_to_megatron(opened.rows, tensors))
    return opened


def _open_megatron(folder: Path, reading: Reading) -> Opened:
    kind, names = kind_of(folder), all_post_norm_names(reading.post_norm)
    if kind is None:
        raise ValueError(
            f"{folder} holds neither .metadata and metadata.json nor rank files: its save broke off, or they were not fetched; "
            "fetch them, or take an earlier iteration."
        )
    if kind not in ("legacy", "torch_dist"):
        raise ValueError(f"{folder} is of the format {shown(kind)[:40]}; save it as torch_dist, or as legacy rank files (torch).")
    opener = open_legacy if kind == "legacy" else open_dist
    source = opener(folder, names, reading.drop_fp8_state)
    base = AxK1Config.from_pretrained(reading.config) if reading.config else None
    config = config_of(source, _vocabulary(source.args, reading, base))
    if base is not None:
        _check_same_model(config, base)
    _set_token_ids(config, base)
    rows = rows_of(config)
    whole, added = assemble(source, config, rows)
    hf_names = {row.megatron: row.hf[0] for row in rows}
    return Opened(
        folder,
        kind,
        config,
        megatron_to_hf(rows, whole),
        rows,
        args=source.args,
        replicas=source.replicas,
        added=[hf_names[name] for name in added],
        facts=source.facts,
    )


def _vocabulary(args: Mapping[str, Any], reading: Reading, base: AxK1Config | None) -> int | None:
    """The true vocabulary, from the first that says it; None leaves it to the arguments, which may not."""
    if reading.vocab_size is not None:
        return reading.vocab_size
    if base is not None:
        return base.vocab_size
    if args.get("vocab_size") is None and reading.tokenizer is not None:
        return len(local_tokenizer(reading.tokenizer))
    return None


MODEL_FIELDS = (
    "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads n_shared_experts n_routed_experts "
    "num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor kv_lora_rank q_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim mlp_layer_types rms_norm_eps rope_parameters tie_word_embeddings"
).split()


def _check_same_model(config: AxK1Config, base: AxK1Config) -> None:
    differing = [
        f"{name} ({getattr(config, name)!r} and {getattr(base, name)!r})"
        for name in MODEL_FIELDS
        if _field(config, name) != _field(base, name)
    ]
    if differing:
        raise ValueError(f"--config describes another model than the checkpoint: {listed(differing)}.")


def _set_token_ids(config: AxK1Config, base: AxK1Config | None) -> None:
    """Megatron's arguments hold none: those of `--config`, else the release's where the vocabulary has them."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(base or config, name)
        fits = not isinstance(value, int) or value < config.vocab_size
        setattr(config, name, value if fits else None)


# -- planning and running ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What a conversion would write and need."""

    files: list[tuple[str, int]]  # name, bytes of tensors
    memory_bytes: int  # beyond the interpreter's own
    seconds: float
    bytes_per_s: float  # measured on the source: reading and hashing, by one worker

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Converted:
    """What a conversion did: where the result is, how much, how long, and what the source had left out."""

    path: Path
    nbytes: int
    files: int
    write_s: float
    verify_s: float | None
    added: tuple[str, ...]


@dataclass
class Conversion:
    """A source, opened, and the files that it will become. Nothing is written before `run`."""

    opened: Opened
    target: Path
    files: list[OutFile]
    decides: dict[str, Any]  # with the source files, all that decides the output's bytes
    companions: Callable[[Path, Mapping[str, Mapping]], None]  # writes what lies beside the files, once they are there
    paths: list[Path] = field(init=False)
    sources: list[list] = field(init=False)  # what stands for the source's content as it was planned from

    def __post_init__(self):
        self.paths = self.opened.files()
        self.sources = identity(self.paths)

    def plan(self, workers: int | None = None) -> Plan:
        """What would be written, the memory it takes, and the time that the source's first 64 MB promise."""
        tensors = self.opened.tensors.values()
        workers = fitting_workers(checked_workers(workers), tensors)
        rate, nbytes = _measured_rate(self.opened), sum(file.nbytes for file in self.files)
        memory_bytes = workers * held_bytes(tensors) + BYTES_A_TENSOR * len(tensors)
        return Plan([(file.name, file.nbytes) for file in self.files], memory_bytes, nbytes / rate / workers, rate)

    def run(
        self, *, workers: int | None = None, verify: bool = True, check_nan: bool = False, progress: bool = True
    ) -> Converted:
        """Write, compare with the source, move into place.

        workers: files written at a time, fewer if they would hold more than twice the largest tensor; the bytes do not depend on
        it. verify: read the result back and compare it with the source, tensor by tensor. check_nan: look for NaN in the source
        first. A killed conversion goes on where it was when run again, and ends in the same bytes. ValueError says what cannot be
        converted; OSError if the disk is full, or a source file gone: the source is untouched, the same call resumes.
        """
        workers = checked_workers(workers)
        if check_nan:
            find_nan(self.opened, workers, progress)
        self._require_unchanged()
        job = Job(self.target, self.decides | {"sources": self.sources})
        write_s, verify_s = 0.0, None
        try:
            if not job.published:
                begun = time.perf_counter()
                label = f"{self.opened.kind} {self.decides['job']}"
                fitting = fitting_workers(workers, self.opened.tensors.values())
                write_files(job, self.files, workers=fitting, progress=progress, label=label)
                self.companions(job.folder, job.done)
                self._write_manifest(job)
                write_s = time.perf_counter() - begun
                if verify:
                    begun = time.perf_counter()
                    self._require_same(job.folder, workers, progress)
                    verify_s = time.perf_counter() - begun
                self._require_unchanged()
            job.publish()
        except ValueError:
            # A source that cannot be converted, or a result that is wrong: what was written can never be taken up again.
            job.abandon()
            raise
        finally:
            job.close()
        nbytes = sum(file.nbytes for file in self.files)
        return Converted(self.target, nbytes, len(self.files), write_s, verify_s, tuple(self.opened.added))

    def _require_unchanged(self) -> None:
        """From its opening on: places come from its headers, numbers later from those places."""
        if identity(self.paths) != self.sources:
            raise ValueError(f"{self.opened.folder} has changed while it was converted; convert it again.")

    def _write_manifest(self, job: Job) -> None:
        """What was written, with the sha256 of each file as it was written, before the disk had it."""
        tensors = self.opened.tensors
        manifest = {
            "source_format": self.opened.kind,
            "tensors": len(tensors),
            "numbers": sum(tensor.elements for tensor in tensors.values()),
            "constants": sorted(self.opened.added),
            "files": {
                file.name: {"bytes": (job.folder / file.name).stat().st_size, "sha256": job.done[file.name]["sha256"]}
                for file in sorted(self.files, key=lambda file: file.name)
            },
        }
        (job.folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def _require_same(self, folder: Path, workers: int, progress: bool) -> None:
        check_replicas(self.opened, workers, progress)
        written = open_any(folder)
        differing = compare_models(self.opened, written, workers, progress)
        if differing:
            raise ValueError(
                f"what was written to {folder} differs from {self.opened.folder}: {listed(differing)}; run it again."
            )


def _decides(job: str, opened: Opened, shard_bytes: int) -> dict[str, Any]:
    """With the source's files, all that decides a conversion's bytes."""
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} is not positive; 5 GB is {5 * 10**9}.")
    tensors = [[name, str(tensor.dtype), tensor.shape] for name, tensor in opened.tensors.items()]
    digest = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()
    config = json.loads(opened.config.to_json_string(use_diff=False))
    return {"job": job, "shard_bytes": shard_bytes, "config": config, "tensors": digest}


def default_workers() -> int:
    """Files written at a time.

    Each is read by its worker while threads of its own hash and write it: a single file, which no workers could share, is so
    written as fast as it can be hashed. The price is that on few cores more workers gain little.
    """
    return min(4, os.cpu_count() or 1)


def checked_workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is not a number of threads; use 1 or more.")
    return default_workers() if workers is None else workers


def held_bytes(tensors: Collection[Mosaic], beside: Iterable[Mosaic] = ()) -> int:
    """What a worker holds while it writes a file of these tensors, or compares two of them; `beside` are compared with them."""
    block_bytes = file_block_bytes(largest_piece(tensors))
    lent = max((lent_bytes(tensor) for tensor in (*tensors, *beside)), default=0)
    room_bytes = max(Rooms(block_bytes).block_bytes, lent)
    return max(room_bytes + FILE_BLOCKS * block_bytes, 2 * room_bytes) + WORKER_BYTES


def fitting_workers(workers: int, tensors: Collection[Mosaic], beside: Iterable[Mosaic] = ()) -> int:
    """As many of so many workers as together hold no more than twice what the largest tensor has in one file; one at least."""
    budget_bytes = max(2 * largest_piece(tensors), LEAST_BYTES)
    return max(1, min(workers, budget_bytes // held_bytes(tensors, beside)))


def _measured_rate(opened: Opened) -> float:
    """Bytes a second of reading and hashing the first 64 MB."""
    digest, seen, begun = hashlib.sha256(), 0, time.perf_counter()
    for block in (block for tensor in opened.tensors.values() for block in blocks(tensor)):
        digest.update(bytes_of(block))
        seen += block.nbytes
        if seen >= MEASURED_BYTES:
            break
    return max(seen, 1) / max(time.perf_counter() - begun, 1e-9)


def convert_to_hf(source: str | Path, target: str | Path, **options) -> Converted:
    """`to_hf(source, target, ...).run(...)`: options are those of both."""
    return _run(to_hf, source, target, options)


def convert_to_megatron(source: str | Path, target: str | Path, **options) -> Converted:
    """`to_megatron(source, target, ...).run(...)`: options are those of both."""
    return _run(to_megatron, source, target, options)


def _run(
    planner: Callable[..., Conversion], source: str | Path, target: str | Path, options: dict[str, Any]
) -> Converted:
    running = {name: options.pop(name) for name in RUN_OPTIONS if name in options}
    return planner(source, target, **options).run(**running)


# -- to Hugging Face --------------------------------------------------------------------------------------------------
def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    reading: Reading = AS_STORED,
    shard_bytes: int = 5 * 10**9,
) -> Conversion:
    """Plan a folder that `from_pretrained` loads, ours and stock transformers' alike, of a checkpoint of any format."""
    opened = open_any(source, reading)
    shards = _hf_shards(opened, shard_bytes)
    block_bytes = file_block_bytes(largest_piece(opened.tensors.values()))
    files = [_hf_file(shard, opened.tensors, block_bytes) for shard in shards]

    # Now, so that a tokenizer that cannot be read is known before hours of writing.
    tokenizer_dir = reading.tokenizer or (opened.folder if opened.kind == "hf" else None)
    copied = _tokenizer_files(Path(tokenizer_dir)) if tokenizer_dir else []
    generation_config = _generation_config(opened, reading.tokenizer)

    def companions(folder: Path, done: Mapping[str, Mapping]) -> None:
        write_index(folder, shards)
        config = opened.config
        config.architectures = ["AXK1ForCausalLM"]
        config.dtype = opened.tensors[EMBEDDING].dtype
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        for path in copied:
            with still_there(path):
                content = path.read_bytes()
            (folder / path.name).write_bytes(content)

    return Conversion(opened, Path(target), files, _decides("to-hf", opened, shard_bytes), companions)


def _hf_file(shard: Shard, tensors: Mapping[str, Mosaic], block_bytes: int) -> OutFile:
    """A shard whose room for reading is there as long as the file is written."""

    def write(path: Path, tick: Callable[[Tensor], None]) -> Mapping:
        rooms = Rooms(block_bytes)
        return shard_file(shard, lambda spec: blocks(tensors[spec.name], rooms), block_bytes).write(path, tick)

    return OutFile(shard.filename, shard.nbytes, write)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def _generation_config(opened: Opened, tokenizer_dir: Path | None) -> GenerationConfig:
    """A Hugging Face source's own, else the config's; with the ids of the thinking tokens, where a tokenizer is given."""
    if opened.kind == "hf" and (opened.folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(opened.folder, local_files_only=True)
    else:
        generation_config = GenerationConfig.from_model_config(opened.config)
    if tokenizer_dir is not None:
        tokenizer = local_tokenizer(tokenizer_dir)
        try:
            set_thinking_tokens(generation_config, tokenizer)
        except ValueError as error:
            warnings.warn(f"The thinking ids are not written: {error}", stacklevel=2)
    return generation_config


def _hf_shards(opened: Opened, shard_bytes: int) -> list[Shard]:
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()]
    return plan_shards(specs, shard_bytes)


# -- to Megatron ------------------------------------------------------------------------------------------------------
def to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int | None = None,
    format: str = "torch_dist",
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    transformer_engine: bool | None = None,
    vocab_divisor: int | None = None,
    iteration: int | None = None,
    mtp_layer_name: str = "transformer_layer",
    reading: Reading = AS_STORED,
    shard_bytes: int = 5 * 10**9,
) -> Conversion:
    """Plan a checkpoint of Megatron's in any layout: from Hugging Face, or from Megatron to reshard it.

    format: "torch_dist" (one checkpoint for every layout; the layout is only noted) or "legacy" (rank files). vpp: chunks a
    pipeline stage. etp: tensor parallelism inside experts; tp if None, as in Megatron. transformer_engine: that spec's names,
    or the local spec's; None: a Megatron source's own, else local. vocab_divisor: Megatron's make_vocab_size_divisible_by,
    128 if neither given nor known. iteration: None writes a `release`, which Megatron loads without optimizer state.
    mtp_layer_name: in rank files, "mtp_model_layer" from megatron-core 0.17 on.
    """
    if format not in ("legacy", "torch_dist"):
        raise ValueError(f"format={format!r} is unknown; use 'torch_dist' or 'legacy'.")
    if (iteration or 0) < 0 or (vocab_divisor or 1) < 1:
        raise ValueError(
            f"iteration={iteration} and vocab_divisor={vocab_divisor} count something; use positive numbers."
        )
    opened = open_any(source, reading)
    layout = Layout(tp, pp, 1 if vpp is None else vpp, ep, tp if etp is None else etp)
    if format == "legacy":
        check_layout(layout, opened.config)
    if transformer_engine is None:
        transformer_engine = opened.args.get("transformer_impl") == "transformer_engine"
    divisor = vocab_divisor or opened.args.get("make_vocab_size_divisible_by") or 128
    tensors = _padded(opened, divisor * tp)
    uneven = (first_stage_layers, last_stage_layers)
    args = _arguments(opened, layout, format, transformer_engine, divisor, iteration, uneven)
    what = (opened.config, opened.rows, tensors, args, transformer_engine, iteration or 0)
    if format == "legacy":
        chunks = stage_layers(opened.config.num_hidden_layers, layout, *uneven)
        model = RankFiles(*what, layout, chunks, mtp_layer_name)
    else:
        model = DistFiles(*what, shard_bytes)
    inner = "release" if iteration is None else f"iter_{iteration:07d}"
    block_bytes = file_block_bytes(largest_piece(opened.tensors.values()))
    files = [replace(file, name=f"{inner}/{file.name}") for file in model.files(block_bytes)]

    def companions(folder: Path, done: Mapping[str, Mapping]) -> None:
        if isinstance(model, DistFiles):
            model.finish(folder / inner, {name.removeprefix(f"{inner}/"): facts for name, facts in done.items()})
        (folder / TRACKER).write_text("release" if iteration is None else str(iteration))

    decides = _decides("to-megatron", opened, shard_bytes) | {"arguments": repr(args), "mtp_layer_name": mtp_layer_name}
    return Conversion(opened, Path(target), files, decides, companions)


def _padded(opened: Opened, multiple: int) -> dict[str, Mosaic]:
    """Megatron's tensors, the vocabulary filled up with zeros to the multiple that its ranks share."""
    tensors = hf_to_megatron(opened.rows, opened.tensors)
    for row in opened.rows:
        if row.split == VOCAB and (missing := -row.shape[0] % multiple):
            tensor = tensors[row.megatron]
            tensors[row.megatron] = cat([tensor, filled(tensor.dtype, (missing, *row.shape[1:]), 0.0)], 0)
    return tensors


def _arguments(
    opened: Opened,
    layout: Layout,
    format: str,
    transformer_engine: bool,
    divisor: int,
    iteration: int | None,
    uneven: tuple[int | None, int | None],
) -> Namespace:
    vocab, dtype = opened.config.vocab_size, opened.tensors[EMBEDDING].dtype
    arguments = arguments_from_config(opened.config)
    if opened.args.get("moe_layer_freq") == 1:
        # As its run has it: Megatron looks for the layers of a torch_dist checkpoint by the form of this argument.
        arguments["moe_layer_freq"] = 1
    return Namespace(
        **arguments,
        make_vocab_size_divisible_by=divisor,
        padded_vocab_size=vocab + -vocab % (divisor * layout.tp),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        decoder_first_pipeline_num_layers=uneven[0],
        decoder_last_pipeline_num_layers=uneven[1],
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        context_parallel_size=1,
        data_parallel_size=1,
        world_size=max(layout.tp, layout.ep * layout.etp) * layout.pp,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        moe_grouped_gemm=transformer_engine,
        ckpt_format="torch" if format == "legacy" else format,
        use_dist_ckpt=format != "legacy",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        iteration=iteration or 0,
        no_save_optim=True,
        no_save_rng=True,
        tokenizer_type="HuggingFaceTokenizer",
    )


# -- looking ----------------------------------------------------------------------------------------------------------
def verify(
    a: str | Path,
    b: str | Path,
    *,
    reading: Reading = AS_STORED,
    workers: int | None = None,
    progress: bool = True,
) -> list[str]:
    """What differs between two checkpoints of any formats, one entry a tensor, compared bit for bit; [] if nothing does."""
    left, right, workers = open_any(a, reading), open_any(b, reading), checked_workers(workers)
    for opened in (left, right):
        check_replicas(opened, workers, progress)
    return compare_models(left, right, workers, progress)


def compare_models(a: Opened, b: Opened, workers: int, progress: bool) -> list[str]:
    """One entry for each field of the configs, and each tensor, in which two models differ."""
    fields = [
        f"config.{name} ({ours!r} and {theirs!r})"
        for name in MODEL_FIELDS
        if (ours := _field(a.config, name)) != (theirs := _field(b.config, name))
    ]
    return [*fields, *compare(a.tensors, b.tensors, workers=workers, progress=progress)]


def _field(config: AxK1Config, name: str) -> Any:
    """A field by what it means: RoPE's parameters with their defaults, as Megatron says them."""
    value = getattr(config, name)
    if name == "rope_parameters":
        try:
            return arguments_from_rope(value)
        except ValueError:
            return dict(value)
    return value


def check_replicas(opened: Opened, workers: int, progress: bool) -> None:
    """ValueError if two ranks disagree on a tensor that both hold whole: then nobody knows which one is right."""
    copies = dict(enumerate(opened.replicas))
    rooms = Rooms(file_block_bytes(largest_piece(a for _, a, _ in opened.replicas)))

    def differ(number: int) -> str | None:
        name, a, b = copies[number]
        if (a.dtype, a.shape) == (b.dtype, b.shape) and same_bits(a, b, rooms):
            return None
        return (
            f"{a.tiles[0].path} and {b.tiles[0].path} hold different copies of {name}; the checkpoint is damaged or mixed "
            "(--no-verify takes the first)."
        )

    tensors = {number: a for number, (_, a, _) in copies.items()}
    workers = fitting_workers(workers, tensors.values(), [b for _, _, b in opened.replicas])
    for difference in _over(tensors, tensors, differ, "compare copies", workers, progress and bool(copies)):
        if difference:
            raise ValueError(difference)


def compare(a: Mapping[str, Mosaic], b: Mapping[str, Mosaic], *, workers: int = 1, progress: bool = False) -> list[str]:
    """One entry for each tensor that only one has, or whose dtype, shape or bits differ."""
    only = [f"{name} (only the first has it)" for name in a if name not in b]
    only += [f"{name} (only the second has it)" for name in b if name not in a]
    both = [name for name in a if name in b]
    rooms = Rooms(file_block_bytes(largest_piece(a.values())))
    workers = fitting_workers(workers, a.values(), b.values())

    def difference(name: str) -> str | None:
        x, y = a[name], b[name]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return f"{name} ({x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)})"
        return None if same_bits(x, y, rooms) else f"{name} (its numbers)"

    return [*only, *filter(None, _over(a, both, difference, "verify", workers, progress))]


def find_nan(opened: Opened, workers: int, progress: bool) -> None:
    """ValueError that names every tensor with a NaN."""
    rooms = Rooms(file_block_bytes(largest_piece(opened.tensors.values())))
    workers = fitting_workers(workers, opened.tensors.values())

    def has_nan(name: str) -> str | None:
        floats = opened.tensors[name].dtype.is_floating_point
        return name if floats and any(block.isnan().any() for block in blocks(opened.tensors[name], rooms)) else None

    found = list(filter(None, _over(opened.tensors, opened.tensors, has_nan, "look for NaN", workers, progress)))
    if found:
        raise ValueError(
            f"{opened.folder} holds NaN in {listed(found)}; take an earlier iteration, or leave out --check-nan."
        )


def _over(
    tensors: Mapping[Hashable, Mosaic],
    names: Iterable[Hashable],
    look: Callable[[Any], str | None],
    label: str,
    workers: int,
    progress: bool,
) -> Iterator[str | None]:
    """`look` at each tensor, several at a time, with a bar of bytes; results in order."""
    names = list(names)
    with progress_bar(label, sum(tensors[name].nbytes for name in names), progress) as bar:
        with ThreadPoolExecutor(workers) as pool:
            for name, result in zip(names, pool.map(look, names), strict=True):
                bar.update(tensors[name].nbytes)
                yield result


def inspect(source: str | Path, reading: Reading = AS_STORED) -> dict[str, Any]:
    """What a checkpoint is: format, version, layout, size, parts; under "problem", why it cannot be converted, if it cannot."""
    source = Path(source)
    folder = source if is_hf(source) else find_iteration(source)
    facts: dict[str, Any] = {"folder": str(folder)} | ({} if is_hf(source) else _megatron_facts(folder))
    try:
        opened = open_any(source, reading)
    except ValueError as error:
        return facts | {"problem": str(error)}
    config = opened.config
    return facts | {
        "format": opened.kind,
        **opened.facts,
        "parameters": sum(
            t.elements for name, t in opened.tensors.items() if not name.endswith("e_score_correction_bias")
        ),
        "bytes": opened.nbytes,
        "tensors": len(opened.tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in opened.tensors.values()}),
        "layers": config.num_hidden_layers,
        "moe_layers": config.mlp_layer_types.count("sparse"),
        "routed_experts": config.n_routed_experts,
        "vocab_size": config.vocab_size,
        "mtp_layers": config.num_nextn_predict_layers,
        "post_mlp_norm": config.post_mlp_norm,
        "topk_method": config.topk_method,
        "rope": config.rope_parameters["rope_type"],
        "missing": opened.added,
    }


def _megatron_facts(folder: Path) -> dict[str, Any]:
    """What the arguments alone say, for a checkpoint that may not be whole."""
    kind = kind_of(folder)
    try:
        args = arguments_of_legacy(folder) if kind == "legacy" else arguments_of_dist(folder)
    except ValueError:
        return {"format": kind}
    layout, spec = Layout.of(args), args.get("transformer_impl")
    return {
        "format": kind,
        "layout": str(layout),
        "spec": spec if spec in (None, "local", "transformer_engine") else shown(spec)[:40],
    }
