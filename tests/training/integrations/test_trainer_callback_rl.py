"""Every method in TRL's GRPOTrainer, KTOTrainer and RewardTrainer, and DPO's reference adapter."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import ADOPTED, OWN, adopted, own
from datasets import Dataset
from decoder_fixtures import LR, plain_sgd
from peft import PeftModel, get_peft_model_state_dict
from tiny_tokenizers import byte_tokenizer
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

import petl
from petl import testing
from petl.testing.models import causal_batch

pytest.importorskip("trl", reason="pip install 'petl-peft[trl]'")

BETA = 0.1
CASES = {case.method: case for case in [own(n, "llama") for n in OWN]} | {
    name: adopted(name, "llama") for name in ADOPTED
}
# in the default suite: PEFT's own, routed, tensors shared by layers, parameters named NAME.default
FEW = ("lora", "mola", "mos", "vera")
# methods that cannot have the second adapter with which TRL keeps the reference, and why
NO_REFERENCE = {
    "adalora": "AdaLoraModel supports only 1 trainable adapter",
    "corda": "In TRL, pass the original model as ref_model=, or set beta=0",
}
ALL = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
REFERENCED = [entry for name, entry in zip(CASES, ALL, strict=True) if name not in NO_REFERENCE]
TWO_REFERENCED = [
    n if n in ("mola", "vera") else pytest.param(n, marks=pytest.mark.slow)
    for n in CASES
    if n not in NO_REFERENCE
]
TOKENIZER = byte_tokenizer(pad_token="<unk>")
PAIRS = {"prompt": ["who? ", "what? "], "chosen": ["a fox", "it"], "rejected": ["no", "none"]}


def decoder() -> Any:
    return testing.tiny_llama(2, vocabulary=260)


def scorer() -> Any:
    config = decoder().config
    config.num_labels, config.pad_token_id = 1, TOKENIZER.pad_token_id
    torch.manual_seed(3)
    return LlamaForSequenceClassification(config)


DECODER = testing.TinyModel("decoder", decoder, causal_batch, "CAUSAL_LM", True, True)
SCORER = testing.TinyModel(
    "scorer", scorer, lambda rows, seed: causal_batch(rows, seed) | {"labels": None}, "SEQ_CLS"
)


def model_of(method: str, tiny: testing.TinyModel = DECODER, **fields: Any) -> PeftModel:
    """A model whose adapter has an effect, so that the reference is not the base."""
    case = CASES[method]
    return replace(case, model=tiny, fields={**case.fields, **fields}).wrap_stirred()


def trainer_of(
    name: str, folder: Path, model: Any, data: dict[str, list[Any]], **kwargs: Any
) -> Any:
    """A trainer of TRL for one step over two rows."""
    import trl

    args = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=2,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        gradient_checkpointing=False,
        **kwargs.pop("args", {}),
    )
    if isinstance(model, PeftModel):  # otherwise the trainer wraps it
        kwargs["optimizers"] = plain_sgd(model)
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=TOKENIZER,
        callbacks=[petl.Callback()],
        **kwargs,
    )


def grpo(folder: Path, model: Any, beta: float = BETA, reward: Any = None, **kwargs: Any) -> Any:
    settings = {"num_generations": 2, "max_completion_length": 3, "beta": beta}
    reward = reward or (lambda completions, **_: [float(i) for i in range(len(completions))])
    data = {"prompt": ["who? ", "what? "]}
    return trainer_of("GRPO", folder, model, data, args=settings, reward_funcs=reward, **kwargs)


def kto(folder: Path, model: Any, **kwargs: Any) -> Any:
    data = {"prompt": ["who? ", "what? "], "completion": ["a fox", "no"], "label": [True, False]}
    return trainer_of("KTO", folder, model, data, args={"beta": BETA}, **kwargs)


def dpo(folder: Path, model: Any, **kwargs: Any) -> Any:
    return trainer_of("DPO", folder, model, PAIRS, args={"beta": BETA}, **kwargs)


def reward(folder: Path, model: Any, **kwargs: Any) -> Any:
    data = {name: PAIRS[name] for name in ("chosen", "rejected")}
    return trainer_of("Reward", folder, model, data, **kwargs)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of the base model, by their names in it."""
    state = model.get_base_model().state_dict()
    names = {n.replace(".base_layer.", "."): n for n in state}
    head = "score."  # trained with the adapter
    return {n: state[k] for n, k in names.items() if n in BASE and not n.startswith(head)}


BASE = {*decoder().state_dict(), *scorer().state_dict()}


def one_step(trainer: Any) -> dict[str, float]:
    """Train; return the logged line after checking that the adapter moved and the base did not."""
    model = trainer.model
    base, adapter = copied(base_weights(model)), copied(get_peft_model_state_dict(model))
    assert len(base) > 10
    trainer.train()
    after = get_peft_model_state_dict(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name in adapter if not torch.equal(adapter[name], after[name])]
    assert not [n for n, t in base_weights(model).items() if not torch.equal(t, base[n])]
    return trainer.state.log_history[0]


# Each method in each trainer; at the first step, policy and reference are the same model


@pytest.mark.parametrize("method", REFERENCED)
def test_kto_trains_the_adapter_against_the_model_at_the_start(method, tmp_path):
    line = one_step(kto(tmp_path, model_of(method)))
    # equation 7 of the KTO paper: 1 - sigmoid(beta (ratio - kl)) with both of them 0
    assert (line["loss"], line["kl"]) == (pytest.approx(0.5, abs=1e-6), 0.0)


@pytest.mark.parametrize("method", TWO_REFERENCED)
def test_grpo_trains_the_adapter_against_the_model_at_the_start(method, tmp_path):
    line = one_step(grpo(tmp_path, model_of(method)))
    assert line["kl"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("method", TWO_REFERENCED)
def test_dpo_starts_with_the_model_at_the_start_as_reference(method, tmp_path):
    line = one_step(dpo(tmp_path, model_of(method)))
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)  # of equal policies


@pytest.mark.parametrize("method", ALL)
def test_a_reward_model_trains_its_adapter_and_its_head(method, tmp_path):
    model = model_of(method, SCORER)
    scores = {
        name: torch.cat([score_of(model, text) for text in PAIRS[name]])
        for name in ("chosen", "rejected")
    }
    expected = -nn.functional.logsigmoid(scores["chosen"] - scores["rejected"]).mean()
    head = model.get_base_model().score.modules_to_save["default"].weight.clone()
    line = one_step(reward(tmp_path, model))
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-3)  # Bradley-Terry
    assert not torch.equal(model.get_base_model().score.modules_to_save["default"].weight, head)


@torch.no_grad()
def score_of(model: PeftModel, text: str) -> Tensor:
    """The score at the last token, the end of text that TRL appends."""
    ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    return model(input_ids=torch.tensor([ids])).logits[:, 0]


# Independent statements of the updates


def logp(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """The sum of the log-probabilities of a completion's tokens."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)].sum()


def assert_step(model: PeftModel, loss: Callable[[], Tensor], train: Callable[[], Any]) -> None:
    """Check that `train` moves each parameter by -LR times the gradient of `loss` before it."""
    parameters = testing.trainable(model)
    before = copied(parameters)
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), parameters.values()), strict=True))
    train()
    for name, parameter in parameters.items():
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(moved, -LR * gradients[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["lora", "mos"])
def test_the_update_of_kto_is_the_papers(method, tmp_path):
    model = model_of(method)
    rows = [("who? ", "a fox"), ("what? ", "no")]

    def loss() -> Tensor:
        # 1 - sigmoid(s) has the derivative -1/4 at s = 0
        good, bad = (
            logp(model, TOKENIZER(q)["input_ids"], [*TOKENIZER(a)["input_ids"], 3]) for q, a in rows
        )
        return BETA * (bad - good) / 4 / 2

    assert_step(model, loss, kto(tmp_path, model).train)


@pytest.mark.parametrize("method", ["lora", "mos"])
def test_the_update_of_grpo_is_the_papers(method, tmp_path):
    """The gradient of -advantage log p, over the tokens of the group; the KL term adds none."""
    model, told = model_of(method), {}

    def judge(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        told.update(prompt=TOKENIZER(prompts[0])["input_ids"], answers=completion_ids)
        return [0.0, 1.0]

    trainer = grpo(tmp_path, model, reward=judge)
    before = copied(testing.trainable(model))
    trainer.train()
    after = copied(testing.trainable(model))
    with torch.no_grad():
        for name, parameter in testing.trainable(model).items():
            parameter.copy_(before[name])
    spread = torch.tensor([0.0, 1.0]).std()
    advantages = [-0.5 / (spread + 1e-4), 0.5 / (spread + 1e-4)]
    tokens = sum(map(len, told["answers"]))
    terms = (
        -a * logp(model, told["prompt"], answer)
        for a, answer in zip(advantages, told["answers"], strict=True)
    )
    sum(terms).div(tokens).backward()
    for name, parameter in testing.trainable(model).items():
        moved = after[name] - before[name]
        torch.testing.assert_close(moved, -LR * parameter.grad, atol=1e-6, rtol=1e-3)


# What has no reference adapter, and what serves instead


@pytest.mark.parametrize("method", NO_REFERENCE)
@pytest.mark.parametrize("make", [kto, grpo, dpo])
def test_a_method_with_one_adapter_only_is_refused_with_the_reason(method, make, tmp_path):
    with pytest.raises(ValueError, match=NO_REFERENCE[method]):
        make(tmp_path, model_of(method))


@pytest.mark.parametrize("method", NO_REFERENCE)
def test_a_method_with_one_adapter_only_trains_with_a_reference_model(method, tmp_path):
    one_step(kto(tmp_path, model_of(method), ref_model=decoder()))
    one_step(grpo(tmp_path, model_of(method), beta=0.0))


@pytest.mark.parametrize("method", ["adalora", "mola"])
def test_the_reference_of_a_new_adapter_is_the_base_model(method, tmp_path):
    fields = CASES[method].all_fields() | {"target_modules": "all-linear"}
    trainer = kto(tmp_path, decoder(), peft_config=petl.build_config(method, **fields))
    assert list(trainer.model.peft_config) == ["default"]
    batch = {"input_ids": torch.tensor([TOKENIZER("who? a fox")["input_ids"]])}
    line = one_step(trainer)
    assert line["loss"] == pytest.approx(0.5, abs=1e-6)  # the adapter starts at the base model
    with trainer.model.disable_adapter():
        torch.testing.assert_close(
            testing.logits(trainer.model, batch), testing.logits(decoder(), batch)
        )
