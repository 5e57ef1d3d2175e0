"""Training of drafters from settings: prompts, the folder, and what is refused."""

import json
from shutil import copytree

import pytest
import torch
from kept_processes import in_processes
from safetensors.torch import load_file
from writer_fixtures import PROMPTS

from petl import testing
from petl.efficiency.drafting import Costs, Stats
from petl.efficiency.drafting.lookup import LookupFirst
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.draft_training import DraftSettings, train_drafter
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.system.files.disk import remove
from petl.training.compose import compose

pytest_plugins = ["writer_fixtures"]
QUICK = ["draft.tokens=12", "draft.epochs=2", "drafter.heads=2", "drafter.draft_vocab=60"]


@pytest.fixture
def file(tmp_path):
    rows = [{"prompt": f"{text} {i}"} for i in range(5) for text in PROMPTS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def settings(*words):
    return compose(["+drafter=hydra", *QUICK, *words], "draft")


@pytest.mark.thorough
def test_a_drafter_is_trained_written_and_used_behind_lookup(writers, file):
    folder = writers.folder / "lora"
    try:
        words = ["draft.answers=11", "draft.measured=3", f"draft.file={file}"]
        result = train_drafter(folder, settings(*words))
        assert result.folder == folder / "drafter"
        assert {path.name for path in result.folder.iterdir()} == {
            "drafter_config.json", "drafter_model.safetensors", "README.md",
        }  # fmt: skip
        config = json.loads((result.folder / "drafter_config.json").read_text())
        assert config["fields"]["heads"] == 2
        assert {*config["hashes"]} == {"base", "adapter", "tokenizer"}
        assert config["frequencies"] == result.frequencies
        assert result.answers == 11
        assert result.alone.answers == result.behind_lookup.answers == 3
        page = (result.folder / "README.md").read_text()
        assert f"{result.behind_lookup.tokens_per_pass:.2f} behind `lookup`" in page
        assert "heads=2" in page
        model, plain = writers.load("lora"), load_language_model(folder, drafting="none")
        assert isinstance(model.drafter, LookupFirst)
        alone = load_language_model(folder, drafting=str(result.folder))
        assert alone.drafter.name == "hydra"
        model.drafter.costs = alone.drafter.costs = Costs({1: 1.0, 8: 1.0})
        stats = Stats()
        for each in (model, alone):
            for sampling in (
                Sampling(max_new_tokens=20),
                Sampling(max_new_tokens=20, temperature=1.0),
            ):
                for prompt in PROMPTS:
                    found = []
                    for one in (each, plain):
                        torch.manual_seed(0)
                        with one.using("default"):
                            found += one.answer([one.encode(prompt)], sampling, stats=stats)
                    assert found[0] == found[1]
        assert stats.drafted > 0
        # once more: it is replaced, and the same
        before = (result.folder / "drafter_model.safetensors").read_bytes()
        train_drafter(folder, settings(*words))
        assert (result.folder / "drafter_model.safetensors").read_bytes() == before
    finally:
        remove(folder / "drafter")


@pytest.mark.thorough
@pytest.mark.parametrize("source", ["decode", "answers"])
def test_a_table_is_filled_and_used_behind_lookup(writers, file, source):
    folder = writers.folder / "lora"
    words = ["drafter.k=4", "draft.answers=11", "draft.measured=3", "draft.tokens=12"]
    words += [f"draft.file={file}", f"draft.source={source}"]
    try:
        result = train_drafter(folder, compose(["+drafter=recycling", *words], "draft"))
        assert result.loss is None
        assert result.answers == 11
        config = json.loads((result.folder / "drafter_config.json").read_text())
        assert config["fields"]["k"] == 4
        assert {*config["hashes"]} == {"tokenizer"}
        assert config["frequencies"] == result.frequencies
        table = load_file(result.folder / "drafter_model.safetensors")["table"]
        assert table.shape == (260, 4)
        assert (table >= 0).any()
        page = (result.folder / "README.md").read_text()
        assert f"Filled with 11 answers of that model, {result.tokens} tokens." in page
        assert "| depth | 1 |" in page
        model, plain = writers.load("lora"), load_language_model(folder, drafting="none")
        assert torch.equal(model.drafter.drafter.table, table)
        for prompt in PROMPTS:
            found = []
            for one in (model, plain):
                with one.using("default"):
                    found += one.answer([one.encode(prompt)], Sampling(max_new_tokens=20))
            assert found[0] == found[1]
    finally:
        remove(folder / "drafter")


@pytest.mark.thorough
def test_fewer_prompts_than_wanted_are_divided(writers, file, caplog):
    folder = writers.folder / "mola"
    try:
        words = ["draft.measured=2", f"draft.file={file}", "draft.temperature=0.7"]
        result = train_drafter(folder, settings(*words))
        torch.rand(1)  # answers are drawn with draft.seed, whatever was drawn before
        again = train_drafter(folder, settings(*words))
        assert (again.tokens, again.loss) == (result.tokens, result.loss)
        assert (result.answers, result.alone.answers) == (13, 2)
        said = f"the 13 answers have {result.tokens} tokens"
        assert said in caplog.text
        assert "raise draft.answers" in caplog.text
    finally:
        remove(folder / "drafter")


def train_in_a_process(folder, words):
    """Train a drafter in one of several processes, and return what it was told."""
    result = train_drafter(folder, settings(*words))
    return torch.distributed.get_world_size(), result


@pytest.mark.thorough
def test_two_processes_write_the_drafter_of_one(writers, file, tmp_path):
    words = ["draft.measured=2", f"draft.file={file}", "draft.batch_size=4"]
    for name in ("one", "two"):
        copytree(writers.folder / "lora", tmp_path / name)
    alone = train_drafter(tmp_path / "one", settings(*words))
    results = in_processes(2, train_in_a_process, tmp_path / "two", words)
    assert [size for size, _ in results] == [2, 2]
    (_, first), (_, second) = results
    assert first.loss == alone.loss
    assert first.frequencies == alone.frequencies
    assert second is None  # the first trains and writes
    for name in ("drafter_config.json", "drafter_model.safetensors"):
        one, two = (tmp_path / place / "drafter" / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_lookup_comes_first_and_the_heads_go_on_behind_it():
    from draft_fixtures import PAD, prompt

    from petl.efficiency.drafting import Root, decode, drafter

    model, ids = testing.tiny_llama(), prompt(1)
    heads = drafter("hydra", model=model, prefix=True, template=[[0], [0, 0]])
    first = LookupFirst(heads)
    plain = model.generate(ids, max_new_tokens=50, pad_token_id=PAD, use_cache=True)
    own = {"max_new_tokens": 50, "pad_token_id": PAD, "use_cache": True, "switch": False}
    found = model.generate(ids, **own, custom_generate=decode, drafter=first)
    assert torch.equal(found, plain)
    # the prefix layer has read all tokens but the last, whoever drafted
    assert heads.reader.known == len(found[0]) - 1
    text = [5, 6, 7, 8, 5, 6]
    first.start(text, torch.zeros(6, 64))
    assert first.draft(Root(text, torch.zeros(64)), None).tokens.tolist()[0] == 7
    assert len(first.draft(Root([*text, 9], torch.zeros(64)), None).tokens) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "draft.file=None"),
        (["draft.file={rows}", "draft.source=decode"], "hydra"),
        (["draft.source=texts"], "draft.source='texts'.* decode"),
        (["draft.file=none.jsonl"], "none.jsonl"),
        (["drafter.heads=9", "draft.file=x"], "heads=9 .* 8"),
        (["draft.tokens=0"], "draft.tokens=0"),
        (["draft.lr=0"], "draft.lr=0.0"),
        (["draft.target=firm"], "draft.target"),
        (["++draft.token=3"], "draft.token; .*'tokens'"),
        (["drafter.name=lookup"], "lookup"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(writers, file, words, message):
    words = [word.format(rows=file) for word in words]
    with pytest.raises(InputError, match=message):
        train_drafter(writers.folder / "lora", settings(*words))
    assert not (writers.folder / "lora" / "drafter").exists()


def test_what_has_no_drafter_is_refused(writers, file):
    with pytest.raises(InputError):
        train_drafter(writers.folder / "lora", compose([], "draft"))
    with pytest.raises(UnsupportedError):
        train_drafter(writers.folder / "t5-lora", settings(f"draft.file={file}"))


def test_the_yaml_has_the_defaults_of_the_settings():
    listed = compose([], "draft").draft
    assert dict(listed) == vars(DraftSettings())
