"""Which tokens does A.X K1 read: byte-level BPE training, the special tokens, and the chat template of both modes."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
# Padding has a token of its own, so that masking it never masks the end of a document or of a turn.
SPECIAL_TOKENS = [PAD, END_OF_TEXT, TURN_START, TURN_END, THINK, END_THINK]
# The tags are added tokens but not *special* ones: decode(skip_special_tokens=True) must keep them, or every parser and
# reward that reads decoded text loses sight of where the thought ends.
CONTROL_TOKENS = [THINK, END_THINK]
# A spare token can become a control token later without a new embedding row. Named as Llama 3 names them.
RESERVED = "<|reserved_special_token_{}|>"

# The split of cl100k/o200k with one change: every digit stands alone, as in Qwen 3 and Gemma 3, so that a number has one
# spelling and place value does not depend on where a group of three begins (groups from the left, as in o200k, cost
# arithmetic; Singh & Strouse 2024, arXiv 2402.14903. Groups from the right need a lookahead that is quadratic in the
# length of a run of digits).
# Blanks: one of them joins the word behind it, a longer run is one piece, so that indentation of any depth costs a token;
# line breaks stay with the punctuation before them.
# There is no normaliser: decode(encode(text)) == text for any text.
PRE_TOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same for text of ASCII alone, as most code is: Python's own `re`, which knows no \p, splits it in 0.4 of the time.
ASCII_PATTERN = PRE_TOKEN_PATTERN.replace(r"\p{L}\p{M}", "a-zA-Z").replace(r"\p{N}", r"\d")

# So many different pieces of text are counted at most, which bounds a training's memory whatever it reads.
MOST_PIECES = 2_000_000
# A piece is handed to the trainer as often as it was seen, in lists no longer than this.
LONGEST_LIST = 10_000
logger = logging.getLogger(__name__)

# ChatML. `enable_thinking` decides the control token that ends the generation prompt: true `<think>`, false or absent
# `</think>`, null none at all (the turn stays open for `generate(enable_thinking=...)`, or for training without tags).
# Never `<think></think>`: it shares its first token with the thinking prompt.  [tech report, Think-Fusion]
# A turn before the last user message loses its thought and reads as a direct answer; thoughts between tool calls of the
# running turn stay, since the model is still using them. `keep_history_thoughts` keeps all of them.
# Thought and answer are rendered verbatim.
# The loss span excludes the control token, which is always given, and includes the end of turn.
TRAINING_CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('A.X K1 reads text only, got a content part of type ' + part.type ~ '.') -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}
        {{- text_of(messages[0].content) + '\n\n' -}}
    {%- endif -%}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- set turn = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set turn.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = text_of(message.content) -%}
    {%- if message.role == 'system' and loop.first and tools -%}
    {%- elif message.role == 'system' or message.role == 'user' -%}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set thought = message.reasoning_content or '' -%}
        {%- set answer = content -%}
        {%- if not thought and ('<think>' in content or '</think>' in content) -%}
            {%- set pieces = content.split('</think>', 1) -%}
            {%- set thought = pieces[0].split('<think>', 1)[-1] -%}
            {%- set answer = pieces[1] if pieces | length > 1 else '' -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- set thinking = thought and (keep_history_thoughts or loop.index0 > turn.last_user) -%}
        {%- if thinking -%}
            {{- '<think>' -}}
        {%- elif enable_thinking is not defined or enable_thinking is not none -%}
            {{- '</think>' -}}
        {%- endif -%}
        {%- generation -%}
        {%- if thinking -%}
            {{- thought + '</think>' -}}
        {%- endif -%}
        {{- answer -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- if answer or not loop.first -%}
                {{- '\n' -}}
            {%- endif -%}
            {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Unknown message role ' + message.role ~ '; use system, user, assistant or tool.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is not defined or enable_thinking is false -%}
        {{- '</think>' -}}
    {%- elif enable_thinking -%}
        {{- '<think>' -}}
    {%- endif -%}
{%- endif -%}
""".strip()

# One source, so that the two can differ in nothing but the loss markers (which engines other than transformers reject).
CHAT_TEMPLATE = TRAINING_CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")

# How transformers' pipelines and servers cut an answer into `reasoning_content`, `tool_calls` and `content`.
# `</think>` right after the header is the mode token of a direct answer, hence part of the longer anchor.
RESPONSE_TEMPLATE = {
    "version": 1,
    "defaults": {"role": "assistant"},
    "start_anchor": [f"{TURN_START}assistant\n{END_THINK}", f"{TURN_START}assistant\n"],
    "fields": {
        # A thought that the turn's end cuts off (possible without format enforcement) closes there too.
        "reasoning_content": {"open": THINK, "close": [END_THINK, TURN_END, END_OF_TEXT, PAD], "content": "text"},
        "tool_calls": {
            # The blanks belong to the pattern: outside it they would open an empty content that hides the real one.
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|pad\|>)", "content": "text"},
    },
}


def count_pieces(texts: Iterable[str], most: int = MOST_PIECES, seed: int = 0) -> Counter:
    """How often each piece of the texts, as `PRE_TOKEN_PATTERN` splits them, occurs, of at most `most` different ones.

    Where there would be more, what was counted is halved, each occurrence kept or not by chance, and so is what comes: a
    sample of the occurrences as fair as the texts, half as large until it fits. A warning says so.
    """
    find, find_in_ascii = regex.compile(PRE_TOKEN_PATTERN).findall, re.compile(ASCII_PATTERN, re.ASCII).findall
    counts, rate, rng = Counter(), 1, np.random.default_rng(seed)
    for text in texts:
        pieces = find_in_ascii(text) if text.isascii() else find(text)
        counts.update(pieces if rate == 1 else thinned(Counter(pieces), rate, rng))
        while len(counts) > most:
            counts, rate = thinned(counts, 2, rng), rate * 2
            logger.warning("More than %s different pieces of text: one occurrence in %d is counted.", f"{most:,}", rate)
    return counts


def thinned(counts: Counter, rate: int, rng: np.random.Generator) -> Counter:
    """Of every occurrence one in `rate`, by chance."""
    kept = rng.binomial(list(counts.values()), 1 / rate).tolist()
    return Counter({piece: count for piece, count in zip(counts, kept) if count})


def as_often_as_seen(counts: Counter) -> Iterator[list[str]]:
    """Lists of one piece each; `counts` is emptied on the way, so that it is not held beside what the trainer makes of it."""
    while counts:
        piece, count = counts.popitem()
        for begin in range(0, count, LONGEST_LIST):
            yield [piece] * min(LONGEST_LIST, count - begin)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    reserved: int = 0,
    multiple_of: int = 1,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a lossless byte-level BPE from `texts` and attach the chat and response templates.

    `vocab_size` counts the 256 bytes, the special tokens and `reserved` spare ones and is an upper bound: a small corpus
    runs out of merges earlier, so size the model by `len(tokenizer)`, which more spare tokens make a multiple of
    `multiple_of` (128: a matrix of that many rows fills the tensor cores' tiles).
    Of the texts only how often each piece occurs is held, for `MOST_PIECES` of them (`count_pieces`). The same texts in the
    same order give the same tokenizer. The end of sequence is `<|im_end|>`; padding is on the left,
    ready for batched generation.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS) + reserved
    smallest += -smallest % multiple_of
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} cannot hold the bytes and special tokens; use {smallest} or more.")
    if vocab_size % multiple_of:
        nearest = vocab_size - vocab_size % multiple_of
        raise ValueError(f"vocab_size={vocab_size} is not a multiple of {multiple_of}; use {nearest}.")
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    learned = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS) - reserved,
        special_tokens=[token for token in SPECIAL_TOKENS if token not in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    # Pieces come split: tokenizers' own counting would hold every one that ever occurred.
    bpe.pre_tokenizer = bytes_
    bpe.train_from_iterator(as_often_as_seen(count_pieces(texts)), learned)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in CONTROL_TOKENS])
    spare = reserved + -(bpe.get_vocab_size() + reserved) % multiple_of
    bpe.add_special_tokens([AddedToken(RESERVED.format(number), normalized=False) for number in range(spare)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    )
