"""What happens to one document? The steps of curation, each a datatrove block: read, judge, count, draw.

A step that drops a document says why, in its statistics and beside the document; one that keeps it leaves its verdict in
`metadata["verdicts"]`. Deduplication is datatrove's own (`trainers.curation` strings it in).
"""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import fsspec
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer

from trainers.corpus import MAX_DOCUMENT_BYTES, files_of, format_of, read_records, whole_rows
from trainers.text_classifier import MAX_CHARACTERS, level, load_classifier

# Scripts without blanks between words, and Korean, whose words carry their particles: a character is a word.
CHARACTER = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3]"
WORD = re.compile(rf"{CHARACTER}|(?:(?!{CHARACTER})\w)+")
# Brown et al. 2020 (arXiv 2005.14165) decontaminated GPT-3 by 13-grams; a shorter question counts as one gram.
DECONTAMINATION_WORDS, SHORTEST_QUESTION_WORDS = 13, 5

GOPHER = {"quality": GopherQualityFilter, "repetition": GopherRepetitionFilter}


class Words(WordTokenizer):
    """Words of any language without a model: datatrove's own tokenizers want spaCy or NLTK's downloads."""

    def word_tokenize(self, text: str) -> list[str]:
        # datatrove takes accents apart before it asks, and Korean's syllables into letters with them.
        return WORD.findall(unicodedata.normalize("NFC", text))

    def sent_tokenize(self, text: str) -> list[str]:
        return [part.strip() for part in re.split(r"(?<=[.!?。])\s+|\n+", text) if part.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("No step of ours asks for spans.")


class BlankWords(Words):
    """Words between blanks, as the heuristics of Gopher count them."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


class DroppedWriter(JsonlWriter):
    """Keeps what a step dropped, beside the reason: `reason` where the step (datatrove's deduplication) names none."""

    def __init__(self, folder: str, step: str, reason: str | None = None):
        super().__init__(f"{folder}/{step}", compression=None, expand_metadata=True)
        self.step, self.reason = step, reason

    def write(self, document: Document, rank: int = 0, **kwargs):
        if self.reason:
            document.metadata["filter_reason"] = self.reason
        document.metadata["dropped_by"] = self.step
        super().write(document, rank, **kwargs)


def keep(document: Document, step: str, verdict: str) -> bool:
    document.metadata["verdicts"][step] = verdict
    return True


class Kept(PipelineStep):
    """Leaves the verdict of a step of datatrove's on what came through it."""

    name, type = "verdict", "curation"

    def __init__(self, step: str):
        super().__init__()
        self.step = step

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            keep(document, self.step, "kept")
            yield document


class Reader(PipelineStep):
    """Documents of any format from files dealt out over the tasks; what cannot be read is counted by reason.

    `files`: (source, path, column of the text). `declared`: what is known of a source's documents (domain, language).
    """

    name, type = "read", "curation"

    def __init__(
        self,
        files: Sequence[tuple[str, str, str]],
        declared: Mapping[str, Mapping[str, str]],
        max_bytes: int = MAX_DOCUMENT_BYTES,
    ):
        super().__init__()
        self.files, self.declared, self.max_bytes = list(files), dict(declared), max_bytes

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for source, path, text_key in self.files[rank::world_size]:
            counts: Counter = Counter()
            with fsspec.open(path, "rb", compression="infer") as file:
                records = read_records(file, format_of(path), counts, text_key=text_key, max_bytes=self.max_bytes)
                for record in records:
                    origin = {"source": source, "file": path, "position": record.position}
                    # One JSON text, whatever the columns: a file of documents has one schema, and no value breaks the writer.
                    columns = json.dumps(record.fields, default=str)
                    metadata = {**origin, **self.declared[source], "columns": columns, "verdicts": {}}
                    yield Document(record.text, f"{source}/{Path(path).name}/{record.position}", metadata=metadata)
            for reason, count in counts.items():
                self.stat_update(reason, value=count)


class Heuristics(BaseFilter):
    """Gopher's rules (Rae et al. 2021, arXiv 2112.11446; datatrove's filters), with thresholds for each source."""

    name, type = "heuristics", "curation"

    def __init__(self, rules: Mapping[str, Mapping], dropped: str):
        super().__init__(DroppedWriter(dropped, self.name))
        self.filters = {source: _gopher(**thresholds) for source, thresholds in rules.items()}

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        for rules in self.filters[document.metadata["source"]]:
            kept, reason = get_filter_result(rules.filter(document))
            if not kept:
                return False, reason
        return keep(document, self.name, "kept")


def _gopher(quality: Mapping | None = None, repetition: Mapping | None = None) -> list[BaseFilter]:
    """A part that is not named is not applied. Stop words are English, so they are asked for only by name."""
    filters: list[BaseFilter] = []
    if quality is not None:
        filters.append(GopherQualityFilter(**{"min_stop_words": None, **quality}, language=BlankWords()))
    if repetition is not None:
        filters.append(GopherRepetitionFilter(**repetition, language=BlankWords()))
    return filters


@lru_cache(1)
def language_identifier():
    """Unpacked once a process: that takes seconds."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Language(BaseFilter):
    """Language by py3langid, whose model is in its wheel; a source's declared language is believed."""

    name, type = "language", "curation"

    def __init__(self, languages: Sequence[str], minimum: float, dropped: str):
        super().__init__(DroppedWriter(dropped, self.name))
        self.languages, self.minimum = list(languages), minimum

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        if "language" in document.metadata:
            return keep(document, self.name, "declared")
        language, score = language_identifier().classify(document.text[:MAX_CHARACTERS])
        document.metadata |= {"language": language, "language_score": round(float(score), 4)}
        if language not in self.languages:
            return False, f"language {language}"
        if score < self.minimum:
            return False, "language unsure"
        return keep(document, self.name, f"{language} {score:.2f}")


class Classified(BaseFilter):
    """Marks documents by a trained classifier (`trainers.text_classifier`).

    `domain`: the likeliest label, unless the source declares one. `difficulty`, `quality`: where between its first and its
    last label a document stands, 0 to 1; below `minimum` it is dropped.
    """

    type = "curation"

    def __init__(self, field: str, model: str, dropped: str, minimum: float = 0.0):
        super().__init__(DroppedWriter(dropped, field), batch_size=64)
        self.name, self.field, self.model, self.minimum = field, field, model, minimum

    @cached_property
    def classifier(self):
        return load_classifier(self.model)

    def filter(self, document: Document):
        return self.filter_batch([document])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        probabilities = self.classifier.probabilities([document.text for document in batch])
        mark = self._name if self.field == "domain" else self._place
        return [mark(document, row) for document, row in zip(batch, probabilities)]

    def _name(self, document: Document, probabilities) -> bool:
        if "domain" in document.metadata:
            return keep(document, self.field, "declared")
        best = int(probabilities.argmax())
        document.metadata |= {
            "domain": self.classifier.labels[best],
            "domain_score": round(float(probabilities[best]), 4),
        }
        return keep(document, self.field, f"{self.classifier.labels[best]} {probabilities[best]:.2f}")

    def _place(self, document: Document, probabilities) -> bool | tuple[bool, str]:
        place = round(float(level(probabilities)), 4)
        document.metadata[self.field] = place
        if place < self.minimum:
            return False, f"{self.field} below {self.minimum:g}"
        return keep(document, self.field, f"{place:.2f}")


class Decontaminated(BaseFilter):
    """Drops what shares a run of 13 words with an evaluation set (its own short questions whole).

    datatrove's block wants lighteval; evaluation sets are files here, all of whose text counts. Numbers are kept apart:
    the same sum with other numbers is another problem.
    """

    name, type = "decontamination", "curation"

    def __init__(self, evaluations: Sequence[str], dropped: str, words: int = DECONTAMINATION_WORDS):
        super().__init__(DroppedWriter(dropped, self.name))
        self.evaluations, self.words = list(evaluations), words

    @cached_property
    def grams(self) -> dict[int, dict[int, str]]:
        """Length in words -> hash of the gram -> the evaluation set it is from."""
        found: dict[int, dict[int, str]] = {}
        for path in self.evaluations:
            for text in evaluation_texts(path):
                words = plain_words(text)
                size = min(self.words, len(words))
                if size >= SHORTEST_QUESTION_WORDS:
                    found.setdefault(size, {}).update(dict.fromkeys(hashed_grams(words, size), Path(path).name))
        return found

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        words = plain_words(document.text)
        for size, known in self.grams.items():
            for gram in hashed_grams(words, size):
                if gram in known:
                    return False, f"in {known[gram]}"
        return keep(document, self.name, "kept")


def plain_words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def hashed_grams(words: Sequence[str], size: int) -> Iterator[int]:
    for start in range(len(words) - size + 1):
        gram = " ".join(words[start : start + size]).encode(errors="replace")
        yield int.from_bytes(hashlib.blake2b(gram, digest_size=8).digest(), "little")


def evaluation_texts(path: str) -> Iterator[str]:
    """Every text of an evaluation set's rows: question, prompt, answer and the turns of a chat alike.

    ValueError if something of it cannot be read, or no text is long enough to be found again: it would protect nothing.
    """
    unreadable: Counter = Counter()
    longest = 0
    for name in files_of(path):
        with fsspec.open(str(name), "rb", compression="infer") as file:
            for row in whole_rows(file, format_of(name), unreadable):
                for text in _strings(row):
                    longest = max(longest, len(plain_words(text)))
                    yield text
    if unreadable:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in unreadable.items())
        raise ValueError(f"The evaluation set {path} cannot be read whole ({reasons}); mend it.")
    if longest < SHORTEST_QUESTION_WORDS:
        raise ValueError(
            f"The evaluation set {path} holds no text of {SHORTEST_QUESTION_WORDS} words or more; name another file."
        )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


class Tally(PipelineStep):
    """Counts documents and characters of every domain; written when the task ends."""

    name, type = "tally", "curation"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        found: dict[str, dict[str, int]] = {}
        for document in data:
            row = found.setdefault(domain_of(document), {"documents": 0, "characters": 0})
            row["documents"] += 1
            row["characters"] += len(document.text)
            yield document
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        Path(self.folder, f"{rank:05d}.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")


def domain_of(document: Document) -> str:
    return document.metadata.get("domain", "unknown")


def read_tally(folder: str | Path) -> dict[str, dict[str, int]]:
    """Domain -> `documents` and `characters`, summed over tasks."""
    total: dict[str, dict[str, int]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        for domain, row in json.loads(path.read_text()).items():
            known = total.setdefault(domain, {"documents": 0, "characters": 0})
            total[domain] = {what: known[what] + row[what] for what in known}
    return dict(sorted(total.items()))


def repeats(available: Mapping[str, int], mixture: Mapping[str, float], max_repeats: float) -> dict[str, float]:
    """How often to take each domain so that their shares become `mixture`'s: as much text as `max_repeats` allows.

    available: characters of each domain. A domain that `mixture` does not name is left out. ValueError for one that it names
    and that has no text.
    """
    missing = [domain for domain, share in mixture.items() if share > 0 and not available.get(domain)]
    if missing:
        raise ValueError(
            f"The mixture asks for {', '.join(missing)}, of which no text is left; leave it out or add some."
        )
    # No more text than there is, and no domain more often than allowed.
    total = min(
        sum(available[domain] for domain, share in mixture.items() if share > 0),
        *(max_repeats * available[domain] / share for domain, share in mixture.items() if share > 0),
    )
    return {domain: total * share / available[domain] for domain, share in mixture.items() if share > 0}


class Mixture(PipelineStep):
    """Draws each domain as often as its share of the mixture asks; 2.3 times means twice, and a third time for 30%.

    Which documents, a hash of their id and the seed decide: the same in any order and number of tasks.
    """

    name, type = "mixture", "curation"

    def __init__(self, tally: str, mixture: Mapping[str, float] | None, max_repeats: float, seed: int):
        super().__init__()
        self.tally, self.mixture, self.max_repeats, self.seed = tally, mixture, max_repeats, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        available = {domain: row["characters"] for domain, row in read_tally(self.tally).items()}
        wanted = repeats(available, self.mixture, self.max_repeats) if self.mixture else dict.fromkeys(available, 1.0)
        for document in data:
            rate = wanted.get(domain_of(document), 0.0)
            copies = int(rate) + (random.Random(f"{self.seed} {document.id}").random() < rate % 1)
            self.stat_update("total")
            self.stat_update("drawn", value=copies)
            if not copies:
                self.stat_update("dropped", "dropped_mixture")
            for copy in range(copies):
                drawn = Document(document.text, document.id, metadata={**document.metadata, "copy": copy})
                drawn.metadata["verdicts"] = {**document.metadata["verdicts"], self.name: f"{rate:.2f}"}
                # Listed by name, files go from simple to hard, and a repeat never follows its first.
                drawn.metadata["order"] = f"{min(9, int(10 * document.metadata.get('difficulty', 0)))}-{copy}"
                yield drawn


class DocumentWriter(JsonlWriter):
    """JSON lines of `id`, `text` and the metadata as columns of their own, in files that sort from simple to hard."""

    def __init__(self, folder: str):
        super().__init__(folder, "difficulty-${order}-${rank}.jsonl", compression=None, expand_metadata=True)
