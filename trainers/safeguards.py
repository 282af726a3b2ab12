"""What keeps a long run alive? Spikes are seen, checkpoints are proved before they are trusted, a request to stop is heard."""

import hashlib
import json
import logging
import math
import os
import re
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

CHECKSUMS = "checksums.json"
CHUNK_BYTES = 1 << 22
# Fewer losses than this say nothing about their spread.
FEWEST_LOSSES = 16
logger = logging.getLogger(__name__)


class SpikeDetector:
    """Sees a loss far above the recent ones: beyond mean + `sigmas` standard deviations of the last `window` accepted losses.
    [OLMo 2 counts spikes so, with 7 deviations]

    A spike is not accepted into the window, so that a second one right behind it is seen too. A loss that merely falls slowly
    has a spread near 0: the deviation counts as at least `least` nats.
    """

    def __init__(self, window: int = 128, sigmas: float = 7.0, least: float = 0.02):
        self.sigmas, self.least = sigmas, least
        self.losses: deque[float] = deque(maxlen=window)

    def accepts(self, loss: float) -> bool:
        """Whether the loss is no spike; if so it joins the window. Infinite and NaN losses are never accepted."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) >= FEWEST_LOSSES:
            spread = max(statistics.pstdev(self.losses), self.least)
            if loss > statistics.fmean(self.losses) + self.sigmas * spread:
                return False
        self.losses.append(loss)
        return True


class StopRequest:
    """While entered, SIGTERM (a scheduler's notice, before it kills) only sets `heard`; afterwards the old handler is back."""

    def __init__(self):
        self.heard = False

    def __enter__(self) -> "StopRequest":
        self.before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def _hear(self, number, frame) -> None:
        self.heard = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.before)


# -- writing ------------------------------------------------------------------------------------------------------
@contextmanager
def naming_what_fails(what: str, folder: str | Path) -> Iterator[None]:
    """OSError, in a sentence, for what torch and safetensors make of a full disk."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{what} could not be written to {folder} ({error}); where the disk is full, make room, and the same command goes on "
            "from the last checkpoint (resume_from_checkpoint=latest)."
        ) from error


# -- checkpoints --------------------------------------------------------------------------------------------------
def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint to the disk and write their SHA-256 beside them, last."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sums[str(path.relative_to(folder))] = sha256_of(path)
    with (folder / CHECKSUMS).open("w") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str:
    """What is wrong with a sealed checkpoint, in words; empty if every file is as it was sealed."""
    if not folder.is_dir():
        return "is no folder"
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return f"has no {CHECKSUMS}: its saving was interrupted"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if sha256_of(path) != expected:
            return f"has another {name} than was saved"
    return ""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """Oldest first; not what someone named beside them, such as checkpoint-500-good."""
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name))
    return sorted(named, key=step_of)


def sound_checkpoint(output_dir: str | Path, asked: str | None) -> Path | None:
    """The checkpoint to go on from. `asked`: None for none, a folder, or `latest`: the newest that is as it was saved, if any.

    A damaged one is passed over with a warning by `latest`, and a ValueError by name.
    """
    if asked is None:
        return None
    if asked != "latest":
        if problem := damage(Path(asked)):
            raise ValueError(f"{asked} {problem}; go on from another checkpoint, or from latest.")
        return Path(asked)
    for folder in reversed(checkpoints_in(Path(output_dir))):
        problem = damage(folder)
        if not problem:
            return folder
        logger.warning("%s %s; passed over.", folder, problem)
    return None
