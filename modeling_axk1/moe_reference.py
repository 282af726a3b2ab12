"""What do the routed experts compute?  The obvious loop, the oracle of every faster path; nothing calls it but tests.

Axes: T tokens, K experts a token, E experts, H hidden, I expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_reference(x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate x) * (up x)); gate rows come first.  [upstream, AXK1Experts]

    Everything floats in one dtype; expert_TK is int64, an id of E or more means "an expert of another rank" and adds nothing.
    """
    rows = []
    for token in range(x_TH.shape[0]):
        row_H = torch.zeros_like(x_TH[token])
        for expert, weight in zip(expert_TK[token].tolist(), weight_TK[token]):
            if expert < gate_up_E2IH.shape[0]:
                gate_I, up_I = (gate_up_E2IH[expert] @ x_TH[token]).chunk(2)
                row_H = row_H + weight * (down_EHI[expert] @ (F.silu(gate_I) * up_I))
        rows.append(row_H)
    return torch.stack(rows) if rows else torch.zeros_like(x_TH)
