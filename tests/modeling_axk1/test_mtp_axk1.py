"""Does multi-token prediction compute what Megatron does, keep its weights, learn, and draft without changing one token?"""

import logging

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextStreamer, Trainer, TrainingArguments
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from conversion.convert import convert_to_hf
from modeling_axk1 import AxK1ForCausalLM, AxK1ForSequenceClassification, AxK1Model, set_thinking_tokens
from modeling_axk1 import mtp_axk1 as mtp
from tests.conversion.megatron_files import FIXTURES, reference
from tests.folders import on_disk
from tests.modeling_axk1.test_checkpoint import same_weights
from tests.modeling_axk1.test_generation_axk1 import MIXED, QUESTIONS, prompts
from tests.random_models import ours, padded_ids, random_config, tiny_chat_config
from tests.tolerances import MEGATRON
from trainers.tokenizer import train_tokenizer

PARTS = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")


def small(seed: int = 1, **overrides) -> AxK1ForCausalLM:
    fields = {"num_nextn_predict_layers": 1, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    return ours(random_config(seed, **fields | overrides))


# -- the layer and its weights ------------------------------------------------------------------------------------
def test_the_resident_layer_is_megatrons(tmp_path):
    convert_to_hf(FIXTURES / "mtp_pp2" / "torch_dist", tmp_path, progress=False)
    model, truth = AxK1ForCausalLM.from_pretrained(tmp_path).eval(), reference("mtp_pp2")
    ids = truth["input_ids"]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        hidden = model.model.predict_next(0, hidden, model.model.embed_tokens(ids.roll(-1, 1)))
        logits = model.lm_head(hidden)
    torch.testing.assert_close(logits[:, :-1], truth["mtp_logits"][0][:, :-1], atol=MEGATRON, rtol=0)


@pytest.mark.parametrize("dense", [0, 2], ids=["sparse", "dense"])
def test_weights_survive_under_the_known_names(dense, tmp_path):
    model = small(first_k_dense_replace=dense, num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path)
    tensors = on_disk(tmp_path)
    for layer in (2, 3):
        names = {name for name in tensors if name.startswith(f"model.layers.{layer}.")}
        block = {
            name.replace("layers.1.", f"layers.{layer}.") for name in tensors if name.startswith("model.layers.1.")
        }
        assert names == block | {f"model.layers.{layer}.{part}" for part in PARTS}
    assert same_weights(model, AxK1ForCausalLM.from_pretrained(tmp_path))
    # The layout on disk, as Trainer loads it, into a model with other weights.
    torch.manual_seed(5)
    other = AxK1ForCausalLM(model.config)
    assert not same_weights(model, other)
    other.load_state_dict(tensors, strict=not model.config.tie_word_embeddings)
    assert same_weights(model, other)
    AxK1Model.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    assert {name.removeprefix("model.") for name in tensors} - on_disk(tmp_path / "base").keys() == {"lm_head.weight"}


def test_stock_transformers_runs_the_checkpoint_without_the_layer(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    stock = AXK1ForCausalLM.from_pretrained(tmp_path).eval()
    ids, _ = padded_ids(model.config)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    classifier, info = AxK1ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"} and len(classifier.model.layers) == 2


def test_a_file_without_the_weights_loads_without_the_layer(tmp_path, caplog):
    model = small(num_nextn_predict_layers=0)
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = AxK1ForCausalLM.from_pretrained(tmp_path)
    assert sum("num_nextn_predict_layers=1 but the checkpoint holds no" in r.getMessage() for r in caplog.records) == 1
    assert len(loaded.model.layers) == 2 and loaded.config.num_nextn_predict_layers == 0
    assert not any("layers.2" in name for name in loaded.state_dict())
    ids, _ = padded_ids(model.config)
    assert torch.equal(loaded(ids).logits, ours(loaded.config)(ids).logits)
    assert loaded(ids, labels=ids).mtp_loss is None


def test_each_prediction_layer_keeps_its_place_in_the_cache_of_its_own():
    model = small(num_nextn_predict_layers=2)
    held = AxK1ForCausalLM.maybe_distribute_model(model, None, None).model.layers
    assert [layer.self_attn.layer_idx for layer in held] == [0, 1, 0, 1]
    # A later stage of a pipeline, which counts its own layers from 0.
    del model.model.layers[0]
    held = AxK1ForCausalLM.maybe_distribute_model(model, None, None).model.layers
    assert [layer.self_attn.layer_idx for layer in held] == [0, 0, 1]


def test_a_file_with_some_of_the_weights_is_refused(tmp_path):
    model = small()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.enorm" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights .* model.layers.2.enorm.weight"):
        AxK1ForCausalLM.from_pretrained(tmp_path)


def test_trainer_resumes_the_layer_to_the_bit(tmp_path):
    rows = torch.randint(0, 67, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])

    def train(steps, **kwargs):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(small(), arguments, train_dataset=data)
        trainer.train(**kwargs)
        return trainer.model

    straight = train(3)
    assert not torch.equal(straight.model.layers[2].eh_proj.weight, small().model.layers[2].eh_proj.weight)
    assert same_weights(straight, train(3, resume_from_checkpoint=f"{tmp_path}/checkpoint-2"))


# -- the loss -----------------------------------------------------------------------------------------------------
def by_document(model, ids: list[int], labels: list[int]) -> tuple[float, int]:
    """The obvious way: a document alone, token by token; summed loss of the layer and the number of its targets."""
    ids = torch.tensor([ids])
    hidden = model.model(ids).last_hidden_state
    following = model.model.embed_tokens(F.pad(ids, (0, 1))[:, 1:])
    logits = model.lm_head(model.model.predict_next(0, hidden, following))[0].log_softmax(-1)
    scored = [(at, labels[at + 2]) for at in range(len(labels) - 2) if labels[at + 2] != -100]
    return -sum(logits[at, label].item() for at, label in scored), len(scored)


DOCUMENTS = [[5, 9, 2, 7, 7, 1], [3], [8, 4], [6, 6, 0, 2]]
LABELS = [[-100, -100, 2, 7, -100, 1], [3], [8, 4], [6, 6, 0, 2]]


@torch.no_grad()
def test_loss_looks_two_ahead_and_stays_within_its_document():
    model = small()
    sums = [by_document(model, *pair) for pair in zip(DOCUMENTS, LABELS)]
    total, count = sum(s for s, _ in sums), sum(n for _, n in sums)
    assert count == 3 + 0 + 0 + 2
    ids, labels = (torch.tensor([sum(lists, [])]) for lists in (DOCUMENTS, LABELS))
    positions = torch.tensor([[place for document in DOCUMENTS for place in range(len(document))]])
    packed = model(ids, labels=labels, position_ids=positions, use_cache=False)
    assert packed.mtp_loss.item() == pytest.approx(total / count, rel=1e-5)
    main = model(ids, labels=labels, position_ids=positions, use_cache=False, mtp_loss_weight=0.0)
    assert (packed.loss - main.loss).item() == pytest.approx(0.3 * total / count, rel=1e-4)
    for side in ("left", "right"):
        padded = torch.stack([pad_to(row, 7, 0, side) for row in DOCUMENTS])
        targets = torch.stack([pad_to(row, 7, -100, side) for row in LABELS])
        mask = torch.stack([pad_to([1] * len(row), 7, 0, side) for row in DOCUMENTS])
        loss = model(padded, attention_mask=mask, labels=targets).mtp_loss.item()
        assert loss == pytest.approx(total / count, rel=1e-5), side


def pad_to(row: list[int], length: int, value: int, side: str) -> torch.Tensor:
    room = length - len(row)
    return F.pad(torch.tensor(row), (room, 0) if side == "left" else (0, room), value=value)


@torch.no_grad()
def test_padding_that_bears_labels_is_not_learned():
    """A place whose own token, or the next, is padding sees nothing that is real."""
    targets = torch.tensor([[10, 11, 12, 13, 14, -100]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = torch.tensor([[-100, -100, 13, 14, -100, -100]])
    assert torch.equal(mtp.mtp_targets(targets, 0, None, mask), expected)
    two_ahead = torch.tensor([[-100, -100, 14, -100, -100, -100]])
    assert torch.equal(mtp.mtp_targets(targets, 1, None, mask), two_ahead)


def test_accumulated_halves_are_the_whole_batch_and_the_trunk_learns():
    model = small(router_aux_loss_coef=0.01)
    ids, _ = padded_ids(model.config, rows=4)
    whole = model(ids, labels=ids, num_items_in_batch=48)
    halves = [model(half, labels=half, num_items_in_batch=48) for half in ids.split(2)]
    assert sum(half.mtp_loss for half in halves).item() == pytest.approx(whole.mtp_loss.item(), rel=1e-5)
    only = torch.autograd.grad(model(ids, labels=ids, mtp_loss_weight=1.0).loss - model(ids, labels=ids).loss,
                               [model.model.layers[2].eh_proj.weight, model.model.layers[0].self_attn.o_proj.weight,
                                model.model.embed_tokens.weight])  # fmt: skip
    assert all(gradient.norm() > 1e-4 for gradient in only)


@torch.no_grad()
def test_the_second_layer_reads_the_first_and_looks_three_ahead():
    model = small(num_nextn_predict_layers=2)
    ids, _ = padded_ids(model.config, rows=1)
    embed, hidden, losses = model.model.embed_tokens, model.model(ids).last_hidden_state, []
    for depth in (0, 1):
        hidden = model.model.predict_next(depth, hidden[:, :-1], embed(ids[:, depth + 1 :]))
        losses.append(F.cross_entropy(model.lm_head(hidden)[0, :-1], ids[0, depth + 2 :]).item())
    assert model(ids, labels=ids).mtp_loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_weight_follows_the_schedule():
    assert [mtp.mtp_weight(done) for done in (0.0, 0.67, 0.68, 1.0)] == [0.3, 0.3, 0.1, 0.1]
    assert mtp.mtp_weight(0.5, ((0.0, 1.0), (0.5, 0.25))) == 0.25


# -- drafting -----------------------------------------------------------------------------------------------------
def teach(model: AxK1ForCausalLM, rows: torch.Tensor, steps: int) -> AxK1ForCausalLM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(rows, labels=rows, mtp_loss_weight=1.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    """One that has half learned to count in steps, so that it and its drafts are right here and wrong there."""
    steps, starts = torch.meshgrid(torch.tensor([1, 2, 3]), torch.arange(0, 20, 2), indexing="ij")
    rows = (starts.reshape(-1, 1) + steps.reshape(-1, 1) * torch.arange(14)) % 60
    return teach(small(initializer_range=0.05), rows, 60)


def same_text(model, ids, **kwargs):
    """Greedy with and without drafts; returns the drafted output."""
    settings = {"max_new_tokens": 40, "do_sample": False} | kwargs
    plain = model.generate(ids, **settings)
    drafted = model.generate(ids, use_mtp=True, return_dict_in_generate=True, **settings)
    assert plain.tolist() == drafted.sequences.tolist()
    return drafted


def test_drafts_change_no_token(model):
    ids, mask = padded_ids(model.config, rows=4, tokens=13)
    ids[:, 8:] = torch.arange(5) + torch.tensor([[3], [30], [11], [7]])
    drafted = same_text(model, ids, attention_mask=mask)
    assert 0.2 < drafted.accepted / drafted.drafted < 0.98
    one = same_text(model, ids[:1])
    # Each step of the one row gives a token and, where the draft was right, another.
    assert one.drafted + one.accepted in (39, 40)
    assert one.drafted < 35


def test_rows_end_each_in_its_own_place(model):
    ids = torch.arange(6) + torch.tensor([[3], [30], [11], [7], [44]])
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    stops = plain[torch.arange(5), torch.tensor([9, 15, 12, 35, 20])].tolist()
    drafted = same_text(model, ids, eos_token_id=stops, pad_token_id=66)
    assert len({(row != 66).sum().item() for row in drafted.sequences}) > 2
    # Without an end-of-sequence token a row that a criterion stopped runs on until the last has stopped.
    same_text(model, ids, stopping_criteria=[Seen(stops[0])])
    same_text(model, ids, repetition_penalty=1.3, no_repeat_ngram_size=3)
    for tokens in (1, 2, 3):
        same_text(model, ids, max_new_tokens=tokens)


def test_a_finished_row_may_be_left_nothing_to_sample(model):
    ids = torch.arange(6) + torch.tensor([[3], [30], [11], [7]])

    class BarsRowsOfOthersLength(LogitsProcessor):
        """What it leaves of a row that it is shown cut, or padded behind its end, is nothing."""

        def __call__(self, input_ids, scores):
            return scores.masked_fill((input_ids[:, -1] == 66)[:, None], float("-inf"))

    torch.manual_seed(0)
    drafted = model.generate(
        ids, use_mtp=True, do_sample=True, max_new_tokens=30, eos_token_id=list(range(8)), pad_token_id=66,
        logits_processor=LogitsProcessorList([BarsRowsOfOthersLength()]),
    )  # fmt: skip
    assert (drafted[:, -1] == 66).any()


class Seen:
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 6:] == self.token).any(dim=1)


def test_holes_in_the_cache_are_squeezed_out(model, monkeypatch):
    monkeypatch.setattr(mtp, "MIN_HOLES", 2)
    monkeypatch.setattr(mtp, "HOLE_SHARE", 0.0)
    squeeze, narrower = mtp.Drafting.squeeze, []

    def held(drafting):
        """What is cached for each row, in its order."""
        layers = [*drafting.cache.layers, *drafting.mtp_cache.layers]
        return [states[row, 0, at.bool()] for layer in layers for states in (layer.keys, layer.values)
                for row, at in enumerate(drafting.slots_BC)]  # fmt: skip

    def checked(drafting):
        before, slots = held(drafting), drafting.slots_BC.shape[1]
        squeeze(drafting)
        assert all(torch.equal(x, y) for x, y in zip(before, held(drafting), strict=True))
        assert drafting.cache.get_seq_length() == drafting.slots_BC.shape[1]
        narrower.append(drafting.slots_BC.shape[1] < slots)

    monkeypatch.setattr(mtp.Drafting, "squeeze", checked)
    ids, mask = padded_ids(model.config, rows=4, tokens=13)
    ids[:, 8:] = torch.arange(5) + torch.tensor([[3], [30], [11], [7]])
    same_text(model, ids, attention_mask=mask)
    assert sum(narrower) >= 2


@torch.no_grad()
def drafts_right(model, row: list[int], prompt: int) -> tuple[int, int]:
    """Drafted and accepted of a finished text, by one pass over all of it: the layer's best guess wherever it had to guess."""
    ids = torch.tensor([row])
    hidden = model.model(ids).last_hidden_state
    guess = model.lm_head(model.model.predict_next(0, hidden, model.model.embed_tokens(ids.roll(-1, 1))))[0].argmax(-1)
    pending, drafted, accepted = prompt, 0, 0
    while pending < len(row) - 1:
        right = int(guess[pending - 1] == row[pending + 1])
        pending, drafted, accepted = pending + 1 + right, drafted + 1, accepted + right
    return drafted, accepted


def test_drafts_are_the_layers_best_guesses(model):
    """Rows that end at different places, padded on the left, with holes: counted as one pass over each text counts."""
    ids, mask = padded_ids(model.config, rows=4, tokens=13)
    ids[:, 8:] = torch.arange(5) + torch.tensor([[3], [30], [11], [7]])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    stops = plain[[0, 1], [19, 24]].tolist()
    drafted = same_text(model, ids, attention_mask=mask, eos_token_id=stops, pad_token_id=66)
    counted = []
    for row, present in zip(drafted.sequences, mask):
        padding = int((present == 0).sum())
        text = [token for token in row[padding:].tolist() if token != 66]
        counted.append(drafts_right(model, text, 13 - padding))
    assert (drafted.drafted, drafted.accepted) == tuple(map(sum, zip(*counted)))
    assert len({drafts for drafts, _ in counted}) > 1


def test_rejected_drafts_leave_the_cache(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        mtp.Drafting,
        "squeeze",
        lambda self: lengths.append((self.cache.get_seq_length(), self.mtp_cache.get_seq_length(), self.slots_BC)),
    )
    drafted = same_text(model, torch.arange(6)[None] + 30)
    assert drafted.accepted < drafted.drafted
    for cached, drafting, slots in lengths:
        assert cached == drafting == slots.shape[1] and slots.all()


def test_thinking_modes_and_budgets_hold_and_change_no_token():
    tokenizer = train_tokenizer([*QUESTIONS, "The answer is 42. 안녕하세요.\n"] * 20, 330)
    config = tiny_chat_config(len(tokenizer))
    config.num_nextn_predict_layers = 1
    torch.manual_seed(0)
    model = AxK1ForCausalLM(config)
    prompt = prompts(tokenizer)
    teach(model, prompt["input_ids"][:, -12:], 30)
    set_thinking_tokens(model.generation_config, tokenizer)
    accepted = 0
    for budget in (None, [0, None, 3, 7]):
        for enforce in (True, False):
            drafted = same_text(
                model, **prompt, ids=None, enable_thinking=MIXED, thinking_budget=budget, enforce_format=enforce
            )
            accepted += drafted.accepted
    assert accepted > 5


def test_streams_every_token_once(model):
    class Collect(TextStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Collect(), torch.arange(6)[None] + 30
    output = model.generate(ids, max_new_tokens=20, do_sample=False, use_mtp=True, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended


def test_samples_have_the_models_distribution():
    """Pairs of tokens behind a draft, 6,000 times, beside the probabilities themselves; temperature and top-k included."""
    torch.manual_seed(0)
    model = small(vocab_size=6, initializer_range=0.4)
    ids, warp = torch.tensor([[1, 2, 0]]), {"temperature": 0.7, "top_k": 4}
    with torch.no_grad():

        def probabilities(row):
            logits = model(torch.tensor([row])).logits[0, -1] / warp["temperature"]
            return logits.masked_fill(logits < logits.topk(4).values[-1], float("-inf")).softmax(-1)

        first = probabilities(ids[0].tolist())
        pairs = torch.stack([probabilities([*ids[0].tolist(), token]) for token in range(6)]) * first[:, None]
        triples = torch.stack(
            [probabilities([*ids[0].tolist(), a, b]) * pairs[a, b] for a in range(6) for b in range(6)]
        ).flatten()
    draws = 6_000
    output = model.generate(
        ids,
        do_sample=True,
        use_mtp=True,
        max_new_tokens=3,
        num_return_sequences=draws,
        return_dict_in_generate=True,
        **warp,
    )
    assert 0.1 < output.accepted / output.drafted < 0.95
    a, b, c = output.sequences[:, 3:].T
    counts = torch.bincount(a * 36 + b * 6 + c, minlength=216).double()
    likely = triples > 1e-4
    assert counts[triples == 0].sum() == 0
    chi = ((counts - draws * triples) ** 2 / (draws * triples))[likely].sum()
    freedom = likely.sum() - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)


def test_kept_and_redrawn_tokens_follow_the_target():
    torch.manual_seed(0)
    target, draft = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.6, 0.1, 0.2])
    rows = 50_000
    tokens, kept = mtp.accept(
        target.expand(rows, -1), draft.expand(rows, -1), draft.multinomial(rows, replacement=True)
    )
    torch.testing.assert_close(tokens.bincount(minlength=4) / rows, target, atol=0.01, rtol=0)
    # The share kept is the distributions' overlap.
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.01)


FILLED = DynamicCache()
FILLED.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"dola_layers": "low"}, "dola_layers='low'"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"past_key_values": FILLED}, "DynamicCache of 3 tokens"),
        ({"assistant_model": "another"}, "does not go with assistant_model"),
        ({"synced_gpus": True}, "synced_gpus=True"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_drafted_is_refused(model, settings, said):
    with pytest.raises(ValueError, match=said):
        model.generate(torch.tensor([[1, 2, 3, 4]]), use_mtp=True, max_new_tokens=2, **settings)


def test_an_explicit_no_overrides_the_generation_configuration(model, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("drafts")

    ids, settings = torch.tensor([[1, 2, 3, 4]]), {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(ids, **settings)
    monkeypatch.setattr(model.generation_config, "use_mtp", True)
    monkeypatch.setattr(AxK1Model, "predict_next", never)
    monkeypatch.setattr("transformers.generation.utils.MTPCandidateGenerator", never)
    with pytest.raises(AssertionError, match="drafts"):
        model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_mtp=False, **settings), plain)


def test_a_model_without_the_layer_is_refused():
    with pytest.raises(ValueError, match="holds none"):
        small(num_nextn_predict_layers=0).generate(torch.tensor([[1, 2]]), use_mtp=True, max_new_tokens=2)


@pytest.mark.parametrize("save", ["gradient_checkpointing_enable", "recompute_selectively"])
def test_recomputation_and_recorded_outputs_leave_the_layer_alone(save):
    gradients = []
    for switch in (None, save):
        model = small(router_aux_loss_coef=0.01).train()
        if switch:
            getattr(model, switch)()
        ids, mask = padded_ids(model.config)
        output = model(ids, attention_mask=mask, labels=ids, use_cache=False, output_hidden_states=True)
        assert len(output.hidden_states) == 3 and len(output.router_logits) == 1
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours_, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_that_are_kept_whole_are_there(layers, tmp_path):
    """accelerate's FSDP refuses the name of a layer that the model does not have."""
    config = random_config(1, num_nextn_predict_layers=layers)
    model = ours(config)
    assert named_and_there(model) == {"AxK1DecoderLayer", *(["AxK1MTPLayer"] if layers else [])}
    # The configuration promises prediction layers that the file lacks.
    ours(random_config(1)).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AxK1ForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_nextn_predict_layers == 0 and named_and_there(loaded) == {"AxK1DecoderLayer"}


def named_and_there(model) -> set[str]:
    named = set(model._no_split_modules)
    assert named <= {type(module).__name__ for module in model.modules()}
    return named
