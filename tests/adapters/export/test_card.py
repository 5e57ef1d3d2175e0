"""Exports have processor, names of labels, generation config and a card whose code predicts."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from task_runs import ON_MEDIA, ON_TEXTS, executed
from training_fixtures import Finished
from transformers import AutoTokenizer, GenerationConfig, pipeline

from petl import testing
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import SavedAdapter, find
from petl.core.auto_classes import read_labels
from petl.training.runs.model_card import PIPELINES

pytest_plugins = ["task_runs"]

NAMES = {
    "classification": ["beast", "color", "tool"],
    "token_classification": ["B-beast", "B-color", "O"],
    "image_classification": ["blue", "red"],
    "audio_classification": ["high", "low"],
}
INPUTS = {  # of transformers' pipelines, which it has for these tasks
    "classification": "the red dog",
    "regression": {"text": "the red dog", "text_pair": "old"},
    "token_classification": "the red dog",
    "causal_lm": "the red",
    "chat": [{"role": "user", "content": "the red dog"}],
    "image_classification": Image.new("RGB", (16, 16)),
    "audio_classification": torch.zeros(8000).numpy(),
}


@dataclass(frozen=True)
class Exported:
    """A run, and the folders of its adapter as a plain LoRA and merged."""

    run: Finished
    lora: Path
    merged: Path

    @property
    def saved(self) -> SavedAdapter:
        return find(self.run.path)


@pytest.fixture(scope="module")
def exported(task_runs, tmp_path_factory):
    made = {}

    def export(task):
        if task not in made:
            folder, run = tmp_path_factory.mktemp(task), task_runs(task)
            made[task] = Exported(run, folder / "lora", folder / "merged")
            export_lora(find(run.path), folder / "lora", None)
            merge(find(run.path), folder / "merged", None)
        return made[task]

    return export


def logits(model, saved):
    batch = saved.batches()[0]
    model.to(next(iter(batch.values())).device)
    if saved.task.name == "question_answering":
        return model(**batch).start_logits
    return testing.logits(model, batch)


QUICK = ("classification", "chat", "image_classification")


def params(tasks):
    """Tasks as parameters of a test; all but a few are slow."""
    slow = pytest.mark.slow
    return [task if task in QUICK else pytest.param(task, marks=slow) for task in tasks]


@pytest.mark.thorough
@pytest.mark.parametrize("task", params([*ON_TEXTS, *ON_MEDIA]))
def test_the_code_of_cards_loads_and_predicts(task, exported, capsys):
    made = exported(task)
    expected = logits(made.saved.model(), made.saved)
    capsys.readouterr()
    printed = set()
    for folder in (made.run.path / "adapter", made.lora, made.merged):
        names = executed(folder, made.saved.settings["model"].get("path"))
        printed.add(capsys.readouterr().out)
        found = logits(names["model"], made.saved)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (text,) = printed  # the same prediction of all three
    if task == "token_classification":
        assert {label for _, label in eval(text)} <= {*NAMES[task]}
    elif task in NAMES:
        assert text.strip() in NAMES[task]
    elif task == "regression":
        assert float(text) == pytest.approx(float(text))


@pytest.mark.parametrize("task", params(INPUTS))
def test_a_pipeline_of_transformers_takes_a_merged_model(task, exported):
    merged = exported(task).merged
    name = "causal_lm" if task == "chat" else task
    generation = {"generation_config": GenerationConfig(max_new_tokens=4)}
    options = generation if name == "causal_lm" else {}
    answer = pipeline(PIPELINES[name], model=str(merged), device="cpu")(INPUTS[task], **options)
    if name == "causal_lm":
        assert answer[0]["generated_text"]
        return
    rows = [answer] if isinstance(answer, dict) else answer
    names = NAMES.get(task, ["number"])  # of a regression
    assert {row.get("label", row.get("entity")) for row in rows} <= {*names}


@pytest.mark.parametrize("task", params(NAMES))
def test_names_of_labels_are_kept(task, exported):
    made = exported(task)
    config = json.loads((made.merged / "config.json").read_text())
    assert [*config["id2label"].values()] == NAMES[task]
    assert [*read_labels(made.lora)["id2label"].values()] == NAMES[task]
    if task in ("classification", "token_classification"):  # as an adapter without its run
        assert find(made.lora).task.labels == NAMES[task]


def test_a_chat_model_keeps_template_and_generation_config(exported, tmp_path):
    made = exported("chat")
    base = shutil.copytree(made.saved.settings["model"]["path"], tmp_path / "base")
    # transformers refuses to save values without effect, which published models have
    kept = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 1]}
    (base / "generation_config.json").write_text(json.dumps(kept))
    merge(replace(made.saved, settings=at(made.saved, base)), tmp_path / "out", None)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written[key] for key in kept} == kept
    assert written["pad_token_id"] == 0
    for folder in (made.run.path / "adapter", made.lora, made.merged):
        template = AutoTokenizer.from_pretrained(folder).chat_template
        assert template == AutoTokenizer.from_pretrained(base).chat_template


def at(saved, folder):
    return {**saved.settings, "model": saved.model_at(folder)}
