"""The conformance checks: usable outside petl, and each detects the fault that it is for."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
import warm_python
from torch import nn

import petl
from petl import testing
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import AdapterLayer
from petl.core.tuners.adapter import AdapterTuner
from petl.core.tuners.asking import AskingTuner
from petl.methods.mola import MolaAdapter, MolaConfig
from petl.testing import Case, catalog
from petl.testing.case import assert_close

OUTSIDE = Path(__file__).parent / "stranger"
OF_ROUTERS = ("hidden_size", "heads", "layers", "embedding", "lookahead")
BESIDE = {tuple(f"router_{name}" for name in OF_ROUTERS): {"router_type": "pregated"}}
LLAMA = Case("mola", "llama", acts_with=BESIDE)
RECURRENT = Case("mola", "llama", {"router_type": "recurrent"})


@pytest.mark.thorough
def test_methods_outside_petl_pass_in_a_project_of_their_own():
    """Additive methods with and without shared tensors; no method of petl is both."""
    command = [
        warm_python.python(),
        "-m",
        "pytest",
        "-q",
        "-x",
        "conformance.py",
        "-p",
        "no:cacheprovider",
    ]
    # the parent's petl first: in a clone it is not the installed one
    path = [str(Path(petl.__file__).parents[1]), os.environ.get("PYTHONPATH", ""), str(OUTSIDE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        command, cwd=OUTSIDE, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def assert_noticed(check: str, case: Case = LLAMA) -> None:
    with pytest.raises(AssertionError, match=f"{case}.*{check}") as raised:
        testing.run(check, case)
    assert len(str(raised.value)) > len(f"{case}, {check}: "), f"{check} has no message"


@pytest.mark.thorough
def test_an_intact_method_passes_in_two_processes():
    testing.run("two_processes_equal_one", LLAMA)


def after(function, change):
    """Return `function`, followed by a call of `change` on its object."""

    def changed(self, *args, **kwargs):
        result = function(self, *args, **kwargs)
        change(self)
        return result

    return changed


def test_a_start_away_from_the_base_is_noticed(monkeypatch):
    change = after(MolaAdapter.__init__, lambda self: nn.init.ones_(self.lora_B))
    monkeypatch.setattr(MolaAdapter, "__init__", change)
    assert_noticed("starts_at_the_base_model")


def test_a_base_that_trains_is_noticed(monkeypatch):
    change = after(AdapterLayer.add, lambda self: self.base_layer.requires_grad_(True))
    monkeypatch.setattr(AdapterLayer, "add", change)
    wrap = Case.wrap

    def thawed(self, *args, **kwargs):
        model = wrap(self, *args, **kwargs)
        for layer in testing.tuner_layers(model).values():
            layer.base_layer.requires_grad_(True)
        return model

    monkeypatch.setattr(Case, "wrap", thawed)
    assert_noticed("only_the_adapter_trains")


def test_a_tensor_without_a_gradient_is_noticed(monkeypatch):
    route = MolaAdapter.route

    def severed(self, x):
        logits, x = route(self, x)
        return logits.detach(), x

    monkeypatch.setattr(MolaAdapter, "route", severed)
    assert_noticed("every_trainable_tensor_gets_a_gradient")


def test_dropout_in_evaluation_is_noticed(monkeypatch):
    dropout = nn.functional.dropout
    always = lambda x, p, training: dropout(x, p, training=True)  # noqa: E731
    monkeypatch.setattr(nn.functional, "dropout", always)
    assert_noticed("dropout_acts_in_training_alone", Case("compacter", "llama", {"r": 8}))


@pytest.mark.thorough
def test_a_field_without_effect_is_noticed(monkeypatch):
    rank_and_scaling = MolaConfig.rank_and_scaling
    monkeypatch.setattr(
        MolaConfig, "rank_and_scaling", lambda *given: (rank_and_scaling(*given)[0], 1.0)
    )
    with pytest.raises(AssertionError, match=r"lora_alpha .*use_rslora"):
        testing.run("every_field_acts", LLAMA)


@pytest.mark.thorough
def test_an_idle_field_that_acts_is_noticed():
    case = replace(LLAMA, idle={"r": "no reason"})
    with pytest.raises(AssertionError, match=r"r=.* idle"):
        testing.run("every_field_acts", case)


def test_an_auxiliary_loss_that_counts_once_a_micro_batch_is_noticed(monkeypatch):
    scale = lambda self, model, kwargs: torch.ones(())  # noqa: E731
    monkeypatch.setattr(ForwardContext, "_scale", scale)
    assert_noticed("accumulated_gradients_add_up")


def test_a_term_that_recomputation_records_again_is_noticed(monkeypatch):
    record = ForwardContext.record

    def piling(self, key, term, **series):
        record(self, f"{key}.{len(self.terms)}.{id(term)}", term, **series)

    monkeypatch.setattr(ForwardContext, "record", piling)
    begin = ForwardContext.begin

    def keeping(self, *args):
        kept = dict(self.terms)
        begin(self, *args)
        self.terms.update(kept)

    monkeypatch.setattr(ForwardContext, "begin", keeping)
    assert_noticed("training_forward_leaves_nothing_behind")


def test_a_state_that_recomputation_does_not_find_is_noticed(monkeypatch):
    end = ForwardContext.end

    def forgetful(self, *args):
        result = end(self, *args)
        self.state.clear()
        return result

    monkeypatch.setattr(ForwardContext, "end", forgetful)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        testing.run("checkpointing_gives_the_same_gradients", RECURRENT)


def test_a_refusal_that_does_not_come_is_noticed():
    refuses = ("reentrant_checkpointing_gives_the_same_gradients",)
    testing.run(refuses[0], Case("mola", "llama", RECURRENT.fields, refuses=refuses))
    assert_noticed(refuses[0], Case("mola", "llama", refuses=refuses))


def test_a_device_synchronization_is_noticed(monkeypatch):
    route = MolaAdapter.route

    def waiting(self, x):
        float(x.sum())
        return route(self, x)

    monkeypatch.setattr(MolaAdapter, "route", waiting)
    assert_noticed("training_step_does_not_wait_for_the_device")


def test_a_graph_break_is_noticed(monkeypatch):
    forward = MolaAdapter.forward

    def breaking(self, x, y):
        torch._dynamo.graph_break()
        return forward(self, x, y)

    monkeypatch.setattr(MolaAdapter, "forward", breaking)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        testing.run("layer_compiles_whole", LLAMA)


def test_adapters_that_stay_on_are_noticed(monkeypatch):
    monkeypatch.setattr(AdapterLayer, "enable_adapters", lambda self, enabled: None)
    assert_noticed("disabled_adapters_give_the_base_model")


def test_tensors_left_by_a_deleted_adapter_are_noticed(monkeypatch):
    monkeypatch.setattr(AdapterLayer, "delete_adapter", lambda self, adapter_name: None)
    assert_noticed("deleted_adapters_leave_no_tensor", RECURRENT)


def test_hooks_left_by_unload_are_noticed(monkeypatch):
    monkeypatch.setattr(AdapterTuner, "_remove_hooks", lambda self: None)
    assert_noticed("unloading_gives_the_plain_model")


def test_a_mixed_batch_that_uses_one_adapter_for_all_is_noticed(monkeypatch):
    forward = AdapterLayer._forward_mixed

    def one(self, *args):
        *rest, names = args
        return forward(self, *rest, [names[0]] * len(names))

    monkeypatch.setattr(AdapterLayer, "_forward_mixed", one)
    assert_noticed("mixed_batch_equals_single_runs")


def test_a_change_by_a_refused_merge_is_noticed(monkeypatch):
    def late(self):
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                module.base_layer.weight.data.mul_(2)
        raise NotImplementedError("too late")

    monkeypatch.setattr(AdapterTuner, "_check_merge_allowed", late)
    assert_noticed("merging_is_refused_before_anything_changes")


def test_lenient_loading_is_noticed(monkeypatch):
    lenient = super(AskingTuner, AdapterTuner)._remap_adapter_state_dict_for_load.__func__
    monkeypatch.setattr(AdapterTuner, "_remap_adapter_state_dict_for_load", classmethod(lenient))
    assert_noticed("damaged_files_do_not_load")


def test_a_copy_that_shares_its_context_is_noticed(monkeypatch):
    def shared(self, memo):
        return self

    monkeypatch.setattr(ForwardContext, "__deepcopy__", shared)
    monkeypatch.setattr(MolaAdapter, "__deepcopy__", lambda self, memo: self, raising=False)
    assert_noticed("copies_are_the_same_and_apart")


def test_a_half_precision_adapter_is_noticed(monkeypatch):
    cast = AdapterTuner._cast_adapter_dtype

    def never(self, adapter_name, autocast_adapter_dtype=True):
        cast(self, adapter_name, False)

    monkeypatch.setattr(AdapterTuner, "_cast_adapter_dtype", never)
    assert_noticed("half_precision_base_keeps_a_float32_adapter")


def test_a_config_that_its_file_changes_is_noticed(monkeypatch):
    change = after(
        MolaConfig.__post_init__, lambda self: setattr(self, "lora_alpha", self.lora_alpha + 1)
    )
    monkeypatch.setattr(MolaConfig, "__post_init__", change)
    assert_noticed("config_survives_its_file")


def test_a_tensor_name_against_the_rule_is_noticed(monkeypatch):
    def nested(self) -> None:
        self.router_module = nn.Linear(2, 2)

    monkeypatch.setattr(MolaAdapter, "__init__", after(MolaAdapter.__init__, nested))
    assert_noticed("tensor_names_follow_the_rule")


def test_a_resumed_run_without_its_adapter_is_noticed(monkeypatch):
    from petl.testing import training

    def forgetful(base, folder, **kwargs):
        return LLAMA.wrap(base)

    monkeypatch.setattr(training, "load", forgetful)
    assert_noticed("resumed_training_equals_a_straight_run")


def test_checks_are_listed_by_case():
    own, adopted = testing.checks(LLAMA), testing.checks(Case("lora", "bert"))
    assert "two_forwards_before_one_backward" in own
    assert "two_forwards_before_one_backward" not in adopted
    assert "merging_is_refused_before_anything_changes" in own
    assert "merging_and_unmerging_change_nothing" in adopted
    assert "cached_generation_equals_uncached" not in adopted
    assert set(own) | set(adopted) <= set(testing.checks())
    slow = {"model_compiles_whole", "sharded_processes_equal_one", "trains_on_a_torchao_base"}
    assert slow <= set(testing.checks(LLAMA, slow=True))
    assert not slow & set(testing.checks(LLAMA, slow=False))
    excused = Case("mola", "llama", excused={"copies_are_the_same_and_apart": "a reason"})
    assert set(own) - set(testing.checks(excused)) == {"copies_are_the_same_and_apart"}


def test_params_have_ids_and_marks():
    cases = [LLAMA, Case("lora", "bert")]
    params = list(testing.params(cases))
    by_id = {param.id: param for param in params}
    assert [param.values for param in params] == [
        (case, check) for case in cases for check in testing.checks(case)
    ]
    assert len(by_id) == len(params)
    slow = {name for name, param in by_id.items() if "slow" in {m.name for m in param.marks}}
    assert {"mola-llama-model_compiles_whole", "lora-bert-two_processes_equal_one"} <= slow
    assert "mola-llama-two_processes_equal_one" not in slow
    assert {param.id for param in testing.params(cases, slow=True)} == slow
    assert {param.id for param in testing.params(cases, slow=False)} == set(by_id) - slow


PACKAGES = {
    "trains_on_a_4bit_base": "bitsandbytes",
    "trains_on_an_8bit_base": "bitsandbytes",
    "trains_on_a_torchao_base": "torchao",
    "zero_processes_equal_one": "deepspeed",
}


def test_checks_name_the_packages_that_they_need():
    assert {name: e.package for name, e in testing.CHECKS.items() if e.package} == PACKAGES


@pytest.mark.parametrize("check", PACKAGES)
def test_a_check_without_its_package_is_skipped_with_an_install_line(check, monkeypatch):
    reason = f"{PACKAGES[check]} is not installed; run: pip install {PACKAGES[check]}"
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    with pytest.raises(SkipTest, match=f"^{reason}$"):
        testing.run(check, LLAMA)
    param = next(p for p in testing.params([LLAMA]) if p.values[1] == check)
    assert reason in [mark.kwargs.get("reason") for mark in param.marks if mark.name == "skip"]


@pytest.mark.thorough
def test_pytest_reports_a_check_without_its_package_as_skipped(tmp_path):
    (tmp_path / "test_skip.py").write_text(
        "from petl import testing\n"
        "from petl.testing import catalog\n\n\n"
        "def test_contract(monkeypatch):\n"
        "    monkeypatch.setattr(catalog, 'find_spec', lambda name: None)\n"
        "    testing.run('trains_on_a_torchao_base', testing.Case('mola'))\n"
    )
    command = [warm_python.python(), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "."]
    path = [str(Path(petl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 skipped" in done.stdout
    assert "pip install torchao" in done.stdout


@pytest.mark.thorough
def test_messages_name_the_bound():
    slow_learner = Case("mola", "llama", lr=1e-5)
    with pytest.raises(AssertionError, match=r"5% in 20 steps.*lr="):
        testing.run("only_the_adapter_trains", slow_learner)
    with pytest.raises(AssertionError, match=r"^logits .*2.00e\+00.* 1e-06"):
        assert_close(torch.zeros(2), torch.tensor([1.0, 2.0]), 1e-6, "logits")


def test_every_check_has_a_promise():
    for entry in testing.CHECKS.values():
        assert entry.promise.endswith("."), entry.name


def test_tiny_models_are_reproducible_and_do_not_touch_the_random_state():
    torch.manual_seed(7)
    expected = torch.rand(1)
    for build in (testing.tiny_llama, testing.tiny_bert, testing.tiny_t5, testing.tiny_vit):
        torch.manual_seed(7)
        first, second = build().state_dict(), build().state_dict()
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model", testing.TINY_MODELS)
def test_batches_have_labels_in_each_row_and_mixed_padding(model):
    """Labels in each row, and in texts padding of several lengths."""
    tiny = testing.TINY_MODELS[model]
    batch = tiny.batch()
    assert tiny.items(batch) > 0
    assert float(tiny.base()(**batch).loss) > 0
    if "attention_mask" in batch:
        assert len(set(batch["attention_mask"].sum(1).tolist())) == 4


def rank_and_size() -> tuple[int, int, bool]:
    distributed = torch.distributed
    total = torch.ones(1)
    distributed.all_reduce(total)
    return distributed.get_rank(), int(total), torch.get_num_threads() == 1


@pytest.mark.thorough
def test_processes_of_a_group_know_their_rank_and_size():
    assert testing.in_processes(2, rank_and_size) == [(0, 2, True), (1, 2, True)]


def fails() -> None:
    raise petl.InputError("a reason")


def test_an_error_in_another_process_is_raised():
    with pytest.raises(petl.InputError, match="a reason"):
        testing.in_fresh_process(fails)


def test_an_adapter_that_noise_would_not_reach_is_refused():
    model = Case("lora", "llama", {"target_modules": "block-linear"}).wrap()
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(petl.InputError):
        testing.stir(model, "other")
