"""How does one base get an adapter a mode? Two LoRA adapters, routed experts included, each trained on its mode's rows.

    python -m recipes.adapter_per_mode --model runs/nano/merged --out runs/adapters

OUT/thinking and OUT/non-thinking are adapters as PEFT saves them. Switch with `model.set_adapter(name)`; together they weigh a
small part of a second model. (One model for both modes is what Think-Fusion is for: recipes/think_fusion_sft.py.)
"""

import argparse
from pathlib import Path

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.nano_problems import draw_problems
from trainers.adapters import lora_config
from trainers.mode_overlap import make_row, to_dataset
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer


def main(arguments: list[str] | None = None) -> PeftModel:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--out", type=Path, required=True, help="where the two adapters go")
    parser.add_argument("--problems", type=int, default=8000, help="of each mode (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of each mode (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="default: %(default)s")
    options = parser.parse_args(arguments)

    problems = draw_problems(options.problems, seed=1)
    rows = {
        "thinking": [make_row(p.messages, p.answer, p.trace) for p in problems],
        "non-thinking": [make_row(p.messages, p.answer) for p in problems],
    }
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    parts = ("attention", "shared", "routed")
    model = get_peft_model(base, lora_config(base, parts, r=options.rank), adapter_name="thinking")
    model.add_adapter("non-thinking", lora_config(base, parts, r=options.rank))

    settings = {
        "max_steps": options.steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-3,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    for mode, of_mode in rows.items():
        # The other adapter rests: it neither computes nor trains.
        model.set_adapter(mode)
        config = ThinkFusionConfig(str(options.out / mode), **settings)
        ThinkFusionTrainer(model, config, processing_class=tokenizer, train_dataset=to_dataset(of_mode)).train()
    model.save_pretrained(options.out)
    return model


if __name__ == "__main__":
    main()
