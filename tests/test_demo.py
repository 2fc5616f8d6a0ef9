"""The demo's decoding, on small untrained models."""

import pytest
import torch

import tilewise.speculative as spec
from tilewise.demo import decode, drafts
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

    def last(tokens):
        return torch.tensor([row[-1:] for row in tokens], dtype=torch.int32)

    plain = run(64 * DRAFT, lambda tokens: spec.DraftTree.chain(last(tokens)))
    known, steps = torch.tensor(plain.tokens, dtype=torch.int32), iter(range(64))

    def draft(tokens):
        step, root = next(steps), last(tokens)
        wrong = (known[:, step + 1 : step + 2] + 1) % 256
        chains = torch.cat([root, wrong.expand(-1, DRAFT - 1)], 1)
        if known[0, step * DRAFT] == root[0, 0]:
            chains[0] = known[0, step * DRAFT : (step + 1) * DRAFT]
        return spec.DraftTree.chain(chains)

    fast = run(64, draft)
    assert fast.tokens == [row[:64] for row in plain.tokens]
    assert fast.steps == 63, "one token a step for all but the first, which the prompt gives"


@pytest.mark.parametrize("letters", [2, 3, 256])
def test_retrieved_drafts_are_what_followed_the_same_bytes(letters):
    """Beside a search of every place; few letters make many matches, 256 none but by luck."""
    text = torch.randint(0, letters, (3000,))
    context = torch.stack([text[s : s + drafts.CONTEXT] for s in (0, 1234)] + [torch.full((drafts.CONTEXT,), 255)])
    found = drafts.Retrieval(text).continuations(context)
    assert found.dtype == torch.int32 and found.shape == (3, sum(n for _, n in drafts.MATCHES), drafts.REACH)
    places = text[: -drafts.REACH - 1].unfold(0, drafts.CONTEXT, 1)
    for b, row in enumerate(context):
        for (alike, _), some in zip(drafts.MATCHES, found[b].split([n for _, n in drafts.MATCHES]), strict=True):
            same = (places[:, -alike:] == row[-alike:]).all(1).nonzero().flatten() + drafts.CONTEXT
            ahead = {tuple(text[i : i + drafts.REACH].tolist()) for i in same.tolist()} or {(-1,) * drafts.REACH}
            assert {tuple(s) for s in some.tolist()} <= ahead
