"""What does `axk1 sft` do, in one screen? Think-Fusion SFT on paired problems, to read and to change.

    python -m recipes.think_fusion_sft --model runs/nano/merged --out runs/sft_twin

Any causal LM will do whose tokenizer has the two control tokens and the chat template of trainers/tokenizer.py.
"""

import argparse
from pathlib import Path

from recipes.nano_problems import draw_problems
from trainers.mode_overlap import build_mode_overlap, make_row, save_mode_overlap, to_dataset, validate_mode_overlap
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer


def main(arguments: list[str] | None = None) -> ThinkFusionTrainer:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--out", type=Path, required=True, help="where the model and its data go")
    parser.add_argument("--problems", type=int, default=8000, help="each in both modes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="default: %(default)s")
    options = parser.parse_args(arguments)

    # Each problem twice: worked and answered, answered at once. The problems of the probe are others.
    *problems, held_out = draw_problems(options.problems + 1, seed=1)
    rows = build_mode_overlap(make_row(p.messages, p.answer, p.trace) for p in problems)
    validate_mode_overlap(rows, held_out=[held_out.messages]).require_sound()
    options.out.mkdir(parents=True, exist_ok=True)
    save_mode_overlap(rows, options.out / "mod.jsonl")

    settings = ThinkFusionConfig(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        pairing="paired",
        logging_steps=20,
        probe_steps=100,
        probe_max_new_tokens=64,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = ThinkFusionTrainer(
        options.model, settings, train_dataset=to_dataset(rows), probe_prompts=[held_out.messages]
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
