"""What do the pre-training experiments share? Real text on this machine, one cell trained and measured, intervals, a page.

The text: Python's language reference (pydoc's topics) and docstrings as `docs`, its standard library as `code`, GSM8K (given by
path) as `maths`. One document in twenty is held out. A document's difficulty is the mean surprisal of its tokens under the
corpus' own token frequencies: rare words are hard. That is a stand-in for the trained classifier of `trainers/curation.py`.

A cell is one configuration in one seed. Its folder keeps what it measured; a run that was killed goes on behind its last
finished cell.
"""

import argparse
import ast
import json
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, count_flops, count_parameters
from recipes.nano_cells import add_jobs, at_once, mean_and_interval
from recipes.nano_cells import options_parser as cells_parser
from recipes.nano_think_fusion import run_stage
from trainers import report
from trainers.curriculum import plan_steps, read_curriculum
from trainers.packing import Packer
from trainers.pretrain import PretrainConfig, PretrainTrainer
from trainers.token_store import Source, prepare
from trainers.tokenizer import train_tokenizer

DOMAINS = ("docs", "code", "maths")
# Of the experiments that do not ask about the data.
MIXTURE = {"docs": 0.4, "code": 0.4, "maths": 0.2}
VOCABULARY = 2048
CONTEXT = 128
BATCH_ROWS = 32
HELD_OUT_ROWS = 64
# A gradient norm is a spike at so many times the median of so many before it.
SPIKE_FACTOR, SPIKE_WINDOW = 3.0, 50
# Ten times the report's: some hundred steps of a thousandth would not reach the spread of the scores.
BALANCE_RATE = 1e-2
# Files of the standard library and topics of its reference, from the first in order of name: enough, and read in seconds.
FILES = 500


@dataclass(frozen=True)
class Text:
    """Prepared sources to train on, and those held out, by domain."""

    train: Mapping[str, Source]
    held_out: Mapping[str, Source]
    vocab_size: int


# -- text ---------------------------------------------------------------------------------------------------------
def read_machine(gsm8k: Path, files: int = FILES) -> list[dict[str, str]]:
    """Documents with text, id and domain."""
    documents = []
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [
        p for p in sorted(library.rglob("*.py")) if not {"site-packages", "test"} & set(p.parts) and p.stat().st_size
    ]
    for path in code[:files]:
        source = path.read_text(encoding="utf-8", errors="replace")
        documents.append({"domain": "code", "id": path.name, "text": source})
        documents += [
            {"domain": "docs", "id": f"{path.name}:{n}", "text": doc} for n, doc in enumerate(docstrings(source))
        ]
    from pydoc_data.topics import topics

    documents += [{"domain": "docs", "id": name, "text": text} for name, text in sorted(topics.items())[:files]]
    with gsm8k.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    documents += [
        {"domain": "maths", "id": f"gsm8k:{n}", "text": f"{r['question']}\n{r['answer']}"} for n, r in enumerate(rows)
    ]
    return documents


def docstrings(source: str) -> list[str]:
    """Of a module and what it holds, those of some length."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)]
    return [doc for doc in found if doc and len(doc) > 200]


def surprisals(token_lists: Sequence[Sequence[int]]) -> list[float]:
    """Mean surprisal in nats of each document's tokens under the frequencies of all."""
    counts = Counter(token for tokens in token_lists for token in tokens)
    total = sum(counts.values())
    nats = {token: -float(np.log(count / total)) for token, count in counts.items()}
    return [statistics.fmean(nats[token] for token in tokens) for tokens in token_lists]


def make_text(folder: Path, documents: Sequence[Mapping[str, str]]) -> dict:
    """Tokenizer and JSONL files, as curation writes them, in `folder`."""
    tokenizer = train_tokenizer((d["text"] for d in documents), VOCABULARY)
    tokenizer.save_pretrained(folder / "tokenizer")
    hardness = surprisals(tokenizer([d["text"] for d in documents], add_special_tokens=False).input_ids)
    for part in ("train", "held_out"):
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for number, (document, difficulty) in enumerate(zip(documents, hardness)):
                if (number % 20 == 0) == (part == "held_out"):
                    row = {key: document[key] for key in ("text", "id", "domain")} | {"difficulty": difficulty}
                    file.write(json.dumps(row) + "\n")
    return {"documents": len(documents), "vocab_size": len(tokenizer)}


def open_text(out: Path, gsm8k: Path, files: int = FILES) -> Text:
    """Made once in `out`, shared by every experiment there."""
    made = run_stage(out, "text", lambda folder: make_text(folder, read_machine(gsm8k, files)))
    tokenizer = AutoTokenizer.from_pretrained(out / "text/tokenizer")
    wanted = {name: () for name in DOMAINS}
    train, held_out = (
        prepare(out / "tokens" / part, tokenizer, wanted, [str(out / f"text/{part}.jsonl")])
        for part in ("train", "held_out")
    )
    return Text(train, held_out, made["vocab_size"])


# -- one cell -----------------------------------------------------------------------------------------------------
def model_config(text: Text, **changes) -> AxK1Config:
    # At this width an initializer_range of 0.02 leaves the attention nearly blind for the first hundreds of steps.
    plain = {"vocab_size": text.vocab_size, "initializer_range": 0.06, "max_position_embeddings": CONTEXT}
    return AxK1Config.preset("nano", **(plain | changes))


def plain_stages(tokens: int, mixture: Mapping[str, float]) -> list[dict]:
    """Stable, then a decay over the last fifth."""
    shared = {"context": CONTEXT, "batch_tokens": BATCH_ROWS * CONTEXT, "mixture": dict(mixture), "repeat": True}
    stable = max(round(tokens * 0.8), BATCH_ROWS * CONTEXT)
    decay = max(tokens - stable, BATCH_ROWS * CONTEXT)
    return [
        {"name": "stable", "tokens": stable, "phase": "stable", **shared},
        {"name": "decay", "tokens": decay, "phase": "decay", **shared},
    ]


def train_cell(
    folder: Path, text: Text, config: AxK1Config, stages: Sequence[Mapping[str, Any]], seed: int, **settings
) -> dict[str, Any]:
    """Train one model; returns its curves, held-out loss of each domain row by row, and what it cost. Keeps no weights.

    settings: of PretrainConfig; spikes are left in unless `on_spike` says otherwise.
    """
    tokens = sum(stage["tokens"] for stage in stages)
    curriculum = read_curriculum({"stages": list(stages), "warmup_tokens": tokens // 50})
    torch.manual_seed(seed)
    model = AxK1ForCausalLM(config)
    given = {"learning_rate": 3e-3, "balance_rate": BALANCE_RATE, "on_spike": "ignore", "logging_steps": 1} | settings
    args = PretrainConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, save_strategy="no", seed=seed, most_bad_steps=10**9, **given
    )
    trainer = PretrainTrainer(model, args, curriculum, text.train)
    begun = time.perf_counter()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "tokens" in log]
    names = ("tokens", "loss", "grad_norm", "max_violation", "dead_experts")
    return {
        **{name: [log[name] for log in logs] for name in names},
        "held_out": {name: held_out_losses(model, source) for name, source in text.held_out.items()},
        "loads": trainer.stage_loads,
        "train_s": time.perf_counter() - begun,
        "parameters": count_parameters(config)["total"],
        "flops_a_token": count_flops(config, queries=CONTEXT, backward=True)["total"] / CONTEXT,
        "not_finite": len(trainer.events),
    }


@torch.no_grad()
def held_out_losses(model: AxK1ForCausalLM, source: Source) -> list[float]:
    """Mean loss a token of each of up to HELD_OUT_ROWS packed rows, nats."""
    rows = min(HELD_OUT_ROWS, len(source.tokens) // CONTEXT - 1)
    stage = {
        "name": "held out", "tokens": rows * CONTEXT, "context": CONTEXT, "batch_tokens": CONTEXT, "mixture": {"x": 1.0},
        "order": "as_is",
    }  # fmt: skip
    curriculum = read_curriculum({"stages": [stage]})
    packer = Packer(curriculum, {"x": source})
    model.eval()
    return [model(**packer.batch(step), use_cache=False).loss.item() for step in plan_steps(curriculum)]


# -- numbers ------------------------------------------------------------------------------------------------------
def spikes(values: Sequence[float], factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW) -> int:
    """How many values lie above `factor` times the median of the `window` before them, or are not finite."""
    count = 0
    for place in range(window, len(values)):
        median = statistics.median(values[place - window : place])
        count += not values[place] <= factor * median
    return count


def held_out_shown(cells: Sequence[Mapping], domain: str | None = None) -> str:
    """Mean over seeds with its interval; of one domain, or the mean over all rows."""
    by_seed = []
    for cell in cells:
        chosen = [domain] if domain else list(cell["held_out"])
        by_seed.append([loss for name in chosen for loss in cell["held_out"][name]])
    mean, low, high = mean_and_interval(by_seed)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def over_seeds(numbers: Sequence[float]) -> str:
    """Mean and range over the seeds."""
    return f"{statistics.fmean(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def curve(cell: Mapping, name: str, points: int = 120) -> list[tuple[float, float]]:
    """A measure over tokens, averaged to at most `points`."""
    pairs = list(zip(cell["tokens"], cell[name]))
    size = max(1, -(-len(pairs) // points))
    groups = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]


# -- the job ------------------------------------------------------------------------------------------------------
def options_parser(description: str, tokens: int) -> argparse.ArgumentParser:
    parser = cells_parser(description)
    parser.set_defaults(out=Path("runs/pretraining"))
    add_jobs(parser)
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FILE.jsonl", help="GSM8K's training lines")
    parser.add_argument("--tokens", type=int, default=tokens, help="of each training (default: %(default)s)")
    parser.add_argument(
        "--files", type=int, default=FILES, help="of the standard library, and topics (default: %(default)s)"
    )
    return parser


def run_cells(
    options, experiment: str, cells: Mapping[str, Callable[[Path, Text, int, int], dict]]
) -> dict[str, list[dict]]:
    """Every cell in every seed: work(folder, text, tokens, seed) -> what was measured. {cell: a measurement a seed}."""
    text = open_text(options.out, options.gsm8k, options.files)
    tokens = max(round(options.tokens * options.scale), 2 * BATCH_ROWS * CONTEXT)
    calls = []
    for seed in options.seeds:
        for name, work in cells.items():
            stage = f"{experiment}-{tokens}-seed{seed}-{name.replace(' ', '-').replace(',', '')}"
            calls.append(partial(run_stage, options.out, stage, partial(work, text=text, tokens=tokens, seed=seed)))
    results = at_once(calls, options.jobs, options.threads, options.out / f"{experiment}.log")
    return {name: results[at :: len(cells)] for at, name in enumerate(cells)}


def charts(cells: Mapping[str, Sequence[Mapping]], measures: Mapping[str, tuple[str, bool]]) -> list[str]:
    """One chart a measure, a curve a cell, of the first seed. measures: name -> (caption, logarithmic)."""
    return [
        report.line_chart(
            {name: curve(of[0], measure) for name, of in cells.items()},
            caption=f"{caption}, first seed",
            x_label="tokens",
            y_label=measure.replace("_", " "),
            log_y=log_y,
        )
        for measure, (caption, log_y) in measures.items()
    ]
