"""Is every row fit to train a mode on: does it say its mode, begin behind its control token, fit the limit, have a partner?

First on rows as they are written, then on the same rows tokenized. Nothing is dropped or changed without being counted.
"""

import json
import warnings
from hashlib import sha256

from datasets import Dataset

from trainers.mode_overlap import has_unknown_tag, prompt_key
from trainers.mode_prompts import tools_of
from trainers.tokenizer import END_THINK, THINK

THINKING, NON_THINKING, NO_MODE = 1, 0, -1


def require_rows(dataset, name: str) -> None:
    """ValueError for a dataset without rows, which TRL fails on with a bare StopIteration, or in the midst of its tokenizing."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The {name} dataset has no rows; give one with some.")


def refuse_conversations(dataset: Dataset, name: str) -> None:
    """ValueError for whole conversations and texts: TRL would train them without modes, control tokens included."""
    columns = dataset.column_names
    if {"prompt", "input_ids"} & set(columns):
        return
    whole = {"messages", "conversations"} & set(columns)
    what = f"are conversations in a column {min(whole)}" if whole else f"have no column prompt, only {', '.join(columns)}"
    raise ValueError(
        f"The {name} rows {what}, which do not say their mode; make rows of prompt and completion with "
        "trainers.mode_overlap.make_row."
    )


def require_completions(dataset: Dataset, name: str) -> None:
    """ValueError for a row whose prompt or completion is missing or empty, which TRL fails on without naming it."""
    if "completion" not in dataset.column_names:
        raise ValueError(f"The {name} rows have no column completion; make them with trainers.mode_overlap.make_row.")
    for column in ("prompt", "completion"):
        empty = [row for row, written in enumerate(dataset[column]) if not written]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} {name} rows, e.g. row {empty[0]}, have no {column}; mend or remove them."
            )


def require_modes(dataset: Dataset, name: str) -> Dataset:
    """ValueError if a row of messages does not say its mode (TRL fails on it with a TypeError, or trains it as direct)."""
    if isinstance(dataset[0]["prompt"], str):
        return dataset
    kwargs = (
        dataset["chat_template_kwargs"] if "chat_template_kwargs" in dataset.column_names else [None] * len(dataset)
    )
    unknown = [row for row, each in enumerate(kwargs) if not isinstance((each or {}).get("enable_thinking"), bool)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(dataset)} {name} rows, e.g. row {unknown[0]}, have no enable_thinking in "
            "chat_template_kwargs; make rows with trainers.mode_overlap.make_row."
        )
    return dataset


def warn_of_unknown_tags(dataset: Dataset, name: str) -> None:
    """Tags of other models are text here, which a model would learn to write; but a row may speak of them, so they stay."""
    tagged = [row for row, completion in enumerate(dataset["completion"]) if has_unknown_tag(_written(completion))]
    if tagged:
        warnings.warn(
            f"{len(tagged)} of {len(dataset)} {name} rows, e.g. row {tagged[0]}, have a tag in their completion that is no "
            f"control token here and is learned as text; write {THINK} and {END_THINK} or drop what validate_mode_overlap lists.",
            stacklevel=2,
        )


def _written(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(f"{said.get('reasoning_content') or ''} {said.get('content') or ''}" for said in completion)


def apply_history_policy(dataset: Dataset, policy: str) -> Dataset:
    """Thoughts of turns before the last user message are cut out, or rendered by the chat template."""
    if isinstance(dataset[0]["prompt"], str):
        return dataset

    def rewrite(row: dict) -> dict:
        thoughts = [cut_thought(message) for message in row["prompt"]]
        kept = sum(thoughtless != message for thoughtless, message in zip(thoughts, row["prompt"]))
        if policy == "keep":
            kwargs = row["chat_template_kwargs"] | {"keep_history_thoughts": True}
            return {"history_thoughts": kept, "chat_template_kwargs": kwargs}
        last_user = max((i for i, message in enumerate(row["prompt"]) if message["role"] == "user"), default=0)
        prompt = thoughts[:last_user] + row["prompt"][last_user:]
        # What is left are thoughts between the tool calls of the running turn.
        running = sum(cut_thought(message) != message for message in prompt)
        return {"history_thoughts": running, "prompt": prompt}

    return dataset.map(rewrite, desc=f"Thoughts of the history: {policy}")


def spell_tools(dataset: Dataset) -> Dataset:
    """The column `tools` as JSON text, which TRL reads as well; in a table each tool has the fields of all others, as nulls."""
    if "tools" not in dataset.column_names:
        return dataset

    def spell(row: dict) -> dict:
        tools = tools_of(row["tools"])
        return {"tools": json.dumps(tools, ensure_ascii=False) if tools else None}

    return dataset.map(spell, remove_columns=["tools"], desc="Tools as JSON")


def cut_thought(message: dict) -> dict:
    """An assistant message without its thought; any other as it is."""
    if message["role"] != "assistant":
        return message
    content = message["content"] or ""
    if END_THINK not in content and not message.get("reasoning_content"):
        return message
    answer = content.split(END_THINK, 1)[-1]
    return message | {"content": answer} | ({"reasoning_content": ""} if "reasoning_content" in message else {})


def describe_row(row: dict, think_id: int, end_think_id: int) -> dict:
    """What order and checks need: the row's mode by its control token, prompt, length, and thoughts lost from the history."""
    first = next((place for place, label in enumerate(row["labels"]) if label != -100), 0)
    control = row["input_ids"][first - 1] if first else None
    mode = {think_id: THINKING, end_think_id: NON_THINKING}.get(control, NO_MODE)
    asked = (row.get("chat_template_kwargs") or {}).get("enable_thinking")
    if asked is not None and asked != (mode == THINKING):
        mode = NO_MODE
    opened = row["input_ids"][: max(first - 1, 0)].count(think_id)
    return {
        "mode": mode,
        "length": len(row["input_ids"]),
        "prompt_key": sha256(prompt_key(row["prompt"]).encode()).hexdigest(),
        "thoughts_lost": row.get("history_thoughts", opened) - opened,
    }


def check_control_tokens(dataset: Dataset, name: str) -> None:
    """ValueError if a completion does not follow its mode's control token, or if a thought of the history is not there."""
    astray = [row for row, mode in enumerate(dataset["mode"]) if mode == NO_MODE]
    if astray:
        raise ValueError(
            f"{len(astray)} of {len(dataset)} {name} rows, e.g. row {astray[0]}, do not begin their completion right behind "
            f"their mode's {THINK} or {END_THINK}: the chat template renders modes in another way, or a thought is empty; "
            "set tokenizer.chat_template = trainers.tokenizer.CHAT_TEMPLATE, end text prompts in the tag, and see "
            "validate_mode_overlap."
        )
    lost = [row for row, thoughts in enumerate(dataset["thoughts_lost"]) if thoughts > 0]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(dataset)} {name} rows, e.g. row {lost[0]}, have thoughts in their history that the chat "
            "template leaves out; set tokenizer.chat_template = trainers.tokenizer.CHAT_TEMPLATE, or history_thoughts='drop'."
        )


def leave_out_overlong(dataset: Dataset, max_length: int | None, name: str) -> Dataset:
    """Without the prompts that have a row of more than `max_length` tokens; warns of their number. ValueError if none is left."""
    if max_length is None or max(dataset["length"]) <= max_length:
        return dataset
    keys, lengths = list(dataset["prompt_key"]), list(dataset["length"])
    overlong = {key for key, length in zip(keys, lengths) if length > max_length}
    kept = [row for row, key in enumerate(keys) if key not in overlong]
    longer = sum(length > max_length for length in lengths)
    said = (
        f"{longer} of {len(keys)} {name} rows are longer than max_length={max_length} tokens (the longest {max(lengths)}); their "
        f"{len(overlong)} prompts are left out in both modes, {len(kept)} rows stay."
    )
    if not kept:
        raise ValueError(f"{said} Raise max_length.")
    warnings.warn(said, stacklevel=2)
    return dataset.select(kept)


def warn_of_lone_prompts(dataset: Dataset) -> None:
    """Where both modes are trained, prompts seen in one of them only are what confuses them.  [authors' post]"""
    modes_of: dict[str, set[int]] = {}
    for key, mode in zip(dataset["prompt_key"], dataset["mode"]):
        modes_of.setdefault(key, set()).add(mode)
    alone = sum(len(modes) == 1 for modes in modes_of.values())
    if alone and len(set().union(*modes_of.values())) == 2:
        warnings.warn(
            f"{alone} of {len(modes_of)} prompts are in one mode only, which makes a model confuse its modes; "
            "pair them with build_mode_overlap.",
            stacklevel=2,
        )
