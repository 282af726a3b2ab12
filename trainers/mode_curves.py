"""What did a training do to each mode? The curves of its log as a table, as a page of charts, and in the card of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trainers import report

# What a card says of a checkpoint's parent goes on to its child, where the parent is no model of the Hub itself.
INHERITED = ("base_model", "license", "language")


class Measure(NamedTuple):
    """One thing that is measured of both modes while a model learns, and the log's keys for it."""

    title: str
    thinking: str
    non_thinking: str
    unit: str  # share (0 to 1), tokens, nats a token

    def curves(self, history: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of each mode that the log has it for."""
        found = {
            mode: [(log["step"], log[key]) for log in history if key in log]
            for mode, key in (("thinking", self.thinking), ("non-thinking", self.non_thinking))
        }
        return {mode: points for mode, points in found.items() if points}

    def shown(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "share" else f"{value:.4g}"


def first_and_last(history: Sequence[dict], measures: Sequence[Measure]) -> list[dict[str, str]]:
    """Where each mode began and where it ended, one row a measure and mode; no row for what was not logged."""
    rows = []
    for measure in measures:
        for mode, points in measure.curves(history).items():
            first, last = (f"{measure.shown(value)} (step {step})" for step, value in (points[0], points[-1]))
            rows.append({"what": measure.title, "mode": mode, "first": first, "last": last})
    return rows


def write_report(path: Path, title: str, history: Sequence[dict], measures: Sequence[Measure]) -> None:
    """One chart a measure, a curve a mode, over the steps of a run."""
    pieces = [
        report.line_chart(curves, caption=measure.title, x_label="step", y_label=measure.unit)
        for measure in measures
        if (curves := measure.curves(history))
    ]
    path.write_text(report.page(title, pieces), encoding="utf-8")


# -- the card -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lineage:
    """Where a trained model comes from, as told by whoever trained it."""

    base: str  # a folder or a Hub name; "" if the model was built in memory
    dataset: str | None  # a file, a folder, a Hub name or reasoning-gym's families
    method: str
    is_adapter: bool
    tags: Sequence[str] = ()


def write_card(
    trainer, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
) -> None:
    """README.md in the trainer's `output_dir`, with the modes' curves, from its first process; its `create_model_card`."""
    if not trainer.is_world_process_zero():
        return
    args, given = trainer.args, [tags] if isinstance(tags, str) else tags or []
    lineage = Lineage(
        base=trainer.model.config._name_or_path,
        dataset=dataset_name,
        method=trainer._name,
        is_adapter=is_peft_model(trainer.model),
        tags=sorted({*given, *trainer._tag_names}),
    )
    name = model_name or Path(args.hub_model_id or args.output_dir).name
    facts = {"updates": f"{trainer.state.global_step:,}", "epochs": f"{trainer.state.epoch or 0:.3g}"}
    facts |= {"learning rate": f"{args.learning_rate:g}", "seed": str(args.seed)}
    model_card(name, lineage, facts, trainer.state.log_history, trainer.measures).save(
        Path(args.output_dir) / "README.md"
    )


def model_card(
    name: str, lineage: Lineage, facts: dict[str, str], history: Sequence[dict], measures: Sequence[Measure]
) -> ModelCard:
    """The card of a model that was trained in both modes. Paths are shown by their last name, and never as names of the Hub."""
    data = ModelCardData(
        **_descent(lineage),
        **({"datasets": lineage.dataset} if _on_hub(lineage.dataset) else {}),
        library_name="peft" if lineage.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(lineage.tags),
    )
    relation = "adapter" if lineage.is_adapter else "finetune"
    table = {"base model": _called(lineage.base), "relation": relation, "dataset": _called(lineage.dataset)}
    pieces = [
        f"# {name}",
        f"{'An adapter for' if lineage.is_adapter else 'Fine-tuned from'} {_called(lineage.base)} by {lineage.method}. "
        "It thinks first or answers at once, as asked: `enable_thinking` in the chat template ends the prompt in `<think>` or "
        "`</think>`.",
        "## Training",
        _markdown([{"": what, " ": said} for what, said in ({**table, "method": lineage.method} | facts).items()]),
        "## Both modes while it learned",
    ]
    if rows := first_and_last(history, measures):
        pieces += [_markdown(rows), "From the training's own log; `axk1 eval` measures a model on held-out problems."]
    else:
        pieces.append("Nothing was logged.")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(pieces) + "\n")


def _descent(lineage: Lineage) -> dict:
    """Metadata of the base. The Hub refuses a card whose base_model is no model there: of a folder its own card's is taken."""
    if _on_hub(lineage.base):
        said = {"base_model": lineage.base}
    else:
        card = Path(lineage.base) / "README.md"
        old = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if lineage.base and card.is_file() else {}
        said = {key: old[key] for key in INHERITED if old.get(key)}
    if "base_model" in said:
        said["base_model_relation"] = "adapter" if lineage.is_adapter else "finetune"
    return said


def _on_hub(name: str | None) -> bool:
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _called(name: str | None) -> str:
    if not name:
        return "not named"
    return f"`{Path(name).resolve().name if Path(name).exists() else name}`"


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    grid = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in grid)
