"""What is the Mode-Overlap Dataset (MOD), and is a given one sound? The same prompt, once thinking and once direct.

Trained on both modes with *disjoint* prompts, a model confuses them (format error 96% in thinking mode); with the same
prompts in both modes it does not (0.37%).  [authors' post on reasoning-mode selection]

A row is what TRL's SFTTrainer reads:
  prompt      a list of messages, or a text that already ends in the mode's control token
  completion  in the prompt's form; thinking: `thought</think>answer`, non-thinking: `answer`
  chat_template_kwargs  {"enable_thinking": bool}, by which the chat template ends the prompt with the control token;
                        always present, since TRL raises a TypeError on None

Rows come from worked answers or from two sources (`build_mode_overlap`), or from models (`trainers.mode_sampling`).
"""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from trainers.tokenizer import END_THINK, THINK

MESSAGES = [{"role": Value("string"), "content": Value("string")}]
MODE = {"enable_thinking": Value("bool")}
# The schema of a saved MOD, with prompts as messages and as text. Said outright: inferred from the first rows, an empty or
# missing value there would give later rows another type.
MESSAGE_FEATURES = Features({"prompt": MESSAGES, "completion": MESSAGES, "chat_template_kwargs": MODE})
TEXT_FEATURES = Features({"prompt": Value("string"), "completion": Value("string"), "chat_template_kwargs": MODE})
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Tags of other models and slips of the pen: none of them is a control token here, so the model would learn to write it as text.
FOREIGN_TAG = re.compile(r"<\s*/?\s*(?:think|thought|reason|reflect|scratchpad)\w*\s*/?>", re.IGNORECASE)
# How many rows a report shows of each defect.
EXAMPLES = 3
# GSM8K writes <<48/2=24>> beside each calculation, meant for a calculator and not for a reader.
GSM8K_CALCULATION = re.compile(r"<<[^<>]*>>")


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion. A message's `reasoning_content` is written out as `thought</think>answer`."""
    if isinstance(completion, str):
        return completion
    if not _are_messages(completion) or len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(f"A completion must be a text or one assistant message, got {completion!r}.")
    thought, answer = completion[0].get("reasoning_content"), completion[0].get("content")
    if not isinstance(answer, str):
        raise ValueError(f"A completion must be a text or a message whose content is one, got {completion!r}.")
    return f"{thought}{END_THINK}{answer}" if thought else answer


def split_completion(completion: str | list[dict]) -> tuple[str, str]:
    """Thought and answer of a thinking completion, `[<think>]thought</think>answer`. ValueError if it is not one."""
    text = completion_text(completion)
    thought, closed, answer = text.removeprefix(THINK).partition(END_THINK)
    if not closed or any(tag in thought + answer for tag in (THINK, END_THINK)):
        raise ValueError(f"A thinking completion holds one {END_THINK} and no further tag, got {text[:200]!r}.")
    return thought, answer


def _are_messages(said: object) -> bool:
    return bool(said) and isinstance(said, list) and all(isinstance(each, dict) and "role" in each for each in said)


def has_unknown_tag(text: str) -> bool:
    return any(tag not in (THINK, END_THINK) for tag in FOREIGN_TAG.findall(text))


def prompt_key(prompt: str | list[dict]) -> str:
    """What makes two prompts the same prompt: everything but the control token that ends a text prompt. ValueError for none."""
    if isinstance(prompt, str):
        return prompt.removesuffix(THINK).removesuffix(END_THINK)
    if not _are_messages(prompt):
        raise ValueError(f"A prompt must be a text or a list of messages with a role each, got {prompt!r}.")
    return json.dumps([[message["role"], message.get("content")] for message in prompt], ensure_ascii=False)


def make_row(prompt: str | list[dict], answer: str, thought: str | None = None) -> dict:
    """One row: thinking if a thought is given, else non-thinking."""
    thinking = thought is not None
    text = f"{thought}{END_THINK}{answer}" if thinking else answer
    if isinstance(prompt, str):
        # No template renders a text prompt, so the control token has to stand in it.
        prompt, completion = prompt_key(prompt) + (THINK if thinking else END_THINK), text
    else:
        completion = [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "completion": completion, "chat_template_kwargs": {"enable_thinking": thinking}}


def gsm8k_row(example: dict) -> dict:
    """A thinking row from GSM8K's {"question", "answer": "the work\\n#### 18"}: the work is the thought, without its
    calculator marks. ValueError if there is no `####`.
    """
    work, mark, answer = str(example["answer"]).rpartition("####")
    if not mark or not isinstance(example["question"], str):
        raise ValueError(f"A GSM8K row is a question and an answer that ends in '#### ' and a number, got {example!r}.")
    question = [{"role": "user", "content": example["question"]}]
    return make_row(question, answer.strip(), GSM8K_CALCULATION.sub("", work).strip())


def gsm8k_rows(examples: Iterable[dict]) -> list[dict]:
    """`gsm8k_row` of each; those that are none are left out and warned about with their numbers. ValueError if all are."""
    rows, bad = [], {}
    for number, example in enumerate(examples, 1):
        try:
            rows.append(gsm8k_row(example))
        except ValueError as error:
            bad[number] = error
    if bad and not rows:
        raise next(iter(bad.values()))
    if bad:
        first = ", ".join(map(str, [*bad][:10])) + (", ..." if len(bad) > 10 else "")
        warnings.warn(
            f"Left out: {len(bad)} of {len(bad) + len(rows)} rows, which are no question with an answer that ends in '#### ' "
            f"and a number (rows {first}).",
            stacklevel=2,
        )
    return rows


def build_mode_overlap(thinking_rows: Iterable[dict], direct_rows: Iterable[dict] | None = None) -> list[dict]:
    """Pair every prompt's thinking answer with a direct one: two neighbouring rows a prompt, thinking first.

    Rows are {"prompt", "completion"}. Without `direct_rows` the direct answer is the thinking one with its thought cut
    out (the authors' cheap variant); with them the two sources are joined by prompt. One pair a prompt: the first row
    of each source counts. What is left out (no partner, repeated) is warned about with its numbers.
    """
    thinking, repeated = _first_by_prompt(thinking_rows)
    answers = {key: split_completion(row["completion"]) for key, row in thinking.items()}
    if direct_rows is None:
        direct = {key: answer for key, (_, answer) in answers.items()}
    else:
        first, again = _first_by_prompt(direct_rows)
        direct, repeated = {key: completion_text(row["completion"]) for key, row in first.items()}, repeated + again
    alone = [len(thinking.keys() - direct.keys()), len(direct.keys() - thinking.keys())]
    if repeated or any(alone):
        warnings.warn(
            f"Left out of the Mode-Overlap Dataset: {alone[0]} prompts that have only a thinking answer, {alone[1]} "
            f"that have only a direct one, {repeated} rows that repeat a prompt; {len(thinking) - alone[0]} pairs are kept.",
            stacklevel=2,
        )
    pairs = []
    for key, row in thinking.items():
        if key in direct:
            thought, answer = answers[key]
            pairs += [make_row(row["prompt"], answer, thought), make_row(row["prompt"], direct[key])]
    return pairs


def _first_by_prompt(rows: Iterable[dict]) -> tuple[dict[str, dict], int]:
    first, repeated = {}, 0
    for row in rows:
        repeated += first.setdefault(prompt_key(row["prompt"]), row) is not row
    return first, repeated


@dataclass
class ModeOverlapReport:
    """Counts of a MOD, and for each defect the rows that have it (their numbers; examples in `str(report)`)."""

    rows: Sequence[dict]
    prompts: int
    rows_per_mode: dict[str, int]
    tokens_per_mode: dict[str, int]  # of the completions
    defects: dict[str, list[int]] = field(default_factory=dict)

    @property
    def thinking_token_share(self) -> float:
        return self.tokens_per_mode["thinking"] / max(sum(self.tokens_per_mode.values()), 1)

    def __str__(self) -> str:
        lines = [
            f"{self.prompts} prompts, {self.rows_per_mode['thinking']} thinking rows and "
            f"{self.rows_per_mode['non-thinking']} non-thinking ones; "
            f"{self.thinking_token_share:.1%} of the completions' tokens are thinking."
        ]
        for name, found in self.defects.items():
            lines.append(f"{name}: {len(found)} rows, e.g.")
            for number in found[:EXAMPLES]:
                lines.append(f"  row {number}: {json.dumps(self.rows[number], ensure_ascii=False, default=str)[:300]}")
        return "\n".join(lines)

    def require_sound(self) -> None:
        if self.defects:
            raise ValueError(f"The Mode-Overlap Dataset has defects; mend or drop these rows.\n{self}")


def validate_mode_overlap(
    rows: Iterable[dict], *, held_out: Iterable[str | list[dict]] = (), count_tokens: Callable[[str], int] = len
) -> ModeOverlapReport:
    """Look for every defect that a MOD can have; nothing is raised (see `ModeOverlapReport.require_sound`).

    held_out: prompts that must not occur here (the test split). count_tokens: tokens of a text; characters by default.
    """
    rows = list(rows)
    found = defaultdict(list)
    held_out_texts = {_loosely(prompt_key(prompt)) for prompt in held_out}
    modes_of_prompt = defaultdict(set)
    seen, rows_per_mode, tokens_per_mode = set(), Counter(), Counter()
    keys: list[str | None] = [None] * len(rows)
    for number, row in enumerate(rows):
        if defect := _unreadable(row):
            found[defect].append(number)
            continue
        thinking = row["chat_template_kwargs"]["enable_thinking"]
        key, text = prompt_key(row["prompt"]), completion_text(row["completion"])
        keys[number] = key
        mode = "thinking" if thinking else "non-thinking"
        rows_per_mode[mode] += 1
        tokens_per_mode[mode] += count_tokens(text)
        modes_of_prompt[key].add(thinking)
        for name in _defects_of_row(row["prompt"], text, thinking):
            found[name].append(number)
        if (key, thinking, text) in seen:
            found["duplicate of an earlier row"].append(number)
        seen.add((key, thinking, text))
        if _loosely(key) in held_out_texts:
            found["prompt of the held-out split"].append(number)
    alone = [number for number, key in enumerate(keys) if key is not None and len(modes_of_prompt[key]) == 1]
    if alone:
        found["prompt in one mode only"] = alone
    both = {mode: rows_per_mode[mode] for mode in ("thinking", "non-thinking")}
    tokens = {mode: tokens_per_mode[mode] for mode in both}
    return ModeOverlapReport(rows, len(modes_of_prompt), both, tokens, dict(found))


def _loosely(text: str) -> str:
    """A leak with other blanks or capitals is a leak."""
    return " ".join(text.split()).casefold()


def _unreadable(row: dict) -> str | None:
    """Why a row cannot be looked into at all."""
    kwargs, prompt, completion = (row.get(name) for name in ("chat_template_kwargs", "prompt", "completion"))
    if not isinstance(kwargs, dict) or not isinstance(kwargs.get("enable_thinking"), bool):
        return "chat_template_kwargs without a true or false enable_thinking"
    if not prompt or type(prompt) is not type(completion) or not isinstance(prompt, (str, list)):
        return "prompt and completion not both text or both messages"
    if not isinstance(prompt, str) and not all(isinstance(said, dict) and "role" in said for said in prompt + completion):
        return "message that is no object with a role"
    if not isinstance(prompt, str) and (len(completion) != 1 or completion[0].get("role") != "assistant"):
        return "completion that is not one assistant message"
    if not isinstance(completion, str) and not isinstance(completion[0].get("content"), str):
        return "completion without a text content"
    return None


def _defects_of_row(prompt: str | list[dict], text: str, thinking: bool) -> list[str]:
    defects = []
    thought, closed, answer = text.partition(END_THINK)
    if isinstance(prompt, str) and not prompt.endswith(THINK if thinking else END_THINK):
        defects.append("text prompt without its mode's control token at the end")
    if not thinking:
        answer = text
        if THINK in text or END_THINK in text:
            defects.append("tag in a direct answer")
    elif not closed or THINK in text or END_THINK in answer:
        # <think> is part of the prompt: a completion that starts with it would write it twice.
        defects.append("thinking completion that does not close its thought exactly once")
    elif not thought.strip():
        defects.append("empty thought")
    if not answer.strip():
        defects.append("empty answer")
    if has_unknown_tag(text):
        defects.append("unknown tag")
    return defects


# -- files and the Hub --------------------------------------------------------------------------------------------
def to_dataset(rows: Iterable[dict]) -> Dataset:
    """The rows as a `datasets.Dataset` with the MOD's schema, ready to train on, to save or to push to the Hub.

    A `reasoning_content` is written into its message's content. ValueError names the first row that the schema cannot hold
    (tool calls, further columns, texts among messages): nothing is left out in silence.
    """
    rows = list(rows)
    is_text = bool(rows) and isinstance(rows[0]["prompt"], str)
    return Dataset.from_list(
        [_schema_row(number, row, is_text) for number, row in enumerate(rows)],
        features=TEXT_FEATURES if is_text else MESSAGE_FEATURES,
    )


def _schema_row(number: int, row: dict, is_text: bool) -> dict:
    kwargs = row["chat_template_kwargs"]
    extra = sorted((row.keys() - MESSAGE_FEATURES.keys()) | (kwargs.keys() - MODE.keys()))
    if extra:
        raise ValueError(f"row {number} has {extra}, which the Mode-Overlap schema does not hold; drop it.")
    if any(isinstance(row[name], str) != is_text for name in ("prompt", "completion")):
        raise ValueError(f"row {number} mixes text and messages; give all rows of a dataset one form.")
    if is_text:
        return row
    return row | {name: [_schema_message(number, said) for said in row[name]] for name in ("prompt", "completion")}


def _schema_message(number: int, message: dict) -> dict:
    extra = sorted(key for key in message.keys() - {"role", "content", "reasoning_content"} if message[key])
    if extra:
        raise ValueError(f"row {number} has a message with {extra}, which the Mode-Overlap schema does not hold.")
    thought = message.get("reasoning_content")
    content = f"{thought}{END_THINK}{message['content']}" if thought else message["content"]
    return {"role": message["role"], "content": content}


def save_mode_overlap(rows: Iterable[dict], path: str | Path) -> Path:
    """Write the rows as `.jsonl` or `.parquet`, whole or not at all. `to_dataset(rows).push_to_hub(name)` is the Hub."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} ends in neither .jsonl nor .parquet; choose one of them.")
    dataset, unfinished = to_dataset(rows), path.with_name(path.name + ".unfinished")
    if path.suffix == ".parquet":
        dataset.to_parquet(unfinished)
    else:
        dataset.to_json(unfinished, force_ascii=False)
    os.replace(unfinished, path)
    return path


def load_mode_overlap(source: str | Path, split: str = "train", config: str | None = None) -> Dataset:
    """Rows from a `.jsonl` or `.parquet` file, a folder or a Hub name, with the MOD's schema. Also made into it are

    * `question` and `answer` as in GSM8K: `gsm8k_rows` and `build_mode_overlap`;
    * `prompt` and a thinking `completion`, no more: `build_mode_overlap` cuts the thought out.
    ValueError if the columns are others.
    """
    loaded = load_table(source, split, config)
    columns = set(loaded.column_names)
    if columns == {"question", "answer"}:
        return to_dataset(build_mode_overlap(gsm8k_rows(loaded)))
    if columns == {"prompt", "completion"}:
        return to_dataset(build_mode_overlap(loaded))
    if columns != set(MESSAGE_FEATURES):
        raise ValueError(
            f"{source} has the columns {sorted(columns)}; the Mode-Overlap schema is {[*MESSAGE_FEATURES]}."
        )
    features = TEXT_FEATURES if isinstance(loaded.features["prompt"], Value) else MESSAGE_FEATURES
    try:
        return loaded.select_columns([*features]).cast(features)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has rows that are not of the Mode-Overlap schema {features} ({error}).") from error


def load_table(source: str | Path, split: str, config: str | None) -> Dataset:
    """A file, a folder written by `save_to_disk` or holding data files, or a Hub name. ValueError if there is no row to read."""
    try:
        table = _read_table(source, split, config)
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read as a table ({error.__cause__}); mend what does not fit.") from error
    if not len(table):
        raise ValueError(f"{source} holds no row.")
    return table


def _read_table(source: str | Path, split: str, config: str | None) -> Dataset:
    path = Path(source)
    if kind := FILE_FORMATS.get(path.suffix):
        if not path.is_file():
            raise ValueError(f"{source} does not exist; check the path.")
        # `load_dataset` falls over an empty file.
        if not path.stat().st_size:
            return Dataset.from_list([])
        return load_dataset(kind, data_files=str(source), split="train")
    if (path / "state.json").is_file():
        return load_from_disk(str(source))
    return load_dataset(str(source), config, split=split)
