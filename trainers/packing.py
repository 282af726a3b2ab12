"""Which tokens are in which batch? Documents end to end in full rows, parted by their positions; the same batch after a resume.

A row is full: what of a document does not fit begins the next row that its source gets to, with positions from 0 again. Positions
that restart are what transformers' masks take for the border between documents, so attention never crosses one; nor does
the loss, as a document's first token has no label. Sources take turns by what each is short of its share. Nothing is drawn while
training: order comes from a seed, so a few counters (`Packer.state`) are enough to go on.

Axes: R rows, S tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.curriculum import Curriculum, Step, level_tokens
from trainers.token_store import Source

IGNORED = -100


def arrange(documents: np.ndarray, difficulty: np.ndarray, order: str, seed: int) -> np.ndarray:
    """The documents (their numbers) in the order of a stage. Of equal difficulty, shuffled."""
    if order == "as_is":
        return np.sort(documents)
    shuffled = np.random.default_rng(seed).permutation(np.sort(documents))
    if order == "shuffled":
        return shuffled
    rank = difficulty[shuffled] if order == "easy_to_hard" else -difficulty[shuffled]
    return shuffled[np.argsort(rank, kind="stable")]


class Reader:
    """Goes through one source's documents, each once until all were seen; a new stage puts those that are left in its order."""

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.rewind()

    def rewind(self) -> None:
        self.passages: list[dict[str, Any]] = []
        self.order = np.arange(len(self.source))
        self.at = self.offset = 0

    def begin(self, order: str, fresh: bool = False) -> None:
        """Put the documents that are left (`fresh`: all) in `order`; one that was begun is finished first."""
        begun = int(self.offset > 0 and not fresh)
        if self.passages:
            self.passages[-1] |= {"taken": self.at, "begun": begun}
        self.passages.append({"order": order, "fresh": fresh})
        left = np.arange(len(self.source)) if fresh or len(self.passages) == 1 else self.order[self.at + begun :]
        seed = self.seed * 1000 + len(self.passages)
        head = self.order[self.at : self.at + begun]
        self.order = np.concatenate((head, arrange(left, self.source.difficulty, order, seed)))
        self.at, self.offset = 0, self.offset * begun

    def exhausted(self) -> bool:
        return self.at == len(self.order)

    def take(self, room: int) -> np.ndarray:
        """Up to `room` tokens of the present document."""
        document = self.order[self.at]
        begin, end = self.source.starts[document] + self.offset, self.source.starts[document + 1]
        taken = min(room, int(end - begin))
        self.offset += taken
        if begin + taken == end:
            self.at, self.offset = self.at + 1, 0
        return self.source.tokens[begin : begin + taken]

    def state(self) -> dict[str, Any]:
        passages = [dict(each) for each in self.passages]
        return {"source": self.source.identity(), "passages": passages, "at": self.at, "offset": self.offset}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.rewind()
        for passage in state["passages"]:
            self.begin(passage["order"], passage["fresh"])
            self.at, self.offset = passage.get("taken", 0), passage.get("begun", 0)
        self.at, self.offset = state["at"], state["offset"]


class Packer:
    """The batches of a run, step by step: `batch(step)` must be called for every step in turn, on every rank alike.

    Counts tokens of each source by stage (`consumed`) and passes over it.
    """

    def __init__(self, curriculum: Curriculum, sources: Mapping[str, Source], seed: int = 0, row_multiple: int = 1):
        self.curriculum, self.seed = curriculum, seed
        self.readers = {name: Reader(source, seed + place) for place, (name, source) in enumerate(sources.items())}
        self.stage = -1
        self.consumed: list[dict[str, int]] = []
        check_supply(curriculum, sources, row_multiple)

    def batch(self, step: Step) -> dict[str, Tensor]:
        """input_ids, position_ids, labels [R, S] int64. Labels are not shifted: the model does that."""
        while self.stage < step.stage:
            self._next_stage()
        rows = [self._row(step.length) for _ in range(step.rows)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _next_stage(self) -> None:
        self.stage += 1
        stage = self.curriculum.stages[self.stage]
        self.consumed.append({name: 0 for name in stage.mixture})
        for name in stage.mixture:
            self.readers[name].begin(stage.order)

    def _row(self, length: int) -> dict[str, Tensor]:
        ids, positions, labels = np.empty(length, np.int64), np.empty(length, np.int64), np.empty(length, np.int64)
        filled = 0
        while filled < length:
            piece = self._piece(length - filled)
            span = slice(filled, filled + len(piece))
            ids[span] = labels[span] = piece
            positions[span] = np.arange(len(piece))
            labels[filled] = IGNORED
            filled += len(piece)
        row = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def _piece(self, room: int) -> np.ndarray:
        stage, consumed = self.curriculum.stages[self.stage], self.consumed[self.stage]
        name = neediest(stage.mixture, consumed)
        reader = self.readers[name]
        if reader.exhausted():
            if not stage.repeat:
                raise ValueError(
                    f"The source {name!r} ran out in stage {stage.name!r}; set repeat: true, or add documents."
                )
            reader.begin(stage.order, fresh=True)
        piece = reader.take(room)
        consumed[name] += len(piece)
        return piece

    def passes(self) -> dict[str, int]:
        """How often each source was begun."""
        return {name: 1 + sum(p["fresh"] for p in reader.passages) for name, reader in self.readers.items()}

    def state(self) -> dict[str, Any]:
        readers = {name: reader.state() for name, reader in self.readers.items()}
        return {
            "seed": self.seed,
            "stage": self.stage,
            "consumed": [dict(c) for c in self.consumed],
            "readers": readers,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """ValueError for the state of another run: other sources, documents or seed."""
        if state["readers"].keys() != self.readers.keys() or state["seed"] != self.seed:
            raise ValueError(
                f"The checkpoint read the sources {', '.join(state['readers'])} with seed {state['seed']}, this run has "
                f"{', '.join(self.readers)} with {self.seed}; go on with the same ones, or begin in a new output_dir."
            )
        for name, each in state["readers"].items():
            read, given = each.get("source"), self.readers[name].source.identity()
            if read != given:
                raise ValueError(
                    f"The checkpoint read {name!r} as {read} and it is {given} now; give the --data and tokenizer of before, or "
                    "begin in a new output_dir."
                )
        self.stage = state["stage"]
        self.consumed = [dict(each) for each in state["consumed"]]
        for name, each in state["readers"].items():
            self.readers[name].load_state(each)


def neediest(mixture: Mapping[str, float], consumed: Mapping[str, int]) -> str:
    """The source that is furthest below its share; of equals the first."""
    total = sum(consumed.values()) + 1
    wanted = [name for name, share in mixture.items() if share > 0]
    return max(wanted, key=lambda name: mixture[name] * total - consumed[name])


def check_supply(curriculum: Curriculum, sources: Mapping[str, Source], row_multiple: int = 1) -> None:
    """ValueError for a stage longer than its data without `repeat`, and for an order by difficulty that the data do not tell.

    `row_multiple` as `plan_steps` has it: whole groups of rows may be more tokens than the stage asks for.
    """
    left = {name: len(source.tokens) for name, source in sources.items()}
    overshot = dict.fromkeys(sources, 0)
    for stage in curriculum.stages:
        longest = max(level.length for level in stage.context)
        tokens = sum(level_tokens(stage, row_multiple))
        for name, share in stage.mixture.items():
            if name not in sources:
                raise ValueError(
                    f"Stage {stage.name!r} mixes in {name!r}, which is no source; use {', '.join(sources)}."
                )
            unknown = int(np.isnan(sources[name].difficulty).sum())
            if stage.order in ("easy_to_hard", "hard_to_easy") and unknown:
                raise ValueError(
                    f"Stage {stage.name!r} goes by difficulty and {unknown:,} documents of {name!r} have no difficulty; "
                    "let curation score them, or set order: shuffled."
                )
            # Turns between sources overshoot a share by less than a row, in each stage; one source alone does not.
            row = longest if 0 < share < 1 else 0
            needed = share * tokens + (row + overshot[name] if share else 0)
            if needed > left[name] and not stage.repeat:
                raise ValueError(
                    f"Stage {stage.name!r} needs about {needed:,.0f} tokens of {name!r} and {left[name]:,} are left; set repeat: "
                    "true, shorten it, or add documents."
                )
            unread = left[name] - round(share * tokens)
            left[name] = unread % len(sources[name].tokens) if stage.repeat else max(unread, 0)
            overshot[name] += row


class Batches(torch.utils.data.IterableDataset):
    """This rank's micro-batches from step `begin` on: each step's rows split evenly over accumulation steps and ranks.

    Every rank packs all rows and keeps its own: packing is memory-mapped copying, and so no rank ever has to wait for another.
    `flat` lays a micro-batch in one row, which is how FlashAttention reads positions that restart.
    """

    def __init__(self, packer: Packer, steps: Sequence[Step], *, accumulation: int, rank: int, world: int, flat: bool):
        self.packer, self.steps = packer, steps
        self.accumulation, self.rank, self.world, self.flat = accumulation, rank, world, flat
        self.begin = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in self.steps[self.begin :]:
            batch = self.packer.batch(step)
            parts = {name: tensor.chunk(self.accumulation * self.world) for name, tensor in batch.items()}
            for micro in range(self.accumulation):
                mine = {name: chunks[micro * self.world + self.rank] for name, chunks in parts.items()}
                yield {name: tensor.reshape(1, -1) for name, tensor in mine.items()} if self.flat else mine
