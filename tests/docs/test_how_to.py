"""Code of how-to pages runs as it stands there, on tiny models, only shorter."""

import io
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from image_text_fixtures import save_picture, write_rows
from run_page import blocks
from tiny_tokenizers import byte_tokenizer
from training_fixtures import CLASSES, train

import petl
from petl import testing
from petl.cli.main import main

pytest_plugins = ["image_text_fixtures", "training_fixtures"]

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def code(page: str, word: str) -> str:
    """The one python block of a page that has `word` in it."""
    text = (HOW_TO / f"{page}.md").read_text()
    found = [block.code for block in blocks(text) if block.language == "python"]
    (chosen,) = [source for source in found if word in source]
    return chosen


def run(source: str, **names: Any) -> dict[str, Any]:
    """The names that a block leaves behind."""
    space: dict[str, Any] = {"petl": petl, **names}
    exec(source, space)
    return space


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = [torch.randint(5, 60, (2, 10)) for _ in range(count)]
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def test_adapters_on_experts():
    base = testing.OTHER_MODELS["qwen3_moe"].base()
    model = run(code("adapt-experts", "mola"), base=base)["model"]
    assert any("experts.linears" in name for name in testing.tuner_layers(model))


def test_the_hand_written_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = run(code("own-loop", "petl.wrap"), base=testing.tiny_llama(2), batches=batches(4))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    model, life = left["model"], left["life"]
    run(code("own-loop", "aux_weight"), life=life, accumulation_steps=2)
    assert life.aux_weight == 0.5
    run(code("own-loop", "attach("), model=model)
    run(code("own-loop", "recompute_mlp"), model=model)
    model(**batches(1)[0]).loss.backward()


def test_frozen_blocks_are_computed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": torch.tensor([7, 8, 9 + i]), "labels": torch.tensor(0)} for i in range(4)]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    source = code("train-the-upper-blocks", "cache_frozen(model")
    source = source.replace("...  # your loop", "model(**collate(train_rows))  # your loop")
    names = {"train_rows": rows[:3], "test_rows": rows[3:], "collate": collate}
    run(source, base=testing.tiny_bert(), **names)
    assert capsys.readouterr().out == "1 0 \n"
    assert len(list((tmp_path / "frozen").iterdir())) == 2


def test_predict_and_evaluate(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train([*tiny.steady, "+method=lora", "train.steps=2"], Path("runs/tickets"))
    Path("new.csv").write_text("review\nthe red cat\nan old saw\n")
    shutil.copy(tiny.folder / "test.csv", "july.csv")
    run(code("predict-and-evaluate", "petl.predict"))
    label, probability = capsys.readouterr().out.split()[-2:]
    assert label in CLASSES
    assert 1 / len(CLASSES) <= float(probability) <= 1


def test_ranks_by_importance():
    base = testing.tiny_llama(3)
    left = run(code("ranks-by-importance", "allocate"), base=base, batches=batches(2))
    assert sum(left["ranks"].values()) == 3 * 8
    layers = left["model"].get_base_model().model.layers
    ranks = [layer.self_attn.q_proj.r["default"] for layer in layers]
    assert ranks == list(left["ranks"].values())


@pytest.mark.thorough
def test_compress_and_combine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        made = testing.stir(petl.wrap(testing.tiny_llama(2), "lora", r=3))
        made.save_pretrained(f"adapters/{name}")
    run(code("compress-and-combine", "expand"))
    for folder in ("plain", "thin", "both", "small"):
        petl.load(testing.tiny_llama(2), folder)
    left = run(code("compress-and-combine", "petl.search"))
    assert left["found"].fitness <= left["found"].history[0].fitness
    assert petl.search.Evolution.load("search.json") == left["found"]


def test_several_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("french", "legal"):
        made = testing.stir(petl.wrap(testing.tiny_llama(2), "mos", r=3))
        made.save_pretrained(f"adapters/{name}")
    left = run(code("several-adapters", "import petl"), base=testing.tiny_llama(2))
    assert set(left["model"].peft_config) == {"legal"}


@pytest.mark.thorough
def test_train_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = code("train-together", "petl.train_together").replace('"steps": 300', '"steps": 2')
    left = run(source, base=testing.tiny_llama(2), batches=batches(2))
    losses = [trained.losses for trained in petl.train_together(left["base"], left["jobs"])]
    assert losses[0] != losses[1]
    for lr in (3e-4, 1e-3, 3e-3):
        for seed in (0, 1):
            petl.load(testing.tiny_llama(2), f"adapters/{lr}-{seed}")


def test_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{k: v[0] for k, v in batch.items()} for batch in batches(8)]
    source = code("trainer-and-trl", "TrainingArguments")
    options = 'report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"'
    source = source.replace("max_steps=100", f"max_steps=2, {options}")
    source = source.replace("SEQ_CLS", "CAUSAL_LM")
    left = run(source, base=testing.tiny_llama(2), train_dataset=rows)
    assert left["trainer"].state.global_step == 2


def test_preference_tuning(tmp_path, monkeypatch):
    """Before the first step the model is its own reference."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    short = 'max_steps=3, use_cpu=True, bf16=False, report_to="none", save_strategy="no"'
    source = code("trainer-and-trl", "DPOTrainer").replace("max_steps=100", short)
    assert short in source
    pairs = [{"prompt": "what? ", "chosen": f"a fox {i}", "rejected": "no"} for i in range(24)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    tokenizer = byte_tokenizer(pad_token="<unk>")
    base: Callable[[], Any] = lambda: testing.tiny_llama(2, vocabulary=260)  # noqa: E731
    left = run(source, base=base(), tokenizer=tokenizer)
    first, *_, last = [line for line in left["trainer"].state.log_history if "loss" in line]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["rewards/margins"] > first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    again = petl.load(base(), tmp_path / "adapter").eval()
    batch = {"input_ids": torch.arange(5, 15)[None]}
    torch.testing.assert_close(again(**batch).logits, left["model"].eval()(**batch).logits)


@pytest.mark.parametrize("name", ["SFT", "KTO", "GRPO", "Reward"])
def test_other_trainers_of_trl(name, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    short = 'max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no"'
    source = code("trainer-and-trl", f"{name}Trainer(").replace("max_steps=100", short)
    source = source.replace("num_generations=8", "max_completion_length=3")
    assert short in source
    rows = {
        "examples": {"prompt": "what? ", "completion": "a fox"},
        "pairs": {"chosen": "a fox", "rejected": "no"},
        "marked": {"prompt": "what? ", "completion": "a fox", "label": True},
        "prompts": {"prompt": "what? "},
    }
    for file, row in rows.items():
        Path(f"{file}.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    base = testing.tiny_llama(2, vocabulary=260)
    base.save_pretrained("base")
    names = {"NAME": "base", "load_dataset": load_dataset}  # of an earlier block of the page
    left = run(source, base=base, tokenizer=byte_tokenizer(pad_token="<unk>"), **names)
    left["trainer"].train()
    assert left["trainer"].state.global_step == 2


def test_faster_answers(monkeypatch, tmp_path):
    from petl.efficiency.drafting import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "DRAFTERS", {**registry.DRAFTERS})
    model = testing.tiny_llama(2)
    ids = torch.arange(5, 15)[None]
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "use_cache": True, "do_sample": False}
    plain = model.generate(ids, **settings)
    left = run(
        code("faster-answers", "tokens_per_pass"),
        model=model,
        inputs={"input_ids": ids, **settings},
    )
    assert left["stats"].tokens == 20
    pair = {"model": testing.tiny_t5(), "inputs": {"input_ids": ids, **settings}}
    left = run(code("faster-answers", 'drafter="aggressive"'), **pair)
    assert 0 < left["stats"].tokens <= 20
    given = {"model": model, "inputs": {"input_ids": ids}, "tokenizer": byte_tokenizer()}
    trained = run(code("faster-answers", "drafting.fit"), **given)
    more = {"custom_generate": petl.drafting.decode, "drafter": trained["heads"]}
    assert torch.equal(model.generate(ids, **settings, **more), plain)
    run(code("faster-answers", "class Again"))
    again = petl.drafting.drafter("again", times=3)
    found = model.generate(ids, **settings, custom_generate=petl.drafting.decode, drafter=again)
    assert torch.equal(found, plain)


@pytest.mark.thorough
def test_images_and_text(bases, tmp_path, monkeypatch):
    """Each command of the page, with a tiny model of random weights."""
    monkeypatch.chdir(tmp_path)
    page = (HOW_TO / "images-and-text.md").read_text()
    Path("images").mkdir()
    for number, color in enumerate(("red", "blue"), start=1):
        save_picture(Path(f"images/{number}.png"), color)
    shutil.copytree(bases["llava"], "base")
    config = json.loads(Path("base/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096  # of no tensor
    Path("base/config.json").write_text(json.dumps(config))
    (file,) = [block for block in blocks(page) if block.file == "chats.jsonl"]
    shown = [json.loads(line) for line in file.code.splitlines()]
    for each in shown[1:]:  # the other forms that are shown: files of their own
        write_rows(Path("other.jsonl"), [each] * 4)
        words = "model=path model.path=base data=files data.train=other.jsonl data.task=image_text"
        assert main(["data", *words.split()]) == 0
    write_rows(Path("chats.jsonl"), [shown[0]] * 4)
    commands = [block.code.splitlines() for block in blocks(page) if block.language == "bash"]
    lines = (
        "\n".join(line for block in commands for line in block).replace("\\\n", " ").splitlines()
    )
    commands = [
        line
        for line in lines
        if line.startswith("petl ") and "data=stamps" not in line and "model=hub" not in line
    ]
    assert len(commands) == 7
    monkeypatch.setattr("sys.stdin", io.StringIO("/image images/1.png\nWhich color?\n"))
    for line in commands:
        short = " train.steps=2 data.allow_overlap=true" if "petl train" in line else ""
        try:
            status = main(shlex.split(line + short)[1:])
        except SystemExit as left:  # of Hydra
            status = left.code
        assert status == 0, line
