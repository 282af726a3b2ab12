"""By which problems is a model judged, and when is an answer right? Problems from files and from reasoning-gym.

lm-evaluation-harness brings its own (`trainers.harness`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

# What names a reasoning-gym family among tasks.
GYM = "reasoning-gym:"
# A minus behind a number, a Latin letter or a bracket is no sign: 3-5 ends in 5, where lm-evaluation-harness's lenient filter
# says -5. Behind Hangul it is one, as nothing stands between a word and its number there.
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)\]}%])-)?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")


@dataclass(frozen=True)
class Task:
    name: str
    prompts: list[list[dict]]
    # (number of the problem, text of the complete answer) -> right?
    is_correct: Callable[[int, str], bool]


def read_jsonl_task(path: str | Path, limit: int | None = None) -> Task:
    """Problems from a file with `question` or `prompt` (text or messages) and `answer` a line, such as GSM8K's test file.

    Of an answer only what follows `####` counts, where that is there. An answer is right if it is the same text, or, where a
    number is asked for, if the last number in it is that number. ValueError names a line that is not such a problem.
    """
    prompts, answers = [], []
    # Not splitlines, which would part a question at U+2028 and its like: JSON may hold them as they are.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if limit is not None and len(prompts) == limit:
            break
        if line.strip():
            prompt, answer = _read_problem(path, number, line)
            prompts.append(prompt)
            answers.append(answer)
    if not prompts:
        raise ValueError(f"{path} holds no problem; give a line with question and answer for each.")
    return Task(Path(path).name, prompts, lambda number, answer: same_answer(answer, answers[number]))


def _read_problem(path: str | Path, number: int, line: str) -> tuple[list[dict], str]:
    try:
        problem = json.loads(line)
        prompt, answer = problem.get("question", problem.get("prompt")), problem["answer"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}:{number} is not a JSON object with question and answer ({error!r}).") from error
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_asked = prompt and isinstance(messages, list) and all(map(_is_message, messages))
    if not is_asked or isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(
            f"{path}:{number} needs a question (or prompt), a text or messages, and a text or number as answer, "
            f"got {line[:200]!r}."
        )
    return messages, str(answer).rpartition("####")[2].strip()


def _is_message(said: object) -> bool:
    return isinstance(said, dict) and all(isinstance(said.get(name), str) for name in ("role", "content"))


def same_answer(said: str, right: str) -> bool:
    """Same text but for blanks, capitals and a full stop; for a number, same value as the last number said."""
    value = _number(right)
    if value is not None:
        return (found := last_number(said)) is not None and found == value
    return _plain(said) == _plain(right)


def last_number(text: str) -> Decimal | None:
    """Its value, thousands commas and the minus of print (U+2212) read as such; None if there is none."""
    matches = NUMBER.findall(text.replace("\u2212", "-"))
    found = [match for match in matches if any(character.isdigit() for character in match)]
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def _number(text: str) -> Decimal | None:
    stripped = text.strip().replace("\u2212", "-").lstrip("$").rstrip(".%")
    # NUMBER matches a lone sign, too.
    return last_number(stripped) if NUMBER.fullmatch(stripped) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def draw_reasoning_gym(family: str, size: int, seed: int) -> Task:
    """`size` problems of a reasoning-gym family, judged by its own verifier; partial credit counts as wrong."""
    problems = open_family(family, size, seed)
    entries = [problems[number] for number in range(size)]
    prompts = [[{"role": "user", "content": entry["question"]}] for entry in entries]
    return Task(f"{GYM}{family}", prompts, lambda number, said: problems.score_answer(said, entries[number]) == 1.0)


def open_family(family: str, size: int, seed: int):
    """reasoning-gym's dataset of a family, with its errors made ones that say what to do."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"{GYM}{family} needs reasoning-gym; pip install 'axk1[eval]'.") from error
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=size)
    except ValueError as error:
        raise ValueError(f"{GYM}{family}: reasoning-gym has no such family ({error}).") from error
