import pytest
from tiny_tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A temporary cache folder of petl, in place of the user's."""
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "petl-cache"))
    return tmp_path / "petl-cache"


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<|im_end|>")
