"""How does A.X K1 think on request: control tokens, budget, guarantee of format, split of thought and answer, streamer.

Axes: B prompt rows, R rows in flight (B times beams or returned sequences), S tokens so far, V vocabulary.
"""

import copy
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

THINK, END_THINK, TURN_END = "<think>", "</think>", "<|im_end|>"
NO_BUDGET = torch.iinfo(torch.long).max


class ThinkingIds(NamedTuple):
    """The token ids that generation needs, as found in a generation config."""

    think: int
    end_think: int
    stop: list[int]
    pad: int | None
    # Ids of the assistant header, None where the chat template is not known.
    header: list[int] | None


class ThinkingSplit(NamedTuple):
    """One output cut in two, each part of the type that came in (text or list of ids), without tags and stop tokens."""

    thought: str | list[int]
    answer: str | list[int]
    # The thought was never closed, so there is no answer.
    truncated: bool


def _single_id(tokenizer, tag: str) -> int:
    ids = tokenizer.encode(tag, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer reads {tag} as {ids}, not as one token; add it with tokenizer.add_tokens.")
    return ids[0]


def _assistant_header(tokenizer, tags: set[int]) -> list[int] | None:
    """What the chat template adds to open an assistant turn, up to the first tag; None if it opens none."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}]
    closed = tokenizer.apply_chat_template(chat, tokenize=False)
    opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    added = opened.removeprefix(closed) if opened.startswith(closed) else ""
    header = tokenizer.encode(added, add_special_tokens=False)
    return list(takewhile(lambda token: token not in tags, header)) or None


def open_tokenizer(place: str | Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer or the Hub's. ValueError says what is lacking: transformers takes a folder that is not there for a
    name on the Hub, and speaks of that alone."""
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        lacks = "holds no tokenizer that can be read" if Path(place).is_dir() else "is no folder, nor to be had from the Hub"
        raise ValueError(f"{place} {lacks} ({' '.join(str(error).split())[:200]}).") from error


def set_thinking_tokens(generation_config: GenerationConfig, tokenizer) -> None:
    """Write the ids that thinking needs from `tokenizer` into `generation_config`, which saves and loads them.

    Writes `think_token_id`, `end_think_token_id` and `assistant_prefix_ids` (None if no chat template shows it), adds
    the tokenizer's end of sequence and `<|im_end|>` to `eos_token_id`, and sets an absent `pad_token_id`.
    ValueError if the tokenizer has no single token for a tag.
    """
    think, end_think = _single_id(tokenizer, THINK), _single_id(tokenizer, END_THINK)
    old = generation_config.eos_token_id
    stop = [old] if isinstance(old, int) else list(old or [])
    stop += [tokenizer.eos_token_id, tokenizer.get_vocab().get(TURN_END)]
    generation_config.eos_token_id = [token for token in dict.fromkeys(stop) if token is not None]
    generation_config.think_token_id = think
    generation_config.end_think_token_id = end_think
    generation_config.assistant_prefix_ids = _assistant_header(tokenizer, {think, end_think})
    # A config derived from the model's loads without the entries that transformers does not know: it is one no more.
    generation_config._from_model_config = False
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = tokenizer.pad_token_id


def _thinking_ids(*sources: dict | GenerationConfig | None) -> ThinkingIds:
    """The ids from the first source that has each: call arguments, the call's generation config, the model's."""

    def setting(name: str):
        for source in sources:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if value is not None:
                return value
        return None

    think, end_think, stop = setting("think_token_id"), setting("end_think_token_id"), setting("eos_token_id")
    if think is None or end_think is None:
        raise ValueError(
            f"generation_config has think_token_id={think} and end_think_token_id={end_think}; "
            "set both with set_thinking_tokens(model.generation_config, tokenizer)."
        )
    # Continuous batching writes "none" as -1.
    stop = [] if stop is None else [token for token in torch.as_tensor(stop).flatten().tolist() if token >= 0]
    return ThinkingIds(think, end_think, stop, setting("pad_token_id"), setting("assistant_prefix_ids"))


def _after_last(row: list[int], pattern: list[int]) -> int | None:
    for start in range(len(row) - len(pattern), -1, -1):
        if row[start : start + len(pattern)] == pattern:
            return start + len(pattern)
    return None


def _begun(index: int, tokens: int) -> ValueError:
    return ValueError(
        f"the assistant turn of row {index} has begun ({tokens} tokens), so its mode is decided; "
        "pass enable_thinking=None to continue it, or end the prompt at the assistant header."
    )


def _bare_without_header(row: list[int], index: int, tags: tuple[int, int]) -> bool:
    """Without the header only the tags tell: an open block, or a `</think>` that closes one, is no bare mode token."""
    think, _ = tags
    found = [token for token in row if token in tags]
    ends_in_tag = row[-1] in tags
    before = found[:-1] if ends_in_tag else found
    if before and before[-1] == think:
        raise _begun(index, len(row) - 1 - row[::-1].index(think))
    return not ends_in_tag


def _turn_is_bare(row: list[int], index: int, ids: ThinkingIds) -> bool:
    """Whether the open assistant turn of `row` is empty (True) or holds one mode token (False); else ValueError."""
    tags = (ids.think, ids.end_think)
    if ids.header is None:
        return _bare_without_header(row, index, tags)
    start = _after_last(row, ids.header)
    turn = row[start:] if start is not None else []
    if start is None or any(token in ids.stop for token in turn):
        raise ValueError(
            f"row {index} does not end in an open assistant turn, where enable_thinking puts its control token; "
            "build the prompt with apply_chat_template(..., add_generation_prompt=True)."
        )
    if turn and (len(turn) > 1 or turn[0] not in tags):
        raise _begun(index, len(turn))
    return not turn


def _real_tokens(input_ids_BS: Tensor, ids: ThinkingIds) -> Tensor:
    """The attention mask that transformers infers when none is given."""
    if ids.pad is None or ids.pad in ids.stop:
        return torch.ones_like(input_ids_BS)
    return (input_ids_BS != ids.pad).to(input_ids_BS.dtype)


def _reject_right_padding(present_BS: Tensor) -> None:
    padded = (present_BS[:, -1] == 0).nonzero().flatten().tolist()
    if padded:
        raise ValueError(f"rows {padded} are padded on the right; tokenize with padding_side='left' to generate.")


def _reject_filled_cache(kwargs: dict) -> None:
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "some rows end in a mode token and others do not, so a filled past_key_values would fall out of line; "
            "end all rows alike."
        )


def _add_column(input_ids_BS: Tensor, columns: dict, appends_B1: Tensor, pad: int) -> tuple[Tensor, dict]:
    """One column more: on the right for the rows that append, on the left, as padding, for the others."""

    def grow(values_BS: Tensor, left: int, right_B1: Tensor) -> Tensor:
        left_B1 = torch.full_like(values_BS[:, :1], left)
        appends = appends_B1.to(values_BS.device)
        return torch.where(appends, torch.cat([values_BS, right_B1], 1), torch.cat([left_B1, values_BS], 1))

    grown = {}
    if (mask_BS := columns.get("attention_mask")) is not None:
        grown["attention_mask"] = grow(mask_BS, 0, torch.ones_like(mask_BS[:, :1]))
    if (positions_BS := columns.get("position_ids")) is not None:
        grown["position_ids"] = grow(positions_BS, 0, positions_BS[:, -1:] + 1)
    return grow(input_ids_BS, pad, input_ids_BS[:, -1:]), grown


def _set_control_tokens(input_ids_BS: Tensor, modes: list[bool], ids: ThinkingIds, kwargs: dict) -> tuple[Tensor, dict]:
    """End each row with its mode's token. Returns the prompt and the other per-token arguments, made to fit it."""
    columns = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
    present = columns.get("attention_mask", _real_tokens(input_ids_BS, ids))
    if present.ndim != 2:
        shape = tuple(present.shape)
        raise ValueError(f"enable_thinking needs an attention_mask [batch, tokens], got {shape}; pass the tokenizer's.")
    _reject_right_padding(present)
    appends = [_turn_is_bare(row, index, ids) for index, row in enumerate(input_ids_BS.tolist())]
    if any(appends):
        if not all(appends):
            # The rows that only swap their token move right by one: what moved in on the left must be masked.
            _reject_filled_cache(kwargs)
            columns.setdefault("attention_mask", present)
        input_ids_BS, columns = _add_column(input_ids_BS, columns, torch.tensor(appends)[:, None], ids.pad or 0)
    tokens = [ids.think if mode else ids.end_think for mode in modes]
    last_B = torch.tensor(tokens, device=input_ids_BS.device, dtype=input_ids_BS.dtype)
    return torch.cat([input_ids_BS[:, :-1], last_B[:, None]], dim=1), columns


def _prompt(inputs: Tensor | None, kwargs: dict) -> Tensor:
    """Take the prompt ids [B, S] out of `generate`'s arguments (and out of `kwargs`)."""
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("enable_thinking cannot place its control token in inputs_embeds; pass input_ids.")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError('enable_thinking does not reach cache_implementation="paged"; use another cache.')
    input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"enable_thinking needs input_ids [batch, tokens], got {shape}; pass the tokenized chat.")
    return input_ids


def _modes(enable_thinking: bool | list[bool], rows: int) -> list[bool]:
    if not isinstance(enable_thinking, bool | list | tuple):
        raise ValueError(f"enable_thinking={enable_thinking!r} is no mode; use True, False, or a list of one per row.")
    modes = [enable_thinking] * rows if isinstance(enable_thinking, bool) else list(enable_thinking)
    if len(modes) != rows:
        raise ValueError(f"enable_thinking has {len(modes)} entries for {rows} rows; give one per row, or one bool.")
    if not all(isinstance(mode, bool) for mode in modes):
        raise ValueError(f"enable_thinking={modes} holds something else than True and False; give each row its mode.")
    return modes


def _reject_unread(enable_thinking, thinking_budget, generation_config: GenerationConfig | None) -> None:
    """For what a caller's generation_config says otherwise, and for a budget without a mode."""
    for name, asked in (("enable_thinking", enable_thinking), ("thinking_budget", thinking_budget)):
        value = getattr(generation_config, name, None)
        if value is not None and value != asked:
            raise ValueError(f"{name}={value} in a generation_config is not read; pass it to generate.")
    if enable_thinking is None and thinking_budget is not None:
        raise ValueError(
            f"thinking_budget={thinking_budget} has no effect while enable_thinking is None; pass enable_thinking=True."
        )


def _budgets(thinking_budget: int | list[int | None] | None, rows: int) -> list[int]:
    budgets = list(thinking_budget) if isinstance(thinking_budget, (list, tuple)) else [thinking_budget] * rows
    if len(budgets) != rows:
        raise ValueError(f"thinking_budget has {len(budgets)} entries for {rows} rows; give one per row, or one int.")
    if any(budget is not None and (type(budget) is not int or budget < 0) for budget in budgets):
        raise ValueError(f"thinking_budget={thinking_budget} is not a number of tokens; use 0 or more, or None.")
    return [NO_BUDGET if budget is None else budget for budget in budgets]


def _keep_format(
    scores: Tensor, open_R: Tensor, close_R: Tensor, ids: ThinkingIds, stop: Tensor, enforce: bool
) -> Tensor:
    """`scores` [R, V] masked: rows with an open thought may not stop, other rows take no tag, and `close_R` rows close."""
    if enforce:
        banned_RV = torch.zeros_like(scores, dtype=torch.bool)
        banned_RV[:, ids.think] = True
        banned_RV[:, ids.end_think] = ~open_R
        banned_RV[:, stop] = open_R[:, None]
        scores = scores.masked_fill(banned_RV, -torch.inf)
        # Whatever else restricts this row (a grammar, a forced end) now leaves it nothing but to close.
        close_R = close_R | (open_R & scores.isneginf().all(dim=-1))
    scores = scores.masked_fill(close_R[:, None], -torch.inf)
    # 0 is the log of probability one: being closed by force costs a beam nothing.
    scores[:, ids.end_think] = scores[:, ids.end_think].masked_fill(close_R, 0.0)
    return scores


class ThinkingFormat(LogitsProcessor):
    """Mask the logits so that each row keeps its mode's format.

    It holds no state but the prompt's length and decides from the tokens it is shown, so beams may be reordered and
    drafted tokens rejected.
    """

    def __init__(self, ids: ThinkingIds, modes: list[bool], budgets: list[int], prompt_ids_BS: Tensor, enforce: bool):
        self.ids = ids
        self.prompt_tokens = prompt_ids_BS.shape[1]
        self.enforce = enforce
        # On the device once and for all: a copy at each step would make the host wait for it.
        device = prompt_ids_BS.device
        self.thinking_B = torch.tensor(modes, device=device)
        self.budget_tokens_B = torch.tensor(budgets, device=device)
        self.stop = torch.tensor(ids.stop, dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` [R, S] with the prompt, `scores` [R, V]; row r belongs to prompt row r // (R / B)."""
        copies = scores.shape[0] // self.thinking_B.shape[0]
        thinking_R = self.thinking_B.to(scores.device).repeat_interleave(copies)
        budget_tokens_R = self.budget_tokens_B.to(scores.device).repeat_interleave(copies)
        generated_RS = input_ids[:, self.prompt_tokens :]
        open_R = thinking_R & ~(generated_RS == self.ids.end_think).any(dim=-1)
        close_R = open_R & (generated_RS.shape[1] >= budget_tokens_R)
        return _keep_format(scores, open_R, close_R, self.ids, self.stop.to(scores.device), self.enforce)


class BatchThinkingFormat(ContinuousBatchingLogitsProcessor):
    """`ThinkingFormat` of continuous batching, whose rows come and go: each brings along where its thought stands.

    That is read from the request's tokens before every step, so all of them have to be known by then (no asynchronous batching).
    """

    CLOSED, OPEN, SPENT = range(3)
    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, ids: ThinkingIds, budget_tokens: int, enforce: bool, device: torch.device):
        self.ids, self.budget_tokens, self.enforce = ids, budget_tokens, enforce
        self.stop = torch.tensor(ids.stop, dtype=torch.long, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(self.CLOSED)

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        states = [self.state_of(request.state) for request in requests_with_new_token]
        return torch.tensor(states, dtype=torch.int32)

    def state_of(self, request) -> int:
        # A request that had to leave its pages comes back with what it had generated in its prompt.
        prompt_tokens = request._true_initial_tokens or len(request.initial_tokens)
        generated = request.initial_tokens[prompt_tokens:] + request.generated_tokens
        if request.initial_tokens[prompt_tokens - 1] != self.ids.think or self.ids.end_think in generated:
            return self.CLOSED
        return self.OPEN if len(generated) < self.budget_tokens else self.SPENT

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        state_R = tensor_arg[: scores.shape[0]]
        spent_R = state_R == self.SPENT
        return _keep_format(scores, (state_R == self.OPEN) | spent_R, spent_R, self.ids, self.stop, self.enforce)


class ThinkingGenerationMixin(GenerationMixin):
    """`generate` and `generate_batch` in two modes: each decoding method of transformers stays as it is."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        enable_thinking: bool | list[bool] | None = None,
        thinking_budget: int | list[int | None] | None = None,
        enforce_format: bool = True,
        **kwargs,
    ):
        """Generate as transformers does, with each row's mode chosen by `enable_thinking`; None changes nothing.

        True ends the open assistant turn with `<think>`, False with `</think>`, replacing a bare mode token that the
        chat template put there. That token is part of the prompt: it is returned, and `max_new_tokens` does not count
        it (`max_length`, which counts the prompt, does). A list gives each row its mode.

        `thinking_budget` closes the thought after that many tokens, 0 at once; it is one number or one a row, None for
        no bound, and does not concern non-thinking rows. `enforce_format` makes a thinking row close its block exactly
        once before it may stop, and keeps tags out of a non-thinking row. With False the model is left to its own
        discipline; a budget, if given, still closes the block. Lengths and stop strings cut where they must:
        `split_thinking` reports a thought cut short as truncated.

        ValueError for a prompt that is not an open, empty assistant turn, for padding on the right, for
        `inputs_embeds`, for missing ids, and for lists or budgets that do not fit.
        """
        _reject_unread(enable_thinking, thinking_budget, generation_config)
        if enable_thinking is None:
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

        ids = _thinking_ids(kwargs, generation_config, self.generation_config)
        input_ids_BS = _prompt(inputs, kwargs)
        modes = _modes(enable_thinking, rows=input_ids_BS.shape[0])
        budgets = _budgets(thinking_budget, rows=input_ids_BS.shape[0])
        input_ids_BS, columns = _set_control_tokens(input_ids_BS, modes, ids, kwargs)
        mask = ThinkingFormat(ids, modes, budgets, input_ids_BS, enforce=enforce_format)
        # Last, so that no other processor can talk a row out of its format.
        logits_processor = LogitsProcessorList([*(logits_processor or []), mask])
        return super().generate(input_ids_BS, generation_config, logits_processor, *args, **(kwargs | columns))

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        enable_thinking: bool | list[bool] | None = None,
        thinking_budget: int | None = None,
        enforce_format: bool = True,
        **kwargs,
    ):
        """Continuous batching as transformers', with the modes of `generate`; one budget for all rows.

        ValueError as there, and for asynchronous batching and a manager that is kept, which know no modes.
        """
        _reject_unread(enable_thinking, thinking_budget, generation_config)
        if enable_thinking is None:
            return super().generate_batch(inputs, generation_config, continuous_batching_config, **kwargs)
        batching = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
        kept = kwargs.get("persistent_manager") or getattr(self, "_cached_continuous_batching_manager", None)
        if batching.use_async_batching or kept:
            raise ValueError(
                "enable_thinking needs every token before the next step and a manager of its own; leave use_async_batching "
                "and persistent_manager out, and call destroy_cached_continuous_batching_manager() where one was kept."
            )
        batching.use_async_batching = False
        if isinstance(thinking_budget, list | tuple):
            raise ValueError(f"thinking_budget={thinking_budget} in a running batch; give one number for all of its rows.")
        ids = _thinking_ids(generation_config, self.generation_config)
        rows = []
        for row, mode in zip(inputs, _modes(enable_thinking, rows=len(inputs))):
            mask = {"attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            rows += _set_control_tokens(torch.tensor([row]), [mode], ids, mask)[0].tolist()
        config = copy.deepcopy(generation_config or self.generation_config)
        if config.eos_token_id is None:
            config.eos_token_id = ids.stop
        config.batch_thinking = {"ids": ids, "budget_tokens": _budgets(thinking_budget, 1)[0], "enforce": enforce_format}
        return super().generate_batch(rows, config, batching, **kwargs)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        """Where continuous batching asks for its processors; ours comes last."""
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        asked = getattr(generation_config, "batch_thinking", None)
        if asked is not None:
            processors.append(BatchThinkingFormat(**asked, device=self.device))
        return processors


def _partition(output: str | list[int], tag: str | int):
    """`str.partition`, for lists too: (before, whether found, after)."""
    if isinstance(output, str):
        before, found, after = output.partition(tag)
        return before, bool(found), after
    where = output.index(tag) if tag in output else len(output)
    return output[:where], where < len(output), output[where + 1 :]


def _without_leading(output: str | list[int], tag: str | int):
    """What follows a `tag` that begins the output, else the output; blanks before the tag do not matter."""
    before, found, after = _partition(output, tag)
    begins = found and not (before.strip() if isinstance(before, str) else before)
    return after if begins else output


def _last_turn(row: list[int], ids: ThinkingIds) -> list[int]:
    """From behind the last assistant header, if there is one, to the first stop or padding token."""
    row = row[_after_last(row, ids.header) or 0 :] if ids.header else row
    ends = [position for position, token in enumerate(row) if token in ids.stop or token == ids.pad]
    return row[: ends[0]] if ends else row


def split_thinking(
    output: str | list[int] | Tensor,
    *,
    generation_config: GenerationConfig | None = None,
    enable_thinking: bool | None = None,
) -> ThinkingSplit:
    """Cut one output into thought and answer.

    `output` is what follows the assistant header, with or without its control token: text decoded with
    `skip_special_tokens=True`, or ids, for which `generation_config` names the tokens. A whole row as `generate`
    returns it will do where `generation_config.assistant_prefix_ids` is set. Pass `enable_thinking`, the mode that was
    asked for, where the control token is not in `output`.
    """
    if isinstance(output, str):
        think, end_think = THINK, END_THINK
    else:
        if generation_config is None:
            raise ValueError("split_thinking got ids and no generation_config; pass model.generation_config.")
        ids = _thinking_ids(generation_config)
        row_S = torch.as_tensor(output)
        if row_S.ndim != 1:
            raise ValueError(f"split_thinking got ids of shape {tuple(row_S.shape)} and reads one row; pass each row alone.")
        output = _last_turn(row_S.tolist(), ids)
        think, end_think = ids.think, ids.end_think
    if enable_thinking is None and think not in output and end_think not in output:
        raise ValueError("the output has no tag, so it may be an answer or a thought cut short; pass enable_thinking.")
    if enable_thinking is False:
        return ThinkingSplit(thought=output[:0], answer=_without_leading(output, end_think), truncated=False)
    # A direct answer, led by its `</think>`, comes out right here too: its thought is empty.
    thought, closed, answer = _partition(_without_leading(output, think), end_think)
    return ThinkingSplit(thought, answer, truncated=not closed)


class ThinkingStreamer(TextStreamer):
    """Hand text to `emit(part, text)` as it is generated; `part` is "thought" or "answer". One row, no beams.

    The mode is read from the prompt's last token, so `generate(enable_thinking=...)` and the chat template both set it.
    """

    def __init__(self, tokenizer, emit: Callable[[str, str], None], **decode_kwargs):
        super().__init__(tokenizer, skip_prompt=True, **({"skip_special_tokens": True} | decode_kwargs))
        self.emit = emit
        self.part = "answer"
        self.part_after = {_single_id(tokenizer, THINK): "thought", _single_id(tokenizer, END_THINK): "answer"}

    def put(self, value: Tensor):
        tokens = value.flatten().tolist()
        if self.next_tokens_are_prompt:
            self.part = self.part_after.get(tokens[-1], "answer")
            super().put(value)
            return
        for token in tokens:
            if token in self.part_after:
                self.end()
                self.next_tokens_are_prompt = False
                self.part = self.part_after[token]
            else:
                super().put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.emit(self.part, text)
