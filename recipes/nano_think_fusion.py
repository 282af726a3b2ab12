"""How does one model learn to think on request? The whole Think-Fusion recipe at nano scale, on a laptop CPU.

    problems -> tokenizer -> base -> instruct  (answers at once)   -> merged (0.8) -> fused (MOD) -> both modes measured
                                  -> reasoning (works, then answers) /
                                  -> early (a little MOD) -> reinforced (DAPO with GSPO's ratio), measured before and after

Read it from `main` downwards or upwards: every stage is one function that fills one folder. A stage's folder appears
only when the stage is finished, so a run that was killed goes on from its last finished stage, with the same numbers.

The same steps at full scale: A.X K1 Technical Report, section 4, and the authors' article on reasoning-mode selection.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from conversion.merging import merge_checkpoints
from modeling_axk1 import AxK1Config, AxK1ForCausalLM, set_thinking_tokens
from modeling_axk1.modeling_axk1 import AxK1TopkRouter
from recipes.nano_problems import Problem, draw_problems, score
from trainers import report
from trainers.evaluation import ModeResult, Reading, evaluate_mode
from trainers.mode_curves import Measure
from trainers.mode_overlap import build_mode_overlap, make_row, save_mode_overlap, validate_mode_overlap
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer
from trainers.tokenizer import END_OF_TEXT, train_tokenizer


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers. Saved with the run; a run goes on only under the same settings."""

    seed: int = 17
    threads: int = 2
    batch_rows: int = 32
    base_steps: int = 1500
    reasoning_steps: int = 600
    instruct_steps: int = 600
    fused_steps: int = 500
    merge_alpha: float = 0.8  # [tech report, merge of the two SFT models]
    test_problems: int = 500
    max_new_tokens: int = 64

    def scaled(self, scale: float) -> "Settings":
        """Fewer (or more) training steps and test problems, the rest as it is."""
        names = ("base_steps", "reasoning_steps", "instruct_steps", "fused_steps", "test_problems")
        return replace(self, **{name: max(2, round(getattr(self, name) * scale)) for name in names})


# -- stages -------------------------------------------------------------------------------------------------------
def run_stage(out: Path, name: str, work: Callable[[Path], dict]) -> dict:
    """Do `work` in a folder of its own, once. Returns its result, from `result.json` if an earlier run finished it.

    The folder gets its name by one atomic rename at the end: it is there complete or not at all.
    """
    done, unfinished = out / name, out / f"{name}.unfinished"
    if done.exists():
        result = json.loads((done / "result.json").read_text())
        print(f"[{name}] finished earlier, {result['elapsed_s']:.0f} s", flush=True)
        return result
    print(f"[{name}]", flush=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    begun = time.perf_counter()
    result = work(unfinished) | {"elapsed_s": time.perf_counter() - begun}
    (unfinished / "result.json").write_text(json.dumps(result, indent=1))
    unfinished.rename(done)
    print(f"[{name}] done in {result['elapsed_s']:.0f} s", flush=True)
    return result


@dataclass(frozen=True)
class Problems:
    """Disjoint by text: no question occurs in two of the fields."""

    base: list[Problem]
    reasoning: list[Problem]
    instruct: list[Problem]
    fused: list[Problem]
    test: list[Problem]


def draw_splits(settings: Settings) -> Problems:
    """Drawn anew by every run (seconds) from the seed, so there is nothing to store."""
    # Every problem is seen once; the MOD holds each in both modes.
    sizes = {
        "base": settings.base_steps * settings.batch_rows,
        "reasoning": settings.reasoning_steps * settings.batch_rows,
        "instruct": settings.instruct_steps * settings.batch_rows,
        "fused": settings.fused_steps * settings.batch_rows // 2,
        "test": settings.test_problems,
    }
    drawn = iter(draw_problems(sum(sizes.values()), seed=settings.seed))
    return Problems(**{name: list(itertools.islice(drawn, size)) for name, size in sizes.items()})


def make_tokenizer(folder: Path, problems: Problems) -> dict:
    # The role names of the chat template are in the text, so that each becomes one token.
    texts = (f"user\n{p.question}\nassistant\n{p.trace}\n{p.answer}" for p in problems.base[:4000])
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer)}


def pretrain_base(folder: Path, tokenizer, problems: list[Problem], settings: Settings) -> dict:
    """A base model: plain documents, no chat, no tags; two in three are worked, one has the bare answer."""
    questions = tokenizer([f"{p.question}\n" for p in problems]).input_ids
    works = (f"{p.trace}\n" if worked else "" for p, worked in zip(problems, itertools.cycle([True, True, False])))
    endings = tokenizer([f"{work}{p.answer}{END_OF_TEXT}" for p, work in zip(problems, works)]).input_ids
    rows = {
        # One document a row: end to end without a document mask, a lookup would find the neighbour's facts too.
        "input_ids": [question + ending for question, ending in zip(questions, endings)],
        # The questions are random draws. Counted in the loss, they teach that any colour may follow a face, and the
        # lookup of the right one then takes several times as long to appear (measured).
        "labels": [[-100] * len(question) + ending for question, ending in zip(questions, endings)],
    }
    config = AxK1Config.preset(
        "nano",
        vocab_size=len(tokenizer),
        # At this width 0.02 leaves the attention nearly blind for the first hundreds of steps.
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(settings.seed)
    trainer = SFTTrainer(
        AxK1ForCausalLM(config),
        SFTConfig(**training_arguments(folder, settings, settings.base_steps, learning_rate=3e-3)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
    )
    return train_and_save(trainer, folder, tokenizer)


def fine_tune(folder: Path, start: Path, tokenizer, rows: list[dict], settings: Settings, *, steps: int) -> dict:
    """One SFT stage: prompt/completion rows, the control token outside of the loss."""
    arguments = ThinkFusionConfig(**training_arguments(folder, settings, steps, learning_rate=2e-3))
    trainer = ThinkFusionTrainer(
        str(start), arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
    )
    return train_and_save(trainer, folder, tokenizer)


def training_arguments(folder: Path, settings: Settings, steps: int, learning_rate: float) -> dict:
    """What all four trainings share: warm-up, stable, decay over the last 40% [WSD, tech report 2], AdamW."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_rows,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": min(30, steps // 5),
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, int(0.4 * steps)), "min_lr_ratio": 0.02},
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, steps // 40),
        "save_strategy": "no",
        "report_to": "none",
        # The rows are all short; grouped by length, a batch would hold one mode.
        "train_sampling_strategy": "random",
        "seed": settings.seed,
        "use_cpu": True,
        # TRL's defaults are for large models: they would cut rows, recompute activations and train in bf16.
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "dataloader_pin_memory": False,
    }


class Bar(ProgressCallback):
    """Transformers' progress bar, with the loss beside it instead of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def train_and_save(trainer: Trainer, folder: Path, tokenizer) -> dict:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train()
    model = trainer.model
    set_thinking_tokens(model.generation_config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curves = ("loss", "loss_thinking", "loss_non_thinking")
    history = [{key: entry[key] for key in ("step", *curves) if key in entry} for entry in trainer.state.log_history]
    return {"history": [entry for entry in history if "loss" in entry]}


def merge(folder: Path, reasoning: Path, instruct: Path, tokenizer, settings: Settings) -> dict:
    """theta = 0.8 * theta_reasoning + 0.2 * theta_instruct, every parameter, shard by shard."""
    # merge_checkpoints makes its output folder itself.
    folder.rmdir()
    merge_checkpoints(reasoning, instruct, folder, alpha=settings.merge_alpha)
    tokenizer.save_pretrained(folder)
    return {"alpha": settings.merge_alpha}


def fuse(folder: Path, start: Path, tokenizer, problems: Problems, settings: Settings) -> dict:
    """Think-Fusion SFT on the Mode-Overlap Dataset: each prompt once with its trace, once with the trace cut out."""
    rows = build_mode_overlap(make_row(p.messages, p.answer, p.trace) for p in problems.fused)
    found = validate_mode_overlap(
        rows,
        held_out=[p.messages for p in problems.test],
        count_tokens=lambda text: len(tokenizer(text).input_ids),
    )
    found.require_sound()
    print(found, flush=True)
    # `axk1 sft` reads it too: see recipes/configs/sft_cpu.yaml.
    save_mode_overlap(rows, folder / "mod.jsonl")
    trained = fine_tune(folder, start, tokenizer, rows, settings, steps=settings.fused_steps)
    return trained | {"thinking_token_share": found.thinking_token_share}


def answer_problems(model, tokenizer, problems: Sequence[Problem], **how) -> tuple[ModeResult, list[Reading], list[bool]]:
    """`evaluate_mode` by reasoning-gym's verifier."""
    prompts = [p.messages for p in problems]
    return evaluate_mode(model, tokenizer, prompts, lambda n, said: score(problems[n], said), batch_size=250, **how)


def evaluate(folder: Path, model_dir: Path, tokenizer, test: list[Problem], settings: Settings) -> dict:
    """Both modes on the held-out problems, greedy, nothing enforced; accuracy by reasoning-gym's verifier."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    modes, families = [], []
    for thinking in (True, False):
        with tqdm(total=len(test), desc="thinking" if thinking else "non-thinking", dynamic_ncols=True) as bar:
            how = {"thinking": thinking, "max_new_tokens": settings.max_new_tokens, "on_batch": bar.update}
            result, _, correct = answer_problems(model, tokenizer, test, **how)
        modes.append(result.as_row())
        for family in sorted({p.family for p in test}):
            verdicts = [right for p, right in zip(test, correct) if p.family == family]
            row = {"family": family, "mode": result.mode, "accuracy": sum(verdicts) / len(verdicts)}
            families.append(row | {"problems": len(verdicts)})
    load = {
        "thinking": expert_load(model, tokenizer, test[:200], thinking=True),
        "non-thinking": expert_load(model, tokenizer, test[:200], thinking=False),
    }
    return {"modes": modes, "families": families, "expert_load": load}


@torch.no_grad()
def expert_load(model, tokenizer, problems: list[Problem], *, thinking: bool) -> list[list[float]]:
    """Each expert's share of the routed tokens, one row a MoE layer; all equal would be 1 / experts."""
    chats = [
        [*p.messages, {"role": "assistant", "content": f"{p.trace}</think>{p.answer}" if thinking else p.answer}]
        for p in problems
    ]
    routers = [module for module in model.modules() if isinstance(module, AxK1TopkRouter)]
    total = [torch.zeros_like(router.expert_load) for router in routers]
    # The routers count in training mode only. One chat at a time: padding would be counted too.
    model.train()
    for chat in chats:
        model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True))
        for counted, router in zip(total, routers):
            counted += router.expert_load
    model.eval()
    return [(counted / counted.sum()).tolist() for counted in total]


# Run in a process of its own, where nothing of ours is imported: the class is transformers' own.
STOCK_RELOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
said = {"class": f"{type(model).__module__}.{type(model).__name__}"}
for mode, thinking in (("thinking", True), ("non-thinking", False)):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, enable_thinking=thinking, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
    said[mode] = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
print(json.dumps(said))
"""


def reload_with_stock(folder: Path, model_dir: Path, problem: Problem, settings: Settings) -> dict:
    """One problem in both modes, by transformers alone: what was saved needs nothing of ours."""
    command = [
        sys.executable,
        "-c",
        STOCK_RELOAD,
        str(model_dir.resolve()),
        problem.question,
        str(settings.max_new_tokens),
    ]
    # Away from this repository, which the child could otherwise import from.
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"Stock transformers could not use {model_dir}:\n{child.stderr}")
    said = json.loads(child.stdout.splitlines()[-1])
    return said | {"question": problem.question, "answer": problem.answer}


# -- reinforcement ------------------------------------------------------------------------------------------------
# The final model has nothing left to learn by trial: all right where it thinks, at chance where it does not. So reinforcement
# begins at a model that MOD made of the base and that was stopped early, as in recipes/rl_nano.py, in less time.
RL_UPDATES = 30
# A batch is not waited for longer than three rounds: groups that are still dead are masked.
MAX_RESAMPLE_ROUNDS = 2


def rl_test_problems(settings: Settings) -> int:
    """Measured four times, greedily and sampled, before and after: fewer than the final model's."""
    return max(2, round(0.6 * settings.test_problems))


def can_reinforce() -> bool:
    """Whether TRL has what DapoGspoTrainer builds on; Python 3.10 gets an older one."""
    return Version(trl.__version__) >= Version("1.16")


def reinforce_early(stage: Callable, out: Path, tokenizer, problems: Problems, settings: Settings) -> None:
    """Two stages: a little MOD from the base, then both modes by reinforcement; both measured greedily and as sampled."""
    # rl_nano is built on this file.
    from recipes import rl_nano

    scale = min(1.0, settings.fused_steps / Settings.fused_steps)
    rl_settings = rl_nano.Settings(
        seed=settings.seed,
        threads=settings.threads,
        base_steps=settings.base_steps,
        start_steps=min(200, settings.fused_steps),
        instructions=max(2, round(scale * rl_nano.Settings.instructions)),
        test_problems=rl_test_problems(settings),
        max_new_tokens=settings.max_new_tokens,
    )
    # The early model comes from the base, so the two SFT stages' problems are new to it.
    drawn = rl_nano.Problems(
        base=problems.base,
        fused=problems.fused[: rl_settings.start_steps * settings.batch_rows // 2],
        rl=problems.reasoning[: rl_settings.rl_problems],
        check=problems.instruct[:100],
        test=problems.test[: rl_settings.test_problems],
    )
    stage("early", rl_nano.fuse_a_little, out / "base", tokenizer, drawn, rl_settings)
    rl = {"updates": max(1, round(scale * RL_UPDATES)), "max_resample_rounds": MAX_RESAMPLE_ROUNDS}
    stage("reinforced", rl_nano.reinforce, out / "early", tokenizer, drawn, rl_settings, dynamic=True, **rl)


# -- what is shown ------------------------------------------------------------------------------------------------
def mode_table(modes: list[dict]) -> list[dict]:
    """The result as shown: shares in percent, units in the head."""
    return [
        {
            "mode": row["mode"],
            "accuracy": f"{row['accuracy']:.1%}",
            "format error": f"{row['format_error']:.1%}",
            "truncated": f"{row['truncation']:.1%}",
            "tokens/answer": f"{row['tokens_per_answer']:.1f}",
            "s/answer": f"{row['seconds_per_answer']:.4f}",
        }
        for row in modes
    ]


def problems_asked(settings: Settings) -> str:
    fewer = f", the early models' {rl_test_problems(settings)} of them" if can_reinforce() else ""
    return f"{settings.test_problems} held-out problems{fewer}"


def closing_table(results: dict[str, dict]) -> list[dict]:
    """The final model; below it, where reinforcement began and where it ended: greedy, and at temperature 1 as it samples."""
    measured = {"fused": results["evaluation"]["modes"]}
    if "reinforced" in results:
        for how, key in (("", "modes"), (", t=1", "sampled")):
            for name, label in (("early", "early"), ("reinforced", "early + RL")):
                measured[label + how] = results[name][key]
    return [{"model": label} | row for label, modes in measured.items() for row in mode_table(modes)]


def show_sample(sample: dict) -> str:
    return (
        f"{sample['class']}\n\n{sample['question']}\n(right answer: {sample['answer']!r})\n\n"
        f"--- thinking\n<think>{sample['thinking']}\n\n--- non-thinking\n</think>{sample['non-thinking']}"
    )


def write_report(path: Path, settings: Settings, results: dict[str, dict]) -> None:
    evaluation = results["evaluation"]
    pieces = [
        report.paragraph(
            f"{problems_asked(settings)} of reasoning-gym, greedy decoding unless t=1 is said, nothing enforced. "
            "Problems, answers and verdicts are reasoning-gym's, the short wording of the questions is ours. "
            "Format error: share of outputs that break their mode's format. Truncated: cut by the length limit."
        ),
        report.table(closing_table(results)),
        report.heading("By problem family"),
        report.table([row | {"accuracy": f"{row['accuracy']:.1%}"} for row in evaluation["families"]]),
        report.heading("Loss"),
    ]
    trained = {name: results[name]["history"] for name in ("base", "reasoning", "instruct", "fused")}
    by_stage = {name: [(entry["step"], entry["loss"]) for entry in history] for name, history in trained.items()}
    by_mode = {
        label: [(entry["step"], entry[key]) for entry in trained["fused"] if key in entry]
        for label, key in (("thinking", "loss_thinking"), ("non-thinking", "loss_non_thinking"))
    }
    for series, caption in (
        (by_stage, "Training loss of the four stages"),
        (by_mode, "Think-Fusion SFT: loss of each mode"),
    ):
        pieces.append(report.line_chart(series, caption=caption, x_label="step", y_label="loss (log)", log_y=True))
    if "reinforced" in results:
        pieces += reinforcement_charts(results["reinforced"]["history"])
    pieces.append(report.heading("Expert load of the final model"))
    for mode, load in evaluation["expert_load"].items():
        rows = [f"MoE layer {number}" for number in range(1, len(load) + 1)]
        columns = [f"expert {number}" for number in range(len(load[0]))]
        caption = f"Share of the routed tokens, {mode} answers (even: {1 / len(columns):.3g})"
        pieces.append(report.heat_map(load, caption=caption, row_names=rows, column_names=columns))
    pieces += [
        report.heading("One problem, loaded with stock transformers"),
        report.preformatted(show_sample(results["stock"])),
        report.heading("Stages and settings"),
        report.table([{"stage": name, "seconds": f"{result['elapsed_s']:.0f}"} for name, result in results.items()]),
        report.preformatted(json.dumps(asdict(settings), indent=1)),
    ]
    path.write_text(report.page("A.X K1 at nano scale: one model, two modes", pieces), encoding="utf-8")


def reinforcement_charts(history: list[dict]) -> list[str]:
    measures = (
        Measure("Right answers among the sampled ones", "thinking/accuracy", "non_thinking/accuracy", "share"),
        Measure("Format errors among the sampled answers", "thinking/format_error", "non_thinking/format_error", "share"),
    )
    said = (
        "The final model has nothing left to learn by trial, so reinforcement begins at one that MOD made of the base, stopped "
        "when a third of its sampled thinking answers were right. Groups of answers without spread are replaced by others (DAPO)."
    )
    charts = [
        report.line_chart(each.curves(history), caption=each.title, x_label="update", y_label=each.unit) for each in measures
    ]
    return [report.heading("Reinforcement of an early model"), report.paragraph(said), *charts]


# -- the job ------------------------------------------------------------------------------------------------------
def run(out: Path, settings: Settings) -> dict[str, dict]:
    """All stages in order; returns their results by name."""
    keep_settings(out, settings)
    torch.set_num_threads(settings.threads)
    datasets.disable_progress_bars()
    problems = draw_splits(settings)
    results = {"tokenizer": run_stage(out, "tokenizer", partial(make_tokenizer, problems=problems))}
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")

    def stage(name: str, work: Callable, *args, **kwargs) -> None:
        results[name] = run_stage(out, name, lambda folder: work(folder, *args, **kwargs))

    stage("base", pretrain_base, tokenizer, problems.base, settings)
    worked = [make_row(p.messages, p.answer, p.trace) for p in problems.reasoning]
    stage("reasoning", fine_tune, out / "base", tokenizer, worked, settings, steps=settings.reasoning_steps)
    direct = [make_row(p.messages, p.answer) for p in problems.instruct]
    stage("instruct", fine_tune, out / "base", tokenizer, direct, settings, steps=settings.instruct_steps)
    stage("merged", merge, out / "reasoning", out / "instruct", tokenizer, settings)
    stage("fused", fuse, out / "merged", tokenizer, problems, settings)
    stage("evaluation", evaluate, out / "fused", tokenizer, problems.test, settings)
    stage("stock", reload_with_stock, out / "fused", problems.test[0], settings)
    if can_reinforce():
        reinforce_early(stage, out, tokenizer, problems, settings)
    else:
        print(f"[reinforced] left out: it needs TRL 1.16 (Python 3.11), found {trl.__version__}", flush=True)
    return results


def keep_settings(out: Path, settings: Settings) -> None:
    """Stages of different settings must not mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    kept, now = out / "settings.json", json.dumps(asdict(settings), indent=1)
    if kept.exists() and kept.read_text() != now:
        raise ValueError(f"{out} holds a run with other settings ({kept}); choose another --out or delete the folder.")
    kept.write_text(now)


HELP = """\
Teach one nano A.X K1 model to answer at once and to think first, and measure both: the paper's Think-Fusion recipe.

Stages, each a folder in --out:
  tokenizer   byte-level BPE and the chat template
  base        pre-training on problem texts
  reasoning   SFT on worked answers, from base        instruct   SFT on bare answers, from base
  merged      0.8 * reasoning + 0.2 * instruct
  fused       SFT on the Mode-Overlap Dataset: the final model
  evaluation  both modes on held-out problems         stock      the final model reloaded by transformers alone
  early       SFT on the Mode-Overlap Dataset from base, stopped early
  reinforced  both modes of it by reinforcement (DAPO with GSPO's ratio), measured before and after
and report.html, readable offline.

Killed? Run the same command again: finished stages are kept, the one under way starts over, the numbers are the same.
"""


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="where the stages go (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on the training steps and test problems; 0.01 tries the machinery, 3 trains longer (default: 1)",
    )
    parser.add_argument("--threads", type=int, default=Settings.threads, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="decides problems and weights (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    settings = replace(Settings(), threads=options.threads, seed=options.seed).scaled(options.scale)
    results = run(options.out, settings)
    path = options.out / "report.html"
    write_report(path, settings, results)
    print(f"\nOne problem, both modes, by {show_sample(results['stock'])}")
    print(f"\n{problems_asked(settings)}\n{report.text_table(closing_table(results))}")
    print(f"\n{sum(result['elapsed_s'] for result in results.values()):.0f} s in all; {path}")
    return results


if __name__ == "__main__":
    main()
