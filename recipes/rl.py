"""How is a model of both modes trained by reinforcement, on one page? `axk1 rl` without its settings, on GSM8K's rows.

python -m recipes.rl MODEL gsm8k_train.jsonl OUT
"""

import argparse

from datasets import load_dataset

from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer
from trainers.rewards import gold_answer


def is_right(answer: str, row: dict) -> bool:
    """R_correct's judge. It sees the answer only, never the thought; here the answer's last word has to be the number."""
    words = answer.replace(",", "").rstrip(". \n").split()
    return bool(words) and words[-1] == gold_answer(row).replace(",", "")


def train(model: str, problems: str, out: str, **settings) -> DapoGspoTrainer:
    rows = load_dataset("json", data_files=problems, split="train")
    prompts = rows.map(
        lambda row: {"prompt": [{"role": "user", "content": row["question"]}]}, remove_columns="question"
    )
    # The trainer asks every prompt in both modes, adds R_format, and replaces groups that are all right or all wrong.
    trainer = DapoGspoTrainer(model, is_right, DapoGspoConfig(out, **settings), prompts)
    trainer.train()
    trainer.save_model(out)
    return trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name; its tokenizer knows <think> and </think>")
    parser.add_argument("problems", metavar="PROBLEMS", help="JSON lines with question and answer")
    parser.add_argument("out", metavar="OUT", help="where the trained model goes")
    options = parser.parse_args(arguments)
    train(options.model, options.problems, options.out, max_completion_length=1024, report_to="none")


if __name__ == "__main__":
    main()
