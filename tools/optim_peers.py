"""Steps of other libraries' low-bit AdamW on CPU beside ours, and their state dicts converted into ours.

    pip install --no-deps bitsandbytes torchao
    python tools/optim_peers.py

One thread, processor time, the best of several steps; torchao compiles its step first (a minute).
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import tilewise as tw

SHAPE, TENSORS = (1024, 512), 10  # a multiple of every library's block: torchao quantises no others


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def peers() -> dict[str, Callable]:
    import bitsandbytes
    import torchao.optim

    return {
        "bitsandbytes 8-bit": bitsandbytes.optim.AdamW8bit,
        "torchao 8-bit": torchao.optim.AdamW8bit,
        "torchao 4-bit": torchao.optim.AdamW4bit,
    }


def seconds(optimizer, steps: int) -> float:
    optimizer.step()
    best = float("inf")
    for _ in range(steps):
        begin = time.process_time()
        optimizer.step()
        best = min(best, time.process_time() - begin)
    return best


def converted(optimizer) -> float:
    """How far the first moment is from its exact value after the conversion, relative."""
    mine = tw.optim.AdamW(parameters(), state_bits=32)
    mine.load_state_dict(tw.optim.convert_state_dict(optimizer.state_dict(), mine))
    p = mine.param_groups[0]["params"][0]
    exact = p.grad * (1 - 0.9 ** float(mine.state[p]["step"]))
    return float((mine.state[p]["exp_avg"] - exact).norm() / exact.norm())


def main() -> None:
    torch.set_num_threads(1)
    ours = {bits: seconds(tw.optim.AdamW(parameters(), state_bits=bits), 20) for bits in (4, 8)}
    table = Table(title="AdamW on CPU, 5.2M parameters in 10 tensors")
    for column in ("optimizer", "ms", "over tilewise 4-bit", "over tilewise 8-bit", "error of its converted moment"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")

    def row(name, took, error=""):
        table.add_row(name, f"{took * 1e3:.2f}", *(f"{took / ours[bits]:.1f}" for bits in (4, 8)), error)

    for bits, took in ours.items():
        row(f"tilewise {bits}-bit", took)
    row("torch fused", seconds(torch.optim.AdamW(parameters(), fused=True), 20))
    for name, make in peers().items():
        optimizer = make(parameters(), lr=1e-3)
        row(name, seconds(optimizer, 3), f"{converted(optimizer):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
