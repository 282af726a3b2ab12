"""Is our model stock transformers' `axk1`, number for number, and right where stock is not?"""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.models.axk1.modeling_axk1 import AXK1ForTokenClassification

from modeling_axk1 import (
    AxK1Config,
    AxK1ForCausalLM,
    AxK1ForSequenceClassification,
    AxK1ForTokenClassification,
    count_flops,
)
from modeling_axk1.modeling_axk1 import (
    AxK1Experts,
    AxK1TopkRouter,
    RMSNormFunction,
    choose_experts,
    matrix_of,
    rotate,
    sequence_balance_loss,
)
from tests.random_models import ours, padded_ids, random_config, stock_twin
from tests.tolerances import CACHED_STEP, GRADIENT, PREFILL

SEEDS = range(40)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and b.abs().max() > 0, "vacuous comparison"
    assert a.isfinite().all()
    return (a - b).abs().max().item()


def attn(seed: int) -> str:
    return ["sdpa", "eager"][seed % 2]


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_prefill_equals_stock(seed):
    model = ours(random_config(seed, attn_implementation=attn(seed)))
    twin = stock_twin(model)
    for side in ("left", "right"):
        input_ids, mask = padded_ids(model.config, side=side)
        logits, expected = (m(input_ids, attention_mask=mask).logits[mask.bool()] for m in (model, twin))
        assert largest_difference(logits, expected) <= PREFILL


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_equal_stock(seed):
    model = ours(random_config(seed, attn_implementation=attn(seed))).train()
    twin = stock_twin(model).train()
    input_ids, mask = padded_ids(model.config, side="right")
    labels = input_ids.masked_fill(mask == 0, -100)
    for m in (model, twin):
        m(input_ids, attention_mask=mask, labels=labels).loss.backward()
    expected = dict(twin.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values())
    for name, parameter in model.named_parameters():
        if "layers.0.mlp.post_mlp_layernorm" in name and model.config.mlp_layer_types[0] == "dense":
            assert parameter.grad is None
            continue
        scale = expected[name].grad.abs().max()
        assert scale > 0 or "experts" in name, name
        # With one expert a token, renormalised to 1, the router's true gradient is 0 and both show only noise.
        assert (parameter.grad - expected[name].grad).abs().max() <= GRADIENT * scale.clamp(min=1e-3 * largest), name


@pytest.mark.parametrize("interleaved", [True, False])
def test_handwritten_gradients_by_finite_differences(interleaved):
    x = torch.randn(2, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-6), (x, weight))
    angles = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin(), interleaved), (x,))


def cached_logits(model, input_ids, mask, pieces, cache):
    """Logits of `input_ids` fed in pieces through a cache."""
    logits, start = [], 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for size in pieces:
        end = start + size
        output = model(
            input_ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_cached_steps_equal_stock(seed, kind):
    """Left-padded rows of mixed length; a prompt, then single tokens, then three at once as in speculative verification."""
    model = ours(random_config(seed, attn_implementation=attn(seed)))
    twin = stock_twin(model)
    input_ids, mask = padded_ids(model.config, rows=3)
    pieces = [8, 1, 1, 3]
    results = []
    for m in (model, twin):
        cache = DynamicCache(config=m.config) if kind == "dynamic" else StaticCache(m.config, max_cache_len=16)
        results.append(cached_logits(m, input_ids, mask, pieces, cache)[mask.bool()])
    assert largest_difference(*results) <= CACHED_STEP
    full = model(input_ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[mask.bool()]
    assert largest_difference(results[0], full) <= CACHED_STEP


@torch.no_grad()
def test_absorbed_form_is_what_decoding_runs(monkeypatch):
    model = ours(random_config(1, kv_lora_rank=36, qk_nope_head_dim=10, v_head_dim=6))
    attention = model.model.layers[0].self_attn
    calls = []
    absorbed = attention.attend_absorbed
    monkeypatch.setattr(attention, "attend_absorbed", lambda *a, **k: calls.append(a[0].shape[1]) or absorbed(*a, **k))
    input_ids, mask = padded_ids(model.config)
    cached_logits(model, input_ids, mask, [10, 1, 1, 1], DynamicCache(config=model.config))
    assert calls == [1, 1, 1], "absorbed for single tokens, expanded for the prompt"


@pytest.mark.parametrize("kind", ["additive", "flex blocks", "padding"])
@torch.no_grad()
def test_absorbed_form_reads_every_mask(kind):
    """Two rows, the second with three tokens of padding; the boolean mask is what all others are compared with."""
    attention = ours(random_config(4)).model.layers[0].self_attn
    queries, keys = (1, 9) if kind == "padding" else (2, 9)
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, :3] = False
    causal = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries
    boolean = padding[:, None, None] & causal

    def block(b, h, q, k):
        return padding[b, k] & (k <= q + keys - queries)

    mask = {
        "additive": torch.where(boolean, 0.0, torch.finfo(torch.float32).min),
        "flex blocks": create_block_mask(block, 2, None, queries, keys, device="cpu"),
        "padding": padding.long(),
    }[kind]
    assert attention.absorbs(queries, keys, mask)
    config = attention.config
    q_latent, latent = torch.randn(2, queries, config.q_lora_rank), torch.randn(2, 1, keys, config.kv_lora_rank)
    rope = torch.randn(2, 1, keys, config.qk_rope_head_dim)
    angles = torch.randn(2, queries, config.qk_rope_head_dim)
    arguments = q_latent, latent, rope, (angles.cos(), angles.sin())
    expected, _ = attention.attend_absorbed(*arguments, boolean)
    assert largest_difference(attention.attend_absorbed(*arguments, mask)[0], expected) <= PREFILL
    unmasked, _ = attention.attend_absorbed(*arguments, None)
    assert largest_difference(unmasked, expected) > 1e-3, "the mask must show"


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
@torch.no_grad()
def test_quantised_caches_give_stocks_numbers(backend):
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    elif "fp8" not in cache_utils.QuantizedCache.__doc__:
        pytest.skip(f"transformers {transformers.__version__} has no fp8 cache")
    sizes = {"hidden_size": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    model = ours(random_config(2, **sizes))
    input_ids, mask = padded_ids(model.config, rows=1)
    options = {"nbits": 4, "q_group_size": 16, "residual_length": 4} if backend == "quanto" else {}
    results = [
        cached_logits(
            m, input_ids, mask, [8, 1, 1, 1, 1, 1], QuantizedCache(backend=backend, config=m.config, **options)
        )
        for m in (model, stock_twin(model))
    ]
    assert largest_difference(*results) <= CACHED_STEP
    assert largest_difference(results[0], model(input_ids).logits) > 1e-3, "quantisation must show"


def test_absorbed_form_follows_changed_weights():
    model = ours(random_config(2))
    input_ids, mask = padded_ids(model.config, rows=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(1.5)
        steps = cached_logits(model, input_ids, mask, [10, 1, 1, 1], DynamicCache(config=model.config))
        assert largest_difference(steps, model(input_ids).logits) <= CACHED_STEP


def scale_output(module, args, output):
    return output * 1.3


@pytest.mark.parametrize("change", ["hook", "parametrization", "subclass"])
@torch.no_grad()
def test_changed_kv_b_proj_is_never_bypassed(change):
    """Whatever stands in the projection's place, cached steps give what the full pass gives."""
    model = ours(random_config(4))
    before = model(padded_ids(model.config)[0]).logits
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        if change == "hook":
            projection.register_forward_hook(scale_output)
        elif change == "parametrization":
            torch.nn.utils.parametrizations.weight_norm(projection)
            projection.parametrizations.weight.original0.mul_(1.3)
        else:
            layer.self_attn.kv_b_proj = ScaledLinear(projection)
    input_ids, mask = padded_ids(model.config, rows=1)
    full = model(input_ids).logits
    assert largest_difference(full, before[:1]) > 0.01, "the change must show"
    steps = cached_logits(model, input_ids, mask, [10, 1, 1, 1], DynamicCache(config=model.config))
    assert largest_difference(steps, full) <= CACHED_STEP


class ScaledLinear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 1.3 * self.linear(x)


@pytest.mark.parametrize("trained", ["q_b_proj", "kv_b_proj", "o_proj"])
def test_backward_through_cached_steps_when_little_trains(trained):
    """The latents need no gradient, yet earlier steps' backward still reads them: nothing may be written over."""
    model = ours(random_config(4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.0.self_attn.{trained}" in name)
    input_ids, mask = padded_ids(model.config, rows=1)
    gradients = []
    for pieces in ([13], [8, 1, 1, 3]):
        model.zero_grad()
        cached_logits(model, input_ids, mask, pieces, DynamicCache(config=model.config)).square().sum().backward()
        gradients.append(getattr(model.model.layers[0].self_attn, trained).weight.grad.clone())
    assert largest_difference(*gradients) <= GRADIENT * gradients[0].abs().max()


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_packed_rows_and_own_masks_equal_stock(seed):
    model = ours(random_config(seed, attn_implementation=attn(seed)))
    twin = stock_twin(model)
    input_ids, _ = padded_ids(model.config)
    packed = torch.cat((torch.arange(5), torch.arange(8)))[None].expand(2, -1)
    options = [{"position_ids": packed, "use_cache": False}]
    allowed = torch.rand(2, 1, 13, 13) < 0.5
    allowed |= torch.eye(13, dtype=torch.bool)
    options.append({"attention_mask": torch.where(allowed, 0.0, torch.finfo(torch.float32).min)})
    plain = model(input_ids).logits
    for extra in options:
        logits, expected = (m(input_ids, **extra).logits for m in (model, twin))
        assert largest_difference(logits, expected) <= PREFILL
        assert largest_difference(logits, plain) > 1e-3, "the mask must show"


@torch.no_grad()
def test_a_boolean_mask_means_the_same_to_every_attention():
    """Expanded and absorbed; added to eager's scores, as stock adds it, it would hide nothing."""
    model = ours(random_config(1))
    input_ids, _ = padded_ids(model.config)
    allowed = (torch.rand(2, 1, 13, 13) < 0.5) | torch.eye(13, dtype=torch.bool)
    expected = model(input_ids, attention_mask=allowed).logits
    model.set_attn_implementation("eager")
    for use_cache in (False, True):
        logits = model(input_ids, attention_mask=allowed, use_cache=use_cache).logits
        assert largest_difference(logits, expected) <= PREFILL


@torch.no_grad()
def test_bf16_autocast_is_no_less_accurate_than_stock():
    model = ours(random_config(1))
    twin = stock_twin(model)
    input_ids, _ = padded_ids(model.config)
    truth = model(input_ids).logits
    errors = []
    for m in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append((m(input_ids).logits.float() - truth).norm() / truth.norm())
    assert 0 < errors[0] <= 1.5 * errors[1]


@torch.no_grad()
def test_cached_equals_full_under_lora():
    from peft import LoraConfig, get_peft_model

    model = ours(random_config(4))
    before = model(padded_ids(model.config, rows=1)[0]).logits.clone()
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj"])).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    input_ids, mask = padded_ids(model.config, rows=1)
    full = tuned(input_ids).logits
    assert largest_difference(full, before) > 0.01, "the adapter must show"
    steps = cached_logits(tuned, input_ids, mask, [10, 1, 1, 1], DynamicCache(config=model.config))
    assert largest_difference(steps, full) <= CACHED_STEP


def test_sharded_weights_are_never_read_as_they_stand():
    """Under tensor parallelism or FSDP2 the parameter is a DTensor, whose local part is not the weight."""
    attention = ours(random_config(4)).model.layers[0].self_attn
    assert matrix_of(attention.kv_b_proj) is attention.kv_b_proj.weight and attention.absorbs(1, 9, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        attention.kv_b_proj.weight = torch.nn.Parameter(distribute_tensor(attention.kv_b_proj.weight, mesh, [Shard(0)]))
        assert not attention.absorbs(1, 9, None)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_cached_equals_full_in_four_bit(tmp_path):
    # bitsandbytes' CPU kernels want sizes that 32 divides.
    config = AxK1Config.preset("nano", qk_nope_head_dim=32, qk_rope_head_dim=32, initializer_range=0.2)
    model = ours(config)
    model.save_pretrained(tmp_path)
    quantised = AxK1ForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map="cpu"
    )
    assert type(quantised.model.layers[0].self_attn.kv_b_proj) is not torch.nn.Linear
    input_ids, mask = padded_ids(config, rows=1)
    full = quantised(input_ids).logits
    assert largest_difference(full, model(input_ids).logits) > 1e-3, "quantisation must show"
    steps = cached_logits(quantised, input_ids, mask, [10, 1, 1, 1], DynamicCache(config=config))
    assert largest_difference(steps, full) <= CACHED_STEP


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
def test_choice_of_experts_against_the_obvious_loop(method):
    groups, top_groups, top_k, experts = 4, 2, 3, 12
    scores = torch.rand(50, experts)
    bias = torch.randn(experts) if method == "noaux_tc" else None
    chosen = choose_experts(
        scores,
        bias,
        method=method,
        groups=1 if method == "greedy" else groups,
        top_groups=1 if method == "greedy" else top_groups,
        top_k=top_k,
    )
    for row, ids in zip(scores if bias is None else scores + bias, chosen):
        eligible = set(range(experts))
        if method != "greedy":
            size = experts // groups
            best = {
                g: sum(sorted(row[g * size : (g + 1) * size].tolist())[-(2 if method == "noaux_tc" else 1) :])
                for g in range(groups)
            }
            kept = sorted(best, key=best.get)[-top_groups:]
            eligible = {e for e in eligible if e // size in kept}
        expected = sorted(eligible, key=lambda e: row[e].item())[-top_k:]
        assert sorted(ids.tolist()) == sorted(expected)


def test_router_bias_steers_the_choice_but_never_the_weight():
    config = random_config(1, n_routed_experts=5, num_experts_per_tok=2, norm_topk_prob=True)
    router = AxK1TopkRouter(config)
    router.weight.data.normal_()
    x = torch.randn(6, config.hidden_size)
    router.e_score_correction_bias[3] = 10.0
    logits, weights, chosen = router(x)
    assert (chosen == 3).any(dim=1).all()
    scores = logits.sigmoid().gather(1, chosen)
    expected = scores / scores.sum(1, keepdim=True) * config.routed_scaling_factor
    torch.testing.assert_close(weights, expected)


def test_router_bias_stays_fp32_when_the_model_does_not():
    model = ours(random_config(0, first_k_dense_replace=0))
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias.clone()
    model.to(torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32 and torch.equal(gate.e_score_correction_bias, bias)


def test_positions_stay_exact_when_the_model_is_cast():
    """Frequencies rounded to bf16 would turn far tokens by visible angles too far."""
    config = random_config(1)
    angles = ours(config).model.rotary_emb(torch.zeros(1), torch.tensor([[1000]]))
    rotary = ours(config).to(torch.bfloat16).float().model.rotary_emb
    for cast, exact in zip(rotary(torch.zeros(1), torch.tensor([[1000]])), angles, strict=True):
        assert torch.equal(cast, exact)


def test_expert_load_counts_the_last_training_pass():
    model = ours(random_config(1, first_k_dense_replace=0)).train()
    input_ids, _ = padded_ids(model.config)
    for _ in range(2):
        model(input_ids)
    for layer in model.model.layers:
        assert layer.mlp.gate.expert_load.sum() == input_ids.numel() * model.config.num_experts_per_tok
    assert not any("expert_load" in name for name in model.state_dict())


def test_sequence_balance_loss_by_hand():
    """DeepSeek-V3's equations written out for one sequence, padding left out."""
    logits, experts = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6, 2))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    # Two choices of one expert by one token cannot happen in the model.
    experts[..., 1] = (experts[..., 0] + 1 + experts[..., 1] % 4) % 5
    by_hand = []
    for b in range(2):
        real = [t for t in range(6) if mask[b, t]]
        share = torch.stack([logits[b, t].sigmoid() / logits[b, t].sigmoid().sum() for t in real]).mean(0)
        counts = torch.stack([(experts[b, real] == e).sum() for e in range(5)])
        by_hand.append((5 / (2 * len(real)) * counts * share).sum())
    torch.testing.assert_close(sequence_balance_loss(logits, experts, mask), torch.stack(by_hand).mean())


def test_balance_loss_joins_the_loss_and_reaches_the_router():
    plain = ours(random_config(6, router_aux_loss_coef=0.0)).train()
    balanced = copy.deepcopy(plain)
    balanced.config.router_aux_loss_coef = 0.5
    input_ids, mask = padded_ids(plain.config, side="right")
    a, b = (m(input_ids, attention_mask=mask, labels=input_ids) for m in (plain, balanced))
    assert a.aux_loss is None and b.aux_loss.item() > 0
    torch.testing.assert_close(b.loss, a.loss + 0.5 * b.aux_loss)
    b.aux_loss.backward()
    gate = balanced.model.layers[-1].mlp.gate
    assert gate.weight.grad.abs().max() > 0


def test_dual_normalization_is_a_switch():
    config = random_config(2)
    with_norm, without = ours(config), ours(random_config(2, post_mlp_norm=False))
    without.load_state_dict({k: v for k, v in with_norm.state_dict().items() if "post_mlp" not in k})
    assert not any("post_mlp" in name for name in without.state_dict())
    input_ids, _ = padded_ids(config)
    with torch.no_grad():
        assert largest_difference(with_norm(input_ids).logits, without(input_ids).logits) > 0.01


@pytest.mark.parametrize("how", ["whole layer", "selective"])
def test_recomputation_changes_no_gradient(how):
    model = ours(random_config(2, v_head_dim=18, qk_nope_head_dim=10, qk_rope_head_dim=8)).train()
    input_ids, _ = padded_ids(model.config)
    model(input_ids, labels=input_ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if how == "selective":
        model.recompute_selectively()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["whole layer", "selective"])
def test_recomputation_keeps_the_routing(how, monkeypatch):
    """A token must go to the experts of the first pass even if the scores came out otherwise the second time."""
    model = ours(random_config(2)).train()
    if how == "selective":
        model.recompute_selectively()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = []
    choose = AxK1TopkRouter.choose

    def unsteady(self, scores_TE):
        # The second pass sees reversed scores, by the same operators.
        expert_TK = choose(self, scores_TE * (1.0 if len(chosen) < sparse else -1.0))
        chosen.append(expert_TK)
        return expert_TK

    monkeypatch.setattr(AxK1TopkRouter, "choose", unsteady)
    sparse = model.config.mlp_layer_types.count("sparse")
    input_ids, _ = padded_ids(model.config)
    model(input_ids, labels=input_ids).loss.backward()
    first, second = chosen[:sparse], chosen[sparse:]
    assert len(second) == sparse, "every MoE is recomputed once"
    for a, b in zip(first, reversed(second)):
        assert torch.equal(a, b)


def test_selective_recomputation_keeps_less():
    config = AxK1Config.preset("nano")
    sizes = {}
    for selective in (False, True):
        model = ours(config).train()
        model.recompute_selectively(selective)
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randint(0, 512, (2, 64)))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes[selective] = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert sizes[True] < 0.6 * sizes[False], sizes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_flops_are_exact(seed, absorbed):
    model = ours(random_config(seed, attn_implementation="eager"))
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.absorbs = lambda *a: absorbed
    cache = DynamicCache(config=model.config)
    input_ids, _ = padded_ids(model.config, rows=3)
    if absorbed:
        model(input_ids[:, :10], past_key_values=cache)
        input_ids = input_ids[:, 10:]
    with FlopCounterMode(display=False) as counter:
        model(input_ids, past_key_values=cache, logits_to_keep=2)
    counted = count_flops(model.config, batch=3, queries=input_ids.shape[1], keys=13, absorbed=absorbed, logits=2)
    assert counted["total"] == counter.get_total_flops()


def test_backward_flops_are_exact():
    model = ours(random_config(3, attn_implementation="eager", tie_word_embeddings=False)).train()
    model.set_experts_implementation("eager")
    input_ids, _ = padded_ids(model.config, rows=3)
    with FlopCounterMode(display=False) as counter:
        model(input_ids, labels=input_ids).loss.backward()
    assert count_flops(model.config, batch=3, queries=13, backward=True)["total"] == counter.get_total_flops()


@torch.no_grad()
def test_router_logits_attentions_and_hidden_states_on_request():
    model = ours(random_config(1, attn_implementation="eager"))
    twin = stock_twin(model)
    input_ids, _ = padded_ids(model.config)
    flags = dict(output_router_logits=True, output_attentions=True, output_hidden_states=True)
    out, expected = model(input_ids, **flags), twin(input_ids, **flags)
    for name in ("router_logits", "attentions", "hidden_states"):
        assert len(out[name]) > 0
        if name == "router_logits" and name not in expected:
            continue  # stock records them in 5.23 and does not in 5.15
        assert len(out[name]) == len(expected[name])
        for a, b in zip(out[name], expected[name]):
            assert largest_difference(a, b) <= PREFILL


@torch.no_grad()
def test_sequence_classification_reads_the_last_real_token():
    model = AxK1ForSequenceClassification(random_config(1, pad_token_id=0, num_labels=3)).eval()
    input_ids = torch.randint(1, 67, (2, 7))
    padded = torch.cat((input_ids, torch.zeros(2, 4, dtype=torch.long)), dim=1)
    mask = (padded != 0).long()
    a, b = model(input_ids).logits, model(padded, attention_mask=mask).logits
    assert a.shape == (2, 3) and largest_difference(a, b) <= PREFILL


@torch.no_grad()
def test_token_classification_is_stocks(tmp_path):
    """Logits, loss, dropout and bias; saved here, read there."""
    config = random_config(1, num_labels=3, num_nextn_predict_layers=1, classifier_dropout=0.5)
    model = AxK1ForTokenClassification(config).eval()
    assert model.dropout.p == 0.5 and model.score.bias is not None
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    twin = AXK1ForTokenClassification.from_pretrained(tmp_path).eval()
    input_ids, mask = padded_ids(config)
    labels = torch.randint(0, 3, input_ids.shape).masked_fill(mask == 0, -100)
    out, expected = (each(input_ids, attention_mask=mask, labels=labels) for each in (model, twin))
    assert out.logits.shape == (*input_ids.shape, 3)
    assert largest_difference(out.logits[mask == 1], expected.logits[mask == 1]) <= PREFILL
    torch.testing.assert_close(out.loss, expected.loss, atol=PREFILL, rtol=PREFILL)


def test_experts_reject_nothing_silently_in_eager():
    experts = AxK1Experts(random_config(1))
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.2)
    experts.config._experts_implementation = "eager"
    x = torch.randn(4, experts.hidden_dim)
    only_foreign = torch.full((4, 1), experts.num_experts)
    assert experts(x, only_foreign, torch.ones(4, 1)).abs().max() == 0


# torch.compile, without the code generator: it is the capture of the whole graph that is ours to keep.


@pytest.mark.parametrize("seed", [2, 4])
def test_compiles_as_one_graph_forward_and_backward(seed):
    # One dense and one sparse layer, or two sparse ones.
    sizes = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "topk_group": 2, "n_group": 2, "n_routed_experts": 6}
    model = ours(random_config(seed, **sizes)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids, _ = padded_ids(model.config)
    results = []
    for m in (compiled, model):
        model.zero_grad()
        output = m(input_ids, labels=input_ids, use_cache=False)
        output.loss.backward()
        results.append((output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (expected_logits, expected) = results
    assert largest_difference(logits, expected_logits) <= PREFILL
    for name in expected:
        assert (gradients[name] - expected[name]).abs().max() <= GRADIENT * expected[name].abs().max(), name


@torch.no_grad()
def test_compiled_static_decoding_is_one_graph():
    model = ours(random_config(2, num_hidden_layers=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids, _ = padded_ids(model.config)
    results = []
    for m in (compiled, model):
        cache = StaticCache(model.config, max_cache_len=16)
        model(input_ids, past_key_values=cache)
        results.append(torch.cat([m(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)], dim=1))
    assert largest_difference(*results) <= CACHED_STEP
