"""Are documents read, counted, ordered, mixed and packed as said; do borders hold in the model; is a resumed batch the same?"""

import gzip
import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import tiny_chat_config
from tests.tolerances import PREFILL
from trainers import token_store
from trainers.curriculum import plan_steps, read_curriculum
from trainers.packing import IGNORED, Batches, Packer, Reader, arrange
from trainers.token_store import Source, described, pieces_of, prepare
from trainers.tokenizer import CONTROL_TOKENS, END_OF_TEXT, SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six seven\n" * 3], vocab_size=300)


def source(lengths, name="web", difficulty=None):
    """Documents whose tokens say which they are: document i is i * 100, i * 100 + 1, ..."""
    tokens = np.concatenate([np.arange(n, dtype=np.uint32) + 100 * i for i, n in enumerate(lengths)])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    difficulty = np.zeros(len(lengths)) if difficulty is None else np.asarray(difficulty)
    return Source(name, tokens, starts, difficulty.astype(np.float32), {})


def curriculum(*stages, **changes):
    given = {"tokens": 120, "context": 12, "batch_tokens": 24, "mixture": {"web": 1.0}, "order": "as_is"} | changes
    return read_curriculum({"stages": [{"name": f"s{i}", **given, **s} for i, s in enumerate(stages or ({},))]})


def batches(packer, c):
    return [packer.batch(step) for step in plan_steps(c)]


# -- files --------------------------------------------------------------------------------------------------------
def line(text, **columns):
    return json.dumps({"text": text, "id": "x", **columns}).encode() + b"\n"


def test_bad_input_is_counted_and_the_rest_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_store, "PIECE_CHARACTERS", 1000)
    long_text = "one two three\n" * 300
    (tmp_path / "a.jsonl").write_bytes(
        line("one two", difficulty=0.25) + b"{broken\n\n" + line("") + b'{"id": 3}\n[1]\n' + b'{"text": "\xff"}\n'
        + line("three", difficulty="hard") + line(long_text)
    )  # fmt: skip
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line("four")))
    Dataset.from_list([{"text": "five", "metadata": {"difficulty": 0.5}}]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("six")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe")
    [web] = prepare(tmp_path / "cache", tokenizer, {"web": [f"{tmp_path}/*.*"]}).values()
    texts = [tokenizer.decode(web.tokens[a:b]) for a, b in zip(web.starts, web.starts[1:])]
    end = END_OF_TEXT
    assert texts == [t + end for t in ("one two", "three", long_text, "four", "five", "six")]
    assert web.difficulty[[0, 4]].tolist() == [0.25, 0.5] and np.isnan(web.difficulty[[1, 2, 3, 5]]).all()
    wrong = {"empty file": 1, "broken JSON": 1, "invalid UTF-8": 2, "no text": 3, "in pieces": 1}
    assert {what: n for what, n in web.counts.items() if what not in ("documents", "bytes")} == wrong
    assert "1 broken JSON" in described({"web": web})[0]["what was wrong"]


def test_preparing_is_done_once_and_again_for_other_files(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(line("one", domain="web") + line("two two", domain="code") + line("x", domain="books"))
    sources = prepare(tmp_path / "cache", tokenizer, {"web": (), "code": ()}, shared=[str(file)])
    assert [len(s) for s in sources.values()] == [1, 1] and sources["web"].counts["of other domains"] == 1
    # Half-written work of a killed run is no source.
    (tmp_path / "cache/web-0.unfinished").mkdir()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("tokens.bin")}
    prepare(tmp_path / "cache", tokenizer, {"web": (), "code": ()}, shared=[str(file)])
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("tokens.bin")}
    file.write_bytes(line("one", domain="web") + line("three", domain="web") + line("two", domain="code"))
    sources = prepare(tmp_path / "cache", tokenizer, {"web": (), "code": ()}, shared=[str(file)])
    assert [len(s) for s in sources.values()] == [2, 1]
    assert not (tmp_path / "cache/web-0.unfinished").exists()


def test_domains_whose_names_differ_in_signs_alone_are_kept_apart(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(line("one", domain="c#") + line("two two", domain="c+") + line("x", domain="c+"))
    for names in (("c#", "c+"), ("c+", "c#")):
        sources = prepare(tmp_path / "cache", tokenizer, dict.fromkeys(names, ()), shared=[str(file)])
        assert {name: len(source) for name, source in sources.items()} == {"c#": 1, "c+": 2}


def test_control_tokens_in_a_text_are_its_characters(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    text = f"one {' '.join(SPECIAL_TOKENS)} two {' '.join(CONTROL_TOKENS)}"
    file.write_bytes(line(text) + line("three"))
    [web] = prepare(tmp_path / "cache", tokenizer, {"web": [str(file)]}).values()
    assert tokenizer.decode(web.tokens) == text + END_OF_TEXT + "three" + END_OF_TEXT
    controls = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *CONTROL_TOKENS])
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert [token for token in web.tokens if token in controls] == [end, end]
    # Elsewhere the tokenizer reads them as before.
    assert tokenizer(CONTROL_TOKENS[0], add_special_tokens=False).input_ids == controls[-len(CONTROL_TOKENS) :][:1]


@pytest.mark.parametrize(
    ("sources", "shared", "said"),
    [
        ({"web": ["gone/*.jsonl"]}, (), "gone/.* names no file"),
        ({"web": ["{}/a.pdf"]}, (), "has no document in 1 files .1 invalid UTF-8"),
        ({"web": ["{}/broken.jsonl"]}, (), "has no document in 1 files .1 broken JSON"),
        ({"web": ()}, (), "'web' has no files"),
        ({"web": ["{}/half.parquet"]}, (), "has no document in 1 files .1 broken Parquet"),
    ],
)
def test_what_cannot_be_read_at_all_is_refused(tmp_path, tokenizer, sources, shared, said):
    (tmp_path / "a.pdf").write_bytes(b"%PDF \xff")
    (tmp_path / "broken.jsonl").write_bytes(b"{\n")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    given = {name: [f.format(tmp_path) for f in files] for name, files in sources.items()}
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "cache", tokenizer, given, shared)
    assert not [p for p in (tmp_path / "cache").glob("*") if p.suffix != ".unfinished"]


def test_pieces_are_the_text(monkeypatch):
    monkeypatch.setattr(token_store, "PIECE_CHARACTERS", 10)
    for text in ("", "short", "a" * 35, "ab cd ef gh ij kl mn", "line\nline two\nx" * 4):
        pieces = pieces_of(text)
        assert "".join(pieces) == text and max(map(len, pieces)) <= 10
    assert pieces_of("one two\nthree four")[0] == "one two\n"


# -- order --------------------------------------------------------------------------------------------------------
def test_orders():
    difficulty = np.array([0.5, 0.1, 0.9, 0.1])
    everything = np.arange(4)
    assert arrange(everything, difficulty, "as_is", 0).tolist() == [0, 1, 2, 3]
    easy = arrange(everything, difficulty, "easy_to_hard", 0).tolist()
    assert sorted(easy[:2]) == [1, 3] and easy[2:] == [0, 2]
    assert arrange(everything, difficulty, "hard_to_easy", 0).tolist()[:2] == [2, 0]
    assert len({tuple(arrange(everything, difficulty, "shuffled", seed)) for seed in range(9)}) > 3


def test_every_pass_is_shuffled_anew():
    reader = Reader(source([5] * 20), seed=0)
    orders = []
    for _ in range(3):
        reader.begin("shuffled", fresh=True)
        orders.append(tuple(reader.order))
    assert len(set(orders)) == 3 and {tuple(sorted(order)) for order in orders} == {tuple(range(20))}


def test_a_new_stage_goes_on_with_what_is_left():
    reader = Reader(source([5, 5, 5, 5], difficulty=[3, 2, 1, 0]), seed=0)
    reader.begin("as_is")
    seen = [*reader.take(9), *reader.take(3)]
    reader.begin("easy_to_hard")
    while not reader.exhausted():
        seen += [*reader.take(4)]
    # Documents 0 and 1; the second was begun, so it is finished; then the easiest of the others.
    assert seen == [*range(5), *range(100, 105), *range(300, 305), *range(200, 205)]


# -- rows ---------------------------------------------------------------------------------------------------------
def test_rows_are_full_and_borders_marked():
    c = curriculum(tokens=24)
    [batch] = batches(Packer(c, {"web": source([5, 9, 30, 40])}), c)
    assert batch["input_ids"].tolist() == [
        [0, 1, 2, 3, 4, 100, 101, 102, 103, 104, 105, 106],
        [107, 108, 200, 201, 202, 203, 204, 205, 206, 207, 208, 209],
    ]
    assert batch["position_ids"].tolist() == [[*range(5), *range(7)], [0, 1, *range(10)]]
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == IGNORED).all() and torch.equal(
        batch["labels"][~first], batch["input_ids"][~first]
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_and_loss_do_not_cross_documents(attention):
    """Packed against each piece alone: the same logits at every place, the same loss over all."""
    c = curriculum(tokens=24)
    web = source([5, 1, 9, 30])
    web = Source("web", web.tokens % 60, web.starts, web.difficulty, {})
    [batch] = batches(Packer(c, {"web": web}), c)
    config = tiny_chat_config(64)
    # As the trainer sets it: with a cache, transformers' masks do not look for borders.
    config.use_cache = False
    config._attn_implementation = attention
    model = AxK1ForCausalLM(config).eval()
    packed = model(**batch)
    losses, tokens = 0.0, 0
    for row in range(2):
        borders = [*torch.where(batch["position_ids"][row] == 0)[0].tolist(), 12]
        for a, b in zip(borders, borders[1:]):
            alone = model(input_ids=batch["input_ids"][row : row + 1, a:b]).logits[0]
            torch.testing.assert_close(packed.logits[row, a:b], alone, atol=PREFILL, rtol=PREFILL)
            if b - a > 1:
                losses += torch.nn.functional.cross_entropy(
                    alone[:-1], batch["input_ids"][row, a + 1 : b], reduction="sum"
                )
                tokens += b - a - 1
    assert tokens == (batch["labels"] != IGNORED).sum()
    torch.testing.assert_close(packed.loss, losses / tokens)
    # In one row, as FlashAttention is given it, the loss is the same.
    flat = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    torch.testing.assert_close(model(**flat).loss, packed.loss)


def test_mixture_is_kept_to_within_a_row():
    c = curriculum(tokens=1200, mixture={"web": 0.7, "code": 0.25, "books": 0.05})
    sources = {"web": source([7] * 300), "code": source([400, 200]), "books": source([1] * 100)}
    packer = Packer(c, sources)
    total = 0
    for step in plan_steps(c):
        total += packer.batch(step)["input_ids"].numel()
        for name, share in c.stages[0].mixture.items():
            assert abs(packer.consumed[0][name] - share * total) <= 12
    assert total == 1200


# -- supply -------------------------------------------------------------------------------------------------------
def test_a_stage_longer_than_its_data_is_refused_or_repeats():
    with pytest.raises(ValueError, match="'s1' needs about 120 tokens of 'web' and 80 are left; set repeat: true"):
        Packer(curriculum({}, {}), {"web": source([20] * 10)})
    c = curriculum({}, {"repeat": True})
    packer = Packer(c, {"web": source([20] * 10)})
    seen = torch.cat([batch["input_ids"].flatten() for batch in batches(packer, c)]).bincount(minlength=920)
    assert seen.sum() == 240 and packer.passes() == {"web": 2}
    assert seen[seen > 0].min() >= 1 and (seen > 0).sum() == 200, "no document twice before all were once"


def test_a_stage_behind_one_that_repeats_has_what_its_last_pass_left():
    # 240 of 200 tokens: 160 are left, and 13 rows are 156.
    c = curriculum({"repeat": True, "tokens": 240}, {"tokens": 168})
    with pytest.raises(ValueError, match="'s1' needs about 168 tokens of 'web' and 160 are left"):
        Packer(c, {"web": source([20] * 10)})
    c = curriculum({"repeat": True, "tokens": 240}, {"tokens": 160})
    assert sum(batch["input_ids"].numel() for batch in batches(Packer(c, {"web": source([20] * 10)}), c)) == 240 + 156


def test_data_that_whole_groups_of_rows_would_use_up_are_refused_before_the_first_step():
    # 16 rows of 12 for four ranks are 192 tokens of the 180.
    c, web = curriculum(tokens=180, batch_tokens=96), {"web": source([20] * 9 + [10])}
    assert sum(step.tokens for step in plan_steps(c, 4)) == 192
    with pytest.raises(ValueError, match="'s0' needs about 192 tokens of 'web' and 190 are left"):
        Packer(c, web, row_multiple=4)


def test_what_every_stage_may_overshoot_adds_up():
    half = {"mixture": {"web": 0.5, "code": 0.5}}
    with pytest.raises(ValueError, match="'s1' needs about 84 tokens of 'web' and 80 are left"):
        Packer(curriculum(half, half), {"web": source([20] * 7), "code": source([400])})


def test_order_by_difficulty_needs_difficulty():
    with pytest.raises(ValueError, match="1 documents of 'web' have no difficulty"):
        Packer(curriculum(order="easy_to_hard"), {"web": source([400, 400], difficulty=[0.1, float("nan")])})
    with pytest.raises(ValueError, match="mixes in 'web', which is no source; use code"):
        Packer(curriculum(), {"code": source([400])})


# -- going on -----------------------------------------------------------------------------------------------------
def test_any_step_resumes_to_the_same_batch():
    c = curriculum(
        {"order": "shuffled"},
        {"order": "easy_to_hard", "repeat": True, "tokens": 240, "mixture": {"web": 0.5, "code": 0.5}},
        {"order": "shuffled", "repeat": True, "context": 24},
    )
    lengths = [3, 17, 9, 30, 1, 8, 40, 25, 12]
    sources = {
        "web": source(lengths, difficulty=lengths),
        "code": source([50, 30], difficulty=[0, 1]),
    }
    truth = batches(Packer(c, sources, seed=3), c)
    steps = list(plan_steps(c))
    running = Packer(c, sources, seed=3)
    for number in range(len(steps)):
        resumed = Packer(c, sources, seed=3)
        resumed.load_state(json.loads(json.dumps(running.state())))
        for step, expected in zip(steps[number : number + 3], truth[number : number + 3]):
            assert torch.equal(resumed.batch(step)["input_ids"], expected["input_ids"]), number
        running.batch(steps[number])
    assert running.passes()["web"] >= 2 and running.state()["stage"] == 2
    other = Packer(c, sources, seed=4)
    with pytest.raises(ValueError, match="with seed 3"):
        other.load_state(running.state())
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(truth, batches(other, c)))


def test_a_stage_that_ended_inside_a_document_resumes_with_its_rest():
    c = curriculum({"tokens": 24}, {"tokens": 48, "order": "shuffled"})
    sources = {"web": source([20] * 10)}
    steps = list(plan_steps(c))
    truth, running = Packer(c, sources), Packer(c, sources)
    for step in steps[:2]:
        truth.batch(step)
        running.batch(step)
    # Four tokens into the second document when the second stage began, and beyond it now.
    assert running.readers["web"].passages[0] == {"order": "as_is", "fresh": False, "taken": 1, "begun": 1}
    resumed = Packer(c, sources)
    resumed.load_state(json.loads(json.dumps(running.state())))
    assert resumed.readers["web"].order.tolist() == truth.readers["web"].order.tolist()
    assert torch.equal(resumed.batch(steps[2])["input_ids"], truth.batch(steps[2])["input_ids"])


def test_other_documents_or_another_tokenizer_do_not_go_on(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    c = curriculum(tokens=24)

    def packer(text, reader=tokenizer):
        file.write_bytes(line("one two three four five six seven " * 9) * 20 + line(text))
        return Packer(c, prepare(tmp_path / "cache", reader, {"web": [str(file)]}))

    state = packer("one two").state()
    packer("one two").load_state(state)  # another time of the file, the same text
    # As many documents and tokens.
    with pytest.raises(ValueError, match="The checkpoint read 'web' as .* give the --data and tokenizer of before"):
        packer("two one").load_state(state)
    with pytest.raises(ValueError, match="give the --data and tokenizer of before"):
        packer("one two", train_tokenizer(["other words\n" * 3], vocab_size=300)).load_state(state)


def test_ranks_and_micro_batches_share_a_step():
    c = curriculum(tokens=240, batch_tokens=48)
    steps = list(plan_steps(c, 4))
    web = {"web": source([20] * 30)}

    def of(rank, world, accumulation, flat=False):
        return list(Batches(Packer(c, web), steps, accumulation=accumulation, rank=rank, world=world, flat=flat))

    whole = [batch["input_ids"] for batch in of(0, 1, 1)]
    assert len(whole) == 5
    parts = [of(rank, 2, 2) for rank in range(2)]
    for number, expected in enumerate(whole):
        rows = [parts[rank][2 * number + micro]["input_ids"] for micro in range(2) for rank in range(2)]
        assert torch.equal(torch.cat(rows), expected)
    assert of(0, 2, 2, flat=True)[0]["input_ids"].shape == (1, 12)
