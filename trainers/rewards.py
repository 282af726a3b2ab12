"""What is an output worth? R = R_correct {+1, -1} + R_format {0, -1}, by its mode's rules, read from token ids.

[A.X K1 tech report, on-policy RL]  Ids, not text: tags that are special tokens vanish from decoded text, and a verifier
that sees the whole text reads answers inside the thought. An output without a complete answer (cut by the length limit,
or of broken format) is wrong; what counts as a format error is said once, in `trainers.evaluation.read_output`.

The functions that `correct_reward` and `format_reward` return are reward functions as TRL's GRPOTrainer calls them; the
column `thinking` (bool) gives each row's mode. A *judge* says whether an answer is right: judge(answer text, row) ->
True or False, where `row` holds the dataset's columns.
"""

import importlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from trainers.evaluation import Reading, read_output

Judge = Callable[[str, dict], bool]
logger = logging.getLogger(__name__)

# R_correct and R_format are whole numbers: any difference above rounding noise is one.
SPREAD = 1e-6
ON_ERROR = ("raise", "skip")


class Tokens(NamedTuple):
    """The ids by which an output is read."""

    think: int
    end_think: int
    stop: frozenset[int]


def read(completion_ids: Sequence[int], thinking: bool, tokens: Tokens) -> Reading:
    """One completion (ids after the control token) by its mode's rules."""
    return read_output(
        completion_ids,
        thinking=thinking,
        think_id=tokens.think,
        end_think_id=tokens.end_think,
        stop_ids=tokens.stop,
    )


def format_reward(tokens: Tokens) -> Callable[..., list[float]]:
    """R_format: 0, or -1 for a format error. A row whose mode is not a bool is a ValueError."""

    def format(completion_ids, thinking, **columns) -> list[float]:
        require_modes(thinking)
        return [-1.0 if read(ids, mode, tokens).format_error else 0.0 for ids, mode in zip(completion_ids, thinking)]

    return format


def correct_reward(judge: Judge, tokenizer, tokens: Tokens, *, on_error: str = "raise") -> Callable[..., list[float]]:
    """R_correct: +1 if the judge accepts the answer part, else -1; the judge never sees a thought.

    A judge that raises, or says anything but yes or no (NaN, None, 0.5), is a ValueError naming judge and row; with
    on_error="skip" it is a warning, and that completion's reward is NaN. What cannot be called is a ValueError at once.
    """
    if not callable(judge):
        raise ValueError(f"The judge must be a function of (answer, row), got {judge!r}; see find_judge for those by name.")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is unknown; use one of {', '.join(ON_ERROR)}.")

    def correct(completion_ids, thinking, **columns) -> list[float]:
        require_modes(thinking)
        rewards = []
        for place, (ids, mode) in enumerate(zip(completion_ids, thinking)):
            answer_ids = read(ids, mode, tokens).answer_ids
            if answer_ids is None:
                rewards.append(-1.0)
                continue
            row = row_of(columns, place) | {"thinking": mode}
            # The whole output, thought included.
            row.pop("completions", None)
            answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
            rewards.append(_judged(judge, answer, row, place, on_error))
        return rewards

    return correct


def checked(function: Callable, *, on_error: str = "raise") -> Callable[..., list[float | None]]:
    """A user's reward function with its failures named: NaN, infinity or an exception is a ValueError.

    With on_error="skip" it is a warning, counted as the metric `NAME/failed`, and the reward is None there, which in TRL
    means that the function does not apply to the row. What cannot be called is a ValueError at once.
    """
    if not callable(function):
        raise ValueError(f"A shaping reward must be a function as TRL calls them, got {function!r}; give the function itself.")
    name = getattr(function, "__name__", type(function).__name__)

    def named(completion_ids, **columns) -> list[float | None]:
        try:
            rewards = [None if each is None else float(each) for each in function(completion_ids=completion_ids, **columns)]
        except Exception as error:
            problem = f"the reward function {name} failed with {type(error).__name__}: {error}"
            _report(problem, on_error, error)
            rewards = [math.nan] * len(completion_ids)
        failed = [place for place, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        if failed:
            row = _row_name(row_of(columns, failed[0]), failed[0])
            _report(f"the reward function {name} returned {rewards[failed[0]]} for {row}", on_error)
            if "log_metric" in columns:
                columns["log_metric"](f"{name}/failed", len(failed))
        return [None if place in failed else reward for place, reward in enumerate(rewards)]

    named.__name__ = name
    return named


def _judged(judge: Judge, answer: str, row: dict, place: int, on_error: str) -> float:
    name, cause = getattr(judge, "__name__", type(judge).__name__), None
    try:
        verdict = judge(answer, row)
        # True, 1, 1.0 and numpy's: equal to one or zero. NaN equals nothing; of an array it cannot be said.
        if verdict in (0, 1):
            return 1.0 if verdict else -1.0
        problem = f"said {verdict!r} where True or False was expected"
    except Exception as error:
        problem, cause = f"failed with {type(error).__name__}: {error}", error
    _report(f"the judge {name} {problem}, for {_row_name(row, place)}, answer {answer[:80]!r}", on_error, cause)
    return math.nan


def _report(problem: str, on_error: str, cause: Exception | None = None) -> None:
    if on_error == "raise":
        raise ValueError(f"{problem}; mend it, or leave such rows out, counted, with reward_errors=skip.") from cause
    logger.warning("%s; left out", problem)


def _row_name(row: dict, place: int) -> str:
    return f"row {place} of the batch, prompt {str(row.get('prompt'))[:120]!r}"


def row_of(columns: dict[str, Any], place: int) -> dict[str, Any]:
    """One row out of TRL's keyword arguments: every list holds one entry a row; `prompts` is the column `prompt`."""
    row = {name: values[place] for name, values in columns.items() if isinstance(values, list)}
    if "prompts" in row:
        row["prompt"] = row.pop("prompts")
    return row


def require_modes(thinking: Sequence) -> None:
    strange = [mode for mode in thinking if not isinstance(mode, bool)]
    if strange:
        raise ValueError(f"the column thinking holds {strange[0]!r}; each row's mode is True or False.")


def has_spread(rewards_NG: Tensor) -> Tensor:
    """Which groups [N] of rewards [N groups, G completions] can teach: the best and the worst differ. NaN: never.

    Give it R_correct + R_format, never a reward shaped by length: with that, nearly every group would differ.
    """
    return rewards_NG.amax(dim=1) - rewards_NG.amin(dim=1) > SPREAD


# -- judges ---------------------------------------------------------------------------------------------------------
def judge_math(answer: str, row: dict) -> bool:
    """math-verify on the answer against the column `answer` (or `solution`): a number, LaTeX with or without its $ signs.

    GSM8K's "work #### 72" is read as 72. ValueError for a row whose own answer math-verify cannot parse.
    """
    import math_verify

    gold = gold_answer(row)
    marked = any(mark in gold for mark in ("$", r"\boxed", r"\(", r"\["))
    # Without its marks, 4x would be read as the first number in it.
    parsed_gold = math_verify.parse(gold if marked else f"${gold}$")
    if not parsed_gold:
        raise ValueError(f"math-verify cannot parse the dataset's own answer {gold!r}")
    # What the model wrote may be anything: if it does not parse, it is wrong.
    return bool(math_verify.verify(parsed_gold, math_verify.parse(answer)))


def judge_text(answer: str, row: dict) -> bool:
    """The same text as the column `answer` (or `solution`), white space at the ends aside."""
    return answer.strip() == gold_answer(row).strip()


def gold_answer(row: dict) -> str:
    """The right answer of a row: what follows `####`, where there is one."""
    gold = row.get("answer", row.get("solution"))
    if gold is None:
        raise ValueError(f"the row has no column answer or solution, only {', '.join(sorted(row))}")
    return str(gold).rpartition("####")[2].strip()


def judge_reasoning_gym(answer: str, row: dict) -> bool:
    """reasoning-gym's own verifier on the column `entry`, its item (as JSON text or a dict); partial credit is wrong.

    JSON text keeps items of different families apart, whose fields a table would mix.
    """
    import reasoning_gym

    entry = row.get("entry")
    if entry is None:
        raise ValueError(f"the row has no column entry with reasoning-gym's item, only {', '.join(sorted(row))}")
    entry = json.loads(entry) if isinstance(entry, str) else entry
    score = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
    return score(answer, entry) == 1.0


JUDGES: dict[str, Judge] = {"math": judge_math, "text": judge_text, "reasoning-gym": judge_reasoning_gym}


def find_judge(name: str) -> Judge:
    """One of JUDGES by name, or your own as `package.module:function`."""
    if name in JUDGES:
        return JUDGES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"judge={name!r} is unknown; use one of {', '.join(JUDGES)}, or package.module:function.")
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge={name!r} cannot be imported ({error}); check the module's path and name.") from error
    if not callable(judge):
        raise ValueError(f"judge={name!r} is {judge!r}, which cannot be called; name a function of (answer, row).")
    return judge
