"""Prefix caching: keys and values of prompts, for later prompts that begin alike.

They are kept by blocks of tokens, each under a hash of all tokens so far, as in vLLM (Kwon et al.
2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention",
arXiv:2309.06180). Where memory is short, those go that were not used for the longest time.

Shapes: B rows, H heads, b tokens of a block, P tokens of the known beginning, D width.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from petl.generation.serving import kv_cache

BLOCK = 32  # tokens; assumption
Layers = dict[int, tuple[Tensor, Tensor]]  # keys and values by the number of the layer


class PromptBlock(NamedTuple):
    """The keys and values of a block of one prompt.

    Attributes:
        layers: each [1, H, b, D].
    """

    layers: Layers

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())


class PrefixCache:
    """The known beginnings, of all lanes of a server; used in one thread.

    Attributes:
        limit: bytes at most.
        nbytes: bytes now.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._blocks: OrderedDict[bytes, PromptBlock] = OrderedDict()  # the latest used at the end

    def find(self, owner: Hashable, ids: Sequence[int]) -> list[PromptBlock]:
        """Return the known blocks at the beginning of a prompt, without its last token.

        Args:
            owner: what computed them: a model and the name of its adapter.
            ids: of the prompt.
        """
        keys = []
        for key in _keys(owner, ids[:-1]):
            if key not in self._blocks:
                break
            keys.append(key)
        # the first block is used by most: it goes last
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return [self._blocks[key] for key in keys]

    def add(
        self, owner: Hashable, ids: Sequence[int], cache: DynamicCache, row: int, known: int
    ) -> None:
        """Keep the blocks of a prompt that are not known.

        Args:
            owner, ids: as of `find`.
            cache: behind the pass over the prompt, whose last entries are those of this row.
            row: of the cache.
            known: tokens whose blocks were found.
        """
        keys = [*_keys(owner, ids)]
        for number in range(known // BLOCK, len(keys)):
            if keys[number] in self._blocks:
                continue
            # entries from the end: on the left there may be padding
            start = number * BLOCK - len(ids)
            layers = {
                index: (_part(layer.keys, row, start), _part(layer.values, row, start))
                for index, layer in kv_cache.numbered(cache)
            }
            block = self._blocks[keys[number]] = PromptBlock(layers)
            self.nbytes += block.nbytes
        while self.nbytes > self.limit:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.nbytes


def fill(cache: DynamicCache, rows: Sequence[Sequence[PromptBlock]]) -> None:
    """Write the known beginnings of prompts, equally long ones, into an empty cache.

    Args:
        cache: gets [B, H, P, D] in each layer.
        rows: the blocks of each prompt.
    """
    for index in rows[0][0].layers:
        keys, values = (
            torch.cat([torch.cat([b.layers[index][side] for b in row], 2) for row in rows])
            for side in (0, 1)
        )
        cache.update(keys, values, index)


def _part(states: Tensor, row: int, start: int) -> Tensor:
    stop = states.shape[2] + start + BLOCK
    # a copy: the cache is written on, and a view would keep all of it
    return states[row : row + 1, :, stop - BLOCK : stop].clone()


def _keys(owner: Hashable, ids: Sequence[int]) -> Iterator[bytes]:
    """Yield the hash of each full block and all before it.

    Of a cryptographic kind: nobody can make a prompt that is taken for another's.
    """
    known = hashlib.sha256(repr(owner).encode())
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        known.update(array("q", ids[end - BLOCK : end]).tobytes())
        yield known.digest()
