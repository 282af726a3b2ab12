"""How are time and memory measured here?  Candidates take turns, each in bursts; the median of each; one CSV row a figure."""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = "date benchmark case candidate milliseconds ratio_to_peer threads machine torch transformers commit".split()


def options_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    return parser


def interleaved_medians_ms(
    candidates: dict[str, Callable[[], object]], rounds: int, label: str, burst: int = 5
) -> dict[str, float]:
    """Median milliseconds of each candidate over `rounds` turns of `burst` calls in a row, after one warm-up turn.

    Taking turns gives every candidate the same share of a noisy machine's quiet moments. The bursts make it the steady state of
    a loop that is timed: the first call of a turn pays for the memory that the candidate before it has given back, so it runs
    but does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in track(range(rounds + 1), description=label, transient=True):
        for name, run in candidates.items():
            run()
            start = time.perf_counter()
            for _ in range(burst):
                run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start) / burst)
    return {name: statistics.median(values) for name, values in times.items()}


def memory_bytes(field: str) -> int:
    """Of this process, as Linux counts: VmRSS is resident now, RssAnon its own part, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "none"


def record(benchmark: str, case: str, times_ms: dict[str, float], peer: str, machine: str | None = None) -> None:
    """Append one row a candidate to results.csv; the ratio is the peer's time over the candidate's: above 1 is faster.

    `machine`: the GPU's name; the processor's unless given.
    """
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for name, ms in times_ms.items():
            writer.writerow(
                [
                    datetime.date.today(), benchmark, case, name, f"{ms:.3f}", f"{times_ms[peer] / ms:.2f}",
                    torch.get_num_threads(), machine or processor_name(), torch.__version__, transformers.__version__, commit(),
                ]
            )  # fmt: skip


def show(title: str, rows: dict[str, dict[str, float]], peer: str) -> None:
    """A table: a line a case, milliseconds a candidate, and the peer's time over ours."""
    table = Table(title=title)
    names = list(next(iter(rows.values())))
    for column in ["case", *(f"{name} [ms]" for name in names), f"{peer} / ours"]:
        table.add_column(column, justify="left" if column == "case" else "right")
    for case, times in rows.items():
        table.add_row(case, *(f"{times[name]:.2f}" for name in names), f"{times[peer] / times['ours']:.2f}x")
    Console(width=150).print(table)
