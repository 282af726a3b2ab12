"""From which text does a tokenizer learn, and how well does it compress beside others? `axk1 tokenizer train`, `compare`.

Texts are streamed. What the training holds is the count of every different piece of text (`PRE_TOKEN_PATTERN`), of so many at
most (`MOST_PIECES`), and where the pairs in them stand.
"""

import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_axk1.generation_axk1 import open_tokenizer
from trainers.corpus import files_of, no_text_error, read_documents, unread
from trainers.tokenizer import train_tokenizer

# Of a longer document only so much is learned from, or one file would weigh as a thousand.
MAX_PIECE_CHARACTERS = 1_000_000


@dataclass
class Source:
    """Files of one language (or of code) and the share of the sample's bytes that they give."""

    name: str
    path: Path
    share: float
    counts: Counter = field(default_factory=Counter)

    def measure(self, text_key: str = "text") -> int:
        """Read all of it once; afterwards `counts` says what is there. Returns the bytes of text."""
        self.counts.clear()
        for _ in read_documents(files_of(self.path), self.counts, text_key=text_key):
            pass
        return self.counts["bytes"]


def parse_sources(described: Sequence[str]) -> list[Source]:
    """`NAME=PATH:SHARE` each, such as `ko=reviews.jsonl:0.4`. ValueError unless the shares are positive and sum to 1."""
    sources = []
    for text in described:
        name, _, rest = text.partition("=")
        path, _, share = rest.rpartition(":")
        try:
            sources.append(Source(name, Path(path), float(share)))
        except ValueError:
            path = ""
        if not name or not path:
            raise ValueError(f"{text!r} names no source; write NAME=PATH:SHARE, such as ko=reviews.jsonl:0.4.")
    total = sum(source.share for source in sources)
    if not all(source.share > 0 for source in sources) or abs(total - 1) > 1e-6:
        raise ValueError(f"The sources' shares must be positive and sum to 1, got {total:g}; mend them.")
    if len({source.name for source in sources}) < len(sources):
        raise ValueError(f"Two sources have one name in {', '.join(s.name for s in sources)}; name them apart.")
    return sources


def sample_texts(sources: Sequence[Source], sample_bytes: float, *, text_key: str = "text") -> Iterator[str]:
    """Documents of every source, spread evenly over its files, up to its share of `sample_bytes`.

    The sample shrinks to what the scarcest source can fill, so that the shares hold; all is read twice, since only reading
    tells how much text compressed or broken files hold. A document of more than `MAX_PIECE_CHARACTERS` is cut there and
    counted as `cut`. ValueError for a source without text.
    """
    for source in sources:
        if not source.measure(text_key):
            raise no_text_error(source.path, text_key, source.counts)
    sample_bytes = min(sample_bytes, *(source.counts["bytes"] / source.share for source in sources))
    for source in sources:
        quota = sample_bytes * source.share
        rate, seen, taken = quota / source.counts["bytes"], 0, 0
        for record in read_documents(files_of(source.path), Counter(), text_key=text_key):
            seen += len(record.text.encode())
            # Error diffusion: a document is due as soon as the sample has fallen behind the rate.
            if taken >= rate * seen:
                continue
            text = record.text[:MAX_PIECE_CHARACTERS]
            source.counts["cut"] += len(text) < len(record.text)
            taken += len(text.encode())
            source.counts["sampled documents"] += 1
            yield text
        source.counts["sampled bytes"] = taken


def run_train(
    out: Path,
    source: Sequence[str],
    vocab_size: int,
    reserved: int,
    sample_gb: float,
    text_key: str = "text",
) -> PreTrainedTokenizerBase:
    """Train on the sources' mixture and write the tokenizer and its `report.json` to the folder `out`, whole or not at all."""
    if out.exists():
        raise ValueError(f"{out} exists already; name another folder or remove it.")
    if not sample_gb > 0:
        raise ValueError(
            f"sample_gb={sample_gb:g} is no amount of text; give a positive number, or inf for all there is."
        )
    if reserved < 0:
        raise ValueError(f"reserved={reserved} is no number of spare tokens; give 0 or more.")
    sources = parse_sources(source)
    texts = sample_texts(sources, sample_gb * 1e9, text_key=text_key)
    shown = tqdm(texts, desc="reading", unit=" documents", unit_scale=True)
    tokenizer = train_tokenizer(shown, vocab_size, reserved=reserved, multiple_of=128, show_progress=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: nothing half-written has the tokenizer's name.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tokenizer.save_pretrained(partial)
        sampled = sum(s.counts["sampled bytes"] for s in sources)
        facts = {
            s.name: {
                "path": str(s.path),
                "share": s.share,
                "share reached": round(s.counts["sampled bytes"] / sampled, 4),
                **+s.counts,
            }
            for s in sources
        }
        (partial / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{out}: {len(tokenizer):,} tokens")
    for name, fact in facts.items():
        print(f"  {name}: " + ", ".join(f"{what} {value:,}" for what, value in fact.items() if what != "path"))
    return tokenizer


def compression(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, float]:
    """Tokens a document and UTF-8 bytes a token, without special tokens. Lossless round trips are counted, not assumed."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    lossless = sum(
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text for ids, text in zip(encoded, texts)
    )
    tokens = sum(map(len, encoded))
    return {
        "documents": len(texts),
        "tokens per document": tokens / len(texts),
        "bytes per token": sum(len(text.encode()) for text in texts) / max(1, tokens),
        "lossless": lossless / len(texts),
    }


def compare(tokenizers: Sequence[str | Path], texts: Sequence[str], limit: int, text_key: str = "text") -> list[dict]:
    """One row for each tokenizer and each `NAME=PATH` of texts, from its first `limit` documents.

    A tokenizer is any folder that `AutoTokenizer` loads; code that comes with it is not run.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} leaves no document to compare by; give 1 or more.")
    rows = []
    for described in texts:
        name, _, path = described.partition("=")
        if not path:
            raise ValueError(f"{described!r} names no texts; write NAME=PATH, such as ko=reviews.jsonl.")
        counts: Counter = Counter()
        records = read_documents(files_of(path), counts, text_key=text_key)
        sample = [record.text[:MAX_PIECE_CHARACTERS] for record in itertools.islice(records, limit)]
        if not sample:
            raise no_text_error(path, text_key, counts)
        if missing := unread(counts):
            # Beside the table, which may be read by a program.
            told = ", ".join(f"{reason} {count:,}" for reason, count in missing.items())
            print(f"{name}: not read: {told}", file=sys.stderr)
        for place in tokenizers:
            tokenizer = open_tokenizer(place)
            rows.append({"texts": name, "tokenizer": str(place), **compression(tokenizer, sample)})
    return rows


def shown(row: dict) -> dict[str, str]:
    return {
        "texts": row["texts"],
        "tokenizer": row["tokenizer"],
        "documents": f"{row['documents']:,}",
        "tokens per document": f"{row['tokens per document']:,.2f}",
        "bytes per token": f"{row['bytes per token']:.3f}",
        "lossless": f"{row['lossless']:.1%}",
    }
