"""Token recycling: a tree of drafts from the runner-up tokens that the model computed before.

Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling", ACL 2025 (arXiv:2408.08696). `table` [V, k] has the k most likely tokens after the last
occurrence of each token. Beyond the paper: the prompt's own bigrams are used; unknown rows are -1
and draft nothing (the reference drafts token 0); the tree is planned from what was right so far.
With order 3, counts of what followed two tokens come before the table, as in ADED (Liu et al.,
arXiv:2407.12021). Shapes: V tokens of the vocabulary, N nodes of a pass.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.types import CausalModel, Settings
from petl.efficiency.drafting import folder as files
from petl.efficiency.drafting import tree
from petl.efficiency.drafting.answers import DraftAnswers
from petl.efficiency.drafting.costs import TYPICAL
from petl.efficiency.drafting.folder import hash_of_tokenizer
from petl.efficiency.drafting.learning import Frequencies, path_probabilities
from petl.efficiency.drafting.registry import (
    Draft,
    Drafter,
    DrafterConfig,
    Needs,
    PassOutput,
    Root,
    auto_or_count,
    register,
    vocabulary_of,
)
from petl.errors import InputError
from petl.system.files.tensor_file import read_file
from petl.system.values import FREE, integer

# by rank, seen with SmolLM2-135M on four kinds of text; the start of `Frequencies`
RANKS = (0.474, 0.083, 0.039, 0.022, 0.015, 0.011, 0.009, 0.007)
REPLAN = 8  # rounds
UNKNOWN = -1
MOST_RANKS, MOST_NODES, DEEPEST = 128, 1024, 64  # of `k`, `nodes` and `depth`
CHUNK = 256  # tokens whose logits exist at a time
PART = 128  # of a vocabulary, in the search of the largest logits
TIES = 8  # logits beyond the k-th that are compared with it before all are


@register("recycling")
class Recycling(Drafter):
    """Drafts a tree from a table of what followed each token.

    Attributes:
        table: [V, k] int32 on the CPU, the most likely token first; -1: unknown.
    """

    needs = Needs(logits=True)
    table: Tensor

    def __init__(  # noqa: PLR0913 - all by name
        self,
        model: nn.Module | None = None,
        *,
        k: int = 8,
        nodes: int | Literal["auto"] = "auto",
        depth: int = 6,
        order: int = 2,
        entries: int = 100_000,
        template: Sequence[Sequence[int]] | None = None,
        prompt: bool = True,
        keep: bool = True,
        table: str | None = None,
    ) -> None:
        """Create an empty table for a model's vocabulary, or read one.

        Args:
            model: that it drafts for.
            k: tokens of a row, up to 128.
            nodes: drafts of a pass, up to 1024; "auto": as many as pay.
            depth: of the tree at most, up to 64.
            order: 2: by the last token; 3: by the last two, where they occurred.
            entries: pairs of tokens that order 3 keeps; the oldest go.
            template: paths of ranks, in place of planned ones.
            prompt: read the bigrams of the prompt.
            keep: keep the table for the next prompt.
            table: folder of a saved drafter whose table it begins with.

        Raises:
            InputError: a value is out of range, there is no model, or the table does not fit.
        """
        super().__init__()
        self.fields = {
            "k": k, "nodes": nodes, "depth": depth, "order": order, "entries": entries,
            "template": template, "prompt": prompt, "keep": keep,
        }  # fmt: skip
        _check(self.fields)
        self.k, self.nodes, self.depth, self.order = k, nodes, depth, order
        self.entries, self.prompt, self.keep = entries, prompt, keep
        self.template = None if template is None else tree.template_paths(template, k)
        self.vocabulary = vocabulary_of(model)
        # 4 V k bytes: 1.6 MB for 50,000 tokens and k = 8; on the CPU, where the tree is built
        empty = torch.full((self.vocabulary, k), UNKNOWN, dtype=torch.int32)
        self.register_buffer("table", empty)
        if table is not None:
            self._take(read_file(Path(table) / files.WEIGHTS)[1].get("table"), table)
        self.first = self.table.clone() if not keep else None  # what a prompt begins with
        self.pairs: OrderedDict[tuple[int, int], dict[int, int]] = OrderedDict()
        prior = (*RANKS, *[RANKS[-1]] * k)[:k]
        longest = depth if self.template is None else max(map(len, self.template), default=0)
        self.known = [list(prior)] * longest  # frequencies that a prompt begins with, if not kept
        self.frequencies = Frequencies(self.known)
        self.planned: list[tree.Path] = []
        self._begin()

    def _begin(self) -> None:
        self.age = REPLAN  # rounds since the last plan
        self.length, self.rows = 0, []  # of the text at the last pass, and rows before it
        self.before = UNKNOWN  # the token before the root of the last draft

    def start(self, ids: Sequence[int], states: Tensor | None) -> None:
        """Read the bigrams of a prompt."""
        self._begin()
        if not self.keep:
            assert self.first is not None
            self.table.copy_(self.first)
            self.pairs.clear()
            self.frequencies = Frequencies(self.known)
        if self.prompt:
            table = self.table.numpy()  # shares its memory
            for token, follower in pairwise(ids):
                row = [follower, *(t for t in table[token].tolist() if t != follower)]
                table[token] = row[: self.k]
            for pair, follower in zip(pairwise(ids), ids[2:], strict=False):
                self._count_pair(pair, follower)

    # Drafting

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return the planned tree, as far as the table knows its tokens."""
        self._count(root.ids)
        self.length = len(root.ids)
        self.before = root.ids[-2] if len(root.ids) > 1 else UNKNOWN
        paths = self._plan(budget)
        chances = path_probabilities(self.frequencies.table(), paths)
        number: dict[tree.Path, int] = {(): 0}
        tokens, parents, known, rows = [root.ids[-1]], [], [], {}
        for path, chance in zip(paths, chances, strict=True):
            parent = number.get(path[:-1])
            if parent is None:  # left out, and all below it
                continue
            if parent not in rows:
                above = parents[parent - 1] if parent else None
                last = self.before if above is None else tokens[above]
                rows[parent] = self._row(last, tokens[parent])
            row = rows[parent]
            if path[-1] < len(row):
                number[path] = len(tokens)
                tokens.append(row[path[-1]])
                parents.append(parent)
                known.append(chance)
        return Draft(
            torch.tensor(tokens[1:], dtype=torch.long),
            torch.tensor(parents, dtype=torch.long),
            torch.tensor(known),
        )

    def _row(self, before: int, token: int) -> list[int]:
        """Return the known tokens after `token`, the most likely first."""
        row = [t for t in self.table[token].tolist() if t != UNKNOWN]
        counts = self.pairs.get((before, token)) if self.order == 3 else None
        if counts:
            likely = sorted(counts, key=lambda t: -counts[t])  # stable: of equal ones the older
            row = [*likely, *(t for t in row if t not in counts)]
        return row[: self.k]

    def _plan(self, budget: int | None) -> list[tree.Path]:
        if self.template is not None:
            return self.template if budget is None else self.template[:budget]
        # frequencies change slowly, and a plan takes as long as some rounds of a small model
        self.age += 1
        if self.age >= REPLAN:
            self.age, table = 0, self.frequencies.table()
            if self.nodes == "auto":
                self.planned = tree.best(table, self.costs or TYPICAL)
            else:
                self.planned = tree.plan(table, self.nodes)
        return self.planned if budget is None else self.planned[:budget]

    # Learning

    def observe(self, seen: PassOutput) -> None:
        """Replace the rows of all nodes by their most likely tokens."""
        assert seen.logits is not None
        found = most_likely(seen.logits, min(self.k, seen.logits.shape[1]))
        tokens = seen.tokens.tolist()
        parents = [-1, *seen.parents.tolist()]
        # before the table changes: ranks are those in the rows that were drafted from
        self.rows = [
            self._row(self.before if node == 0 else tokens[parents[node]], tokens[node])
            for node in seen.path
        ]
        # the accepted nodes last: of several nodes with one token the last one counts
        accepted = set(seen.path)
        order = [i for i in range(len(tokens)) if i not in accepted] + seen.path
        table = self.table.numpy()
        for i in order:
            table[tokens[i], : found.shape[1]] = found[i].numpy()

    def _count(self, ids: Sequence[int]) -> None:
        """Count the ranks of the tokens that came since the last draft."""
        # a row for each accepted node, so one for each token of that pass; plain ones have none
        new = ids[self.length :] if self.length else ()
        for depth, (row, token) in enumerate(zip(self.rows, new, strict=False)):
            # a row still unknown is a miss, too: plans stay small while the table is empty
            self.frequencies.add(depth, row.index(token) if token in row else None)
        self.rows = []
        for i in range(max(self.length, 2), len(ids) if self.length else 0):
            self._count_pair((ids[i - 2], ids[i - 1]), ids[i])

    def _count_pair(self, pair: tuple[int, int], follower: int) -> None:
        if self.order == 3:
            counts = self.pairs.setdefault(pair, {})
            counts[follower] = counts.get(follower, 0) + 1
            self.pairs.move_to_end(pair)
            if len(self.pairs) > self.entries:
                self.pairs.popitem(last=False)

    @torch.no_grad()
    def fill(self, answers: DraftAnswers, model: CausalModel) -> None:
        """Learn from answers of a model as decoding them with drafts would teach it.

        Each round takes the true tokens as far as the table has them; their rows are then those of
        the model's logits there, from the states that were kept in 16 bits.

        Args:
            answers: of the model, whose states are its own.
            model: of transformers, whose head gives the logits.
        """
        head = model.get_output_embeddings()
        weight = next(head.parameters())
        for i in range(len(answers)):
            ids, start = answers.ids[answers.row(i)].tolist(), answers.starts[i]
            self.start(ids[:start], None)
            table = self.table.numpy()  # shares its memory
            # behind the first token of the answer, which comes with the prompt
            states = answers.states[answers.row(i)][start:]
            likely = torch.cat([
                most_likely(head(part.to(weight)), min(self.k, self.vocabulary))
                for part in states.split(CHUNK)
            ])  # fmt: skip
            root = start
            while root < len(ids) - 1:
                right = self._right(ids, root)
                # not the last one: no pass computes what would follow
                for place in range(root, min(root + right + 1, len(ids) - 1)):
                    table[ids[place], : likely.shape[1]] = likely[place - start].numpy()
                for place in range(root + 1, min(root + right + 2, len(ids))):
                    self._count_pair((ids[place - 2], ids[place - 1]), ids[place])
                root += right + 1

    def _right(self, ids: Sequence[int], root: int) -> int:
        """Return how many tokens behind a root the table has in turn, and count their ranks."""
        for depth in range(len(self.known)):
            place = root + depth
            if place + 1 >= len(ids):
                return depth
            row, token = self._row(ids[place - 1], ids[place]), ids[place + 1]
            self.frequencies.add(depth, row.index(token) if token in row else None)
            if token not in row:
                return depth
        return len(self.known)

    # Files

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the table, the fields and the frequencies, with the hash of a tokenizer."""
        files.write(
            folder,
            self.name,
            self.fields,
            vocabulary=self.vocabulary,
            hashes={} if tokenizer is None else {"tokenizer": hash_of_tokenizer(tokenizer)},
            frequencies=self.frequencies.table(),
            tensors={"table": self.table},
        )

    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields."""
        self._take(tensors.get("table"), "the saved drafter")
        if not self.keep:
            self.first = self.table.clone()
        self.frequencies.restore(config["frequencies"] or self.known)
        self.known = self.frequencies.table()

    def _take(self, table: Tensor | None, source: str) -> None:
        shape = (self.vocabulary, self.k)
        if table is None or table.dtype != torch.int32 or table.shape != shape:
            found = "none" if table is None else f"{table.dtype} {list(table.shape)}"
            raise InputError(f"{source} needs a table of int32 {list(shape)}, and has {found}")
        # else a wrong id would surface only as a refused draft, in the midst of an answer
        if int(table.max()) >= self.vocabulary or int(table.min()) < UNKNOWN:
            raise InputError(
                f"the table of {source} has ids from {int(table.min())} to {int(table.max())}; "
                f"allowed are {UNKNOWN} (unknown) to {self.vocabulary - 1}"
            )
        self.table.copy_(table)


def _check(fields: Settings) -> None:
    """Raise InputError for a field of another type or out of range."""
    ranges = {"k": integer(1, MOST_RANKS), "depth": integer(1, DEEPEST), "entries": integer(1)}
    for name, rule in {**ranges, "order": integer(2, 3)}.items():
        rule.check(name, fields[name], int)
    auto_or_count(MOST_NODES).check("nodes", fields["nodes"])
    for name in ("prompt", "keep"):
        FREE.check(name, fields[name], bool)


def most_likely(logits: Tensor, k: int) -> Tensor:
    """Return the k tokens of largest logit of each row, [N, k] int32 on the CPU.

    Of equal logits the lower token comes first.
    """
    # more than k, as topk orders ties as it likes, which are common in 16 bits
    more = min(k + TIES, logits.shape[1])
    values, index = (t.cpu() for t in _largest(logits, more))
    values = values.float()
    index, order = index.sort(-1)  # by token, then stably by logit
    values, again = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, again)
    if more < logits.shape[1]:
        # topk may have left out a lower token that is equal to the last one
        for i in (values[:, k - 1] == values[:, -1]).nonzero()[:, 0].tolist():
            last = values[i, k - 1].to(logits.dtype).to(logits.device)
            above = index[i][values[i] > values[i, k - 1]]
            equal = (logits[i] == last).nonzero()[: k - len(above), 0].cpu()
            index[i, :k] = torch.cat([above, equal])
    return index[:, :k].int()


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row of x [N, V] and their indices, as `topk`.

    They are in the k parts with the largest maxima, so that a vocabulary is read once.
    """
    rows, parts = len(x), x.shape[1] // PART
    if parts <= k:
        return torch.topk(x, k)
    whole = x[:, : parts * PART].unflatten(1, (parts, PART))
    chosen = whole.amax(-1).topk(k).indices[..., None]  # [N, k, 1]
    values = whole.gather(1, chosen.expand(-1, -1, PART)).flatten(1)
    index = (chosen * PART + torch.arange(PART, device=x.device)).flatten(1)
    rest = torch.arange(parts * PART, x.shape[1], device=x.device).expand(rows, -1)
    values, index = torch.cat([values, x[:, parts * PART :]], 1), torch.cat([index, rest], 1)
    found = values.topk(k)
    return found.values, index.gather(1, found.indices)
