"""Runs of train.py over chats with images, with tiny models of four kinds."""

import json

import pytest
import torch
from image_text_fixtures import SOME_KINDS, built, run_of, save_picture
from training_fixtures import Finished, assert_same_course, launch, stopped_before, train

import petl
from petl.adapters.export import saved_adapter
from petl.adapters.export.merge import merge
from petl.data.tasks.image_text.prompt import Conversation
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["image_text_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("own_cache")
# accelerations that each run has where its model allows them
SLOW = [pytest.param(k, marks=pytest.mark.thorough) for k in ("gemma3", "smolvlm")]
PLAIN = [f"train.{name}" for name in ("loss_segment=null", "skip_unread=false", "fuse_lora=false")]


@pytest.fixture(scope="module")
def runs(bases, chats, tmp_path_factory):
    """A finished run of each kind, by its name."""
    found = {}

    def of(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("runs") / kind
            found[kind] = train([*run_of(bases[kind], chats), "data.generate=4"], folder)
        return found[kind]

    return of


@pytest.mark.cells(1)
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_run_learns_adapts_the_language_model_alone_and_scores_again(runs, kind):
    run = runs(kind)
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert losses[-1] < losses[0]
    assert run.scores["after"]["loss"] < run.scores["before"]["loss"]
    assert {"exact_match", "answers"} <= run.scores["after"].keys()
    assert not any("vision" in name or "visual" in name for name in run.adapter)
    again = saved_adapter.score(saved_adapter.find(run.path))
    assert again == pytest.approx(run.scores["after"], rel=1e-5)
    # predictions name the image, without its content
    lines = (run.path / "predictions.jsonl").read_text().splitlines()
    assert all("pictures/" in json.loads(line)["messages"][0]["more"] for line in lines)


@pytest.mark.cells(1)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", *SLOW])
def test_the_same_losses_without_accelerations_and_with_checkpointing(
    runs, bases, chats, tmp_path, kind
):
    given = run_of(bases[kind], chats)
    plain = train([*given, *PLAIN, "train.gradient_checkpointing=true"], tmp_path / "plain")
    assert_same_course(runs(kind), plain, atol=2e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_stopped_run_resumes_to_the_bit(runs, bases, chats, tmp_path, kind):
    stopped = stopped_before(runs(kind), tmp_path / "stopped", "step-000006")
    given = [*run_of(bases[kind], chats), "data.generate=4", "train.resume=auto"]
    resumed = train(given, stopped.path)
    assert_same_course(resumed, runs(kind), atol=0)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_merging_gives_the_outputs_of_the_adapter(runs, tmp_path, kind):
    run = runs(kind)
    assert merge(saved_adapter.find(run.path), tmp_path / "merged", None).difference.relative < 1e-5
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files


def test_a_saved_adapter_loads_on_a_base_of_ones_own(runs, bases):
    run = runs("llava")
    base = type(built("llava")[0]).from_pretrained(bases["llava"])
    model = petl.load(base, run.path / "adapter")
    merged = petl.load(type(base).from_pretrained(bases["llava"]), run.path / "adapter")
    saved = saved_adapter.find(run.path)
    batch = saved.batches()[0]
    with torch.no_grad():
        first = model(**batch).logits
        second = merged.merge_and_unload()(**batch).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
def test_two_processes_give_the_losses_of_one(runs, bases, chats, tmp_path):
    given = [*run_of(bases["llava"], chats), "data.generate=4", f"train.run={tmp_path / 'two'}"]
    done = launch(given, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_course(Finished(tmp_path / "two"), runs("llava"), atol=1e-5)


@pytest.mark.thorough
def test_rows_of_a_batch_without_any_image_train(bases, tmp_path):
    save_picture(tmp_path / "a.png", "red")
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    pictured = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}]
    rows = [{"conversations": turns}] * 6 + [{"image": "a.png", "conversations": pictured}] * 4
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    run = train([*run_of(bases["gemma3"], file), "train.batch_size=1"], tmp_path / "run")
    assert run.scores["after"]["loss"] < run.scores["before"]["loss"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["florence2", "t5gemma2"])
def test_an_encoder_decoder_learns_resumes_writes_and_merges(kind, bases, chats, tmp_path):
    given = [*run_of(bases[kind], chats), "data.generate=4", "method.target_modules=block-linear"]
    run = train(given, tmp_path / "run")
    assert run.scores["after"]["loss"] < run.scores["before"]["loss"]
    saved = saved_adapter.find(run.path)
    assert saved_adapter.score(saved) == pytest.approx(run.scores["after"], rel=1e-5)
    stopped = stopped_before(run, tmp_path / "stopped", "step-000006")
    assert_same_course(train([*given, "train.resume=auto"], stopped.path), run, atol=0)
    assert merge(saved, tmp_path / "merged", None).difference.relative < 1e-5
    # as in training: greedily, after each question with its image
    expected = [json.loads(line) for line in (run.path / "predictions.jsonl").open()]
    model = load_language_model(run.path)
    for line in expected:
        asked = [{"role": "user", "content": "Which color?", "more": line["messages"][0]["more"]}]
        (image,) = [p for p in chats.parent.glob("pictures/*") if p.name in asked[0]["more"]]
        prompt = model.encode(Conversation(asked, (str(image),)))
        assert model.answer([prompt], Sampling(max_new_tokens=4))[0].text == line["prediction"]


@pytest.mark.thorough
def test_vl_pet_trains_on_images_and_text(bases, chats, tmp_path):
    """The task of its paper: an encoder of question and image, and a decoder of the answer."""
    given = [word for word in run_of(bases["florence2"], chats) if not word.startswith("method")]
    given = [word.replace("+method=lora", "+method=vl_pet") for word in given]
    run = train([*given, "method.r=4"], tmp_path / "run")
    assert run.scores["after"]["loss"] < run.scores["before"]["loss"]
    assert any("encoder" in name for name in run.adapter)
    assert not any("vision" in name for name in run.adapter)
    again = saved_adapter.score(saved_adapter.find(run.path))
    assert again == pytest.approx(run.scores["after"], rel=1e-5)
