"""Is every document of every format read with its place, and whatever cannot be read counted, in bounded memory?"""

import bz2
import gzip
import io
import json
import lzma
import sys
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from tests.web_archives import warc_record
from trainers.corpus import files_of, format_of, read_documents, read_records, text_of_html


def read(content: bytes, format: str, **options):
    counts = Counter()
    return list(read_records(io.BytesIO(content), format, counts, **options)), counts


def test_jsonl_counts_what_it_cannot_read_and_goes_on():
    lines = [
        b'{"text": "first", "rating": 3}',
        b"{broken",
        b'{"text": "\xff\xfe"}',
        b'["text"]',
        b'{"other": 1}',
        b'{"text": "  "}',
        b'{"text": "\\ud800 alone"}',
        b"",
        b'{"text": "' + b"x" * 300 + b'"}',
        b"[" * 100_000,
        '{"text": "마지막"}'.encode(),
    ]
    records, counts = read(b"\n".join(lines), "jsonl", max_bytes=200)
    assert [(record.text, record.position) for record in records] == [("first", 0), ("마지막", 10)]
    assert records[0].fields == {"rating": 3}
    # The nest of brackets is longer than any line may be.
    assert counts == {
        "documents": 2,
        "bytes": 14,
        "broken JSON": 1,
        "invalid UTF-8": 2,
        "no text": 3,
        "too large": 2,
    }


def test_deep_nesting_is_broken_json():
    assert read(b"[" * 200_000, "jsonl")[1] == {"broken JSON": 1}


@pytest.mark.parametrize("format", ["jsonl", "text", "warc"])
def test_an_empty_file_is_counted(format):
    assert read(b"", format) == ([], {"empty file": 1})


def test_a_document_of_100_mb_is_passed_over_in_bounded_memory():
    class Endless(io.RawIOBase):
        """One line of 100 MB, made as it is read, then a good one."""

        left = 100_000_000

        def readable(self):
            return True

        def readinto(self, buffer):
            count = max(0, min(len(buffer), self.left))
            buffer[:count] = b"x" * count
            self.left -= count
            if count == 0 and self.left == 0:
                self.left = -1
                tail = b'\n{"text": "good"}\n'
                buffer[: len(tail)] = tail
                return len(tail)
            return max(count, 0)

    counts = Counter()
    tracemalloc.start()
    records = list(read_records(io.BufferedReader(Endless()), "jsonl", counts, max_bytes=1_000_000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.text for record in records] == ["good"] and counts["too large"] == 1
    assert peak_bytes < 30_000_000


def test_parquet():
    table = pyarrow.table({"text": ["a", None, " ", "넷"], "n": [1, 2, 3, 4]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    records, counts = read(buffer.getvalue(), "parquet")
    assert [(r.text, r.position, r.fields) for r in records] == [("a", 0, {"n": 1}), ("넷", 3, {"n": 4})]
    assert counts["no text"] == 2
    assert read(buffer.getvalue(), "parquet", text_key="n")[1] == {"no text": 4}
    assert read(b"PAR1 not really", "parquet")[1] == {"broken Parquet": 1}


def test_large_documents_of_parquet_are_held_a_few_at_a_time():
    buffer = io.BytesIO()
    texts = [str(n) * 200_000 for n in range(100, 200)]
    # Compressed, a page would be unpacked whole: that is its writer's choice.
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, use_dictionary=False, compression="none")
    before, held = pyarrow.total_allocated_bytes(), []
    for record, text in zip(read_records(buffer, "parquet", Counter()), texts, strict=True):
        assert record.text == text
        held.append(pyarrow.total_allocated_bytes() - before)
    assert max(held) < 20_000_000, "60 MB of texts at once"


def test_a_document_of_parquet_above_the_limit_never_becomes_a_text():
    buffer, counts = io.BytesIO(), Counter()
    texts = ["good", "x" * 40_000_000, "last"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    tracemalloc.start()
    records = list(read_records(buffer, "parquet", counts, max_bytes=1_000_000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.position for record in records] == [0, 2] and counts["too large"] == 1
    assert peak_bytes < 20_000_000


@pytest.mark.parametrize("format", ["text", "warc", "parquet", "jsonl"])
def test_a_document_above_the_limit_is_counted_in_every_format(format):
    text = "word " * 300_000
    if format == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), buffer)
        content = buffer.getvalue()
    else:
        content = {"text": text.encode(), "jsonl": json.dumps({"text": text}).encode()}.get(format)
        content = content or warc_record("conversion", "text/plain", text.encode(), http=False)
    assert read(content, format, max_bytes=1_000_000) == ([], {"too large": 1})
    assert read(content, format, max_bytes=2_000_000)[1] == {"documents": 1, "bytes": len(text)}


def test_damaged_pages_of_parquet_are_counted():
    buffer = io.BytesIO()
    texts = [f"{n} {n * n} text" for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, use_dictionary=False)
    content = bytearray(buffer.getvalue())
    content[4:400] = b"\xff" * 396
    assert read(bytes(content), "parquet")[1] == {"broken Parquet": 1}


def test_warc():
    page = "<html><head><title>t<body><p>Caf&eacute; <b>noir</b><script>evil()</script><p>둘".encode()
    archive = (
        warc_record("warcinfo", "text/plain", b"about", http=False)
        + warc_record("response", "text/html; charset=utf-8", page, http=True)
        + warc_record("response", "image/png", b"\x89PNG", http=True)
        + warc_record("conversion", "text/plain", b"plain words", http=False)
        + warc_record("response", "text/html", b"\xff\xff", http=True)
    )
    records, counts = read(archive, "warc")
    assert [r.text for r in records] == ["Café noir\n둘", "plain words"]
    assert records[0].fields["url"] == "http://example.org/" and [r.position for r in records] == [1, 3]
    assert counts["invalid UTF-8"] == 1
    assert read(b"no archive at all" * 9, "warc")[1] == {"empty file": 1}


def test_warc_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "warcio.archiveiterator", None)
    with pytest.raises(ImportError, match=r"pip install 'axk1\[curation\]'"):
        read(b"WARC/1.0", "warc")


def test_html_leaves_out_what_nobody_reads():
    html = "<nav>menu</nav><h1>Title</h1>a <i>b</i><style>x{}</style><div>c\n d</div><pre>if x:\n    y</pre>"
    assert text_of_html(html) == "Title\na b\nc d\nif x:\n    y"


def test_files_in_order_also_compressed_and_by_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "sub" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "zipped"}).encode()))
    assert [format_of(f) for f in files_of(tmp_path)] == ["text", "jsonl"]
    assert [r.text for r in read_documents(files_of(tmp_path), Counter())] == ["plain", "zipped"]
    whole = (tmp_path / "sub" / "a.jsonl.gz").read_bytes()
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(whole[:-12])
    counts = Counter()
    list(read_documents([tmp_path / "sub" / "b.jsonl.gz"], counts))
    assert counts["broken compression"] == 1
    (tmp_path / "sub" / "b.jsonl.gz").unlink()
    assert files_of(f"{tmp_path}/**/*.gz") == [tmp_path / "sub" / "a.jsonl.gz"]
    with pytest.raises(ValueError, match="names no file"):
        files_of(tmp_path / "absent")


@pytest.mark.parametrize("module", [gzip, bz2, lzma], ids=lambda module: module.__name__)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_broken_compression_is_counted(tmp_path, module, damage):
    suffix = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[module.__name__]
    whole = module.compress(json.dumps({"text": "zipped"}).encode())
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[:-12] if damage == "cut" else whole[:12] + b"\xff" * 20 + whole[32:])
    counts = Counter()
    assert list(read_documents(files_of(path), counts)) == [] and counts == {"broken compression": 1}


def test_zstandard_is_refused_not_read_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.corpus.infer_compression", {"gz": "gzip"}.get)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ImportError, match="a.jsonl.zst .* pip install zstandard"):
        files_of(tmp_path)
