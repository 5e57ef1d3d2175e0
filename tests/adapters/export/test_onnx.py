"""Models in ONNX: outputs at other sizes, what is beside the graph, what is refused."""

from pathlib import Path
from shutil import copyfile

import pytest
import torch
from export_fixtures import adapted, save_stirred
from image_text_fixtures import built
from media_fixtures import AST, VIT, audio, images
from run_page import blocks
from tiny_tokenizers import byte_tokenizer
from training_fixtures import bert_config, train, words, write_model
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
)
from writer_fixtures import adapt

import petl
from petl import testing
from petl.adapters.export import onnx
from petl.adapters.export.lora import export_lora
from petl.adapters.export.onnx import FILE, Session, export_onnx
from petl.adapters.export.saved_adapter import find
from petl.data.tasks.base import write_task
from petl.data.tasks.image_text import ImageText
from petl.errors import InputError, RunStopped, UnsupportedError

pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install 'petl-peft[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'petl-peft[onnx]'")
pytest_plugins = ["export_fixtures", "media_fixtures", "training_fixtures"]
pytestmark = pytest.mark.thorough  # the exporter of torch takes long

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "gguf-and-onnx.md"


def code(title: str) -> str:
    """A program of the page."""
    (found,) = [block.code for block in blocks(PAGE.read_text()) if block.file == title]
    return found


def ragged(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens of `rows` texts that get shorter by one."""
    ids = torch.randint(5, len(words()), (rows, length))
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def classifier(lora_run, tmp_path_factory) -> Path:
    """A folder with the exported classifier `onnx`."""
    folder = tmp_path_factory.mktemp("classifier")
    written = export_onnx(find(lora_run.path), folder / "onnx", None)
    assert written.difference.relative < 1e-5 < written.difference.effect
    return folder


def test_a_classifier_runs_without_torch_at_any_size(classifier, lora_run, monkeypatch, capsys):
    session, model = Session(classifier / "onnx" / FILE), find(lora_run.path).model()
    for rows, length in ((1, 1), (3, 30), (5, 7)):
        batch = ragged(rows, length)
        with torch.no_grad():
            expected = model(**{k: t.to(model.device) for k, t in batch.items()}).logits.cpu()
        torch.testing.assert_close(session(**batch)["logits"], expected, rtol=1e-4, atol=1e-5)
    # the program of the documentation
    monkeypatch.chdir(classifier)
    exec(code("classify.py"), {})
    labels = AutoConfig.from_pretrained("onnx").id2label
    tokens = AutoTokenizer.from_pretrained("onnx")(
        ["a fine film", "dull from start to end"], padding=True, return_tensors="pt"
    )
    inputs = {k: tokens[k].to(model.device) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1).tolist()
    assert eval(capsys.readouterr().out) == [labels[i] for i in best]
    assert not any(label.startswith("LABEL") for label in labels.values())


def test_an_adapter_without_its_run_tells_two_texts_apart(tmp_path):
    names = ["input_ids", "attention_mask", "token_type_ids"]
    write_model(
        tmp_path / "bert", BertForSequenceClassification, bert_config(), model_input_names=names
    )
    base = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    saved = save_stirred(base, "lora", tmp_path / "adapter", task_type="SEQ_CLS")
    export_onnx(find(saved), tmp_path / "onnx", None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    pair = tokenizer(["red cat"], ["green axe"], return_tensors="pt")
    assert pair["token_type_ids"].any()
    session, model = Session(tmp_path / "onnx" / FILE), adapted(saved)
    assert sorted(given.name for given in session.session.get_inputs()) == sorted(names)
    with torch.no_grad():
        expected = model(**{name: t.to(model.device) for name, t in pair.items()}).logits.cpu()
    torch.testing.assert_close(session(**pair)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_is_the_mean_over_the_tokens(tmp_path, monkeypatch, capsys):
    config = bert_config()
    config.vocab_size = 264
    BertModel(config).save_pretrained(tmp_path / "base")
    byte_tokenizer(model_max_length=40).save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    fields = {"r": 3, "task_type": "FEATURE_EXTRACTION"}
    saved = save_stirred(base, "mos", tmp_path / "adapter", **fields)
    export_onnx(find(saved), tmp_path / "onnx", None)
    batch = ragged(3, 9)
    found = Session(tmp_path / "onnx" / FILE)(**batch)
    model = adapted(saved)
    for row, length in enumerate((9, 8, 7)):
        alone = batch["input_ids"][row : row + 1, :length].to(model.device)
        with torch.no_grad():
            hidden = model(input_ids=alone).last_hidden_state[0].cpu()
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found["token_embeddings"][row, :length], hidden, **close)
        torch.testing.assert_close(found["sentence_embedding"][row], sum(hidden) / length, **close)
    export_lora(find(saved), tmp_path / "lora", None)  # other formats know these adapters as well
    assert "last_hidden_state" in (tmp_path / "lora" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    start = code("classify.py").partition("tokens = ")[0].replace('["id2label"]', "")
    exec(start + code("embed.py"), {})
    assert "cosine similarity" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "auto_class", "task_type"),
    [
        ("bert", AutoModelForTokenClassification, "TOKEN_CLS"),
        ("bert", AutoModelForQuestionAnswering, "QUESTION_ANS"),
        ("llama", AutoModelForSequenceClassification, "SEQ_CLS"),
    ],
)
def test_other_heads_and_decoders(kind, auto_class, task_type, tmp_path):
    config = {"bert": testing.tiny_bert, "llama": testing.tiny_llama}[kind]().config
    config.vocab_size, config.pad_token_id, config.num_labels = 264, 0, 2
    auto_class.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer(model_max_length=40).save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base")
    saved = save_stirred(base, "sparse", tmp_path / "adapter", task_type=task_type)
    written = export_onnx(find(saved), tmp_path / "onnx", None)
    assert written.difference.relative < 1e-5 < written.difference.effect


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "sound"])
def test_images_and_sounds(kind, pictures, sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    run = [*VIT, *images(pictures)] if kind == "image" else [*AST, *audio(sounds)]
    train([*run, "+method=lora"], tmp_path / "run")
    written = export_onnx(find(tmp_path / "run"), tmp_path / "onnx", None)
    assert written.difference.relative < 1e-4
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()


def test_a_graph_with_other_outputs_is_not_kept(classifier, lora_run, tmp_path, monkeypatch):
    graph, call = classifier / "onnx" / FILE, Session.__call__
    monkeypatch.setattr(onnx, "write_graph", lambda model, batch, file: copyfile(graph, file))
    scaled = lambda self, **batch: {n: t * 1.01 for n, t in call(self, **batch).items()}  # noqa: E731
    monkeypatch.setattr(Session, "__call__", scaled)
    with pytest.raises(RunStopped):
        export_onnx(find(lora_run.path), tmp_path / "onnx", None)
    assert not (tmp_path / "onnx").exists()


def test_methods_that_do_not_merge_and_models_that_generate_are_refused(
    mola_run, tmp_path, monkeypatch
):
    with pytest.raises(UnsupportedError):
        export_onnx(find(mola_run.path), tmp_path / "onnx", None)
    testing.tiny_llama(2, vocabulary=264).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    model = petl.wrap(testing.tiny_llama(2), "lora", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "llama")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError):
        export_onnx(find(tmp_path / "adapter"), tmp_path / "onnx", None)
    for part in built("llava"):
        part.save_pretrained(tmp_path / "llava")
    kind = type(built("llava")[0])
    adapt(kind, tmp_path / "llava", "lora", "CAUSAL_LM", tmp_path / "of_images", 0)
    write_task(tmp_path / "of_images", ImageText(max_length=256))
    with pytest.raises(UnsupportedError) as refused:
        export_onnx(find(tmp_path / "of_images"), tmp_path / "onnx", None)
    assert "gguf" not in str(refused.value)  # which refuses it too
    monkeypatch.setattr("petl.system.imports.extras.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\[onnx\]"):
        export_onnx(find(mola_run.path), tmp_path / "onnx", None)
    assert not (tmp_path / "onnx").exists()
