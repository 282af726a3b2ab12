"""How do raw files become a training mixture? One recipe, run by datatrove on this machine or on Slurm, resumable.

    axk1 curate run RECIPE.yaml

    out: runs/curated
    sources:
      - {name: web, path: crawl/*.warc.gz}
      - {name: code, path: "src/**/*.py", domain: code, language: code}
    heuristics: {quality: {min_doc_words: 20}, repetition: {}}      # Gopher's rules; a source may have its own
    language: {keep: [en, ko], minimum: 0.5}
    quality: {model: runs/quality, minimum: 0.5}                    # trained by `axk1 curate train-classifier`
    domain: {model: runs/domain}
    difficulty: {model: runs/difficulty}
    decontaminate: {evaluations: [gsm8k_test.jsonl]}
    deduplicate: {exact: true, near: true}
    mixture: {web: 0.6, code: 0.4}                                  # sums to 1; shares of characters
    tasks: 8
    workers: 4
    slurm: {partition: cpu, time: "10:00:00"}                       # absent: this machine

Writes `documents/*.jsonl` (columns `id`, `text`, `domain`, `difficulty`, `quality`, `language`, `source`, `file`, `position`,
`columns`, `copy`, `order`, `verdicts`; files in order of their names go from simple to hard), `dropped/STEP/*.jsonl` with the
reason, and `report.html`, `report.json`. Killed? Run the same command again: finished tasks are kept.
"""

import collections
import contextlib
import fcntl
import functools
import inspect
import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

try:
    from datatrove.data import Document, DocumentsPipeline
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import (
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
except ImportError as missing:
    raise ImportError("axk1 curate run needs datatrove; pip install 'axk1[curation]'.") from missing

from trainers import report, tables
from trainers.corpus import MAX_DOCUMENT_BYTES, files_of, unread
from trainers.curation_steps import (
    GOPHER,
    SHORTEST_QUESTION_WORDS,
    Classified,
    Decontaminated,
    DocumentWriter,
    DroppedWriter,
    Heuristics,
    Kept,
    Language,
    Mixture,
    Reader,
    Tally,
    Words,
    evaluation_texts,
    read_tally,
)
from trainers.text_classifier import labels_of

# Shingles of 5 words, as in FineWeb. Its 14 buckets of 8 hashes find 92% of pairs that share 80% of their shingles and 56% of
# those that share 70%, which one word changed in a review of 45 syllables leaves; 40 buckets of 7 find 99.99% and 97%, and one
# in 15 of those that share 40%.
NEAR = {"words": 5, "buckets": 40, "hashes": 7}
# xxhash, the default, takes no str since its release 4.
HASH = HashConfig(precision=64, hash_fc="sha1")
# Repeating text up to four times is about as good as new text (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_REPEATS = 4.0
SAMPLES = 3
# The ids of the jobs that were queued on Slurm, a line each.
QUEUE = ".jobs"

# -- what a recipe may hold ---------------------------------------------------------------------------------------
OPTIONAL_TABLE = tables.either(tables.TABLE, tables.NOTHING)
SHARE = tables.number(0, 1)
RECIPE_KINDS = {
    "out": tables.TEXT,
    "sources": tables.list_of(tables.TABLE, "- {name: web, path: crawl/*.jsonl}"),
    "heuristics": tables.TABLE,
    **dict.fromkeys(("language", "quality", "domain", "difficulty", "decontaminate"), OPTIONAL_TABLE),
    "deduplicate": tables.TABLE,
    "mixture": tables.either(tables.NOTHING, tables.table_of(tables.number(), "{web: 0.7, code: 0.3}")),
    "max_repeats": tables.number(),
    "max_document_bytes": tables.whole(1),
    "seed": tables.whole(0),
    "tasks": tables.whole(1),
    "workers": tables.whole(1),
    "slurm": OPTIONAL_TABLE,
}
SOURCE_KINDS = {
    **dict.fromkeys(("name", "path", "text_key", "domain", "language"), tables.TEXT),
    "heuristics": tables.TABLE,
}
SECTION_KINDS = {
    "language": {"keep": tables.list_of(tables.TEXT, "[en, ko]"), "minimum": SHARE},
    "quality": {"model": tables.TEXT, "minimum": SHARE},
    "domain": {"model": tables.TEXT},
    "difficulty": {"model": tables.TEXT},
    "decontaminate": {
        "evaluations": tables.list_of(tables.TEXT, "[gsm8k_test.jsonl]"),
        "words": tables.whole(SHORTEST_QUESTION_WORDS),
    },
    "deduplicate": {
        "exact": tables.SWITCH,
        "near": tables.SWITCH,
        **dict.fromkeys(("words", "buckets", "hashes"), tables.whole(1)),
    },
}
SECTION_NEEDS = {"language": ["keep"], "decontaminate": ["evaluations"]}


def slurm_kinds() -> dict[str, tables.Kind]:
    """Of datatrove's Slurm executor, by the defaults of its parameters; those that we give it ourselves are left out."""
    kinds = {}
    for name, parameter in inspect.signature(SlurmPipelineExecutor).parameters.items():
        default = parameter.default
        if isinstance(default, bool):
            kinds[name] = tables.SWITCH
        elif isinstance(default, int):
            kinds[name] = tables.whole(-1)
        else:
            kinds[name] = tables.TABLE if name.endswith("_args") else tables.either(tables.TEXT, tables.NOTHING)
    # YAML reads 10:00:00 as 36,000.
    kinds |= {"partition": tables.TEXT, "time": tables.Kind('a text such as "10:00:00", in quotes', tables.TEXT.fits)}
    ours = ("pipeline", "tasks", "logging_dir", "depends", "job_name", "job_id_retriever", "requeue_signals")
    return {name: kind for name, kind in kinds.items() if name not in ours}


def threshold_kinds(rules: type) -> dict[str, tables.Kind]:
    """Of one of Gopher's filters, by the defaults of its parameters; null switches one off."""
    grams = tables.Kind(
        "a list of pairs such as [[2, 0.2]]",
        lambda value: isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(tables.is_number, pair)) for pair in value),
    )
    kinds = {}
    for name, parameter in inspect.signature(rules).parameters.items():
        if isinstance(parameter.default, tuple):
            kinds[name] = grams
        elif tables.is_number(parameter.default):
            kinds[name] = tables.either(tables.number(0), tables.NOTHING)
    if "min_stop_words" in kinds:
        kinds["stop_words"] = tables.list_of(tables.TEXT, "[the, of]")
    return kinds


SLURM_KINDS = slurm_kinds()
HEURISTICS_KINDS = {name: threshold_kinds(rules) for name, rules in GOPHER.items()}


@dataclass
class Recipe:
    """What a YAML file says, checked; see the example above. Paths are relative to where the command is called."""

    out: str
    sources: list[dict]
    heuristics: dict = field(default_factory=dict)
    language: dict | None = None
    quality: dict | None = None
    domain: dict | None = None
    difficulty: dict | None = None
    decontaminate: dict | None = None
    deduplicate: dict = field(default_factory=lambda: {"exact": True, "near": True})
    mixture: dict[str, float] | None = None
    max_repeats: float = MAX_REPEATS
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    seed: int = 0
    tasks: int = 1
    workers: int = 1
    slurm: dict | None = None

    def __post_init__(self):
        tables.check(vars(self), RECIPE_KINDS, "the recipe")
        for number, source in enumerate(self.sources):
            where = f"source {source.get('name', number)!r}"
            tables.check(source, SOURCE_KINDS, where, needed=["name", "path"])
            _check_heuristics(source.get("heuristics", {}), where)
        names = [source["name"] for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"Two sources have one name in {names}; name them apart.")
        _check_heuristics(self.heuristics, "the recipe")
        for name, kinds in SECTION_KINDS.items():
            if (section := getattr(self, name)) is not None:
                tables.check(section, kinds, name, needed=SECTION_NEEDS.get(name, ()))
        if self.slurm is not None:
            tables.check(self.slurm, SLURM_KINDS, "slurm", needed=["partition", "time"])
        for name in ("quality", "domain", "difficulty"):
            section = getattr(self, name)
            if section is not None and not (section.get("model") and Path(section["model"]).is_dir()):
                raise ValueError(f"{name}: {section} names no folder with a classifier as its model; train one first.")
        shares = list(self.mixture.values()) if self.mixture else [1.0]
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"The mixture's shares must be numbers from 0 that sum to 1, got {self.mixture}; mend them."
            )
        if self.mixture and self.domain:
            known = {*labels_of(self.domain["model"]), *(s["domain"] for s in self.sources if "domain" in s)}
            wanted = {name for name, share in self.mixture.items() if share > 0}
            if missing := sorted(wanted - known):
                raise ValueError(
                    f"The mixture asks for {', '.join(missing)} and the domain classifier and sources know "
                    f"{', '.join(sorted(known))}; train it on the missing, or leave them out."
                )
        if self.mixture and not self.domain:
            domains = {source.get("domain", "unknown") for source in self.sources}
            if domains != set(self.mixture):
                raise ValueError(
                    f"The mixture names {', '.join(sorted(self.mixture))}, the sources' domains are "
                    f"{', '.join(sorted(domains))}; give each a share, 0 to leave it out."
                )
        if self.max_repeats <= 0:
            raise ValueError(f"max_repeats={self.max_repeats:g} draws nothing; use a number above 0, such as 4.")

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no recipe; begin with `out:` and `sources:`.")
        tables.check(content, RECIPE_KINDS, str(path), needed=["out", "sources"])
        return cls(**content)

    def files(self) -> list[tuple[str, str, str]]:
        return [
            (source["name"], str(path.resolve()), source.get("text_key", "text"))
            for source in self.sources
            for path in files_of(source["path"])
        ]


def _check_heuristics(rules: Mapping, where: str) -> None:
    kinds = dict.fromkeys(HEURISTICS_KINDS, tables.TABLE)
    tables.check(rules, kinds, f"heuristics of {where}")
    for part, thresholds in rules.items():
        tables.check(thresholds, HEURISTICS_KINDS[part], f"heuristics.{part} of {where}")


def text_of(document: Document) -> str:
    return document.text


def first_steps(recipe: Recipe, files: list[tuple[str, str, str]], dropped: str) -> list[PipelineStep]:
    """Read, and judge each document by itself: the cheap before the dear."""
    declared = {s["name"]: {key: s[key] for key in ("domain", "language") if key in s} for s in recipe.sources}
    steps: list[PipelineStep] = [Reader(files, declared, recipe.max_document_bytes)]
    rules = {source["name"]: source.get("heuristics", recipe.heuristics) for source in recipe.sources}
    if any(rules.values()):
        steps.append(Heuristics(rules, dropped))
    if recipe.language:
        steps.append(Language(recipe.language["keep"], recipe.language.get("minimum", 0.0), dropped))
    if recipe.decontaminate:
        evaluations = [str(Path(path).resolve()) for path in recipe.decontaminate["evaluations"]]
        words = {"words": recipe.decontaminate["words"]} if "words" in recipe.decontaminate else {}
        for path in evaluations:
            # Read to its end here, so that a bad one is refused before the work, not in it.
            collections.deque(evaluation_texts(path), maxlen=0)
        steps.append(Decontaminated(evaluations, dropped, **words))
    # Quality, which drops some, comes last: the others then see the same batches, and their features are made once.
    for name in ("domain", "difficulty", "quality"):
        if section := getattr(recipe, name):
            model = str(Path(section["model"]).resolve())
            steps.append(Classified(name, model, dropped, section.get("minimum", 0.0)))
    return steps


@dataclass(frozen=True)
class Stage:
    name: str
    steps: list
    tasks: int


def stages_of(recipe: Recipe, out: Path) -> list[Stage]:
    """Each needs those before it. A stage that reads what another wrote has as many tasks: task n reads file n."""
    dropped, work, tasks = str(out / "dropped"), out / "work", recipe.tasks

    def hand_over(name: str) -> JsonlWriter:
        return JsonlWriter(str(work / name), compression=None)

    first = first_steps(recipe, recipe.files(), dropped)
    stages = [Stage("filter", [*first, Tally(str(work / "tally-filtered")), hand_over("filtered")], tasks)]
    latest = "filtered"

    def take_over() -> PipelineStep:
        return HandedOver(str(work / latest))

    if recipe.deduplicate.get("exact"):
        exact = ExactDedupConfig(content_getter=text_of, hash_config=HASH)
        signatures, duplicates = str(work / "exact-signatures"), str(work / "exact-duplicates")
        drop = ExactDedupFilter(duplicates, exact, DroppedWriter(dropped, "exact", "same text"))
        stages += [
            Stage("exact-sign", [take_over(), ExactDedupSignature(signatures, exact)], tasks),
            Stage("exact-find", [ExactFindDedups(signatures, duplicates, exact)], 1),
            Stage("exact-drop", [take_over(), drop, Kept("exact"), hand_over("exact")], tasks),
        ]
        latest = "exact"
    if recipe.deduplicate.get("near"):
        near = NEAR | {key: recipe.deduplicate[key] for key in NEAR if key in recipe.deduplicate}
        hashing = MinhashConfig(near["words"], near["buckets"], near["hashes"], hash_config=HASH)
        signatures, pairs, clusters = (str(work / f"near-{name}") for name in ("signatures", "pairs", "clusters"))
        drop = MinhashDedupFilter(clusters, DroppedWriter(dropped, "near", "near duplicate"))
        stages += [
            Stage("near-sign", [take_over(), MinhashDedupSignature(signatures, hashing, language=Words())], tasks),
            Stage("near-pair", [MinhashDedupBuckets(signatures, pairs, config=hashing)], near["buckets"]),
            Stage("near-group", [MinhashDedupCluster(pairs, clusters, config=hashing)], 1),
            Stage("near-drop", [take_over(), drop, Kept("near"), hand_over("near")], tasks),
        ]
        latest = "near"
    stages.append(Stage("tally", [take_over(), Tally(str(work / "tally-deduplicated"))], tasks))
    draw = Mixture(str(work / "tally-deduplicated"), recipe.mixture, recipe.max_repeats, recipe.seed)
    tally = Tally(str(work / "tally-documents"))
    stages.append(Stage("mixture", [take_over(), draw, tally, DocumentWriter(str(out / "documents"))], tasks))
    return [*stages, Stage("report", [Report(str(out), recipe.mixture)], 1)]


class HandedOver(PipelineStep):
    """What the task of the same number wrote in the stage before; a task that kept nothing has written no file."""

    name, type = "hand over", "curation"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if Path(self.folder, f"{rank:05d}.jsonl").exists():
            yield from JsonlReader(self.folder, glob_pattern=f"{rank:05d}.jsonl", add_file_path=False)()


def executors_of(recipe: Recipe, out: Path, stages: Sequence[Stage]) -> list[PipelineExecutor]:
    made: list[PipelineExecutor] = []
    for stage in stages:
        common = {"pipeline": stage.steps, "tasks": stage.tasks, "logging_dir": str(out / "logs" / stage.name)}
        before = made[-1] if made else None
        if recipe.slurm:
            slurm = {"job_id_position": -1} | recipe.slurm
            note = functools.partial(_note_job, queue=str(out / QUEUE), position=slurm["job_id_position"])
            name = f"curate-{stage.name}"
            common |= {"job_name": name, "job_id_retriever": note}
            made.append(SlurmPipelineExecutor(**common, depends=before, **slurm))
        else:
            workers = min(recipe.workers, stage.tasks)
            made.append(LocalPipelineExecutor(**common, depends=before, workers=workers))
    return made


def curate(recipe: Recipe) -> Path:
    """Run the recipe; returns the folder it wrote. On Slurm the jobs are queued, each waiting for the one before.

    ValueError if the folder was begun with another recipe or other files, or if another process or job is at work in it.
    """
    out = Path(recipe.out).resolve()
    stages = stages_of(recipe, out)
    with _alone_in(out):
        _no_job_in(out)
        _claim(recipe, out)
        _run(recipe, out, stages)
    return out


def _run(recipe: Recipe, out: Path, stages: Sequence[Stage]) -> None:
    executors = executors_of(recipe, out, stages)
    if recipe.slurm:
        try:
            executors[-1].run()
        except subprocess.CalledProcessError as error:
            raise ValueError(f"sbatch refused a job, with status {error.returncode} (see above); mend `slurm`.") from error
        queued = sum(executor.job_id != -1 for executor in executors)
        print(f"queued {queued} jobs; {out / 'report.html'} is written by the last" if queued else f"{out} is done already")
        return
    with tqdm(total=len(stages), desc="curating", unit=" stages") as bar, open(os.devnull, "w") as nowhere:
        for stage, executor in zip(stages, executors, strict=True):
            bar.set_postfix_str(stage.name)
            # datatrove logs to standard error; the same lines stand in logs/STAGE/logs.
            with contextlib.redirect_stderr(nowhere) if executor.workers == 1 else contextlib.nullcontext():
                executor.run()
            bar.update()


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """One process at a time: two would write into the same files. Whoever is killed holds the folder no longer."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            # Not flock, whose lock datatrove's helper processes would inherit: some of them outlive a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{out} is being written by another process; wait for it or stop it.") from error
        except OSError as error:
            raise ValueError(f"{out} cannot be locked ({error.strerror}); put `out` on a file system with locks.") from error
        yield


def _note_job(said: str, queue: str, position: int) -> str:
    """The id of a job that sbatch has just queued, noted at once: a kill between two jobs leaves none unknown."""
    job = said.split()[position]
    with open(queue, "a") as file:
        file.write(job + "\n")
    return job


def _no_job_in(out: Path) -> None:
    """ValueError while a job that an earlier call queued is there: two would write into the same files."""
    queue = out / QUEUE
    noted = set(queue.read_text().split()) if queue.exists() else set()
    if not noted:
        return
    # Not --jobs, which fails for a single job that is gone. %F: of an array the number that sbatch gave.
    try:
        asked = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{out} has jobs on Slurm ({_jobs(noted)}) and squeue cannot say whether any is left; remove {queue} if none is."
        ) from error
    if left := noted & set(asked.stdout.split()):
        raise ValueError(f"{out} is being written by jobs on Slurm ({_jobs(left)}); wait for them, or end them with scancel.")
    queue.unlink()


def _jobs(ids: set[str]) -> str:
    ordered = sorted(ids, key=lambda job: (len(job), job))
    return " to ".join(dict.fromkeys([ordered[0], ordered[-1]]))


def _claim(recipe: Recipe, out: Path) -> None:
    """The folder belongs to one recipe and one state of its files: half of each would be neither."""
    state = {name: value for name, value in vars(recipe).items() if name not in ("workers", "slurm")}
    inputs = {Path(path) for _, path, _ in recipe.files()}
    for section in (recipe.quality, recipe.domain, recipe.difficulty):
        inputs.update(files_of(section["model"]) if section else ())
    for path in recipe.decontaminate["evaluations"] if recipe.decontaminate else ():
        inputs.update(files_of(path))
    facts = ((str(path), path.stat()) for path in sorted(path.resolve() for path in inputs))
    state["files"] = [[path, fact.st_size, fact.st_mtime_ns] for path, fact in facts]
    text = json.dumps(state, indent=2, ensure_ascii=False, default=str) + "\n"
    claimed = out / "recipe.json"
    if claimed.exists() and claimed.read_text() != text:
        raise ValueError(f"{out} was begun with another recipe or other files; remove it or name another `out`.")
    if not claimed.exists():
        # Renamed when whole: half a claim, left by a kill, would refuse the same recipe ever after.
        (out / ".recipe.json").write_text(text)
        (out / ".recipe.json").rename(claimed)


class Report(PipelineStep):
    """Writes `report.json` and `report.html` from what the stages left."""

    name, type = "report", "curation"

    def __init__(self, out: str, mixture: Mapping[str, float] | None):
        super().__init__()
        self.out, self.mixture = out, mixture

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        out = Path(self.out)
        facts = collect(out, self.mixture)
        for name, content in (
            ("report.json", json.dumps(facts, indent=2, ensure_ascii=False)),
            ("report.html", page(facts)),
        ):
            (out / f".{name}").write_text(content + "\n", encoding="utf-8")
            (out / f".{name}").rename(out / name)


def collect(out: Path, mixture: Mapping[str, float] | None) -> dict:
    """What was read, dropped and kept, by reason and by domain, with samples."""
    read = _counts(out / "logs" / "filter", "curation: read")
    dropped = {folder.name: _dropped(folder) for folder in sorted((out / "dropped").glob("*"))}
    left_out = _counts(out / "logs" / "mixture", "curation: mixture").get("dropped", 0)
    tallies = {name: read_tally(out / "work" / f"tally-{name}") for name in ("filtered", "deduplicated", "documents")}
    kept = [row for path in sorted((out / "documents").glob("*.jsonl"))[:SAMPLES] for row in _rows(path, 1)]
    return {
        "read": read,
        "dropped": {step: found["reasons"] for step, found in dropped.items()},
        "left_out_by_mixture": left_out,
        "kept": {name: sum(row["documents"] for row in tally.values()) for name, tally in tallies.items()},
        "mixture": _mixture_rows(tallies, mixture or {}),
        "samples": {step: found["samples"] for step, found in dropped.items()} | {"kept": kept},
    }


def _counts(logs: Path, step: str) -> dict[str, int]:
    """The counters of one step, summed over its tasks, as datatrove has written them."""
    total: dict[str, int] = {}
    for path in sorted((logs / "stats").glob("*.json")):
        for block in json.loads(path.read_text()):
            if block["name"] == step:
                for name, value in block["stats"].items():
                    total[name] = total.get(name, 0) + (value["total"] if isinstance(value, dict) else value)
    return total


def _dropped(folder: Path) -> dict:
    reasons: dict[str, int] = {}
    samples: list[dict] = []
    for path in sorted(folder.glob("*.jsonl")):
        for row in _rows(path):
            reason = row["filter_reason"]
            reasons[reason] = reasons.get(reason, 0) + 1
            if sum(sample["filter_reason"] == reason for sample in samples) < SAMPLES:
                samples.append(row)
    return {"reasons": reasons, "samples": [_shortened(row) for row in samples]}


def _rows(path: Path, limit: int | None = None):
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, limit))


def _shortened(row: dict) -> dict:
    return {**row, "text": row["text"][:300]}


def _mixture_rows(tallies: Mapping[str, Mapping], mixture: Mapping[str, float]) -> list[dict]:
    totals = {name: sum(row["characters"] for row in tally.values()) or 1 for name, tally in tallies.items()}
    return [
        {
            "domain": domain,
            **{name: tallies[name].get(domain, {}).get("characters", 0) / totals[name] for name in tallies},
            "wanted": mixture.get(domain),
        }
        for domain in sorted({*mixture, *(domain for tally in tallies.values() for domain in tally)})
    ]


def summary(facts: Mapping) -> list[dict[str, str]]:
    """Kept and dropped, a line each."""
    rows = [("read", "documents", facts["read"].get("documents", 0))]
    rows += [("read", reason, count) for reason, count in sorted(unread(facts["read"]).items())]
    for step, reasons in facts["dropped"].items():
        rows += [(step, reason, count) for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    rows.append(("mixture", "left out", facts["left_out_by_mixture"]))
    rows += [("kept", name, count) for name, count in facts["kept"].items()]
    return [{"step": step, "what": what, "documents": f"{count:,}"} for step, what, count in rows]


def mixture_table(facts: Mapping) -> list[dict[str, str]]:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    return [
        {"domain": row["domain"], **{k: percent(v) for k, v in row.items() if k != "domain"}}
        for row in facts["mixture"]
    ]


def page(facts: Mapping) -> str:
    pieces = [report.heading("Kept and dropped"), report.table(summary(facts))]
    if facts["mixture"]:
        pieces += [report.heading("Mixture, shares of characters"), report.table(mixture_table(facts))]
    for step, samples in facts["samples"].items():
        pieces.append(report.heading(f"Samples: {step}"))
        for row in samples:
            told = row.get("filter_reason") or json.dumps(row["verdicts"], ensure_ascii=False)
            pieces += [
                report.paragraph(f"{row['file']}, {row['position']}: {told}"),
                report.preformatted(row["text"][:300]),
            ]
    return report.page("Curation", pieces)


def run_curation(recipe: Path) -> None:
    """`axk1 curate run`."""
    made = Recipe.read(recipe)
    out = curate(made)
    if not made.slurm:
        facts = json.loads((out / "report.json").read_text())
        print(report.text_table(summary(facts)))
        if facts["mixture"]:
            print("\n" + report.text_table(mixture_table(facts)))
        print(f"\n{out / 'documents'}\n{out / 'report.html'}")
