"""What does multi-token prediction give? Trained with and without it at nano scale, on Python's own sources.

    python -m recipes.nano_mtp --out runs/experiments

Two cells a seed, from the same weights, on the same batches:
  off   the main head's loss alone
  on    with the loss of one prediction layer, at DeepSeek-V3's weights (0.3, then 0.1 for the last third)

Measured on held-out files: the main head's loss (the layer's own never counted), the share of drafted tokens that are right,
tokens a second of greedy generation with and without drafts, and whether both wrote the same. DeepSeek-V3 reports better
benchmarks at two larger scales (section 4.5.1), and 85% to 90% of drafts right for 1.8 times the speed on GPUs (5.4.3). Nothing
is tuned towards that: on a CPU, and with a model this small, a step of two tokens may well cost what it saves. Training with the
layer is slower; its seconds stand beside the loss.
"""

import json
import random
import sysconfig
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from recipes.nano_cells import add_jobs, at_once, mean_and_interval, options_parser, publish
from recipes.nano_think_fusion import keep_settings, run_stage
from trainers import report
from trainers.mtp import MTPCallback
from trainers.tokenizer import train_tokenizer

CELLS = ("off", "on")


@dataclass(frozen=True)
class MTPSettings:
    seed: int = 17
    steps: int = 600
    batch_rows: int = 32
    row_tokens: int = 128
    test_rows: int = 64
    learning_rate: float = 3e-3
    vocab_size: int = 2048
    prompt_tokens: int = 32
    new_tokens: int = 96
    threads: int = 2
    text_bytes: int = 4_000_000

    def scaled(self, scale: float) -> "MTPSettings":
        return replace(
            self,
            steps=max(2, round(self.steps * scale)),
            test_rows=max(4, round(self.test_rows * min(1.0, scale))),
            new_tokens=max(8, round(self.new_tokens * min(1.0, scale))),
            text_bytes=max(300_000, round(self.text_bytes * min(1.0, scale))),
        )


def sources(wanted_bytes: int) -> list[str]:
    """Python's standard library, its files in an order of chance that is the same everywhere, up to so many bytes."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    texts = []
    for path in paths:
        if sum(map(len, texts)) >= wanted_bytes:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def draw_rows(settings: MTPSettings) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training rows [steps * batch_rows, tokens] in their order, held-out rows of other files, and the vocabulary's size."""
    texts = sources(settings.text_bytes)
    held_out = texts[: max(1, len(texts) // 20)]
    tokenizer = train_tokenizer(texts[len(held_out) :], settings.vocab_size)

    def cut(some: list[str]) -> torch.Tensor:
        ids = torch.tensor([token for text in some for token in tokenizer.encode(text, add_special_tokens=False)])
        return ids[: len(ids) // settings.row_tokens * settings.row_tokens].view(-1, settings.row_tokens)

    generator = torch.Generator().manual_seed(settings.seed)
    train, test = cut(texts[len(held_out) :]), cut(held_out)
    # Passes over the text, each in an order of its own.
    passes = -(-settings.steps * settings.batch_rows // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(passes)])
    picked = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: settings.test_rows]
    return train[order[: settings.steps * settings.batch_rows]], test[picked], len(tokenizer)


class InOrder(Trainer):
    """Both cells see the rows in the order in which they were drawn."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def start_models(settings: MTPSettings, vocab_size: int) -> dict[str, AxK1ForCausalLM]:
    """Both cells' models: the same weights, and one layer more."""
    models = {}
    for cell in CELLS:
        torch.manual_seed(settings.seed)
        config = AxK1Config.preset("nano", vocab_size=vocab_size, num_nextn_predict_layers=CELLS.index(cell))
        models[cell] = AxK1ForCausalLM(config)
    left = models["on"].load_state_dict(models["off"].state_dict(), strict=False)
    assert not left.unexpected_keys and all(".layers.3." in name for name in left.missing_keys), left
    return models


def train(folder: Path, cell: str, model: AxK1ForCausalLM, rows: torch.Tensor, settings: MTPSettings) -> dict:
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows.tolist()])
    arguments = TrainingArguments(
        folder / "trainer",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_rows,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.1,
        logging_steps=max(1, settings.steps // 40),
        save_strategy="no",
        use_cpu=True,
        seed=settings.seed,
        report_to="none",
    )
    callbacks = [MTPCallback()] if cell == "on" else []
    trainer = InOrder(model, arguments, train_dataset=data, callbacks=callbacks)
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    model.save_pretrained(folder)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # The main head's: what Trainer logs includes the layer's share.
    curve = [[log["step"], log["loss"] - log.get("mtp_loss_weight", 0) * log.get("mtp_loss", 0)] for log in logs]
    mtp_curve = [[log["step"], log["mtp_loss"]] for log in logs if "mtp_loss" in log]
    return {"seconds": seconds, "curve": curve, "mtp_curve": mtp_curve}


@torch.no_grad()
def held_out_losses(model: AxK1ForCausalLM, rows: torch.Tensor) -> list[float]:
    """The main head's mean cross-entropy of each row."""
    logits = model(rows).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none")
    return losses.mean(dim=1).tolist()


def time_generation(model: AxK1ForCausalLM, prompts: torch.Tensor, new_tokens: int) -> dict:
    """Tokens a second with and without drafts, in turns, the best of three; the share of drafts that were right."""
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    best, output = {False: float("inf"), True: float("inf")}, {}
    for _ in range(3):
        for drafts in (False, True):
            begun = time.perf_counter()
            output[drafts] = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), use_mtp=drafts, **settings
            )
            best[drafts] = min(best[drafts], time.perf_counter() - begun)
    same = (output[True].sequences == output[False].sequences).all(dim=1)
    tokens = len(prompts) * new_tokens
    return {
        "plain_tokens_s": tokens / best[False],
        "drafting_tokens_s": tokens / best[True],
        "accepted": output[True].accepted,
        "drafted": output[True].drafted,
        "rows_alike": same.float().mean().item(),
    }


def work(stage: Path, cell: str, settings: MTPSettings) -> dict:
    rows, test, vocab_size = draw_rows(settings)
    model = start_models(settings, vocab_size)[cell]
    result = train(stage, cell, model, rows, settings)
    model.eval()
    result["losses"] = held_out_losses(model, test)
    if cell == "on":
        prompts = test[:, : settings.prompt_tokens]
        result["one row"] = time_generation(model, prompts[:1], settings.new_tokens)
        result["eight rows"] = time_generation(model, prompts[:8], settings.new_tokens)
    return result


def run_seeds(options, settings: MTPSettings) -> list[dict[str, dict]]:
    """Of each seed {cell: what was measured}."""
    calls = []
    for seed in options.seeds:
        own, folder = replace(settings, seed=seed).scaled(options.scale), options.out / f"mtp-seed-{seed}"
        keep_settings(folder, own)
        calls += [partial(run_stage, folder, f"mtp-{cell}", partial(work, cell=cell, settings=own)) for cell in CELLS]
    results = at_once(calls, options.jobs, options.threads, options.out / "mtp.log")
    return [dict(zip(CELLS, results[at : at + len(CELLS)])) for at in range(0, len(results), len(CELLS))]


# -- the report ---------------------------------------------------------------------------------------------------
def interval(by_seed: list[list[float]], pattern: str = "{:.3f}") -> str:
    mean, low, high = (pattern.format(number) for number in mean_and_interval(by_seed))
    return f"{mean} [{low}, {high}]"


def loss_table(seeds: list[dict[str, dict]]) -> list[dict[str, str]]:
    rows = []
    for cell in CELLS:
        cells = [seed[cell] for seed in seeds]
        seconds = sum(cell["seconds"] for cell in cells) / len(cells)
        rows.append(
            {
                "cell": cell,
                "main head, held out": interval([c["losses"] for c in cells]),
                "training": f"{seconds:.0f} s",
            }
        )
    gaps = [[on - off for on, off in zip(seed["on"]["losses"], seed["off"]["losses"])] for seed in seeds]
    ratio = sum(seed["on"]["seconds"] / seed["off"]["seconds"] for seed in seeds) / len(seeds)
    rows.append({"cell": "on - off", "main head, held out": interval(gaps, "{:+.3f}"), "training": f"{ratio:.2f} x"})
    return rows


def speed_table(seeds: list[dict[str, dict]]) -> list[dict[str, str]]:
    rows = []
    for batch in ("one row", "eight rows"):
        runs = [seed["on"][batch] for seed in seeds]
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        rows.append(
            {
                "generation": batch,
                "drafts accepted": f"{sum(r['accepted'] for r in runs) / sum(r['drafted'] for r in runs):.1%}",
                "tokens/s plain": f"{mean['plain_tokens_s']:.0f}",
                "tokens/s drafting": f"{mean['drafting_tokens_s']:.0f}",
                "ratio": f"{mean['drafting_tokens_s'] / mean['plain_tokens_s']:.2f}",
                "rows written alike": f"{mean['rows_alike']:.0%}",
            }
        )
    return rows


def verdict(seeds: list[dict[str, dict]]) -> str:
    """What the interval of the difference says, and no more."""
    gaps = [[on - off for on, off in zip(seed["on"]["losses"], seed["off"]["losses"])] for seed in seeds]
    mean, low, high = mean_and_interval(gaps)
    if low <= 0 <= high:
        return (
            f"The main head's loss does not differ beyond chance ({mean:+.3f}, 95% interval {low:+.3f} to {high:+.3f})."
        )
    return f"With prediction the main head's loss is {'higher' if mean > 0 else 'lower'} by {abs(mean):.3f} nats."


def main(arguments: list[str] | None = None) -> list[dict[str, dict]]:
    parser = options_parser(__doc__)
    add_jobs(parser)
    options = parser.parse_args(arguments)
    settings = MTPSettings(threads=options.threads)
    seeds = run_seeds(options, settings)
    curves = {f"{cell}, seed {options.seeds[0]}": [tuple(point) for point in seeds[0][cell]["curve"]] for cell in CELLS}
    chart = report.line_chart(curves, caption="Main head's training loss", x_label="step", y_label="nats a token")
    tables = {"The main head's loss": loss_table(seeds), "Generation, greedy": speed_table(seeds)}
    pieces = [report.paragraph(verdict(seeds)), report.preformatted(json.dumps(asdict(settings))), chart]
    publish(options, "mtp", "Multi-token prediction, on and off", pieces, tables)
    print(verdict(seeds))
    return seeds


if __name__ == "__main__":
    main()
