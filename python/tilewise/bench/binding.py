"""What one call costs: out-variant operators on tiny tensors beside torch.add(out=)."""

import torch

from tilewise.bench.case import Case


def cases(device: torch.device) -> list[Case]:
    a, b, total = (torch.zeros(4, device=device) for _ in range(3))
    add = lambda: torch.add(a, b, out=total)  # noqa: E731
    q, k, v, out = (torch.zeros(1, 1, 1, 64, device=device) for _ in range(4))
    lse = torch.zeros(1, 1, 1, device=device)
    table, tokens, topk = (torch.zeros(s, dtype=torch.int32, device=device) for s in ((4, 2), (1, 1), (1, 1, 2)))
    attention_out = torch.ops.tilewise.attention_out.default
    table_update = torch.ops.tilewise.table_update.default
    return [
        Case("three tensors: table_update", lambda: table_update(table, tokens, topk, None), add, target=0.5),
        Case("five tensors: attention_out, one token", lambda: attention_out(q, k, v, out, lse), add),
    ]
