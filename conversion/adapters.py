"""How does a LoRA adapter leave PEFT's format?  Expert by expert for vLLM, or merged into a checkpoint; no model is built.

PEFT stacks the adapters of a layer's routed experts: lora_A [E * R, F], expert after expert, and lora_B [O, R * E], an expert's
columns E apart, of gate_up_proj (gate rows first) under `experts.base_layer` and of down_proj under `experts` itself.

Axes: E experts, R rank, F in features, O out features, I expert width.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from conversion.checkpoint import (
    Job,
    StoredTensor,
    identity,
    listed,
    open_checkpoint,
    plan_shards,
    read_elements,
    read_header,
    read_json,
    shard_file,
    write_files,
    write_index,
)
from conversion.merging import BLOCK_ELEMENTS, COPIED_FILES, MERGED_DTYPES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
STACKED = re.compile(r"(?P<experts>.+\.experts)(?P<inner>\.base_layer)?")
# What PEFT can do besides and neither a merge nor vLLM would see.
UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "layer_replication",
)  # fmt: skip
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights, so that B A belongs to no stored checkpoint.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

# (A [R, F], B [O, R]), read when it is called.
Pair = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Factors:
    """The pair of one matrix [O, F] as checkpoints store it."""

    shape: tuple[int, int]
    read: Pair


@dataclass(frozen=True)
class Adapter:
    path: Path  # the weights
    config: dict
    scale: float
    factors: dict[str, Factors]  # by the matrix's name in a checkpoint, such as model.layers.3.mlp.experts.7.up_proj


def open_adapter(folder: str | Path) -> Adapter:
    """A LoRA adapter as PEFT saves it. ValueError for what is no LoRA, holds more than A and B, or scales its layers unlike."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {CONFIG} and {WEIGHTS}; give the folder that PEFT or a trainer saved.")
    config = read_json(folder / CONFIG)
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in PLAIN_INITS:
        used.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} is not plain LoRA ({listed(used) or config.get('peft_type')}); merge it with PEFT's merge_and_unload."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(
            f"{folder / CONFIG} says r={rank!r} and lora_alpha={alpha!r}, no rank and number; save it again."
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(folder / WEIGHTS, config, scale, find_factors(folder / WEIGHTS, config))


def find_factors(path: Path, config: dict) -> dict[str, Factors]:
    shapes = {tensor.name: tensor.shape for tensor in read_header(path)}
    foreign = [key for key in shapes if not KEY.fullmatch(key)]
    if foreign:
        raise ValueError(f"{path} holds more than A and B of linear layers: {listed(foreign)}; merge it with PEFT.")
    factors: dict[str, Factors] = {}
    # Experts come one by one, in a checkpoint's order: down_proj and gate_up_proj of a layer take turns.
    cached = lru_cache(maxsize=4)(read_pair)
    for module in sorted({KEY.fullmatch(key)["module"] for key in shapes}):
        read, stacked = partial(cached, path, f"{PREFIX}{module}"), STACKED.fullmatch(module)
        a_shape, b_shape = (shapes.get(f"{PREFIX}{module}.lora_{side}.weight", ()) for side in "AB")
        if not is_pair(a_shape, b_shape, config["r"], bool(stacked)):
            raise ValueError(
                f"{path} holds lora_A {list(a_shape)} and lora_B {list(b_shape)} of {module}, no pair of rank {config['r']}; "
                "save the adapter again."
            )
        whole = Factors((b_shape[0], a_shape[1]), read)
        if stacked:
            matrix = stacked_matrix(bool(stacked["inner"]), config)
            factors |= expert_factors(stacked["experts"], matrix, a_shape[0] // config["r"], whole)
        else:
            factors[module] = whole
    return factors


def is_pair(a_shape: tuple[int, ...], b_shape: tuple[int, ...], rank: int, stacked: bool) -> bool:
    """Whether both are there and share their ranks: one, or where experts are stacked some times one."""
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or not a_shape[0]:
        return False
    return a_shape[0] % rank == 0 if stacked else a_shape[0] == rank


def read_pair(path: Path, name: str) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(f"{name}.lora_A.weight"), file.get_tensor(f"{name}.lora_B.weight")


def stacked_matrix(inner: bool, config: dict) -> str:
    """Which matrix of the experts a pair belongs to: PEFT nests down_proj around gate_up_proj, where both are adapted."""
    names = {target.rpartition(".")[2] for target in config.get("target_parameters") or ()}
    if not names or not names <= {"gate_up_proj", "down_proj"}:
        raise ValueError(
            f"target_parameters={config.get('target_parameters')} does not say which matrices of the experts are adapted; "
            "they should be mlp.experts.gate_up_proj and mlp.experts.down_proj."
        )
    return "gate_up_proj" if inner or names == {"gate_up_proj"} else "down_proj"


def expert_factors(name: str, matrix: str, experts: int, whole: Factors) -> dict[str, Factors]:
    """The matrices that a checkpoint stores for a stacked one: each expert's down_proj, or its gate_proj and up_proj."""

    def of(expert: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = whole.read()
        b_OR = lora_B[:, expert::experts].chunk(parts)[part]
        return lora_A.chunk(experts)[expert].contiguous(), b_OR.contiguous()

    parts = ("down_proj",) if matrix == "down_proj" else ("gate_proj", "up_proj")
    shape = whole.shape[0] // len(parts), whole.shape[1]
    return {
        f"{name}.{expert}.{part}": Factors(shape, partial(of, expert, place, len(parts)))
        for expert in range(experts)
        for place, part in enumerate(parts)
    }


# -- for vLLM -------------------------------------------------------------------------------------------------------
def export_adapter(adapter_dir: str | Path, out_dir: str | Path) -> list[str]:
    """Write an adapter as vLLM reads it, `...experts.E.{gate,up,down}_proj.lora_{A,B}.weight`; returns what to be warned of.

    Of an expert, gate and up share A. vLLM takes one rank and scale for all layers, and its latent attention reads the base
    weight of kv_b_proj once, at load, so an adapter there is ignored.
    """
    adapter, out_dir = open_adapter(adapter_dir), Path(out_dir)
    partial_dir = out_dir.with_name(out_dir.name + ".partial")
    for path in (out_dir, partial_dir):
        # What lies in the second may be a merge that can still be finished.
        if path.exists():
            raise ValueError(f"{path} exists already; choose another name or remove it.")
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.factors.items():
        # Copies: gate and up share A, which safetensors would refuse.
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = map(
            torch.clone, factors.read()
        )
    config = adapter.config | {
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.factors}),
        "target_parameters": None,
    }
    partial_dir.mkdir(parents=True)
    try:
        save_file(tensors, partial_dir / WEIGHTS, metadata={"format": "pt"})
        (partial_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        partial_dir.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial_dir)
        raise
    ignored = [name for name in adapter.factors if name.endswith(".kv_b_proj")]
    if not ignored:
        return []
    return [
        f"vLLM ignores the adapters of {listed(ignored, 2)}: its latent attention reads that weight once, without them; merge "
        "the adapter (axk1 adapter merge), or train one without kv_b_proj."
    ]


# -- into a checkpoint ----------------------------------------------------------------------------------------------
def merge_adapter(
    model_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Path:
    """W + scale * B A for every adapted matrix of an unquantised checkpoint, in fp32 and rounded once to the stored dtype.

    The result is a checkpoint like `model_dir`'s. Memory does not grow with the model; a killed merge goes on where it was when
    called again. ValueError where the adapter was made for another model; OSError if the disk is full.
    """
    model_dir, adapter = Path(model_dir), open_adapter(adapter_dir)
    tensors = open_checkpoint(model_dir)
    check_fits(adapter, tensors, model_dir)
    shards = plan_shards(tensors.values(), shard_bytes)
    sources = {"model": [tensor.path for tensor in tensors.values()], "adapter": [adapter.path]}
    plan = {"job": "adapter merge", "scale": adapter.scale, "shard_bytes": shard_bytes}
    job = Job(out_dir, plan | {role: identity(paths) for role, paths in sources.items()})
    try:
        if not job.published:
            files = [shard_file(shard, partial(merged_blocks, adapter=adapter)) for shard in shards]
            write_files(job, files, workers=1, progress=progress, label="merge adapter")
            write_index(job.folder, shards)
            for path in sorted(path for pattern in COPIED_FILES for path in model_dir.glob(pattern)):
                shutil.copyfile(path, job.folder / path.name)
        job.publish()
    except ValueError:
        # Another model's adapter: what was written can never be taken up again.
        job.abandon()
        raise
    finally:
        job.close()
    return Path(out_dir)


def check_fits(adapter: Adapter, tensors: dict[str, StoredTensor], model_dir: Path) -> None:
    if "quantization_config" in read_json(model_dir / "config.json"):
        raise ValueError(
            f"{model_dir} is quantised: an adapter merges into the unquantised model without loss, give that."
        )
    missing = [name for name in adapter.factors if f"{name}.weight" not in tensors]
    if missing:
        raise ValueError(f"{model_dir} has no {listed(missing, 3)}; give the model that the adapter was trained on.")
    for name, factors in adapter.factors.items():
        if tensors[f"{name}.weight"].shape != factors.shape:
            raise ValueError(
                f"{name}.weight is {list(tensors[f'{name}.weight'].shape)} but its adapter {list(factors.shape)}; give the model "
                "that the adapter was trained on."
            )
    unlike = [name for name in adapter.factors if tensors[f"{name}.weight"].dtype not in MERGED_DTYPES]
    if unlike:
        raise ValueError(f"{listed(unlike, 3)} are stored in a dtype that takes no sum; give the unquantised model.")


def merged_blocks(tensor: StoredTensor, adapter: Adapter) -> Iterator[Tensor]:
    """A tensor in flat blocks of whole rows, its adapter added where it has one."""
    columns = tensor.shape[-1] if tensor.shape else 1
    step = max(BLOCK_ELEMENTS // max(columns, 1), 1) * columns
    factors = adapter.factors.get(tensor.name.removesuffix(".weight"))
    wide = torch.promote_types(tensor.dtype, torch.float32) if factors else tensor.dtype
    if factors:
        a_RF, b_OR = (factor.to(wide) for factor in factors.read())
    for start in range(0, tensor.elements, max(step, 1)):
        block = read_elements(tensor, start, min(start + step, tensor.elements))
        if factors:
            rows = b_OR[start // columns : start // columns + block.numel() // columns]
            block = (block.to(wide) + adapter.scale * (rows @ a_RF).flatten()).to(tensor.dtype)
        yield block
