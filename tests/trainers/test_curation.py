"""Does a recipe find what was planted, account for every document, survive a kill, and run the same on Slurm?"""

import gzip
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
from pathlib import Path

import dill
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupFilter

import axk1
from trainers.curation import Recipe, _claim, collect, curate, executors_of, stages_of
from trainers.curation_steps import Decontaminated, Heuristics, Language, Mixture, Words, repeats
from trainers.text_classifier import train_classifier

NOUNS = "river engine garden teacher bridge planet harbor violin market glacier lantern orchard desert museum".split()
VERBS = "crosses repairs remembers paints measures follows describes builds forgets carries teaches watches".split()
CODE_NAMES = "index total result buffer parser token weight column".split()
EXACT, NEAR = 30, 30


def prose(rng: random.Random, sentences: int) -> str:
    return " ".join(
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)} near {rng.choice(NOUNS)} {rng.randrange(999)}."
        for _ in range(sentences)
    )


def program(rng: random.Random) -> str:
    lines = [f"    {rng.choice(CODE_NAMES)} = {rng.choice(CODE_NAMES)}[{rng.randrange(99)}]" for _ in range(12)]
    return "\n".join([f"def f{rng.randrange(9999)}(x):", *lines, "    return x"])


def reworded(rng: random.Random, text: str) -> str:
    """One word in 60 replaced, other capitals, other punctuation."""
    words = text.split()
    for place in rng.sample(range(len(words)), max(1, len(words) // 60)):
        words[place] = rng.choice(NOUNS)
    return " ".join(words).replace(".", "!").upper()


def lines(texts) -> bytes:
    return "".join(
        json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)
    ).encode()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Files with known duplicates and known damage, and two trained classifiers."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(3)
    originals = [prose(rng, rng.choice([12, 20])) for _ in range(150)]
    exact = [originals[n] for n in rng.sample(range(150), EXACT)]
    near = [reworded(rng, originals[n]) for n in rng.sample(range(150), NEAR)]
    (folder / "web").mkdir()
    (folder / "web" / "a.jsonl").write_bytes(lines(originals) + b"{broken\n" + b'{"text": "\xff\xff"}\n')
    (folder / "web" / "b.jsonl").write_bytes(lines([*exact, *near]) + b'{"text": "' + b"y" * 300_000 + b'"}\n')
    (folder / "web" / "c.jsonl").write_bytes(b"")
    (folder / "web" / "d.jsonl").write_bytes(lines(["too short", "!!! ### !!! " * 40]))
    (folder / "code").mkdir()
    programs = [program(rng) for _ in range(40)]
    for number, text in enumerate(programs):
        (folder / "code" / f"{number}.py").write_text(text)
    question = "A farmer sells twelve eggs for nine dollars each and buys 7 hens for 31 dollars how much is left of it"
    (folder / "test.jsonl").write_text(json.dumps({"question": question, "answer": "1"}) + "\n")
    (folder / "web" / "e.jsonl").write_bytes(lines([prose(rng, 9) + " " + question.upper() + " " + prose(rng, 9)]))
    train_classifier(folder / "domain", originals + programs * 3, ["web"] * 150 + ["code"] * 120)
    levels = ["hard" if len(text) > 700 else "easy" for text in originals + programs * 3]
    train_classifier(folder / "difficulty", originals + programs * 3, levels)
    return folder, exact, near


def recipe_of(folder: Path, out: Path, **changes) -> Recipe:
    content = {
        "out": str(out),
        "sources": [
            {"name": "web", "path": str(folder / "web"), "heuristics": {"quality": {"min_doc_words": 20}}},
            {"name": "code", "path": f"{folder}/code/*.py", "language": "code"},
        ],
        "language": {"keep": ["en"], "minimum": 0.2},
        "domain": {"model": str(folder / "domain")},
        "difficulty": {"model": str(folder / "difficulty")},
        "decontaminate": {"evaluations": [str(folder / "test.jsonl")]},
        "mixture": {"web": 0.8, "code": 0.2},
        "max_document_bytes": 20_000,
        "tasks": 2,
        "deduplicate": {"exact": True, "near": True, "buckets": 14},
    } | changes
    return Recipe(**content)


@pytest.fixture(scope="module")
def curated(planted, tmp_path_factory):
    return curate(recipe_of(planted[0], tmp_path_factory.mktemp("curated") / "out"))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_planted_duplicates_are_found_and_nothing_else(curated, planted):
    _, exact, near = planted
    found = [row["text"] for row in rows_of(curated / "dropped" / "exact")]
    assert sorted(found) == sorted(exact)
    dropped = {row["text"] for row in rows_of(curated / "dropped" / "near")}
    # Of a pair either may stay, so pairs are counted by what is left of both.
    kept = {row["text"] for row in rows_of(curated / "work" / "near")}
    survivors = sum(text in kept for text in near)
    assert len(dropped) >= 0.95 * NEAR and len(dropped) <= NEAR
    assert len(kept) == 150 + 40 + NEAR - len(dropped) and survivors <= NEAR


def test_what_cannot_be_read_is_counted(curated):
    read = json.loads((curated / "report.json").read_text())["read"]
    unreadable = {reason: read[reason] for reason in ("broken JSON", "invalid UTF-8", "too large", "empty file")}
    assert unreadable == {"broken JSON": 1, "invalid UTF-8": 1, "too large": 1, "empty file": 1}
    assert read["documents"] == 150 + EXACT + NEAR + 2 + 1 + 40


def test_every_document_is_accounted_for(curated):
    facts = json.loads((curated / "report.json").read_text())
    assert facts["dropped"]["heuristics"] == {"gopher_short_doc": 2}
    assert facts["dropped"]["decontamination"] == {"in test.jsonl": 1}
    dropped = sum(sum(reasons.values()) for reasons in facts["dropped"].values())
    assert facts["kept"]["deduplicated"] + dropped == facts["read"]["documents"]
    distinct = {row["id"] for row in rows_of(curated / "documents")}
    assert len(distinct) + facts["left_out_by_mixture"] == facts["kept"]["deduplicated"]


def test_every_document_keeps_its_provenance(curated):
    documents, dropped = rows_of(curated / "documents"), rows_of(curated / "dropped" / "exact")
    steps = ["heuristics", "language", "decontamination", "domain", "difficulty", "exact", "near", "mixture"]
    for row in documents:
        assert list(row["verdicts"]) == [s for s in steps if s != "heuristics" or "heuristics" in row["verdicts"]]
        assert 0 <= row["difficulty"] <= 1 and row["language"] in ("en", "code")
    for row in [*documents, *dropped]:
        content = Path(row["file"]).read_text(errors="replace")
        if row["source"] == "web":
            raw = json.loads(content.split("\n")[row["position"]])
            assert raw["text"] == row["text"] and json.loads(row["columns"]) == {"n": raw["n"]}
        else:
            assert content == row["text"]
    assert all(row["filter_reason"] == "same text" and row["dropped_by"] == "exact" for row in dropped)


def test_domains_get_the_mixture(curated):
    facts = json.loads((curated / "report.json").read_text())
    table = {row["domain"]: row for row in facts["mixture"]}
    assert table["web"]["deduplicated"] > 0.85, "nothing to mend"
    assert table["code"]["documents"] == pytest.approx(0.2, abs=0.02) and table["code"]["wanted"] == 0.2
    documents = rows_of(curated / "documents")
    assert all(row["domain"] == row["source"] for row in documents)
    copies = {row["copy"] for row in documents if row["domain"] == "code"}
    assert copies <= {0, 1, 2, 3} and len(copies) > 1


def test_files_go_from_simple_to_hard(curated):
    levels = [
        [row["difficulty"] for row in rows] for rows in map(_rows, sorted((curated / "documents").glob("*.jsonl")))
    ]
    tenths = [{min(9, int(10 * level)) for level in file} for file in levels]
    assert all(len(tenth) == 1 for tenth in tenths)
    order = [tenth.pop() for tenth in tenths]
    assert order == sorted(order) and len(set(order)) > 1


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_report_shows_reasons_mixture_and_samples(curated):
    page = (curated / "report.html").read_text()
    for shown in ("gopher_short_doc", "near duplicate", "in test.jsonl", "Samples: exact", "<td>20.0%</td>"):
        assert shown in page
    facts = json.loads((curated / "report.json").read_text())
    assert facts["samples"]["kept"] and len(facts["samples"]["exact"]) == 3
    assert collect(curated, {"web": 0.8, "code": 0.2}) == facts


def curate_until(recipe: Recipe, step: type, documents: int, reached) -> None:
    """Says when the step's second task has passed so many documents on, and waits to be killed."""
    run = step.run

    def until(self, data, rank=0, world_size=1):
        for number, document in enumerate(run(self, data, rank, world_size)):
            if rank == 1 and number == documents:
                reached.set()
                signal.pause()
            yield document

    step.run = until
    curate(recipe)


def test_killed_and_run_again_gives_the_same_files(curated, planted, tmp_path):
    out, first, spawn = tmp_path / "out", None, multiprocessing.get_context("spawn")
    recipe = recipe_of(planted[0], out)
    for step in (MinhashDedupFilter, Mixture):
        reached = spawn.Event()
        child = spawn.Process(target=curate_until, args=(recipe, step, 20, reached))
        child.start()
        assert reached.wait(timeout=60)
        with pytest.raises(ValueError, match="is being written by another process; wait for it or stop it"):
            curate(recipe)
        # As by a machine that runs out of memory.
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL and not (out / "report.json").exists()
        assert (out / "documents").exists() == (step is Mixture)
        finished = (out / "work" / "filtered" / "00000.jsonl").stat().st_mtime_ns
        assert first in (None, finished), "a finished task ran again"
        first = finished
    assert curate(recipe) == out
    assert (out / "work" / "filtered" / "00000.jsonl").stat().st_mtime_ns == first, "a finished task ran again"
    same_files(out, curated)


def same_files(out: Path, expected: Path) -> None:
    for folder in ("documents", "dropped/exact", "dropped/near", "dropped/heuristics"):
        names = sorted(path.name for path in (expected / folder).iterdir())
        assert names == sorted(path.name for path in (out / folder).iterdir())
        for name in names:
            assert (out / folder / name).read_bytes() == (expected / folder / name).read_bytes(), name
    assert (out / "report.json").read_text() == (expected / "report.json").read_text()


def test_number_of_tasks_changes_no_text(curated, planted, tmp_path):
    plain = {"language": None, "domain": None, "difficulty": None, "mixture": None, "deduplicate": {"exact": True}}
    out = curate(recipe_of(planted[0], tmp_path / "out", tasks=3, **plain))
    kept = [row["text"] for row in rows_of(out / "documents")]
    assert sorted(kept) == sorted(row["text"] for row in rows_of(curated / "work" / "exact"))


def test_tasks_run_in_processes_of_their_own(planted, tmp_path):
    sources = [{"name": "code", "path": f"{planted[0]}/code/*.py"}]
    recipe = Recipe(str(tmp_path), sources, tasks=2, workers=2, deduplicate={})
    executors_of(recipe, tmp_path, stages_of(recipe, tmp_path))[0].run()
    assert [len(_rows(path)) for path in sorted((tmp_path / "work" / "filtered").iterdir())] == [20, 20]


def test_slurm_runs_the_same_recipe(curated, planted, tmp_path, monkeypatch, capsys):
    """sbatch is a stand-in that notes its job; each queued executor is then run as its array tasks would run it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    jobs = tmp_path / "jobs"
    scripts = {
        "sbatch": f'echo "$@" >> {jobs}; n=$(wc -l < {jobs}); cat "${{@: -1}}" > {tmp_path}/job-$n; echo Submitted batch job $n',
        "scontrol": "echo node1",
        "squeue": f"cat {tmp_path}/left",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    recipe = recipe_of(planted[0], tmp_path / "out", slurm={"partition": "cpu", "time": "1:00:00"})
    out = curate(recipe)
    for here in (recipe, recipe_of(planted[0], tmp_path / "out")):
        with pytest.raises(ValueError, match=r"jobs on Slurm \(1 to 22\) and squeue cannot say"):
            curate(here)
        (tmp_path / "left").write_text("7\n7\n22\n301\n")
        with pytest.raises(ValueError, match=r"is being written by jobs on Slurm \(7 to 22\); wait for them"):
            curate(here)
        (tmp_path / "left").unlink()
    queued = [line for line in jobs.read_text().splitlines() if "RUN_OFFSET" in line]
    assert len(queued) == 11 and "dependency" not in queued[0]
    assert all("--dependency=afterok:" in line for line in queued[1:])
    script = (out / "logs" / "near-pair" / "launch_script.slurm").read_text()
    assert (
        "#SBATCH --partition=cpu" in script and "#SBATCH --array=0-13" in script and "launch_pickled_pipeline" in script
    )
    assert not (out / "documents").exists()
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    for stage in sorted((out / "logs").iterdir(), key=lambda path: (path / "executor.pik").stat().st_mtime_ns):
        with open(stage / "executor.pik", "rb") as file:
            executor = dill.load(file)
        for task in range(executor.tasks):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            executor.run() if task == 0 else dill.loads((stage / "executor.pik").read_bytes()).run()
    same_files(out, curated)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    (tmp_path / "left").write_text("301\n")
    capsys.readouterr()
    curate(recipe)
    assert f"{out} is done already" in capsys.readouterr().out and not (out / ".jobs").exists()


def test_a_job_that_slurm_refuses_is_one_sentence(planted, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="sbatch refused a job, with status 3"):
        curate(recipe_of(planted[0], tmp_path / "out", slurm={"partition": "none", "time": "1:00:00"}))


def test_a_folder_belongs_to_one_recipe(curated, planted, capsys):
    with pytest.raises(ValueError, match="was begun with another recipe"):
        curate(recipe_of(planted[0], curated, seed=1))
    shutil.copytree(planted[0] / "code", planted[0] / "code2", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another recipe or other files"):
        curate(recipe_of(planted[0], curated, sources=[{"name": "code", "path": str(planted[0] / "code2")}]))


@pytest.mark.parametrize("changed", ["text.txt", "eval.jsonl", "quality/model.json"])
def test_a_folder_belongs_to_one_state_of_its_files(tmp_path, monkeypatch, changed):
    monkeypatch.chdir(tmp_path)
    Path("quality").mkdir()
    files = {"text.txt": "some text", "eval.jsonl": json.dumps({"q": QUESTION}), "quality/model.json": "{}"}
    for name, content in files.items():
        Path(name).write_text(content)
    recipe = Recipe(
        "out",
        [{"name": "a", "path": "text.txt"}],
        quality={"model": "quality"},
        decontaminate={"evaluations": ["eval.jsonl"]},
    )
    Path("out").mkdir()
    _claim(recipe, Path("out"))
    _claim(recipe, Path("out"))
    # As many bytes as before, written later.
    os.utime(changed, (0, 0))
    with pytest.raises(ValueError, match="another recipe or other files"):
        _claim(recipe, Path("out"))


def test_killed_while_it_claims_its_folder_it_goes_on_too(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some text")
    recipe = Recipe(str(tmp_path / "out"), [{"name": "a", "path": str(tmp_path / "text.txt")}])
    (tmp_path / "out").mkdir()
    write = Path.write_text

    def half(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            _claim(recipe, tmp_path / "out")
    _claim(recipe, tmp_path / "out")
    _claim(recipe, tmp_path / "out")


def test_from_the_command_line(planted, tmp_path, capsys):
    folder, _, _ = planted
    sources = [{"name": "code", "path": f"{folder}/code"}]
    recipe = {"out": str(tmp_path / "out"), "sources": sources, "deduplicate": {"exact": True}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert axk1.main(["curate", "run", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert ["kept", "documents", "40"] in [line.split() for line in said.splitlines()]
    assert (tmp_path / "out" / "report.html").exists() and len(rows_of(tmp_path / "out" / "documents")) == 40


def test_without_datatrove_the_extra_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("trainers.curation", "datatrove"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    assert axk1.main(["curate", "run", str(tmp_path / "recipe.yaml")]) == 2
    assert "pip install 'axk1[curation]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mixture": {"web": 0.8, "code": 0.1}}, "must be numbers from 0 that sum to 1, got {'code': 0.1, 'web': 0.8}"),
        ({"mixture": {"web": 1.2, "code": -0.2}}, "must be numbers from 0 that sum to 1"),
        ({"mixture": {"web": 0.6, "code": 0.4}}, "names code, web, the sources' domains are unknown"),
        ({"sources": []}, "is []; give a list such as - {name: web"),
        ({"sources": [{"name": "a"}]}, "Source 'a' has no path; give a text"),
        ({"sources": [{"name": "a", "path": "b"}, {"name": "a", "path": "c"}]}, "one name"),
        ({"sources": [{"name": "a", "path": "absent"}]}, "names no file"),
        ({"mixture": {"unknown": "60%"}}, "is {'unknown': '60%'}; give null or a table such as {web: 0.7"),
        ({"language": {"minimum": 0.5}}, "Language has no keep; give a list such as [en, ko]"),
        ({"language": {"keep": "en"}}, "keep of language is 'en'; give a list such as [en, ko]"),
        ({"decontaminate": {}}, "Decontaminate has no evaluations; give a list"),
        ({"decontaminate": {"evaluations": []}}, "evaluations of decontaminate is []; give a list"),
        ({"decontaminate": {"evaluations": ["text.txt"], "words": 4}}, "words of decontaminate is 4; give a whole number from 5"),
        ({"deduplicate": None}, "is None; give a table"),
        ({"heuristics": {"quality": {"min_words": 3}}}, "'min_words' in heuristics.quality of the recipe is no"),
        ({"sources": [{"name": "a", "path": "b", "heuristics": {"gopher": {}}}]}, "'gopher' in heuristics of source 'a'"),
        ({"slurm": {"partition": "cpu"}}, "Slurm has no time; give a text such as \"10:00:00\", in quotes"),
        ({"language": {"only": ["en"]}}, "'only' in language is no setting; use keep, minimum"),
        ({"quality": {"minimum": 0.5}}, "names no folder with a classifier"),
        ({"quality": {"model": "absent"}}, "names no folder with a classifier"),
        ({"tasks": 0}, "is 0; give a whole number from 1"),
        ({"max_repeats": 0}, "max_repeats=0 draws nothing"),
        ({"mixture": ["web"]}, "is ['web']; give null or a table"),
        ({"slurm": True}, "is True; give a table or null"),
        ({"slurm": {"partition": "cpu", "time": 36000}}, "time of slurm is 36000; give a text such as"),
        ({"slurm": {"partition": "cpu", "time": "1:00:00", "tasks": 3}}, "'tasks' in slurm is no setting"),
        ({"seed": "1"}, "is '1'; give a whole number from 0"),
        ({"max_document_bytes": -1}, "is -1; give a whole number from 1"),
        ({"sources": ["text.txt"]}, "give a list such as - {name"),
        ({"sources": [{"name": "a", "path": ["text.txt"]}]}, "path of source 'a' is ['text.txt']; give a text"),
        ({"quality": {"model": ".", "minimum": float("nan")}}, "minimum of quality is nan; give a number from 0 to 1"),
        ({"deduplicate": {"exact": "yes"}}, "exact of deduplicate is 'yes'; give true or false"),
        ({"heuristics": {"quality": {"min_doc_words": "many"}}}, "is 'many'; give a number from 0 or null"),
        ({"heuristics": {"repetition": {"top_n_grams": [2]}}}, "is [2]; give a list of pairs"),
        ({"decontaminate": {"evaluations": ["absent.jsonl"]}}, "names no file"),
        ({"colour": "blue"}, "recipe.yaml is no setting; use out, sources"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_refused_in_one_sentence(tmp_path, capsys, changes, complaint):
    (tmp_path / "text.txt").write_text("some text")
    recipe = {"out": str(tmp_path / "out"), "sources": [{"name": "a", "path": str(tmp_path / "text.txt")}]} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert axk1.main(["curate", "run", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_mixture_names_every_domain_there_will_be(planted, tmp_path):
    sources = [{"name": name, "path": str(planted[0] / name), "domain": name} for name in ("web", "code")]
    for mixture in ({"web": 1.0}, {"web": 0.8, "cod": 0.2}, {"web": 0.5, "code": 0.2, "books": 0.3}):
        with pytest.raises(ValueError, match="the sources' domains are code, web"):
            recipe_of(planted[0], tmp_path, sources=sources, domain=None, mixture=mixture)
    recipe_of(planted[0], tmp_path, sources=sources, domain=None, mixture={"web": 1.0, "code": 0.0})


def test_a_mixture_asks_for_what_the_classifier_can_give(planted, tmp_path):
    for changes in ({"mixture": {"web": 0.5, "program": 0.5}}, {"mixture": {"web": 0.5, "books": 0.5}}):
        with pytest.raises(ValueError, match="the domain classifier and sources know code, web; train it"):
            recipe_of(planted[0], tmp_path, **changes)
    sources = [{"name": "books", "path": str(planted[0]), "domain": "books"}]
    recipe_of(planted[0], tmp_path, sources=sources, mixture={"web": 0.5, "books": 0.5, "absent": 0.0})


def test_the_shipped_recipe_is_consistent():
    recipe = Recipe.read(Path(__file__).parents[2] / "recipes" / "configs" / "curate.yaml")
    assert {source["domain"] for source in recipe.sources} == set(recipe.mixture)


def test_repeats_fill_the_mixture_within_their_bound():
    rates = repeats({"web": 900, "code": 100}, {"web": 0.8, "code": 0.2}, max_repeats=4)
    assert rates == pytest.approx({"web": 1000 * 0.8 / 900, "code": 2.0})
    # Code can give 400 at most, so half of the whole is 400.
    rates = repeats({"web": 900, "code": 100, "mail": 50}, {"web": 0.5, "code": 0.5}, max_repeats=4)
    assert rates == pytest.approx({"web": 400 / 900, "code": 4.0})
    with pytest.raises(ValueError, match="asks for books, of which no text is left"):
        repeats({"web": 1}, {"web": 0.5, "books": 0.5}, 4)


def document(text: str, **metadata) -> Document:
    return Document(text, "id", metadata={"source": "s", "verdicts": {}, **metadata})


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather was fine, so we walked to the river and back again.", "en"),
        ("오늘은 날씨가 좋아서 강까지 걸어갔다가 돌아왔습니다.", "ko"),
        ("今日は天気が良かったので、川まで歩いて行きました。", "ja"),
        ("今天天气很好，所以我们走到河边再走回来。", "zh"),
        ("Hacía buen tiempo, así que caminamos hasta el río y volvimos.", "es"),
    ],
)
def test_languages(tmp_path, text, language):
    step = Language(["en", "ko", "ja", "zh", "es"], 0.3, str(tmp_path))
    kept = document(text)
    assert step.filter(kept) is True and kept.metadata["language"] == language
    others = [each for each in ("en", "ko", "ja", "zh", "es") if each != language]
    assert Language(others, 0.3, str(tmp_path)).filter(document(text)) == (False, f"language {language}")
    assert Language([language], 1.1, str(tmp_path)).filter(document(text)) == (False, "language unsure")
    assert step.filter(document("x = 1", language="code")) is True


def test_decontamination_by_shared_words(tmp_path):
    question = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    short = "고양이는 몇 마리인가?"
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in (question, short)))
    step = Decontaminated([str(tmp_path / "eval.jsonl")], str(tmp_path))
    dirty = (False, "in eval.jsonl")
    assert step.filter(document("Before. " + question.replace(",", "").upper() + " After.")) == dirty
    assert step.filter(document("질문: 고양이는 몇 마리인가")) == dirty
    # Twelve words in common are not thirteen, and other numbers make another problem.
    assert step.filter(document(" ".join(question.split()[:12]) + " else")) is True
    assert step.filter(document(question.replace("48", "52").replace("half", "twice"))) is True
    assert step.filter(document("")) is True


QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    "row",
    [{"question": QUESTION}, {"messages": [{"role": "user", "content": QUESTION}], "n": 1}],
    ids=["column", "chat"],
)
def test_evaluation_sets_of_any_format_count(tmp_path, kind, row):
    path = tmp_path / f"eval.{kind}"
    if kind == "parquet":
        # Plain bytes of a Parquet file would show the text: in its pages, and as their least and greatest.
        table = pyarrow.Table.from_pylist([row] * 9)
        pyarrow.parquet.write_table(table, path, compression="gzip", write_statistics=False)
    else:
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    step = Decontaminated([str(path)], str(tmp_path))
    assert step.filter(document(f"Before. {QUESTION} After.")) == (False, f"in {path.name}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no text of 5 words or more"),
        (b'{"question": "how many cats?"}\n', "holds no text of 5 words or more"),
        (f'{{"question": "{QUESTION}"}}\n{{broken'.encode(), "cannot be read whole (broken JSON: 1)"),
    ],
    ids=["empty", "short", "broken"],
)
def test_an_evaluation_set_that_removes_nothing_is_refused_at_once(tmp_path, content, complaint):
    (tmp_path / "eval.jsonl").write_bytes(content)
    (tmp_path / "text.txt").write_text("some text")
    recipe = Recipe(
        str(tmp_path / "out"),
        [{"name": "a", "path": str(tmp_path / "text.txt")}],
        decontaminate={"evaluations": [str(tmp_path / "eval.jsonl")]},
    )
    with pytest.raises(ValueError, match=re.escape(complaint)):
        curate(recipe)
    # Mended, the same command begins.
    assert not (tmp_path / "out").exists()


def test_heuristics_are_each_sources_own(tmp_path):
    rules = {"strict": {"quality": {"min_doc_words": 5}, "repetition": {}}, "lenient": {}}
    step = Heuristics(rules, str(tmp_path))
    short, echo = "two words", "\n".join(["the same line of five words"] * 9)
    for text, reason in ((short, "gopher_short_doc"), (echo, "dup_para_frac"), (echo, "dup_line_frac")):
        kept, why = step.filter(document(text, source="strict"))
        assert not kept and why == reason or text is echo
        assert step.filter(document(text, source="lenient")) is True


def test_words_of_any_script():
    assert Words().word_tokenize("Hello, 세계 2024! 世界のx_1") == [
        "Hello",
        "세",
        "계",
        "2024",
        "世",
        "界",
        "の",
        "x_1",
    ]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_near_copies_of_short_korean_texts_are_found(tmp_path, form):
    """A review of 15 words in which one was changed, its syllables whole or, as some systems write them, taken apart."""
    rng = random.Random(5)
    words = ["".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(rng.randint(2, 4))) for _ in range(800)]
    reviews = [[rng.choice(words) for _ in range(15)] for _ in range(100)]
    copies = [[*review[:place], rng.choice(words), *review[place + 1 :]] for review in reviews for place in [rng.randrange(15)]]
    texts = [" ".join(text) for text in reviews] + [unicodedata.normalize(form, " ".join(text)) for text in copies]
    (tmp_path / "reviews.jsonl").write_bytes(lines(texts))
    out = curate(Recipe(str(tmp_path / "out"), [{"name": "ko", "path": str(tmp_path / "reviews.jsonl")}]))
    kept = {unicodedata.normalize("NFC", row["text"]) for row in rows_of(out / "documents")}
    pairs = [(" ".join(a), " ".join(b)) for a, b in zip(reviews, copies)]
    assert all(a in kept or b in kept for a, b in pairs), "both of a pair were dropped"
    assert sum(a in kept and b in kept for a, b in pairs) <= 5


def test_evaluation_questions_are_found_however_their_letters_are_encoded(tmp_path):
    question = "철수는 사과를 열두 개 가지고 있고 영희에게 다섯 개를 주었다"
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": unicodedata.normalize("NFD", question)}))
    step = Decontaminated([str(tmp_path / "eval.jsonl")], str(tmp_path))
    assert step.filter(document(question)) == (False, "in eval.jsonl")
