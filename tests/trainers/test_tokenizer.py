"""Is the tokenizer lossless and reproducible, and does the chat template say what each mode needs?"""

import itertools
import json
import random
import re
import subprocess
import sys

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained

from trainers.tokenizer import (
    ASCII_PATTERN,
    CHAT_TEMPLATE,
    PRE_TOKEN_PATTERN,
    SPECIAL_TOKENS,
    TRAINING_CHAT_TEMPLATE,
    count_pieces,
    train_tokenizer,
)

TEXTS = [
    "The answer to 12 + 3 is 15.\n",
    "안녕하세요, 세계!",
    "def f(x):\n    return x * 10",
    "答えは四十二です。",
] * 10
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASK = {"role": "user", "content": "2 + 2?"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 360)


def render(tokenizer, messages, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12345",
        " leading and trailing ",
        "안녕\u1112\u1161\u11ab",
        "e\u0301 é",
        "\x00\x7f\ufeff😀",
        "a\r\n\tb\n\n\n c",
        "<tag> </tag>",
    ],
)
def test_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_tags_are_one_token(tokenizer):
    assert tokenizer.tokenize("<think>120 34</think>") == ["<think>", "1", "2", "0", "Ġ", "3", "4", "</think>"]
    learned = [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) > 1]
    assert not learned
    assert len(tokenizer.tokenize("The answer")) == 2, "nothing was learned"


def test_text_is_split_once_by_our_pattern(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("f(x) isn't 42\n\n !!")
    assert [piece for piece, _ in split] == ["f", "(x", ")", "Ġisn", "'t", "Ġ", "4", "2", "ĊĊ", "Ġ!!"]


def test_text_of_ascii_is_split_alike_by_the_faster_pattern():
    split, faster = regex.compile(PRE_TOKEN_PATTERN).findall, re.compile(ASCII_PATTERN, re.ASCII).findall
    every = map("".join, itertools.product(map(chr, range(128)), repeat=2))
    # A letter of each kind, a contraction's, a digit, blanks that Unicode and ASCII count differently.
    tricky = map("".join, itertools.product("aS'5 \t\n\r\x0b\x1c_.", repeat=4))
    texts = [*every, *tricky]
    assert [split(text) for text in texts] == [faster(text) for text in texts]


def test_tags_survive_decoding_without_special_tokens(tokenizer):
    ids = tokenizer("<|im_start|><think>a</think>b<|im_end|><|endoftext|><|pad|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>b"


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) <= 360
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match="use 262 or more"):
        train_tokenizer(TEXTS, 261)
    assert len(train_tokenizer(TEXTS, 262)) == 262


def test_same_texts_give_the_same_tokenizer(tokenizer, tmp_path):
    """In another process, with another hash seed: nothing may depend on the order of a hash map."""
    program = (
        "import sys; from trainers.tokenizer import train_tokenizer; import ast;"
        "train_tokenizer(ast.literal_eval(sys.argv[1]), 360).save_pretrained(sys.argv[2])"
    )
    tokenizer.save_pretrained(tmp_path / "here")
    subprocess.run([sys.executable, "-c", program, repr(TEXTS), str(tmp_path / "there")], check=True)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_text() == (tmp_path / "there" / name).read_text()


def test_counted_pieces_give_what_tokenizers_learns_from_the_texts():
    """Its own reading and splitting is the oracle; blanks, breaks, marks and cases of every kind are in the texts."""
    rng = random.Random(0)
    kinds = [" ", "  \n", "\r\n\t", "don't", "'RE", "e\u0301", "안녕", "セカイ", "٣42", "!?\n", "x_y", "\u00a0"]
    kinds += ["\U00020000", "ſ's", "😀"]
    texts = ["".join(rng.choices(kinds, k=60)) for _ in range(200)]
    ours = train_tokenizer(texts, 700)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = ours.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [token for token in SPECIAL_TOKENS if token not in ("<think>", "</think>")]
    theirs.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=698, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    learned, expected = (json.loads(each.to_str())["model"] for each in (ours.backend_tokenizer, theirs))
    assert learned["merges"] == expected["merges"] and len(expected["merges"]) > 300


def test_no_more_pieces_are_held_than_asked_and_the_sample_is_fair(caplog):
    rng = random.Random(1)
    common = ["the", "river", "bridge", "한국어"]
    texts = [" ".join([*common * 2, *("".join(rng.choices("abcdefgh", k=9)) for _ in range(20))]) for _ in range(2000)]
    whole = count_pieces(texts)
    counts = count_pieces(texts, most=3000)
    assert len(whole) > 30_000 and len(counts) <= 3000 and counts == count_pieces(texts, most=3000), "reproducible"
    rates = [record.args[1] for record in caplog.records]
    assert rates[:4] == [2, 4, 8, 16] and "More than 3,000 different pieces of text" in caplog.text
    for piece in (" river", " bridge", " 한국어"):
        assert counts[piece] * max(rates) == pytest.approx(whole[piece], rel=0.25)


def test_saved_tokenizer_keeps_its_templates(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.response_template == tokenizer.response_template
    assert loaded.padding_side == "left"
    assert render(loaded, [ASK]) == render(tokenizer, [ASK])


HEADER = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "settings, end",
    [
        ({"enable_thinking": True}, "<think>"),
        ({"enable_thinking": False}, "</think>"),
        ({}, "</think>"),
        ({"enable_thinking": None}, ""),
    ],
)
def test_generation_prompt_ends_in_the_modes_token_alone(tokenizer, settings, end):
    assert render(tokenizer, [ASK], add_generation_prompt=True, **settings) == HEADER + end


@pytest.mark.parametrize("inline", [True, False])
def test_completion_continues_its_prompt(tokenizer, inline):
    """Prompt/completion training cuts at the prompt's length: the prompt must be an exact prefix of the tokens."""
    if inline:
        thinking, direct = {"content": "<think>so\n4</think>It is 4."}, {"content": "</think>It is 4."}
    else:
        thinking, direct = {"content": "It is 4.", "reasoning_content": "so\n4"}, {"content": "It is 4."}
    for mode, answer, rest in ((True, thinking, "so\n4</think>It is 4."), (False, direct, "It is 4.")):
        prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, enable_thinking=mode)["input_ids"]
        whole = tokenizer.apply_chat_template([ASK, {"role": "assistant", **answer}], enable_thinking=mode)["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == rest + "<|im_end|>\n"


def test_old_thoughts_are_dropped_and_running_ones_kept(tokenizer):
    old = [ASK, {"role": "assistant", "content": "4", "reasoning_content": "old thought"}]
    inline = [ASK, {"role": "assistant", "content": "<think>old thought</think>4"}]
    running = [
        {"role": "user", "content": "and 1 + 1?"},
        {"role": "assistant", "content": "", "reasoning_content": "running thought", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ]
    text = render(tokenizer, old + running, tools=[TOOL], add_generation_prompt=True, enable_thinking=True)
    assert text == render(tokenizer, inline + running, tools=[TOOL], add_generation_prompt=True, enable_thinking=True)
    assert "old thought" not in text
    assert "<|im_start|>assistant\n</think>4<|im_end|>\n" in text
    assert (
        '<think>running thought</think><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>" in text
    )


def test_without_a_mode_a_direct_answer_has_no_tag(tokenizer):
    """The rows of an instruct stage that knows no modes."""
    assert (
        render(tokenizer, [ASK, {"role": "assistant", "content": "4"}], enable_thinking=None)
        == HEADER + "4<|im_end|>\n"
    )


def test_only_the_first_closing_tag_ends_the_thought(tokenizer):
    text = render(tokenizer, [ASK, {"role": "assistant", "content": "<think>a</think>b</think>c"}])
    assert text == HEADER + "<think>a</think>b</think>c<|im_end|>\n"


def test_a_thought_that_was_cut_is_no_answer(tokenizer):
    chat = [ASK, {"role": "assistant", "content": "<think>cut off"}, {"role": "user", "content": "go on"}]
    assert "cut off" not in render(tokenizer, chat)


def test_tools_and_system_share_the_first_turn(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    text = render(tokenizer, [system, ASK], tools=[TOOL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n") and text.count("<|im_start|>system") == 1
    assert '{"type": "function", "function": {"name": "add"' in text
    assert render(tokenizer, [system, ASK]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert render(tokenizer, [ASK], tools=[TOOL]).startswith("<|im_start|>system\n# Tools\n\n")


def test_arguments_as_text_and_content_in_parts(tokenizer):
    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chats = [[ASK, {"role": "assistant", "content": None, "tool_calls": [call]}] for call in (CALL, as_text)]
    assert render(tokenizer, chats[0]) == render(tokenizer, chats[1])
    parts = {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}
    assert render(tokenizer, [parts]) == render(tokenizer, [ASK])
    with pytest.raises(Exception, match="reads text only, got a content part of type image"):
        render(tokenizer, [{"role": "user", "content": [{"type": "image", "url": "x"}]}])
    with pytest.raises(Exception, match="Unknown message role critic"):
        render(tokenizer, [{"role": "critic", "content": "x"}])


CHATS = [
    [ASK],
    [ASK, {"role": "assistant", "content": "4"}],
    [ASK, {"role": "assistant", "content": "4", "reasoning_content": "two twos"}],
    [{"role": "system", "content": "s"}, ASK, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    [ASK, {"role": "assistant", "content": "<think>a</think>4"}, ASK, {"role": "assistant", "content": "4"}],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_training_template_renders_the_same(tokenizer, chat, tools, prompt):
    for mode in (True, False, None):
        settings = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": mode}
        assert render(tokenizer, chat, chat_template=TRAINING_CHAT_TEMPLATE, **settings) == render(
            tokenizer, chat, **settings
        )


def test_training_template_marks_what_is_generated(tokenizer):
    chat = [ASK, {"role": "assistant", "content": "4", "reasoning_content": "old"}, ASK]
    chat += [{"role": "assistant", "content": "four", "reasoning_content": "new"}]
    encoded = tokenizer.apply_chat_template(
        chat, chat_template=TRAINING_CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "4<|im_end|>new</think>four<|im_end|>"


def test_trl_accepts_the_training_template(tokenizer):
    assert is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer, TRAINING_CHAT_TEMPLATE)


@pytest.mark.parametrize(
    "mode, output, expected",
    [
        (True, "so</think>4<|im_end|>", {"reasoning_content": "so", "content": "4"}),
        (True, "so\n</think>\n\n4<|im_end|><|pad|><|pad|>", {"reasoning_content": "so", "content": "4"}),
        (True, "</think>4", {"content": "4"}),
        (True, "cut", {"reasoning_content": "cut"}),
        (True, "stopped<|im_end|><|pad|>", {"reasoning_content": "stopped"}),
        (False, "4<|im_end|>", {"content": "4"}),
        (None, "<think>so</think>4", {"reasoning_content": "so", "content": "4"}),
        (
            False,
            'Let me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            {
                "content": "Let me.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
                ],
            },
        ),
    ],
)
def test_response_template(tokenizer, mode, output, expected):
    chat = [ASK, {"role": "assistant", "content": "4", "reasoning_content": "old"}, ASK]
    prompt = render(tokenizer, chat, add_generation_prompt=True, enable_thinking=mode)
    assert tokenizer.parse_response(output, prefix=prompt) == {"role": "assistant", **expected}
    ids = tokenizer(output)["input_ids"]
    assert tokenizer.parse_response(ids, prefix=tokenizer(prompt)["input_ids"]) == {"role": "assistant", **expected}
