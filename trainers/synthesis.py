"""How is text made where the web has too little? From seed documents or from topics, by a model behind a server or here.

The report's two ways: seed-corpus driven (a document said anew, in another form) and topic driven (a document about a named
subject). Every document says what it was made from, by which prompt and which model. `axk1 curate synthesize`.
"""

import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainers.corpus import files_of, no_text_error, read_documents, unread
from trainers.tokenizer import END_THINK

# Many forms of one content: a single prompt makes documents that resemble each other more than their seeds do.
FORMS = (
    "a section of a textbook with a worked example",
    "questions and detailed answers",
    "an encyclopedia article",
    "a tutorial that goes step by step",
    "a conversation between a teacher and a student",
)
SEED_PROMPT = (
    "Write {form} in {language} that teaches what the following text contains, in your own words and complete in itself. "
    "Keep every fact right, add none that you are not sure of, and answer with the document alone.\n\n{seed}"
)
TOPIC_PROMPT = (
    "Write {form} in {language} about this topic: {topic}. Be concrete and correct, and answer with the document alone."
)
SEED_CHARACTERS = 6_000
# Of a written line: what a kill left half begins so.
LINE_START = b'{"id": "'


@dataclass(frozen=True)
class Request:
    """A prompt, and what the document will say of its origin. The id is a hash of the prompt: same prompt, same document."""

    prompt: str
    origin: dict

    @property
    def id(self) -> str:
        return hashlib.blake2b(self.prompt.encode(errors="replace"), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Reply:
    text: str
    # False if the length limit cut it.
    complete: bool


def seed_requests(
    path: str | Path, *, language: str, forms_each: int, seed: int, counts: Counter, text_key: str = "text"
) -> Iterator[Request]:
    """`forms_each` prompts for each document of the files, its beginning quoted in them; `counts` as in `read_documents`.

    ValueError if no document was read.
    """
    for file in files_of(path):
        for record in read_documents([file], counts, text_key=text_key):
            quoted = record.text[:SEED_CHARACTERS]
            for form in _forms(quoted, forms_each, seed):
                prompt = SEED_PROMPT.format(form=form, language=language, seed=quoted)
                yield Request(prompt, {"seed_file": str(file), "seed_position": record.position, "form": form})
    if not counts["documents"]:
        raise no_text_error(path, text_key, counts)


def topic_requests(path: str | Path, *, language: str, forms_each: int, seed: int) -> Iterator[Request]:
    """`forms_each` prompts for each line of the file; ValueError if it holds none."""
    topics = [topic for line in Path(path).read_text(encoding="utf-8").splitlines() if (topic := line.strip())]
    if not topics:
        raise ValueError(f"{path} holds no topic; write one a line.")
    for topic in topics:
        for form in _forms(topic, forms_each, seed):
            yield Request(
                TOPIC_PROMPT.format(form=form, language=language, topic=topic), {"topic": topic, "form": form}
            )


def _forms(content: str, count: int, seed: int) -> list[str]:
    if not 1 <= count <= len(FORMS):
        raise ValueError(f"{count} forms of each are asked for; there are {len(FORMS)}, use 1 to {len(FORMS)}.")
    return random.Random(f"{seed} {content}").sample(FORMS, count)


def server_writer(
    base_url: str, model: str, *, max_tokens: int = 2048, temperature: float = 0.8, api_key: str | None = None
) -> Callable[[Request], Reply]:
    """Any OpenAI-compatible server: `axk1 serve`, vLLM, SGLang. The key is OPENAI_API_KEY unless given; retries are openai's."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"), max_retries=4)

    def write(request: Request) -> Reply:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": request.prompt}],
            max_tokens=max_tokens,
            temperature=temperature,
        ).choices[0]
        # What a thinking model thought stands in a field of its own and is no document.
        return Reply((answer.message.content or "").strip(), answer.finish_reason != "length")

    return write


def local_writer(
    model_path: str, *, max_tokens: int = 2048, temperature: float = 0.8, seed: int = 0
) -> Callable[[Request], Reply]:
    """A model in this process, with its own chat template; a request's text depends on nothing but it and the seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_axk1  # noqa: F401  registers AxK1ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
    end_think = tokenizer.get_vocab().get(END_THINK)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    def write(request: Request) -> Reply:
        chat = [{"role": "user", "content": request.prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.random.fork_rng():
            torch.manual_seed(int(request.id[:12], 16) + seed)
            out = model.generate(**prompt.to(model.device), max_new_tokens=max_tokens, **sampling)
        new = out[0, prompt["input_ids"].shape[1] :].tolist()
        # Nor is a thought a document here.
        answer = new[len(new) - new[::-1].index(end_think) :] if end_think in new else new
        return Reply(tokenizer.decode(answer, skip_special_tokens=True).strip(), len(new) < max_tokens)

    return write


def synthesize(
    requests: Iterable[Request], write: Callable[[Request], Reply], out: Path, *, model: str, workers: int = 8
) -> Counter:
    """Append a JSON line for each request to `out` that has none there yet: `id`, `text`, `model`, `prompt` and its origin.

    Lines come in the order of the requests. Replies that are empty or cut are left out; both, and requests that failed after
    all retries, are counted and asked again by the next run, which a killed one needs as well. ValueError if none was
    answered.
    """
    done = _finished(out)
    counts, failure = Counter({"there already": len(done)}), None
    out.parent.mkdir(parents=True, exist_ok=True)
    # Each once, as documents and topics occur twice.
    wanted = (request for request in requests if not (request.id in done or done.add(request.id)))
    with out.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        with tqdm(desc="writing", unit=" documents") as bar:
            # So many at a time: the requests of a corpus are not all held.
            while batch := list(itertools.islice(wanted, 4 * workers)):
                for request, reply in zip(batch, pool.map(lambda request: _attempt(write, request), batch)):
                    bar.update()
                    if isinstance(reply, Exception):
                        counts["failed"] += 1
                        failure = reply
                    elif not reply.text or not reply.complete:
                        counts["cut" if reply.text else "empty"] += 1
                    else:
                        row = {
                            "id": request.id,
                            "text": reply.text,
                            "model": model,
                            "prompt": request.prompt,
                            **request.origin,
                        }
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        counts["written"] += 1
                file.flush()
    if failure and not counts["written"] + counts["empty"] + counts["cut"]:
        raise ValueError(
            f"None of {counts['failed']} requests was answered, the last with {failure!r}; is the server up?"
        )
    return counts


def _attempt(write: Callable[[Request], Reply], request: Request) -> Reply | Exception:
    from openai import OpenAIError

    try:
        return write(request)
    except OpenAIError as error:
        return error


def _finished(out: Path) -> set[str]:
    """Ids of the complete lines; a last line that a kill left half-written is cut off."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    half = content[len(whole) :]
    try:
        done = {json.loads(line)["id"] for line in whole.splitlines()}
        ours = half.startswith(LINE_START[: len(half)])
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"{out} holds lines that no synthesis wrote; name another file, or remove it.")
    if half:
        os.truncate(out, len(whole))
    return done


def run_synthesize(
    out: Path,
    seeds: str | None,
    topics: Path | None,
    server: str | None,
    model: str,
    language: str,
    forms: int,
    text_key: str,
    max_tokens: int,
    temperature: float,
    workers: int,
    seed: int,
) -> None:
    """`axk1 curate synthesize`."""
    read: Counter = Counter()
    asked = {"language": language, "forms_each": forms, "seed": seed}
    requests = (
        seed_requests(seeds, **asked, counts=read, text_key=text_key) if seeds else topic_requests(topics, **asked)
    )
    # Drawn before a model is loaded or a file begun: there may be none.
    requests = itertools.chain([next(requests)], requests)
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    write = server_writer(server, model, **sampling) if server else local_writer(model, **sampling, seed=seed)
    # One model in this process answers one request at a time.
    counts = synthesize(requests, write, out, model=model, workers=workers if server else 1)
    print(f"{out}: " + ", ".join(f"{what} {count:,}" for what, count in counts.items() if count))
    if missing := unread(read):
        print("seeds not read: " + ", ".join(f"{reason} {count:,}" for reason, count in missing.items()))
