"""Is an answer cut at its stop text, and a call that is none given as text, wherever the stream is cut in pieces?"""

import threading

import pytest

pytest.importorskip("transformers", minversion="5.21", reason="serving needs transformers >= 5.21")

from transformers.utils.chat_parsing import ResponseParser  # noqa: E402

from serving.answers import AnswerParser, take_any_call  # noqa: E402
from trainers.tokenizer import train_tokenizer  # noqa: E402

PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>"


@pytest.fixture(scope="module")
def template():
    return take_any_call(train_tokenizer(["a"], 270)).response_template


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("written", "stop", "answer", "calls", "cut"),
    [
        ("t</think>one two<|im_end|>", [], "one two", 0, False),
        ("two</think>one two three<|im_end|>", ["two"], "one ", 0, True),
        ("t</think>one twt<|im_end|>", ["two"], "one twt", 0, False),
        ("t</think>one tw", ["two"], "one tw", 0, False),
        ("t</think>aab<|im_end|>", ["ab"], "a", 0, True),
        ("t</think>one two three<|im_end|>", ["three", "o t"], "one tw", 0, True),
        ("t</think>tw<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>o<|im_end|>", ["two"], "two", 1, False),
        ("t</think><tool_call>{\"name\": 1}</tool_call> b<|im_end|>", [], "<tool_call>{\"name\": 1}</tool_call> b", 0, False),
        ("t</think><tool_call>[]</tool_call><|im_end|>", [], "<tool_call>[]</tool_call>", 0, False),
        ("t</think>a<tool_call>{\"na", [], "a<tool_call>{\"na", 0, False),
        ("t</think>stop<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>", ["stop"], "", 0, True),
        ("two", ["two"], "", 0, False),
    ],
)
def test_answer(template, written, stop, answer, calls, cut, size):
    stopped = threading.Event()
    parser = AnswerParser(ResponseParser(template, prefix=PROMPT), stop, stopped)
    events = []
    for begin in range(0, len(written), size):
        events += parser.feed(written[begin : begin + size])
    events += parser.finalize()[1]
    assert "".join(event["text"] for event in events if event.get("field") == "content") == answer
    assert len([event for event in events if event.get("field") == "tool_calls"]) == calls
    assert stopped.is_set() == cut


def test_the_callers_tokenizer_stays_as_it_is(template):
    tokenizer = train_tokenizer(["a"], 270)
    take_any_call(tokenizer)
    assert template["fields"]["tool_calls"] != tokenizer.response_template["fields"]["tool_calls"]
