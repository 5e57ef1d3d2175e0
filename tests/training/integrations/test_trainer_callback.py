"""petl's methods in transformers' Trainer, compared with a hand-written loop or resumed runs."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from decoder_fixtures import COEF, FIELDS, LR, plain_sgd, wrapped
from kept_processes import in_processes
from peft import PeftModel, get_peft_model_state_dict
from tiny_tokenizers import byte_tokenizer
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError


def rows(count: int) -> Dataset:
    """Rows of ten tokens; the last i % 4 tokens of row i have no label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 260, (count, 10), generator=generator)
    labels = ids.clone()
    for i in range(count):
        labels[i, 10 - i % 4 :] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def batches(data: Dataset, size: int) -> list[dict[str, Tensor]]:
    whole = default_data_collator([data[i] for i in range(len(data))])
    return [
        {name: tensor[i : i + size] for name, tensor in whole.items()}
        for i in range(0, len(data), size)
    ]


def items(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"][:, 1:].ne(-100).sum())


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 0.0,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "disable_tqdm": True,
            **settings,
        }
    )


class InOrder(Trainer):
    """A Trainer that visits the rows in order, like the hand-written loop."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def assert_same_adapter(found: PeftModel, expected: dict[str, Tensor], *, atol: float = 1e-6):
    state = get_peft_model_state_dict(found)
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=atol, rtol=1e-5)


def by_hand(model: PeftModel, data: Dataset, *, accumulation: int) -> dict[str, Tensor]:
    """The adapter after SGD on the sum of cross-entropy per item and auxiliary loss."""
    life = petl.lifecycle(model)
    groups = batches(data, 4)
    for start in range(0, len(groups), accumulation):
        micro = groups[start : start + accumulation]
        total = sum(items(batch) for batch in micro)
        sums: dict[str, Tensor] = {}
        for batch in micro:
            weight = items(batch) / total
            life.aux_weight = weight
            for name, gradient in testing.gradients(model, batch, weight=weight).items():
                sums[name] = sums.get(name, 0) + gradient
        with torch.no_grad():
            for name, parameter in testing.trainable(model).items():
                parameter -= LR * sums[name]
    return get_peft_model_state_dict(model)


# Trainer


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "accumulation"), [*((name, 2) for name in FIELDS), ("lora", 1), ("mola", 1)]
)
def test_trainer_equals_a_loop_by_hand(name, accumulation, tmp_path):
    steps = 3
    data = rows(4 * accumulation * steps)
    expected = by_hand(wrapped(name), data, accumulation=accumulation)
    model = wrapped(name)
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=steps, gradient_accumulation_steps=accumulation),
        train_dataset=data,
        callbacks=[petl.Callback()],
        optimizers=plain_sgd(model),
    )
    trainer.train()
    assert trainer.state.global_step == steps
    assert_same_adapter(model, expected, atol=1e-5)


def test_a_loss_without_item_counts_is_divided_by_accumulation_steps(tmp_path):
    """As in a trainer that computes the loss itself: micro-batches have equal weights."""

    class OwnLoss(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    data = rows(8)
    results = []
    for coef in (0.0, COEF):
        model = wrapped("mola", router_aux_loss_coef=coef)
        trainer = OwnLoss(
            model,
            arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2),
            train_dataset=data,
            callbacks=[petl.Callback()],
            optimizers=plain_sgd(model),
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        results.append(get_peft_model_state_dict(model))
    model = wrapped("mola")
    aux = [testing.gradients(model, batch, weight=0.0) for batch in batches(data, 4)]
    mean = {n.replace(".default", ""): (aux[0][n] + aux[1][n]) / 2 for n in aux[0]}
    for name, gradient in mean.items():
        moved = results[1][name] - results[0][name]
        torch.testing.assert_close(moved, -LR * gradient, atol=1e-6, rtol=1e-4)


def trained(folder, data, *, counts_items=True, **settings):
    """The adapter of a MoLA after two steps of Trainer."""
    model = wrapped("mola")
    trainer = InOrder(
        model,
        arguments(folder, max_steps=2, **settings),
        train_dataset=data,
        callbacks=[petl.Callback()],
        optimizers=plain_sgd(model),
    )
    trainer.model_accepts_loss_kwargs &= counts_items
    trainer.train()
    return get_peft_model_state_dict(model)


def test_the_last_step_of_an_epoch_weights_what_is_left_of_it(tmp_path):
    # two micro-batches, in one step
    expected, found = (
        trained(tmp_path, rows(8), counts_items=False, gradient_accumulation_steps=accumulation)
        for accumulation in (2, 8)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_stream_without_a_length_is_trained(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows(8)))
    expected, found = (trained(tmp_path, data) for data in (rows(8), stream))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_trainer_logs_the_auxiliary_loss_apart_from_the_task_loss(tmp_path):
    data = rows(4)
    model = wrapped("mola")
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=data,
        callbacks=[petl.Callback()],
    )
    start = wrapped("mola")
    total = float(start.train()(**batches(data, 4)[0]).loss)
    aux = petl.lifecycle(start).metrics()["aux_loss"]
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["aux_loss"] == pytest.approx(aux, rel=1e-4)
    assert entry["loss"] == pytest.approx(total, rel=1e-3)
    assert "expert_load_max" in entry


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", FIELDS)
def test_a_resumed_trainer_equals_an_uninterrupted_run(name, tmp_path):
    data = rows(24)

    def run(folder: Path, *, resume: str | None = None) -> PeftModel:
        model = wrapped(name)
        trainer = Trainer(
            model,
            arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, seed=3),
            train_dataset=data,
            callbacks=[petl.Callback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "straight")
    expected = get_peft_model_state_dict(straight)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    assert checkpoint.is_dir()
    resumed = run(tmp_path / "resumed", resume=os.fspath(checkpoint))
    assert_same_adapter(resumed, expected, atol=1e-7)


@pytest.mark.parametrize("other_base", [False, True])
def test_a_trainer_resumed_on_another_base_is_refused_unless_it_is_asked_for(
    other_base, tmp_path, caplog
):
    def run(seed: int, *, resume: bool) -> None:
        torch.manual_seed(seed)
        base = testing.tiny_llama(layers=2, vocabulary=260)
        torch.nn.init.normal_(base.model.embed_tokens.weight)
        trainer = Trainer(
            petl.wrap(base, "lora", task_type="CAUSAL_LM"),
            arguments(tmp_path, max_steps=1 + resume, save_strategy="steps", save_steps=1),
            train_dataset=rows(24),
            callbacks=[petl.Callback(other_base=other_base)],
        )
        trainer.train(resume_from_checkpoint=resume)

    run(1, resume=False)
    with pytest.raises(petl.InputError) if not other_base else nullcontext():
        run(2, resume=True)
    assert ("such as model.embed_tokens.weight" in caplog.text) is other_base


# The training state of methods

CHANGING = {
    # phases of two updates, 1-2 and 5-6: step 5 is in the middle of one
    "sparse": {
        "density": 0.05,
        "reselection_steps": 4,
        "selection_accumulation_steps": 2,
        "total_step": 8,
    },
    # ranks grow after steps 3 and 6: step 5 is between them
    "increlora": {"tinit": 1, "deltaT": 3, "top_h": 2, "total_step": 8},
}
STOP = 5
WITH_STATE = pytest.mark.parametrize("straight", ["sparse"], indirect=True)


def run_changing(
    name: str, folder: Path, *, resume: Path | None = None, steps: int = 8, **settings: Any
) -> dict[str, Tensor]:
    """The adapter after `steps` steps, with a checkpoint after step `STOP`."""
    torch.manual_seed(4)
    base = testing.tiny_llama(layers=2, vocabulary=260)
    model = petl.wrap(base, name, **CHANGING[name], task_type="CAUSAL_LM")
    given = {"max_steps": steps, "save_strategy": "steps", "save_steps": STOP, "seed": 3}
    trainer = Trainer(
        model,
        arguments(folder, **given | settings),
        train_dataset=rows(32),
        callbacks=[petl.Callback()],
    )
    trainer.train(resume_from_checkpoint=resume and os.fspath(resume))
    return get_peft_model_state_dict(model)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert set(found) == set(expected)
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(scope="module", params=CHANGING)
def straight(request, tmp_path_factory):
    """A method that changes during training: its checkpoint after `STOP`, moved, and its end."""
    folder = tmp_path_factory.mktemp(request.param)
    expected = run_changing(request.param, folder / "run")
    (folder / "run").rename(folder / "moved")
    return request.param, folder / "moved" / f"checkpoint-{STOP}", expected


def test_a_trainer_resumed_between_changes_equals_an_uninterrupted_run(straight, tmp_path):
    name, checkpoint, expected = straight
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    assert not differing(run_changing(name, tmp_path, resume=copy), expected)


@WITH_STATE
@pytest.mark.parametrize("place", ["where it was written", "named"])
def test_the_state_is_found_outside_of_the_output_folder(straight, place, tmp_path):
    """Although it contains a checkpoint of the same step of another training."""
    name, checkpoint, expected = straight
    run_changing(name, tmp_path, steps=STOP, seed=4)
    written = checkpoint.parent.with_name("run") / checkpoint.name
    target = tmp_path / "elsewhere" if place == "named" else written
    copy = shutil.copytree(checkpoint, target)
    named = {"resume_from_checkpoint": str(copy)} if place == "named" else {}
    assert not differing(run_changing(name, tmp_path, resume=copy, **named), expected)
    shutil.rmtree(copy)


@WITH_STATE
def test_a_missing_state_is_a_warning(straight, tmp_path, caplog):
    name, checkpoint, expected = straight
    run_changing(name, tmp_path, steps=STOP, seed=4)
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    resumed = run_changing(name, tmp_path, resume=copy)
    assert "no lifecycle.safetensors of step 5 of the resumed training in" in caplog.text
    assert "TrainingArguments(resume_from_checkpoint=FOLDER)" in caplog.text
    assert differing(resumed, expected)


@WITH_STATE
def test_an_unreadable_state_is_an_error(straight, tmp_path):
    name, checkpoint, _ = straight
    damaged = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    file = damaged / "lifecycle.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(petl.InputError):
        run_changing(name, tmp_path, resume=damaged)


def stop_and_resume(folder: Path) -> tuple[int, list[str], dict[str, Tensor]]:
    """World size, names of tensors that differ after resuming, and the adapter of one process."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # Accelerate asks for them
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    whole = run_changing("sparse", folder / "whole", **settings)
    checkpoint = folder / "whole" / f"checkpoint-{STOP}"
    resumed = run_changing("sparse", folder / "resumed", resume=checkpoint, **settings)
    return torch.distributed.get_world_size(), differing(resumed, whole), whole


@pytest.mark.thorough
def test_processes_resume_from_the_state_of_the_main_process(tmp_path):
    (size, *differs, first), (_, *differs_there, second) = in_processes(
        2, stop_and_resume, tmp_path
    )
    assert size == 2
    assert differs == differs_there == [[]]
    assert not differing(second, first)


def test_a_checkpoint_written_without_the_callback_can_be_resumed(tmp_path, caplog):
    model = wrapped("lora")
    data, settings = rows(32), {"save_strategy": "steps", "save_steps": 1}
    Trainer(model, arguments(tmp_path, max_steps=1, **settings), train_dataset=data).train()
    resumed = Trainer(
        wrapped("lora"),
        arguments(tmp_path, max_steps=2, **settings),
        train_dataset=data,
        callbacks=[petl.Callback()],
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert not caplog.text  # nothing that lora would miss
    assert not list(tmp_path.glob("checkpoint-*/lifecycle.safetensors"))


def test_adalora_allocates_its_ranks_in_trainer(tmp_path):
    torch.manual_seed(4)
    model = petl.wrap(
        testing.tiny_llama(layers=2, vocabulary=260),
        "adalora",
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=2,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=8,
    )
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=8), train_dataset=rows(32), callbacks=[petl.Callback()]
    )
    trainer.train()
    kept = [p for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(int(torch.count_nonzero(p)) for p in kept) == 2 * len(kept)


def test_fp16_loss_scaling_with_an_auxiliary_loss_is_refused():
    model = wrapped("mola").train()
    callback = petl.Callback()
    settings = SimpleNamespace(
        gradient_accumulation_steps=1,
        world_size=1,
        average_tokens_across_devices=True,
        fp16=True,
        output_dir="",
    )
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    callback.on_train_begin(settings, state, None, model=model, train_dataloader=[])
    model(**batches(rows(4), 4)[0])
    with pytest.raises(petl.InputError):
        callback.on_optimizer_step(settings, state, None)


# Retained texts


@pytest.mark.thorough
def test_retained_texts_are_measured_at_evaluations_and_at_the_end(tmp_path):
    texts = [f"{'a plain sentence ' * (1 + n % 3)}{n}" for n in range(9)]
    plain, model, tokenizer = (
        wrapped("lora"),
        wrapped("lora"),
        byte_tokenizer(pad_token="<|im_end|>"),
    )
    settings = arguments(tmp_path, max_steps=5, eval_strategy="steps", eval_steps=2)
    for each, callbacks in ((plain, []), (model, [petl.Callback(retain=texts)])):
        trainer = Trainer(
            each,
            settings,
            train_dataset=rows(20),
            eval_dataset=rows(4),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
    assert_same_adapter(model, get_peft_model_state_dict(plain), atol=0)
    lines = [line for line in trainer.state.log_history if "retained_lost" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = petl.retained(model, texts, tokenizer).lost
    assert lines[-1]["retained_lost"] == pytest.approx(expected, abs=1e-6)
    again = petl.Callback(**petl.Callback(retain=texts).state()["args"])
    assert again.retain == texts


def test_what_cannot_be_measured_ends_before_the_first_step(tmp_path):
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    changed = wrapped("lora", init_lora_weights="pissa")  # its base is another one
    for model, given, error in (
        (wrapped("lora"), None, InputError),
        (changed, tokenizer, UnsupportedError),
    ):
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=5),
            train_dataset=rows(20),
            processing_class=given,
            callbacks=[petl.Callback(retain=["a plain sentence"])],
        )
        with pytest.raises(error):
            trainer.train()
        assert trainer.state.global_step == 0


def test_the_last_measure_is_of_the_model_that_is_returned(tmp_path):
    """The best model is loaded after the last evaluation, and is another one."""
    texts, tokenizer = ["a plain sentence", "and another"], byte_tokenizer(pad_token="<|im_end|>")
    model = wrapped("lora")
    settings = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first: training lowers the loss
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows(20),
        eval_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[petl.Callback(retain=texts)],
    )
    trainer.train()
    found = [line["retained_lost"] for line in trainer.state.log_history if "retained_lost" in line]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert found[-1] == pytest.approx(petl.retained(model, texts, tokenizer).lost, abs=1e-6)
    assert found[-1] == pytest.approx(found[0], abs=1e-6)
    assert found[-1] != pytest.approx(found[-2], abs=1e-6)


def test_retained_texts_without_a_tokenizer_are_refused(tmp_path):
    trainer = Trainer(
        wrapped("lora"),
        arguments(tmp_path, max_steps=1),
        train_dataset=rows(4),
        callbacks=[petl.Callback(retain=["a text"])],
    )
    with pytest.raises(petl.InputError, match="processing_class"):
        trainer.train()
