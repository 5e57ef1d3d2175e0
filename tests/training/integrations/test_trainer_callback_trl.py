"""petl's methods in TRL's SFTTrainer and DPOTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from decoder_fixtures import COEF, FIELDS, LR, plain_sgd, wrapped
from peft import PeftModel, get_peft_model_state_dict
from tiny_tokenizers import byte_tokenizer
from torch import Tensor

import petl
from petl import testing


def floats(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not indices or codes."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point()]


def sft_trainer(model: PeftModel, folder: Path, **settings: Any):
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer

    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(8)]
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **{
                "output_dir": str(folder),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "per_device_train_batch_size": 4,
                "max_steps": 1,
                "max_length": 32,
                "max_grad_norm": 0.0,
                "save_strategy": "no",
                "disable_tqdm": True,
                **settings,
            }
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=byte_tokenizer(pad_token="<unk>"),
        callbacks=[petl.Callback()],
        optimizers=plain_sgd(model),
    )


def adapter_after_sft(name: str, folder: Path, fields: dict[str, Any], **settings: Any):
    model = wrapped(name, **fields)
    before = get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    sft_trainer(model, folder, **settings).train()
    return before, get_peft_model_state_dict(model)


def test_a_segmented_loss_changes_nothing(tmp_path):
    """SFTTrainer puts a fused head of its own in place of the model's forward."""
    found = []
    for segmented in (False, True):
        model = wrapped("lora")
        if segmented:
            petl.segment_loss(model, 5)
        sft_trainer(model, tmp_path).train()
        found.append(get_peft_model_state_dict(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, True) for name in FIELDS), ("mola", False)]
)
def test_one_step_in_sft_trainer_moves_the_adapter(name, checkpointing, tmp_path):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    before, after = adapter_after_sft(
        name, tmp_path, {}, gradient_checkpointing=checkpointing, **options
    )
    assert set(before) == set(after)
    assert not [key for key in floats(before) if torch.equal(before[key], after[key])]


@pytest.mark.cells(1)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_auxiliary_gradient_arrives_in_sft_trainer_once_a_step(accumulation, tmp_path):
    """SFTTrainer computes its own loss; the auxiliary loss adds its gradient."""
    settings = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    moved = []
    for coef in (0.0, COEF, 2 * COEF):
        _, after = adapter_after_sft("mola", tmp_path, {"router_aux_loss_coef": coef}, **settings)
        moved.append(after)
    model = wrapped("mola")
    trainer = sft_trainer(model, tmp_path, **settings)
    trainer.create_optimizer()
    loader = iter(trainer.get_train_dataloader())
    micro = [dict(next(loader)) for _ in range(accumulation)]
    aux: dict[str, Tensor] = {}
    for batch in micro:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        for name, gradient in testing.gradients(model, inputs, weight=0.0).items():
            key = name.replace(".default", "")
            aux[key] = aux.get(key, 0) + gradient / accumulation
    assert any(float(gradient.abs().max()) > 1e-5 for gradient in aux.values())
    for key, gradient in aux.items():
        once, twice = (moved[i][key] - moved[0][key] for i in (1, 2))
        torch.testing.assert_close(once, -LR * gradient, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(twice, -2 * LR * gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["lora", "mola", "binary_mos"])
def test_one_step_in_dpo_trainer_moves_the_adapter(name, tmp_path):
    pytest.importorskip("trl")
    from trl import DPOConfig, DPOTrainer

    model = wrapped(name)
    before = {key: t.clone() for key, t in get_peft_model_state_dict(model).items()}
    pairs = {
        "prompt": ["what is it? ", "who is it? "] * 2,
        "chosen": ["a fox", "a dog", "the fox", "the dog"],
        "rejected": ["no", "none", "nothing", "nobody"],
    }
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=byte_tokenizer(pad_token="<unk>"),
        callbacks=[petl.Callback()],
        optimizers=plain_sgd(model),
    )
    trainer.train()
    after = get_peft_model_state_dict(model)
    assert not [key for key in floats(before) if torch.equal(before[key], after[key])]
    entry = trainer.state.log_history[0]
    assert ("aux_loss" in entry) == name.startswith("mola")


def test_dpo_trainer_with_corda_says_that_it_needs_a_ref_model(tmp_path):
    pytest.importorskip("trl")
    from trl import DPOConfig, DPOTrainer

    base = testing.tiny_llama(1, vocabulary=300)
    calibration = [testing.TINY_MODELS["llama"].batch()]
    model = petl.wrap(base, "corda", task_type="CAUSAL_LM", r=2, calibration=calibration)
    pairs = {"prompt": ["who? "], "chosen": ["a fox"], "rejected": ["no"]}
    settings = {
        "args": DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        "train_dataset": Dataset.from_dict(pairs),
        "processing_class": byte_tokenizer(pad_token="<unk>"),
    }
    with pytest.raises(petl.InputError):
        DPOTrainer(model=model, **settings)
    assert DPOTrainer(model=model, ref_model=testing.tiny_llama(1, vocabulary=300), **settings)
