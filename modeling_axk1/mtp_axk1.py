"""How does A.X K1 look one token further?  The targets and weight of multi-token prediction, and drafting with it.

The layer itself, `AxK1MTPLayer`, stands in modeling_axk1.py as the last of `model.layers`: position i joins the hidden state of
token i with the embedding of token i + 1 and predicts token i + 2.  [DeepSeek-V3, section 2.2; A.X K1 paper]

Drafting: one forward pass of the model reads the pending token and the draft behind it, then the layer drafts anew. Rows
advance by one token or two, each at its own pace: in the caches a rejected draft is cropped where every row rejected its own,
else masked, and squeezed out once such holes are many.

Axes: B rows, Q tokens of a sequence, S tokens of the longest row, C cache slots, H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .cache_axk1 import keep_slots

logger = logging.get_logger(__name__)

# (share of training done, weight from there on).  [DeepSeek-V3, section 4.2: 0.3 for 10T of 14.8T tokens, then 0.1]
MTP_SCHEDULE = ((0.0, 0.3), (10 / 14.8, 0.1))
# Squeeze the caches when this share of their slots, and this many, hold nothing for any row.
HOLE_SHARE, MIN_HOLES = 0.125, 32


@dataclass
class AxK1CausalLMOutput(MoeCausalLMOutputWithPast):
    """`loss` includes `mtp_loss` times its weight; `mtp_loss` (detached) is there to be logged."""

    mtp_loss: Tensor | None = None


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_mtp=True, return_dict_in_generate=True)` returns: `accepted` of `drafted` tokens were right."""

    drafted: int | None = None
    accepted: int | None = None


def mtp_weight(done: float, schedule: tuple[tuple[float, float], ...] = MTP_SCHEDULE) -> float:
    """The weight of the loss when the share `done` of training (0 to 1) is done: steps, as DeepSeek-V3 was trained."""
    return [weight for start, weight in schedule if start <= done][-1]


def mtp_targets(
    targets_BQ: Tensor, depth: int, position_ids: Tensor | None, attention_mask: Tensor | None, ignore_index: int = -100
) -> Tensor:
    """What layer `depth` (0 the first) predicts: the main head's target `depth` + 1 places on, or `ignore_index`.

    targets_BQ: token i + 1 at place i. A place is left out where tokens i to i + depth + 2 are not of one document (position_ids
    [B, Q] or [1, Q] begin anew in between) or one of i to i + depth + 1 is padding (attention_mask [B, Q], 0).
    """
    ahead = depth + 1
    targets_BQ = F.pad(targets_BQ, (0, ahead), value=ignore_index)[:, ahead:]
    if position_ids is not None:
        # Past the end stands what continues nothing; those places have no target anyway.
        reached = F.pad(position_ids, (0, ahead + 1), value=-1)[:, ahead + 1 :]
        targets_BQ = targets_BQ.masked_fill(reached != position_ids + ahead + 1, ignore_index)
    if attention_mask is not None:
        padding = (F.pad(attention_mask, (0, ahead)) == 0).unfold(1, ahead + 1, 1).any(dim=-1)
        targets_BQ = targets_BQ.masked_fill(padding, ignore_index)
    return targets_BQ.contiguous()


# -- rows of different lengths ------------------------------------------------------------------------------------
class Rows:
    """Token ids that grow at each row's own pace, and which rows still grow.

    Logits processors and stopping criteria are written for rows of one length, and may know rows by number: they are shown
    all rows cut at each length there is, and the answer counts for the rows of that length.
    """

    def __init__(self, prompt_BS: Tensor, pad: int, stop: StoppingCriteriaList, ends_rows: bool):
        self.ids_BS, self.pad, self.stop = prompt_BS, pad, stop
        # Without an end-of-sequence token transformers lets finished rows run on until the last has finished.
        self.ends_rows = ends_rows
        rows, tokens = prompt_BS.shape
        self.length_B = torch.full((rows,), tokens, device=prompt_BS.device)
        self.finished_at_B = torch.full_like(self.length_B, torch.iinfo(torch.long).max)

    @property
    def active_B(self) -> Tensor:
        if self.ends_rows:
            return self.finished_at_B > self.length_B
        return self.length_B < self.finished_at_B.max().clamp(max=self.stop.max_length)

    def at_each_length(self, call: Callable[[Tensor], Tensor], active_B: Tensor) -> Tensor:
        """`call(ids [B, S'])` for every length S' of the active rows; of each result the rows of that length."""
        result = None
        for length in self.length_B[active_B].unique().tolist():
            rows_B = self.length_B == length
            here = call(self.ids_BS[:, :length])
            result = here if result is None else torch.where(rows_B.view(-1, *[1] * (here.dim() - 1)), here, result)
        return result

    def append(self, token_B: Tensor, rows_B: Tensor) -> None:
        """One token more for some rows, which end here if a criterion says so."""
        if self.length_B[rows_B].max() == self.ids_BS.shape[1]:
            self.ids_BS = F.pad(self.ids_BS, (0, 1), value=self.pad)
        at = rows_B.nonzero().flatten()
        self.ids_BS[at, self.length_B[at]] = token_B[at]
        self.length_B = self.length_B + rows_B
        stops_B = self.at_each_length(lambda ids: self.stop(ids, None), rows_B) & rows_B
        self.finished_at_B = torch.where(stops_B, self.finished_at_B.minimum(self.length_B), self.finished_at_B)

    def sequences(self) -> Tensor:
        """[B, S], cut where the last row finished, `pad` behind the others."""
        return self.ids_BS[:, : self.finished_at_B.max()]


# -- choosing tokens ----------------------------------------------------------------------------------------------
def draw(weights_BV: Tensor) -> Tensor:
    return torch.multinomial(weights_BV, num_samples=1)[:, 0]


def accept(target_BV: Tensor, draft_BV: Tensor, drafted_B: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a token drawn from `draft_BV`, or draw another, so that the result is distributed as `target_BV`.

    Probabilities in, fp32. Returns the token and whether it is the drafted one kept.  [Leviathan et al. 2023, algorithm 1]
    """
    at_B1 = drafted_B[:, None]
    kept_B = torch.rand_like(target_BV[:, 0]) * draft_BV.gather(1, at_B1)[:, 0] < target_BV.gather(1, at_B1)[:, 0]
    rest_BV = (target_BV - draft_BV).clamp(min=0)
    # Equal distributions leave no rest, and are never asked for it.
    rest_BV = torch.where(rest_BV.sum(dim=-1, keepdim=True) > 0, rest_BV, target_BV)
    return torch.where(kept_B, drafted_B, draw(rest_BV)), kept_B


def refuse(model, generation_config, kwargs: dict) -> None:
    """ValueError, one sentence, for what drafting cannot do."""
    if not len(model.model.mtp_layers):
        raise ValueError(
            "use_mtp=True needs a multi-token-prediction layer but this model holds none (num_nextn_predict_layers=0); "
            "load a checkpoint with its weights, or leave use_mtp out."
        )
    settings = {
        "num_beams": (1, None),
        "guidance_scale": (1, None),
        "prompt_lookup_num_tokens": (None,),
        "assistant_early_exit": (None,),
        "penalty_alpha": (0, None),
        "dola_layers": (None,),
        "prefill_chunk_size": (None,),
        "cache_implementation": (None, "dynamic"),
        "use_cache": (True, None),
        "output_scores": (False, None),
        "output_logits": (False, None),
        "output_attentions": (False, None),
        "output_hidden_states": (False, None),
    }
    for name, allowed in settings.items():
        value = getattr(generation_config, name, None)
        if value not in allowed:
            raise ValueError(f"use_mtp=True does not go with {name}={value!r}; leave one of them out.")
    cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache or cache.get_seq_length():
        tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
        found = f"a {type(cache).__name__} of {tokens} tokens"
        raise ValueError(
            f"use_mtp=True needs the whole prompt's hidden states and so an empty DynamicCache but got {found}; "
            "leave past_key_values out."
        )
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("use_mtp=True drafts from token ids but got inputs_embeds; pass input_ids.")


class Drafting:
    """The decoding loop's state: rows, both caches with the slots that hold something, the pending token and the draft."""

    def __init__(self, model, rows: Rows, logits_processor, do_sample: bool, cache: Cache, prompt: dict[str, Tensor]):
        self.model, self.rows, self.logits_processor, self.do_sample = model, rows, logits_processor, do_sample
        self.cache, self.mtp_cache = cache, DynamicCache()
        self.slots_BC, positions_BQ = prompt["attention_mask"], prompt["position_ids"]
        hidden = self.hidden_states(rows.ids_BS, positions_BQ)
        self.token_B = self.choose(self.scores(hidden[:, -1]))
        self.rows.append(self.token_B, rows.active_B)
        self.position_B = positions_BQ[:, -1] + 1
        following_BQ = torch.cat([rows.ids_BS[:, 1 : hidden.shape[1]], self.token_B[:, None]], dim=1)
        self.draft(hidden, following_BQ, positions_BQ, torch.full_like(self.token_B, hidden.shape[1] - 1))
        self.drafted = self.accepted = 0

    def hidden_states(self, ids_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        return self.model.model(
            input_ids=ids_BQ,
            attention_mask=self.slots_BC,
            position_ids=positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def scores(self, hidden_BH: Tensor) -> Tensor:
        """The head's logits fp32 [B, V], through the processors."""
        logits_BV = self.model.lm_head(hidden_BH).to(self.rows.ids_BS.device, torch.float32)
        active_B = self.rows.active_B
        if not self.logits_processor or not active_B.any():
            return logits_BV
        scores_BV = self.rows.at_each_length(lambda ids: self.logits_processor(ids, logits_BV.clone()), active_B)
        # A finished row was shown at another's length, where a processor may have left it nothing to draw from.
        return torch.where(active_B[:, None], scores_BV, logits_BV)

    def choose(self, scores_BV: Tensor) -> Tensor:
        return draw(scores_BV.softmax(dim=-1)) if self.do_sample else scores_BV.argmax(dim=-1)

    def draft(self, hidden: Tensor, following_BQ: Tensor, positions_BQ: Tensor, last_B: Tensor) -> None:
        """Run the layer over new tokens' hidden states and the tokens that follow them; draft behind place `last_B`."""
        hidden = self.model.model.predict_next(
            0,
            hidden,
            self.model.model.embed_tokens(following_BQ),
            attention_mask=self.slots_BC,
            position_ids=positions_BQ,
            past_key_values=self.mtp_cache,
        )
        rows_B = torch.arange(len(last_B), device=hidden.device)
        scores_BV = self.scores(hidden[rows_B, last_B.to(hidden.device)])
        self.draft_B = self.choose(scores_BV)
        # Only sampling asks how likely the draft was.
        self.draft_BV = scores_BV.softmax(dim=-1) if self.do_sample else None

    def verify(self, hidden_BH: Tensor) -> tuple[Tensor, Tensor]:
        """The token behind the pending one, and whether it is the draft."""
        scores_BV = self.scores(hidden_BH)
        if self.do_sample:
            return accept(scores_BV.softmax(dim=-1), self.draft_BV, self.draft_B)
        token_B = scores_BV.argmax(dim=-1)
        return token_B, token_B == self.draft_B

    def step(self) -> None:
        """Check the draft with one pass of the model, append one token or two to each row, draft again."""
        active_B = self.rows.active_B
        self.slots_BC = F.pad(self.slots_BC, (0, 2), value=1)
        positions_B2 = torch.stack([self.position_B, self.position_B + 1], dim=1)
        hidden = self.hidden_states(torch.stack([self.token_B, self.draft_B], dim=1), positions_B2)
        first_B, kept_B = self.verify(hidden[:, 0])
        kept_B = kept_B & active_B
        self.drafted += int(active_B.sum())
        self.accepted += int(kept_B.sum())
        self.rows.append(first_B, active_B)
        following = [first_B]
        self.token_B = first_B
        if kept_B.any():
            second_B = self.choose(self.scores(hidden[:, 1]))
            self.token_B = torch.where(kept_B, second_B, first_B)
            following.append(second_B)
            if (more_B := kept_B & self.rows.active_B).any():
                self.rows.append(second_B, more_B)
            self.slots_BC[:, -1] = kept_B
        else:
            self.cache.crop(-1)
            self.slots_BC = self.slots_BC[:, :-1]
        self.position_B = self.position_B + active_B + kept_B
        Q = len(following)
        if self.rows.active_B.any():
            self.draft(hidden[:, :Q], torch.stack(following, dim=1), positions_B2[:, :Q], kept_B.long())
            self.squeeze()

    def squeeze(self) -> None:
        """Close holes when they are many: each row's slots move to the right, and the empty columns on the left go."""
        slots, needed = self.slots_BC.shape[1], int(self.slots_BC.sum(dim=1).max())
        if slots - needed < max(MIN_HOLES, HOLE_SHARE * slots):
            return
        kept_BC = self.slots_BC.bool().to(torch.int8).argsort(dim=1, stable=True)[:, slots - needed :]
        self.slots_BC = self.slots_BC.gather(1, kept_BC)
        keep_slots(self.cache, kept_BC)
        keep_slots(self.mtp_cache, kept_BC)


def speculate(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    **model_kwargs,
):
    """A decoding method for transformers' `generate(custom_generate=...)`: greedy or sampled, `model` drafting for itself."""
    refuse(model, generation_config, model_kwargs)
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer shows one row but the prompt has {len(input_ids)}; stream one at a time.")
    present_BS = model_kwargs.get("attention_mask")
    present_BS = torch.ones_like(input_ids) if present_BS is None else present_BS.long()
    positions_BS = model_kwargs.get("position_ids")
    if positions_BS is None:
        positions_BS = (present_BS.cumsum(dim=1) - 1).clamp(min=0)
    ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    rows = Rows(input_ids, pad, stopping_criteria, ends_rows)
    prompt = {"attention_mask": present_BS, "position_ids": positions_BS.expand_as(input_ids)}
    drafting = Drafting(
        model, rows, logits_processor, generation_config.do_sample, model_kwargs["past_key_values"], prompt
    )
    shown = input_ids.shape[1]
    while True:
        if streamer is not None:
            streamer.put(rows.ids_BS[0, shown : rows.length_B[0]].cpu())
            shown = int(rows.length_B[0])
        if not rows.active_B.any():
            break
        drafting.step()
    if streamer is not None:
        streamer.end()
    rate = drafting.accepted / max(1, drafting.drafted)
    logger.info(f"multi-token prediction: {drafting.accepted} of {drafting.drafted} drafts accepted ({rate:.1%}).")
    if not generation_config.return_dict_in_generate:
        return rows.sequences()
    return DraftedOutput(sequences=rows.sequences(), drafted=drafting.drafted, accepted=drafting.accepted)


class DraftingGenerationMixin(GenerationMixin):
    """`generate(use_mtp=True)` with the layer in memory and any number of rows; transformers' own reloads it and takes one."""

    def generate(self, *args, use_mtp: bool | None = None, streamer=None, synced_gpus: bool | None = None, **kwargs):
        """As transformers', but with `use_mtp=True` the model drafts a token at each step and checks it at the next.

        The same greedy tokens, or samples of the same distribution, in fewer steps. Goes with whatever acts through logits
        processors and stopping criteria that keep no state, thinking modes and budgets included: they are shown drafted
        tokens too. ValueError for beams, a filled or static cache, outputs of every step, and a model without the layer.
        """
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        if use_mtp is None:
            use_mtp = getattr(self.generation_config if given is None else given, "use_mtp", None)
        elif not use_mtp:
            # A generation configuration may say True.
            kwargs["use_mtp"] = False
        if not use_mtp:
            return super().generate(*args, streamer=streamer, synced_gpus=synced_gpus, **kwargs)
        for name in ("assistant_model", "custom_generate"):
            if kwargs.get(name) is not None:
                raise ValueError(f"use_mtp=True drafts by itself and does not go with {name}; leave one of them out.")
        if synced_gpus:
            raise ValueError("use_mtp=True cannot keep ranks in step (synced_gpus=True); gather the weights first.")

        # transformers drops the streamer on its way to a custom method.
        def method(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            return speculate(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer=streamer,
                **model_kwargs,
            )

        return super().generate(*args, streamer=streamer, use_mtp=False, custom_generate=method, **kwargs)
