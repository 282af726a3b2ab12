"""Does the endpoint speak OpenAI's protocol, in both modes, streamed or not? Asked over HTTP with OpenAI's own client."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers", minversion="5.21", reason="serving needs transformers >= 5.21")

import httpx  # noqa: E402
import openai  # noqa: E402
import uvicorn  # noqa: E402

from modeling_axk1 import AxK1ForCausalLM  # noqa: E402
from serving.loading import load_for_chat  # noqa: E402
from serving.server import build_app, run_server  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 4 * 5?"}]
GREEDY = {"messages": QUESTION, "model": "tiny-axk1", "temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def served(checkpoint):
    model, tokenizer = load_for_chat(checkpoint, device_map="cpu")
    app = build_app(model, tokenizer, name="tiny-axk1")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started, "the server did not start within 20 s"
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), tokenizer
    server.should_exit = True
    thread.join(timeout=20)


def mode(think: bool, **more) -> dict:
    return {"extra_body": {"chat_template_kwargs": {"enable_thinking": think}, **more}}


def test_both_modes(served):
    client, tokenizer = served
    thinking = client.chat.completions.create(**GREEDY, **mode(True, thinking_budget=5)).choices[0]
    direct = client.chat.completions.create(**GREEDY, **mode(False)).choices[0]
    default = client.chat.completions.create(**GREEDY).choices[0]
    assert thinking.message.reasoning_content and thinking.message.content
    assert len(tokenizer(thinking.message.reasoning_content)["input_ids"]) <= 5
    assert direct.message.content and not hasattr(direct.message, "reasoning_content")
    assert default.message == direct.message
    assert client.chat.completions.create(**GREEDY).model == "tiny-axk1"
    for text in (thinking.message.content, thinking.message.reasoning_content, direct.message.content):
        assert "think>" not in text and "<|" not in text


@pytest.mark.parametrize("think", [True, False])
def test_stream_says_the_same(served, think):
    client, _ = served
    whole = client.chat.completions.create(**GREEDY, **mode(think, thinking_budget=5)).choices[0]
    parts = {"reasoning_content": "", "content": ""}
    for chunk in client.chat.completions.create(**GREEDY, **mode(think, thinking_budget=5), stream=True):
        for name in parts:
            parts[name] += getattr(chunk.choices[0].delta, name, None) or ""
        finish = chunk.choices[0].finish_reason
    assert parts["content"].strip() == whole.message.content
    assert parts["reasoning_content"].strip() == getattr(whole.message, "reasoning_content", "")
    assert finish == whole.finish_reason


@pytest.fixture
def says(served, monkeypatch):
    """A text for the model to say, token by token, whatever is asked."""
    client, tokenizer = served
    script, forward = [], AxK1ForCausalLM.forward

    def scripted(self, input_ids=None, **kwargs):
        output = forward(self, input_ids=input_ids, **kwargs)
        output.logits[:, -1] = -50.0
        output.logits[:, -1, script.pop(0)] = 50.0
        return output

    monkeypatch.setattr(AxK1ForCausalLM, "forward", scripted)
    return lambda text: script.__setitem__(slice(None), tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False))


def test_whole_and_streamed_a_stop_text_is_cut_off_and_a_wrong_call_is_text(served, says):
    client, _ = served
    call = '<tool_call>\n{"name": "add", "arguments": {"a": }}\n</tool_call>'
    said = f'20 first</think>I add {call} <tool_call>{{"name": "add", "arguments": {{"a": 1}}}}</tool_call> 200'
    body = GREEDY | {"max_tokens": 200, "stop": ["x", "20"], **mode(True)}
    says(said)
    whole = client.chat.completions.create(**body)
    says(said)
    chunks = list(client.chat.completions.create(**body, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert whole.choices[0].message.content == f"I add{call}"
    assert whole.choices[0].message.reasoning_content == "20 first"
    assert "".join(delta.content or "" for delta in deltas).strip() == f"I add{call}"
    [called], [streamed] = whole.choices[0].message.tool_calls, [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert called.function.model_dump() == streamed.function.model_dump() == {"name": "add", "arguments": '{"a": 1}'}
    assert chunks[-1].usage == whole.usage and chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stream_ends_as_openais_and_an_error_in_it_is_json(served, monkeypatch):
    body = GREEDY | {"stream": True}
    assert httpx.post(f"{served[0].base_url}chat/completions", json=body).text.endswith("\n\ndata: [DONE]\n\n")

    def broken(self, **kwargs):
        raise RuntimeError('out of "memory"\n\nof the GPU')

    monkeypatch.setattr(AxK1ForCausalLM, "forward", broken)
    events = httpx.post(f"{served[0].base_url}chat/completions", json=body).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["message"] == 'out of "memory"\n\nof the GPU'
    with pytest.raises(openai.InternalServerError, match='out of "memory"'):
        served[0].chat.completions.create(**GREEDY)


def test_a_cut_thought_has_no_answer(served):
    client, _ = served
    # The ban keeps the block open: what comes is all thought.
    _, tokenizer = served
    ban = {str(tokenizer.convert_tokens_to_ids("</think>")): -1000.0}
    cut = client.chat.completions.create(**GREEDY, **mode(True), logit_bias=ban).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.reasoning_content and cut.message.content == ""


@pytest.mark.parametrize("effort, thinks", [("none", False), ("low", True), ("high", True)])
def test_reasoning_effort_chooses_the_mode(served, effort, thinks):
    client, _ = served
    message = client.chat.completions.create(**GREEDY, reasoning_effort=effort).choices[0].message
    assert hasattr(message, "reasoning_content") == thinks
    # The explicit argument of the template wins.
    body = mode(not thinks)
    message = client.chat.completions.create(**GREEDY, reasoning_effort=effort, **body).choices[0].message
    assert hasattr(message, "reasoning_content") != thinks


def test_tools_and_history_are_accepted(served):
    client, _ = served
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    history = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "20"},
        {"role": "user", "content": [{"type": "text", "text": "And 3 + 4?"}]},
    ]
    reply = client.chat.completions.create(**(GREEDY | {"messages": history}), tools=[tool])
    assert reply.choices[0].message.content
    assert reply.usage.prompt_tokens > 100


@pytest.fixture
def prompt_of(served, monkeypatch):
    """The text that a request makes the model read."""
    client, tokenizer = served
    read, generate = [], AxK1ForCausalLM.generate

    def reading(self, **kwargs):
        read.append(tokenizer.decode(kwargs["input_ids"][0]))
        return generate(self, **kwargs)

    monkeypatch.setattr(AxK1ForCausalLM, "generate", reading)

    def ask(messages: list[dict]) -> str:
        client.chat.completions.create(**(GREEDY | {"messages": messages, "max_tokens": 1}))
        return read.pop()

    return ask


def test_an_answer_goes_back_as_openais_client_dumps_it(served, prompt_of):
    answer = served[0].chat.completions.create(**GREEDY).choices[0].message.model_dump()
    assert answer["tool_calls"] is None and answer["content"]
    for calls in (None, []):
        assert f"</think>{answer['content']}<|im_end|>" in prompt_of([*QUESTION, answer | {"tool_calls": calls}, *QUESTION])


@pytest.mark.parametrize(
    ("arguments", "spelled"), [('{"a": 1}', '{"a": 1}'), ('{"a": ', '{"a": '), ("", "{}")], ids=["json", "none", "empty"]
)
def test_a_call_goes_back_with_its_thought_and_its_words(prompt_of, arguments, spelled):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    called = {"role": "assistant", "reasoning_content": "to add", "content": "I add.", "tool_calls": [call]}
    prompt = prompt_of([*QUESTION, called, {"role": "tool", "tool_call_id": "1", "content": "3"}])
    assert f'<think>to add</think>I add.\n<tool_call>\n{{"name": "add", "arguments": {spelled}}}\n</tool_call>' in prompt


def test_a_request_may_sample_where_the_default_is_greedy(served):
    """The served model is greedy by default: two seeds at a high temperature must differ all the same."""
    client, _ = served
    hot = GREEDY | {"temperature": 5.0}
    texts = {client.chat.completions.create(**hot, seed=seed).choices[0].message.content for seed in (1, 2, 3)}
    assert len(texts) > 1
    assert len({client.chat.completions.create(**GREEDY, seed=seed).choices[0].message.content for seed in (1, 2)}) == 1


def test_a_seed_holds_while_others_ask(served):
    client, _ = served
    hot = GREEDY | {"temperature": 5.0, "seed": 1}
    alone = client.chat.completions.create(**hot).choices[0].message.content
    with ThreadPoolExecutor(4) as asking:
        answers = asking.map(lambda _: client.chat.completions.create(**hot).choices[0].message.content, range(4))
    assert set(answers) == {alone}


def test_models_are_listed(served):
    [model] = served[0].models.list()
    assert model.id == "tiny-axk1" and served[0].models.retrieve("tiny-axk1") == model
    for name in ("other", "skt/A.X-K1"):
        with pytest.raises(openai.NotFoundError, match=f"'{name}' does not exist; this server has 'tiny-axk1'") as caught:
            served[0].models.retrieve(name)
        assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model", "invalid_request_error")


def test_bad_requests_are_answered(served):
    client, _ = served
    with pytest.raises(openai.BadRequestError, match="thinking_budget=-1 is not a number of tokens"):
        client.chat.completions.create(**GREEDY, **mode(True, thinking_budget=-1))
    with pytest.raises(openai.BadRequestError, match="reasoning_effort='much' is unknown"):
        client.chat.completions.create(**GREEDY, reasoning_effort="much")
    with pytest.raises(openai.BadRequestError, match="enable_thinking=None names no mode"):
        client.chat.completions.create(**GREEDY, **mode(None))
    with pytest.raises(openai.BadRequestError, match="pinned to 'tiny-axk1'"):
        client.chat.completions.create(**(GREEDY | {"model": "other"}))
    with pytest.raises(openai.UnprocessableEntityError, match="Unexpected fields"):
        client.chat.completions.create(**GREEDY, extra_body={"budget": 3})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n=2 answers were asked for and one is given"),
        ({"logprobs": True}, "logprobs are not given"),
        ({"response_format": {"type": "json_object"}}, "response_format 'json_object' is not enforced"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url is not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_dropped_is_refused(served, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        served[0].chat.completions.create(**(GREEDY | body))


def test_a_request_without_messages_is_answered(served):
    reply = httpx.post(f"{served[0].base_url}chat/completions", json={"model": "tiny-axk1"})
    assert reply.status_code == 400 and "messages=None is no conversation" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"messages": ["hi"]}, "messages[0] is 'hi'; give an object with role and content"),
        ({"messages": [{"content": "hi"}]}, "give an object with role and content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0] has the content 5; give a text"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0] has the part 'hi'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0] has the part"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "Unknown message role wizard"),
        ({"messages": [{"role": "user", "content": "2 + 3 " * 3000}]}, "positions; shorten it"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs='x' is no table"),
        ({"response_format": "json"}, "response_format 'json' is not enforced"),
        ({"stop": 5}, "stop=5 is no text that can be met"),
        ({"stop": [""]}, "is no text that can be met"),
        ({"temperature": -1}, "temperature=-1 is not a number from 0"),
        ({"thinking_budget": 1.5}, "thinking_budget=1.5 is not a number of tokens"),
        ({"max_tokens": 0}, "max_tokens=0 is not a number of tokens from 1"),
        ({"top_p": 2}, "top_p=2 is not a share"),
        ({"logit_bias": {"a": 1}}, "is no table of token ids"),
        ({"tool_choice": "required"}, "tool_choice='required' is not enforced"),
        ({"presence_penalty": 1}, "presence_penalty is not read here"),
        ({"top_logprobs": 3}, "logprobs are not given"),
        ({"seed": 10**30}, "is not a whole number of 64 bits"),
        ({"thinking_budget": 10**30}, "is not a number of tokens from 0 and below 2**63"),
        ({"logit_bias": {"99999": 1}}, "logit_bias names token 99999"),
        ({"logit_bias": {"5": 10**400}}, "is no table of token ids"),
        ({"chat_template_kwargs": {"tokenize": False}}, "holds tokenize, which this server sets; leave it out"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]}, "messages[0] has the tool_calls 5; give"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]}, "and arguments"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": 5}]}, "has the reasoning_content 5; give a"),
        ({"tools": 5}, "tools=5 is no list of functions"),
        ({"generation_config": 5}, "generation_config is not read here"),
        ({"frequency_penalty": -1}, "frequency_penalty=-1 is not a number from -0.9 to 2"),
        ({"chat_template_kwargs": {"truncation": True}}, "holds truncation, which is no variable of the template"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "holds half a character"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_request_is_one_sentence_before_anything_is_streamed(served, body, complaint, stream):
    # Not httpx's own JSON, which cannot hold half a character.
    content = json.dumps(GREEDY | {"stream": stream} | body)
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{served[0].base_url}chat/completions", content=content, headers=headers)
    assert reply.status_code == 400 and complaint in reply.json()["error"]["message"]


def test_an_answer_ends_at_the_models_last_position(served):
    messages = [{"role": "user", "content": "2 + 3 " * 160}]
    reply = served[0].chat.completions.create(**(GREEDY | {"messages": messages, "max_tokens": 10**18}))
    assert reply.usage.total_tokens == 1024 and reply.choices[0].finish_reason == "length"


def test_a_body_that_is_no_object_and_a_wrong_path_are_told_in_openais_form(served):
    for content in (b"{x", b"[1]", b"", b"\xff"):
        reply = httpx.post(f"{served[0].base_url}chat/completions", content=content)
        assert reply.status_code == 400 and "body is no JSON object" in (said := reply.json()["error"]["message"])
        assert said.endswith("; send one, as application/json.")
    assert httpx.get(f"{served[0].base_url}nothing").json()["error"]["message"] == "Not Found"


def test_what_openais_clients_send_is_taken(served):
    """Nulls, whole biases, no stop at all, tools that are not to be used, and the newer name of a system message."""
    client, _ = served
    plain = client.chat.completions.create(**GREEDY)
    body = {"stop": [], "tool_choice": "none", "logit_bias": {"5": -100}, "top_p": None, "tools": [{"type": "function"}]}
    reply = httpx.post(f"{client.base_url}chat/completions", json=GREEDY | body | {"chat_template_kwargs": None})
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] == plain.usage.prompt_tokens
    system = [client.chat.completions.create(**(GREEDY | {"messages": [{"role": role, "content": "Be brief."}, *QUESTION]}))
              for role in ("system", "developer")]  # fmt: skip
    assert system[0].choices[0].message == system[1].choices[0].message


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_keeps_nobody_waiting(served, stream, monkeypatch):
    client, tokenizer = served
    steps, generate = [], AxK1ForCausalLM.forward

    def forward(self, *args, **kwargs):
        steps.append(time.monotonic())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(AxK1ForCausalLM, "forward", forward)
    ban = {str(tokenizer.convert_tokens_to_ids("</think>")): -1000.0}
    body = GREEDY | {"max_tokens": 100_000, "stream": stream, "logit_bias": ban}
    body |= {"chat_template_kwargs": {"enable_thinking": True}}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{client.base_url}chat/completions", json=body, timeout=3.0) as reply,
    ):
        for _ in reply.iter_raw():
            # The first thing a stream says comes before the model's first step.
            if steps:
                raise httpx.ReadTimeout("heard enough")
    hung_up = time.monotonic()
    assert client.chat.completions.create(**GREEDY, timeout=20).choices[0].message.content
    assert steps[0] < hung_up, "vacuous: it had not begun"
    time.sleep(0.5)
    done = len(steps)
    time.sleep(0.5)
    assert len(steps) == done


@pytest.mark.parametrize("wrong", [{"port": 99_999}, {"temperature": -1.0}, {"top_p": 2.0}])
def test_wrong_options_are_refused_before_the_model_is_read(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run_server("nowhere", **wrong)


def test_run_server_serves_the_folder(checkpoint, monkeypatch):
    ran = {}
    monkeypatch.setattr("serving.server.uvicorn.run", lambda app, **settings: ran.update(app=app, **settings))
    run_server(checkpoint, device_map="cpu", temperature=0)
    run_server(checkpoint, host="127.0.0.1", port=1, device_map="cpu", temperature=0.7, think=True)
    assert (ran["host"], ran["port"]) == ("127.0.0.1", 1)
    assert "/v1/chat/completions" in ran["app"].openapi()["paths"]
