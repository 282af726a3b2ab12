"""Does generation keep its promises of mode, budget and format, whatever the model would rather say?

The model is random, and its output rows for the tags and the end of turn are stretched, so that left alone it breaks the
format nearly always: what holds here holds by enforcement.
"""

import logging
import re
from unittest import mock

import pytest
import torch
import transformers
from packaging import version
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.generation_axk1 import (
    ThinkingFormat,
    ThinkingIds,
    ThinkingStreamer,
    set_thinking_tokens,
    split_thinking,
)
from tests.random_models import tiny_chat_config
from trainers.tokenizer import train_tokenizer

QUESTIONS = ["hello", "what is 12 + 3, and what is 4 * 5?", "세계", "x = 7\ny = x"]
MIXED = [True, False, False, True]
NEW_TOKENS = 24


def tiny_model(tokenizer, seed: int = 0, stretch: float = 5.0) -> AxK1ForCausalLM:
    config = tiny_chat_config(len(tokenizer))
    torch.manual_seed(seed)
    model = AxK1ForCausalLM(config).eval()
    set_thinking_tokens(model.generation_config, tokenizer)
    ids = model.generation_config
    with torch.no_grad():
        model.lm_head.weight[[ids.think_token_id, ids.end_think_token_id, *ids.eos_token_id]] *= stretch
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*QUESTIONS, "The answer is 42. 안녕하세요.\n"] * 20, 330)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def ids(model):
    return model.generation_config


@pytest.fixture
def never_closing(tokenizer):
    """A model whose logit for `</think>` and for the end is 0: greedy decoding never takes either."""
    return tiny_model(tokenizer, stretch=0.0)


def prompts(tokenizer, questions=QUESTIONS, **kwargs):
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True, **kwargs
    )


def generated(output_BS, prompt, ids) -> list[list[int]]:
    """What each row generated, up to and with its first stop token."""
    rows = []
    for row in output_BS[:, prompt["input_ids"].shape[1] :].tolist():
        ends = [position for position, token in enumerate(row) if token in ids.eos_token_id]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def breaks_format(row: list[int], thinking: bool, ids) -> bool:
    """The promise, token by token. A thought that the length cut is no break."""
    state = "thought" if thinking else "answer"
    for token in row:
        if token == ids.end_think_token_id and state == "thought":
            state = "answer"
        elif token in (ids.think_token_id, ids.end_think_token_id):
            return True
        elif token in ids.eos_token_id and state == "thought":
            return True
    return False


def thought_tokens(row: list[int], ids) -> int:
    return row.index(ids.end_think_token_id) if ids.end_think_token_id in row else len(row)


def test_left_alone_the_model_breaks_the_format(model, tokenizer, ids):
    prompt = prompts(tokenizer)
    torch.manual_seed(0)
    output = model.generate(
        **prompt,
        enable_thinking=MIXED,
        enforce_format=False,
        do_sample=True,
        num_return_sequences=8,
        max_new_tokens=NEW_TOKENS,
    )
    broken = [breaks_format(row, MIXED[i // 8], ids) for i, row in enumerate(generated(output, prompt, ids))]
    assert sum(broken) > 0.8 * len(broken)


DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 4},
    "top_p": {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams_all": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "min_tokens": {"min_new_tokens": 8, "do_sample": True},
}


@pytest.mark.parametrize("budget", [None, 0, 3, [0, 5, None, 2]], ids="budget={}".format)
@pytest.mark.parametrize("decoding", DECODING)
def test_format_and_budget_hold(model, tokenizer, ids, decoding, budget):
    prompt = prompts(tokenizer)
    torch.manual_seed(1)
    output = model.generate(
        **prompt, enable_thinking=MIXED, thinking_budget=budget, max_new_tokens=NEW_TOKENS, **DECODING[decoding]
    )
    rows = generated(output, prompt, ids)
    copies = len(rows) // len(MIXED)
    assert copies == DECODING[decoding].get("num_return_sequences", 1)
    budgets = budget if isinstance(budget, list) else [budget] * len(MIXED)
    for index, row in enumerate(rows):
        thinking, limit = MIXED[index // copies], budgets[index // copies]
        assert not breaks_format(row, thinking, ids), row
        if thinking and limit is not None:
            assert thought_tokens(row, ids) <= limit


@pytest.mark.parametrize("decoding", ["lookup", "assistant", "assistant_sampling"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("budget", [None, 0, 3])
def test_assisted_decoding_keeps_the_format(model, tokenizer, ids, decoding, thinking, budget):
    prompt = prompts(tokenizer, ["1 2 1 2 1 2 1 2"])
    extra = (
        {"prompt_lookup_num_tokens": 3} if decoding == "lookup" else {"assistant_model": tiny_model(tokenizer, seed=1)}
    )
    common = {"enable_thinking": thinking, "thinking_budget": budget, "max_new_tokens": NEW_TOKENS}
    torch.manual_seed(2)
    output = model.generate(**prompt, **common, **extra, do_sample=decoding == "assistant_sampling")
    (row,) = generated(output, prompt, ids)
    assert not breaks_format(row, thinking, ids)
    if decoding != "assistant_sampling":
        assert output.tolist() == model.generate(**prompt, **common).tolist()


def test_a_model_that_drafts_for_itself_is_believed(never_closing, tokenizer):
    """Drafts are made under the same rule: rejecting them all would give the right tokens, slowly."""
    prompt = prompts(tokenizer, ["hello"])
    common = {"enable_thinking": True, "thinking_budget": 3, "max_new_tokens": 12}
    plain = never_closing.generate(**prompt, **common)
    calls = []
    hook = never_closing.model.register_forward_hook(lambda *_: calls.append(1))
    never_closing.generate(**prompt, **common)
    plain_calls = len(calls)
    calls.clear()
    assisted = never_closing.generate(**prompt, **common, prompt_lookup_num_tokens=4)
    hook.remove()
    assert assisted.tolist() == plain.tolist()
    assert len(calls) <= plain_calls


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_budget_is_used_to_the_last_token(never_closing, tokenizer, budget):
    prompt = prompts(tokenizer)
    output = never_closing.generate(**prompt, enable_thinking=True, thinking_budget=budget, max_new_tokens=12)
    for row in generated(output, prompt, never_closing.generation_config):
        assert row.index(never_closing.generation_config.end_think_token_id) == budget


def test_mixed_batch_equals_single_rows(model, tokenizer, ids):
    prompt = prompts(tokenizer)
    budgets = [4, 4, None, 0]
    together = model.generate(**prompt, enable_thinking=MIXED, thinking_budget=budgets, max_new_tokens=NEW_TOKENS)
    rows = generated(together, prompt, ids)
    assert len({len(tokenizer(question)["input_ids"]) for question in QUESTIONS}) > 1, "nothing is padded"
    for question, mode, budget, row in zip(QUESTIONS, MIXED, budgets, rows, strict=True):
        single = prompts(tokenizer, [question])
        alone = model.generate(**single, enable_thinking=mode, thinking_budget=budget, max_new_tokens=NEW_TOKENS)
        assert generated(alone, single, ids) == [row]


def test_budget_without_enforcement_only_closes(model, never_closing, tokenizer, ids):
    prompt = prompts(tokenizer)
    common = {"enable_thinking": True, "enforce_format": False, "max_new_tokens": 12}
    output = never_closing.generate(**prompt, thinking_budget=4, **common)
    assert all(thought_tokens(row, ids) == 4 for row in generated(output, prompt, ids))
    # A budget does not bring enforcement with it.
    torch.manual_seed(0)
    broken = model.generate(**prompt, thinking_budget=8, do_sample=True, num_return_sequences=8, **common)
    assert sum(breaks_format(row, True, ids) for row in generated(broken, prompt, ids)) > 16
    # And the model's own output is untouched up to the budget.
    free = never_closing.generate(**prompt, **common)
    length = prompt["input_ids"].shape[1] + 4
    assert output[:, :length].tolist() == free[:, :length].tolist()
    # Enforcement off and no budget is transformers' generation of the same prompt.
    thinking = prompts(tokenizer, enable_thinking=True)
    assert model.generate(**prompt, **common).tolist() == model.generate(**thinking, max_new_tokens=12).tolist()


@pytest.mark.parametrize("prompt_mode", [True, False, None], ids="prompt={}".format)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_none_changes_nothing(model, tokenizer, prompt_mode, settings):
    prompt = prompts(tokenizer, enable_thinking=prompt_mode)
    settings = {**settings, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    ours = model.generate(**prompt, **settings)
    torch.manual_seed(3)
    stock = GenerationMixin.generate(model, **prompt, **settings)
    assert ours.sequences.tolist() == stock.sequences.tolist()
    assert torch.equal(torch.stack(ours.scores), torch.stack(stock.scores))


# --- the control token in the prompt ---


def test_control_token_is_prompt_and_not_generated(never_closing, tokenizer):
    open_turn, with_token = prompts(tokenizer, enable_thinking=None), prompts(tokenizer, enable_thinking=True)
    common = {"enable_thinking": True, "max_new_tokens": 5}
    appended, replaced = never_closing.generate(**open_turn, **common), never_closing.generate(**with_token, **common)
    assert appended.tolist() == replaced.tolist()
    assert appended.shape[1] == open_turn["input_ids"].shape[1] + 1 + 5
    assert appended[:, : with_token["input_ids"].shape[1]].tolist() == with_token["input_ids"].tolist()


def test_asked_mode_replaces_the_templates(model, tokenizer):
    thinking, direct = prompts(tokenizer, enable_thinking=True), prompts(tokenizer, enable_thinking=False)
    for mode, same, other in ((True, thinking, direct), (False, direct, thinking)):
        expected = model.generate(**same, enable_thinking=mode, max_new_tokens=8)
        assert model.generate(**other, enable_thinking=mode, max_new_tokens=8).tolist() == expected.tolist()


@pytest.mark.parametrize("given", ["mask", "no mask", "mask and positions"])
def test_rows_that_append_and_rows_that_replace(model, tokenizer, ids, given):
    """Appending makes a row longer, replacing does not: the shorter rows get one more column of padding, masked."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        tokenizer.apply_chat_template([chat], add_generation_prompt=True, tokenize=False, enable_thinking=mode)[0]
        for chat, mode in zip(chats, [None, True, False, None], strict=True)
    ]
    prompt = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    inputs = {"input_ids": prompt["input_ids"]}
    if given != "no mask":
        inputs["attention_mask"] = prompt["attention_mask"]
    if given == "mask and positions":
        inputs["position_ids"] = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    output = model.generate(**inputs, enable_thinking=MIXED, max_new_tokens=NEW_TOKENS)
    expected = model.generate(**prompts(tokenizer), enable_thinking=MIXED, max_new_tokens=NEW_TOKENS)
    header = len(ids.assistant_prefix_ids)
    for row, wanted in zip(output.tolist(), expected.tolist(), strict=True):
        trim = [[token for token in tokens if token != ids.pad_token_id] for tokens in (row, wanted)]
        assert trim[0] == trim[1]
        assert len(trim[0]) > header


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_added_padding_is_masked_even_where_transformers_would_infer_no_mask(tokenizer, pad_is_eos):
    """Two rows of one length, no padding, no mask given; one appends its token, so the other is padded by one."""
    model = tiny_model(tokenizer)
    if pad_is_eos:
        model.generation_config.pad_token_id = model.generation_config.eos_token_id[0]
    texts = [HEADER.replace("hi", "hi!"), HEADER + "<think>"]
    rows = tokenizer(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    both = model.generate(rows, enable_thinking=True, max_new_tokens=8)
    alone = model.generate(rows[1:], enable_thinking=True, max_new_tokens=8)
    assert both[1, 1 : 1 + alone.shape[1]].tolist() == alone[0].tolist()


def test_forced_close_is_certain_and_costs_a_beam_nothing(ids):
    names = ThinkingIds(ids.think_token_id, ids.end_think_token_id, ids.eos_token_id, ids.pad_token_id, None)
    mask = ThinkingFormat(names, [True, False], [2, 2], torch.zeros(2, 1), enforce=True)
    scores = torch.randn(4, 400)
    out = mask(torch.tensor([[9, 5, 5], [9, 5, names.end_think], [9, 5, 5], [9, 5, 5]]), scores.clone())
    assert out[0, names.end_think] == 0 and out[0].isneginf().sum() == 399
    # The rows that closed by themselves and the direct ones keep the scores of all that they may still say.
    for row in (1, 2, 3):
        banned = out[row].isneginf()
        assert banned.nonzero().flatten().tolist() == sorted([names.think, names.end_think])
        assert torch.equal(out[row][~banned], scores[row][~banned])


def test_other_processors_cannot_talk_a_row_out_of_its_format(never_closing, tokenizer):
    class Insist(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, never_closing.generation_config.eos_token_id] = 1e9
            return scores

    prompt = prompts(tokenizer)
    output = never_closing.generate(
        **prompt,
        enable_thinking=True,
        thinking_budget=3,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([Insist()]),
    )
    ids = never_closing.generation_config
    for row in generated(output, prompt, ids):
        assert len(row) == 5 and row[3:] == [ids.end_think_token_id, ids.eos_token_id[0]]


def test_positional_arguments_and_other_processors_still_work(model, tokenizer, ids):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 50:] = -torch.inf
            return scores

    prompt = prompts(tokenizer)
    config = GenerationConfig(max_new_tokens=6, pad_token_id=ids.pad_token_id)
    output = model.generate(
        prompt["input_ids"],
        config,
        LogitsProcessorList([Forbid()]),
        None,
        attention_mask=prompt["attention_mask"],
        enable_thinking=False,
    )
    new_BS = output[:, prompt["input_ids"].shape[1] :]
    assert (new_BS < 50).all()


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 2}, {}], ids=str)
def test_a_forced_end_closes_the_thought_first(never_closing, tokenizer, settings):
    """A rule that leaves nothing but the end of turn leaves a thinking row nothing but `</think>`."""
    ids = never_closing.generation_config
    prompt = prompts(tokenizer)
    end = ids.eos_token_id[0]
    output = never_closing.generate(
        **prompt,
        enable_thinking=True,
        max_new_tokens=6,
        prefix_allowed_tokens_fn=lambda _, row: [end] if len(row) >= prompt["input_ids"].shape[1] + 2 else [40, 41],
        **settings,
    )
    for row in generated(output, prompt, ids):
        assert set(row[:2]) <= {40, 41}
        assert row[2:] == [ids.end_think_token_id, end]


# --- errors ---


def bad_prompt(tokenizer, text):
    return dict(tokenizer([text], return_tensors="pt", add_special_tokens=False))


HEADER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ERRORS = {
    "no open turn": ("hello", {}, "does not end in an open assistant turn"),
    "turn is over": (HEADER + "</think>yes<|im_end|>\n", {}, "does not end in an open assistant turn"),
    "thought begun": (HEADER + "<think>so", {}, r"has begun \(2 tokens\)|has begun \(3 tokens\)"),
    "block closed": (HEADER + "<think></think>", {}, "has begun"),
    "answer begun": (HEADER + "Y", {}, "has begun"),
    "modes too few": (HEADER, {"enable_thinking": [True, False]}, "2 entries for 1 rows"),
    "modes not bool": (HEADER, {"enable_thinking": ["yes"]}, "something else than True and False"),
    "mode a number": (HEADER, {"enable_thinking": 1}, "enable_thinking=1 is no mode"),
    "mode a word": (HEADER, {"enable_thinking": "yes"}, "'yes' is no mode"),
    "budget negative": (HEADER, {"thinking_budget": -1}, "thinking_budget=-1"),
    "budget in list negative": (HEADER, {"thinking_budget": [-1]}, "not a number of tokens"),
    "budget not whole": (HEADER, {"thinking_budget": 2.5}, "not a number of tokens"),
    "budgets too many": (HEADER, {"thinking_budget": [1, 2]}, "2 entries for 1 rows"),
    "budget without mode": (HEADER, {"enable_thinking": None, "thinking_budget": 3}, "pass enable_thinking=True"),
    "paged cache": (HEADER, {"cache_implementation": "paged"}, "does not reach"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(model, tokenizer, case):
    text, settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model.generate(**bad_prompt(tokenizer, text), **({"enable_thinking": True, "max_new_tokens": 2} | settings))


@pytest.mark.parametrize("setting", [{"enable_thinking": True}, {"thinking_budget": 3}], ids=str)
def test_a_mode_in_a_generation_config_is_refused_and_not_dropped(model, tokenizer, setting):
    prompt = prompts(tokenizer)
    rows = prompt["input_ids"].tolist()
    for generate, row in ((model.generate, prompt["input_ids"]), (model.generate_batch, rows)):
        with pytest.raises(ValueError, match="in a generation_config is not read; pass it to generate"):
            generate(row, GenerationConfig(max_new_tokens=2, **setting))
        other = {"enable_thinking": "enable_thinking" not in setting, "thinking_budget": 2}
        with pytest.raises(ValueError, match="in a generation_config is not read; pass it to generate"):
            generate(row, GenerationConfig(max_new_tokens=2, **setting), **other)


def test_prompt_must_be_token_ids(model):
    for settings in ({}, {"inputs_embeds": torch.zeros(1, 2, 32)}, {"input_ids": torch.zeros(1, 0, dtype=torch.long)}):
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(enable_thinking=True, **settings)


def test_a_prompt_given_twice_is_refused(model, tokenizer):
    prompt = prompts(tokenizer)
    with pytest.raises(ValueError, match="were passed alongside input_ids"):
        model.generate(prompt["input_ids"], **prompt, enable_thinking=True)


def test_right_padding_is_refused(model, tokenizer):
    prompt = prompts(tokenizer)
    right = {name: values.flip(1) for name, values in prompt.items()}
    with pytest.raises(ValueError, match=r"rows \[0, 2, 3\] are padded on the right"):
        model.generate(**right, enable_thinking=True)
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(input_ids=right["input_ids"], enable_thinking=True)


def test_a_mask_of_pairs_is_refused(model, tokenizer):
    prompt = bad_prompt(tokenizer, HEADER)
    pairs = prompt["attention_mask"][:, None, None].expand(1, 1, prompt["input_ids"].shape[1], -1).tril()
    with pytest.raises(ValueError, match=r"needs an attention_mask \[batch, tokens\], got \(1, 1, "):
        model.generate(prompt["input_ids"], attention_mask=pairs, enable_thinking=True)


def test_missing_ids(tokenizer):
    model = tiny_model(tokenizer)
    model.generation_config.end_think_token_id = None
    with pytest.raises(ValueError, match="end_think_token_id=None; set both with set_thinking_tokens"):
        model.generate(**prompts(tokenizer), enable_thinking=True)


def test_filled_cache_and_uneven_rows(model, tokenizer):
    uneven = tokenizer([HEADER, HEADER + "<think>"], padding=True, return_tensors="pt", add_special_tokens=False)
    cache = model(uneven["input_ids"][:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="end all rows alike"):
        model.generate(**uneven, enable_thinking=True, past_key_values=cache)


def test_without_the_header_the_tags_decide(tokenizer):
    model = tiny_model(tokenizer)
    model.generation_config.assistant_prefix_ids = None
    with_header = tiny_model(tokenizer)
    for text in (
        HEADER,
        HEADER + "<think>",
        HEADER + "</think>",
        HEADER + "</think>old<|im_end|>\n" + HEADER + "</think>",
    ):
        prompt = bad_prompt(tokenizer, text)
        output = model.generate(**prompt, enable_thinking=True, max_new_tokens=4)
        assert output.tolist() == with_header.generate(**prompt, enable_thinking=True, max_new_tokens=4).tolist()
    for text in (HEADER + "<think>so", HEADER + "<think>so</think>"):
        with pytest.raises(ValueError, match="has begun"):
            model.generate(**bad_prompt(tokenizer, text), enable_thinking=True)
    # A prompt that is not a chat at all is taken as it is: there is nothing to check it with.
    model.generate(**bad_prompt(tokenizer, "hello"), enable_thinking=True, max_new_tokens=2)


# --- split and stream ---


@pytest.mark.parametrize("thinking", [True, False])
def test_split_of_ids_and_text(model, tokenizer, ids, thinking):
    prompt = prompts(tokenizer, ["hello"])
    output = model.generate(**prompt, enable_thinking=thinking, thinking_budget=5, max_new_tokens=20)
    new = output[0, prompt["input_ids"].shape[1] :]
    body = [token for token in new.tolist() if token not in ids.eos_token_id and token != ids.pad_token_id]
    where = thought_tokens(body, ids) if thinking else 0
    thought, answer = body[:where], body[where + 1 :] if thinking else body
    assert answer, "vacuous: the answer is empty"
    for given in (output[0], output[0].tolist()):
        assert split_thinking(given, generation_config=ids) == (thought, answer, False)
    assert split_thinking(new, generation_config=ids, enable_thinking=thinking) == (thought, answer, False)
    text = split_thinking(tokenizer.decode(new, skip_special_tokens=True), enable_thinking=thinking)
    assert text == (tokenizer.decode(thought), tokenizer.decode(answer), False)


def test_a_thought_cut_by_the_length_is_truncated(never_closing, tokenizer):
    ids = never_closing.generation_config
    prompt = prompts(tokenizer)
    output = never_closing.generate(**prompt, enable_thinking=[True, False, False, True], max_new_tokens=5)
    splits = [split_thinking(row, generation_config=ids) for row in output]
    assert [split.truncated for split in splits] == [True, False, False, True]
    assert [len(split.thought) for split in splits] == [5, 0, 0, 5]
    assert [len(split.answer) for split in splits] == [0, 5, 5, 0]


@pytest.mark.parametrize(
    "text, mode, expected",
    [
        ("<think>a</think>b", None, ("a", "b", False)),
        ("a</think>b", None, ("a", "b", False)),
        ("a</think>b", True, ("a", "b", False)),
        ("</think>b", None, ("", "b", False)),
        ("</think>b", True, ("", "b", False)),
        ("</think>b", False, ("", "b", False)),
        ("b", False, ("", "b", False)),
        ("a", True, ("a", "", True)),
        ("<think>a", None, ("a", "", True)),
        ("\n<think>\na\n</think>\n\nb", None, ("\na\n", "\n\nb", False)),
        ("a</think>b</think>c", True, ("a", "b</think>c", False)),
        ("", True, ("", "", True)),
    ],
)
def test_split_of_text(text, mode, expected):
    assert split_thinking(text, enable_thinking=mode) == expected


def test_split_does_not_guess(model):
    with pytest.raises(ValueError, match="pass enable_thinking"):
        split_thinking("42")
    with pytest.raises(ValueError, match="pass model.generation_config"):
        split_thinking([1, 2, 3])
    with pytest.raises(ValueError, match=r"shape \(1, 3\) and reads one row"):
        split_thinking([[1, 2, 3]], generation_config=model.generation_config, enable_thinking=True)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_streamer_tags_what_split_finds(model, tokenizer, thinking, settings):
    prompt = prompts(tokenizer, ["1 2 1 2 1 2"])
    pieces = []
    streamer = ThinkingStreamer(tokenizer, lambda part, text: pieces.append((part, text)))
    settings = settings | {"enable_thinking": thinking, "thinking_budget": 6, "max_new_tokens": 16}
    for _ in range(2):
        pieces.clear()
        output = model.generate(**prompt, **settings, streamer=streamer)
        split = split_thinking(
            tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True),
            enable_thinking=thinking,
        )
        assert "".join(text for part, text in pieces if part == "thought") == split.thought
        assert "".join(text for part, text in pieces if part == "answer") == split.answer
        assert bool(split.thought) == thinking and split.answer


# --- the ids in the generation config ---


def test_ids_survive_save_and_load(model, tokenizer, ids, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model.save_pretrained(tmp_path)
        loaded = AxK1ForCausalLM.from_pretrained(tmp_path).generation_config
        loaded.validate(strict=True)
    assert not [record for record in caplog.records if "generation" in record.getMessage().lower()]
    assert tokenizer.decode(loaded.assistant_prefix_ids) == "<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens([loaded.think_token_id, loaded.end_think_token_id]) == [
        "<think>",
        "</think>",
    ]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.eos_token_id
    assert loaded.pad_token_id == tokenizer.pad_token_id


def test_set_thinking_tokens_keeps_what_was_there(tokenizer):
    config = GenerationConfig(eos_token_id=5, pad_token_id=7)
    set_thinking_tokens(config, tokenizer)
    set_thinking_tokens(config, tokenizer)
    assert config.eos_token_id == [5, tokenizer.eos_token_id]
    assert config.pad_token_id == 7


def test_header_needs_a_chat_template(tokenizer):
    config = GenerationConfig()
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        set_thinking_tokens(config, tokenizer)
    finally:
        tokenizer.chat_template = kept
    assert config.assistant_prefix_ids is None


def test_tokenizer_without_control_tokens_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("<think>/")}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match=r"reads <think> as \[.*\], not as one token"):
        set_thinking_tokens(GenerationConfig(), PreTrainedTokenizerFast(tokenizer_object=plain))


# -- continuous batching -------------------------------------------------------------------------------------------
continuous_batching = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="transformers older than 5.23"
)


def batched(model, tokenizer, blocks: int = 64, **options) -> list[list[int]]:
    """What `generate_batch` answers to each question by itself."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    batching = ContinuousBatchingConfig(page_size=8, num_blocks=blocks, max_batch_tokens=64)
    outputs = model.generate_batch(rows, config, batching, **options).values()
    assert not [output.error for output in outputs if output.error]
    return [output.generated_tokens for output in outputs]


@continuous_batching
@pytest.mark.parametrize("budget", [None, 0, 5], ids="budget={}".format)
@pytest.mark.parametrize("enforce", [True, False], ids=["enforced", "left alone"])
def test_a_running_batch_keeps_the_format_as_single_rows_do(model, tokenizer, ids, budget, enforce):
    found = batched(model, tokenizer, enable_thinking=MIXED, thinking_budget=budget, enforce_format=enforce)
    for question, thinking, row in zip(QUESTIONS, MIXED, found):
        prompt = prompts(tokenizer, [question])
        modes = {"enable_thinking": thinking, "thinking_budget": budget if thinking else None, "enforce_format": enforce}
        output = model.generate(**prompt, **modes, max_new_tokens=NEW_TOKENS, do_sample=False)
        # The control token that `generate` appends is returned there.
        expected = generated(output, prompt, ids)[0]
        assert row == expected[len(expected) - len(row) :] and len(row) >= len(expected) - 1
        assert not enforce or not breaks_format(row, thinking, ids)
    broken = [breaks_format(row, thinking, ids) for row, thinking in zip(found, MIXED)]
    assert any(broken) == (not enforce), "vacuous: nothing to enforce"


@continuous_batching
def test_a_request_that_leaves_its_pages_keeps_its_format(never_closing, tokenizer, ids):
    expected = batched(never_closing, tokenizer, enable_thinking=True, thinking_budget=9)
    reset = RequestState.create_equivalent_initial_request
    with mock.patch.object(RequestState, "create_equivalent_initial_request", autospec=True, side_effect=reset) as resets:
        assert batched(never_closing, tokenizer, blocks=10, enable_thinking=True, thinking_budget=9) == expected
    assert resets.called, "vacuous: there was room for all"
    assert all(row.index(ids.end_think_token_id) == 9 for row in expected)


@continuous_batching
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_budget": 3}, "thinking_budget=3 has no effect while enable_thinking is None"),
        ({"enable_thinking": [True]}, "enable_thinking has 1 entries for 4 rows"),
        ({"enable_thinking": True, "thinking_budget": [1, 2, 3, 4]}, "give one number for all of its rows"),
        ({"enable_thinking": True, "persistent_manager": True}, "a manager of its own"),
    ],
    ids=["budget", "modes", "budgets", "kept"],
)
def test_a_running_batch_refuses(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batched(model, tokenizer, **options)
