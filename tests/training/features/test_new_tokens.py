"""Runs with new tokens: their rows train, and are saved with the tokenizer."""

import json
import shutil
import subprocess

import pytest
import torch
import warm_python
from peft import PeftModel
from training_fixtures import (
    Finished,
    assert_same_course,
    stopped_before,
    train,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import petl
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find, score
from petl.data.models.new_tokens import plain_of
from petl.errors import InputError
from petl.generation.inference.loading import load_language_model
from petl.testing import logits
from petl.training.retain.texts import texts_of

pytest_plugins = ["training_fixtures"]
TOKENS = ["<|tool|>", "very old", "of", "emu"]  # "of" is known
SETTING = f"data.new_tokens={json.dumps(TOKENS)}"
STEPS = ["train.lr=0.05", "train.save_steps=2", "train.keep_checkpoints=3"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    return train([*tiny.complete, "+method=mola", SETTING, *STEPS], folder)


def test_rows_tokenizer_and_task_are_saved_with_the_adapter(run):
    config = json.loads((run.path / "adapter/adapter_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run.path / "adapter")
    numbers = tokenizer.convert_tokens_to_ids(TOKENS)
    assert config["trainable_token_indices"] == {"model.embed_tokens": numbers, "lm_head": numbers}
    assert [len(tokenizer.tokenize(f"red {token} cat")) for token in TOKENS] == [3, 3, 3, 3]
    # a control token is none of an answer
    assert tokenizer.decode([numbers[0], numbers[3]], skip_special_tokens=True) == "emu"
    rows = {k: v.shape for k, v in run.adapter.items() if k.endswith("trainable_tokens_delta")}
    assert [*rows.values()] == [(4, 32), (4, 32)]
    assert json.loads((run.path / "adapter/task.json").read_text())["new_tokens"] == TOKENS


def test_a_saved_run_scores_as_it_did(run):
    assert score(find(run.path)) == pytest.approx(run.scores["after"], rel=1e-6)


@pytest.mark.thorough
def test_a_stopped_run_goes_on_to_the_bit(tiny, run, tmp_path):
    stopped = stopped_before(run, tmp_path / "stopped", "step_000004")
    words = [*tiny.complete, "+method=mola", SETTING, *STEPS, f"train.resume={stopped.path}"]
    resumed = train(words, stopped.path)
    assert_same_course(resumed, run, atol=0)


@pytest.mark.thorough
def test_the_code_of_the_card_loads_it(run, tiny, tmp_path):
    card = (run.path / "adapter/README.md").read_text().split("```python\n")[1].split("```")[0]
    code = card.replace("path/to/base_model", f"{tiny.folder}/llama").replace(
        'adapter = "."', f"adapter = {str(run.path / 'adapter')!r}"
    )
    script = tmp_path / "card.py"
    script.write_text(code.replace("max_new_tokens=64", "max_new_tokens=2"))
    line = [warm_python.python(), script]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_base_or_tokenizer_is_refused(run, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny.folder / "llama")
    with pytest.raises(petl.InputError):
        petl.load(base, run.path / "adapter")
    # in a base that grew in the same way, it computes as the run
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "llama")
    petl.add_tokens(base, tokenizer, TOKENS)
    loaded = petl.load(base, run.path / "adapter", adapter_name="other")
    batch = dict(tokenizer(["a red emu", "<|tool|> of"], padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    assert torch.equal(logits(loaded, batch), logits(find(run.path).model(), batch))


def test_an_adapter_without_a_row_for_its_token_is_refused(run, tmp_path):
    copied = shutil.copytree(run.path, tmp_path / "copied")
    file = copied / "adapter/tokenizer.json"
    file.write_text(file.read_text().replace("emu", "gnu"))
    with pytest.raises(petl.InputError, match="'emu'"):
        find(copied).model()


@pytest.mark.thorough
def test_it_generates_merges_and_is_refused_beside_others(run, tiny, tmp_path):
    plain = train([*tiny.complete, "+method=mola"], tmp_path / "plain")
    answer = load_language_model(run.path)
    assert answer.tokenizer.convert_tokens_to_ids("emu") == 21
    with pytest.raises(petl.InputError, match=r"<\|tool\|>"):
        load_language_model(run.path, {"plain": str(plain.path)})


@pytest.mark.thorough
def test_a_lora_with_rows_is_merged_and_a_method_of_petl_exported(tiny, tmp_path):
    words = [*tiny.complete, SETTING, "train.lr=0.05"]
    lora = train([*words, "+method=lora"], tmp_path / "lora")
    merged = merge(find(lora.path), tmp_path / "merged", None)
    assert merged.difference.relative < 1e-5
    mos = train([*words, "+method=mos", "method.r=2"], tmp_path / "mos")
    exported = export_lora(find(mos.path), tmp_path / "exported", None)
    assert exported.difference.relative < 1e-5
    # without petl, in a base that grew
    base = AutoModelForCausalLM.from_pretrained(tiny.folder / "llama")
    base.resize_token_embeddings(22, mean_resizing=False)
    batch = {"input_ids": torch.tensor([[19, 5, 20, 6, 21]])}
    found = PeftModel.from_pretrained(base, tmp_path / "exported")
    expected = logits(find(mos.path).model(), batch)
    torch.testing.assert_close(logits(found, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_what_was_lost_is_compared_with_the_base_as_it_was(tiny, tmp_path):
    words = [*tiny.complete, "+method=lora", SETTING, "retain.rows=4"]
    run = train([*words, f"retain.data={tiny.folder}/test.csv"], tmp_path / "run")
    texts = texts_of(f"{tiny.folder}/test.csv", "retain.data", 256)[:4]
    base = AutoModelForCausalLM.from_pretrained(tiny.folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "llama")
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :-1]
        with torch.no_grad():
            nats = base(input_ids=ids, labels=ids).loss.item()
        total, count = total + nats * (ids.numel() - 1), count + ids.numel() - 1
    assert run.scores["retained"]["loss_before"] == pytest.approx(total / count, rel=1e-5)
    model = find(run.path).model()
    extended = AutoTokenizer.from_pretrained(run.path / "adapter")
    assert plain_of(extended) is extended  # of another process
    with_base = petl.retained(model, texts, tokenizer, base=base)
    assert with_base.loss_before == pytest.approx(total / count, rel=1e-5)


@pytest.mark.thorough
def test_texts_with_new_tokens_are_measured_as_the_base_reads_them(tiny, tmp_path):
    texts = [f"the emu and a very old cat {n}" for n in range(9)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    words = [*tiny.complete, "+method=lora", SETTING, "retain.rows=9", f"retain.data={file}"]
    run = train(words, tmp_path / "run")
    shown = json.loads((run.path / "retained_tokens.json").read_text())
    assert {"".join(piece for piece, _ in each["pieces"]) for each in shown} <= {*texts}
    model = find(run.path).model()
    extended = AutoTokenizer.from_pretrained(run.path / "adapter")
    with pytest.raises(InputError):
        petl.retained(model, texts, extended)


@pytest.mark.cells(1)
@pytest.mark.parametrize("words", [["+method=lora"], ["+method=sparse"]])
def test_a_classifier_with_new_tokens_trains(tiny, tmp_path, words, petl_log):
    run = train([*tiny.steady, *words, SETTING], tmp_path / "run")
    assert score(find(run.path)) == pytest.approx(run.scores["after"], rel=1e-6)
    assert "of 3 new tokens" in petl_log.text
    assert "has of already" in petl_log.text


@pytest.mark.thorough
def test_a_run_starts_from_rows_of_another(tiny, run, tmp_path):
    words = [*tiny.complete, SETTING, f"train.init_from={run.path}", "train.lr=1e-9"]
    again = train(words, tmp_path / "again")
    for name, tensor in run.adapter.items():
        torch.testing.assert_close(again.adapter[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.thorough
def test_rows_do_not_decay(tiny, tmp_path):
    """A row that no step reads keeps its value, whatever the decay of weights."""
    words = [*tiny.steady, "+method=lora", 'data.new_tokens=["gnu"]', "train.weight_decay=1"]
    run = train([*words, "train.lr=0.05"], tmp_path / "run")
    rows = next(v for k, v in run.adapter.items() if k.endswith("trainable_tokens_delta"))
    base = AutoModelForSequenceClassification.from_pretrained(tiny.folder / "steady")
    row = base.get_input_embeddings().weight[1]
    assert torch.equal(rows[0], row)  # of [UNK], which it was divided into
