"""Other libraries take an adapted model: the code of the page, with tiny models and local data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_page import blocks
from tiny_tokenizers import byte_tokenizer
from training_fixtures import bert_config
from transformers import BertModel

import petl
from petl import testing
from petl.errors import UnsupportedError

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "harnesses.md").read_text()


def code(word: str) -> str:
    """The one python block with a word in it."""
    found = [block.code for block in blocks(PAGE) if block.language == "python"]
    (chosen,) = [source for source in found if word in source]
    return chosen


@pytest.mark.slow  # importing lm_eval takes as long as the test
@pytest.mark.parametrize(("name", "fields"), [("mola", {}), ("mos", {"r": 3})])
def test_lm_evaluation_harness(name, fields, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install 'petl-peft[harness]'")
    monkeypatch.chdir(tmp_path)
    testing.tiny_llama(2, vocabulary=264).save_pretrained("BASE")
    byte_tokenizer(pad_token="<unk>").save_pretrained("BASE")
    for block in blocks(PAGE):
        if block.file:
            Path(block.file).parent.mkdir(exist_ok=True)
            Path(block.file).write_text(block.code)
    wrapped = petl.wrap(testing.tiny_llama(2, vocabulary=264), name, **fields)
    testing.stir(wrapped).save_pretrained("runs/my-run/adapter")
    # the task of the page's end in place of one from a hub
    first = code("HFLM(").replace('tasks=["hellaswag"]', 'tasks=["sums"], task_manager=own')
    space: dict[str, Any] = {"petl": petl}
    imports, task = code("TaskManager(").splitlines()[0], code("TaskManager(").splitlines()[2]
    exec(f"{imports}\n{task}\n{first}", space)
    assert space["results"]["results"]["sums"]["acc,none"] in (0, 0.5, 1)
    exec(code("TaskManager("), space)

    def scores() -> list[float]:
        found = space["lm_eval"].simple_evaluate(
            space["harness"], tasks=["sums"], task_manager=space["own"], bootstrap_iters=0
        )
        answers = [sample["filtered_resps"] for sample in found["samples"]["sums"]]
        return [answer[0] for row in answers for answer in row]

    # log-probabilities of the answers, by the model itself
    tokenizer = byte_tokenizer()
    expected = []
    for question, answer in [
        ("2 + 3 =", "4"),
        ("2 + 3 =", "5"),
        ("1 + 1 =", "2"),
        ("1 + 1 =", "3"),
    ]:
        asked = tokenizer(question)["input_ids"]
        ids = torch.tensor([tokenizer(f"{question} {answer}")["input_ids"]])
        with torch.no_grad():
            logits = space["model"](input_ids=ids).logits.log_softmax(-1)
        later = range(len(asked), ids.shape[1])
        expected.append(sum(float(logits[0, i - 1, ids[0, i]]) for i in later))
    assert scores() == pytest.approx(expected, rel=1e-4)
    with space["model"].disable_adapter():
        assert scores() != pytest.approx(expected, rel=1e-4)


@pytest.mark.cells(1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "reads_alone"), [("mola", True), ("adapter", True), ("mos", False)]
)
def test_sentence_transformers(name, reads_alone, tmp_path, monkeypatch):
    library: Any = pytest.importorskip(
        "sentence_transformers", minversion="6", reason="sentence-transformers 6 is missing"
    )
    monkeypatch.chdir(tmp_path)
    config = bert_config()
    config.vocab_size = 264
    BertModel(config).save_pretrained("BASE")
    byte_tokenizer(model_max_length=40, pad_token="<unk>").save_pretrained("BASE")
    short = 'max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True'
    source = code("SentenceTransformerTrainer(").replace("max_steps=100", short)
    assert short in source
    source = source.replace('"mola"', f'"{name}"' + (", r=3" if name == "mos" else ""))
    texts = ["a fine film", "dull"]
    before = library.SentenceTransformer("BASE", device="cpu").encode(texts)
    left: dict[str, Any] = {}
    exec(source, left)
    trained = left["embedder"].cpu().encode(texts)
    assert abs(trained - before).max() > 1e-4
    assert not (tmp_path / "embedder" / "model.safetensors").exists()
    again: dict[str, Any] = {**left}
    exec(code("petl.load(embedder"), again)
    assert again["embedder"].encode(texts) == pytest.approx(trained, abs=1e-5)
    if reads_alone:  # also the folder of an adapter of transformers alone
        alone = library.SentenceTransformer("embedder", device="cpu").encode(texts)
        assert alone == pytest.approx(trained, abs=1e-5)
        byte_tokenizer(model_max_length=40, pad_token="<unk>").save_pretrained("adapter")
        left["embedder"][0].model.save_pretrained("adapter")
        alone = library.SentenceTransformer("adapter", device="cpu").encode(texts)
        assert alone == pytest.approx(trained, abs=1e-5)
    else:
        with pytest.raises(UnsupportedError):
            library.SentenceTransformer("embedder", device="cpu")
