"""How does lm-evaluation-harness judge a model that thinks? By its answer alone; a thought that does not end is wrong.

The harness's own wrapper (0.4.13) takes a truncated thought for the answer, lets a task's stop strings end a thought, and
gives a thought the few tokens that a task has for an answer. Here the thought runs to `</think>` within `max_new_tokens`, the
stop strings cut the answer, and whatever has no complete answer counts 0 whatever a metric says of the empty text.
Multiple choice is scored by the likelihood of each choice behind the closed thought (or `</think>`, in non-thinking mode).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from trainers.evaluation import (
    ModeResult,
    Reading,
    control_ids_of,
    generate_ids_from,
    read_output,
    stop_ids_of,
    summarise,
)

# What a task is judged by where it has several filters: the one that looks for the answer in a sentence.
LENIENT_FILTER = "flexible-extract"
# The log-likelihood of a choice that was never reached: finite, as the harness subtracts them from each other.
NEVER = -1e9


@dataclass(frozen=True)
class HarnessResult:
    result: ModeResult
    metric: str  # the harness's, with its filter
    scores: list[float]  # one a problem
    readings: list[Reading] = field(repr=False)


@lru_cache(maxsize=1)
def known_tasks(kind: type[TaskManager], include_path: str | None) -> TaskManager:
    """One reading of all task files, which takes seconds, for every task and mode of a run."""
    return kind(include_path=include_path)


def evaluate_harness_task(
    model,
    tokenizer,
    task: str,
    *,
    thinking: bool,
    max_new_tokens: int,
    batch_size: int = 16,
    limit: int | None = None,
    include_path: str | None = None,
    on_batch: Callable[[int], None] = lambda answers: None,
    **generate_kwargs,
) -> HarnessResult:
    """Judge one task (or group, all its problems alike) of the harness in one mode.

    include_path: a folder with further task files. `generate_kwargs` go to `generate` instead of the task's own; greedy by
    default. ValueError for tasks that do not exist, have no answer (perplexity) or begin it for the model.
    """
    known = known_tasks(TaskManager, include_path)
    # The path of a task's file will do too.
    if task not in known.all_tasks and not Path(task).is_file():
        # It may have been added since.
        known_tasks.cache_clear()
        known = known_tasks(TaskManager, include_path)
        if task not in known.all_tasks:
            raise ValueError(
                f"lm-evaluation-harness has no task {task!r}; `lm-eval ls tasks` lists them, --include-path adds some."
            )
    speaker = TwoModeLM(model, tokenizer, thinking, max_new_tokens, batch_size, on_batch, generate_kwargs)
    found = simple_evaluate(
        model=speaker,
        tasks=[task],
        task_manager=known,
        limit=limit,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = [(name, sample) for name, of_task in found["samples"].items() for sample in of_task]
    metric, filter_name = _main_metric([sample for _, sample in samples])
    judged = [(name, sample) for name, sample in samples if sample["filter"] == filter_name]
    readings = [speaker.readings[name, sample["doc_id"]] for name, sample in judged]
    scores = [
        0.0 if reading.answer_ids is None else float(sample[metric]) for reading, (_, sample) in zip(readings, judged)
    ]
    result = summarise(
        "thinking" if thinking else "non-thinking", readings, [s == 1.0 for s in scores], speaker.elapsed_s
    )
    return HarnessResult(
        replace(result, accuracy=sum(scores) / len(scores)), f"{metric},{filter_name}", scores, readings
    )


def _main_metric(samples: list[dict]) -> tuple[str, str]:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    # In the harness's order; it lists the one that a task is known by first.
    metric = next((name for name in samples[0]["metrics"] if isinstance(samples[0][name], (bool, int, float))), None)
    if metric is None:
        raise ValueError(
            f"the harness's metrics {samples[0]['metrics']} give no number for a problem; choose another task."
        )
    return metric, LENIENT_FILTER if LENIENT_FILTER in filters else filters[0]


class TwoModeLM(LM):
    """A model in one mode, as the harness asks for it. `readings` holds what was said, by task and problem."""

    def __init__(
        self, model, tokenizer, thinking: bool, max_new_tokens: int, batch_size: int, on_batch, generate_kwargs
    ):
        super().__init__()
        self.model, self.tokenizer, self.thinking = model, tokenizer, thinking
        self.max_new_tokens, self.batch_size, self.on_batch = max_new_tokens, batch_size, on_batch
        self.generate_kwargs = generate_kwargs
        think_id, end_think_id = control_ids_of(tokenizer)
        self.ids = {"think_id": think_id, "end_think_id": end_think_id, "stop_ids": stop_ids_of(model)}
        self.readings: dict[tuple[str, int], Reading] = {}
        self.elapsed_s = 0.0

    # -- what the harness needs to build prompts --------------------------------------------------------------------
    @property
    def tokenizer_name(self) -> str:
        return f"axk1-{'thinking' if self.thinking else 'non-thinking'}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ValueError(
                "the task begins the answer for the model, where its thought would stand; choose another task."
            )
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
        )

    # -- answers ----------------------------------------------------------------------------------------------------
    def generate_until(self, requests) -> list[str]:
        answers = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            outputs = self._generate([request.args[0] for request in batch], self.max_new_tokens)
            for request, output in zip(batch, outputs):
                reading = read_output(output, thinking=self.thinking, **self.ids)
                # The first of repeated answers is the one that the harness takes.
                self.readings.setdefault((request.task_name, request.doc_id), reading)
                text = "" if reading.answer_ids is None else self.tokenizer.decode(reading.answer_ids)
                answers.append(cut_at(text, request.args[1].get("until", [])))
            self.on_batch(len(batch))
        return answers

    def _generate(self, texts: list[str], max_new_tokens: int, **settings) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        begun = time.perf_counter()
        outputs = generate_ids_from(
            self.model, encoded, max_new_tokens=max_new_tokens, **(self.generate_kwargs | settings)
        )
        self.elapsed_s += time.perf_counter() - begun
        return outputs

    # -- choices ----------------------------------------------------------------------------------------------------
    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        prefixes = self._think([request.args[0] for request in requests])
        scores = []
        for request in requests:
            prefix, reading = prefixes[request.args[0]]
            self.readings[request.task_name, request.doc_id] = reading
            if reading.answer_ids is None:
                # Counted 0 whichever choice the harness then takes.
                scores.append((NEVER, False))
            else:
                scores.append(self._score(prefix, request.args[1]))
            self.on_batch(1)
        return scores

    def loglikelihood_rolling(self, requests) -> list[float]:
        raise ValueError("a perplexity task has no answer and so no modes; choose another task.")

    def _think(self, contexts: list[str]) -> dict[str, tuple[list[int], Reading]]:
        """For each context the ids that its choices follow, and what was thought on the way."""
        distinct = list(dict.fromkeys(contexts))
        encoded = {text: self.tokenizer(text, add_special_tokens=False).input_ids for text in distinct}
        if not self.thinking:
            return {text: (ids, Reading([], [], False, False, 0)) for text, ids in encoded.items()}
        end_think_id, stop_ids = self.ids["end_think_id"], self.ids["stop_ids"]
        prefixes = {}
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            outputs = self._generate(batch, self.max_new_tokens, eos_token_id=[end_think_id, *sorted(stop_ids)])
            for text, output in zip(batch, outputs):
                # An answer of no tokens closes what is there, so that the rules of a whole output judge the thought.
                end = next((at for at, token in enumerate(output) if token == end_think_id), None)
                said = output if end is None else [*output[: end + 1], min(stop_ids)]
                reading = read_output(said, thinking=True, **self.ids)
                prefixes[text] = (encoded[text] + reading.thought_ids + [end_think_id], reading)
        return prefixes

    @torch.inference_mode()
    def _score(self, prefix: list[int], continuation: str) -> tuple[float, bool]:
        """Log-likelihood of the continuation behind the prefix, and whether greedy decoding would say it."""
        said = self.tokenizer(continuation, add_special_tokens=False).input_ids
        begun = time.perf_counter()
        ids_1S = torch.tensor([prefix + said], device=self.model.device)
        log_probs_TV = self.model(input_ids=ids_1S).logits[0, -len(said) - 1 : -1].float().log_softmax(-1)
        self.elapsed_s += time.perf_counter() - begun
        said_T = ids_1S[0, -len(said) :]
        chosen_T = log_probs_TV.gather(1, said_T[:, None])[:, 0]
        return chosen_T.sum().item(), bool((log_probs_TV.argmax(-1) == said_T).all())


def cut_at(text: str, stops: str | list[str]) -> str:
    """The text before the first of the stop strings."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min([at for stop in stops if stop and (at := text.find(stop)) >= 0], default=len(text))]
