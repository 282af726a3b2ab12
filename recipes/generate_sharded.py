"""How is a model too large for one device run? Each rank loads its part, all generate together, and each says what it holds.

torchrun --nproc-per-node 8 -m recipes.generate_sharded MODEL --tp 8 --ep 8 --prompt "What is 2 + 3?" --think
torchrun --nproc-per-node 8 -m recipes.generate_sharded MODEL --tp 8 --ep 8 --four-bit --prompt "What is 2 + 3?"
torchrun --nproc-per-node 2 -m recipes.generate_sharded MODEL --pp 2 --prompt "What is 2 + 3?"
python -m recipes.generate_sharded k1 --tp 8 --ep 8 --plan     # no weights, no GPU: what each rank would hold
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, set_thinking_tokens
from modeling_axk1.configuration_axk1 import PRESETS, in_units
from modeling_axk1.quantization_axk1 import ranks_dealt_to
from trainers.sharding import four_bit_bytes, held_parameters

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def plan(model: str, layout: DistributedConfig, bytes_each: int, four_bit: bool = False) -> str:
    """A line for each rank of `model`, a preset's name, a folder or a Hub name."""
    config = AxK1Config.preset(model) if model in PRESETS else AxK1Config.from_pretrained(model)
    ranks = range(layout.pp_size * layout.dp_size * layout.tp_size)
    if four_bit:
        dealt = ranks_dealt_to(layout) if len(ranks) > 1 else 1
        return f"each of {dealt} ranks: {in_units(four_bit_bytes(config, dealt))}"
    held = {rank: held_parameters(config, layout, rank) for rank in ranks}
    return "\n".join(f"rank {rank}: {n:,} parameters, {in_units(n * bytes_each)}" for rank, n in held.items())


def held_bytes(model: AxK1ForCausalLM) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())


def generate(
    path: str, layout: DistributedConfig, prompt: str, think: bool, max_new_tokens: int, four_bit: bool = False
) -> str:
    """What the model says, thought and control tokens included; the same on every rank."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    bits = {"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)} if four_bit else {}
    model = AxK1ForCausalLM.from_pretrained(path, distributed_config=layout, dtype="auto", **bits).eval()
    set_thinking_tokens(model.generation_config, tokenizer)
    print(f"rank {dist.get_rank()}: {held_bytes(model):,} bytes of weights on {model.device}", flush=True)
    chat = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    # Every rank has to draw the same token.
    torch.manual_seed(0)
    output = model.generate(**given.to(model.device), enable_thinking=think, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, given["input_ids"].shape[1] :])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name; with --plan also k1, light or nano")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each matrix; they see the same prompt")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts: tp, or tp times fsdp")
    parser.add_argument("--pp", type=int, default=1, help="ranks that share the layers, one after another")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="ranks that share what tp and ep left, gathered a layer at a time"
    )
    parser.add_argument("--four-bit", action="store_true", help="linear layers in NF4; with tp and ep the number of ranks")
    parser.add_argument("--prompt", default="What is 2 + 3?")
    parser.add_argument("--think", action="store_true", help="think first (default: answer at once)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--plan", action="store_true", help="only print what each rank would hold")
    parser.add_argument("--bytes", type=int, default=2, help="bytes a parameter of the plan (default 2, bf16)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> str:
    options = parse(arguments)
    layout = DistributedConfig(tp_size=options.tp, ep_size=options.ep, pp_size=options.pp, fsdp_size=options.fsdp)
    if options.plan:
        said = plan(options.model, layout, options.bytes, options.four_bit)
    else:
        asked = options.prompt, options.think, options.max_new_tokens
        said = generate(options.model, layout, *asked, options.four_bit)
    if options.plan or dist.get_rank() == 0:
        print(said)
    return said


if __name__ == "__main__":
    main()
