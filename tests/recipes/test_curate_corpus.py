"""Does the demonstration plant what it says, find it, and tell domains apart?"""

import json
import random

from recipes import curate_corpus
from trainers import text_classifier
from trainers.curation_steps import Words

WORDS = "오늘 영화 정말 재미 있다 없다 배우 연기 감동 음악 지루 최고 다시 보고 싶다 친구".split()


def test_small_run(tmp_path, monkeypatch):
    library = curate_corpus._library()[:12]
    monkeypatch.setattr(curate_corpus, "_library", lambda: library)
    # A third of a page, told apart by as many features as that has.
    monkeypatch.setattr(curate_corpus, "CHARACTERS_A_PIECE", 1_000)
    monkeypatch.setattr(text_classifier, "FEATURES", 2**14)
    rng = random.Random(0)
    reviews = [" ".join(rng.choices(WORDS, k=40)) for _ in range(60)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reviews))
    for name, count in (("train", 60), ("test", 5)):
        rows = []
        for _ in range(count):
            steps = rng.choice([1, 3, 6])
            story = " ".join(
                f"Then {rng.randrange(99)} {rng.choice(['eggs', 'hens'])} are sold." for _ in range(steps * 4)
            )
            rows.append(json.dumps({"question": story, "answer": "<<1+1=2>>" * steps}) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    options = ["--reviews", str(tmp_path / "r.jsonl"), "--maths", str(tmp_path / "train.jsonl"), "--limit", "60"]
    options += [
        "--maths-test",
        str(tmp_path / "test.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--copies",
        "25",
        "--tasks",
        "1",
    ]
    figures = curate_corpus.main(options)
    exact, near = figures["found"]["exact"], figures["found"]["near"]
    assert exact["pairs"] > 10 and exact["found"] == exact["pairs"]
    assert near["pairs"] > 10 and near["found"] >= 0.9 * near["pairs"]
    assert figures["classifiers"]["domain"]["macro_f1"] > 0.9
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures


def test_a_near_copy_is_near():
    rng = random.Random(1)
    text = " ".join(f"word{n}," for n in range(150))
    copy = curate_corpus.near_copy(rng, text, ["other"])
    before, after = (Words().word_tokenize(each.lower()) for each in (text, copy))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2 and copy != text
