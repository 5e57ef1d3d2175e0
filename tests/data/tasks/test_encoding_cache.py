import errno
import subprocess
from pathlib import Path

import pytest
import warm_python
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer

from petl.data.tasks import encoding_cache
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.multi_label import MultiLabel

SPLIT = {"text": ["abc", "defg", "hi"], "label": [0, 1, 0]}


class Counting(Classification):
    """Count the rows that are tokenized."""

    seen = 0

    def encode_rows(self, tokenizer, rows):
        type(self).seen += len(rows["text"])
        return super().encode_rows(tokenizer, rows)


@pytest.fixture(autouse=True)
def from_zero():
    Counting.seen = 0


def test_the_same_rows_are_tokenized_once(tokenizer, cache):
    task = Counting(classes=["x", "y"])
    first = task.encode(tokenizer, Dataset.from_dict(SPLIT))
    again = task.encode(byte_tokenizer(pad_token="<|im_end|>"), Dataset.from_dict(SPLIT))
    assert Counting.seen == 3
    assert again.to_dict() == first.to_dict()
    assert len(list((cache / "encoded").glob("*.arrow"))) == 1


def test_rows_of_a_damaged_cache_are_encoded_again(tokenizer, cache, caplog):
    task = Counting(classes=["x", "y"])
    first = task.encode(tokenizer, Dataset.from_dict(SPLIT)).to_dict()
    (file,) = (cache / "encoded").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[content.index(first["input_ids"][1][-1].to_bytes(4, "little"))] ^= 1
    file.write_bytes(content)
    assert task.encode(tokenizer, Dataset.from_dict(SPLIT)).to_dict() == first
    assert Counting.seen == 6
    assert f"{file} is damaged" in caplog.text
    task.encode(tokenizer, Dataset.from_dict(SPLIT))
    assert Counting.seen == 6


def test_a_change_of_any_dependency_encodes_the_rows_again(tokenizer):
    task = Counting(classes=["x", "y"])
    task.encode(tokenizer, Dataset.from_dict(SPLIT))
    task.encode(tokenizer, Dataset.from_dict({**SPLIT, "text": ["abc", "defg", "hj"]}))
    assert Counting.seen == 6
    task.encode(tokenizer, Dataset.from_dict({**SPLIT, "label": [1, 1, 0]}))
    assert Counting.seen == 9
    shorter = Counting(classes=["x", "y"], max_length=2)
    encoded = shorter.encode(tokenizer, Dataset.from_dict(SPLIT))
    assert Counting.seen == 12
    assert max(len(row["input_ids"]) for row in encoded) == 2
    tokenizer.add_tokens(["defg"])
    encoded = task.encode(tokenizer, Dataset.from_dict(SPLIT))
    assert Counting.seen == 15
    assert len(encoded[1]["input_ids"]) == 1


def test_the_number_of_classes_is_the_width_of_labels(tokenizer):
    rows = Dataset.from_dict({"text": ["abc", "de"], "label": [[0], [0, 1]]})
    for classes in (["x", "y"], ["x", "y", "z"]):
        encoded = MultiLabel(classes).encode(tokenizer, rows)
        assert [len(row["labels"]) for row in encoded] == [len(classes)] * 2


def test_attributes_of_the_tokenizer_beside_its_backend_are_dependencies(tokenizer):
    task, pair = Counting(classes=["x", "y"], max_length=2), {**SPLIT, "text_pair": ["a", "b", "c"]}
    assert task.encode(tokenizer, Dataset.from_dict(SPLIT))[0] != {}
    tokenizer.truncation_side = "left"
    encoded = task.encode(tokenizer, Dataset.from_dict(SPLIT))
    assert tokenizer.decode(encoded[1]["input_ids"]) == "fg"
    assert "token_type_ids" not in task.encode(tokenizer, Dataset.from_dict(pair)).column_names
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in task.encode(tokenizer, Dataset.from_dict(pair)).column_names


def test_a_selection_is_identified_by_its_rows(tokenizer):
    task = Counting(classes=["x", "y"])
    split = Dataset.from_dict(SPLIT)
    task.encode(tokenizer, split.select([2, 0]))
    task.encode(tokenizer, Dataset.from_dict({"text": ["hi", "abc"], "label": [0, 0]}))
    assert Counting.seen == 2


def test_rows_are_kept_in_memory_if_the_cache_is_not_writable(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "file" / "below"))
    encoded = CausalLM(max_length=4).encode(tokenizer, Dataset.from_dict(SPLIT))
    assert [len(row["input_ids"]) for row in encoded] == [4, 4, 3]
    assert not encoded.cache_files


def test_rows_are_kept_in_memory_if_the_disk_is_full(tokenizer, cache, monkeypatch, caplog):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding_cache, "note_digest", full)
    encoded = CausalLM(max_length=4).encode(tokenizer, Dataset.from_dict(SPLIT))
    assert [len(row["input_ids"]) for row in encoded] == [4, 4, 3]
    assert not encoded.cache_files
    assert "No space left" in caplog.text


def test_a_folder_in_place_of_the_rows_is_replaced(tokenizer, cache):
    task = Counting(classes=["x", "y"])
    task.encode(tokenizer, Dataset.from_dict(SPLIT))
    (file,) = (cache / "encoded").glob("*.arrow")
    file.unlink()
    file.mkdir()
    task.encode(tokenizer, Dataset.from_dict(SPLIT))
    assert (Counting.seen, file.is_file()) == (6, True)


@pytest.mark.thorough
def test_another_process_reads_the_cached_rows(tokenizer, cache):
    program = (
        "from datasets import Dataset\n"
        "from tiny_tokenizers import byte_tokenizer\n"
        "from petl.data.tasks.causal_lm import CausalLM\n"
        "tokenizer = byte_tokenizer(pad_token='<|im_end|>')\n"
        f"CausalLM().encode(tokenizer, Dataset.from_dict({SPLIT}))\n"
    )
    here = Path(__file__).parents[2] / "fixtures"
    subprocess.run([warm_python.python(), "-c", program], check=True, cwd=here, timeout=280)
    before = {file: file.stat().st_mtime_ns for file in (cache / "encoded").iterdir()}
    CausalLM().encode(tokenizer, Dataset.from_dict(SPLIT))
    assert {file: file.stat().st_mtime_ns for file in (cache / "encoded").iterdir()} == before
    assert len(before) == 2  # the rows and their digest
