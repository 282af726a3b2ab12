"""Checkpoints that megatron-core wrote itself, and what its models answered: see fixtures/README.md."""

from collections import OrderedDict
from pathlib import Path

import torch

FIXTURES = Path(__file__).parent / "fixtures"
PLAIN = ["tp1_pp1_ep1", "tp2_pp2_ep2_etp1", "tp1_pp2_vpp2", "tp2_grouped"]
LAYOUTS = [*PLAIN, "te_tp2_ep2_etp1", "mtp_pp2"]


def reference(layout):
    """`input_ids`, `logits` and `mtp_logits` of the model that the layout holds."""
    kind = "_te" if layout.startswith("te") else "_mtp" if layout.startswith("mtp") else ""
    return torch.load(FIXTURES / f"reference{kind}.pt")


def checkpoints():
    """(layout, format) of every whole checkpoint here."""
    return [
        (layout, kind) for layout in LAYOUTS for kind in ("legacy", "torch_dist") if (FIXTURES / layout / kind).exists()
    ]


def load_rank_file(path):
    """A rank file by torch itself; Megatron's own classes, which are not here, become plain objects."""

    class Stub:
        def __init__(self, *args):
            self.args = args

    class Pickle:
        __name__ = "stubbed"

        class Unpickler(__import__("pickle").Unpickler):
            def find_class(self, module, name):
                return Stub if module.startswith("megatron") else super().find_class(module, name)

        load = staticmethod(__import__("pickle").load)

    return torch.load(path, weights_only=False, pickle_module=Pickle)


def group_experts(model, hidden):
    """A chunk of a rank file as GroupedMLP has it: a rank's experts transposed, one behind the other."""
    for experts in sorted({name.split("local_experts")[0] for name in model if ".local_experts." in name}):
        for number, shape in {1: (hidden, -1), 2: (-1, hidden)}.items():
            names = [name for name in model if name.startswith(experts) and name.endswith(f"fc{number}.weight")]
            model[f"{experts}weight{number}"] = torch.stack([model.pop(name).t() for name in names]).reshape(shape)
        for name in [name for name in model if name.startswith(f"{experts}local_experts.")]:
            del model[name]


def models_in(folder):
    """{(rank folder, chunk, name): tensor or None} of all rank files under an iteration folder."""
    tensors = OrderedDict()
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
        file = load_rank_file(path)
        for chunk in (key for key in file if key.startswith("model")):
            tensors |= {(path.parent.name, chunk, name): tensor for name, tensor in file[chunk].items()}
    return tensors
