import pytest
from tiny_tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """petl's cache, apart from the one of whoever runs the tests."""
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "petl-cache"))
    return tmp_path / "petl-cache"


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<|im_end|>")
