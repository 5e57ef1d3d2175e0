"""Damaged bytes in the binary files that petl reads back, for chaos.py: hundreds a minute.

Each fault changes some bytes of one file, at a random place. What is read then equals what was
saved, bit by bit, or the file is refused in a message, or made again. All is in one process, on
tiny models.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from chaos_serving import ROOT, Broken, require
from datasets import Dataset
from torch import Tensor

import petl
from petl import testing
from petl.data.tasks.causal_lm import CausalLM
from petl.efficiency.drafting import answers, drafter, fit
from petl.efficiency.frozen.keys import KEY_BYTES
from petl.efficiency.frozen.store import CONTENT, OutputSpec, Store
from petl.efficiency.frozen.store import write as write_store
from petl.errors import InputError
from petl.system.files.paths import cache_folder
from petl.training.feature_cache import FOLDER as FEATURES
from petl.training.feature_cache import FeatureCache
from petl.training.runs.checkpoint import verify

sys.path.insert(0, str(ROOT / "tests/fixtures"))
from corda_fixtures import layers, update
from corda_fixtures import wrap as wrap_corda
from small_run import STEP, small_run
from tiny_tokenizers import byte_tokenizer

FIELDS = {
    "lora": {"r": 4},
    "mola": {"r": 2, "num_experts": 3},
    "sparse": {"density": 0.02},
    "binary": {"inner": "lora", "r": 4},
}
ROWS = {"text": ["abc", "defg", "hi", "a longer row than the others"]}
KEYS = [bytes([n]) * (KEY_BYTES - 1) + b"\0" for n in (7, 3, 200)]
IDS = torch.arange(4, 12)[None]
TEXT = {"README.md"}  # read by people


def flip_bit(content: bytearray, draw: random.Random) -> None:
    """Flip one bit."""
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def set_zeros(content: bytearray, draw: random.Random) -> None:
    """Set 64 bytes to zero."""
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))


def cut_off(content: bytearray, draw: random.Random) -> None:
    """Remove the end."""
    del content[draw.randrange(len(content)) :]


def insert(content: bytearray, draw: random.Random) -> None:
    """Insert a byte."""
    content.insert(draw.randrange(len(content)), draw.randrange(256))


def exchange(content: bytearray, draw: random.Random) -> None:
    """Exchange two bytes."""
    a, b = draw.randrange(len(content)), draw.randrange(len(content))
    content[a], content[b] = content[b], content[a]


def append(content: bytearray, draw: random.Random) -> None:
    """Append 16 bytes."""
    content += draw.randbytes(16)


def remove_all(content: bytearray, draw: random.Random) -> None:
    """Leave no byte."""
    content.clear()


DAMAGES = (flip_bit, flip_bit, set_zeros, cut_off, insert, exchange, append, remove_all)


class Adapter:
    """A saved adapter, read by petl.load: its logits."""

    def __init__(self, method: str, folder: Path, *, compressed: bool = False) -> None:
        torch.manual_seed(0)
        model = testing.stir(petl.wrap(testing.tiny_llama(2), method, **FIELDS[method]))
        self.folder = folder / "adapter"
        model.save_pretrained(self.folder)
        if compressed:
            plain = self.folder.rename(folder / "plain")
            petl.deltas.compress_adapter(plain, self.folder, density=0.3)

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        model = petl.load(testing.tiny_llama(2), self.folder).eval()
        with torch.no_grad():
            return {"logits": model(input_ids=IDS).logits}


class States:
    """A store of frozen blocks: the states of each row."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        rows = [torch.randn(length, 4) for length in (3, 1, 2)]
        write_store(folder, OutputSpec("float32", [4], 0, 0), KEYS, [3, 1, 2], rows)
        self.folder = folder / CONTENT

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        opened = Store(self.folder)
        return {str(n): opened.row(n).clone() for n in opened.find(KEYS).tolist()}


class Checkpoint:
    """A checkpoint of a run, whose files have digests in its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = small_run(folder / "run") / STEP

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        verify(self.folder)
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        return {
            file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for file in files
            if file.name != "manifest.json"
        }


class EncodedRows:
    """The cache of encoded rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = cache_folder() / "encoded"

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        rows = CausalLM().encode(byte_tokenizer(pad_token="<|im_end|>"), Dataset.from_dict(ROWS))
        return {str(n): torch.tensor(row) for n, row in enumerate(rows["input_ids"])}


class Features:
    """The cache of a head's inputs, which are computed where the file does not have them."""

    batches = tuple({"input_ids": torch.tensor([[n, n + 1]])} for n in range(3))

    def __init__(self, folder: Path) -> None:
        self.folder = cache_folder() / FEATURES

    def read(self) -> dict[str, Tensor]:
        """What is read or computed, by name."""
        cache, found = FeatureCache("a head", "no", "some rows"), {}
        for number, batch in enumerate(self.batches):
            vectors = cache.find(batch)
            if vectors is None:
                vectors = batch["input_ids"] * 1.5
                cache.add(batch, vectors)
            found[str(number)] = vectors
        cache.write()
        return found


class CordaCache:
    """The cache of covariances or of factors: the updates of the layers."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.fields = folder / "corda", {f"{kind}_cache": str(folder / "corda")}

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        return {key: update(layer) for key, layer in layers(wrap_corda(**self.fields)).items()}


class Drafts:
    """A saved drafter, which is read or refused: its guesses do not change an answer."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = testing.tiny_llama(), folder / "drafter"
        guess = drafter("hydra", model=self.model, draft_vocab=50)
        prompts = [list(range(4, 9 + n)) for n in range(4)]
        fit(guess, answers(self.model, prompts, tokens=4, pad_token_id=0), epochs=1)
        guess.save(self.folder)

    def read(self) -> dict[str, Tensor]:
        """What is read, by name."""
        petl.load_drafter(self.folder, self.model)
        return {}


KINDS = {
    **{method: lambda folder, method=method: Adapter(method, folder) for method in FIELDS},
    "compressed": lambda folder: Adapter("lora", folder, compressed=True),
    "store": States,
    "checkpoint": Checkpoint,
    "encoded rows": EncodedRows,
    "features": Features,
    "covariances": lambda folder: CordaCache("covariance", folder),
    "factors": lambda folder: CordaCache("factors", folder),
    "drafter": Drafts,
}


class Damaged:
    """Files of one of `KINDS` in a folder, which faults hit."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.saved = KINDS[kind](folder)
        self.expected = self.saved.read()  # a cache is written here
        self.kept = Path(shutil.copytree(self.saved.folder, folder / "kept"))
        found = (f.relative_to(self.kept) for f in sorted(self.kept.rglob("*")) if f.is_file())
        self.files = [file for file in found if file.name not in TEXT]

    def hit(self, draw: random.Random) -> None:
        """Damage one file, and read what was saved.

        Raises:
            Broken: it is neither equal nor refused.
        """
        shutil.rmtree(self.saved.folder)
        shutil.copytree(self.kept, self.saved.folder)
        file, damage = self.saved.folder / draw.choice(self.files), draw.choice(DAMAGES)
        content = bytearray(file.read_bytes())
        damage(content, draw)
        file.write_bytes(content)
        try:
            found = self.saved.read()
        except InputError:
            return
        except Exception as error:
            raise Broken(f"{damage.__name__} in {file}: {error!r}") from error
        is_equal = found.keys() == self.expected.keys() and all(
            torch.equal(found[name], self.expected[name]) for name in found
        )
        require(is_equal, f"{damage.__name__} in {file}: other values were read")


def try_files(faults: int, seed: int) -> int:
    """Damage files of all kinds in turn; return the exit status of the command."""
    draw, counts = random.Random(seed), Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, PETL_CACHE=f"{folder}/cache"),
    ):
        damaged = {kind: Damaged(kind, Path(folder, kind)) for kind in KINDS}
        for number in range(faults):
            kind = [*KINDS][number % len(KINDS)]
            try:
                damaged[kind].hit(draw)
            except Broken as error:
                print(f"[{number + 1}/{faults}] {kind}: {error}", file=sys.stderr)
                return 1
            counts[kind] += 1
    print("; ".join(f"{kind}: {count} survived" for kind, count in counts.items()))
    print("what was read is equal, or was refused, or made again")
    return 0
