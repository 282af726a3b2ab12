"""Which documents are in these files? JSONL, Parquet, plain text and WARC as one stream; what cannot be read is counted."""

import glob
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.utils import infer_compression

# Larger than any document that a training run wants, small enough to hold a few of in memory.
MAX_DOCUMENT_BYTES = 20_000_000
# Rows of Parquet are decoded together; 256 of the largest documents would be 5 GB.
PARQUET_BATCH_BYTES = 16_000_000
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNSEEN_TAGS = {"script", "style", "noscript", "template", "head", "nav", "footer"}
BLOCK_TAGS = {"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "article"}


@dataclass(frozen=True)
class Record:
    """A document: its text, where in its file it stood (line, row or record, from 0), and the file's other columns."""

    text: str
    position: int
    fields: dict = field(default_factory=dict)


def format_of(path: str | Path) -> str:
    """By the name's end, a compression's suffix aside; what no suffix names is plain text: one document a file."""
    name = str(path).lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return FORMATS.get(Path(name).suffix, "text")


def files_of(path: str | Path) -> list[Path]:
    """The file itself, a folder's files, or those that a pattern (`src/**/*.py`) matches, by name. ValueError if none.

    ImportError for one whose compression nothing here unpacks: its bytes would be taken for text.
    """
    pattern = str(path / "**" / "*") if (path := Path(path)).is_dir() else str(path)
    files = [file for name in sorted(glob.glob(pattern, recursive=True)) if (file := Path(name)).is_file()]
    if path.is_file():
        files = [path]
    if not files:
        raise ValueError(f"{path} names no file; give a file, a folder with documents, or a quoted pattern.")
    for file in files:
        if file.suffix.lower() in COMPRESSED and infer_compression(file.name) is None:
            raise ImportError(f"{file} needs a package to be unpacked; pip install zstandard, or compress it by gzip.")
    return files


def read_documents(files: list[Path], counts: Counter, *, text_key: str = "text") -> Iterator[Record]:
    """Every document of `files`; `counts` is updated with what was read and, by reason, what could not be."""
    for path in files:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            yield from read_records(file, format_of(path), counts, text_key=text_key)


def read_records(
    file: BinaryIO,
    format: str,
    counts: Counter,
    *,
    text_key: str = "text",
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Record]:
    """The documents of one open file. Counted, never raised: `empty file` (no record in it), `broken JSON` (or Parquet, WARC,
    compression), `no text` (no such column, or nothing but blanks in it), `invalid UTF-8`, `too large` (above `max_bytes`; a
    JSON line is then skipped without being held). `documents` and `bytes` (UTF-8) count what is yielded.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "warc": _read_warc}
    if format not in readers:
        raise ValueError(f"The format {format!r} is unknown; use one of {', '.join(readers)}.")
    before = sum(counts.values())
    with _damage_counted(counts):
        for record in readers[format](file, counts, text_key, max_bytes):
            if not record.text.strip():
                counts["no text"] += 1
            elif (size := _utf8_length(record.text)) is None:
                counts["invalid UTF-8"] += 1
            elif size > max_bytes:
                counts["too large"] += 1
            else:
                counts["documents"] += 1
                counts["bytes"] += size
                yield record
    if sum(counts.values()) == before:
        counts["empty file"] += 1


def whole_rows(file: BinaryIO, format: str, counts: Counter) -> Iterator[object]:
    """Every row of one open file with all its columns, or the text of a document that has none; `counts` gets only what
    could not be read, by the reasons of `read_records`.
    """
    with _damage_counted(counts):
        if format == "jsonl":
            yield from (row for _, row in _json_rows(file, counts, MAX_DOCUMENT_BYTES))
        elif format == "parquet":
            for batch in _parquet_batches(file, counts):
                yield from batch.to_pylist()
        else:
            read = _read_warc if format == "warc" else _read_text
            yield from (record.text for record in read(file, counts, "text", MAX_DOCUMENT_BYTES))


@contextmanager
def _damage_counted(counts: Counter) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        counts["invalid UTF-8"] += 1
    except (EOFError, zlib.error, lzma.LZMAError):
        counts["broken compression"] += 1
    except OSError as error:
        # gzip's and bz2's own have no number; those of a disk or network have one.
        if error.errno is not None:
            raise
        counts["broken compression"] += 1


def unread(counts: Mapping[str, int]) -> dict[str, int]:
    """Of the counts of `read_records`, the reasons why something was not read."""
    return {reason: count for reason, count in counts.items() if reason not in ("documents", "bytes")}


def no_text_error(path: str | Path, text_key: str, counts: Counter) -> ValueError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in unread(counts).items())
    return ValueError(f"{path} holds no text under {text_key!r} ({reasons}); name the column with --text-key.")


def _utf8_length(text: str) -> int | None:
    """None for a lone surrogate, which JSON can escape and UTF-8 cannot hold."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _read_jsonl(file: BinaryIO, counts: Counter, text_key: str, max_bytes: int) -> Iterator[Record]:
    for position, row in _json_rows(file, counts, max_bytes):
        text = row.pop(text_key, None) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield Record(text, position, row)
        else:
            counts["no text"] += 1


def _json_rows(file: BinaryIO, counts: Counter, max_bytes: int) -> Iterator[tuple[int, object]]:
    # Escapes (\u0000) make a line up to six times as long as its text.
    for position, line in enumerate(_lines(file, 6 * max_bytes + 65_536)):
        if line is None:
            counts["too large"] += 1
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            counts["invalid UTF-8"] += 1
        except (ValueError, RecursionError):
            counts["broken JSON"] += 1
        else:
            yield position, row


def _lines(file: BinaryIO, limit_bytes: int) -> Iterator[bytes | None]:
    """Lines, None in place of one that is longer than the limit: it is passed over a piece at a time."""
    while line := file.readline(limit_bytes):
        if len(line) < limit_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit_bytes)
        yield None


def _read_parquet(file: BinaryIO, counts: Counter, text_key: str, max_bytes: int) -> Iterator[Record]:
    import pyarrow
    import pyarrow.compute

    position = 0
    for batch in _parquet_batches(file, counts):
        names = batch.schema.names
        if text_key not in names or batch.column(text_key).type not in (pyarrow.string(), pyarrow.large_string()):
            counts["no text"] += batch.num_rows
            continue
        texts = batch.column(text_key).cast(pyarrow.binary())
        sizes = pyarrow.compute.binary_length(texts).to_pylist()
        others = batch.drop_columns([text_key]).to_pylist() if len(names) > 1 else [{} for _ in sizes]
        for text, size, row in zip(texts, sizes, others, strict=True):
            if size is None:
                counts["no text"] += 1
            elif size > max_bytes:
                counts["too large"] += 1
            elif (decoded := _decode(text.as_py(), counts)) is not None:
                yield Record(decoded, position, row)
            position += 1


def _parquet_batches(file: BinaryIO, counts: Counter) -> Iterator:
    """Its rows as `pyarrow.RecordBatch`es of about PARQUET_BATCH_BYTES, up to the first damage."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            facts = parquet.metadata.row_group(group)
            rows = PARQUET_BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)
            yield from parquet.iter_batches(batch_size=min(max(rows, 1), 256), row_groups=[group])
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        counts["broken Parquet"] += 1


def _decode(content: bytes, counts: Counter) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        counts["invalid UTF-8"] += 1
        return None


def _read_text(file: BinaryIO, counts: Counter, text_key: str, max_bytes: int) -> Iterator[Record]:
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        counts["too large"] += 1
    elif content and (text := _decode(content, counts)) is not None:
        yield Record(text, 0)


def _read_warc(file: BinaryIO, counts: Counter, text_key: str, max_bytes: int) -> Iterator[Record]:
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as missing:
        raise ImportError("WARC is read by warcio; pip install 'axk1[curation]'.") from missing

    try:
        for position, record in enumerate(ArchiveIterator(file)):
            kind = (record.http_headers or record.rec_headers).get_header("Content-Type") or ""
            if record.rec_type not in ("response", "conversion", "resource") or not kind.startswith("text/"):
                continue
            content = record.content_stream().read(max_bytes + 1)
            if len(content) > max_bytes:
                counts["too large"] += 1
                continue
            if (text := _decode_page(content, kind, counts)) is None:
                continue
            fields = {
                "url": record.rec_headers.get_header("WARC-Target-URI"),
                "date": record.rec_headers.get_header("WARC-Date"),
            }
            yield Record(text_of_html(text) if "html" in kind else text, position, fields)
    except ArchiveLoadFailed:
        counts["broken WARC"] += 1


def _decode_page(content: bytes, content_type: str, counts: Counter) -> str | None:
    """By the charset that the server named; most of the web is UTF-8, and a page that is neither is counted."""
    named = re.search(r"charset=[\"']?([\w.:-]+)", content_type)
    try:
        return content.decode(named.group(1) if named else "utf-8")
    except (UnicodeDecodeError, LookupError):
        counts["invalid UTF-8"] += 1
        return None


def text_of_html(html: str) -> str:
    """What a reader sees: text without markup, a block a line, scripts, navigation and the like left out."""
    parser = _VisibleText()
    parser.feed(html)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


class _VisibleText(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = ["\n"]
        self.unseen_depth = 0
        self.preformatted = False

    def handle_starttag(self, tag, attributes):
        # A head may be left open: the body closes it.
        self.unseen_depth = 0 if tag == "body" else self.unseen_depth + (tag in UNSEEN_TAGS)
        self._block(tag, opens=True)

    def handle_endtag(self, tag):
        self.unseen_depth = max(0, self.unseen_depth - (tag in UNSEEN_TAGS))
        self._block(tag, opens=False)

    def handle_data(self, data):
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            # No blank at the beginning of a line.
            data = data.lstrip() if self.pieces[-1].endswith(("\n", " ")) else data
        if data and not self.unseen_depth:
            self.pieces.append(data)

    def _block(self, tag, opens):
        if tag in BLOCK_TAGS:
            self.pieces.append("\n")
        if tag == "pre":
            self.preformatted = opens
