"""Which label does a text deserve, and how sure is that? Small trainable classifiers: domain, difficulty, quality.

By default logistic regression over hashed character n-grams and a few readability measures: trained in seconds, kept as
safetensors and JSON, so that loading one never runs what it holds (scikit-learn's own files are pickles). Any Transformers
sequence classifier can take its place. Probabilities are calibrated by a temperature (Guo et al. 2017, arXiv 1706.04599).
"""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from trainers.corpus import files_of, read_documents

# A label shows in the first pages; a document of 100 MB costs no more than one of them.
MAX_CHARACTERS = 4_000
FEATURES = 2**18
MEASURES = 8
CARD = "classifier.json"
# Of all rows; which rows, their text decides, so that copies of one never stand on both sides.
CALIBRATION_SHARE, TEST_SHARE = 0.1, 0.2


def measures(text: str) -> list[float]:
    """Length and readability, which n-gram frequencies cannot show: they are the same for a text and its double."""
    words = re.findall(r"\w+", text) or [""]
    sentences = [part for part in re.split(r"[.!?。\n]+", text) if part.strip()] or [""]
    length = max(1, len(text))
    return [
        math.log1p(length),
        sum(map(len, words)) / len(words),
        math.log1p(len(words) / len(sentences)),
        len(set(words)) / len(words),
        sum(c.isdigit() for c in text) / length,
        sum(c.isupper() for c in text) / length,
        sum(not c.isalnum() and not c.isspace() for c in text) / length,
        text.count("\n") / length,
    ]


def features(texts: Sequence[str]):
    """Sparse fp64 [texts, FEATURES + MEASURES]; nothing in it is learned, so classifiers in turn share those of one batch."""
    return _features(tuple(text[:MAX_CHARACTERS] for text in texts))


@lru_cache(1)
def _features(texts: tuple[str, ...]):
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(
        analyzer="char_wb", ngram_range=(1, 4), n_features=FEATURES, alternate_sign=False, lowercase=False
    )
    return hstack([hashed.transform(texts), csr_matrix([measures(text) for text in texts])], format="csr")


@dataclass
class LinearClassifier:
    labels: list[str]
    weight_CF: np.ndarray  # fp32, over standardised measures
    bias_C: np.ndarray
    center_M: np.ndarray
    scale_M: np.ndarray
    temperature: float = 1.0

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """fp64 [texts, labels]."""
        return _standardised(features(texts), self.center_M, self.scale_M) @ self.weight_CF.T + self.bias_C

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        return softmax(self.logits(texts) / self.temperature)

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        arrays = {"weight": self.weight_CF, "bias": self.bias_C, "center": self.center_M, "scale": self.scale_M}
        save_file(
            {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()},
            folder / "linear.safetensors",
        )
        _write_card(folder, "linear", self.labels, self.temperature)


def _standardised(rows, center_M: np.ndarray, scale_M: np.ndarray):
    """The measures to zero mean and unit variance; the hashed part stays sparse."""
    from scipy.sparse import csr_matrix, hstack

    dense = (rows[:, FEATURES:].toarray() - center_M) / scale_M
    # Far outside of what was trained on, a measure must not overrule the words.
    return hstack([rows[:, :FEATURES], csr_matrix(dense.clip(-4, 4) * 0.1)], format="csr")


def fit_linear(texts: Sequence[str], labels: Sequence[str], order: Sequence[str], *, strength: float = 30.0):
    """Logistic regression; `order` names the classes from first to last, `strength` is the inverse of the L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    rows = features(texts)
    dense = rows[:, FEATURES:].toarray()
    center_M, scale_M = dense.mean(0), dense.std(0) + 1e-6
    number = {label: index for index, label in enumerate(order)}
    model = LogisticRegression(C=strength, max_iter=300)
    model.fit(_standardised(rows, center_M, scale_M), [number[label] for label in labels])
    weight_CF, bias_C = model.coef_, model.intercept_
    if len(order) == 2:
        # scikit-learn keeps one row for two classes: the second's log-odds.
        weight_CF, bias_C = np.vstack([0 * weight_CF, weight_CF]), np.concatenate([0 * bias_C, bias_C])
    return LinearClassifier(list(order), weight_CF.astype(np.float32), bias_C.astype(np.float32), center_M, scale_M)


@dataclass
class TransformersClassifier:
    """Any sequence classifier of Transformers, `AxK1ForSequenceClassification` included."""

    labels: list[str]
    model: object
    tokenizer: object
    temperature: float = 1.0
    batch_size: int = 16
    max_tokens: int = 512

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        # Texts of like length together: less padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found = np.zeros((len(texts), len(self.labels)))
        self.model.eval()
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[index][: 16 * self.max_tokens] for index in chosen],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.model.device)
            batch.pop("token_type_ids", None)
            with torch.inference_mode():
                found[chosen] = self.model(**batch).logits.float().cpu().numpy()
        return found

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        return softmax(self.logits(texts) / self.temperature)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        _write_card(folder, "transformers", self.labels, self.temperature)


def fit_transformers(
    base: str | Path,
    texts: Sequence[str],
    labels: Sequence[str],
    order: Sequence[str],
    *,
    epochs: float = 3.0,
    learning_rate: float = 2e-5,
    batch_size: int = 16,
    max_tokens: int = 512,
    seed: int = 0,
) -> TransformersClassifier:
    """Fine-tune `base` (a folder or Hub name, with its tokenizer) on labelled texts."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    import modeling_axk1  # noqa: F401  registers AxK1ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    names = {"id2label": dict(enumerate(order)), "label2id": {label: index for index, label in enumerate(order)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(order), pad_token_id=tokenizer.pad_token_id, use_safetensors=True, **names
    )
    rows = [
        {
            **tokenizer(text[: 16 * max_tokens], truncation=True, max_length=max_tokens),
            "labels": names["label2id"][label],
        }
        for text, label in zip(texts, labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, settings, data_collator=collator, train_dataset=Dataset.from_list(rows)).train()
    return TransformersClassifier(list(order), model, tokenizer, batch_size=batch_size, max_tokens=max_tokens)


def load_classifier(folder: str | Path) -> LinearClassifier | TransformersClassifier:
    """What `train_classifier` wrote, or any folder of a Transformers sequence classifier in safetensors. Runs none of it.

    ValueError for what is damaged, and for a model whose classes were never trained, such as a causal one.
    """
    folder = Path(folder)
    card = _read_card(folder) if (folder / CARD).exists() else {"kind": "transformers"}
    if card["kind"] == "linear":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / "linear.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder}/linear.safetensors is damaged ({error}); copy it again, or train anew.") from error
        shape = (len(card["labels"]), FEATURES + MEASURES)
        if arrays["weight"].shape != shape:
            raise ValueError(f"{folder} holds weights of shape {arrays['weight'].shape}, not {shape}; train it again.")
        return LinearClassifier(
            card["labels"], arrays["weight"], arrays["bias"], arrays["center"], arrays["scale"], card["temperature"]
        )
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds neither {CARD} nor config.json; train one with `axk1 curate train-classifier`."
        )
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import modeling_axk1  # noqa: F401  registers AxK1ForSequenceClassification

    model, found = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} has no {missing[0]}, so it is no trained classifier; train one with --base {folder}.")
    if model.config.num_labels < 2:
        raise ValueError(f"{folder} has {model.config.num_labels} label; a classifier needs two or more.")
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return TransformersClassifier(labels, model, tokenizer, card.get("temperature", 1.0))


def labels_of(folder: str | Path) -> list[str]:
    """The labels of what `load_classifier` would load, without its weights."""
    folder = Path(folder)
    if (folder / CARD).exists():
        return _read_card(folder)["labels"]
    from transformers import AutoConfig

    import modeling_axk1  # noqa: F401  registers AxK1Config

    return list(AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label.values())


def _read_card(folder: Path) -> dict:
    try:
        card = json.loads((folder / CARD).read_text())
        return {name: card[name] for name in ("kind", "labels", "temperature")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CARD} is damaged; copy it again, or train anew.") from error


def _write_card(folder: Path, kind: str, labels: Sequence[str], temperature: float) -> None:
    card = {"kind": kind, "labels": list(labels), "temperature": temperature}
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def level(probabilities: np.ndarray) -> np.ndarray:
    """Where between the first label (0) and the last (1) a text stands: the expectation over ordered labels."""
    steps = np.arange(probabilities.shape[-1])
    return probabilities @ steps / max(1, steps[-1])


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """The temperature that makes `truth` likeliest; > 1 where the classifier was too sure of itself."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits / math.exp(log_temperature))[np.arange(len(truth)), truth]
        return -np.log(chosen.clip(1e-12)).mean()

    return float(math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, averaged over bins of confidence."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == truth
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence[place == b] - right[place == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(truth))


def evaluate(classifier, texts: Sequence[str], labels: Sequence[str]) -> dict:
    """Accuracy, macro F1, F1 of each label, calibration error before and after the temperature, and the rank correlation
    of `level` with the true label's place (of use where labels are ordered). ValueError for a label not trained on."""
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score

    unknown = set(labels) - set(classifier.labels)
    if unknown or not texts:
        raise ValueError(
            f"Nothing to evaluate, or labels {sorted(unknown)} that were not trained; give rows of {classifier.labels}."
        )
    truth = np.array([classifier.labels.index(label) for label in labels])
    logits = classifier.logits(texts)
    calibrated = softmax(logits / classifier.temperature)
    each = f1_score(truth, calibrated.argmax(-1), labels=range(len(classifier.labels)), average=None, zero_division=0)
    present = sorted(set(truth.tolist()))
    return {
        "rows": len(texts),
        "accuracy": float((calibrated.argmax(-1) == truth).mean()),
        "macro_f1": float(each[present].mean()),
        "f1": {classifier.labels[number]: float(each[number]) for number in present},
        "calibration_error_raw": calibration_error(softmax(logits), truth),
        "calibration_error": calibration_error(calibrated, truth),
        "rank_correlation": float(spearmanr(level(calibrated), truth).statistic) if len(present) > 1 else None,
    }


def split(texts: Sequence[str]) -> dict[str, list[int]]:
    """Row numbers to train on, to calibrate on and to test on, by a hash of the text."""
    parts = {"train": [], "calibration": [], "test": []}
    for number, text in enumerate(texts):
        place = int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest(), "big") / 2**48
        part = "test" if place < TEST_SHARE else "calibration" if place < TEST_SHARE + CALIBRATION_SHARE else "train"
        parts[part].append(number)
    return parts


def train_classifier(
    out: Path,
    texts: Sequence[str],
    labels: Sequence[str],
    order: Sequence[str] | None = None,
    base: str | None = None,
    **settings,
) -> dict:
    """Train, calibrate and judge a classifier, write it to the folder `out`, and return how it did on rows held out.

    `order`: the labels from lowest to highest, for difficulty and quality (default: sorted, numbers by value).
    `base`: a Transformers model to fine-tune (default: the linear one); `settings` go to its fit.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; name another folder or remove it.")
    order = list(order or sorted(set(labels), key=_by_value))
    if set(order) != set(labels) or len(order) < 2:
        raise ValueError(f"The labels are {sorted(set(labels))}, the order {order}; two or more, and the same in both.")
    parts = split(texts)
    chosen = {part: ([texts[n] for n in rows], [labels[n] for n in rows]) for part, rows in parts.items()}
    if set(chosen["train"][1]) != set(order) or not all(rows for rows in parts.values()):
        raise ValueError(
            f"{len(texts)} rows are too few to hold some of {len(order)} labels out; give 50 or more each."
        )
    if base:
        classifier = fit_transformers(base, *chosen["train"], order, **settings)
    else:
        classifier = fit_linear(*chosen["train"], order, **settings)
    held_texts, held_labels = chosen["calibration"]
    classifier.temperature = fit_temperature(
        classifier.logits(held_texts), np.array([order.index(label) for label in held_labels])
    )
    result = evaluate(classifier, *chosen["test"])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        classifier.save(partial)
        (partial / "evaluation.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def _by_value(label: str) -> tuple:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def read_rows(paths: Sequence[str], text_key: str, label_key: str) -> tuple[list[str], list[str]]:
    """Texts and labels of JSONL or Parquet files; ValueError names how many rows lack a label, if any does."""
    counts: Counter = Counter()
    rows = [row for path in paths for row in read_documents(files_of(path), counts, text_key=text_key)]
    labelled = [(row.text, str(row.fields[label_key])) for row in rows if row.fields.get(label_key) is not None]
    if not rows or len(labelled) < len(rows):
        raise ValueError(
            f"{len(rows) - len(labelled)} of {len(rows)} rows lack {label_key!r} (read: {dict(+counts)}); mend them."
        )
    return [text for text, _ in labelled], [label for _, label in labelled]


def run_train(
    out: Path, data: list[str], text_key: str, label_key: str, order: str | None, base: str | None, settings: dict
) -> None:
    """`axk1 curate train-classifier`."""
    texts, labels = read_rows(data, text_key, label_key)
    result = train_classifier(out, texts, labels, order.split(",") if order else None, base, **settings)
    print(json.dumps(result, indent=2, ensure_ascii=False))


def run_eval(classifier: Path, data: list[str], text_key: str, label_key: str) -> None:
    """`axk1 curate eval-classifier`."""
    print(
        json.dumps(
            evaluate(load_classifier(classifier), *read_rows(data, text_key, label_key)), indent=2, ensure_ascii=False
        )
    )
