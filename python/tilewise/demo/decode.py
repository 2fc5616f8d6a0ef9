"""Greedy decoding of the transformer over a paged cache: one token a step, and with token trees.

Both use the same operators; plain decoding is a tree of one node. Drafts come from the training text.
"""

import time
from dataclasses import dataclass

import torch

import tilewise.speculative as spec
from tilewise.demo.data import Corpus
from tilewise.demo.drafts import CONTEXT, Retrieval
from tilewise.demo.models import Transformer

PAGE, PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 16, 4, 192, 192
NODES = 16  # of a tree


@dataclass
class Decoded:
    tokens: list[list[int]]  # per prompt
    steps: int
    seconds: float

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return self.count / (self.steps * len(self.tokens))


class PagedTransformer:
    """The model with a paged cache per layer; rows of the block table are the prompts."""

    def __init__(self, model: Transformer, batch: int, capacity: int):
        self.model, pages = model, -(-capacity // PAGE)
        attention = model.blocks[0].attention
        shape = (batch * pages, PAGE, attention.kv_heads, attention.head_dim)
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks]
        # Pages of a sequence are scattered over the pool, as they are in a server.
        self.block_table = torch.randperm(batch * pages).view(batch, pages).to(torch.int32)
        self.lengths = torch.zeros(batch, dtype=torch.int32)  # tokens whose keys and values are cached

    def forward(self, tree: spec.DraftTree) -> torch.Tensor:
        """Logits (B, N, 256) of every node; the nodes' keys and values go behind the cached ones."""
        links = tree.finalize(self.lengths)

        def attend(layer):
            k_pages, v_pages = self.caches[layer]

            def run(q, k, v):
                rows = (t.transpose(1, 2) for t in (k, v))
                spec.append_kv(k_pages, v_pages, self.block_table, self.lengths, *rows, n_nodes=tree.n_nodes)
                q = q.transpose(1, 2)
                bits = links.ancestor_bits
                out = spec.tree_attention(q, k_pages, v_pages, self.block_table, self.lengths, bits)
                return out.transpose(1, 2)

            return run

        return self.model(tree.tokens.long(), links.positions.clamp(min=0), attend)

    def accept(self, verified: spec.Verified, going_on: torch.Tensor) -> None:
        """Keeps the root and the accepted nodes in the cache, in their order; sequences that do not go on stay."""
        spec.compact_kv(self.caches, self.block_table, self.lengths, verified.path, verified.accept_len)
        self.lengths += (verified.accept_len + 1) * going_on


@torch.no_grad()
def _decode(model: Transformer, prompts: torch.Tensor, draft, report) -> Decoded:
    """``draft(tokens)`` proposes a tree for each row of tokens so far; its root is the row's last."""
    batch, length = prompts.shape
    paged = PagedTransformer(model, batch, length + NEW_TOKENS + 2 * spec.MAX_NODES)  # a step adds at most one tree
    logits = paged.forward(spec.DraftTree.chain(prompts.to(torch.int32)))
    paged.lengths += length
    tokens = [
        [*prompt, token] for prompt, token in zip(prompts.tolist(), logits[:, -1].argmax(-1).tolist(), strict=True)
    ]
    begin, steps, goal = time.perf_counter(), 0, length + NEW_TOKENS
    while min(map(len, tokens)) < goal:
        # A sequence that is through repeats its last step: one that accepts much must not outgrow its pages.
        going_on = torch.tensor([len(row) < goal for row in tokens])
        tree = draft(tokens)
        logits = paged.forward(tree)
        verified = spec.verify_greedy(tree.parent, tree.tokens, logits, n_nodes=tree.n_nodes)
        paged.accept(verified, going_on)
        for row, new, count, more in zip(
            tokens, verified.out_tokens.tolist(), verified.accept_len.tolist(), going_on.tolist(), strict=True
        ):
            row += new[: count + 1] if more else []
        steps += 1
        report(min(map(len, tokens)) - length)
    seconds = time.perf_counter() - begin
    return Decoded([row[length:goal] for row in tokens], steps, seconds)


def compare(model: Transformer, corpus: Corpus, progress) -> tuple[Decoded, Decoded]:
    """Plain and tree decoding of the same held-out prompts."""
    prompts = Corpus.windows(corpus.held_out, PROMPTS, PROMPT_LENGTH - 1, torch.Generator().manual_seed(4))
    seen = Retrieval(corpus.train)

    def one_node(tokens):
        return spec.DraftTree.chain(torch.tensor([row[-1:] for row in tokens], dtype=torch.int32))

    def retrieved(tokens):
        context = torch.tensor([row[-CONTEXT:] for row in tokens])
        return spec.tree_from_sequences(seen.continuations(context), context[:, -1].to(torch.int32), max_nodes=NODES)

    found = []
    for title, draft in (("one token a step", one_node), ("token trees", retrieved)):
        bar = progress.add_task(f"decoding, {title}", total=NEW_TOKENS)
        report = lambda done, bar=bar: progress.update(bar, completed=done)  # noqa: E731
        found.append(_decode(model, prompts, draft, report))
        progress.remove_task(bar)
    return found[0], found[1]
