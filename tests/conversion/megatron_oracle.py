"""What does megatron-core itself read in a checkpoint?  One CPU rank of it: `RANK=r python megatron_oracle.py JOB.json`.

The job names the checkpoint (an `iter_*` folder), its format, the parallel layout to load it in and the token ids; the last
stage's first rank writes `logits.pt`. Names, shapes, resharding and mathematics are megatron-core's. Ours are: CPU stand-ins for
CUDA calls (gloo instead of NCCL), the layer with A.X K1's post-MLP norm, which stock megatron-core lacks, and the translation
of `args` into a config, which follows Megatron-LM's core_transformer_config_from_args.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# megatron's fused functions are torch.compile'd; set before torch is imported.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F

STRICTNESS = ("RAISE_UNEXPECTED", "RAISE_ALL", "LOG_ALL")  # a torch_dist checkpoint is loaded under each in turn
# What a CPU cannot do or does not need; none of it changes a value.
ON_CPU = {
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "sequence_parallel": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "attention_softmax_in_fp32": True,
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
}


class Nothing(contextlib.nullcontext):
    """A CUDA stream, event or random-state tracker that does nothing; dropout is 0, so forking a generator changes nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __getattr__(self, name):
        return Nothing


def stand_in_for_cuda() -> None:
    """Let megatron-core, which asks for the current GPU in passing, run on a CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.device_count = lambda: 1
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.current_stream = Nothing
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args: None)
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *args: None)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    exchange = dist.all_to_all_single

    def with_int_sizes(*args, **kwargs):
        # gloo takes lists of int where NCCL takes tensors.
        for name in ("output_split_sizes", "input_split_sizes"):
            if kwargs.get(name) is not None:
                kwargs[name] = [int(size) for size in kwargs[name]]
        return exchange(*args, **kwargs)

    dist.all_to_all_single = with_int_sizes


def stand_in_inside_megatron() -> None:
    """What megatron-core lacks without Transformer Engine; every replacement keeps the values."""
    import megatron.core.models.gpt.gpt_layer_specs as specs
    from megatron.core import tensor_parallel
    from megatron.core.models import backends
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import dot_product_attention, multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for module in (tensor_parallel, layers, moe_utils, dot_product_attention.tensor_parallel):
        module.get_cuda_rng_tracker = Nothing

    class Attention(dot_product_attention.DotProductAttention):
        """The local attention predates MLA's two arguments; config.kv_channels = v_head_dim says the same."""

        def __init__(self, *args, k_channels=None, v_channels=None, **kwargs):
            super().__init__(*args, **kwargs)

    backends.LocalSpecProvider.core_attention = lambda self: Attention
    specs.LNImpl = WrappedTorchNorm
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def layer_with_post_norm():
    """megatron-core's layer plus an RMSNorm on the MoE block's output; the dense layer holds one unused, as the release does."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Layer(TransformerLayer):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            self.post_mlp_layernorm = WrappedTorchNorm(config, config.hidden_size, eps=config.layernorm_epsilon)

        def _forward_post_mlp(self, output_and_bias, residual):
            if self.is_moe_layer:
                output, bias = output_and_bias
                output_and_bias = self.post_mlp_layernorm(output), bias
            return super()._forward_post_mlp(output_and_bias, residual)

    return Layer


def config_of(args, layout):
    """The config that Megatron-LM builds from `args`, in our layout and with no CUDA fusion."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    said = {name: value for name, value in vars(args).items() if name in fields}
    if said.get("rope_type") is None:
        said.pop("rope_type", None)  # megatron-core's default, yarn
    parallel = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }
    translated = {
        "num_moe_experts": args.num_experts,
        "gated_linear_unit": args.swiglu,
        "activation_func": F.silu if args.swiglu else F.gelu,
        "num_query_groups": args.num_query_groups if getattr(args, "group_query_attention", False) else None,
        "kv_channels": args.v_head_dim,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return MLATransformerConfig(**said | translated | parallel | ON_CPU)


def build(args, layout) -> list:
    """This rank's GPTModels, one for each virtual stage."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config, layer = config_of(args, layout), layer_with_post_norm()
    stages = range(layout.vpp) if layout.vpp else [None]
    models = []
    for stage in stages:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization, vp_stage=stage
        )
        spec.layer_norm = WrappedTorchNorm
        for layer_spec in spec.layer_specs:
            layer_spec.module = layer
        where = {"ignore_virtual": False, "vp_stage": stage}
        models.append(
            GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=padded(args, layout),
                max_sequence_length=args.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                parallel_output=False,
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                position_embedding_type=args.position_embedding_type,
                rotary_percent=args.rotary_percent,
                rotary_base=args.rotary_base,
                vp_stage=stage,
            ).eval()
        )
    return models


def padded(args, layout) -> int:
    """Vocabulary rows as Megatron-LM pads them: up to a multiple of make_vocab_size_divisible_by * TP."""
    multiple = args.make_vocab_size_divisible_by * layout.tp
    return -(-args.vocab_size // multiple) * multiple


def keys_of(models) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]


def load_torch_dist(folder: Path, models: list) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for strict in STRICTNESS:
        asked = {
            key: model.sharded_state_dict(metadata={"dp_cp_group": group})
            for key, model in zip(keys_of(models), models, strict=True)
        }
        loaded = dist_checkpointing.load(asked, str(folder), strict=StrictHandling[strict])
        for key, model in zip(keys_of(models), models, strict=True):
            model.load_state_dict(loaded[key], strict=True)


def read_legacy(folder: Path, layout) -> dict:
    """This rank's file, named as Megatron-LM's get_checkpoint_name names it."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if layout.pp > 1 else ""
    name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if layout.ep > 1 else ""
    return torch.load(folder / name / "model_optim_rng.pt", weights_only=False)


def forward(models: list, ids, layout):
    """The whole pipeline by plain send and receive; logits [batch, tokens, vocab] on the last stage, else None."""
    from megatron.core import parallel_state

    batch, tokens = ids.shape
    positions = torch.arange(tokens).expand(batch, tokens)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    here = parallel_state.get_pipeline_model_parallel_rank()
    steps = [(v, p) for v in range(len(models)) for p in range(layout.pp)]
    hidden = torch.empty(tokens, batch, models[0].config.hidden_size)
    for (stage, rank), (_, following) in zip(steps, [*steps[1:], (None, None)], strict=True):
        if rank == here:
            models[stage].set_input_tensor(None if models[stage].pre_process else hidden)
            hidden = models[stage](input_ids=ids, position_ids=positions, attention_mask=mask)
        if following is not None and following != rank:
            if rank == here:
                dist.send(hidden.contiguous(), ranks[following])
            elif following == here:
                dist.recv(hidden, ranks[rank])
    return hidden if models[-1].post_process else None


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    layout, folder, out = SimpleNamespace(**job["layout"]), Path(job["checkpoint"]), Path(job_file).parent
    rank, world = int(os.environ["RANK"]), job["world"]
    torch.set_num_threads(1)
    stand_in_for_cuda()
    stand_in_inside_megatron()
    from megatron.core import dist_checkpointing, parallel_state

    dist.init_process_group("gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )
    if job["format"] == "legacy":
        state = read_legacy(folder, layout)
        models = build(state["args"], layout)
        for key, model in zip(keys_of(models), models, strict=True):
            model.load_state_dict(state[key], strict=True)
    else:
        models = build(dist_checkpointing.load_common_state_dict(str(folder))["args"], layout)
        load_torch_dist(folder, models)
    with torch.no_grad():
        logits = forward(models, torch.tensor(job["input_ids"]), layout)
    if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        if parallel_state.get_data_parallel_rank() == 0:
            torch.save(logits.contiguous(), out / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
