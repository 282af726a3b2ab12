"""How is a checkpoint examined and sent from the command line?  `axk1 doctor` and `axk1 push`."""

from pathlib import Path

from axk1.parsing import add_command

DOCTOR = """examples:
  axk1 doctor MODEL             every fault, whom it breaks, and the remedy; status 1 if there are errors
  axk1 doctor MODEL --json

Reads config, tokenizer, generation config and the headers of the safetensors files: seconds for 519B parameters. Holds each
tensor's name, shape and dtype against the config. Loads no weight and runs no file of the checkpoint."""
PUSH = """examples:
  axk1 push MODEL ORG/NAME --dry-run --license apache-2.0 --language en ko
  axk1 push MODEL ORG/NAME --base-model skt/A.X-K1 --results runs/eval/results.json --recipe sft.yaml --private

Sends weights, config, generation config, tokenizer with its templates, and a card; pickles and other files stay. The doctor
has to find no error. What the folder's README.md says is kept. Interrupted: run it again, what is there is not sent again."""


def add(commands) -> None:
    _add_doctor(commands)
    _add_push(commands)


def _add_doctor(commands) -> None:
    summary = "say what is wrong with a checkpoint for transformers, vLLM and SGLang"
    command = add_command(commands, "doctor", doctor, summary, DOCTOR)
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of an A.X K1 model")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_push(commands) -> None:
    command = add_command(
        commands, "push", push, "send a model to the Hub, with a card from config, recipe and results", PUSH
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of an A.X K1 model; never changed")
    command.add_argument("repo", metavar="REPO", help="ORG/NAME; made if it is not there")
    command.add_argument("--dry-run", action="store_true", help="show files, bytes and card; send nothing")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    command.add_argument("--remote-code", action="store_true", help="add the model's code, for trust_remote_code=True")
    command.add_argument("--license", metavar="ID", help="as the Hub spells it (default: the README.md's)")
    command.add_argument("--language", nargs="+", metavar="CODE", help="en ko ... (default: the README.md's)")
    command.add_argument("--base-model", nargs="+", metavar="REPO", help="what it was made from, if from anything")
    command.add_argument("--relation", help="finetune, quantized, adapter or merge (default: by the files)")
    command.add_argument("--results", type=Path, metavar="FILE", help="results.json of axk1 eval")
    command.add_argument("--recipe", type=Path, metavar="FILE", help="YAML file that it was trained with")


def doctor(model: Path, json: bool) -> int:
    from conversion.doctor import diagnose, text_of

    diagnosis = diagnose(model)
    print(diagnosis.json() if json else text_of(diagnosis))
    return 1 if diagnosis.errors() else 0


def push(model: Path, repo: str, dry_run: bool, private: bool, remote_code: bool, **card) -> None:
    from conversion.hub import CardSettings, plan_push, push_to_hub, text_of_push

    settings = CardSettings(**card)
    if dry_run:
        print(text_of_push(plan_push(model, repo, settings, remote_code=remote_code)))
    else:
        print(push_to_hub(model, repo, settings, remote_code=remote_code, private=private))
