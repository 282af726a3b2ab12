"""Are rank files read as Megatron means them, and written as Megatron writes them?"""

import io
import shutil

import pytest
import torch

from conversion import convert_to_hf, convert_to_megatron, verify
from conversion.convert import open_any
from conversion.megatron import find_iteration
from conversion.megatron_legacy import EMBEDDING, HEAD, Layout, check_layout, open_legacy, stage_layers
from conversion.weight_map import POST_NORM_NAMES
from modeling_axk1 import AxK1Config
from tests.conversion.megatron_files import FIXTURES, group_experts, load_rank_file, models_in

MOE = "decoder.layers.1.mlp."
# The layout, and the arguments that write it.
WRITTEN = {
    "tp1_pp1_ep1": {},
    "tp2_pp2_ep2_etp1": {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
    "tp1_pp2_vpp2": {"pp": 2, "vpp": 2},
    "te_tp2_ep2_etp1": {"tp": 2, "ep": 2, "etp": 1, "transformer_engine": True},
    "mtp_pp2": {"pp": 2},
}


@pytest.mark.parametrize("layout", WRITTEN)
def test_our_rank_files_equal_megatrons_tensor_for_tensor(tmp_path, layout):
    """From the torch_dist or legacy sibling over Hugging Face to rank files: Megatron wrote both ends."""
    source = FIXTURES / layout / ("torch_dist" if (FIXTURES / layout / "torch_dist").exists() else "legacy")
    convert_to_hf(source, tmp_path / "hf", progress=False)
    convert_to_megatron(
        tmp_path / "hf",
        tmp_path / "out",
        format="legacy",
        vocab_divisor=16,
        iteration=10,
        progress=False,
        **WRITTEN[layout],
    )
    written = models_in(find_iteration(tmp_path / "out"))
    truth = models_in(find_iteration(FIXTURES / layout / "legacy"))
    assert written.keys() == truth.keys()
    for place, tensor in truth.items():
        if tensor is None:
            assert written[place] is None, place
            continue
        out = written[place]
        assert out.dtype == tensor.dtype and out.shape == tensor.shape, place
        if place[2] in ("embedding.word_embeddings.weight", "output_layer.weight"):
            # Megatron leaves random numbers in the rows that only pad the vocabulary to a multiple of 16 * TP.
            rank, rows = int(place[0].split("_")[2]), len(tensor)
            out, tensor = (each[: max(0, 131 - rank * rows)] for each in (out, tensor))
        assert torch.equal(out, tensor), place


def test_the_arguments_that_megatron_compares_at_loading(tmp_path):
    source = FIXTURES / "tp2_pp2_ep2_etp1" / "legacy"
    convert_to_megatron(source, tmp_path / "out", format="legacy", tp=2, pp=2, ep=2, etp=1, progress=False)
    name = "mp_rank_01_001_001/model_optim_rng.pt"
    ours = load_rank_file(tmp_path / "out" / "release" / name)
    theirs = load_rank_file(find_iteration(source) / name)
    assert ours["checkpoint_version"] == theirs["checkpoint_version"] == 3.0
    described = vars(theirs["args"])
    # What is of a run and not of a model.
    own = {
        "iteration",
        "save",
        "rank",
        "attention_backend",
        "model_type",
        "tokenizer_type",
        "moe_use_legacy_grouped_gemm",
    }
    same = {key for key in described if getattr(ours["args"], key, None) == described[key]}
    assert described.keys() - same <= own


@pytest.fixture
def copied(tmp_path):
    """A rank-file checkpoint that a test may damage."""
    shutil.copytree(FIXTURES / "tp2_pp2_ep2_etp1" / "legacy", tmp_path / "legacy")
    return tmp_path / "legacy" / "iter_0000010"


def open_it(folder, drop=False):
    return open_legacy(find_iteration(folder), POST_NORM_NAMES, drop)


def edit(path, change):
    file = load_rank_file(path)
    change(file)
    # The stub of an enum cannot be pickled, and nothing reads it.
    for name in ("attention_backend", "model_type"):
        vars(file["args"]).pop(name, None)
    torch.save(file, path)


def test_missing_rank_files_are_named(copied):
    with pytest.raises(ValueError, match="lacks the rank files mp_rank_01 of TP=2 PP=1 EP=1 ETP=1"):
        open_it(FIXTURES / "incomplete_tp2_ep1_etp1" / "legacy")
    shutil.rmtree(copied / "mp_rank_01_001_001")
    with pytest.raises(ValueError, match="lacks the rank files mp_rank_01_001_001 of TP=2 PP=2 EP=2 ETP=1"):
        open_it(copied)
    (copied / "mp_rank_00_000_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match="mp_rank_00_000_000 holds no model_optim_rng.pt"):
        open_it(copied)


def test_a_missing_expert_rank_is_named_though_its_attention_shard_is_elsewhere(tmp_path):
    source = FIXTURES / "tp1_pp1_ep1" / "legacy"
    convert_to_megatron(source, tmp_path / "out", format="legacy", tp=2, ep=4, etp=1, progress=False)
    shutil.rmtree(tmp_path / "out" / "release" / "mp_rank_01_003")
    with pytest.raises(ValueError, match="lacks the rank files mp_rank_01_003 of TP=2 PP=1 EP=4 ETP=1"):
        open_it(tmp_path / "out")


def test_the_second_number_is_a_stage_or_an_expert_rank_as_the_arguments_say(tmp_path):
    for name, layout in {"pp": {"pp": 2}, "ep": {"ep": 2}}.items():
        convert_to_megatron(
            FIXTURES / "tp1_pp1_ep1" / "legacy", tmp_path / name, format="legacy", progress=False, **layout
        )
        folders = sorted(path.name for path in (tmp_path / name / "release").iterdir())
        assert folders == ["mp_rank_00_000", "mp_rank_00_001"]
    # A name of one number in a checkpoint of two stages.
    (tmp_path / "pp" / "release" / "mp_rank_00_001").rename(tmp_path / "pp" / "release" / "mp_rank_00")
    with pytest.raises(ValueError, match="mp_rank_00 does not fit PP=2, EP=1"):
        open_it(tmp_path / "pp")


def test_copies_of_a_tensor_are_compared(copied, tmp_path):
    """TP2 EP4: each attention shard is in two files. One bit apart, nobody knows which is right."""
    source = FIXTURES / "tp1_pp1_ep1" / "legacy"
    convert_to_megatron(source, tmp_path / "out", format="legacy", tp=2, ep=4, etp=1, progress=False)
    opened = open_it(tmp_path / "out")
    assert len(opened.replicas) > 50
    path = tmp_path / "out" / "release" / "mp_rank_01_003" / "model_optim_rng.pt"
    file = load_rank_file(path)
    file["model"]["decoder.layers.2.self_attention.linear_proj.weight"][3, 3] += 1e-6
    torch.save(file, path)
    with pytest.raises(ValueError, match="hold different copies of decoder.layers.2.self_attention.linear_proj.weight"):
        convert_to_hf(tmp_path / "out", tmp_path / "hf", progress=False)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob("hf.partial*"))


@pytest.fixture
def tied(tmp_path):
    """mtp_pp2 with tied weights: the last stage holds the embedding for its prediction layer, and once more as the head."""
    shutil.copytree(FIXTURES / "mtp_pp2" / "legacy", tmp_path / "tied")

    def tie(file):
        file["args"].untie_embeddings_and_output_weights = False
        if HEAD in file["model"]:
            file["model"][HEAD] = file["model"][EMBEDDING].clone()

    for path in (tmp_path / "tied").rglob("*.pt"):
        edit(path, tie)
    return tmp_path / "tied"


def last_stage(folder):
    return find_iteration(folder) / "mp_rank_00_001" / "model_optim_rng.pt"


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_the_last_stages_copies_of_the_embedding_are_compared(tied, name):
    assert verify(tied, tied, progress=False) == []
    edit(last_stage(tied), lambda file: file["model"][name].view(torch.int32)[7, 7].bitwise_xor_(1))
    with pytest.raises(ValueError, match=f"hold different copies of {EMBEDDING}"):
        verify(tied, tied, progress=False)


@pytest.mark.parametrize(("left_out", "needed"), [("nothing", {EMBEDDING, HEAD}), ("mtp.", {HEAD})])
def test_the_last_stage_holds_the_embedding_for_whoever_needs_it(tied, tmp_path, left_out, needed):
    """The prediction layer under its own name, a tied head under the head's."""
    edit(last_stage(tied), _without(left_out))
    if left_out == "mtp.":
        with pytest.raises(ValueError, match="holds 0 prediction layers, its arguments say mtp_num_layers=1"):
            verify(tied, tied, progress=False)
        for path in tied.rglob("*.pt"):
            edit(path, lambda file: setattr(file["args"], "mtp_num_layers", None))
    convert_to_megatron(tied, tmp_path / "out", format="legacy", pp=2, vocab_divisor=16, progress=False)
    assert {EMBEDDING, HEAD} & load_rank_file(last_stage(tmp_path / "out"))["model"].keys() == needed
    assert verify(tied, tmp_path / "out", progress=False) == []


def _without(prefix):
    """A change that takes away every tensor whose name begins so."""

    def drop(file):
        file["model"] = {name: tensor for name, tensor in file["model"].items() if not name.startswith(prefix)}

    return drop


def test_a_norm_of_whole_numbers_is_refused_and_the_routers_dtypes_are_kept(tmp_path):
    shutil.copytree(FIXTURES / "tp1_pp1_ep1" / "legacy", tmp_path / "source")
    (path,) = (tmp_path / "source").rglob("*.pt")
    norm, router = "decoder.layers.1.input_layernorm.weight", "decoder.layers.1.mlp.router."
    edit(path, lambda file: file["model"].update({f"{router}weight": file["model"][f"{router}weight"].double()}))
    edit(path, lambda file: file["model"].update({f"{router}expert_bias": file["model"][f"{router}expert_bias"].half()}))
    opened = open_any(tmp_path / "source").tensors
    assert opened["model.layers.1.mlp.gate.weight"].dtype == torch.float64
    assert opened["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float16
    edit(path, lambda file: file["model"].update({norm: file["model"][norm].long()}))
    with pytest.raises(ValueError, match=rf"{tmp_path}.* holds {norm} \(torch.int64\) where the model has weights"):
        open_any(tmp_path / "source")


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [
        ("decoder.layers.1.", "holds 3 layers, its arguments say num_layers=4"),
        ("decoder.layers.1.post_mlp_layernorm", r"only the layers \[1, 2\] of \[1, 2, 3\] have a post-MLP norm"),
    ],
)
def test_a_layer_or_its_norm_that_is_missing_in_every_file(copied, tmp_path, prefix, complaint):
    """The last layer is the second of the last stage: what is left looks whole by itself."""
    for path in copied.glob("mp_rank_*_001_*/*.pt"):
        edit(path, _without(prefix))
    with pytest.raises(ValueError, match=complaint):
        convert_to_hf(copied, tmp_path / "hf", progress=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda file: file["model"].pop("decoder.layers.1.mlp.router.weight"), "one of them is wrong"),
        (
            lambda file: file["model"].pop("decoder.layers.1.self_attention.linear_proj.weight"),
            "parts of shapes",
        ),
        (
            lambda file: file["model"].update({"decoder.layers.1.surprise.weight": torch.zeros(3)}),
            r"left over \[decoder.layers.3.surprise.weight",
        ),
        (
            lambda file: file["model"].update({"decoder.layers.0.input_layernorm.weight": torch.zeros(65)}),
            "decoder.layers.2.input_layernorm.weight",
        ),
        (
            lambda file: file["model"].update({"decoder.layers.5.input_layernorm.weight": torch.zeros(64)}),
            "it is damaged",
        ),
        (lambda file: file.pop("model"), "holds no 'model'"),
        (lambda file: file.pop("args") and file.update({"args": 5}), "holds no Megatron arguments"),
    ],
)
def test_damage_is_named(copied, tmp_path, change, complaint):
    paths = [copied / f"mp_rank_{rank}_001_{rank:03}" / "model_optim_rng.pt" for rank in ("00", "01")]
    paths = [copied / "mp_rank_00_001_000" / "model_optim_rng.pt"]
    if complaint.startswith("one of") or "left over" in complaint:
        paths.append(copied / "mp_rank_01_001_001" / "model_optim_rng.pt")
    if complaint.startswith("holds no Megatron"):
        paths = [copied / "mp_rank_00_000_000" / "model_optim_rng.pt"]
    for path in paths:
        file = load_rank_file(path)
        change(file)
        torch.save({key: value for key, value in file.items() if key != "args"} | _args(file), path)
    with pytest.raises(ValueError, match=complaint):
        convert_to_hf(copied, tmp_path / "hf", progress=False)


def _args(file):
    """The arguments without the stubs, which pickle cannot find again."""
    args = file.get("args")
    for name in ("attention_backend", "model_type"):
        if hasattr(args, name):
            delattr(args, name)
    return {"args": args} if args is not None else {}


@pytest.mark.parametrize("layout", [{"tp": 4, "etp": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_grouped_experts_split_otherwise_than_attention(tmp_path, layout):
    """GroupedMLP over fewer tensor-parallel ranks, and over expert ranks: a rank's experts transposed, one behind the other."""
    source = FIXTURES / "tp1_pp1_ep1" / "legacy"
    convert_to_megatron(source, tmp_path / "out", format="legacy", progress=False, **layout)
    for path in (tmp_path / "out").rglob("*.pt"):
        edit(path, lambda file: group_experts(file["model"], 64))
    assert verify(source, tmp_path / "out", progress=False) == []


def test_fused_down_projections(tmp_path):
    """megatron-core 0.19's mla_down_proj_fusion: each rank's rows of both, one above the other, and the norm before them."""
    source = FIXTURES / "tp2_pp2_ep2_etp1" / "legacy"
    convert_to_megatron(source, tmp_path / "out", format="legacy", tp=2, progress=False)
    for path in (tmp_path / "out").rglob("*.pt"):
        file = load_rank_file(path)
        for layer in range(4):
            prefix = f"decoder.layers.{layer}."
            attention = f"{prefix}self_attention.linear_"
            downs = [file["model"].pop(f"{attention}{kind}_down_proj.weight") for kind in ("q", "kv")]
            file["model"][f"{attention}qkv_down_proj.weight"] = torch.cat(downs)
            norm = file["model"].pop(f"{prefix}input_layernorm.weight")
            file["model"][f"{attention}qkv_down_proj.layer_norm_weight"] = norm
        torch.save(file, path)
    assert verify(source, tmp_path / "out", progress=False) == []


def test_fp8_state_wants_consent(copied, tmp_path):
    path = copied / "mp_rank_00_000_000" / "model_optim_rng.pt"
    name = "decoder.layers.0.self_attention.linear_proj._extra_state"
    edit(path, lambda file: file["model"].update({name: torch.ones(40, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=f"{name} holds 40 numbers of FP8 scaling state.*--drop-fp8-state"):
        open_it(copied)
    assert "decoder.layers.0.self_attention.linear_proj.weight" in open_it(copied, drop=True).parts


def test_older_fp8_state_is_a_file_in_the_file(copied):
    """Transformer Engine once kept a BytesIO: of a saved None without FP8, of tensors with it."""
    path, name = copied / "mp_rank_00_000_000" / "model_optim_rng.pt", "decoder.layers.0.mlp.linear_fc1._extra_state"
    for state, refused in ((None, False), ({"scale_fwd": torch.ones(16)}, True)):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        edit(path, lambda file, buffer=buffer: file["model"].update({name: buffer}))
        if refused:
            with pytest.raises(ValueError, match="FP8 scaling state"):
                open_it(copied)
        else:
            open_it(copied)


def test_every_rank_has_to_agree_on_what_all_of_them_hold(copied, tmp_path):
    """Norms and routers are whole on each tensor-parallel rank: rank 0's alone would be a guess."""
    path = copied / "mp_rank_01_000_001" / "model_optim_rng.pt"
    edit(path, lambda file: file["model"]["decoder.layers.1.mlp.router.weight"].mul_(0))
    with pytest.raises(ValueError, match="hold different copies of decoder.layers.1.mlp.router.weight"):
        convert_to_hf(copied, tmp_path / "hf", progress=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda file: file.update({"iteration": 77}), r"iteration \(77 and 10\)"),
        (lambda file: setattr(file["args"], "rotary_base", 5), r"rotary_base \(5 and 10000\)"),
        (lambda file: setattr(file["args"], "expert_model_parallel_size", 1), "layout .'TP2 PP2 VPP1 EP1 ETP1' and 'TP2"),
        (lambda file: setattr(file["args"], "bf16", True), r"bf16 \(True and False\); fetch the one"),
    ],
)
def test_rank_files_of_two_checkpoints_do_not_mix(copied, change, complaint):
    edit(copied / "mp_rank_01_001_001" / "model_optim_rng.pt", change)
    with pytest.raises(ValueError, match=f"mp_rank_01_001_001.* is of another checkpoint.*{complaint}"):
        open_it(copied)


@pytest.mark.parametrize(
    ("one", "other"), [("00_000_000", "01_000_001"), ("00_000_000", "00_001_000"), ("01_000_001", "01_001_001")]
)
def test_renamed_rank_folders_are_told_by_the_rank_that_wrote_them(copied, one, other):
    """Swapped, the files fit each other as well as before: the experts or layers of one would be taken for the other's."""
    for path in copied.glob("*/*.pt"):
        tp, pp, _ = (int(number) for number in path.parent.name.removeprefix("mp_rank_").split("_"))
        # With two data-parallel replicas, of which the second one wrote nothing.
        edit(path, lambda file, rank=4 * pp + tp: setattr(file["args"], "rank", rank))
    open_it(copied)
    for old, new in ((one, "aside"), (other, f"mp_rank_{one}"), ("aside", f"mp_rank_{other}")):
        (copied / (old if old == "aside" else f"mp_rank_{old}")).rename(copied / new)
    with pytest.raises(ValueError, match="says that rank . wrote it, which is not the one that its folder is named after"):
        open_it(copied)


def _gpt(**said):
    """A change to the rank file of another architecture: GPT's arguments, and these."""
    gpt = {"swiglu": False, "normalization": "LayerNorm", "multi_latent_attention": False, "q_lora_rank": None}
    return lambda file: vars(file["args"]).update(gpt | said)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_gpt(), "multi_latent_attention=False is not A.X K1: .*; only checkpoints of A.X K1 are converted"),
        (_gpt(multi_latent_attention=None), "normalization='LayerNorm' is not A.X K1"),
        (lambda file: setattr(file["args"], "moe_router_score_function", "softmax"), "router is a sigmoid; only"),
        (lambda file: file.update(model={"language_model": {"embedding": {}}}), "before Megatron core, load it with"),
        (lambda file: file.update(model={}), "holds no decoder layers, no weights at all; .* fetch the model's own files"),
        (lambda file: file.update(optimizer=file.pop("model")), r"only \[args, .*optimizer\]; it was saved without the"),
        (lambda file: file["model"].update({EMBEDDING: torch.tensor(0.0)}), r"shapes \[\[\]\] do not make"),
        (lambda file: file["model"].update({5: torch.zeros(3)}), "5 names a tensor"),
        (lambda file: file["model"].update({f"{MOE}experts.weight1": torch.zeros(9)}), r"is of shape \[9\], no matrix"),
    ],
)
def test_a_model_of_another_kind_or_none_is_named(tmp_path, change, complaint):
    shutil.copytree(FIXTURES / "tp1_pp1_ep1" / "legacy", tmp_path / "source")
    edit(next((tmp_path / "source").rglob("*.pt")), change)
    with pytest.raises(ValueError, match=f"{tmp_path / 'source'}.*{complaint}"):
        open_any(tmp_path / "source")


def test_one_rank_of_another_dtype_is_named(copied):
    path = copied / "mp_rank_01_000_001" / "model_optim_rng.pt"
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    edit(path, lambda file: file["model"].update({name: file["model"][name].bfloat16()}))
    with pytest.raises(ValueError, match=f"{name} is torch.float32 on one rank, torch.bfloat16 on another"):
        open_any(copied)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("mp_rank_00_005_000", "is no rank of TP=2 PP=2 EP=2"), ("mp_rank_00_0000_000", "are the same rank")],
)
def test_ranks_that_do_not_belong_are_named(copied, name, complaint):
    shutil.copytree(copied / "mp_rank_00_000_000", copied / name)
    with pytest.raises(ValueError, match=complaint):
        open_it(copied)


@pytest.mark.parametrize("size", [10**9, -1, True, "2", 2.0])
def test_a_number_of_ranks_is_one(copied, size):
    for path in copied.glob("*/model_optim_rng.pt"):
        edit(path, lambda file: setattr(file["args"], "tensor_model_parallel_size", size))
    with pytest.raises(ValueError, match="is not a (number of ranks|whole number above 0)"):
        open_it(copied)


def test_optimizer_state_is_skipped_unread(copied, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(100)}}, "param_groups": [{"lr": 1e-4}]}
    for path in copied.glob("*/model_optim_rng.pt"):
        edit(path, lambda file: file.update({"optimizer": optimizer, "rng_state": [torch.zeros(8, dtype=torch.uint8)]}))
    (copied / "mp_rank_00_000_000" / "distrib_optim.pt").write_bytes(b"never opened")
    assert open_it(copied).facts["skipped"] == ["optimizer", "rng_state", "distrib_optim.pt"]
    convert_to_hf(copied, tmp_path / "hf", progress=False)


@pytest.mark.parametrize(
    ("layers", "layout", "first", "last", "chunks"),
    [
        (4, Layout(pp=2), None, None, [[range(0, 2)], [range(2, 4)]]),
        (4, Layout(pp=2, vpp=2), None, None, [[range(0, 1), range(2, 3)], [range(1, 2), range(3, 4)]]),
        (5, Layout(pp=3), 1, None, [[range(0, 1)], [range(1, 3)], [range(3, 5)]]),
        (61, Layout(pp=16), 4, 1, None),
    ],
)
def test_layers_of_the_stages(layers, layout, first, last, chunks):
    made = stage_layers(layers, layout, first, last)
    assert chunks is None or made == chunks
    assert sorted(layer for stage in made for chunk in stage for layer in chunk) == list(range(layers))


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        (Layout(tp=1, etp=2), "two would collide"),
        (Layout(tp=3), "do not divide 4 heads"),
        (Layout(ep=3), "do not divide"),
        (Layout(vpp=2), "use --pp"),
    ],
)
def test_layouts_that_cannot_be(layout, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_layout(layout, AxK1Config.preset("nano"))
    with pytest.raises(ValueError, match="5 layers do not split over PP=2"):
        stage_layers(5, Layout(pp=2), None, None)


@pytest.mark.parametrize("name", ["iteration", "checkpoint_version"])
def test_what_is_compared_and_printed_is_a_number(copied, name):
    """A list that holds itself twice, as it was one level below: two of forty levels are compared for ever, or printed."""
    value = "x"
    for _ in range(40):
        value = [value, value]
    for path in copied.glob("*/model_optim_rng.pt"):
        edit(path, lambda file: file.update({name: value}))
    with pytest.raises(ValueError, match=f"says {name}=a list, which is no number; it is damaged"):
        open_it(copied)
