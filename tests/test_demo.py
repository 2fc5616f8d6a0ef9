"""The demo's decoding, on small untrained models."""

import torch

import tilewise.speculative as spec
from tilewise.demo import decode
from tilewise.demo.backends import Tilewise
from tilewise.demo.models import Transformer

DRAFT = 16


def test_a_fast_sequence_waits_for_the_others(monkeypatch):
    """Perfect drafts for one sequence and none for the others: the same tokens as without drafts, within its pages."""
    model = Transformer(Tilewise, channels=64, depth=1)
    prompts = torch.randint(0, 256, (3, 20))

    def run(new_tokens, draft):
        monkeypatch.setattr(decode, "NEW_TOKENS", new_tokens)
        return decode._decode(model, prompts, draft, lambda done: None)

    plain = run(64 * DRAFT, lambda table, root: spec.DraftTree.chain(root.unsqueeze(1)))
    known, steps = torch.tensor(plain.tokens, dtype=torch.int32), iter(range(64))

    def draft(table, root):
        step = next(steps)
        wrong = (known[:, step + 1 : step + 2] + 1) % 256
        chains = torch.cat([root.unsqueeze(1), wrong.expand(-1, DRAFT - 1)], 1)
        if known[0, step * DRAFT] == root[0]:
            chains[0] = known[0, step * DRAFT : (step + 1) * DRAFT]
        return spec.DraftTree.chain(chains)

    fast = run(64, draft)
    assert fast.tokens == [row[:64] for row in plain.tokens]
    assert fast.steps == 63, "one token a step for all but the first, which the prompt gives"
