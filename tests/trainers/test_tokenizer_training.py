"""Does a tokenizer learn the mixture that was asked for, say what it could not read, and give back any text?"""

import json
import random
import sys
import unicodedata

import pytest
from transformers import AutoTokenizer

import axk1
from trainers.tokenizer import RESERVED, train_tokenizer
from trainers.tokenizer_training import compression, parse_sources, sample_texts

KOREAN, CODE = "오늘 날씨가 참 좋습니다 그래서 산책을 했다", "def f(x):\n        return x * 10\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    with open(folder / "ko.jsonl", "w") as file:
        for _ in range(400):
            words = KOREAN.split()
            rng.shuffle(words)
            file.write(json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n")
    with open(folder / "ko.jsonl", "ab") as file:
        file.write(b'{broken\n{"text": "\xff"}\n')
    (folder / "code").mkdir()
    for number in range(40):
        (folder / "code" / f"{number}.py").write_text(CODE * 5 + f"y = {number}\n")
    (folder / "code" / "empty.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def trained(corpus):
    out = corpus / "tokenizer"
    sources = ["--source", f"ko={corpus}/ko.jsonl:0.75", "--source", f"code={corpus}/code:0.25"]
    assert axk1.main(["tokenizer", "train", str(out), *sources, "--vocab-size", "640", "--reserved", "10"]) == 0
    return out


def test_the_sample_has_the_shares_and_is_spread(corpus):
    sources = parse_sources([f"ko={corpus}/ko.jsonl:0.75", f"code={corpus}/code:0.25"])
    texts = list(sample_texts(sources, 8_000))
    korean = [text for text in texts if "def" not in text]
    taken = [sum(len(t.encode()) for t in part) for part in (korean, [t for t in texts if "def" in t])]
    assert taken[0] == pytest.approx(6_000, abs=200) and taken[1] == pytest.approx(2_000, abs=200)
    # The head alone would end with the first half of the folder.
    numbers = sorted(t.rsplit("= ", 1)[1].strip() for t in texts if "def" in t)
    assert 5 < len(numbers) < 20 and numbers[0] < "2" and numbers[-1] > "4"


def test_the_scarcest_source_bounds_the_sample(corpus):
    sources = parse_sources([f"ko={corpus}/ko.jsonl:0.1", f"code={corpus}/code:0.9"])
    list(sample_texts(sources, 10**9))
    taken = {source.name: source.counts["sampled bytes"] for source in sources}
    assert taken["code"] / sum(taken.values()) == pytest.approx(0.9, abs=0.03)


def test_report_counts_what_was_not_read(trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["ko"]["broken JSON"] == 1 and report["ko"]["invalid UTF-8"] == 1
    assert report["code"]["empty file"] == 1
    assert report["ko"]["share reached"] == pytest.approx(0.75, abs=0.05)


def test_vocabulary_is_a_multiple_of_128_with_spare_tokens(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) % 128 == 0 and max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    spare = [RESERVED.format(number) for number in range(10)]
    ids = [tokenizer.encode(token) for token in spare]
    assert all(len(each) == 1 for each in ids)
    assert tokenizer.decode([each[0] for each in ids], skip_special_tokens=True) == ""
    ask = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2"}], add_generation_prompt=True, enable_thinking=True, tokenize=False
    )
    assert ask.endswith("<think>") and len(tokenizer.encode("<think>")) == 1


def test_a_full_vocabulary_has_exactly_the_size_asked_for():
    texts = [" ".join(f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop")] * 9
    assert len(train_tokenizer(texts, 384, reserved=5, multiple_of=128)) == 384


def test_same_command_same_bytes(trained, corpus):
    again = corpus / "again"
    sources = ["--source", f"ko={corpus}/ko.jsonl:0.75", "--source", f"code={corpus}/code:0.25"]
    axk1.main(["tokenizer", "train", str(again), *sources, "--vocab-size", "640", "--reserved", "10"])
    names = sorted(path.name for path in trained.iterdir())
    assert names == sorted(path.name for path in again.iterdir()) and "tokenizer.json" in names
    for name in names:
        assert (trained / name).read_bytes() == (again / name).read_bytes(), name


def random_text(rng: random.Random) -> str:
    """Any code point but surrogates, which no UTF-8 holds: drawn from ranges where tokenizers tend to fail."""
    ranges = [
        (0x00, 0x20),
        (0x7F, 0xA0),
        (0x300, 0x36F),
        (0x1100, 0x11FF),
        (0xAC00, 0xD7A3),
        (0xD7F0, 0xD7FF),
        (0xE000, 0xE010),
        (0xFE00, 0xFE0F),
        (0xFFF0, 0xFFFF),
        (0x1F300, 0x1FAFF),
        (0x200B, 0x200F),
        (0x2028, 0x202E),
        (0x30, 0x39),
        (0x20, 0x7E),
        (0x10FFF0, 0x10FFFF),
        (0, sys.maxunicode),
    ]
    pieces = []
    for _ in range(rng.randrange(1, 30)):
        low, high = rng.choice(ranges)
        character = chr(rng.randint(low, high))
        pieces.append(character * rng.choice([1, 1, 1, 2, 7]))
    return "".join(c for c in "".join(pieces) if not 0xD800 <= ord(c) <= 0xDFFF)


def test_any_text_comes_back(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rng = random.Random(7)
    texts = [random_text(rng) for _ in range(700)]
    texts += [unicodedata.normalize(form, "각 Å ﬁ 한국어 é") for form in ("NFC", "NFD", "NFKC", "NFKD")]
    texts += ["👩‍👩‍👧‍👦🏳️‍🌈", "\ufeffa", "<think>a</think><|im_end|>", " \t\n\r\x0b\x0c\x85\u3000 ", "\r\n\r\n  x"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


def test_every_code_point_comes_back(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    points = [chr(n) for n in range(0, sys.maxunicode + 1, 29) if not 0xD800 <= n <= 0xDFFF]
    for start in range(0, len(points), 5_000):
        text = "".join(points[start : start + 5_000])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_indentation_is_kept_and_cheap(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.tokenize("\n        return") == ["Ċ", "ĠĠĠĠĠĠĠ", "Ġreturn"]


def test_compare_by_language(trained, corpus, capsys):
    train_tokenizer([CODE], 300).save_pretrained(corpus / "other")
    texts = [f"ko={corpus}/ko.jsonl", f"code={corpus}/code"]
    arguments = ["tokenizer", "compare", str(trained), str(corpus / "other"), "--limit", "20", "--texts", *texts]
    assert axk1.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["texts"] for row in rows] == ["ko", "ko", "code", "code"]
    ours, other = rows[:2]
    assert ours["documents"] == 20 and ours["lossless"] == other["lossless"] == 1
    assert ours["bytes per token"] > 3 * other["bytes per token"]
    tokens = AutoTokenizer.from_pretrained(trained).encode(KOREAN)
    assert ours["tokens per document"] == pytest.approx(len(tokens), rel=0.2)
    assert axk1.main(arguments) == 0
    assert "tokens per document" in capsys.readouterr().out


def test_compare_names_a_folder_that_is_not_there(corpus, tmp_path, capsys):
    for place, lacks in ((tmp_path / "nowhere", "is no folder, nor to be had"), (tmp_path, "holds no tokenizer that can be")):
        assert axk1.main(["tokenizer", "compare", str(place), "--texts", f"ko={corpus}/ko.jsonl"]) == 2
        assert f"axk1: {place} {lacks}" in capsys.readouterr().err


def test_compare_tells_what_it_could_not_read(trained, tmp_path, capsys):
    (tmp_path / "en.jsonl").write_text('{"text": "water boils"}\n{broken\n{"body": "ice melts"}\n')
    arguments = ["tokenizer", "compare", str(trained), "--texts", f"en={tmp_path}/en.jsonl"]
    assert axk1.main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["documents"] == 1 and "en: not read: broken JSON 1, no text 1" in said.err
    assert axk1.main([*arguments, "--text-key", "content"]) == 2
    assert "holds no text under 'content' (no text: 2, broken JSON: 1)" in capsys.readouterr().err


def test_compression_counts_a_loss(trained):
    class Lossy:
        def encode(self, text, add_special_tokens):
            return [1]

        def decode(self, ids, clean_up_tokenization_spaces):
            return "same"

    assert compression(Lossy(), ["same", "other"])["lossless"] == 0.5


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["--source", "ko=x.jsonl:0.9"], "shares must be positive and sum to 1, got 0.9"),
        (["--source", "ko=x.jsonl"], "names no source; write NAME=PATH:SHARE"),
        (["--source", "ko=absent.jsonl:1"], "absent.jsonl names no file"),
        (["--source", "ko={corpus}/ko.jsonl:1", "--vocab-size", "256"], "vocab_size=256 cannot hold the bytes"),
        (["--source", "ko={corpus}/ko.jsonl:1", "--vocab-size", "1000"], "not a multiple of 128; use 896"),
        (
            ["--source", "ko={corpus}/ko.jsonl:1", "--text-key", "body"],
            "no text under 'body' (no text: 400, broken JSON: 1",
        ),
        (
            ["--source", "ko={corpus}/ko.jsonl:1", "--sample-gb", "0"],
            "sample_gb=0 is no amount of text; give a positive",
        ),
        (["--source", "ko={corpus}/ko.jsonl:1", "--sample-gb", "nan"], "sample_gb=nan is no amount of text"),
        (["--source", "ko={corpus}/ko.jsonl:1", "--reserved", "-1"], "reserved=-1 is no number of spare tokens"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(corpus, tmp_path, capsys, changes, complaint):
    changes = [change.format(corpus=corpus) for change in changes]
    assert axk1.main(["tokenizer", "train", str(tmp_path / "out"), *changes]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_there_is_may_be_asked_for_and_nothing_may_not(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    source = ["--source", f"ko={corpus}/ko.jsonl:1"]
    assert axk1.main(["tokenizer", "train", str(out), *source, "--sample-gb", "inf", "--vocab-size", "512"]) == 0
    facts = json.loads((out / "report.json").read_text())["ko"]
    assert facts["sampled bytes"] == facts["bytes"]
    assert axk1.main(["tokenizer", "compare", str(out), "--texts", f"ko={corpus}/ko.jsonl", "--limit", "0"]) == 2
    assert "limit=0 leaves no document to compare by; give 1 or more." in capsys.readouterr().err
