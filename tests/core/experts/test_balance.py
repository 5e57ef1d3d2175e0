"""The balance loss of a mixture's own routers: asked for where they train, and shown in the log."""

import pytest
import torch
import transformers
from architectures.small import Type
from mixtures import IDS
from torch import nn

import petl
from petl import testing
from petl.testing.models import OTHER_MODELS


def trained(base, **fields):
    """A wrapped model whose training begins, and its lifecycle."""
    model = petl.wrap(base, "lora", r=2, **fields).train()
    hooks = petl.lifecycle(model)
    hooks.prepare([])
    return model, hooks


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_trained_routers_are_balanced_and_the_log_shows_it(name):
    model, hooks = trained(OTHER_MODELS[name].base(), target_modules="router")
    base = model.get_base_model()
    outputs = model(IDS, labels=IDS)
    weight = base.config.router_aux_loss_coef
    assert hooks.metrics()["aux_loss"] == pytest.approx(weight * outputs.aux_loss.item())
    plain = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss - hooks.aux_loss(), plain)
    picks = [each.argmax(-1).bincount(minlength=each.shape[-1]) for each in outputs.router_logits]
    loads = [float(n.max() / n.float().mean()) for n in picks]
    assert hooks.metrics()["router_load_max"] == pytest.approx(sum(loads) / len(loads))
    assert petl.lifecycle(model).prepare([]) is None  # once more: it is counted once
    assert len(hooks.parts) == 1


@pytest.mark.parametrize("targets", [["q_proj"], "experts"])
def test_routers_that_do_not_train_are_left_alone(targets):
    model, hooks = trained(OTHER_MODELS["qwen3_moe"].base(), target_modules=targets)
    assert model(IDS, labels=IDS).aux_loss is None
    assert "aux_loss" not in hooks.metrics()


def test_a_balance_that_was_asked_for_is_told_from_the_loss_of_the_task():
    base = OTHER_MODELS["qwen3_moe"].base()
    base.config.output_router_logits = True
    model, hooks = trained(base, target_modules=["q_proj"])
    expected = 0.001 * model(IDS, labels=IDS).aux_loss.item()
    assert hooks.aux_loss().item() == pytest.approx(expected)
    assert hooks.aux_loss() > 0


def test_a_dense_model_has_no_such_part():
    _, hooks = trained(testing.tiny_llama(), target_modules=["q_proj"])
    assert hooks.parts == []


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        ("qwen3_moe", True),
        ("mixtral", True),
        ("llama4_text", False),
        ("deepseek_v3", False),
        ("lfm2_moe", False),
    ],
)
def test_a_router_trains_with_a_balance_only_where_the_model_computes_one(name, computed, caplog):
    caplog.set_level("INFO", logger="petl.core.experts.balance")
    each = Type("causal", name)
    config = each.config()
    config.first_k_dense_replace = 0  # DeepSeek-V3: a mixture in each of its blocks
    base = getattr(transformers, each.class_name)(config)
    assert base.config.output_router_logits is False  # all of them have the field
    model, hooks = trained(base, target_modules="router")
    model(IDS, labels=IDS)
    assert ("aux_loss" in hooks.metrics()) == computed
    assert base.config.output_router_logits == computed
    said = [each.levelname for each in caplog.records if each.name.endswith("experts.balance")]
    assert said == ["INFO" if computed else "WARNING"]
