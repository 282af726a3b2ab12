"""Does the terminal chat stream both parts, switch modes, keep the history and survive an interruption?"""

import io
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.generation_axk1 import split_thinking
from serving import chat as chat_room
from serving.chat import CONTROLS, Chat, run_chat
from serving.loading import load_for_chat, sampling


@pytest.fixture
def talk(checkpoint):
    """A greedy chat and the text that it has shown, colours included."""
    model, tokenizer = load_for_chat(checkpoint, device_map="cpu")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", width=400)
    settings = {"max_new_tokens": 12, "do_sample": False}
    chat = Chat(model, tokenizer, console, settings, think=True, budget=4, system=None)
    chat.shown = shown
    return chat


def test_thought_is_dimmed_and_kept_apart(talk):
    talk.say("What is 4 * 5?")
    reply = talk.messages[-1]
    assert reply["reasoning_content"] and reply["content"]
    shown = talk.shown.getvalue()
    dimmed = "".join(re.findall(r"\x1b\[2;3m(.*?)\x1b\[0m", shown))
    assert dimmed == reply["reasoning_content"].translate(CONTROLS)
    assert strip_colours(shown) == f"{reply['reasoning_content']}\n{reply['content']}\n".translate(CONTROLS)


def strip_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_mode_switches_from_turn_to_turn(talk):
    talk.say("one")
    talk.command("/no-think")
    talk.say("two")
    talk.command("/think")
    talk.command("/budget 2")
    # Left alone it would never close.
    talk.model.generation_config.sequence_bias = [[[talk.model.generation_config.end_think_token_id], -1000.0]]
    talk.say("three")
    thoughts = [message.get("reasoning_content") for message in talk.messages if message["role"] == "assistant"]
    assert thoughts[0] and thoughts[2] and not thoughts[1]
    assert talk.messages[-1]["content"]
    assert len(talk.tokenizer.tokenize(thoughts[2])) <= 2


def test_what_the_model_writes_is_no_markup(talk):
    talk._show("answer", "[bold]x[/bold] = 12\n")
    assert talk.shown.getvalue() == "[bold]x[/bold] = 12\n"


def test_what_the_model_writes_commands_no_terminal(talk):
    talk._show("answer", "a\r\n\x1b]0;owned\x07\x9b")
    assert talk.shown.getvalue() == "a\n\ufffd]0;owned\ufffd\ufffd"


def test_history_reaches_the_model_without_old_thoughts(talk):
    talk.say("one")
    prompts = []
    original = talk.model.generate
    talk.model.generate = lambda **kwargs: prompts.append(kwargs["input_ids"]) or original(**kwargs)
    talk.say("two")
    del talk.model.generate
    text = talk.tokenizer.decode(prompts[0][0])
    assert talk.messages[1]["content"] in text and "one" in text and "two" in text
    assert talk.messages[1]["reasoning_content"] not in text
    talk.command("/reset")
    assert talk.messages == []


def test_a_cut_thought_is_reported(talk):
    talk.command("/budget off")
    talk.settings["max_new_tokens"] = 3
    talk.model.generation_config.suppress_tokens = [talk.model.generation_config.end_think_token_id]
    talk.say("one")
    assert "cut at 3 tokens" in strip_colours(talk.shown.getvalue())
    assert talk.messages[-1]["content"] == ""


def test_an_answer_ends_at_the_models_last_position(talk):
    talk.command("/budget off")
    talk.model.generation_config.suppress_tokens = [talk.model.generation_config.end_think_token_id]
    talk.settings["max_new_tokens"] = 4096
    asked = "2 + 3 " * 160
    talk.say(asked)
    prompt = talk.tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    room = 1024 - len(prompt["input_ids"])
    assert 0 < room < 500 and f"cut at {room} tokens" in strip_colours(talk.shown.getvalue())


def test_interruption_drops_the_turn_only(talk):
    talk.say("one")
    before = list(talk.messages)

    def interrupted(**kwargs):
        raise KeyboardInterrupt

    talk.model.generate = interrupted
    talk.say("two")
    del talk.model.generate
    assert talk.messages == before


def test_a_conversation_that_outgrew_the_model_is_told_and_goes_on(talk):
    talk.say("2 + 3 " * 1000)
    assert "and the model has 1,024 positions; /reset, or say less" in strip_colours(talk.shown.getvalue())
    assert talk.messages == []
    talk.say("one")
    assert talk.messages[-1]["content"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"top_p": 2.0}, {"max_new_tokens": 0}, {"budget": -1}, {"dtype": "float3"},
        {"dtype": "float8_e4m3fn"}, {"device_map": "cuda"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused_before_the_model_is_read(wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} "):
        run_chat("nowhere", **wrong)


def test_unknown_commands_change_nothing(talk):
    for line in ("/budget", "/budget -3", "/budget many", "/what", "/no-think 2 + 3"):
        talk.command(line)
        assert f"{line} is not a command" in strip_colours(talk.shown.getvalue())
    assert talk.budget_tokens == 4 and talk.think and talk.messages == []


def test_a_line_with_half_a_letter_is_left_out_and_the_chat_goes_on(talk, monkeypatch):
    half = UnicodeDecodeError("utf-8", b"\xec\x95", 0, 2, "unexpected end of data")
    lines = iter([half, "\udcec\udc95", "/\udcec", "three", "/quit"])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr(talk.console, "input", typed)
    talk.run()
    assert talk.shown.getvalue().count("that line was not UTF-8") == 3
    assert [message["content"] for message in talk.messages if message["role"] == "user"] == ["three"]


def test_run_chat_reads_until_quit(checkpoint, monkeypatch):
    lines = iter(["hello", "/think", "", "again", "/quit", "never read"])
    shown = io.StringIO()

    class Scripted(Console):
        def __init__(self):
            super().__init__(file=shown, width=400)

        def input(self, prompt=""):
            return next(lines)

    monkeypatch.setattr(chat_room, "Console", Scripted)
    torch.manual_seed(0)
    run_chat(checkpoint, budget=3, max_new_tokens=8, device_map="cpu", system="Be brief.")
    assert next(lines) == "never read"
    assert shown.getvalue().strip()


def test_temperature_zero_is_greedy():
    assert sampling(0, 0.95) == {"do_sample": False}
    assert sampling(0.6, 0.95) == {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def test_loading_refuses_what_it_cannot_serve(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AxK1ForCausalLM.from_pretrained(checkpoint)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no chat template"):
        load_for_chat(str(tmp_path / "bare"), device_map="cpu")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "other")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=330, **small)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds LlamaForCausalLM, not an A.X K1 model"):
        load_for_chat(str(tmp_path / "other"), device_map="cpu")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder, nor to be had from the Hub "):
        load_for_chat(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no tokenizer that can be read "):
        load_for_chat(str(tmp_path))


def test_pipeline_returns_reasoning_content(checkpoint):
    """The tokenizer's response template is what transformers' own pipeline cuts the output with."""
    from transformers import pipeline

    model, tokenizer = load_for_chat(checkpoint, device_map="cpu")
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is 4 * 5?"}]
    for mode in (True, False):
        settings = {"enable_thinking": mode, "thinking_budget": 4, "max_new_tokens": 12, "do_sample": False}
        reply = ask(chat, **settings)[0]["generated_text"][-1]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=mode, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, **settings)
        new = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        split = split_thinking(new, enable_thinking=mode)
        assert reply["content"] == split.answer.strip()
        assert reply.get("reasoning_content", "") == split.thought.strip()
        assert bool(split.thought) == mode
