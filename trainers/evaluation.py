"""How good is a model in each mode: accuracy, format error, truncation, tokens and seconds an answer?

Generation is not constrained here: the format error is the model's own. Works for any causal LM whose chat template
knows `enable_thinking` and whose generation config knows where to stop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from trainers.mode_overlap import prompt_key
from trainers.tokenizer import END_THINK, THINK


@dataclass(frozen=True)
class Reading:
    """One output read by its mode's rules. `answer_ids` is None where there is no complete answer to judge."""

    thought_ids: list[int]
    answer_ids: list[int] | None
    format_error: bool
    truncated: bool
    tokens: int  # generated, the stop token included


@dataclass(frozen=True)
class ModeResult:
    mode: str
    problems: int
    accuracy: float
    format_error: float
    truncation: float
    tokens_per_answer: float
    seconds_per_answer: float  # wall time over answers: batched generation, so a throughput

    def as_row(self) -> dict:
        return asdict(self)


def read_output(
    generated_ids: Sequence[int], *, thinking: bool, think_id: int, end_think_id: int, stop_ids: set[int]
) -> Reading:
    """Read the ids generated after the control token, stop token and padding included.

    Thinking: one `</think>`, then the answer; non-thinking: no tag. An output without a stop token was cut by the
    length limit: it is truncated, has no answer (a half thought must never be judged as one), and breaks the format
    only if what is there already does.
    """
    ids = list(generated_ids)
    stop = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    truncated = stop is None
    body = ids if truncated else ids[:stop]
    closings = body.count(end_think_id)
    if thinking:
        format_error = think_id in body or closings > 1 or (closings == 0 and not truncated)
    else:
        format_error = think_id in body or closings > 0
    closed = body.index(end_think_id) if thinking and closings else None
    thought_ids = body[:closed] if thinking else []
    answer_ids = None if truncated or format_error else body[closed + 1 :] if thinking else body
    return Reading(thought_ids, answer_ids, format_error, truncated, len(body) + (not truncated))


def control_ids_of(tokenizer) -> tuple[int, int]:
    """The ids of `<think>` and `</think>`. ValueError if the tokenizer splits one of them."""
    ids = tokenizer.convert_tokens_to_ids([THINK, END_THINK])
    for tag, token in zip((THINK, END_THINK), ids):
        if token in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no single token for {tag}; add it with tokenizer.add_tokens.")
    return tuple(ids)


def stop_ids_of(model) -> set[int]:
    """The tokens that end an answer. ValueError if the model has none."""
    stop = model.generation_config.eos_token_id
    stop_ids = {stop} if isinstance(stop, int) else set(stop or ())
    if not stop_ids:
        raise ValueError("generation_config.eos_token_id is None, so no answer would end; set the end-of-turn id.")
    return stop_ids


def summarise(mode: str, readings: Sequence[Reading], correct: Sequence[bool], elapsed_s: float) -> ModeResult:
    """Shares over all problems: whatever has no answer counts as wrong."""
    if not readings or len(readings) != len(correct):
        raise ValueError(f"{len(readings)} readings and {len(correct)} verdicts; give one to each, and at least one.")
    count = len(readings)
    return ModeResult(
        mode=mode,
        problems=count,
        accuracy=sum(correct) / count,
        format_error=sum(reading.format_error for reading in readings) / count,
        truncation=sum(reading.truncated for reading in readings) / count,
        tokens_per_answer=sum(reading.tokens for reading in readings) / count,
        seconds_per_answer=elapsed_s / count,
    )


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one a problem; it has no width where all values are equal."""
    if not values:
        raise ValueError("no values to resample; give at least one.")
    numbers = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # A hundred draws at a time: all at once would hold draws x problems numbers.
    sizes = [min(100, draws - begun) for begun in range(0, draws, 100)]
    means = [numbers[torch.randint(len(numbers), (size, len(numbers)), generator=generator)].mean(1) for size in sizes]
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def evaluate_mode(
    model,
    tokenizer,
    prompts: Sequence[str | list[dict]],
    is_correct: Callable[[int, str], bool],
    *,
    thinking: bool,
    max_new_tokens: int,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda answers: None,
    **generate_kwargs,
) -> tuple[ModeResult, list[Reading], list[bool]]:
    """Answer every prompt (a list of messages, or a text) in one mode and judge it.

    is_correct(number of the prompt, answer text) is called for complete answers only. `generate_kwargs` go to
    `generate`; greedy unless they say otherwise. on_batch is told how many answers were added (a progress bar).
    """
    think_id, end_think_id = control_ids_of(tokenizer)
    stop_ids = stop_ids_of(model)
    readings, elapsed_s = [], 0.0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        begun = time.perf_counter()
        outputs = generate_ids(
            model, tokenizer, batch, thinking=thinking, max_new_tokens=max_new_tokens, **generate_kwargs
        )
        elapsed_s += time.perf_counter() - begun
        ids = {"think_id": think_id, "end_think_id": end_think_id, "stop_ids": stop_ids}
        readings += [read_output(output, thinking=thinking, **ids) for output in outputs]
        on_batch(len(batch))
    correct = [
        reading.answer_ids is not None and is_correct(number, tokenizer.decode(reading.answer_ids))
        for number, reading in enumerate(readings)
    ]
    return summarise("thinking" if thinking else "non-thinking", readings, correct, elapsed_s), readings, correct


def encode_prompts(tokenizer, prompts, *, thinking: bool):
    """Prompts (messages, or texts without control token) as left-padded `input_ids` and `attention_mask`, mode included."""
    layout = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if isinstance(prompts[0], str):
        texts = [prompt_key(prompt) + (THINK if thinking else END_THINK) for prompt in prompts]
        return tokenizer(texts, **layout)
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, enable_thinking=thinking, return_dict=True, **layout
    )


def generate_ids(
    model, tokenizer, prompts, *, thinking: bool, max_new_tokens: int, **generate_kwargs
) -> list[list[int]]:
    """What the model writes after the control token that ends each prompt."""
    encoded = encode_prompts(tokenizer, prompts, thinking=thinking).to(model.device)
    return generate_ids_from(model, encoded, max_new_tokens=max_new_tokens, **generate_kwargs)


@torch.inference_mode()
def generate_ids_from(model, encoded, *, max_new_tokens: int, **generate_kwargs) -> list[list[int]]:
    """What the model writes after encoded, left-padded prompts; greedy unless told otherwise."""
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | generate_kwargs
    was_training = model.training
    model.eval()
    generated = model.generate(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, **settings)
    model.train(was_training)
    return generated[:, encoded.input_ids.shape[1] :].tolist()
