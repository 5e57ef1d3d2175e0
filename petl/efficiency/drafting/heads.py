"""The modules of draft heads: a residual block, a recurrent cell, and heads of one kind.

Shapes: N positions, H width, c conditions (embeddings of the tokens drafted before), V tokens, D
tokens of the draft vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from petl.core.types import Settings
from petl.efficiency.drafting.ends import Ends
from petl.efficiency.drafting.prefix import Prefix, prefix_layer
from petl.efficiency.drafting.registry import Drafter
from petl.errors import InputError
from petl.system.values import FREE, integer

EPS = 1e-6  # of the root mean square
KINDS = ("recurrent", "sequential", "parallel")
MOST = 8  # heads, and layers of one
LAST = 2**32 - 1  # seed
UNKNOWN = -1  # the place of a token that is not in D


class DraftHead(nn.Module):
    """`A z + silu(B z + b)` for z of width (c + 1) H; without conditions A is the identity.

    It starts as `A z = ` the first H entries of z: B and the biases are zero.
    """

    def __init__(self, width: int, conditions: int) -> None:
        super().__init__()
        inner = (conditions + 1) * width
        self.lin_weight = nn.Parameter(torch.zeros(width, inner))
        self.lin_bias = nn.Parameter(torch.zeros(width))
        self.res_weight = self.res_bias = None
        if conditions:
            self.res_weight = nn.Parameter(torch.eye(width, inner))
            self.res_bias = nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor) -> Tensor:
        """Return the block's output, [N, H].

        Args:
            z: [N, (c + 1) H].
        """
        kept = z if self.res_weight is None else linear(z, self.res_weight, self.res_bias)
        return kept + silu(linear(z, self.lin_weight, self.lin_bias))


class Cell(nn.Module):
    """`s + B silu(A [s; k e])`, one set of weights for all positions, and the norm of its output.

    B and the biases start at zero, so that the state stays what it was; A is Kaiming-uniform.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.empty(2 * width, 2 * width))
        self.in_bias = nn.Parameter(torch.zeros(2 * width))
        self.out_weight = nn.Parameter(torch.zeros(width, 2 * width))
        self.out_bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.Parameter(torch.ones(width))
        nn.init.kaiming_uniform_(self.in_weight, a=5**0.5)  # the bound of nn.Linear

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Return the state after one more token, [N, H].

        Args:
            state: before it, [N, H].
            embedding: of the token, at the scale of states, [N, H].
        """
        inner = silu(linear(torch.cat([state, embedding], -1), self.in_weight, self.in_bias))
        return state + linear(inner, self.out_weight, self.out_bias)

    def output(self, state: Tensor) -> Tensor:
        """Return the normalized state, which the head of the model reads, [N, H]."""
        # in float32: squares of float16 overflow above 255
        size = (state.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        return self.norm * state * size.to(state)


class DraftHeads(Drafter):
    """Heads of one kind on a model, with the rows of its own head for a draft vocabulary.

    Attributes:
        vocab: the draft vocabulary, int32 [D].
        index: the same, for indexing, long [D].
        place: of each token in it, -1: none, long [V].
        scale: of the recurrent kind: brings embeddings to the scale of states, 0-d.
    """

    vocab: Tensor
    index: Tensor
    place: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module | None, fields: Settings) -> None:
        """Create the modules.

        Args:
            model: that they draft for.
            fields: as of `Hydra`.
        """
        super().__init__()
        check_fields(fields)
        self.fields = fields
        self.ends = Ends(model)
        self.vocabulary = self.ends.vocabulary
        self.kind, self.heads, self.own_head = fields["kind"], fields["heads"], fields["own_head"]
        # on the CPU, so that all devices begin alike; the caller's random state stays as it is
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fields["seed"])
            self._build(fields["layers"])
            self.prefix = prefix_layer(self.ends.model) if fields["prefix"] else None
        # no module, since its layer is one already
        self.reader = None if self.prefix is None else Prefix(self.prefix, self.ends.model)
        size = min(fields["draft_vocab"], self.ends.vocabulary)
        self.register_buffer("vocab", torch.zeros(size, dtype=torch.int32))
        # not saved: made of `vocab` in `set_vocab`
        self.register_buffer("index", torch.zeros(size, dtype=torch.long), persistent=False)
        place = torch.zeros(self.ends.vocabulary, dtype=torch.long)
        self.register_buffer("place", place, persistent=False)
        self.to(self.ends.device)
        self.set_vocab(torch.arange(size))

    def _build(self, layers: int) -> None:
        width = self.ends.width
        if self.kind == "recurrent":
            self.cell = Cell(width)
            self.register_buffer("scale", torch.tensor(1 / self.ends.embedding_rms()))
        else:
            conditions = [i if self.kind == "sequential" else 0 for i in range(1, self.heads + 1)]
            # each block is one of its own
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    DraftHead(width, c), *(DraftHead(width, 0) for _ in range(layers - 1))
                )
                for c in conditions
            )

    @torch.no_grad()
    def set_vocab(self, tokens: Tensor) -> None:
        """Take another draft vocabulary of the same size, [D]."""
        self.vocab.copy_(tokens)
        self.index.copy_(self.vocab)
        self.place.fill_(UNKNOWN)
        self.place[self.index] = torch.arange(len(self.index), device=self.index.device)
        if self.own_head:  # copies, which train
            rows = self.ends.rows(self.index).to(self.dtype)
            self.lm_heads = nn.ParameterList(rows.clone() for _ in range(self.heads))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the heads."""
        return next(p.dtype for name, p in self.named_parameters() if "lm_heads" not in name)

    def head_logits(self, h: Tensor, after: Tensor) -> Tensor:
        """Return the logits of head i at some positions, [N, D].

        Args:
            h: outputs of the final norm, or of the prefix layer if there is one, [N, H].
            after: the tokens x_{t+1} to x_{t+i}, [N, i].

        Raises:
            InputError: there is no such head.
        """
        i = after.shape[1]
        if not 1 <= i <= self.heads:
            raise InputError(f"after has {i} tokens for each position: 1 to heads={self.heads}")
        carry = h.to(self.dtype)
        for j in range(i):
            carry = self.enter(carry, after[:, j])
        return self.logits(carry, i)

    def enter(self, carry: Tensor, tokens: Tensor) -> Tensor:
        """Return what is carried on after one more token: a state, or states and embeddings."""
        if self.kind == "parallel":  # reads the state only
            return carry
        embedding = self.ends.embed(tokens).to(carry)
        if self.kind == "sequential":
            return torch.cat([carry, embedding], -1)
        return self.cell(carry, self.scale * embedding)

    def logits(self, carry: Tensor, i: int) -> Tensor:
        """Return the logits of head i for what was carried to it, [N, D]."""
        y = self.cell.output(carry) if self.kind == "recurrent" else self.blocks[i - 1](carry)
        if self.own_head:
            return linear(y, self.lm_heads[i - 1])
        return self.ends.logits(y, self.index)


def check_fields(fields: Settings) -> None:
    """Raise InputError for a field of another type or out of range."""
    if fields["kind"] not in KINDS:
        raise InputError(f"kind={fields['kind']!r} is none of {', '.join(KINDS)}")
    ranges = {**dict.fromkeys(("heads", "layers"), integer(1, MOST)), "draft_vocab": integer(1)}
    for name, rule in {**ranges, "seed": integer(0, LAST)}.items():
        rule.check(name, fields[name], int)
    for name in ("prefix", "own_head"):
        FREE.check(name, fields[name], bool)
    if fields["kind"] == "recurrent" and fields["layers"] > 1:
        raise InputError(
            f"layers={fields['layers']}: the recurrent kind has one cell; set layers=1, or "
            "kind=sequential"
        )
