"""How do a thinking and a non-thinking model become one starting point?  By a linear merge of all parameters.

theta = alpha * theta_thinking + (1 - alpha) * theta_nonthinking, alpha = 0.8  [tech report, post-training]
"""

import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from conversion.checkpoint import (
    Job,
    Shard,
    StoredTensor,
    file_block_bytes,
    identity,
    listed,
    open_checkpoint,
    plan_shards,
    read_elements,
    read_json,
    shard_file,
    write_files,
    write_index,
)

# What is read at a time.
BLOCK_ELEMENTS = 2**18
# What is computed at a time. Torch shares an operation among threads from 32,768 elements on; two threads on a busy 2-core
# machine made the merge 12 times slower than one, and pieces of this size stay in the cache of a core.
PIECE_ELEMENTS = 2**14
MERGED_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# What makes a folder a model besides its weights; taken from the thinking one.
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
# What a tokenizer without tokenizer.json adds to its vocabulary; later libraries write it elsewhere, and one may lack the file.
ADDED_TOKENS = "added_tokens.json"
# Left in tokenizer.json by whoever used it last; they do not change what a token means.
TOKENIZER_STATE = ("padding", "truncation")
# What a config says of its own history, not of the function that the weights compute.
CONFIG_HISTORY = ("_name_or_path", "transformers_version", "use_cache")


def merge_checkpoints(
    thinking_dir: str | Path,
    nonthinking_dir: str | Path,
    out_dir: str | Path,
    *,
    alpha: float = 0.8,
    shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Path:
    """Merge two safetensors folders of one architecture into `out_dir`: alpha * thinking + (1 - alpha) * non-thinking.

    The sum is taken in fp32 (fp64 for fp64 weights) and rounded once to the stored dtype; tensors that are not
    floating point must be equal. Config, tokenizer and chat template are the thinking model's. Memory does not grow
    with the model. A killed merge goes on where it was when called again, and ends in the same bytes.
    ValueError lists what differs between the two (names, shapes, dtypes, tokenizers) and names a NaN's tensor;
    OSError if the disk is full: the sources are untouched, and the same call resumes.
    """
    thinking_dir, nonthinking_dir = Path(thinking_dir), Path(nonthinking_dir)
    check_alpha(alpha)
    thinking, nonthinking = open_checkpoint(thinking_dir), open_checkpoint(nonthinking_dir)
    check_mergeable(thinking, nonthinking)
    check_same_tokenizer(thinking_dir, nonthinking_dir)
    check_configs(thinking_dir, nonthinking_dir)
    shards = plan_shards(thinking.values(), shard_bytes)
    job = Job(out_dir, _plan(thinking, nonthinking, alpha, shard_bytes))
    try:
        if not job.published:
            _write_shards(job, shards, nonthinking, alpha, progress)
            _write_companions(job, shards, thinking_dir, nonthinking_dir, alpha)
        job.publish()
    except ValueError:
        # Sources that cannot be merged have to change first, so what was written can never be taken up again.
        job.abandon()
        raise
    finally:
        job.close()
    return Path(out_dir)


def check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is not a weight between 0 and 1; the authors' choice is 0.8.")


def alpha_text(alpha: float) -> str:
    """In as few digits as tell it from every other."""
    return f"{alpha:g}" if float(f"{alpha:g}") == alpha else repr(float(alpha))


def rest_text(alpha: float) -> str:
    """The other model's weight, without the noise of subtracting."""
    return alpha_text(round(1 - alpha, 15))


def merge_blocks(thinking: StoredTensor, nonthinking: StoredTensor, alpha: float) -> Iterator[Tensor]:
    """The merged tensor in flat blocks of its stored dtype. ValueError if one holds a NaN."""
    for start in range(0, thinking.elements, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, thinking.elements)
        block = read_elements(thinking, start, stop)
        if thinking.dtype not in MERGED_DTYPES:
            yield block
            continue
        other = read_elements(nonthinking, start, stop)
        for a, b in zip(block.split(PIECE_ELEMENTS), other.split(PIECE_ELEMENTS)):
            yield merge_piece(a, b, alpha, thinking.name)


def merge_piece(a: Tensor, b: Tensor, alpha: float, name: str) -> Tensor:
    """alpha * a + (1 - alpha) * b in fp32 (fp64 for fp64), rounded once to a's dtype; may overwrite a and b."""
    dtype = a.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    merged = a.to(wide).mul_(alpha).add_(b.to(wide).mul_(1 - alpha))
    # A NaN makes the sum one, and a sum is a third of the work of looking at each; infinities can too, so look then.
    if math.isnan(merged.sum().item()) and merged.isnan().any():
        raise ValueError(f"{name} holds a NaN (or infinities of both signs) in one of the models; it cannot be merged.")
    return merged.to(dtype)


def check_mergeable(thinking: dict[str, StoredTensor], nonthinking: dict[str, StoredTensor]) -> None:
    """ValueError that lists every tensor which the two checkpoints do not share in name, shape, dtype and kind."""
    only_thinking = sorted(thinking.keys() - nonthinking.keys())
    only_nonthinking = sorted(nonthinking.keys() - thinking.keys())
    if only_thinking or only_nonthinking:
        raise ValueError(
            f"the two models hold different tensors: only the thinking one has [{listed(only_thinking)}], "
            f"only the non-thinking one has [{listed(only_nonthinking)}]; merge two trainings of one model."
        )
    differing = [
        f"{name} ({a.dtype_name}{list(a.shape)} and {b.dtype_name}{list(b.shape)})"
        for name, a in thinking.items()
        if (b := nonthinking[name]) and (a.dtype, a.shape) != (b.dtype, b.shape)
    ]
    if differing:
        raise ValueError(f"tensors differ in shape or dtype: {listed(differing)}; save both models alike.")
    scaled = [name for name, a in thinking.items() if a.dtype.is_floating_point and a.dtype not in MERGED_DTYPES]
    if scaled:
        raise ValueError(f"8-bit floats mean nothing without their scales: {listed(scaled)}; merge the bf16 weights.")
    unequal = [name for name in thinking if not _alike(thinking[name], nonthinking[name])]
    if unequal:
        raise ValueError(f"tensors of whole numbers differ: {listed(unequal)}; only floating point can be merged.")


def _alike(a: StoredTensor, b: StoredTensor) -> bool:
    if a.dtype in MERGED_DTYPES:
        return True
    spans = ((start, min(start + BLOCK_ELEMENTS, a.elements)) for start in range(0, a.elements, BLOCK_ELEMENTS))
    return all(torch.equal(read_elements(a, *span), read_elements(b, *span)) for span in spans)


def check_same_tokenizer(thinking_dir: Path, nonthinking_dir: Path) -> None:
    """ValueError that says in what the two folders' tokenizers differ: the same id must be the same token."""
    files = [*TOKENIZER_FILES]
    if all((folder / ADDED_TOKENS).exists() for folder in (thinking_dir, nonthinking_dir)):
        files.append(ADDED_TOKENS)
    differing = [
        difference
        for name in files
        if (difference := _tokenizer_difference(thinking_dir / name, nonthinking_dir / name))
    ]
    if differing:
        raise ValueError(
            f"the tokenizers of {thinking_dir} and {nonthinking_dir} differ in {listed(differing)}; "
            "train both models with one tokenizer."
        )


def _tokenizer_difference(a: Path, b: Path) -> str:
    if not a.exists() and not b.exists():
        return ""
    if not a.exists() or not b.exists():
        return f"{a.name} (only {(a if a.exists() else b).parent.name} has it)"
    if a.read_bytes() == b.read_bytes():
        return ""
    if a.name == ADDED_TOKENS:
        return "" if read_json(a) == read_json(b) else a.name
    if a.name != "tokenizer.json":
        return a.name
    left, right = read_json(a), read_json(b)
    parts = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    parts = [key for key in parts if key not in TOKENIZER_STATE]
    return f"{a.name} ({', '.join(parts)}{_vocabulary_difference(left, right)})" if parts else ""


def _vocabulary_difference(left: dict, right: dict) -> str:
    vocabularies = [tokenizer.get("model", {}).get("vocab", {}) for tokenizer in (left, right)]
    if not all(isinstance(vocabulary, dict) for vocabulary in vocabularies):
        return ""
    ours, theirs = vocabularies
    tokens = [repr(token) for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)]
    return f": tokens {listed(tokens, 5)}" if tokens else ""


def check_configs(thinking_dir: Path, nonthinking_dir: Path) -> None:
    """Warn of configs that differ, as the thinking model's is taken; ValueError where the weights are quantised."""
    # Tensors alone can be merged too.
    paths = [folder / "config.json" for folder in (thinking_dir, nonthinking_dir)]
    configs = [read_json(path) if path.exists() else {} for path in paths]
    for folder, config in zip((thinking_dir, nonthinking_dir), configs, strict=True):
        if "quantization_config" in config:
            raise ValueError(f"{folder} is quantised: packed weights have no linear merge; merge the bf16 weights.")
    keys = sorted((configs[0].keys() | configs[1].keys()) - set(CONFIG_HISTORY))
    differing = [
        f"{key} ({configs[0].get(key)!r} and {configs[1].get(key)!r})"
        for key in keys
        if configs[0].get(key) != configs[1].get(key)
    ]
    if differing:
        warnings.warn(f"The configs differ, the thinking model's is kept: {listed(differing)}.", stacklevel=3)


def _plan(thinking: dict[str, StoredTensor], nonthinking: dict[str, StoredTensor], alpha: float, shard_bytes: int):
    """All that decides the bytes of the output. Size and time stand for a source file's content."""
    plan = {"job": "linear merge", "alpha": float(alpha), "shard_bytes": shard_bytes}
    for role, tensors in (("thinking", thinking), ("nonthinking", nonthinking)):
        plan[role] = identity(tensor.path for tensor in tensors.values())
    return plan


def _write_shards(job: Job, shards: list[Shard], nonthinking: dict, alpha: float, progress: bool) -> None:
    def blocks(tensor: StoredTensor) -> Iterator[Tensor]:
        return merge_blocks(tensor, nonthinking[tensor.name], alpha)

    block_bytes = file_block_bytes(max((tensor.nbytes for shard in shards for tensor in shard.tensors), default=0))
    files = [shard_file(shard, blocks, block_bytes) for shard in shards]
    write_files(job, files, workers=1, progress=progress, label=f"merge {alpha:g}")


def _write_companions(job: Job, shards: list[Shard], thinking_dir: Path, nonthinking_dir: Path, alpha: float) -> None:
    write_index(job.folder, shards)
    for pattern in COPIED_FILES:
        for path in sorted(thinking_dir.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, job.folder / path.name)
    card = model_card(thinking_dir.resolve().name, nonthinking_dir.resolve().name, alpha, shards, job.done)
    (job.folder / "README.md").write_text(card)


def is_merge_of(folder: Path, thinking_dir: Path, nonthinking_dir: Path, alpha: float) -> bool:
    """Whether the card in `folder` says that it is this merge. Models are told apart by their folders' names only."""
    card = folder / "README.md"
    said = _sum_of(thinking_dir.resolve().name, nonthinking_dir.resolve().name, alpha)
    return card.is_file() and said in card.read_text(encoding="utf-8")


def _sum_of(thinking: str, nonthinking: str, alpha: float) -> str:
    return f"**{alpha_text(alpha)}** x `{thinking}` (thinking) + **{rest_text(alpha)}** x `{nonthinking}` (non-thinking)"


def model_card(thinking: str, nonthinking: str, alpha: float, shards: list[Shard], done: dict[str, dict]) -> str:
    """What was merged, as the README.md of the result. It holds no date: the same merge has the same bytes."""
    rows = "\n".join(
        f"| {shard.filename} | {len(shard.tensors):,} | {shard.nbytes:,} | {done[shard.filename]['sha256']} |"
        for shard in shards
    )
    return f"""---
library_name: transformers
tags:
- merge
---
# {thinking} + {nonthinking}

A linear merge of all parameters, {_sum_of(thinking, nonthinking, alpha)},
computed in fp32 and rounded once to the stored dtype. Config, tokenizer and chat template are those of
`{thinking}`.

| file | tensors | bytes of tensors | sha256 |
|---|---|---|---|
{rows}
"""
