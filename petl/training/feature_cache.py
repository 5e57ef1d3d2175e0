"""Inputs of a model's head in petl's cache, by content: runs on the same base and rows read them.

Likewise what the test rows are scored by before training, of tasks without a new head.

A file has the inputs of all batches of some rows, each under a digest of what the model was given.
Its name is that of what computes them: weights, config, precision, versions. Values equal those of
a pass up to rounding, since methods and accelerations compute the base's products in other orders.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
import transformers
import xxhash
from safetensors.torch import load_file, save
from torch import Tensor, nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.layers.class_swap import AdapterDict, original_class
from petl.core.parameters import buffer_of
from petl.efficiency.frozen.prefix import OTHER
from petl.system.files.disk import is_as_noted, note_digest, write_atomic
from petl.system.files.paths import cache_folder

PART = "part"  # of what is kept for a batch: its number
FOLDER = "features"  # of the files, in petl's cache
FORMAT = 2  # increment when the meaning of a file changes
WRAPPED = ("base_layer", "original_module")  # where PEFT keeps what an adapter wraps
MOST_BYTES = 200e6  # assumption: a larger file is not worth its disk
logger = logging.getLogger(__name__)


class FeatureCache:
    """The inputs of a head for the batches of some rows, read from a file if it is there.

    Attributes:
        is_new: True once a batch was added, which `write` keeps.
    """

    def __init__(self, name: str, precision: str, *rows: object) -> None:
        """Open the file.

        Args:
            name: of the `computation`; "": nothing is read or kept.
            precision: of the passes, as Accelerate names it.
            rows: names the rows, and how they are divided into batches.
        """
        of_all = xxhash.xxh3_128_hexdigest(repr((name, precision, *rows)).encode())
        self.file = cache_folder() / FOLDER / f"{of_all}.safetensors"
        self.is_new = False
        self._found = {}
        try:
            if name and is_as_noted(self.file):
                self._found = load_file(self.file)
        except OSError as error:  # such as another user's file
            logger.info("the features are computed: %s cannot be read (%s)", self.file, error)
        self._keeps, self._bytes = bool(name), 0

    def find(self, batch: Mapping[str, object]) -> Tensor | None:
        """Return the inputs of the head for a batch of the model's arguments; None: not there."""
        found = self._found.get(_digest(batch))
        # where it lies in a file decides on the kernel of a product, and so on its last bit
        return None if found is None else found.clone()

    def add(self, batch: Mapping[str, object], vectors: Tensor) -> None:
        """Keep the inputs of the head for a batch."""
        self._bytes += vectors.nbytes
        if self._keeps and self._bytes <= MOST_BYTES:
            self._found[_digest(batch)] = vectors.detach().cpu().contiguous()
            self.is_new = True

    def found(self, batch: Mapping[str, object], count: int) -> list[Tensor]:
        """Return the tensors that `keep` was given for a batch; [] unless all are there."""
        tensors = [self.find({**batch, PART: number}) for number in range(count)]
        known = [each for each in tensors if each is not None]
        return known if len(known) == count else []

    def keep(self, batch: Mapping[str, object], tensors: Iterable[Tensor]) -> None:
        """Keep several tensors for a batch."""
        for number, tensor in enumerate(tensors):
            # predictions may be the score itself, and a file has no tensor twice
            self.add({**batch, PART: number}, tensor.clone())

    def write(self) -> None:
        """Write the file if a batch was added to it; a disk that does not take it is logged."""
        if self._found and not self.is_new:
            logger.info("features of an earlier run: %s", self.file)
        if not self.is_new or self._bytes > MOST_BYTES:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, save(self._found))
            note_digest(self.file)
        except OSError as error:
            logger.info("the features are not kept: %s cannot be written (%s)", self.file, error)


def computation(base: nn.Module, head: nn.Module) -> str:
    """Return a name for what a model computes up to its head; "" if its weights are not plain.

    Args:
        base: a model whose adapters are disabled.
        head: the module that gets the inputs; its own weights do not matter.
    """
    hasher = xxhash.xxh3_128()
    for path, module in _outside_adapters(base, head):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for key, tensor in own:
            # a quantized tensor has states beside it, and one elsewhere has no values
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                return ""
            hasher.update(f"{path}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hasher.update(buffer_of(tensor))
    config = getattr(base, "config", None)
    settings = {} if config is None else config.to_dict()
    kept = {name: value for name, value in settings.items() if name not in OTHER}
    kept["attention"] = getattr(config, "_attn_implementation", None)
    kind = original_class(base)
    about = [
        f"{kind.__module__}.{kind.__qualname__}",
        *sorted(map(repr, kept.items())),
        next(base.parameters()).device.type,
        *(torch.__version__, transformers.__version__, FORMAT),
    ]
    hasher.update(repr(about).encode())
    return hasher.hexdigest()


def _outside_adapters(
    module: nn.Module, head: nn.Module, path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model but its head, those that adapters wrap in their place."""
    if module is head or isinstance(module, AdapterDict):
        return
    wrapped = next((name for name in WRAPPED if name in module._modules), "")
    if wrapped and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        yield from _outside_adapters(module.get_submodule(wrapped), head, path)
        return
    yield path, module
    for name, child in module.named_children():
        yield from _outside_adapters(child, head, f"{path}.{name}")


def _digest(batch: Mapping[str, object]) -> str:
    hasher = xxhash.xxh3_128()
    for name, value in sorted(batch.items()):
        hasher.update(name.encode())
        if isinstance(value, Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hasher.update(buffer_of(value))
        else:
            hasher.update(repr(value).encode())
    return hasher.hexdigest()
