"""The density term and its figures, against sums over activations that are written out."""

import copy
import json
import math
import pickle

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_tokenizers import byte_tokenizer
from torch import nn
from training_fixtures import bert_config, train
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import petl
from petl import testing
from petl.app import config_dir
from petl.errors import InputError, UnsupportedError
from petl.losses.density import ActivationDensity, ActivationDensityConfig

pytest_plugins = ["training_fixtures"]

EPS = 1e-2  # large enough for tiny random models to feel it


def llama(act="relu", layers=2, **fields):
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act=act,
        pad_token_id=0,
        use_cache=False,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


MODELS = {
    "llama-relu": (llama, "llama"),
    "llama-silu": (lambda: llama("silu"), "llama"),
    "bert-gelu": (testing.tiny_bert, "bert"),
    "t5": (testing.tiny_t5, "t5"),
}
LEAVES = ("act_fn", "intermediate_act_fn", "act")


def lora(base, task=None):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type=task)
    return testing.stir(get_peft_model(base, config))


def written_out(model, batch, weight=1.0, eps=EPS, scale=1.0):
    """Task loss plus term, from activations that plain hooks collect, with its gradients and D."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, out))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LEAVES
    ]
    model.train().zero_grad()
    task = model(**batch).loss
    for handle in handles:
        handle.remove()
    stacks = {}
    for name, a in seen.items():
        h = a.float() ** 2 / (a.float() ** 2 + eps)
        stacks.setdefault("decoder" if "decoder" in name else "", []).append(h.mean())
    term = sum(sum(layers) / len(layers) for layers in stacks.values())
    total = task + weight * term
    (total * scale).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.detach(), gradients, term.detach(), task.detach()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert set(found) == set(expected)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=float(largest) * 1e-5)


def dense(model, **fields):
    return ActivationDensity(model, ActivationDensityConfig(**({"eps": EPS} | fields)))


def batch_of(name, rows=4, seed=0):
    return testing.TINY_MODELS[MODELS[name][1]].batch(rows, seed)


# The term


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", [None, "given"])
def test_loss_and_gradients_are_those_of_the_sum_written_out(name, task):
    """PEFT calls the base model itself when there is no task type."""
    make, tiny = MODELS[name]
    model = lora(make(), testing.TINY_MODELS[tiny].task_type if task else None)
    batch = batch_of(name)
    total, expected, term, _ = written_out(model, batch, weight=2.0)
    term_on = dense(model, weight=2.0)
    output = model.train()(**batch)
    torch.testing.assert_close(output.loss.detach(), total)
    torch.testing.assert_close(term_on.loss, term)
    output.loss.backward()
    assert_same(gradients(model), expected)


def test_the_term_alone_moves_the_adapter():
    """Otherwise a test of gradients could pass without it."""
    model, batch = lora(llama()), batch_of("llama-relu")
    _, without, _, _ = written_out(model, batch, weight=0.0)
    _, along, _, _ = written_out(model, batch, weight=2.0)
    name = next(n for n in along if "layers.0.mlp.gate_proj.lora_B" in n)
    assert (along[name] - without[name]).norm() > 0.1 * without[name].norm()


def test_evaluation_no_labels_and_no_weight_leave_the_task_loss():
    model, batch = lora(llama()), batch_of("llama-relu")
    *_, task = written_out(model, batch)
    dense(model)
    torch.testing.assert_close(model.eval()(**batch).loss, task)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**batch).loss, task)
    assert model(input_ids=batch["input_ids"]).loss is None
    model.activation_density.remove()
    term = dense(model, weight=0.0)
    _, expected, value, _ = written_out(model, batch, weight=0.0)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.detach(), task)
    loss.backward()
    assert_same(gradients(model), expected)
    torch.testing.assert_close(term.loss, value)  # counted all the same, for the log


def test_forwards_without_a_loss_do_not_add_up():
    model, batch = lora(llama()), batch_of("llama-relu")
    total, expected, _, _ = written_out(model, batch)
    dense(model)
    model.train()
    for _ in range(2):
        model(input_ids=batch["input_ids"])
    for _ in range(2):
        loss = model(**batch).loss
        torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)


def test_a_disabled_adapter_leaves_the_task_loss():
    model, batch = lora(llama()), batch_of("llama-relu")
    term = dense(model)
    with model.disable_adapter():
        loss = model.train()(**batch).loss
        torch.testing.assert_close(loss, model.eval()(**batch).loss)
    assert term.loss is not None


def test_a_tiny_eps_counts_what_is_exactly_not_zero():
    model, batch = lora(llama("relu")), batch_of("llama-relu")
    term = dense(model, eps=1e-14)
    model.train()(**batch)
    assert float(term.loss) == pytest.approx(term.measure([batch])["density"], abs=5e-3)


def test_a_module_called_twice_counts_as_one_layer():
    class Twice(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) + self.mlp(x * 0.5)

    def make():
        base = llama(layers=1)
        base.model.layers[0].mlp = Twice(base.model.layers[0].mlp)
        return lora(base)

    model, batch, seen = make(), batch_of("llama-relu"), []
    hook = model.base_model.model.model.layers[0].mlp.mlp.act_fn.register_forward_hook(
        lambda m, a, out: seen.append(out)
    )
    task = model.train()(**batch).loss
    hook.remove()
    term = sum((a**2 / (a**2 + EPS)).mean() for a in seen) / 2
    (task + term).backward()
    expected = gradients(model)
    dense(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, task + term)
    loss.backward()
    assert_same(gradients(model), expected)


def test_padding_is_left_out_where_that_is_asked_for():
    model, batch = lora(llama()), batch_of("llama-relu")
    keep = batch["attention_mask"].bool()
    assert not keep.all()
    seen = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out))
        for layer in model.base_model.model.model.layers
    ]
    task = model.train()(**batch).loss
    for hook in hooks:
        hook.remove()
    terms = [(a[keep] ** 2 / (a[keep] ** 2 + EPS)).mean() for a in seen]
    (task + sum(terms) / 2).backward()
    expected = gradients(model)
    term = dense(model, mask_padding=True)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, task + sum(terms) / 2)
    loss.backward()
    assert_same(gradients(model), expected)
    shares = [(a[row][keep[row]] != 0).float().mean() for a in seen for row in range(4)]
    assert term.measure([batch])["density"] == pytest.approx(float(sum(shares) / 8), abs=1e-6)
    with pytest.raises(InputError, match="mask_padding needs attention masks"):
        model(**batch | {"attention_mask": torch.ones(4, 1, 10, 10, dtype=torch.bool)})


def test_the_decoder_of_a_pair_has_its_own_padding():
    model, batch = lora(testing.tiny_t5()), batch_of("t5")
    term = dense(model, mask_padding=True)
    model.train()(**batch)
    assert term.masks["decoder"].shape == batch["labels"].shape
    assert torch.equal(term.masks["decoder"], batch["labels"] != -100)


def test_the_input_of_the_down_projection_can_be_counted_instead():
    model, batch, seen = lora(llama()), batch_of("llama-relu"), []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in model.base_model.model.model.layers
    ]
    task = model.train()(**batch).loss
    for hook in hooks:
        hook.remove()
    term = sum((a**2 / (a**2 + EPS)).mean() for a in seen) / 2
    (task + term).backward()
    expected = gradients(model)
    found = dense(model, signal="down_input")
    loss = model(**batch).loss
    torch.testing.assert_close(loss, task + term)
    loss.backward()
    assert_same(gradients(model), expected)
    assert all(name.endswith("down_proj") for name in found.places.layers)


def test_nothing_is_kept_for_backward_but_the_activation():
    """The next layer keeps it anyway, with LoRA on it; the literal formula keeps two more."""

    def kept(model):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.train()(**batch_of("llama-relu")).loss
        del loss
        return sum(storages.values())

    model = lora(llama())
    plain = kept(model)
    dense(model)
    assert kept(model) - plain <= 64 * 2  # scalars


# In trainers


@pytest.mark.parametrize("pieces", [1, 2])
def test_our_lifecycle_weighs_micro_batches(pieces):
    model, life_batches = lora(llama()), [batch_of("llama-relu", 2, s) for s in range(pieces)]
    expected = [written_out(model, b, scale=1 / pieces)[1] for b in life_batches]
    dense(model)
    life = petl.lifecycle(model)
    life.aux_weight = 1 / pieces
    for batch in life_batches:
        (model.train()(**batch).loss / pieces).backward()
    assert_same(gradients(model), {n: sum(e[n] for e in expected) for n in expected[0]})
    assert life.has_aux
    assert set(life.metrics()) == {"aux_loss", "density_loss"}


def test_the_accumulation_field_divides_the_term():
    model, batch = lora(llama()), batch_of("llama-relu")
    total, expected, _, _ = written_out(model, batch, weight=1 / 4)
    dense(model, gradient_accumulation_steps=4)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)


class Stop(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


ONE_STEP = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def in_trainer(model, rows, folder, callbacks, trainer=Trainer, **options):
    """Gradients that the optimizer is given for one step of two micro-batches."""
    optimizer = Stop([p for p in model.parameters() if p.requires_grad], lr=0.0)
    kind = SFTConfig if trainer is SFTTrainer else TrainingArguments

    class InOrder(trainer):
        def _get_train_sampler(self, *args):
            return None

    data = Dataset.from_dict({k: v.tolist() for k, v in rows.items()})
    InOrder(
        model,
        kind(folder, **ONE_STEP),
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        **options,
    ).train()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    model.zero_grad()
    return dict(zip(names, optimizer.seen, strict=True))


@pytest.mark.parametrize("name", ["llama-relu", "bert-gelu"])
@pytest.mark.parametrize("callback", [True, False])
def test_trainer_with_accumulation_counts_the_term_once(tmp_path, name, callback):
    """Whatever it makes of the task's loss: the mean over its micro-batches is added to that."""
    rows = batch_of(name, 4)
    del rows["attention_mask"]
    if rows["labels"].dim() == 2:  # equal counts of labels, so that halves weigh the same
        rows["labels"] = rows["input_ids"].clone()
    halves = [{k: v[i : i + 2] for k, v in rows.items()} for i in (0, 2)]
    model = lora(MODELS[name][0](), testing.TINY_MODELS[MODELS[name][1]].task_type)
    expected = in_trainer(model, rows, tmp_path, [])
    for half in halves:
        without, along = (written_out(model, half, weight=w)[1] for w in (0.0, 1.0))
        for n, gradient in along.items():
            expected[n] += (gradient - without[n]) / 2
    dense(model)
    found = in_trainer(model, rows, tmp_path, [petl.Callback()] if callback else [])
    assert_same(found, expected)


def test_sft_trainer_counts_the_term_under_its_own_loss_and_checkpointing(tmp_path):
    ids = batch_of("llama-relu", 4)["input_ids"]
    rows, options = {"input_ids": ids, "labels": ids}, {"processing_class": byte_tokenizer()}
    model = lora(llama(), "CAUSAL_LM")
    expected = in_trainer(model, rows, tmp_path, [], SFTTrainer, **options)
    for half in ({k: v[i : i + 2] for k, v in rows.items()} for i in (0, 2)):
        without, along = (written_out(model, half, weight=w)[1] for w in (0.0, 1.0))
        for n, gradient in along.items():
            expected[n] += (gradient - without[n]) / 2
    dense(model)
    found = in_trainer(model, rows, tmp_path, [petl.Callback()], SFTTrainer, **options)
    assert_same(found, expected)


def test_checkpointing_gives_the_same_gradients_unless_it_is_the_reentrant_kind():
    model, batch = lora(llama()), batch_of("llama-relu")
    total, expected, _, _ = written_out(model, batch)
    dense(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    message = r"density needs gradient_checkpointing_kwargs=\{'use_reentrant': False\}"
    with pytest.raises(UnsupportedError, match=message):
        model(**batch)
    loss = model.eval()(**batch).loss  # the refused forward leaves nothing behind
    torch.testing.assert_close(loss, model.eval()(**batch).loss)


def test_two_forwards_before_one_backward_under_checkpointing():
    """Each is recomputed with its own count, though their sizes differ."""
    model = lora(llama())
    first, second = batch_of("llama-relu", 4), batch_of("llama-relu", 2, seed=5)
    expected = [written_out(model, b)[1] for b in (first, second)]
    dense(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    (model(**first).loss + model(**second).loss).backward()
    assert_same(gradients(model), {n: sum(e[n] for e in expected) for n in expected[0]})


def gradients_of_a_share():
    rank = torch.distributed.get_rank()
    model = lora(llama())
    dense(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    batch = {k: v[2 * rank : 2 * rank + 2] for k, v in batch_of("llama-relu").items()}
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"]
    wrapped.train()(**batch).loss.backward()
    measured = model.activation_density.measure([batch])["density"]
    found = model.activation_density.ppl_sparsity([batch], p=5.0)
    return gradients(model), measured, found


def test_two_processes_average_their_terms_and_agree_on_figures():
    (first, density, ppl), (second, *others) = testing.in_processes(2, gradients_of_a_share)
    batch = batch_of("llama-relu")
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    model = lora(llama())
    _, expected, _, _ = written_out(model, batch)  # equal shapes: the mean of both is that of all
    assert_same(first, expected)
    assert_same(second, expected)
    term = dense(model)
    assert density == others[0] == pytest.approx(term.measure([batch])["density"])
    alone = term.ppl_sparsity([batch], p=5.0)
    assert ppl == others[1]
    assert ppl["sparsity"] == pytest.approx(alone["sparsity"], abs=1e-3)
    assert ppl["ppl_sparse"] == pytest.approx(alone["ppl_sparse"], rel=1e-4)


@pytest.mark.slow
def test_the_term_is_in_a_compiled_step():
    model, batch = lora(llama()), batch_of("llama-relu")
    total, expected, _, _ = written_out(model, batch)
    dense(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)


def test_training_with_the_term_lowers_the_density():
    batch = batch_of("llama-relu")
    set_seed(0)
    model = lora(llama())
    term = dense(model, weight=5.0)
    before = term.measure([batch])["density"]
    testing.training.train(model.train(), batch, steps=60, lr=1e-2)
    assert term.measure([batch])["density"] < before - 0.02


# With methods


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["lora", "mola", "sparse"])
def test_it_composes_with_methods(name, method):
    """The gradient is the method's own, auxiliary loss included, plus that of the term."""
    batch = testing.TINY_MODELS[name].batch()
    model = testing.Case(method, name, {"total_step": 9} if method == "sparse" else {}).wrap()
    testing.stir(model)
    total, expected, value, _ = written_out(model, batch, weight=3.0)
    term = dense(model, weight=3.0)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(term.loss, value)
    loss.backward()
    assert_same(gradients(model), expected)
    life = petl.lifecycle(model)
    own = model.base_model.aux_loss() if method == "mola" else 0.0
    torch.testing.assert_close(life.aux_loss(), 3.0 * term.loss + own)


def test_wrap_puts_the_term_on_the_method_named():
    batch = batch_of("llama-relu")
    torch.manual_seed(1)
    model = petl.wrap(
        llama(), "density", method="mola", method_config={"r": 2}, weight=2.0, eps=EPS
    )
    assert isinstance(model, PeftModel)
    assert model.active_peft_config.r == 2
    assert isinstance(model.activation_density, ActivationDensity)
    loss, task = model.train()(**batch).loss, model.eval()(**batch).loss
    life = petl.lifecycle(model)
    model.train()(**batch)
    balance = model.base_model.aux_loss()
    torch.testing.assert_close(loss, task + 2.0 * model.activation_density.loss + balance)
    torch.testing.assert_close(life.aux_loss(), 2.0 * model.activation_density.loss + balance)


def test_trainable_parameters_are_those_of_the_method():
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    plain = petl.wrap(llama(), "lora", **fields)
    model = petl.wrap(llama(), "density", method="lora", method_config=fields)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_it_is_called_density_and_nothing_else():
    assert petl.list_losses() == ["density"]
    assert petl.get("density") is ActivationDensityConfig
    assert "deft" not in petl.list_methods()
    with pytest.raises(InputError):
        petl.wrap(llama(), "deft")
    model = petl.wrap(llama(), "density")
    assert model.active_peft_config.peft_type == "LORA"


@pytest.mark.parametrize(
    ("overrides", "method", "weight"),
    [
        (["+method=mola", "+loss=density", "loss.weight=2"], "mola", 2),
        (["+method=deft"], "lora", 1.0),
    ],
)
def test_the_command_line_composes_method_and_term(overrides, method, weight):
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    assert cfg.method.name == method
    config = petl.losses.read(OmegaConf.to_container(cfg.loss))
    assert config == ActivationDensityConfig(weight=weight)
    fields = OmegaConf.to_container(cfg.method)
    fields.pop("target_modules")
    model = petl.wrap(llama(), fields.pop("name"), target_modules=["q_proj", "v_proj"], **fields)
    term = petl.losses.attach(model, config)
    assert term is model.activation_density
    assert petl.losses.attach(model, petl.losses.read(None)) is None
    figures = petl.lifecycle(model).report([batch_of("llama-relu")])
    assert set(figures) == {"density", "ppl_1_sparsity"}


def test_a_run_reports_figures_before_and_after(tiny, tmp_path):
    choice = [
        "+method=mola",
        "+loss=density",
        "loss.eps=1e-2",
        "loss.weight=3",
        "train.log_steps=2",
    ]
    run = train([*tiny.steady, *choice], tmp_path / "run")
    figures = {"density", "ppl_1_sparsity"}
    for moment in ("before", "after"):
        assert figures < set(run.scores[moment])
    told = json.loads((run.path / "adapter" / "density.json").read_text())
    assert (told["weight"], told["eps"]) == (3, 1e-2)
    assert figures == set(told["measured"])
    for line in run.metrics:
        assert line["aux_loss"] > 3 * line["density_loss"] > 0  # the balance of MoLA is in it too
    config = bert_config()
    config.num_labels = 3
    assert petl.load(BertForSequenceClassification(config), run.path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("+loss=densty", "densty"),
        ("loss.weigth=1", "weigth"),
        ("loss.eps=0", "eps must be positive"),
        ("loss.activation_modules=[act_fun]", "act_fun"),
    ],
)
def test_a_bad_loss_stops_the_run_before_it_begins(tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train([*tiny.steady, "+method=lora", "+loss=density", change], tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Figures


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("name", ["llama-relu", "t5"])
def test_measure_counts_each_sample_and_module(name, threshold):
    model = lora(MODELS[name][0]())
    data = [batch_of(name, 4), batch_of(name, 2, seed=3)]
    term, seen = dense(model), {}
    modules = dict(model.get_base_model().named_modules())
    for layer in term.places.layers:
        modules[layer].register_forward_hook(
            lambda m, a, out, key=layer: seen.setdefault(key, []).extend(out)
        )
    model.train()
    found = term.measure(data, threshold=threshold)
    assert model.training
    shares = {
        key: sum(float((a.abs() > threshold).float().mean()) for a in samples) / len(samples)
        for key, samples in seen.items()
    }
    assert all(len(samples) == 6 for samples in seen.values())
    assert found["per_layer"] == pytest.approx(shares)
    assert found["density"] == pytest.approx(sum(shares.values()) / len(shares))
    stacks = {"encoder", "decoder"} & set(found)
    assert stacks == ({"encoder", "decoder"} if name == "t5" else set())
    for stack in stacks:
        ours = [s for key, s in shares.items() if stack in key]
        assert found[stack] == pytest.approx(sum(ours) / len(ours))


def test_measure_warns_that_silu_is_never_silent():
    term = dense(lora(llama("silu")))
    with pytest.warns(UserWarning, match="exact zeros never occur with silu"):
        found = term.measure([batch_of("llama-silu")])
    assert found["density"] == 1.0
    assert set(term.report([batch_of("llama-silu")])) == {"ppl_1_sparsity"}


def effective(layer):
    """The adapted weight [O, F] of a LoRA layer, and its bias."""
    weight = layer.weight + layer.get_delta_weight("default")
    return weight.detach(), layer.base_layer.bias


def masked_run(model, names, thresholds, batches):
    """Perplexity and kept share of a run with weak neurons set to 0, written out."""
    modules, shares, nll, count = dict(model.get_base_model().named_modules()), {}, 0.0, 0

    def hook(module, args, name):
        strength = args[0].abs() * effective(module)[0].norm(dim=0)
        keep = strength >= thresholds[name]
        shares.setdefault(name, []).append(keep.float().mean(-1).flatten())
        return (args[0] * keep,)

    handles = [
        modules[n].register_forward_pre_hook(lambda m, args, n=n: hook(m, args, n)) for n in names
    ]
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"][:, 1:]
            logits = model.eval()(**batch).logits[:, :-1].log_softmax(-1)
            keep = labels != -100
            nll -= float(logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep].sum())
            count += int(keep.sum())
    for handle in handles:
        handle.remove()
    kept = {n: float(torch.cat(s).mean()) for n, s in shares.items()}
    return math.exp(nll / count), kept


def cett(weight, a, threshold):
    """Mean over tokens of the norm of what the weak neurons add over that of the whole output."""
    parts = [a[t][:, None] * weight.t() for t in range(len(a))]  # [F, O]: each neuron's output
    left = [p[p.norm(dim=1) < threshold].sum(0).norm() / p.sum(0).norm() for p in parts]
    return float(torch.stack(left).mean())


def trained(model, batch):
    testing.training.train(model.train(), batch, steps=40, lr=1e-2)
    return model.eval()


def test_ppl_sparsity_is_what_its_thresholds_give():
    data = [batch_of("llama-relu", 4), batch_of("llama-relu", 3, seed=2)]
    model = trained(lora(llama(layers=3)), data[0])
    term = dense(model)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    dense_ppl, _ = masked_run(model, names, dict.fromkeys(names, 0.0), data)
    inputs = {}
    for name in names:
        model.get_base_model().get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: inputs.setdefault(n, []).append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    acts = {n: torch.cat(parts) for n, parts in inputs.items()}

    last = -1.0
    for p in (1.0, 10.0, 50.0):
        found = term.ppl_sparsity(data, p=p)
        ppl, kept = masked_run(model, names, found["thresholds"], data)
        assert found["ppl_dense"] == pytest.approx(dense_ppl, rel=1e-5)
        assert found["ppl_sparse"] == pytest.approx(ppl, rel=1e-5)
        assert ppl / dense_ppl <= 1 + p / 100 + 1e-6
        assert found["per_layer"] == pytest.approx({n: 1 - k for n, k in kept.items()}, abs=1e-6)
        assert found["sparsity"] == pytest.approx(1 - sum(kept.values()) / 3, abs=1e-6)
        assert found["activation_ratio"] == pytest.approx(1 - found["sparsity"])
        for name, threshold in found["thresholds"].items():
            weight, _ = effective(model.get_base_model().get_submodule(name))
            cost = cett(weight, acts[name], threshold)
            assert cost <= found["cett"] + 1e-5
            assert cost >= 0.97 * found["cett"]  # as close as single neurons allow
        assert found["sparsity"] >= last
        last = found["sparsity"]


def test_thresholds_agree_with_a_search_over_a_grid():
    """The published search tries quantiles; the largest of a fine grid that fits must agree."""
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    found = dense(model).ppl_sparsity(data, p=5.0)
    name = "model.layers.1.mlp.down_proj"
    layer, seen = model.get_base_model().get_submodule(name), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**data[0])
    weight, _ = effective(layer)
    top = float((seen[0].abs() * weight.norm(dim=0)).max())
    grid = [top * i / 200 for i in range(1, 201)]
    fits = [e for e in grid if cett(weight, seen[0], e) <= found["cett"]]
    assert abs(max(fits, default=0.0) - found["thresholds"][name]) <= top / 200 * 1.5


def test_activations_that_do_not_fit_are_computed_again(monkeypatch):
    data = [batch_of("llama-relu", 4)]
    model = trained(lora(llama()), data[0])
    term = dense(model)
    expected = term.ppl_sparsity(data, p=5.0)
    monkeypatch.setattr("petl.losses.density.ppl.HELD_BYTES", 1)
    assert term.ppl_sparsity(data, p=5.0) == expected


def test_a_routed_down_projection_is_measured_by_its_base():
    model = testing.Case("mola", "llama").wrap_stirred()
    found = dense(model).ppl_sparsity([batch_of("llama-relu")], p=10.0)
    assert found["ppl_sparse"] <= found["ppl_dense"] * 1.1 + 1e-6


def test_ppl_sparsity_needs_labels_and_down_projections():
    term = dense(lora(llama()))
    with pytest.raises(InputError, match="needs labels"):
        term.ppl_sparsity([{"input_ids": batch_of("llama-relu")["input_ids"]}])
    with pytest.raises(InputError, match="p=-1 is negative"):
        term.ppl_sparsity([batch_of("llama-relu")], p=-1)
    experts = dense(lora_on_attention(mixtral()))
    with pytest.raises(InputError, match="no down projection found"):
        experts.ppl_sparsity([batch_of("llama-relu")])
    assert "ppl_1_sparsity" not in experts.report([batch_of("llama-relu")])


# Experts, files, refusals


def mixtral():
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        hidden_act="relu",
        pad_token_id=0,
        use_cache=False,
        experts_implementation="eager",
    )
    return MixtralForCausalLM(config).eval()


def lora_on_attention(base):
    torch.manual_seed(1)
    return testing.stir(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))


def test_experts_count_by_their_tokens():
    """Each is called with as many tokens as it was given; a layer is a mean over all of them."""
    model, seen, batch = lora_on_attention(mixtral()), {}, batch_of("llama-relu")
    for i, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.experts.act_fn.register_forward_hook(
            lambda m, a, out, i=i: seen.setdefault(i, []).append(out)
        )
    term = dense(model)
    model.train()(**batch)
    assert len({len(a) for a in seen[0]}) > 1
    layers = []
    for calls in seen.values():
        a = torch.cat(calls)
        layers.append((a**2 / (a**2 + EPS)).mean())
    torch.testing.assert_close(term.loss, sum(layers).detach() / 2)


def test_the_adapter_file_is_a_plain_one_with_the_figures_beside_it(tmp_path):
    model, batch = lora(llama()), batch_of("llama-relu")
    term = dense(model, weight=2.0)
    term.report([batch])
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "density.json").read_text())
    assert told["weight"] == 2.0
    assert told["eps"] == EPS
    assert told["activation_modules"] == [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    assert set(told["measured"]) == {"density", "ppl_1_sparsity"}
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))
    assert not hasattr(loaded, "activation_density")


def test_remove_leaves_the_model_as_it_was():
    model = lora(llama())
    hooks = testing.switching.hooks_of(model)
    term = dense(model)
    with pytest.raises(InputError, match="has a density term already"):
        dense(model)
    term.remove()
    assert testing.switching.hooks_of(model) == hooks
    assert not petl.lifecycle(model).parts
    assert model.save_pretrained.__self__ is model
    batch = batch_of("llama-relu")
    torch.testing.assert_close(model.train()(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_a_term_of_their_own(way):
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model)
    loss = model.train()(**batch).loss.detach()
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.activation_density is not model.activation_density
    assert twin.activation_density.model is twin
    model.activation_density.loss = None
    torch.testing.assert_close(twin.train()(**batch).loss.detach(), loss)
    assert model.activation_density.loss is None
    twin.activation_density.remove()
    torch.testing.assert_close(model(**batch).loss.detach(), loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight": -1.0}, "weight must be >= 0"),
        ({"signal": "output"}, "is not activation or down_input"),
        ({"method": "lroa"}, "did you mean 'lora'"),
        ({"gradient_accumulation_steps": 0}, "is not at least 1"),
        ({"threshold": -0.1}, "is negative"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ActivationDensityConfig(**fields)


def test_names_that_are_unknown_are_refused_before_the_model_is_changed():
    base = llama()
    with pytest.raises(InputError, match="did you mean 'act_fn'"):
        petl.wrap(base, "density", activation_modules=["act_fun"])
    with pytest.raises(InputError, match="has no field 'weigth'; did you mean 'weight'"):
        petl.wrap(base, "density", weigth=1.0)
    with pytest.raises(InputError, match="no loss 'densty'; did you mean 'density'"):
        petl.losses.read({"name": "densty"})
    assert not testing.tuner_layers(base)


def test_a_model_without_nonlinearities_in_blocks_is_refused_with_candidates():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.nonlinearity, self.last = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.nonlinearity(self.first(x)))

    model = get_peft_model(Plain(), LoraConfig(target_modules=["first"]))
    with pytest.raises(InputError, match=r"no activation module found.*there are nonlinearity"):
        dense(model)
    assert list(dense(model, activation_modules=["nonlinearity"]).places.layers) == ["nonlinearity"]


def test_pooler_and_heads_are_no_mlp():
    term = dense(lora(testing.tiny_bert()))
    assert list(term.places.layers) == [
        f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)
    ]


def test_a_kernel_that_passes_the_modules_by_is_refused():
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model)
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x))
    with pytest.raises(UnsupportedError, match="none of the 2 activation modules was called"):
        model.train()(**batch)
    model.eval()(**batch)
