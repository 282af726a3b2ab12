"""How are both modes of a prompt sampled from models? For a Mode-Overlap Dataset without written answers.

From a reasoning and an instruct model, or from one model in both modes; what breaks its mode's format, was cut short or
is judged wrong is counted and left out.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from trainers.evaluation import Reading, control_ids_of, generate_ids, read_output, stop_ids_of
from trainers.mode_overlap import build_mode_overlap, make_row, prompt_key


def sample_mode_overlap(
    prompts: Sequence[list[dict]],
    thinking_model,
    direct_model,
    tokenizer,
    *,
    journal: str | Path | None = None,
    **settings,
) -> list[dict]:
    """Mode-Overlap rows: each prompt answered thinking by one model and directly by another (or the same).

    `settings` are those of `sample_rows`. With `journal`, a path without suffix, an interrupted sampling goes on where it was
    (`journal.thinking.jsonl`, `journal.direct.jsonl`). Prompts without an acceptable answer in both modes are warned about.
    """
    rows = {}
    for name, model, thinking in (("thinking", thinking_model, True), ("direct", direct_model, False)):
        path = Path(f"{journal}.{name}.jsonl") if journal else None
        rows[name] = sample_rows(model, tokenizer, prompts, thinking=thinking, journal=path, **settings)
    return build_mode_overlap(rows["thinking"], rows["direct"])


def sample_rows(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    *,
    thinking: bool,
    max_new_tokens: int,
    is_correct: Callable[[int, str], bool] = lambda number, answer: True,
    batch_size: int = 16,
    journal: Path | None = None,
    progress: bool = True,
    **generate_kwargs,
) -> list[dict]:
    """One mode's rows for the prompts that the model answers acceptably; the others are counted in a line or, without
    `progress`, a warning.

    is_correct(number of the prompt, answer) may refuse an answer. `generate_kwargs` go to `generate` (greedy by default;
    the authors sample with do_sample=True, temperature=0.6, top_p=0.95). A journal of other settings is a ValueError.
    """
    plan = _plan(model, prompts, {"thinking": thinking, "max_new_tokens": max_new_tokens, **generate_kwargs})
    drawn = _Journal(journal, plan)
    think_id, end_think_id = control_ids_of(tokenizer)
    ids = {"think_id": think_id, "end_think_id": end_think_id, "stop_ids": stop_ids_of(model)}
    missing = range(len(drawn.lines), len(prompts))
    label = "sampling, thinking" if thinking else "sampling, non-thinking"
    with tqdm(total=len(prompts), initial=missing.start, desc=label, unit="answer", disable=not progress) as bar:
        for start in missing[::batch_size]:
            batch = prompts[start : start + batch_size]
            outputs = generate_ids(
                model, tokenizer, batch, thinking=thinking, max_new_tokens=max_new_tokens, **generate_kwargs
            )
            readings = [read_output(output, thinking=thinking, **ids) for output in outputs]
            drawn.add(
                [_judge(tokenizer, reading, start + i, thinking, is_correct) for i, reading in enumerate(readings)]
            )
            bar.update(len(batch))
    refused = Counter(line["refused"] for line in drawn.lines if line["refused"])
    kept = [(prompt, line) for prompt, line in zip(prompts, drawn.lines) if not line["refused"]]
    said = f"{label}: {len(kept)} of {len(prompts)} kept" + "".join(f", {n} {why}" for why, n in refused.items())
    if progress:
        print(said)
    elif refused:
        warnings.warn(said, stacklevel=2)
    return [make_row(prompt, line["answer"], line["thought"]) for prompt, line in kept]


def _judge(tokenizer, reading: Reading, number: int, thinking: bool, is_correct: Callable[[int, str], bool]) -> dict:
    thought = tokenizer.decode(reading.thought_ids) if thinking else None
    answer = None if reading.answer_ids is None else tokenizer.decode(reading.answer_ids)
    if reading.truncated:
        refused = "truncated"
    elif reading.format_error:
        refused = "with a format error"
    elif not answer.strip() or (thinking and not thought.strip()):
        refused = "with an empty thought or answer"
    else:
        refused = None if is_correct(number, answer) else "judged wrong"
    return {"thought": thought, "answer": answer, "refused": refused}


def _plan(model, prompts: Sequence[list[dict]], settings: dict) -> dict:
    """All that a journal belongs to."""
    digest = hashlib.sha256("\n".join(map(prompt_key, prompts)).encode()).hexdigest()
    return json.loads(
        json.dumps({"model": model.config._name_or_path, "prompts": digest, "settings": settings}, default=str)
    )


class _Journal:
    """What was sampled so far, one line a prompt, in order; on disk too if there is a path."""

    def __init__(self, path: Path | None, plan: dict):
        self.path, self.lines = path, []
        if path is None:
            return
        if path.exists():
            # A line without its end was being written when the process died.
            whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            header, *self.lines = [json.loads(line) for line in whole] or [plan]
            if header != plan:
                raise ValueError(
                    f"{path} holds another sampling (model, prompts or settings); finish that, or remove it."
                )
            path.write_bytes(b"".join(whole))
        if not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps(plan) + "\n")

    def add(self, lines: list[dict]) -> None:
        self.lines += lines
        if self.path is not None:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
