"""Do small classifiers tell texts apart, know how sure they are, and load without running anything?"""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, AxK1ForSequenceClassification
from trainers.text_classifier import (
    calibration_error,
    evaluate,
    fit_temperature,
    level,
    load_classifier,
    softmax,
    split,
    train_classifier,
)
from trainers.tokenizer import train_tokenizer

WORDS = {
    "nature": "river mountain forest bird cloud stone leaf rain".split(),
    "code": "def return self import class for in range".split(),
    "요리": "소금 설탕 냄비 국물 김치 볶다 끓이다 맛".split(),
}


def rows(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    labels = [rng.choice(list(WORDS)) for _ in range(count)]
    return [" ".join(rng.choices(WORDS[label], k=12)) for label in labels], labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "domain"
    return folder, train_classifier(folder, *rows(300))


def test_domains_are_told_apart_on_rows_held_out(trained):
    folder, result = trained
    assert result["macro_f1"] > 0.95 and 20 < result["rows"] < 120
    assert json.loads((folder / "evaluation.json").read_text()) == result
    classifier = load_classifier(folder)
    found = classifier.probabilities(["the river and the cloud", "소금 조금 볶다", "import self"])
    assert [classifier.labels[n] for n in found.argmax(-1)] == ["nature", "요리", "code"]
    assert found.sum(-1) == pytest.approx(1)


def test_loaded_judges_the_held_out_rows_as_training_did(trained):
    texts, labels = rows(300)
    held = split(texts)["test"]
    classifier = load_classifier(trained[0])
    again = evaluate(classifier, [texts[n] for n in held], [labels[n] for n in held])
    assert again.pop("f1") == pytest.approx(trained[1]["f1"], rel=1e-5)
    assert again == pytest.approx(
        {name: value for name, value in trained[1].items() if name != "f1"}, rel=1e-4, abs=1e-6
    )
    assert classifier.temperature != 1


def test_two_labels_keep_their_sides(tmp_path):
    texts, labels = rows(300)
    good = ["good" if label == "nature" else "bad" for label in labels]
    train_classifier(tmp_path / "quality", texts, good, order=["bad", "good"])
    classifier = load_classifier(tmp_path / "quality")
    assert level(classifier.probabilities(["river mountain forest", "import self class"])) == pytest.approx(
        [1, 0], abs=0.3
    )


def test_ordered_labels_rank_texts(tmp_path):
    """Numeric labels are ordered by value: 10 lies above 9."""
    rng = random.Random(1)
    texts, labels = [], []
    for _ in range(600):
        steps = rng.choice([1, 9, 10])
        texts.append(" ".join(f"step {rng.randrange(9)}" for _ in range(steps * 3)))
        labels.append(str(steps))
    result = train_classifier(tmp_path / "difficulty", texts, labels)
    assert load_classifier(tmp_path / "difficulty").labels == ["1", "9", "10"]
    assert result["rank_correlation"] > 0.9


def test_temperature_mends_overconfidence():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 4_000)
    # Right with the probability that a softmax of these logits states; then four times as sure.
    honest = rng.normal(size=(4_000, 3)) + 1.5 * np.eye(3)[truth]
    temperature = fit_temperature(honest * 4, truth)
    assert (
        calibration_error(softmax(honest * 4 / temperature), truth)
        < 0.03
        < calibration_error(softmax(honest * 4), truth)
    )
    assert fit_temperature(honest * 8, truth) == pytest.approx(2 * temperature, rel=1e-3)


def test_calibration_error_by_hand():
    probabilities = np.array([[0.85, 0.15], [0.85, 0.15], [0.35, 0.65], [0.35, 0.65]])
    # Confident 0.85 and right once in two, confident 0.65 and right both times: (2 * 0.35 + 2 * 0.35) / 4.
    assert calibration_error(probabilities, np.array([0, 1, 1, 1])) == pytest.approx(0.35)


def test_copies_never_stand_on_both_sides():
    texts = [f"text {number % 50}" for number in range(500)]
    parts = split(texts)
    assert sum(map(len, parts.values())) == 500 and all(parts.values())
    sides = [{texts[n] for n in rows} for rows in parts.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_nothing_in_a_file_is_run(tmp_path, trained):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "linear.safetensors").write_bytes(pickle.dumps(Evil()))
    (folder / "classifier.json").write_text('{"kind": "linear", "labels": ["a", "b"], "temperature": 1}')
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        load_classifier(folder)
    (folder / "classifier.json").unlink()
    AxK1Config.preset("nano", num_labels=2).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OSError, match="safetensors"):
        load_classifier(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_shape_are_refused(tmp_path, trained):
    arrays = load_file(trained[0] / "linear.safetensors")
    save_file({**arrays, "weight": arrays["weight"][:, :9].copy()}, tmp_path / "linear.safetensors")
    (tmp_path / "classifier.json").write_text((trained[0] / "classifier.json").read_text())
    with pytest.raises(ValueError, match="train it again"):
        load_classifier(tmp_path)


def test_what_is_damaged_is_named(tmp_path, trained):
    weights, card = tmp_path / "linear.safetensors", tmp_path / "classifier.json"
    weights.write_bytes((trained[0] / "linear.safetensors").read_bytes()[:1000])
    card.write_text((trained[0] / "classifier.json").read_text())
    with pytest.raises(ValueError, match="linear.safetensors is damaged"):
        load_classifier(tmp_path)
    for content in ('{"kind"', "[1]", '{"labels": ["a", "b"]}'):
        card.write_text(content)
        with pytest.raises(ValueError, match="classifier.json is damaged"):
            load_classifier(tmp_path)


def test_a_model_without_trained_classes_is_refused(tmp_path):
    AxK1ForCausalLM(AxK1Config.preset("nano", num_hidden_layers=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no score.weight, so it is no trained classifier; train one with --base"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("texts", "labels", "order", "complaint"),
    [
        (["a", "b"], ["x", "x"], None, "two or more"),
        (["a", "b"], ["x", "y"], ["x", "z"], "the same in both"),
        (["a", "b"], ["x", "y"], None, "too few"),
    ],
)
def test_bad_rows_are_refused(tmp_path, texts, labels, order, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_classifier(tmp_path / "out", texts, labels, order)
    assert not (tmp_path / "out").exists()


def test_an_unknown_label_is_refused(trained):
    with pytest.raises(ValueError, match="labels \\['sport'\\] that were not trained"):
        evaluate(load_classifier(trained[0]), ["goal"], ["sport"])


def test_our_own_sequence_classifier_takes_the_same_place(tmp_path):
    texts, labels = rows(160)
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    config = AxK1Config.preset("nano", vocab_size=len(tokenizer), num_labels=3, num_hidden_layers=2)
    AxK1ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    result = train_classifier(
        tmp_path / "out",
        texts,
        labels,
        base=tmp_path / "base",
        epochs=3,
        learning_rate=3e-3,
        batch_size=16,
        max_tokens=64,
    )
    classifier = load_classifier(tmp_path / "out")
    assert result["macro_f1"] > 0.9 and type(classifier.model) is AxK1ForSequenceClassification
    # Order of rows and padding beside longer ones change nothing.
    two = classifier.probabilities([texts[0], texts[0] * 3])
    assert two[0] == pytest.approx(classifier.probabilities([texts[0]])[0], abs=1e-5)
