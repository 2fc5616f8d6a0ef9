"""What one call costs: an out-variant operator on tiny tensors beside torch.add(out=)."""

import torch

from tilewise.bench.case import Case


def cases(device: torch.device) -> list[Case]:
    a, b, total = (torch.zeros(4, device=device) for _ in range(3))
    q, k, v, out = (torch.zeros(1, 1, 1, 64, device=device) for _ in range(4))
    lse = torch.zeros(1, 1, 1, device=device)
    attention_out = torch.ops.tilewise.attention_out.default
    return [
        Case(
            "attention_out on one token beside torch.add(out=)",
            lambda: attention_out(q, k, v, out, lse, False, 0.125),
            lambda: torch.add(a, b, out=total),
            target=0.5,
        )
    ]
