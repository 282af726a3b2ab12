"""Are documents made of every seed and topic once, with their origin, through a server or a model here, and a kill survived?"""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import axk1
from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from trainers.synthesis import Reply, Request, local_writer, seed_requests, synthesize, topic_requests
from trainers.tokenizer import train_tokenizer


@pytest.fixture
def server():
    """OpenAI's chat completions on loopback: says the prompt's last line; prompts with EMPTY, LONG and FAIL misbehave."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            asked.append(body)
            if "FAIL" in prompt:
                self.send_response(400)
                self.end_headers()
                return
            said = "" if "EMPTY" in prompt else f"made of: {prompt.splitlines()[-1]}"
            message = {"role": "assistant", "content": said, "reasoning_content": "a thought"}
            reason = "length" if "LONG" in prompt else "stop"
            choice = {"index": 0, "message": message, "finish_reason": reason}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
        http.shutdown()
        thread.join()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seeds_through_a_server(tmp_path, server, capsys):
    url, asked = server
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("water boils", "EMPTY", "LONG tale", "FAIL"))
    )
    arguments = ["curate", "synthesize", str(tmp_path / "made.jsonl"), "--seeds", str(seeds), "--server", url]
    arguments += ["--model", "m", "--language", "Korean", "--temperature", "0.5"]
    assert axk1.main(arguments) == 0
    assert (
        "written 1" in (said := capsys.readouterr().out)
        and "empty 1" in said
        and "cut 1" in said
        and "failed 1" in said
    )
    (made,) = rows(tmp_path / "made.jsonl")
    assert made["text"] == "made of: water boils" and "thought" not in made["text"]
    assert (made["seed_file"], made["seed_position"], made["model"]) == (str(seeds), 0, "m")
    assert made["prompt"] in [body["messages"][0]["content"] for body in asked] and " in Korean that " in made["prompt"]
    assert {body["temperature"] for body in asked} == {0.5}
    before = len(asked)
    assert axk1.main(arguments) == 0
    assert "there already 1" in capsys.readouterr().out and len(asked) == before + 3


def test_seeds_that_cannot_be_read_are_told_and_none_is_refused(tmp_path, server, capsys):
    url, asked = server
    seeds, out = tmp_path / "seeds.jsonl", tmp_path / "made.jsonl"
    seeds.write_text('{"text": "water boils"}\n{broken\n{"body": "ice melts"}\n')
    arguments = ["curate", "synthesize", str(out), "--seeds", str(seeds), "--server", url, "--model", "m"]
    assert axk1.main(arguments) == 0
    assert "seeds not read: broken JSON 1, no text 1" in capsys.readouterr().out
    assert axk1.main([*arguments, "--text-key", "content"]) == 2
    error = capsys.readouterr().err
    assert "holds no text under 'content' (no text: 2, broken JSON: 1)" in error and "--text-key" in error
    assert len(asked) == 1 and len(rows(out)) == 1
    (tmp_path / "none.txt").write_text("\n")
    arguments = ["curate", "synthesize", str(tmp_path / "new.jsonl"), "--topics", str(tmp_path / "none.txt")]
    assert axk1.main([*arguments, "--server", url, "--model", "m"]) == 2
    assert "holds no topic" in capsys.readouterr().err and not (tmp_path / "new.jsonl").exists()


def test_topics_in_several_forms(tmp_path, server):
    url, _ = server
    topics = tmp_path / "topics.txt"
    topics.write_text("gravity\n\n조선 시대\n")
    arguments = ["curate", "synthesize", str(tmp_path / "made.jsonl"), "--topics", str(topics), "--server", url]
    assert axk1.main([*arguments, "--model", "m", "--forms", "3"]) == 0
    made = rows(tmp_path / "made.jsonl")
    assert [row["topic"] for row in made] == ["gravity"] * 3 + ["조선 시대"] * 3
    assert len({row["form"] for row in made[:3]}) == 3 and len({row["id"] for row in made}) == 6
    assert all(row["topic"] in row["prompt"] for row in made)


def test_a_server_that_is_not_there_is_said_in_one_sentence(tmp_path, server, capsys):
    url, _ = server
    (tmp_path / "topics.txt").write_text("FAIL\n")
    arguments = ["curate", "synthesize", str(tmp_path / "o.jsonl"), "--topics", str(tmp_path / "topics.txt")]
    assert axk1.main([*arguments, "--server", url, "--model", "m"]) == 2
    assert "None of 1 requests was answered" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_loses_nothing(tmp_path):
    requests = [Request(f"prompt {number}", {"topic": str(number)}) for number in range(20)]
    asked = []

    def write(request):
        asked.append(request.id)
        if len(asked) == 13:
            raise KeyboardInterrupt
        return Reply(request.prompt.upper(), True)

    out = tmp_path / "made.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(requests, write, out, model="m", workers=1)
    with out.open("a") as file:
        file.write('{"id": "half')
    synthesize(requests, write, out, model="m", workers=1)
    assert [row["text"] for row in rows(out)] == [f"PROMPT {number}" for number in range(20)]
    # What was written before the kill is not asked again.
    assert len(asked) < 33


def test_what_occurs_twice_is_asked_once(tmp_path):
    requests = [Request(f"prompt {number % 2}", {}) for number in range(6)]
    counts = synthesize(requests, lambda request: Reply("said", True), tmp_path / "made.jsonl", model="m")
    assert counts["written"] == len(rows(tmp_path / "made.jsonl")) == 2 and counts["there already"] == 0


@pytest.mark.parametrize("content", ['{"text": "mine"}\nand more', "[1]\n", "notes\nof mine", "notes"])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    out = tmp_path / "notes.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match="notes.jsonl holds lines that no synthesis wrote; name another file"):
        synthesize([Request("prompt", {})], lambda request: Reply("said", True), out, model="m")
    assert out.read_text() == content


def test_a_thought_is_no_document(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["user assistant one two three"], 300)
    AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = local_writer(str(tmp_path), max_tokens=20)
    for said, document in (("<think>one</think>two<|im_end|>", "two"), ("three<|im_end|>", "three")):
        ids = torch.tensor([tokenizer(said).input_ids])
        monkeypatch.setattr(
            AxK1ForCausalLM, "generate", lambda self, input_ids, ids=ids, **kw: torch.cat([input_ids, ids], dim=1)
        )
        assert write(Request("prompt", {})) == Reply(document, True)


def test_a_model_in_this_process(tmp_path):
    tokenizer = train_tokenizer(["Write about this topic"], 300)
    torch.manual_seed(0)
    AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=len(tokenizer))).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    write = local_writer(str(tmp_path / "m"), max_tokens=6)
    one, two = Request("about rivers", {}), Request("about clouds", {})
    first = [write(one), write(two)]
    assert [write(two), write(one)] == first[::-1], "a text depends on the order of requests"
    assert first[0] != first[1] and not first[0].complete


@pytest.fixture
def axk1_serve(tmp_path):
    """`axk1 serve` over loopback, with a model that says letters and, about every sixth token, ends its turn."""
    pytest.importorskip("transformers", minversion="5.21", reason="serving needs transformers >= 5.21")
    import uvicorn

    from serving.loading import load_for_chat
    from serving.server import build_app

    tokenizer = train_tokenizer(["Write about this topic"], 300)
    model = AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=len(tokenizer), num_hidden_layers=2))
    size = model.config.hidden_size
    letters = [n for n, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if token.isalpha()]
    with torch.no_grad():
        # One large embedding for all: the last hidden state is nearly (1, ..., 1), and a row's sum its logit.
        model.model.embed_tokens.weight.fill_(1000.0)
        model.lm_head.weight.fill_(-50 / size)
        model.lm_head.weight[letters] = 0
        model.lm_head.weight[tokenizer.eos_token_id] = math.log(len(letters) / 6) / size
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    app = build_app(*load_for_chat(str(tmp_path / "tiny"), device_map="cpu"), name="tiny")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(timeout=60)


def test_our_own_server_writes_documents(tmp_path, axk1_serve, capsys):
    (tmp_path / "topics.txt").write_text("rivers\nclouds\n")
    out = tmp_path / "out.jsonl"
    command = ["curate", "synthesize", str(out), "--topics", str(tmp_path / "topics.txt"), "--server", axk1_serve]
    said = []
    # An empty reply is asked again by the next run.
    while len(said) < 8 and (not out.exists() or len(out.read_text().splitlines()) < 4):
        assert axk1.main([*command, "--model", "tiny", "--forms", "2", "--max-tokens", "100"]) == 0
        said.append(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 4 and "written" in said[0] and "failed" not in "".join(said)
    assert {row["topic"] for row in rows} == {"rivers", "clouds"} and {row["model"] for row in rows} == {"tiny"}
    assert all(row["text"] and "think>" not in row["text"] and "<|" not in row["text"] for row in rows)


def test_forms_that_do_not_exist_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(ValueError, match="use 1 to 5"):
        list(topic_requests(tmp_path / "t.txt", language="English", forms_each=6, seed=0))


def test_a_seed_is_quoted_up_to_a_bound(tmp_path):
    (tmp_path / "long.txt").write_text("x" * 100_000)
    (request,) = seed_requests(tmp_path / "long.txt", language="English", forms_each=1, seed=0, counts=Counter())
    assert 6_000 < len(request.prompt) < 7_000
