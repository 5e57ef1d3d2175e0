"""The losses of preference tasks equal those of TRL's trainers on the same rows."""

from functools import partial

import pytest
import torch
from contract_cases import OWN, own
from datasets import Dataset
from tiny_tokenizers import byte_tokenizer
from transformers import LlamaForSequenceClassification

import petl
from petl import testing
from petl.data.base import encode
from petl.data.tasks import task_class
from petl.data.tasks.base import Pad
from petl.data.tasks.preferences.grpo import texts_of

trl = pytest.importorskip("trl", reason="pip install 'petl-peft[trl]'")

PAIRS = [
    {"prompt": "who? ", "chosen": "a fox", "rejected": "no"},
    {"prompt": "what is it? ", "chosen": "it", "rejected": "nothing at all"},
    {"prompt": "so? ", "chosen": "yes", "rejected": "a"},
]
RATED = [
    {"prompt": "who? ", "completion": "a fox", "label": True},
    {"prompt": "what is it? ", "completion": "nothing", "label": False},
    {"prompt": "why? ", "completion": "as it is", "label": True},
]
BETA = 0.3
decoder = partial(testing.tiny_llama, 2, vocabulary=260)


def scorer(tokenizer):
    config = decoder().config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config)


@pytest.fixture
def tokenizer():
    return byte_tokenizer(pad_token="<unk>")


def wrapped(base, method, task_type="CAUSAL_LM"):
    """A model whose adapter has an effect, so that the reference is not the policy."""
    fields = own(method, "llama").fields if method in OWN else {"target_modules": "block-linear"}
    torch.manual_seed(4)
    return testing.stir(petl.wrap(base, method, **fields, task_type=task_type))


def trainer_of(name, folder, model, rows, tokenizer, module=trl, **settings):
    reference = settings.pop("ref_model", None)
    given = {} if reference is None else {"ref_model": reference}
    if "reward_funcs" in settings:
        given["reward_funcs"] = settings.pop("reward_funcs")
    args = getattr(module, f"{name}Config")(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(rows),
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    return getattr(module, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **given,
    )


def theirs(trainer):
    """The loss of TRL's trainer over all of its rows."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    return trainer.compute_loss(trainer.model.train(), batch)


def ours(task, model, rows, tokenizer):
    """The loss of a training forward of petl over the rows, and its gradients."""
    batch = task.collate(tokenizer)(encode(task, tokenizer, rows))
    model.train().zero_grad()
    loss = model(**task.completed(model, batch)).loss
    return loss - petl.lifecycle(model).aux_loss()


def task_of(name, base, **fields):
    task = task_class(name)(max_length=64, plain=True, **fields)
    task.adjust(base)
    return task


@pytest.mark.parametrize(
    ("method", "loss"), [("lora", "sigmoid"), ("mola", "ipo"), ("lora", "hinge")]
)
def test_dpo(method, loss, tokenizer, tmp_path):
    base = decoder()
    task = task_of("dpo", base, beta=BETA, loss=loss)
    model = wrapped(base, method)
    found = ours(task, model, PAIRS, tokenizer)
    trainer = trainer_of(
        "DPO", tmp_path, wrapped(decoder(), method), PAIRS, tokenizer,
        ref_model=decoder(), beta=BETA, loss_type=[loss],
    )  # fmt: skip
    assert abs(found - theirs(trainer)) < 1e-6
    assert found.requires_grad


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_orpo(method, tokenizer, tmp_path):
    from trl.experimental import orpo

    base = decoder()
    task = task_of("orpo", base, beta=BETA)
    # TRL's trainer adds the first token to any prompt
    rows = [{**row, "prompt": f"<s>{row['prompt']}"} for row in PAIRS]
    found = ours(task, wrapped(base, method), rows, tokenizer)
    model = wrapped(decoder(), method)
    trainer = trainer_of("ORPO", tmp_path, model, rows, tokenizer, module=orpo, beta=BETA)
    assert abs(found - theirs(trainer)) < 1e-6


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_kto(method, tokenizer, tmp_path):
    base = decoder()
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    task = task_of("kto", base, beta=BETA, **weights)
    rows = [{**row, "good": row["label"]} for row in RATED]
    found = ours(task, wrapped(base, method), rows, tokenizer)
    trainer = trainer_of(
        "KTO", tmp_path, wrapped(decoder(), method), RATED, tokenizer,
        ref_model=decoder(), beta=BETA, **weights,
    )  # fmt: skip
    assert abs(found - theirs(trainer)) < 1e-6


@pytest.mark.parametrize(("method", "center"), [("lora", None), ("mola", 0.2)])
def test_reward(method, center, tokenizer, tmp_path):
    base = scorer(tokenizer)
    task = task_of("reward", base, center=center)
    found = ours(task, wrapped(base, method, "SEQ_CLS"), PAIRS, tokenizer)
    trainer = trainer_of(
        "Reward", tmp_path, wrapped(scorer(tokenizer), method, "SEQ_CLS"), PAIRS, tokenizer,
        center_rewards_coefficient=center,
    )  # fmt: skip
    assert abs(found - theirs(trainer)) < 1e-6


@pytest.mark.parametrize(
    ("method", "loss", "beta", "temperature"), [("lora", "dapo", 0.2, 0.6), ("mola", "grpo", 0, 1)]
)
def test_grpo(method, loss, beta, temperature, tokenizer, tmp_path):
    base = decoder()
    more = {"loss": loss, "beta": beta, "temperature": temperature}
    task_of("grpo", base, generations=2, max_new_tokens=4, **more)
    model = wrapped(base, method)
    texts = texts_of(Pad(0), [[50, 51, 52]] * 4, [[60, 61], [62, 63, 64], [65], [66, 67]])
    advantages = torch.tensor([0.7, -0.7, 1.0, -1.0])
    reference = torch.randn(4, texts["labels"].shape[1] - 1) - 5 if beta else None
    more = {"advantages": advantages} | ({} if reference is None else {"reference": reference})
    found = model.train()(**texts, **more).loss - petl.lifecycle(model).aux_loss()
    trainer = trainer_of(
        "GRPO", tmp_path, wrapped(decoder(), method), [{"prompt": "who? "}] * 4, tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        num_generations=2, max_completion_length=4, beta=beta, loss_type=loss,
        temperature=temperature, use_bias_correction_kl=False,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    answers = (texts["labels"] != -100)[:, 3:].long()
    given = {
        "prompt_ids": texts["input_ids"][:, :3],
        "prompt_mask": texts["attention_mask"][:, :3],
        "completion_ids": texts["input_ids"][:, 3:],
        "completion_mask": answers,
        "advantages": advantages,
        "num_items_in_batch": answers.sum(),
    }
    if reference is not None:
        given["ref_per_token_logps"] = reference[:, 2:]
    wanted = trainer._compute_loss(trainer.model.train(), given)
    assert abs(found - wanted) < 1e-6
    if method == "lora":
        # the value alone says nothing of the probabilities of the answers
        pairs = [
            torch.autograd.grad(loss, [p for p in own.parameters() if p.requires_grad])
            for loss, own in ((found, model), (wanted, trainer.model))
        ]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)
