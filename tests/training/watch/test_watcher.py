"""`petl.watch`: fifteen sick trainings are told by id, healthy ones are left alone, to the bit."""

import contextlib
import logging
import math
from itertools import product

import peft
import pytest
import torch
from contract_cases import ADOPTED, OWN, adopted, models_of, own
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    DataCollatorForLanguageModeling,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
)
from watch_fixtures import QUESTION, TOKENIZER, answers, decoder, full_texts, lora, trainer

import petl
from petl import testing
from petl.errors import InputError
from petl.training.watch.findings import IDS


def told(run, **options):
    """Train under the watch; return the severity of each finding, and the steps that were made."""
    watcher = petl.watch(run, **options)
    with contextlib.suppress(InputError):
        run.train()
    found = {finding.id: finding.severity for finding in watcher.report().findings}
    return {name: level for name, level in found.items() if level != "note"}, run.state.global_step


# Sick trainings, each told at or before the second step


def no_labels(folder):
    return trainer(lora(), folder, [{**r, "labels": [-100] * len(r["labels"])} for r in answers()])


def some_without_labels(folder):
    rows = answers()
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["labels"])
    return trainer(lora(), folder, rows)


def ends_masked(folder):
    """The collator masks what equals the padding: the ends too."""
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    parts = {
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "processing_class": tokenizer,
    }
    return trainer(lora(), folder, parts=parts)


def two_beginnings(folder):
    bos = TOKENIZER.bos_token_id
    rows = [
        {
            "input_ids": [bos, bos, *row["input_ids"]],
            "attention_mask": [1, 1, *row["attention_mask"]],
            "labels": [-100, -100, *row["labels"]],
        }
        for row in answers()
    ]
    return trainer(lora(), folder, rows)


def cut_rows(folder):
    longest = QUESTION + 9
    return trainer(lora(), folder, [{k: v[:longest] for k, v in r.items()} for r in answers()])


def known_rows(folder):
    return trainer(lora(), folder, parts={"eval_dataset": answers()[:8]})


def experts_without_adapters(folder):
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return trainer(lora(Qwen3MoeForCausalLM(config)), folder)


def cut_off_gradient(folder):
    model = lora()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: output.detach())
    return trainer(model, folder)


def not_finite_gradient(folder):
    model = lora()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    return trainer(model, folder, max_grad_norm=0)


def uncalled_module(folder):
    sizes = {"vocab_size": 260, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, decoder_attention_heads=4, max_position_embeddings=64)
    names = ["encoder_attn.q_proj", "self_attn.q_proj", "fc1"]
    return trainer(lora(BartForCausalLM(config), target_modules=names), folder)


def optimizer_before_wrapping(folder):
    base = decoder()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    return trainer(lora(base), folder, parts={"optimizers": (optimizer, None)})


def tensors_replaced(folder):
    """The optimizer steps tensors that the model computes with no longer."""

    class Replaces(Trainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            for module in self.model.modules():
                if isinstance(module, nn.Linear) and module.weight.requires_grad:
                    module.weight = nn.Parameter(module.weight.detach().clone())
            return optimizer

    return trainer(lora(), folder, cls=Replaces)


def base_is_trained(folder):
    model = lora()
    for layer in model.get_base_model().model.layers:
        layer.mlp.requires_grad_(True)
    return trainer(model, folder)


def dropout_in_evaluation(folder):
    model = lora(lora_dropout=0.1)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["default"]
    layer.train = lambda mode=True: layer
    parts = {"eval_dataset": answers(seed=1)}
    return trainer(model, folder, parts=parts, eval_strategy="steps", eval_steps=1)


def unequal_tokens(folder):
    """The loss is the mean of each micro-batch, and is not divided by their number."""

    class Means(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    return trainer(lora(), folder, cls=Means, **settings)


def incomplete_reference(folder):
    trl = pytest.importorskip("trl")
    model = testing.stir(petl.wrap(decoder(), "vera", task_type="CAUSAL_LM"))
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    pairs = {"prompt": ["who? ", "what? "], "chosen": ["a fox", "it"], "rejected": ["no", "none"]}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(str(folder), max_steps=2, disable_tqdm=True, **settings),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
    )


SICK = {
    no_labels: ("labels", "error"),
    some_without_labels: ("labels", "warning"),
    ends_masked: ("eos", "error"),
    two_beginnings: ("bos", "error"),
    cut_rows: ("truncated", "warning"),
    known_rows: ("same rows", "error"),
    experts_without_adapters: ("coverage", "warning"),
    cut_off_gradient: ("gradient", "error"),
    not_finite_gradient: ("gradient", "error"),
    uncalled_module: ("input", "error"),
    optimizer_before_wrapping: ("optimizer", "error"),
    tensors_replaced: ("optimizer", "error"),
    base_is_trained: ("base", "error"),
    dropout_in_evaluation: ("mode", "error"),
    unequal_tokens: ("weights", "warning"),
    incomplete_reference: ("reference", "error"),
}


@pytest.mark.parametrize("sick", SICK, ids=lambda sick: sick.__name__)
def test_a_sick_training_is_told_by_id_at_or_before_the_second_step(sick, tmp_path):
    name, severity = SICK[sick]
    found, steps = told(sick(tmp_path))
    assert found == {name: severity}
    assert steps < 2 or severity == "warning"  # an error is raised, and ends the run


def test_a_run_that_resumes_without_its_optimizer_is_told(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    run = trainer(lora(), tmp_path, max_steps=1, save_only_model=True, **settings)
    assert told(run)[0] == {}
    found, _ = told(trainer(lora(), tmp_path, max_steps=1, **settings))
    assert found == {}
    watcher = petl.watch(run := trainer(lora(), tmp_path, **settings))
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(InputError):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [finding.id for finding in watcher.report().findings] == ["resume"]


def test_a_run_that_resumes_with_other_random_numbers_or_rows_is_told(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    checkpoint = tmp_path / "checkpoint-1"
    told(trainer(lora(lora_dropout=0.1), tmp_path, max_steps=1, **settings))
    for rows, found in ((answers(), []), (answers(seed=3), ["resume"])):
        watcher = petl.watch(
            run := trainer(lora(lora_dropout=0.1), tmp_path, rows, **settings), on="warn"
        )
        run.train(resume_from_checkpoint=str(checkpoint))
        assert [finding.id for finding in watcher.report().findings] == found
    (checkpoint / "rng_state.pth").unlink()
    petl.watch(run := trainer(lora(lora_dropout=0.1), tmp_path, **settings))
    with pytest.raises(InputError):
        run.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("name", "found"), [("default", {}), ("mine", {"best": "error"})])
def test_a_best_checkpoint_that_is_not_restored_is_told(name, found, tmp_path):
    """Trainer looks for the adapter in the folder itself, whatever its name is."""
    model = peft.get_peft_model(
        decoder(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), name
    )
    run = trainer(
        model,
        tmp_path,
        parts={"eval_dataset": answers(seed=1)},
        learning_rate=3.0,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    assert told(run)[0] == found


# Healthy trainings

CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dropout": {"lora_dropout": 0.1},
    "head": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "one-layer": {"layers_to_transform": [1]},
    "rank-1": {"r": 1},
    "all-linear": {"target_modules": "all-linear"},
}
WAYS = {
    "full-text": (full_texts, {}),
    "answers-only": (answers, {}),
    "accumulated": (
        answers,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "checkpointed": (
        answers,
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
}


@pytest.mark.cells(4)
@pytest.mark.parametrize(
    ("config", "way"),
    [
        *product(CONFIGS, ["answers-only"]),
        *product(["dropout"], [*WAYS][::2]),
        ("dropout", "checkpointed"),
    ],
)
def test_a_healthy_training_is_left_alone_to_the_bit(config, way, tmp_path, caplog):
    build, settings = WAYS[way]
    parts = {"eval_dataset": answers(seed=1)}
    found = []
    for watched in (True, False):
        model = lora(**CONFIGS[config])
        run = trainer(
            model, tmp_path, build(), parts=parts, eval_strategy="steps", eval_steps=2, **settings
        )
        if watched:
            watcher = petl.watch(run)
        run.train()
        found.append((model.state_dict(), torch.get_rng_state()))
    assert not [f for f in watcher.report().findings if f.severity != "note"]
    assert "petl.watch" not in {r.name for r in caplog.records if r.levelno > logging.INFO}
    assert torch.equal(found[0][1], found[1][1])
    for name, tensor in found[0][0].items():
        assert torch.equal(tensor, found[1][0][name]), name


@pytest.mark.thorough
@pytest.mark.parametrize("method", [*OWN, *ADOPTED])
def test_every_method_is_left_alone(method):
    case = own(method, models_of(method)[0]) if method in OWN else adopted(method, "llama")
    model, batch = case.wrap().train(), case.batch()
    life = petl.lifecycle(model)
    life.prepare([batch])
    optimizer = torch.optim.SGD(testing.trainable(model).values(), lr=case.lr)
    with petl.watch(model, train=[batch], optimizer=optimizer) as watcher:
        for step in range(1, 4):
            model(**batch).loss.backward()
            optimizer.step()
            life.after_step(step, optimizer)
            optimizer.zero_grad()
    assert watcher.report().ok, watcher.report()


# Any loop


def own_loop(model, optimizer, steps=3):
    for _ in range(steps):
        passes(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def passes(model):
    batch = {k: torch.tensor([r[k][:12] for r in answers(2)]) for k in ("input_ids", "labels")}
    return model.train()(**batch).loss


def zeroed_too_early(model, optimizer, step):
    passes(model).backward()
    optimizer.zero_grad()
    optimizer.step()


def no_backward(model, optimizer, step):
    passes(model)
    optimizer.step()


def no_rate(model, optimizer, step):
    optimizer.param_groups[0]["lr"] = 0.0
    passes(model).backward()
    optimizer.step()


def no_step(model, optimizer, step):
    passes(model).backward()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (zeroed_too_early, "gradient"),
        (no_backward, "gradient"),
        (no_rate, "optimizer"),
        (no_step, "optimizer"),
    ],
)
def test_a_loop_that_trains_nothing_is_told(body, name):
    model = lora(lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with petl.watch(model, optimizer=optimizer, on="warn") as watcher:
        for step in range(4):
            body(model, optimizer, step)
        running = watcher.report()
    (found,) = watcher.report().findings
    assert (found.id, found.severity) == (name, "error")
    # a loop that goes on may train yet; what could not be judged is not called fine
    assert {"gradient", "optimizer"} - {f.id for f in running.findings} <= {*running.not_checked}


def test_a_loop_that_trains_nothing_ends_at_its_second_step():
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    petl.watch(model, optimizer=optimizer)
    no_backward(model, optimizer, 0)
    with pytest.raises(InputError):
        no_backward(model, optimizer, 1)


def warmed_up(model, optimizer, step):
    optimizer.param_groups[0]["lr"] = 1e-3 * step
    passes(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model, optimizer, step):
    passes(model).backward()
    if step % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()


def frozen_first(model, optimizer, step):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(step > 2)
    loss = passes(model)
    if step > 2:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def skipped_first(model, optimizer, step, scaler=torch.amp.GradScaler("cpu")):  # noqa: B008
    scaler.scale(passes(model) * (math.inf if step < 3 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def without_torch_optimizer(model, optimizer, step):
    passes(model).backward()
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter -= 0.01 * parameter.grad
            parameter.grad = None


class Freeing(torch.optim.SGD):
    """Frees its gradients in the step."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


@pytest.mark.parametrize(
    ("body", "kind", "settings"),
    [
        (warmed_up, torch.optim.AdamW, {}),
        (accumulated, torch.optim.AdamW, {}),
        (frozen_first, torch.optim.AdamW, {}),
        (skipped_first, torch.optim.AdamW, {"fused": False}),
        (skipped_first, torch.optim.AdamW, {"fused": True}),
        (without_torch_optimizer, torch.optim.SGD, {}),
        (warmed_up, Freeing, {}),
    ],
)
def test_a_loop_that_begins_late_or_in_another_way_is_left_alone(body, kind, settings):
    model = lora()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=1e-2, **settings)
    with petl.watch(model, optimizer=optimizer) as watcher:
        for step in range(8):
            body(model, optimizer, step)
    assert watcher.report().ok, watcher.report()


def test_a_loop_that_an_error_ends_is_not_judged():
    model = lora()
    with contextlib.suppress(ZeroDivisionError), petl.watch(model) as watcher:
        for step in range(4):
            no_step(model, None, 1 / (3 - step))
    assert watcher.report().ok


def test_a_loop_of_ones_own_is_watched_and_its_hooks_are_removed():
    model = lora(lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = answers()
    with petl.watch(
        model, tokenizer=TOKENIZER, train=rows, test=answers(seed=1), optimizer=optimizer
    ) as watcher:
        own_loop(model, optimizer)
        assert not any(module._forward_pre_hooks for module in model.modules())
    report = watcher.report()
    assert report.ok
    assert set(report.not_checked) == {"mode", "weights", "reference", "resume", "best"}
    learned = sum(len(row["labels"]) - QUESTION for row in rows)
    assert report.metrics["watch/learned"] == learned / sum(len(row["labels"]) for row in rows)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optimizer_of_other_tensors_is_refused_before_the_first_step(wrapped):
    model = lora() if wrapped else decoder()
    optimizer = torch.optim.AdamW(decoder().parameters(), lr=1e-2)
    with pytest.raises(InputError):
        petl.watch(model, optimizer=optimizer)
    assert petl.watch(model, optimizer=optimizer, ignore=["optimizer"]).report().ok


def test_an_adapter_that_is_loaded_in_evaluation_mode_is_told(tmp_path):
    lora(lora_dropout=0.1).save_pretrained(tmp_path)
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with petl.watch(model, on="warn") as watcher:
        own_loop(model, optimizer)
        model.eval()
        model.load_adapter(tmp_path, "second")
        model.set_adapter("second")
        for module in model.modules():  # as PEFT leaves what it adds
            if isinstance(module, nn.Dropout):
                module.train()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
    assert [finding.id for finding in watcher.report().findings] == ["mode"]


def test_the_callback_is_the_same_and_writes_its_shares_into_the_log(tmp_path):
    parts = {"callbacks": [petl.Watch()], "eval_dataset": answers()[:8]}
    run = trainer(lora(), tmp_path, parts=parts, eval_strategy="steps", eval_steps=1)
    with pytest.raises(InputError, match="8 of 8"):
        run.train()
    parts = {"callbacks": [watcher := petl.Watch(ignore=["same rows"])]}
    run = trainer(lora(), tmp_path, parts=parts)
    run.train()
    assert run.state.log_history[0]["watch/learned"] == watcher.report().metrics["watch/learned"]
    assert run.state.log_history[0]["watch/coverage"] < 0.5


def test_rows_that_a_collator_takes_apart_stay_as_they_are(tmp_path):
    rows = answers()
    before = [{**row} for row in rows]
    told(trainer(lora(), tmp_path, rows))
    assert rows == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on": "stop"}, "'raise' or 'warn'"),
        ({"ignore": ["eod"]}, ", ".join(IDS)),
        ({"rows": 0}, "rows=0"),
        ({"train": []}, "train="),
    ],
)
def test_values_that_are_not_allowed_are_refused(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        petl.watch(trainer(lora(), tmp_path), **options)


def test_a_few_short_rows_in_both_sets_are_chance():
    short = [{"input_ids": [5, n], "labels": [-100, n]} for n in range(10, 110)]
    watcher = petl.watch(lora(), train=[*answers(), *short[:2]], test=[*short, *answers(seed=1)])
    assert watcher.report().ok
    watcher = petl.watch(lora(), train=short[:4], test=short)
    assert [finding.id for finding in watcher.report().findings] == ["same rows"]
