"""How are tokenizer and corpus made from the command line?  `axk1 tokenizer` and `axk1 curate`."""

import argparse
from pathlib import Path

from axk1.parsing import add_command

TOKENIZER = """examples:
  axk1 tokenizer train OUT --source ko=reviews.jsonl:0.4 --source en=books/:0.4 --source 'code=src/**/*.py:0.2'
  axk1 tokenizer train OUT --source en=web.parquet:1 --vocab-size 32768 --sample-gb 1
  axk1 tokenizer compare OUT OTHER --texts ko=reviews.jsonl en=heldout.txt

A byte-level BPE that gives back any text exactly: digits one by one, runs of blanks kept, the chat template of both modes.
A source is a file, folder or pattern of .jsonl, .parquet, .warc (also compressed) or plain text, its share that of the sample.
Memory grows with the different pieces of text, up to some 2 GB, not with the files. What cannot be read is counted in
OUT/report.json."""
CURATE = """examples:
  axk1 curate train-classifier runs/domain --data labelled.jsonl --label-key domain
  axk1 curate train-classifier runs/difficulty --data labelled.jsonl --label-key level --order easy,medium,hard
  axk1 curate train-classifier runs/quality --data labelled.jsonl --label-key quality --order bad,good --base MODEL
  axk1 curate eval-classifier runs/domain --data other.jsonl --label-key domain
  axk1 curate synthesize made.jsonl --topics topics.txt --server http://localhost:8000/v1 --model NAME --language Korean
  axk1 curate synthesize made.jsonl --seeds documents.jsonl --model FOLDER
  axk1 curate run recipes/configs/curate.yaml

A recipe reads JSONL, Parquet, text and WARC, filters, classifies, removes duplicates and evaluation sets, and draws a mixture, on
this machine or on Slurm; documents/*.jsonl then go from simple to hard, report.html says what was dropped and why. Needs
axk1[curation]. Killed? Run the same command again."""


def add(commands) -> None:
    _add_tokenizer(commands)
    _add_curate(commands)


def _add_tokenizer(commands) -> None:
    summary = "train a tokenizer, or compare how well several compress"
    actions = add_command(commands, "tokenizer", None, summary, TOKENIZER).add_subparsers(
        metavar="ACTION", required=True
    )

    command = add_command(actions, "train", tokenizer_train, "learn a byte-level BPE", TOKENIZER)
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    command.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATH:SHARE", help="repeat; shares sum to 1"
    )
    # A.X K1's: 5 x 2^15.  [tech report]
    command.add_argument("--vocab-size", type=int, default=163_840, metavar="N", help="default 163840; 128 divides it")
    command.add_argument("--reserved", type=int, default=64, metavar="N", help="spare special tokens (default 64)")
    command.add_argument("--sample-gb", type=float, default=5.0, metavar="GB", help="learn from so much (default 5)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of JSONL and Parquet (default text)")

    command = add_command(actions, "compare", tokenizer_compare, "count tokens and bytes per token", TOKENIZER)
    command.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="folder of any tokenizer")
    command.add_argument("--texts", nargs="+", required=True, metavar="NAME=PATH", help="by language")
    command.add_argument("--limit", type=int, default=1000, metavar="N", help="documents each (default 1000)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of JSONL and Parquet (default text)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_curate(commands) -> None:
    summary = "turn raw files into a training mixture"
    actions = add_command(commands, "curate", None, summary, CURATE).add_subparsers(metavar="ACTION", required=True)

    command = add_command(actions, "run", curate_run, "run a recipe, or go on with it", CURATE)
    command.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="see recipes/configs/curate.yaml")

    command = add_command(
        actions, "train-classifier", curate_train, "train, calibrate and judge a text classifier", CURATE
    )
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    _add_labelled(command)
    command.add_argument("--order", metavar="A,B,C", help="labels from lowest to highest (default: sorted)")
    command.add_argument("--base", metavar="MODEL", help="fine-tune this Transformers model (default: a linear one)")
    command.add_argument("--epochs", type=float, metavar="N", help="with --base (default 3)")
    command.add_argument("--learning-rate", type=float, metavar="X", help="with --base (default 2e-5)")

    command = add_command(actions, "eval-classifier", curate_eval, "judge a text classifier", CURATE)
    command.add_argument("classifier", metavar="CLASSIFIER", type=Path, help="folder of one")
    _add_labelled(command)

    command = add_command(actions, "synthesize", curate_synthesize, "write documents from seeds or topics", CURATE)
    command.add_argument("out", metavar="OUT.jsonl", type=Path, help="appended to; what is there is not asked again")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--seeds", metavar="PATH", help="documents to say anew")
    origin.add_argument("--topics", type=Path, metavar="FILE", help="a topic a line")
    command.add_argument("--server", metavar="URL", help="OpenAI-compatible (default: load MODEL here)")
    command.add_argument("--model", required=True, metavar="MODEL", help="the server's name for it, or a folder")
    command.add_argument("--language", default="English", help="of the documents (default English)")
    command.add_argument(
        "--forms", type=int, default=1, metavar="N", help="documents for each seed or topic (default 1)"
    )
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of the seeds' text (default text)")
    command.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="a document's limit (default 2048)")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default 0.8; 0 is greedy")
    command.add_argument("--workers", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    command.add_argument("--seed", type=int, default=0, help="of forms and sampling (default 0)")


def _add_labelled(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="JSONL or Parquet with texts and labels"
    )
    command.add_argument("--label-key", default="label", metavar="KEY", help="column of the label (default label)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of the text (default text)")


def tokenizer_train(**options) -> None:
    from trainers.tokenizer_training import run_train

    run_train(**options)


def tokenizer_compare(json: bool, **options) -> None:
    from json import dumps

    from trainers import report
    from trainers.tokenizer_training import compare, shown

    rows = compare(**options)
    print(dumps(rows, indent=2, ensure_ascii=False) if json else report.text_table([shown(row) for row in rows]))


def curate_run(recipe: Path) -> None:
    from trainers.curation import run_curation

    run_curation(recipe)


def curate_train(epochs: float | None, learning_rate: float | None, **options) -> None:
    from trainers.text_classifier import run_train

    given = {"epochs": epochs, "learning_rate": learning_rate}
    settings = {name: value for name, value in given.items() if value is not None}
    if settings and not options["base"]:
        raise ValueError(f"{', '.join(settings)} belong to a Transformers model; name it by --base.")
    run_train(**options, settings=settings)


def curate_eval(**options) -> None:
    from trainers.text_classifier import run_eval

    run_eval(**options)


def curate_synthesize(**options) -> None:
    from trainers.synthesis import run_synthesize

    run_synthesize(**options)
