"""What stands in for what the commands of the documentation name?  Tiny files and models, under the very names that pages use.

A page writes MODEL, gsm8k.jsonl or runs/nano/fused for what the reader has; in this folder they are there, openai/gsm8k too, so
that a command runs as it is written, on one CPU and without a network.
"""

import gzip
import json
import shutil
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from conversion import convert_to_megatron
from modeling_axk1 import AxK1ForCausalLM, set_thinking_tokens
from tests.documents import ROOT
from tests.random_models import tiny_chat_config
from tests.web_archives import warc_record
from trainers.adapters import lora_config
from trainers.mode_overlap import build_mode_overlap, make_row, save_mode_overlap
from trainers.tasks import open_family
from trainers.tokenizer import train_tokenizer

TEXT = "user assistant one two three four after comes 0 1 2 3 4 5 6 7 8 9 "
MODELS = ("THINKING", "NONTHINKING", "FOLDER", "NAME", "DIR")
TRAINED = ("runs/nano/fused", "runs/nano/merged", "runs/light", "runs/fused", "runs/rl_nano/seed-17/start")
DENSE = ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
# The domains of recipes/k1_stages.yaml.
DOMAINS = ("web", "code", "encyclopedia", "qa", "books", "academic", "maths", "stem", "reasoning")
FAMILY = "color_cube_rotation"
RESULTS = {
    "settings": {"model": "MODEL", "max_new_tokens": 8},
    "results": [
        {"task": "gsm8k", "mode": "thinking", "metric": "exact", "accuracy": 1.0, "format_error": 0.0, "problems": 2}
    ],
}
STAGES = """
stages:
  - {name: all, tokens: 256, phase: stable, context: 32, batch_tokens: 128, mixture: {web: 0.5, code: 0.5}}
"""
# By what lm-evaluation-harness's tasks divide MMLU-Pro (categories) and CLIcK (beginnings of ids).
SUBJECTS = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law", "math",
    "other", "philosophy", "physics", "psychology",
)  # fmt: skip
TOPICS = ("economy", "geography", "history", "law", "politics", "popular", "society", "tradition")


def make_stand_ins(folder: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 310)
    torch.manual_seed(0)
    model = AxK1ForCausalLM(tiny_chat_config(len(tokenizer)))
    set_thinking_tokens(model.generation_config, tokenizer)
    write_model(model, tokenizer, folder / "MODEL")
    for name in (*MODELS, *TRAINED):
        shutil.copytree(folder / "MODEL", folder / name)
    get_peft_model(model, lora_config(model)).save_pretrained(folder / "ADAPTER")
    convert_to_megatron(folder / "MODEL", folder / "CHECKPOINT")
    model.config.save_pretrained(folder / "PLANNED")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes))
    for name in DENSE:
        write_model(dense, tokenizer, folder / name)
    write_rows(folder)
    write_sources(folder)
    write_harness_tasks(folder)
    (folder / "recipes").symlink_to(ROOT / "recipes")


def write_model(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    sums = [{"question": f"{n} + 1", "answer": f"one after {n}\n#### {n + 1}"} for n in range(16)]
    for name, rows in {"gsm8k": sums, "gsm8k_train": sums, "gsm8k_test": sums[:2]}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "runs/eval").mkdir()
    (folder / "runs/eval/results.json").write_text(json.dumps(RESULTS))
    (folder / "stages.yaml").write_text(STAGES)
    (folder / "sft.yaml").write_text("max_steps: 1\n")
    write_data_set(folder / "openai/gsm8k", train=sums[:12], test=sums[12:])
    worked = (make_row([{"role": "user", "content": f"{n} + 1"}], str(n + 1), f"after {n} comes") for n in range(8))
    save_mode_overlap(build_mode_overlap(worked), folder / "runs/nano/fused/mod.jsonl")
    documents = [
        {"text": f"{TEXT * 9}{n}", "domain": domain, "difficulty": n / 40} for domain in DOMAINS for n in range(40)
    ]
    write_jsonl(folder / "CURATED.jsonl", documents)
    for name in ("documents", "reviews"):
        write_jsonl(folder / f"{name}.jsonl", documents[:2])
    problems = [{"prompt": each["question"], "entry": json.dumps(each)} for each in open_family(FAMILY, size=8, seed=0)]
    write_jsonl(folder / "runs/rl_nano/seed-17/problems.jsonl", problems)
    for name, text in {
        "topics.txt": "rivers",
        "corpus.txt": TEXT * 30,
        "books/one.txt": TEXT,
        "src/a/one.py": TEXT * 30,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


def write_sources(folder: Path) -> None:
    """What recipes/configs/curate.yaml reads. The licence is English that the filters keep; a crawl of one page is there too."""
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [{"text": text} for text in licence.split("\n\n")]
    write_jsonl(folder / "data/reviews.jsonl", paragraphs[9:14])
    write_jsonl(folder / "data/maths.jsonl", paragraphs[14:24])
    write_jsonl(folder / "data/gsm8k_test.jsonl", [{"question": "How many are one apple and one more?", "answer": "2"}])
    page = warc_record("response", "text/html; charset=utf-8", f"<p>{licence}".encode(), http=True)
    (folder / "crawl").mkdir()
    (folder / "crawl/one.warc.gz").write_bytes(gzip.compress(page))


def write_harness_tasks(folder: Path) -> None:
    """A problem for each task of lm-evaluation-harness in `--tasks paper`; of NLTK's folder it matters only that it is there."""
    ask, four = {"question": "What is 1 + 1?"}, dict(zip("ABCD", "1234"))
    kmmlu = [{**ask, **four, "answer": 2}]
    write_data_set(folder / "HAERAE-HUB/KMMLU", test=kmmlu, dev=kmmlu)
    # The one of an exam has five choices, and is of both the texts and the functions.
    ids = ["CSAT_korean_22_40", "TK_4", *(f"KIIP_{topic}_1" for topic in TOPICS)]
    click = {"paragraph": "", **ask, "choices": list("12345"), "answer": "2"}
    write_data_set(folder / "EunsuKim/CLIcK", train=[{"id": name, **click} for name in ids])
    worked = {"cot_content": "A: Let's think step by step. After 1 comes 2. The answer is (B).", "answer": "B"}
    mmlu = [{**ask, "options": list("123"), **worked, "category": subject} for subject in SUBJECTS]
    # Five examples stand before a problem.
    write_data_set(folder / "TIGER-Lab/MMLU-Pro", test=mmlu, validation=mmlu * 5)
    wrong = {f"Incorrect Answer {n}": str(n + 2) for n in (1, 2, 3)}
    write_data_set(folder / "Idavidrein/gpqa", train=[{"Question": "What is 1 + 1?", "Correct Answer": "2", **wrong}])
    asked = {"prompt": "Name two numbers without a comma.", "instruction_id_list": ["punctuation:no_comma"]}
    write_data_set(folder / "google/IFEval", train=[{"key": 1, **asked, "kwargs": [{"num_words": None}]}])
    write_data_set(folder / "math-ai/aime25", test=[{"id": "0", "problem": "What is 1 + 1?", "answer": "2"}])
    write_data_set(folder / "HAERAE-HUB/HRM8K", test=[{**ask, "answer": 2.0}])
    (folder / "nltk_data/tokenizers/punkt_tab").mkdir(parents=True)


def write_data_set(folder: Path, **splits: list[dict]) -> None:
    """As the Hub has them: rows by split, and a card that says so, of one subset, `main`."""
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([{'config_name': 'main', 'data_files': files}])}\n---\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
