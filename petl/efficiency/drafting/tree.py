"""Trees of drafts: checks, depths, attention masks and the planner.

Node 0 is the root, the last token that is known; node i is the i-th draft. `parents[i - 1]` is the
parent of node i, a smaller number. A path in a plan is a tuple of ranks: (0, 2) is the third most
likely token after the most likely one. Shapes: N nodes, S tokens in the cache.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from petl.errors import InputError

if TYPE_CHECKING:
    from petl.efficiency.drafting.costs import Costs

Path = tuple[int, ...]


# Nodes


def check_draft(tokens: Sequence[int], parents: Sequence[int], vocabulary: int) -> None:
    """Raise InputError unless these are the nodes of a tree.

    Args:
        tokens: of nodes 1 to N.
        parents: of nodes 1 to N.
        vocabulary: number of tokens of the model.
    """
    if len(tokens) != len(parents):
        raise InputError(
            f"a draft has {len(tokens)} tokens and {len(parents)} parents; each token has one"
        )
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
        if not 0 <= token < vocabulary:
            raise InputError(f"draft {i} is token {token}, which is not from 0 to {vocabulary - 1}")
        if not 0 <= parent < i:
            raise InputError(
                f"draft {i} has the parent {parent}, which is not from 0 (the root) to {i - 1}"
            )


def depths(parents: Iterable[int]) -> list[int]:
    """Return the depth of each node, the root's included: 0."""
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def padded_depths(parents: Sequence[int], count: int) -> list[int]:
    """Return the depths of `count` nodes, the root's included, if those behind the drafts fill up.

    These are as deep as the deepest draft: no position is one that the model does not have.
    """
    found = depths(parents)
    return found + [max(found)] * (count - len(found))


def is_chain(parents: Sequence[int]) -> bool:
    """Return True if each node is the only child of the node before it."""
    return all(parent == i for i, parent in enumerate(parents))


def first_chain(parents: Sequence[int]) -> list[int]:
    """Return the numbers of the drafts from the root along first children."""
    chain, last = [], 0
    for i, parent in enumerate(parents, start=1):
        if parent == last:
            chain.append(i)
            last = i
    return chain


def children(tokens: Sequence[int], parents: Sequence[int]) -> list[dict[int, int]]:
    """Return the children of each node, the root included: node by token.

    Of equal siblings the first counts.
    """
    found: list[dict[int, int]] = [{} for _ in range(len(tokens) + 1)]
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
        found[parent].setdefault(token, i)
    return found


def selected(
    tokens: Sequence[int], parents: Sequence[int], keep: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return tokens and parents of some drafts.

    Args:
        tokens: of all drafts.
        parents: of all drafts.
        keep: numbers of drafts, rising, each with its ancestors.
    """
    number = {0: 0} | {node: i for i, node in enumerate(keep, start=1)}
    return [tokens[i - 1] for i in keep], [number[parents[i - 1]] for i in keep]


def fitted(
    draft: tuple[Tensor, Tensor],
    vocabulary: int,
    *,
    budget: int | None,
    depth: int | None,
    chains_only: bool,
) -> tuple[list[int], list[int]]:
    """Return tokens and parents of the drafts that can be verified.

    Args:
        draft: tokens and parents of a drafter.
        vocabulary: number of tokens of the model.
        budget: number of drafts at most; None: no limit.
        depth: how deep they may be; None: no limit.
        chains_only: keep the first children only.

    Raises:
        InputError: the draft is no tree, or has unknown tokens.
    """
    # a drafter may be somebody else's: lists of lists would fail far from here
    for name, tensor in zip(("tokens", "parents"), draft, strict=True):
        if tensor.dim() != 1 or tensor.is_floating_point():
            raise InputError(
                f"the {name} of a draft are {tensor.dtype} {list(tensor.shape)}: integers, one "
                "for each draft"
            )
    tokens, parents = (each.tolist() for each in draft)
    check_draft(tokens, parents, vocabulary)
    if budget is not None:
        tokens, parents = tokens[:budget], parents[:budget]
    if depth is not None and len(tokens) > depth:
        keep = [i for i, d in enumerate(depths(parents)) if 0 < d <= depth]
        tokens, parents = selected(tokens, parents, keep)
    if chains_only and not is_chain(parents):
        tokens, parents = selected(tokens, parents, first_chain(parents))
    return tokens, parents


def ancestors(parents: Sequence[int]) -> Tensor:
    """Return True where a node attends to another: its ancestors and itself, [N, N] bool."""
    seen = torch.eye(len(parents) + 1, dtype=torch.bool)
    # parents have smaller numbers: their rows are complete when children read them
    for i, parent in enumerate(parents, start=1):
        seen[i] |= seen[parent]
    return seen


def tree_mask(
    parents: Sequence[int], past: Tensor | int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the mask of a pass over a tree, additive, [1, 1, N, S + N].

    Args:
        parents: of the drafts.
        past: the number S of tokens in the cache, or which of them are no padding, [S].
        dtype: of the model.
        device: of the model.
    """
    nodes = ancestors(parents).to(device)
    if isinstance(past, int):
        past = torch.ones(past, dtype=torch.bool, device=device)
    allowed = torch.cat([past.bool().expand(len(nodes), -1), nodes], 1)
    # finite, as in transformers: a row of -inf alone gives NaN, though here each node sees itself
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, lowest)[None, None]


def extended_mask(
    mask: Tensor | None, parents: Sequence[int], count: int, past: int, model: PreTrainedModel
) -> Tensor | None:
    """Return the mask of a pass over a root, its drafts, and nodes that fill it up.

    Args:
        mask: 0 at padding, with the root, [1, S + 1]; None: there is no padding.
        parents: of the drafts.
        count: number of nodes.
        past: the number S of tokens in the cache.
        model: that computes the pass.

    Returns:
        Of a chain [1, S + count], or None as before; of a tree as of `tree_mask`.
    """
    fill = count - 1 - len(parents)
    if is_chain(parents):
        # causal as it is: nodes that fill up come last, where no draft sees them
        return None if mask is None else pad(mask, (0, count - 1), value=1)
    # `tree_mask` counts the root among the nodes; one that fills up sees the root only
    seen = past if mask is None else mask[0, :-1]
    return tree_mask([*parents, *[0] * fill], seen, model.dtype, model.device)


# Plans


def plan(frequencies: Sequence[Sequence[float]], nodes: int) -> list[Path]:
    """Return the tree of `nodes` drafts with the most expected tokens, the likeliest path first.

    Args:
        frequencies: by depth, then rank: the fraction of positions at which the true token has this
            rank, given that the path so far is right.
        nodes: number of drafts; fewer are returned if there are not so many.
    """
    # a child is never likelier than its parent, so the best paths are closed under prefixes
    ready: list[tuple[float, int, Path]] = []
    taken: list[Path] = []

    def add(parent: Path, product: float) -> None:
        if len(parent) < len(frequencies):
            for rank, frequency in enumerate(frequencies[len(parent)]):
                if product * frequency > 0:
                    path = (*parent, rank)
                    # of equal products shorter paths, then lower ranks: one table, one plan
                    heapq.heappush(ready, (-product * frequency, len(path), path))

    add((), 1.0)
    while ready and len(taken) < nodes:
        negative, _, path = heapq.heappop(ready)
        taken.append(path)
        add(path, -negative)
    return taken


def tau(frequencies: Sequence[Sequence[float]], paths: Iterable[Path]) -> float:
    """Return the expected tokens of a pass over a tree of these paths: 1 + sum of products."""
    total = 1.0
    for path in paths:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= frequencies[depth][rank]
        total += product
    return total


def best(
    frequencies: Sequence[Sequence[float]], costs: "Costs", drafting: float = 0.0, most: int = 63
) -> list[Path]:
    """Return the tree with the most tokens per second; empty if a pass without drafts has more.

    Args:
        frequencies: as of `plan`.
        costs: of a pass.
        drafting: cost of making the drafts, in passes over one token.
        most: number of drafts at most.
    """
    paths = plan(frequencies, most)
    # `plan` takes paths by falling product: its first n are the best tree of n drafts
    gains = [tau(frequencies, [path]) - 1 for path in paths]
    return paths[: best_count(gains, costs, drafting)]


def best_count(gains: Sequence[float], costs: "Costs", drafting: float = 0.0) -> int:
    """Return how many of the first drafts to verify, for the most tokens per second.

    Args:
        gains: expected tokens that each draft adds.
        costs: of a pass.
        drafting: cost of making the drafts, in passes over one token.
    """
    count, total, highest = 0, 1.0, 1.0  # without drafts: a token for the cost of one pass
    # to the end: costs rise in steps, so the rate may fall and rise again
    for i, gain in enumerate(gains, start=1):
        total += gain
        rate = total / (costs.ratio(i + 1) + drafting)
        if rate > highest:
            count, highest = i, rate
    return count


def best_length(chances: Sequence[float], costs: "Costs") -> int:
    """Return how many tokens of a chain to verify; each has its chance if those before are right.

    Args:
        costs: of a pass.
    """
    return best_count([*accumulate(chances, mul)], costs)


def template_paths(template: Sequence[Sequence[int]], k: int) -> list[Path]:
    """Return the paths of a template, parents before children.

    Args:
        template: paths of ranks.
        k: number of ranks.

    Raises:
        InputError: a rank is not below k, or a path lacks its beginning.
    """
    try:
        paths = [*dict.fromkeys((*path,) for path in template)]
    except TypeError as error:
        raise InputError(
            f"template={template!r} is no list of paths of ranks such as [[0], [1], [0, 0]]"
        ) from error
    known = {(), *paths}
    for path in sorted(paths, key=len):
        # exactly: True would count as 1
        if not path or not all(type(rank) is int and 0 <= rank < k for rank in path):
            raise InputError(f"template has the path {path}: ranks are from 0 to k - 1 = {k - 1}")
        if path[:-1] not in known:
            raise InputError(f"template has the path {path}, but not {path[:-1]}, its beginning")
    place = {path: i for i, path in enumerate(paths)}
    in_order = all(place.get(path[:-1], -1) < place[path] for path in paths)
    return paths if in_order else sorted(paths, key=len)
