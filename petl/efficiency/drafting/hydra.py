"""Draft heads on the last hidden state of a frozen model: parallel, sequential or recurrent.

Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding", COLM 2024
(arXiv:2402.05109); the parallel heads are those of Cai et al., "Medusa", ICML 2024
(arXiv:2401.10774); the regressive connection of the recurrent kind is that of Xiao et al., "Clover"
(arXiv:2405.00263). `h_t`, the output of the final norm, gives token x_{t+1}; head i = 1..K guesses
x_{t+1+i}. Unlike the reference, all heads share the rows of the model's own head for a draft
vocabulary D, and a recurrent cell serves all of them. Shapes: N positions, K heads, H width,
V tokens, D tokens of the draft vocabulary, T tokens of answers, P positions in them.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.efficiency.drafting import folder as files
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.costs import TYPICAL
from petl.efficiency.drafting.folder import hash_of_tokenizer, hashes_of
from petl.efficiency.drafting.learning import Frequencies, LearningHeads, path_probabilities
from petl.efficiency.drafting.levels import Levels
from petl.efficiency.drafting.registry import (
    Draft,
    DrafterConfig,
    Needs,
    PassOutput,
    Root,
    register,
)
from petl.errors import InputError
from petl.system.files.tensor_file import check_finite, check_index, check_shapes

RANKS = 8  # likeliest tokens of a node that can be drafted, without a template
REPLAN = 8  # rounds
# that the likeliest token of head 1, 2, 3, ... is right, seen with SmolLM2-135M; each further rank
# is assumed to be right a quarter as often. `fit` counts anew
PRIOR = {
    "recurrent": (0.38, 0.35, 0.31),
    "sequential": (0.39, 0.31, 0.27),
    "parallel": (0.28, 0.15, 0.11),
}


@register("hydra")
class Hydra(LearningHeads):
    """Drafts a tree level by level with heads that were trained on the model's own answers.

    Attributes:
        hashes: of the model that it was trained for, see `identity.hashes_of`; empty before `fit`.
    """

    def __init__(  # noqa: PLR0913 - all by name
        self,
        model: nn.Module | None = None,
        *,
        kind: Literal["recurrent", "sequential", "parallel"] = "recurrent",
        heads: int = 3,
        layers: int = 1,
        prefix: bool = False,
        draft_vocab: int = 4096,
        own_head: bool = False,
        template: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        """Create heads that begin by repeating the model's own guess.

        Args:
            model: that it drafts for; its embedding and head are read, and not changed.
            kind: "parallel": each head reads the state only; "sequential": also the embeddings of
                the tokens drafted before; "recurrent": one cell reads one after the other.
            heads: number of tokens ahead.
            layers: residual blocks of a head, not for the recurrent kind.
            prefix: a decoder layer over the states of all tokens comes first.
            draft_vocab: tokens that can be drafted; more than the model has: all.
            own_head: each head trains its own copy of the rows of the model's head.
            template: paths of ranks, in place of planned ones.
            seed: of the random start.

        Raises:
            InputError: a value is out of range, or there is no model.
            UnsupportedError: the model is no decoder with embedding and head, or `prefix` is not
                possible with its blocks.
        """
        fields = {
            "kind": kind, "heads": heads, "layers": layers, "prefix": prefix,
            "draft_vocab": draft_vocab, "own_head": own_head, "template": template, "seed": seed,
        }  # fmt: skip
        super().__init__(model, fields)
        self.needs = Needs(last=True, prompt=prefix)
        size = len(self.vocab)
        self.template = None if template is None else tree.template_paths(template, size)
        deepest = max(map(len, self.template or ()), default=0)
        if deepest > heads:
            raise InputError(f"template has a path of {deepest} ranks, for heads={heads}")
        highest = max([RANKS - 1, *(rank for path in self.template or () for rank in path)])
        self.ranks = min(highest + 1, size)
        tops = (*PRIOR[kind], *[PRIOR[kind][-1]] * heads)[:heads]
        self.frequencies = Frequencies([[top * 0.25**r for r in range(self.ranks)] for top in tops])
        self.hashes: dict[str, str] = {}
        self.planned: list[tree.Path] = []
        self.levels = Levels([], self.index.device)
        self.start([], None)

    # Drafting

    def start(self, ids: Sequence[int], states: Tensor | None) -> None:
        """Begin a row; the prefix layer reads its prompt."""
        self.age = REPLAN  # rounds since the last plan
        self.guesses: list[Tensor] = []  # of each level: the likeliest tokens behind nodes above
        self.length = 0  # of the text at the last draft
        if self.reader is not None:
            self.reader.clear()
            if states is not None:
                self.state = self._read(states, 0)[-1]

    @torch.no_grad()
    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the planned tree: one batched call of a head for each level."""
        self._count(root.ids)
        self.length, self.guesses = len(root.ids), []
        carry = self._first(root)[None].to(self.index.device, self.dtype)
        tokens = torch.tensor([root.ids[-1]], device=carry.device)
        self.levels = self._plan(budget)
        found = [tokens[:0]]
        for i, level in enumerate(self.levels, start=1):
            # only nodes that have children
            carry = self.enter(carry[level.above], tokens[level.above])
            top = self.index[self.logits(carry, i).topk(self.ranks).indices]
            self.guesses.append(top)
            tokens, carry = top[level.rows, level.ranks], carry[level.rows]
            found.append(tokens)
        chances = path_probabilities(self.frequencies.table(), self.levels.paths)
        return Draft(torch.cat(found).cpu(), self.levels.parents, torch.tensor(chances))

    def _first(self, root: Root) -> Tensor:
        """Return the state that the heads read, [H]."""
        assert root.state is not None
        if self.reader is None:
            return root.state
        # while drafting rests it reads nothing; of what came, the last state is known
        known = len(root.ids) - 1
        if self.reader.known != known:
            self.state = self._read(root.state[None], known - 1)[-1]
        return self.state

    @torch.no_grad()
    def observe(self, seen: PassOutput) -> None:
        """Let the prefix layer read the accepted nodes."""
        if self.reader is not None:
            assert seen.states is not None
            self.state = self._read(seen.states[seen.path], self.length - 1)[-1]

    def _read(self, states: Tensor, first: int) -> Tensor:
        """Let the prefix layer read states from token number `first` on; return its outputs."""
        assert self.reader is not None
        return self.reader.read(states.to(self.index.device, self.dtype), first)

    def _plan(self, budget: int | None) -> Levels:
        if budget == 0:
            return Levels([], self.index.device)
        paths = self.template
        if paths is None:
            self.age += 1
            if self.age >= REPLAN:
                self.age, costs = 0, self.costs or TYPICAL
                self.planned = tree.best(self.frequencies.table(), costs, drafting=self.cost)
            # where nothing pays, one draft in REPLAN rounds tells if that has changed
            paths = self.planned or ([(0,)] if self.age == 0 else [])
        paths = paths if budget is None else paths[:budget]
        return self.levels if paths == self.levels.planned else Levels(paths, self.index.device)

    @cached_property
    def cost(self) -> float:
        """The cost of a draft in passes over one token: by the weights that are read."""
        own = sum(p.numel() for name, p in self.named_parameters() if "lm_heads" not in name)
        own *= self.heads if self.kind == "recurrent" else 1
        rows = self.heads * len(self.vocab) * self.ends.width
        return (own + rows) / sum(p.numel() for p in self.ends.model.parameters())

    def _count(self, ids: Sequence[int]) -> None:
        """Count the ranks of the tokens that came since the last draft."""
        node: int | None = 0  # the parent of the next token, in its level
        for depth, top in enumerate(self.guesses):
            level = self.levels[depth]
            row = None if node is None else level.row_of.get(node)
            if row is None or self.length + depth >= len(ids):
                break
            likely, token = top[row].tolist(), ids[self.length + depth]
            rank = likely.index(token) if token in likely else None
            self.frequencies.add(depth, rank)
            node = None if rank is None else level.node_of.get((row, rank))

    # Training

    @torch.no_grad()
    def prepare(self, answers: DraftAnswers) -> None:
        """Choose draft vocabulary and scale by answers, before training; once."""
        if self.hashes:
            return
        self.hashes = hashes_of(self.ends.model)
        written = torch.cat([answers.answer(i) for i in range(len(answers))]).cpu()
        counts = written.bincount(minlength=self.ends.vocabulary)
        # stable: of equally frequent tokens, and of those that do not occur, the lowest id first
        order = counts.argsort(descending=True, stable=True)
        self.set_vocab(order[: len(self.vocab)].to(self.vocab))
        if self.kind == "recurrent":
            states = float(answers.states.double().square().mean().sqrt())
            self.scale.fill_(states / self.ends.embedding_rms())

    # Files

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write fields, weights, rank frequencies and what the drafter was trained for.

        Args:
            folder: is created.
            tokenizer: of the model, whose hash is kept.
        """
        known = self.hashes or hashes_of(self.ends.model)
        own = {} if tokenizer is None else {"tokenizer": hash_of_tokenizer(tokenizer)}
        files.write(
            folder,
            self.name,
            self.fields,
            vocabulary=self.ends.vocabulary,
            hashes={**known, **own},
            frequencies=self.frequencies.table(),
            tensors=self.state_dict(),
        )

    @torch.no_grad()
    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields, in the dtype of the model.

        Raises:
            InputError: the tensors are not those of the fields and the model.
        """
        own = {name: (t.dtype, t.shape) for name, t in self.state_dict().items()}
        found = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        what = f"the file {files.WEIGHTS} of drafter {self.name!r}"
        check_shapes(found, own, {}, {}, what)
        check_finite(tensors, what)
        check_index(f"{what}: vocab", tensors["vocab"], self.ends.vocabulary, unique=True)
        self.frequencies.restore(config["frequencies"])
        self.set_vocab(tensors["vocab"].to(self.vocab))
        self.load_state_dict(tensors)
        self.to(self.ends.model.dtype)
        self.hashes = dict(config["hashes"])
