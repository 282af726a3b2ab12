"""What does curation find in real text? Korean reviews, maths problems, Python's documentation and library, planted copies.

    python -m recipes.curate_corpus --reviews reviews.jsonl --maths gsm8k_train.jsonl --maths-test gsm8k_test.jsonl

Plants exact and near copies, trains the three classifiers on labels that the texts themselves give (where a text is from; how
many steps a solution takes; whether it was spoiled), curates, and tells what was found: table, OUT/figures.json, page.
"""

import argparse
import ast
import inspect
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from trainers import report
from trainers.corpus import MAX_DOCUMENT_BYTES
from trainers.curation import Recipe, curate, mixture_table, summary
from trainers.curation_steps import Words
from trainers.text_classifier import train_classifier

COPIES = 500
# A near copy has other capitals and commas, and one word in so many replaced; texts with fewer words are not copied so.
WORDS_A_CHANGE = 60
CHARACTERS_A_PIECE = 3_000
MIXTURE = {"reviews": 0.25, "maths": 0.25, "documentation": 0.2, "code": 0.3}
LEVELS = ("easy", "medium", "hard")


def reviews(path: Path, limit: int) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(limit))]


def maths(path: Path, limit: int) -> list[tuple[str, str]]:
    """Problem with its solution, and how hard it is: the solution's calculations, up to 2, up to 4, or more."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line, _ in zip(file, range(limit)):
            row = json.loads(line)
            steps = row["answer"].count("<<")
            level = LEVELS[0] if steps <= 2 else LEVELS[1] if steps <= 4 else LEVELS[2]
            found.append((row["question"], level))
    return found


def documentation(limit: int) -> list[str]:
    """Python's own: the language reference's topics, and what the library's modules say of themselves."""
    pieces = [piece for text in topics.values() for piece in _pieces(text)]
    for path in _library():
        head = inspect.cleandoc(_docstring(path))
        pieces += _pieces(head) if len(head) > 300 else []
    return pieces[:limit]


def code(limit: int) -> list[str]:
    pieces = (piece for path in _library() for piece in _pieces(path.read_text(encoding="utf-8", errors="replace")))
    return [piece for piece, _ in zip(pieces, range(limit))]


def _library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_bytes())) or ""


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, about `CHARACTERS_A_PIECE` at a time."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) > CHARACTERS_A_PIECE:
            yield piece
            piece = ""
    if len(piece) > 200:
        yield piece


def near_copy(rng: random.Random, text: str, vocabulary: list[str]) -> str:
    places = list(re.finditer(r"\w+", text))
    changes = max(1, len(Words().word_tokenize(text)) // WORDS_A_CHANGE)
    # From the back, so that the places before stay right.
    for place in sorted(rng.sample(places, changes), key=lambda place: -place.start()):
        text = text[: place.start()] + rng.choice(vocabulary) + text[place.end() :]
    return text.replace(",", " ;").swapcase()


def spoiled(rng: random.Random, text: str) -> str:
    """What a broken page looks like: letters of every other word shuffled, one piece over and over, or markup left in."""
    words = text.split()
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join("".join(rng.sample(w, len(w))) if rng.random() < 0.6 else w for w in words)
    if kind == 1:
        return " ".join(words[: max(2, len(words) // 8)] * 8)
    return " ".join(w + rng.choice(["</div>", "&nbsp;", "|||", "%%", ""]) for w in words)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def plant(out: Path, texts: dict[str, list[str]], copies: int, seed: int) -> dict[str, int]:
    """Writes the corpus with `copies` exact and, as far as texts are long enough, near ones; returns how many of each."""
    rng = random.Random(seed)
    everything = sorted({text for domain in texts.values() for text in domain})
    vocabulary = sorted(
        {word for text in rng.sample(everything, min(300, len(everything))) for word in re.findall(r"\w+", text)}
    )
    long = [text for text in everything if len(Words().word_tokenize(text)) >= WORDS_A_CHANGE]
    exact = rng.sample(everything, min(copies, len(everything)))
    near = rng.sample(long, min(copies, len(long)))
    for domain, found in texts.items():
        # Texts that occur twice by themselves would be counted as found.
        write(out / "corpus" / f"{domain}.jsonl", [{"text": text} for text in dict.fromkeys(found)])
    copied = [{"text": text, "planted": "exact"} for text in exact]
    copied += [{"text": near_copy(rng, text, vocabulary), "planted": "near", "original": text} for text in near]
    write(out / "corpus" / "planted.jsonl", copied)
    return {"exact": len(exact), "near": len(near)}


def train(
    out: Path, texts: dict[str, list[str]], levels: list[tuple[str, str]], seed: int, rows: int
) -> dict[str, dict]:
    rng = random.Random(seed)
    labelled = [(text, domain) for domain, found in texts.items() for text in found[:rows]]
    good = [text for text, _ in labelled]
    quality = [(text, "good") for text in good] + [(spoiled(rng, text), "bad") for text in good]
    jobs = {
        "domain": (labelled, None),
        "difficulty": (levels, LEVELS),
        "quality": (quality, ("bad", "good")),
    }
    return {
        name: train_classifier(out / name, [text for text, _ in pairs], [label for _, label in pairs], order)
        for name, (pairs, order) in jobs.items()
    }


def found(out: Path) -> dict[str, dict[str, int]]:
    """Of the planted pairs that both passed the filters, how many were parted: either of a pair may stay, not both."""
    with (out / "corpus" / "planted.jsonl").open(encoding="utf-8") as file:
        pairs = [(row["planted"], row["text"], row.get("original", row["text"])) for row in map(json.loads, file)]
    before, after = (_texts(out / "curated" / "work" / name) for name in ("filtered", "near"))
    result = {}
    for kind in ("exact", "near"):
        # An exact pair is one text, there twice.
        twice = 1 if kind == "near" else 2
        judged = [(a, b) for planted, a, b in pairs if planted == kind and min(before[a], before[b]) >= twice]
        left = sum(min(after[a], after[b]) >= twice for a, b in judged)
        result[kind] = {"pairs": len(judged), "found": len(judged) - left}
    return result


def _texts(folder: Path) -> Counter:
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8"))
    return Counter(json.loads(line)["text"] for line in lines)


def run(options: argparse.Namespace) -> dict:
    out = options.out
    levels = maths(options.maths, options.limit)
    texts = {
        "reviews": reviews(options.reviews, options.limit),
        "maths": [text for text, _ in levels],
        "documentation": documentation(options.limit),
        "code": code(options.limit),
    }
    planted = plant(out, texts, options.copies, options.seed)
    judged = train(out, texts, levels, options.seed, options.train_rows)
    recipe = Recipe(
        out=str(out / "curated"),
        sources=[{"name": path.stem, "path": str(path)} for path in sorted((out / "corpus").glob("*.jsonl"))],
        quality={"model": str(out / "quality"), "minimum": options.quality},
        domain={"model": str(out / "domain")},
        difficulty={"model": str(out / "difficulty")},
        decontaminate={"evaluations": [str(options.maths_test)]},
        mixture=MIXTURE,
        max_document_bytes=MAX_DOCUMENT_BYTES,
        tasks=options.tasks,
        workers=options.workers,
        seed=options.seed,
    )
    curate(recipe)
    figures = {"planted": planted, "found": found(out), "classifiers": judged}
    (out / "figures.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return figures


def shown(figures: dict) -> list[dict[str, str]]:
    rows = [
        (
            f"{kind} copies found",
            f"{count['found']:,} of {count['pairs']:,} ({count['found'] / max(1, count['pairs']):.1%})",
        )
        for kind, count in figures["found"].items()
    ]
    for name, result in figures["classifiers"].items():
        rows += [
            (f"{name}: macro F1 on {result['rows']:,} rows held out", f"{result['macro_f1']:.3f}"),
            (
                f"{name}: calibration error, raw -> calibrated",
                f"{result['calibration_error_raw']:.3f} -> {result['calibration_error']:.3f}",
            ),
        ]
    rows.append(
        (
            "difficulty: rank correlation with the number of steps",
            f"{figures['classifiers']['difficulty']['rank_correlation']:.3f}",
        )
    )
    return [{"what": what, "result": result} for what, result in rows]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--reviews", type=Path, required=True, help="JSONL with `text`")
    parser.add_argument("--maths", type=Path, required=True, help="GSM8K's training file")
    parser.add_argument("--maths-test", type=Path, required=True, help="GSM8K's test file: must not be trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/curate_corpus"), help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=20_000, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=COPIES, help="planted, of each kind (default: %(default)s)")
    parser.add_argument("--train-rows", type=int, default=1_000, help="of each domain (default: %(default)s)")
    parser.add_argument("--quality", type=float, default=0.2, help="drop below this (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    figures = run(options)
    facts = json.loads((options.out / "curated" / "report.json").read_text())
    for rows in (shown(figures), summary(facts), mixture_table(facts)):
        print(report.text_table(rows) + "\n")
    print(options.out / "curated" / "report.html")
    return figures


if __name__ == "__main__":
    main()
