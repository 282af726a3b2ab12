"""How do files become tokens on disk? Each source once: read, tokenised, written as one memory-mapped array with its documents.

A document is what corpus.py reads, with its `domain` and `difficulty` as curation writes them. What cannot be read is counted by
reason and told. Done once for given files and tokenizer: a folder a source, whole or not at all.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from trainers.corpus import Record, files_of, read_documents, unread
from trainers.tokenizer import CONTROL_TOKENS, END_OF_TEXT

# Longer texts are tokenised piece by piece: a tokenizer keeps some hundred bytes a token until it has read all of a text.
PIECE_CHARACTERS = 100_000
# Texts handed to the tokenizer at a time, which reads them in parallel.
BATCH_CHARACTERS = 500_000
# Goes up with what is written, so that folders of an earlier version are not taken for this one's.
LAYOUT = 2
UNKNOWN_DIFFICULTY = float("nan")


@dataclass(frozen=True)
class Document:
    text: str
    domain: str | None
    difficulty: float


@dataclass(frozen=True)
class Source:
    """One source's tokens: `tokens` uint32 end to end, document i is tokens[starts[i]:starts[i + 1]], its end token included.

    checksum: SHA-256 over tokens, starts and difficulty where `prepare` wrote them.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    difficulty: np.ndarray
    counts: Mapping[str, int]
    checksum: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def identity(self) -> dict[str, int | str]:
        """The same for the same documents, wherever they lie."""
        return {"documents": len(self), "tokens": len(self.tokens), "checksum": self.checksum}


# -- reading ------------------------------------------------------------------------------------------------------
def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files of all patterns (globs, files, folders), sorted. ValueError for a pattern without any."""
    return sorted({file for pattern in patterns for file in files_of(pattern)})


def document_of(record: Record) -> Document:
    """`domain` and `difficulty` are columns, as `axk1 curate` writes them, or in a column `metadata`, as datatrove does."""
    metadata = record.fields.get("metadata")
    columns = {**(metadata if isinstance(metadata, Mapping) else {}), **record.fields}
    difficulty = columns.get("difficulty")
    known = isinstance(difficulty, (int, float)) and not isinstance(difficulty, bool)
    return Document(record.text, columns.get("domain"), float(difficulty) if known else UNKNOWN_DIFFICULTY)


# -- tokenising ---------------------------------------------------------------------------------------------------
def pieces_of(text: str) -> list[str]:
    """The text in pieces of at most PIECE_CHARACTERS, cut behind a line's end or a space where there is one."""
    pieces, begin = [], 0
    while len(text) - begin > PIECE_CHARACTERS:
        limit = begin + PIECE_CHARACTERS
        line = text.rfind("\n", begin + PIECE_CHARACTERS // 2, limit)
        cut = line if line >= 0 else text.rfind(" ", begin + PIECE_CHARACTERS // 2, limit)
        end = cut + 1 if cut >= 0 else limit
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def end_of_text(tokenizer) -> int | None:
    """The token that parts documents: `<|endoftext|>` where there is one, as the end of a turn is no end of a document."""
    return tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)


def text_encoder(tokenizer) -> Tokenizer:
    """The tokenizer for text that nobody vouches for: a literal `<|im_end|>` or `<think>` in it is read as its characters."""
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in table["added_tokens"]:
        token["special"] = token["special"] or token["content"] in CONTROL_TOKENS
    encoder = Tokenizer.from_str(json.dumps(table))
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True
    return encoder


class TokenWriter:
    """Appends documents to `folder`: tokens.bin as they come, documents.npz at the end."""

    def __init__(self, folder: Path, tokenizer):
        folder.mkdir(parents=True)
        self.folder, self.encoder, self.end = folder, text_encoder(tokenizer), end_of_text(tokenizer)
        self.file = (folder / "tokens.bin").open("wb")
        self.lengths: list[int] = []
        self.difficulty: list[float] = []
        self.counts: Counter = Counter()
        self.digest = hashlib.sha256()
        self.waiting: list[Document] = []
        self.waiting_characters = 0

    def add(self, document: Document) -> None:
        self.waiting.append(document)
        self.waiting_characters += len(document.text)
        if self.waiting_characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        short = [d.text for d in self.waiting if len(d.text) <= PIECE_CHARACTERS]
        encoded = iter(self.encode(short)) if short else iter(())
        for document in self.waiting:
            if len(document.text) <= PIECE_CHARACTERS:
                written = self.write([next(encoded)])
            else:
                self.counts["in pieces"] += 1
                written = self.write(self.encode([piece])[0] for piece in pieces_of(document.text))
            self.lengths.append(written)
            self.difficulty.append(document.difficulty)
        self.waiting, self.waiting_characters = [], 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def write(self, parts: Iterable[list[int]]) -> int:
        written = 0
        for part in (*parts, [self.end]):
            tokens = np.asarray(part, dtype=np.uint32)
            self.digest.update(tokens)
            tokens.tofile(self.file)
            written += len(part)
        return written

    def close(self) -> None:
        self.flush()
        self.file.close()
        starts = np.concatenate(([0], np.cumsum(np.asarray(self.lengths, dtype=np.int64))))
        difficulty = np.asarray(self.difficulty, dtype=np.float32)
        self.digest.update(starts)
        self.digest.update(difficulty)
        checksum = np.asarray(self.digest.hexdigest())
        np.savez(self.folder / "documents.npz", starts=starts, difficulty=difficulty, checksum=checksum)
        (self.folder / "counts.json").write_text(json.dumps(dict(self.counts)))


def prepare(
    folder: Path, tokenizer, sources: Mapping[str, Sequence[str]], shared: Sequence[str] = ()
) -> dict[str, Source]:
    """Tokens of every source under `folder`, made unless an earlier run made them of the same files.

    sources: name -> its files, or none: then those documents of `shared` whose domain is the name.
    ValueError for a source without any document, and for a tokenizer without an end-of-text token.
    """
    if end_of_text(tokenizer) is None:
        raise ValueError("The tokenizer has no end-of-text token to part documents by; set eos_token.")
    own = {name: find_files(files) for name, files in sources.items() if files}
    by_domain = [name for name, files in sources.items() if not files]
    if by_domain and not shared:
        raise ValueError(f"The source {by_domain[0]!r} has no files; list them under sources, or give --data.")
    ready = {name: made(folder, tokenizer, [name], files, by_domain=False)[name] for name, files in own.items()}
    if by_domain:
        ready |= made(folder, tokenizer, by_domain, find_files(shared), by_domain=True)
    return {name: ready[name] for name in sources}


def made(folder: Path, tokenizer, names: Sequence[str], files: Sequence[Path], by_domain: bool) -> dict[str, Source]:
    """These sources of these files: opened if they are there already, else written first."""
    mark = fingerprint(tokenizer, files, names)
    targets = {name: folder / f"{place}-{mark}" for name, place in slugs_of(names).items()}
    if not all(target.is_dir() for target in targets.values()):
        write_sources(targets, files, tokenizer, by_domain)
    return {name: open_source(name, target) for name, target in targets.items()}


def slugs_of(names: Sequence[str]) -> dict[str, str]:
    """What each may be called on a disk; those that differ in signs alone, as c# and c+ do, are numbered."""
    slugs: dict[str, str] = {}
    taken: Counter = Counter()
    for name in sorted(names):
        slug = "".join(c if c.isalnum() else "_" for c in name)
        # Some disks tell no capitals from small letters.
        same = taken[slug.lower()]
        slugs[name] = f"{slug}~{same}" if same else slug
        taken[slug.lower()] += 1
    return slugs


def fingerprint(tokenizer, files: Sequence[Path], names: Sequence[str]) -> str:
    """Changes with the files' paths, sizes and times, the tokenizer, and the sources that they are dealt to."""
    marks = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    seen = json.dumps([LAYOUT, marks, tokenizer.backend_tokenizer.to_str(), end_of_text(tokenizer), sorted(names)])
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def write_sources(targets: Mapping[str, Path], files: Sequence[Path], tokenizer, by_domain: bool) -> None:
    """Read the files once and deal each document to its source; only whole folders get their names."""
    unfinished = {name: target.with_name(target.name + ".unfinished") for name, target in targets.items()}
    # What killed runs left, of other files too.
    for target in targets.values():
        for path in target.parent.glob(f"{target.name.rpartition('-')[0]}-*.unfinished"):
            shutil.rmtree(path)
    writers = {name: TokenWriter(path, tokenizer) for name, path in unfinished.items()}
    counts: Counter = Counter()
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {', '.join(targets)}") as bar:
        done = 0
        for path in files:
            done += path.stat().st_size
            for document in map(document_of, read_documents([path], counts)):
                # Characters for bytes, and never beyond the file, which may be compressed.
                bar.update(min(len(document.text), done - bar.n))
                name = document.domain if by_domain else next(iter(targets))
                if name in writers:
                    writers[name].add(document)
                else:
                    counts["of other domains"] += 1
            bar.update(done - bar.n)
    for name, writer in writers.items():
        writer.counts.update(counts)
        writer.close()
        if not writer.lengths:
            raise ValueError(
                f"The source {name!r} has no document in {len(files)} files ({told(counts) or 'nothing to read'}); add some."
            )
    for name, path in unfinished.items():
        shutil.rmtree(targets[name], ignore_errors=True)
        path.rename(targets[name])


def open_source(name: str, folder: Path) -> Source:
    with np.load(folder / "documents.npz", allow_pickle=False) as documents:
        starts, difficulty, checksum = documents["starts"], documents["difficulty"], str(documents["checksum"])
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    if len(tokens) != starts[-1]:
        raise ValueError(
            f"{folder} holds {len(tokens):,} tokens and documents of {starts[-1]:,}; delete it and run again."
        )
    return Source(name, tokens, starts, difficulty, json.loads((folder / "counts.json").read_text()), checksum)


def told(counts: Mapping[str, int]) -> str:
    """What was wrong with the files, in words; empty if nothing was."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(unread(counts).items()))


def described(sources: Mapping[str, Source]) -> list[dict[str, str]]:
    """A table row a source."""
    return [
        {
            "source": name,
            "documents": f"{len(source):,}",
            "tokens": f"{len(source.tokens):,}",
            "longest": f"{int(np.diff(source.starts).max()):,}",
            "what was wrong": told(source.counts) or "-",
        }
        for name, source in sources.items()
    ]
