"""What does a model lose in 4 bits? The demo's model as it was trained, in NF4 and in 8 bits: both modes, each layer's error.

    python -m recipes.nano_four_bit --model runs/nano/fused

Nothing is calibrated. The problems are the demo's held-out ones, drawn anew from the settings that the run's folder keeps.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import modeling_axk1  # noqa: F401  (registers A.X K1's classes)
from modeling_axk1.quantization_axk1 import quantization_errors, quantized_share
from recipes.nano_problems import Problem
from recipes.nano_think_fusion import Settings, answer_problems, draw_splits
from trainers import report

WAYS = {
    "as trained": None,
    "NF4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8 bits": {"load_in_8bit": True},
}


def load(folder: Path, way: str):
    options = WAYS[way]
    return AutoModelForCausalLM.from_pretrained(
        folder, **({} if options is None else {"quantization_config": BitsAndBytesConfig(**options)})
    )


def measure(model, tokenizer, problems: list[Problem], max_new_tokens: int, title: str) -> list[dict]:
    """Both modes, greedy, nothing enforced; a row for each."""
    rows = []
    for thinking in (True, False):
        with tqdm(
            total=len(problems), desc=f"{title}, {'' if thinking else 'non-'}thinking", dynamic_ncols=True
        ) as bar:
            how = {"thinking": thinking, "max_new_tokens": max_new_tokens, "on_batch": bar.update}
            result, _, _ = answer_problems(model, tokenizer, problems, **how)
        rows.append(result.as_row())
    return rows


def accuracy_table(measured: dict[str, list[dict]], shares: dict[str, float]) -> list[dict[str, str]]:
    """A row for each way and mode, the last column the points of accuracy lost against the first way."""
    first = {row["mode"]: row["accuracy"] for row in next(iter(measured.values()))}
    return [
        {
            "weights": way,
            "quantised": f"{shares[way]:.1%}",
            "mode": row["mode"],
            "accuracy": f"{row['accuracy']:.1%}",
            "format error": f"{row['format_error']:.1%}",
            "points lost": f"{100 * (first[row['mode']] - row['accuracy']):+.1f}",
        }
        for way, rows in measured.items()
        for row in rows
    ]


def error_table(errors: dict[str, list[dict]]) -> list[dict[str, str]]:
    """Relative error of the weights, a row for each way and layer."""
    parts = ("attention", "mlp", "routed experts")
    return [
        {"weights": way, "layer": str(row["layer"])}
        | {part: f"{row[part]:.4f}" if part in row else "-" for part in parts}
        for way, rows in errors.items()
        for row in rows
    ]


def run(folder: Path, ways: list[str], problems: int | None, threads: int) -> dict:
    settings_file = folder.parent / "settings.json"
    if not settings_file.exists():
        raise ValueError(f"{settings_file} is not there; give the fused folder of a finished `make demo`.")
    settings = Settings(**json.loads(settings_file.read_text()))
    torch.set_num_threads(threads)
    test = draw_splits(settings).test[:problems]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured, errors, shares = {}, {}, {}
    for way in ways:
        model = load(folder, way)
        measured[way] = measure(model, tokenizer, test, settings.max_new_tokens, way)
        shares[way] = quantized_share(model)
        if WAYS[way] is not None:
            errors[way] = quantization_errors(model, folder)
    return {"measured": measured, "errors": errors, "shares": shares, "problems": len(test)}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", type=Path, default=Path("runs/nano/fused"), help="a demo's model (default: %(default)s)"
    )
    parser.add_argument("--problems", type=int, help="of the held-out ones (default: all)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    results = run(options.model, options.ways, options.problems, options.threads)
    print(f"\n{results['problems']} held-out problems, greedy, nothing enforced")
    print(report.text_table(accuracy_table(results["measured"], results["shares"])))
    print("\nRelative error of the quantised weights, |W' - W| / |W|, without calibration")
    print(report.text_table(error_table(results["errors"])))
    return results


if __name__ == "__main__":
    main()
