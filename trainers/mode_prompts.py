"""Which prompts does reinforcement ask, in which mode, and in which order? Every instruction in each of its modes.

    [I; <think>] and [I; </think>], side by side in one batch
"""

import json
import random
from collections.abc import Callable, Container, Iterator

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.utils import logging

from trainers.mode_overlap import prompt_key
from trainers.tokenizer import END_THINK, THINK

logger = logging.get_logger(__name__)

MODES = {"both": (True, False), "thinking": (True,), "non-thinking": (False,)}
# Columns of these names would collide with what TRL hands to rewards, or be read as pictures.
MEANT_OTHERWISE = {"prompts", "completions", "trainer_state", "log_extra", "log_metric", "image", "images"}
MODE_NAMES = {True: "thinking", False: "non_thinking"}


def render_prompt(
    tokenizer, prompt: str | list[dict], thinking: bool, template_kwargs: dict | None = None
) -> list[int]:
    """Token ids of an instruction, ended by its mode's control token: by the chat template, or appended to a text.

    ValueError where the chat template ends the turn in some way of its own or shows no `tools`, and for what is no prompt.
    """
    tag = THINK if thinking else END_THINK
    control = tokenizer.convert_tokens_to_ids(tag)
    asked, options = prompt_key(prompt), template_kwargs or {}

    def render(**more) -> list[int]:
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **(options | more))
        return rendered["input_ids"]

    if options.get("tools") and (isinstance(prompt, str) or render(tools=None) == render()):
        raise ValueError(
            "A prompt has tools, and it is a text, or the chat template leaves them out; give messages and a template that shows "
            "tools (trainers.tokenizer.CHAT_TEMPLATE), or remove the column tools."
        )
    if isinstance(prompt, str):
        ids = tokenizer(asked + tag)["input_ids"]
    else:
        both = [render(enable_thinking=mode) for mode in (thinking, not thinking)]
        # A template that does not know the modes leaves the turn bare.
        ids = [*both[0], control] if both[0] == both[1] else both[0]
    if ids[-1] != control:
        raise ValueError(
            f"A {MODE_NAMES[thinking]} prompt ends in {tokenizer.decode(ids[-3:])!r}, not in {tag}; use a tokenizer and "
            "chat template that end it so (trainers.tokenizer.CHAT_TEMPLATE), or give the prompts as text."
        )
    return ids


def tools_of(tools: str | list[dict] | None) -> list[dict]:
    """A row's `tools` for the chat template, a list or its JSON text; none where it has none."""
    if isinstance(tools, str):
        try:
            return json.loads(tools)
        except ValueError as error:
            said = f"The column tools holds {tools[:80]!r}, no JSON ({error}); write the list of tools as JSON."
            raise ValueError(said) from error
    return without_nulls(tools or [])


def without_nulls(value):
    """Lists and dicts without the None with which a table gives each tool the fields of all others."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return value


def pair_modes(
    dataset: Dataset, tokenizer, *, modes: str = "both", max_prompt_tokens: int, template_kwargs: dict | None = None
) -> Dataset:
    """Each instruction once in each mode, in neighbouring rows, thinking first, its other columns repeated.

    A column `tools` is shown by the chat template. Adds the columns `thinking` (bool), `prompt_ids` and `instruction` (its
    number). Instructions whose prompt is longer than `max_prompt_tokens` are left out in all modes, with a warning that counts
    them; ValueError if none is left.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The prompts are a {type(dataset).__name__}; resampling needs a Dataset, which can be indexed."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The dataset has no column prompt, only {', '.join(dataset.column_names)}; name it so.")
    taken = {"chat_template_kwargs", "thinking", "prompt_ids", "instruction"} & set(dataset.column_names)
    if taken:
        raise ValueError(
            f"The dataset has the column {', '.join(sorted(taken))}, but the trainer itself asks each prompt in both "
            "modes; give each instruction once (of a Mode-Overlap Dataset the thinking rows), without that column."
        )

    if meant := MEANT_OTHERWISE & set(dataset.column_names):
        raise ValueError(f"The column {min(meant)} means something else to TRL; rename it, or leave it out.")

    def pair(batch: dict[str, list]) -> dict[str, list]:
        paired = {name: [] for name in (*batch, "thinking", "prompt_ids")}
        for place, prompt in enumerate(batch["prompt"]):
            tools = tools_of(batch["tools"][place]) if "tools" in batch else []
            options = (template_kwargs or {}) | ({"tools": tools} if tools else {})
            ids = {mode: render_prompt(tokenizer, prompt, mode, options) for mode in MODES[modes]}
            if max(map(len, ids.values())) > max_prompt_tokens:
                continue
            for mode in MODES[modes]:
                for name, values in batch.items():
                    paired[name].append(values[place])
                paired["thinking"].append(mode)
                paired["prompt_ids"].append(ids[mode])
        return paired

    paired = dataset.map(pair, batched=True, desc="Pairing prompts")
    kept = len(paired) // len(MODES[modes])
    if kept < len(dataset):
        left_out = f"{len(dataset) - kept} of {len(dataset)} prompts are longer than {max_prompt_tokens} tokens"
        if not kept:
            raise ValueError(f"{left_out}; raise max_prompt_tokens or lower max_completion_length.")
        logger.warning("%s and left out.", left_out)
    return paired.add_column("instruction", [row // len(MODES[modes]) for row in range(len(paired))])


def draw_instructions(size: int, count: int, key: str, asked: Container[int] = ()) -> list[int]:
    """`count` of `size` instruction numbers, the same for the same key; `asked` ones only when all others are used up."""
    # Python seeds a generator from a text by its SHA-512, so neighbouring keys share nothing.
    generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
    order = torch.randperm(size, generator=generator).tolist()
    fresh = [number for number in order if number not in asked]
    return (fresh + [number for number in order if number in asked])[:count]


class PairedSampler(Sampler):
    """TRL's RepeatSampler for instructions of several modes: an instruction's groups stay side by side in their batch.

    The order is a function of seed and epoch, so a run resumed in a later epoch sees the prompts it would have seen.
    """

    def __init__(
        self, instructions: int, modes: int, generations: int, batch: int, repeats: int, seed: int | None, epoch
    ):
        self.instructions, self.modes, self.generations = instructions, modes, generations
        self.batch = batch  # instructions a generation batch
        self.repeats = repeats  # times that the batch is handed out: once an update
        self.seed = seed  # None: in order
        self.epoch: Callable[[], int] = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.instructions))
        if self.seed is not None:
            order = draw_instructions(self.instructions, self.instructions, f"{self.seed} epoch {self.epoch()}")
        for start in range(0, self.instructions - self.batch + 1, self.batch):
            rows = [
                instruction * self.modes + mode
                for instruction in order[start : start + self.batch]
                for mode in range(self.modes)
                for _ in range(self.generations)
            ]
            for _ in range(self.repeats):
                yield from rows

    def __len__(self) -> int:
        return self.instructions // self.batch * self.batch * self.modes * self.generations * self.repeats
