"""What do the nano experiments share? One base model a seed, cells that are trained and measured, intervals, a page.

A cell is one training set in one seed. Its folder keeps what it measured, problem by problem; a run that was killed goes on
behind its last finished cell, and experiments that share an --out share base, reasoning and instruct models.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.nano_problems import Problem
from recipes.nano_think_fusion import (
    Problems,
    Settings,
    answer_problems,
    draw_splits,
    fine_tune,
    keep_settings,
    make_tokenizer,
    merge,
    pretrain_base,
    run_stage,
)
from trainers import report
from trainers.mode_overlap import make_row

MODES = {"thinking": True, "non-thinking": False}
MEASURES = ("accuracy", "format_error", "truncation")
DRAWS = 2000


@dataclass(frozen=True)
class Seed:
    """One repetition: its own problems, base model and folder."""

    out: Path
    settings: Settings
    problems: Problems
    tokenizer: object

    def stage(self, name: str, work: Callable[[Path], dict]) -> dict:
        return run_stage(self.out, name, work)

    def train(self, name: str, start: str, rows: Sequence[dict], steps: int) -> Path:
        """SFT from the stage `start` on `rows`; returns the folder."""
        arguments = {"start": self.out / start, "tokenizer": self.tokenizer, "rows": list(rows)}
        self.stage(name, partial(fine_tune, **arguments, settings=self.settings, steps=steps))
        return self.out / name

    def merge(self, name: str, thinking: str, direct: str, alpha: float) -> Path:
        settings = replace(self.settings, merge_alpha=alpha)
        folders = self.out / thinking, self.out / direct
        self.stage(name, lambda folder: merge(folder, *folders, self.tokenizer, settings))
        return self.out / name

    def measure(self, name: str, model: Path) -> dict:
        """Both modes of a model on the held-out problems, stored as the stage `name`."""
        return self.stage(name, lambda folder: measure(model, self.tokenizer, self.problems.test, self.settings))

    def cell(self, name: str, make: Callable[[str], Path]) -> dict:
        """Make a model (make(stage name) -> its folder), measure it, and keep the figures but not the weights."""
        done = self.out / f"{name}.measured"
        if not done.exists():
            model = make(name)
            self.measure(f"{name}.measured", model)
            shutil.rmtree(model)
        return self.measure(f"{name}.measured", self.out / name)


def open_seed(out: Path, settings: Settings) -> Seed:
    """The seed's problems, tokenizer and base model, made once."""
    folder = out / f"seed-{settings.seed}"
    keep_settings(folder, settings)
    torch.set_num_threads(settings.threads)
    datasets.disable_progress_bars()
    problems = draw_splits(settings)
    run_stage(folder, "tokenizer", partial(make_tokenizer, problems=problems))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    run_stage(folder, "base", partial(pretrain_base, tokenizer=tokenizer, problems=problems.base, settings=settings))
    return Seed(folder, settings, problems, tokenizer)


def reasoning_model(seed: Seed, steps: int) -> str:
    """Name of the stage with a model that was tuned on worked answers for so many steps."""
    rows = [make_row(p.messages, p.answer, p.trace) for p in seed.problems.reasoning]
    seed.train(f"reasoning-{steps}", "base", rows, steps)
    return f"reasoning-{steps}"


def instruct_model(seed: Seed, steps: int) -> str:
    """The same on bare answers."""
    seed.train(f"instruct-{steps}", "base", [make_row(p.messages, p.answer) for p in seed.problems.instruct], steps)
    return f"instruct-{steps}"


def measure(model_dir: Path, tokenizer, test: list[Problem], settings: Settings) -> dict:
    """For each mode, problem by problem: right or not, format broken or not, and the problem's family."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    measured = {"family": [p.family for p in test]}
    for mode, thinking in MODES.items():
        how = {"thinking": thinking, "max_new_tokens": settings.max_new_tokens}
        _, readings, correct = answer_problems(model, tokenizer, test, **how)
        measured[mode] = {
            "accuracy": [float(right) for right in correct],
            "format_error": [float(reading.format_error) for reading in readings],
            "truncation": [float(reading.truncated) for reading in readings],
        }
    return measured


# -- numbers ------------------------------------------------------------------------------------------------------
def values(cells: Sequence[dict], mode: str, name: str, family: str | None = None) -> list[list[float]]:
    """Of each seed's cell the values of its problems, of one family if given."""
    return [
        [value for value, kind in zip(cell[mode][name], cell["family"]) if family in (None, kind)] for cell in cells
    ]


def mean_and_interval(by_seed: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean over the seeds' means, and its 95% interval by resampling seeds and, within each, problems."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.tensor(list(each), dtype=torch.float64) for each in by_seed]
    means = []
    for _ in range(DRAWS):
        drawn = [numbers[at] for at in torch.randint(len(numbers), (len(numbers),), generator=generator).tolist()]
        resampled = [each[torch.randint(len(each), (len(each),), generator=generator)].mean() for each in drawn]
        means.append(torch.stack(resampled).mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return torch.stack([each.mean() for each in numbers]).mean().item(), low, high


def shown(by_seed: Sequence[Sequence[float]]) -> str:
    mean, low, high = mean_and_interval(by_seed)
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"


def result_row(name: str, cells: Sequence[dict], family: str | None = None) -> dict[str, str]:
    """A cell's line in a table: what was measured of both modes."""
    row = {"cell": name}
    for mode in MODES:
        for what in MEASURES:
            row[f"{mode}: {what.replace('_', ' ')}"] = shown(values(cells, mode, what, family))
    return row


# -- the job ------------------------------------------------------------------------------------------------------
def options_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19], help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on steps and test problems (default: 1)")
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each with so many threads (default: 1)")


def run_seeds(options, settings: Settings, run: Callable[[Seed], dict[str, dict]]) -> dict[str, list[dict]]:
    """run(seed) -> {cell name: what was measured}, for every seed; returns each cell's measurements over the seeds."""
    cells: dict[str, list[dict]] = {}
    for number in options.seeds:
        seed = open_seed(options.out, replace(settings, seed=number, threads=options.threads).scaled(options.scale))
        for name, measured in run(seed).items():
            cells.setdefault(name, []).append(measured)
    return cells


def begin_job(threads: int, log: Path) -> None:
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")


def at_once(calls: Sequence[Callable[[], dict]], jobs: int, threads: int, log: Path) -> list[dict]:
    """What the calls return, in their order: `jobs` of them at a time, each in a process of so many threads.

    More than one say what they do in the file `log`; here a bar counts those that are done. Fails with the first that fails.
    """
    torch.set_num_threads(threads)
    if jobs == 1:
        return [call() for call in calls]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(jobs, context, initializer=begin_job, initargs=(threads, log)) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for done in tqdm(as_completed(futures), total=len(futures), unit="cell", desc=f"{jobs} at a time, see {log}"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def publish(options, name: str, title: str, pieces: list[str], tables: dict[str, list[dict]]) -> None:
    """Print the tables; write `name`.html and `name`.json beside the seeds."""
    for heading, rows in tables.items():
        print(f"\n{heading}\n{report.text_table(rows)}")
        pieces += [report.heading(heading), report.table(rows)]
    facts = f"Seeds {options.seeds}; scale {options.scale:g}. In brackets 95% intervals over seeds and problems."
    path = options.out / f"{name}.html"
    path.write_text(report.page(title, [report.paragraph(facts), *pieces]), encoding="utf-8")
    (options.out / f"{name}.json").write_text(json.dumps({"seeds": options.seeds, "tables": tables}, indent=1))
    print(f"\n{path}")
