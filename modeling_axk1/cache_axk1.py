"""How is the latent cache kept?  In buffers with room at the end, so that appending a token copies nothing, or in pages.

Axes: B batch, Q new tokens, S cached tokens, R room (capacity in tokens), D size of one latent (512 or 64 in K1), L latent.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

# An eighth of head-room costs at most 12.5% memory; each token is then copied about eight times however long the text
# grows. 64 tokens spare short texts a copy at every step.
ROOM_FRACTION = 8
MIN_ROOM_TOKENS = 64


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` [B, 1, S, D] are views of buffers [B, 1, R, D] that new tokens are written into.

    Where a gradient flows through the cached latents, or under torch.compile, it concatenates as its parent does.
    """

    def __init__(self):
        super().__init__()
        self.key_room: Tensor | None = None
        self.value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        needs_grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if needs_grad or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.key_room = room_for(self.key_room, self.keys, key_states, start, end)
        self.value_room = room_for(self.value_room, self.values, value_states, start, end)
        self.key_room[..., start:end, :] = key_states
        self.value_room[..., start:end, :] = value_states
        self.keys, self.values = self.key_room[..., :end, :], self.value_room[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search reorders at every step: reorder the buffers, so that the next token still finds its room."""
        length = self.get_seq_length()
        if not length or not is_room_of(self.key_room, self.keys):
            super().reorder_cache(beam_idx)
            return
        beam_idx = beam_idx.to(self.key_room.device)
        self.key_room = self.key_room.index_select(0, beam_idx)
        self.value_room = self.value_room.index_select(0, beam_idx)
        self.keys, self.values = self.key_room[..., :length, :], self.value_room[..., :length, :]

    def offload(self) -> None:
        self.key_room = self.value_room = None
        super().offload()

    def reset(self) -> None:
        self.key_room = self.value_room = None
        super().reset()


def is_room_of(room: Tensor | None, states: Tensor) -> bool:
    """Whether `states` still is the view at the start of `room` (a crop is; a selection of rows or a copy is not)."""
    if room is None:
        return False
    return states.data_ptr() == room.data_ptr() and states.stride() == room.stride() and len(states) == len(room)


def room_for(room: Tensor | None, states: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    """`room` if tokens start:end fit behind `states`, else a larger buffer that begins with `states`."""
    # What inference mode made may be written to in inference mode only.
    writable = room is not None and (torch.is_inference_mode_enabled() or not room.is_inference())
    if start and writable and is_room_of(room, states) and end <= room.shape[-2]:
        return room
    capacity = end + max(MIN_ROOM_TOKENS, end // ROOM_FRACTION)
    larger = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
    if start:
        larger[..., :start, :] = states
    return larger


def grow_in_place(cache: Cache) -> None:
    """Let the still empty plain layers of a dynamic cache grow in place; every other layer stays as its owner made it."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer


def keep_slots(cache: Cache, slots_BW: Tensor) -> None:
    """Keep of each row the W cached tokens at these places, in this order; every filled layer must be a dynamic one."""
    for layer in cache.layers:
        if layer.get_seq_length():
            layer.keys, layer.values = (
                states.take_along_dim(slots_BW.to(states.device)[:, None, :, None], dim=2)
                for states in (layer.keys, layer.values)
            )


def page_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy in which transformers' continuous batching finds the sizes of a token's key and value: half of what we cache each.

    Its pages hold keys and values of one size, by `num_key_value_heads` and `head_dim`, which say here how heads are rotated.
    """
    config = copy.copy(config)
    config.num_key_value_heads, config.head_dim = 1, -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)
    return config


def update_pages(
    cache: Any, latent_B1QL: Tensor, rope_B1QD: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write new tokens into the pages of continuous batching, a `PagedAttentionCache` made for `page_sizes`.

    Returns latents and keys [1, 1, S, .] of all requests, one after another, with their earlier tokens; in a decoding step by a
    block table the new ones only. `kwargs` are the attention function's, which the cache makes fit this layer.
    """
    sizes = [latent_B1QL.shape[-1], rope_B1QD.shape[-1]]
    token = torch.cat([latent_B1QL, rope_B1QD], dim=-1)
    halves = F.pad(token, (0, sum(sizes) % 2)).chunk(2, dim=-1)
    halves = cache.update(*halves, layer_idx, kwargs)
    if kwargs.get("block_table") is not None:
        write_pages(halves, kwargs["k_cache"], kwargs["v_cache"], kwargs["block_table"], row_lengths(kwargs))
    latent_B1SL, rope_B1SD = torch.cat(halves, dim=-1)[..., : sum(sizes)].split(sizes, dim=-1)
    return latent_B1SL, rope_B1SD


def row_lengths(kwargs: dict[str, Any]) -> Tensor:
    """Tokens of each request, the new one included; 0 for one that only pads the batch."""
    ends = kwargs["cu_seq_lens_k"]
    return ends[1:] - ends[:-1]


def write_pages(halves: tuple, first_CT1W: Tensor, second_CT1W: Tensor, table_BM: Tensor, length_B: Tensor) -> None:
    """Put each row's new token [1, 1, B, W], in halves, at the end of its pages."""
    tokens, last_B = first_CT1W.shape[1], (length_B - 1).clamp(min=0).long()
    # What pads the batch has -1 in its table; page 0 is none of a request's.
    page_B = table_BM.long().gather(1, last_B[:, None] // tokens)[:, 0].clamp(min=0)
    for pages, half in zip((first_CT1W, second_CT1W), halves):
        pages[page_B, last_B % tokens] = half[0, 0, :, None].to(pages.dtype)
