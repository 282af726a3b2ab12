"""What does a client get of what a model writes?  The answer up to its stop text; what only looks like a call, as text."""

import copy
import json
import threading
from collections.abc import AsyncIterator, Iterator

from serving.requests import is_call

# As transformers' stream spells an error, unescaped; in JSON's strings the quotes are escaped.
STREAM_ERROR = 'data: {"error": "'
DONE = "data: [DONE]"


def take_any_call(tokenizer):
    """`tokenizer`, or one like it whose response template does not fail at a call that is no JSON."""
    calls = (getattr(tokenizer, "response_template", None) or {}).get("fields", {}).get("tool_calls", {})
    if calls.get("content") != "json":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.response_template["fields"]["tool_calls"].setdefault("content_args", {})["allow_non_json"] = True
    return tokenizer


class AnswerParser:
    """transformers' ResponseParser for the streamer: its events, up to the first of the `stop` texts in the answer.

    A call that is none becomes a part of the answer. `stopped` is set where nothing more will be said.
    """

    def __init__(self, parser, stop: list[str], stopped: threading.Event):
        self.parser, self.stop, self.stopped = parser, stop, stopped
        self.initial_events = parser.initial_events
        # The answer's end, while it may be the beginning of a stop text; and the call that is being written.
        self.held, self.call = "", ""

    def feed(self, text: str) -> list[dict]:
        return list(self._mended(self.parser.feed(text)))

    def finalize(self) -> tuple[dict, list[dict]]:
        said, events = self.parser.finalize()
        return said, [*self._mended(events, close=""), *self._answer("", ended=True)]

    def _mended(self, events: list[dict], close: str = "</tool_call>") -> Iterator[dict]:
        for event in events:
            kind, field = event["type"], event.get("field")
            if field == "content":
                yield from self._answer(event.get("text", ""), ended=kind == "region_close")
            elif field == "tool_calls" and kind != "region_close":
                self.call = self.call + event["text"] if kind == "region_chunk" else ""
            elif field == "tool_calls" and not is_call(event["value"]):
                yield from self._answer(f"<tool_call>{self.call}{close}", ended=True)
            elif not self.stopped.is_set():
                yield event

    def _answer(self, text: str, *, ended: bool) -> Iterator[dict]:
        if self.stopped.is_set():
            return
        text = self.held + text
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped.set()
        end = min(found) if found else len(text) - (0 if ended else self._may_begin_a_stop(text))
        text, self.held = text[:end], text[end:]
        if text:
            yield {"type": "region_chunk", "field": "content", "text": text, "dirty": False}

    def _may_begin_a_stop(self, text: str) -> int:
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        ends = range(min(longest, len(text)), 0, -1)
        return next((size for size in ends if any(stop.startswith(text[-size:]) for stop in self.stop)), 0)


async def as_openai_ends(stream: AsyncIterator[str]) -> AsyncIterator[str]:
    """transformers' events, an error as JSON, and OpenAI's last line."""
    async for events in stream:
        events, broken, error = events.partition(STREAM_ERROR)
        if broken:
            said = {"message": error.removesuffix('"}\n\n'), "type": "server_error", "param": None, "code": None}
            events += f"data: {json.dumps({'error': said})}\n\n"
        yield events
    yield f"{DONE}\n\n"


async def in_one_piece(stream: AsyncIterator[str]) -> tuple[dict, dict]:
    """The message that a stream says, and its last chunk. RuntimeError with the stream's error."""
    message, calls, last = {"content": "", "reasoning_content": ""}, [], {}
    async for events in stream:
        for line in events.split("\n\n")[:-1]:
            if line == DONE:
                continue
            last = json.loads(line.removeprefix("data: "))
            if "error" in last:
                raise RuntimeError(last["error"]["message"])
            delta = last["choices"][0]["delta"]
            message = {name: text + delta.get(name, "") for name, text in message.items()}
            calls += [{name: call[name] for name in ("id", "type", "function")} for call in delta.get("tool_calls", [])]
    said = {name: text.strip() for name, text in message.items()}
    return {"content": said["content"], "reasoning_content": said["reasoning_content"] or None, "tool_calls": calls or None}, last
