"""What can be done from the command line?  `axk1 --help`: one subcommand a capability, imported when it is called."""

import argparse
import os
import sys

from axk1 import data, planning, publishing, talking, training, weights

DESCRIPTION = (
    "A.X K1 for Transformers: talk to it, serve it, train, merge and judge its two modes, convert its weights."
)
EXAMPLES = """examples:
  axk1 chat runs/nano/fused --think
  axk1 serve runs/nano/fused --port 8000
  axk1 merge THINKING NONTHINKING MERGED --alpha 0.8
  axk1 pretrain recipes/k1_stages.yaml --data CURATED.jsonl --tokenizer DIR --scale 1e-9
  axk1 sft --config recipes/configs/sft_cpu.yaml
  axk1 rl --config recipes/configs/rl_cpu.yaml
  axk1 eval runs/nano/fused --tasks gsm8k_test.jsonl --modes think,no-think
  axk1 convert to-hf CHECKPOINT MODEL
  axk1 doctor MODEL
  axk1 push MODEL ORG/NAME --dry-run --license apache-2.0 --language en ko
  axk1 plan --flops 2.548e24
  axk1 plan serve k1 --gpu h200
  axk1 tokenizer train OUT --source ko=reviews.jsonl:0.6 --source code=src:0.4
  axk1 curate run recipes/configs/curate.yaml
  axk1 info k1

`axk1 COMMAND --help` says more. AXK1_DEBUG=1 (or --debug) shows the traceback of an error."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where `doctor` finds errors, 2 for an error that the user can mend, 130
    when interrupted."""
    parser = build_parser()
    known, settings = parser.parse_known_args(argv)
    options = vars(known)
    # A training command's settings are declared in trainers, which is imported only when one is called.
    if "settings" in options:
        options["settings"] = settings
    elif settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    run, debug = options.pop("run"), options.pop("debug") or bool(os.environ.get("AXK1_DEBUG"))
    try:
        # A command that judges says so by its status; the others return nothing.
        return run(**options) or 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        close_bars()
        # Names from a file may hold anything, also what steers a terminal.
        said = "".join(character if character.isprintable() else " " for character in str(error))
        print("axk1: " + " ".join(said.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        close_bars()
        print("axk1: interrupted", file=sys.stderr)
        return 130


def close_bars() -> None:
    """End the progress bars that an error left open: each would be drawn once more behind the error's message."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.close()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "axk1",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for family in (talking, weights, training, publishing, planning, data):
        family.add(commands)
    return parser
