"""Damage at random places of the binary files that petl reads back is never used in silence.

Each fault changes some bytes of one file. What is read then equals what was saved, bit by bit, or
the file is refused in a message, or made again. 100 faults of each kind of file in the thorough
run, a few in the default one. `test_damaged_runs.py` does the same to the text files of a run.
"""

import random
import shutil

import pytest
import torch
from corda_fixtures import layers, update
from corda_fixtures import wrap as wrap_corda
from datasets import Dataset
from small_run import STEP, small_run
from tiny_tokenizers import byte_tokenizer

import petl
from petl import testing
from petl.data.tasks.causal_lm import CausalLM
from petl.efficiency.drafting import answers, drafter, fit
from petl.efficiency.frozen.keys import KEY_BYTES
from petl.efficiency.frozen.store import CONTENT, OutputSpec, Store
from petl.efficiency.frozen.store import write as write_store
from petl.errors import InputError
from petl.training.runs.checkpoint import verify

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


def flip_bit(content, draw):
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def set_zeros(content, draw):
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))


def cut_off(content, draw):
    del content[draw.randrange(len(content)) :]


def insert(content, draw):
    content.insert(draw.randrange(len(content)), draw.randrange(256))


def exchange(content, draw):
    a, b = draw.randrange(len(content)), draw.randrange(len(content))
    content[a], content[b] = content[b], content[a]


def append(content, draw):
    content += draw.randbytes(16)


def remove_all(content, draw):
    content.clear()


DAMAGES = (flip_bit, flip_bit, set_zeros, cut_off, insert, exchange, append, remove_all)


class Adapter:
    """A saved adapter, read by petl.load: its logits."""

    def __init__(self, method, folder, *, compressed=False):
        torch.manual_seed(0)
        model = testing.stir(petl.wrap(testing.tiny_llama(2), method, **FIELDS[method]))
        self.folder = folder / "adapter"
        model.save_pretrained(self.folder)
        if compressed:
            plain = self.folder.rename(folder / "plain")
            petl.deltas.compress_adapter(plain, self.folder, density=0.3)

    def read(self):
        model = petl.load(testing.tiny_llama(2), self.folder).eval()
        with torch.no_grad():
            return {"logits": model(input_ids=IDS).logits}


class States:
    """A store of frozen blocks: the states of each row."""

    def __init__(self, folder):
        torch.manual_seed(0)
        rows = [torch.randn(length, 4) for length in (3, 1, 2)]
        write_store(folder, OutputSpec("float32", [4], 0, 0), KEYS, [3, 1, 2], rows)
        self.folder = folder / CONTENT

    def read(self):
        opened = Store(self.folder)
        return {str(n): opened.row(n).clone() for n in opened.find(KEYS).tolist()}


class Checkpoint:
    """A checkpoint of a run, whose files have digests in its manifest."""

    def __init__(self, folder):
        self.folder = small_run(folder / "run") / STEP

    def read(self):
        verify(self.folder)
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        return {
            file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for file in files
            if file.name != "manifest.json"
        }


class EncodedRows:
    """The cache of encoded rows."""

    def __init__(self, folder):
        self.folder = folder / "cache" / "encoded"

    def read(self):
        rows = CausalLM().encode(byte_tokenizer(pad_token="<|im_end|>"), Dataset.from_dict(ROWS))
        return {str(n): torch.tensor(row) for n, row in enumerate(rows["input_ids"])}


class CordaCache:
    """The cache of covariances or of factors: the updates of the layers."""

    def __init__(self, kind, folder):
        self.folder, self.fields = folder / "corda", {f"{kind}_cache": str(folder / "corda")}

    def read(self):
        return {key: update(layer) for key, layer in layers(wrap_corda(**self.fields)).items()}


class Drafts:
    """A saved drafter, which is read or refused: its guesses do not change an answer."""

    def __init__(self, folder):
        self.model, self.folder = testing.tiny_llama(), folder / "drafter"
        guess = drafter("hydra", model=self.model, draft_vocab=50)
        prompts = [list(range(4, 9 + n)) for n in range(4)]
        fit(guess, answers(self.model, prompts, tokens=4, pad_token_id=0), epochs=1)
        guess.save(self.folder)

    def read(self):
        petl.load_drafter(self.folder, self.model)
        return {}


KINDS = {
    **{method: lambda folder, method=method: Adapter(method, folder) for method in FIELDS},
    "compressed": lambda folder: Adapter("lora", folder, compressed=True),
    "store": States,
    "checkpoint": Checkpoint,
    "encoded rows": EncodedRows,
    "covariances": lambda folder: CordaCache("covariance", folder),
    "factors": lambda folder: CordaCache("factors", folder),
    "drafter": Drafts,
}


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    "faults", [5, pytest.param(100, marks=[pytest.mark.thorough, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_refused_or_change_nothing(kind, faults, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    saved = KINDS[kind](tmp_path)
    expected = saved.read()  # a cache is written here
    kept = shutil.copytree(saved.folder, tmp_path / "kept")
    files = [file.relative_to(kept) for file in sorted(kept.rglob("*")) if file.is_file()]
    files = [file for file in files if file.name not in TEXT]
    draw = random.Random(f"{kind} {faults}")
    for number in range(faults):
        shutil.rmtree(saved.folder)
        shutil.copytree(kept, saved.folder)
        file, damage = saved.folder / draw.choice(files), draw.choice(DAMAGES)
        content = bytearray(file.read_bytes())
        damage(content, draw)
        file.write_bytes(content)
        what = f"fault {number}: {damage.__name__} in {file.name}"
        try:
            found = saved.read()
        except InputError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert found.keys() == expected.keys(), what
        assert all(torch.equal(found[name], expected[name]) for name in expected), what
