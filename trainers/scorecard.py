"""How does a model do on many tasks in both modes? Runs them, resumes, and leaves a table, JSON and an HTML page.

Works for any causal LM whose tokenizer has the two control tokens and whose chat template ends a prompt with the mode's.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# Importing the package is what makes AutoModelForCausalLM build our class for model type axk1.
from modeling_axk1.generation_axk1 import set_thinking_tokens
from trainers import report
from trainers.evaluation import ModeResult, Reading, bootstrap_interval, encode_prompts, evaluate_mode
from trainers.tasks import GYM, draw_reasoning_gym, read_jsonl_task
from trainers.tokenizer import END_THINK, THINK

MODES = {"think": True, "no-think": False}
# The benchmarks of the A.X K1 report and the harness's (0.4.13) task for each; None where it has none that can be used.
# Variants that let the model answer freely come before those that compare likelihoods.
PAPER_SUITE: dict[str, str | None] = {
    "KMMLU": "kmmlu_direct",
    "KMMLU-Redux": None,
    "KMMLU-Pro": None,
    "CLIcK": "click",
    "KoBALT": None,
    "MMLU-Pro": "mmlu_pro",
    "GPQA Diamond": "gpqa_diamond_cot_zeroshot",
    "IFBench": None,
    "IFEval": "ifeval",
    "IFEval-ko": None,
    "AIME25": "aime25",
    "AIME25-ko": None,
    "HRM8K": "hrm8k",
    "KMO25": None,
    "LiveCodeBench v6": None,
    "LiveCodeBench-ko": None,
    # The harness's tasks for HumanEval+ and MBPP+ run what the model wrote on your machine, which this suite never does.
    "HumanEval+": None,
    "HumanEval+ ko": None,
    "MBPP+": None,
    "SciCode": None,
    "Tau2-Telecom": None,
}
LM_EVAL = "lm-eval:"
GYM_PROBLEMS = 100


@dataclass(frozen=True)
class EvalSettings:
    """All that decides the numbers, kept with them."""

    model: str
    max_new_tokens: int = 4096
    limit: int | None = None  # problems a task
    temperature: float = 0.0  # 0 is greedy; the authors sample at 0.6
    top_p: float = 0.95
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self):
        for name in ("max_new_tokens", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} leaves nothing to judge; use 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} does not exist; 0 is greedy, the authors sample at 0.6.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no share above 0 and up to 1; the authors use 0.95.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} does not exist; use auto, float32, bfloat16 or float16.")

    def generate_kwargs(self) -> dict:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


def run_eval(
    model_path: str,
    *,
    tasks: Sequence[str],
    modes: str = "think,no-think",
    out: Path = Path("runs/eval"),
    batch_size: int = 16,
    device_map: str = "auto",
    include_path: str | None = None,
    **settings,
) -> list[dict]:
    """Judge a model (folder or Hub name) and write `out`/results.json and `out`/report.html; returns the table's rows.

    tasks: FILE.jsonl, reasoning-gym:FAMILY, lm-eval:TASK (lm-evaluation-harness) or `paper`; `settings` are the fields of
    EvalSettings. Each task and mode is written when it is done: run again, the same command goes on behind it.
    """
    chosen = parse_modes(modes)
    names = expand_tasks(tasks)
    settings = EvalSettings(model=model_path, **settings)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} asks nothing; use 1 or more.")
    keep_settings(out, settings)
    model, tokenizer = load_model(model_path, device_map, settings.dtype)
    rows = []
    for name in names:
        for mode in chosen:
            path = out / f"{file_stem(name)}.{mode}.json"
            if not path.exists():
                measured = judge(model, tokenizer, name, MODES[mode], settings, batch_size, include_path)
                write_whole(path, json.dumps(measured, indent=1))
            rows.append(json.loads(path.read_text()))
    write_results(out, settings, rows)
    return rows


def file_stem(task: str) -> str:
    """Of the file with a task's numbers. A task file is told by its content, not its path: changed in place, it is another."""
    if task.endswith(".jsonl"):
        return f"{Path(task).stem[:40]}.{hashlib.sha256(Path(task).read_bytes()).hexdigest()[:16]}"
    return task.replace(":", "-").replace("/", "-").strip("-.")


def parse_modes(modes: str) -> list[str]:
    chosen = [mode.strip() for mode in modes.split(",")]
    if unknown := [mode for mode in chosen if mode not in MODES]:
        raise ValueError(f"mode {unknown[0]!r} does not exist; use think, no-think or both: think,no-think.")
    return chosen


def expand_tasks(tasks: Sequence[str]) -> list[str]:
    """`paper` spelled out, what it lacks said. ValueError for a name of no known kind, before anything runs."""
    names = []
    for name in tasks:
        if name == "paper":
            names += [f"{LM_EVAL}{task}" for task in PAPER_SUITE.values() if task]
            lacking = [benchmark for benchmark, task in PAPER_SUITE.items() if task is None]
            print(f"paper: {len(PAPER_SUITE) - len(lacking)} of the report's benchmarks; not run: {', '.join(lacking)}")
        elif name.startswith((GYM, LM_EVAL)) or name.endswith(".jsonl"):
            if name.endswith(".jsonl") and not Path(name).is_file():
                raise ValueError(f"{name} does not exist; give the path of a file with question and answer a line.")
            names.append(name)
        else:
            raise ValueError(f"task {name!r} is of no known kind; use FILE.jsonl, {GYM}FAMILY, {LM_EVAL}TASK or paper.")
    return list(dict.fromkeys(names))


def keep_settings(out: Path, settings: EvalSettings) -> None:
    """Numbers of different settings must not mix in one folder, nor a local model's with those of its safetensors of before.

    A file is another if its size or time is; a Hub model's revision is not looked at.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = [(path.name, path.stat()) for path in sorted(Path(settings.model).glob("*.safetensors"))]
    weights = [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]
    path, now = out / "settings.json", {**asdict(settings), "weights": weights}
    # A command that was refused may leave the file, but no numbers.
    has_numbers = any(True for mode in MODES for _ in out.glob(f"*.{mode}.json"))
    before = json.loads(path.read_text()) if has_numbers and path.exists() else now
    # A folder of an earlier version says nothing of the weights.
    if {"weights": weights, **before} != json.loads(json.dumps(now)):
        raise ValueError(
            f"{out} holds numbers of other settings or weights ({path}); choose another --out or delete the folder."
        )
    write_whole(path, json.dumps(now, indent=1))


def write_whole(path: Path, text: str) -> None:
    """The file is there complete or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def load_model(model_path: str, device_map: str, dtype: str):
    """Model in eval mode and tokenizer. ValueError if the chat template does not end a prompt with the mode's control token."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, device_map=device_map, dtype=dtype).eval()
    set_thinking_tokens(model.generation_config, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_modes(tokenizer, model_path)
    return model, tokenizer


def check_modes(tokenizer, model_path: str) -> None:
    remedy = "set tokenizer.chat_template = trainers.tokenizer.CHAT_TEMPLATE and save the tokenizer"
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_path} has no chat template; {remedy}.")
    for thinking, tag in ((True, THINK), (False, END_THINK)):
        ids = encode_prompts(tokenizer, [[{"role": "user", "content": "?"}]], thinking=thinking).input_ids[0].tolist()
        if ids[-1] != tokenizer.convert_tokens_to_ids(tag):
            raise ValueError(
                f"the chat template of {model_path} ends a {'thinking' if thinking else 'non-thinking'} prompt in "
                f"{tokenizer.decode(ids[-1])!r} instead of {tag}, so its outputs cannot be read by mode; {remedy}."
            )


def judge(
    model, tokenizer, name: str, thinking: bool, settings: EvalSettings, batch_size: int, include_path: str | None
) -> dict:
    """One task in one mode, as a row."""
    torch.manual_seed(settings.seed)
    asked = {
        "thinking": thinking,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": batch_size,
        **settings.generate_kwargs(),
    }
    label = f"{name}, {'thinking' if thinking else 'non-thinking'}"
    if name.startswith(LM_EVAL):
        return judge_by_harness(model, tokenizer, name, label, settings.limit, include_path, asked)
    if name.startswith(GYM):
        task = draw_reasoning_gym(name.removeprefix(GYM), settings.limit or GYM_PROBLEMS, settings.seed)
    else:
        task = read_jsonl_task(name, settings.limit)
    with tqdm(total=len(task.prompts), desc=label, unit="answer") as bar:
        result, readings, correct = evaluate_mode(
            model, tokenizer, task.prompts, task.is_correct, on_batch=bar.update, **asked
        )
    return as_row(task.name, "exact", result, readings, [float(right) for right in correct])


def judge_by_harness(
    model, tokenizer, name: str, label: str, limit: int | None, include_path: str | None, asked
) -> dict:
    try:
        from trainers.harness import evaluate_harness_task
    except ImportError as error:
        raise ImportError(f"{name} needs lm-evaluation-harness ({error}); pip install 'axk1[eval]'.") from error
    with tqdm(desc=label, unit="request") as bar:
        found = evaluate_harness_task(
            model,
            tokenizer,
            name.removeprefix(LM_EVAL),
            limit=limit,
            include_path=include_path,
            on_batch=bar.update,
            **asked,
        )
    return as_row(name, found.metric, found.result, found.readings, found.scores)


def as_row(task: str, metric: str, result: ModeResult, readings: Sequence[Reading], scores: Sequence[float]) -> dict:
    """The result with 95% bootstrap intervals of what is a mean over problems."""
    return {
        "task": task,
        "metric": metric,
        **result.as_row(),
        "accuracy_interval": bootstrap_interval(scores),
        "format_error_interval": bootstrap_interval([float(reading.format_error) for reading in readings]),
        "truncation_interval": bootstrap_interval([float(reading.truncated) for reading in readings]),
        "tokens_interval": bootstrap_interval([float(reading.tokens) for reading in readings]),
    }


# -- what is shown ------------------------------------------------------------------------------------------------
def shown(row: dict) -> dict:
    """A row as read by people: shares in percent, intervals behind them."""

    def share(name: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:.1%} [{low:.1%}, {high:.1%}]"

    return {
        "task": row["task"],
        "mode": row["mode"],
        "problems": str(row["problems"]),
        "accuracy": share("accuracy"),
        "format error": share("format_error"),
        "truncated": share("truncation"),
        "tokens/answer": f"{row['tokens_per_answer']:.1f}",
        "s/answer": f"{row['seconds_per_answer']:.3f}",
        "judged by": row["metric"],
    }


def write_results(out: Path, settings: EvalSettings, rows: Sequence[dict]) -> None:
    write_whole(out / "results.json", json.dumps({"settings": asdict(settings), "results": list(rows)}, indent=1))
    pieces = [
        report.paragraph(
            "In brackets 95% bootstrap intervals over the problems. An answer that is cut by the length limit or breaks its "
            "mode's format is wrong. Seconds: wall time over answers, batched."
        ),
        report.table([shown(row) for row in rows]),
        report.heading("Settings"),
        report.preformatted(json.dumps(asdict(settings), indent=1)),
    ]
    write_whole(out / "report.html", report.page(f"{settings.model} in both modes", pieces))
