"""The distillation term: value and gradients, against two models compared by hand."""

import copy
import pickle

import pytest
import torch
from density_cases import assert_same, gradients, lora
from hydra import compose, initialize_config_dir
from kept_processes import in_processes
from omegaconf import OmegaConf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.distill import DistillConfig
from petl.system.settings.command_line import config_dir

# Paths of the blocks of the tiny models
BLOCKS = {
    "llama": [f"model.layers.{i}" for i in range(3)],
    "gpt2": [f"transformer.h.{i}" for i in range(2)],
    "bert": [f"bert.encoder.layer.{i}" for i in range(2)],
    "t5": [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(2)],
    "vit": [f"vit.layers.{i}" for i in range(2)],
}


def blocks_of(name, base):
    """The paths of the blocks, and that they exist."""
    assert all(base.get_submodule(path) for path in BLOCKS[name])
    return BLOCKS[name]


def wrapped(name, **fields):
    tiny = testing.TINY_MODELS[name]
    return lora(tiny.base()), tiny.batch()


def outputs_of(model, base, paths, batch):
    """The loss, the logits and the first outputs of these blocks of one forward pass."""
    seen = {}

    def note(path, module, args, output):
        seen[path] = output[0] if isinstance(output, tuple) else output

    handles = [
        base.get_submodule(path).register_forward_hook(lambda *a, path=path: note(path, *a))
        for path in paths
    ]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    return output.loss, output.logits, [seen[path] for path in paths]


def kl_by_hand(student, teacher, temperature):
    """`T^2 KL(teacher || student)`, position by position."""
    rows, terms = student.shape[-1], []
    for s, t in zip(student.reshape(-1, rows), teacher.reshape(-1, rows), strict=True):
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        terms.append(sum(p[v] * (p[v].log() - q[v].log()) for v in range(rows)))
    return temperature**2 * sum(terms) / len(terms)


def written_out(
    model,
    name,
    batch,
    *,
    features=1.0,
    logits=0.0,
    how="mse",
    temperature=1.0,
    layers=None,
    scale=1.0,
):
    """Total loss, its gradients and both terms, with the base model itself as teacher."""
    teacher = testing.TINY_MODELS[name].base().eval()
    paths = blocks_of(name, teacher)
    paths = [paths[i] for i in layers] if layers is not None else paths
    with torch.no_grad():
        _, taught, targets = outputs_of(teacher, teacher, paths, batch)
    model.train().zero_grad()
    task, given, found = outputs_of(model, model.get_base_model(), paths, batch)
    of_features = sum(
        ((s - t) ** 2).sum() / s.numel() for s, t in zip(found, targets, strict=True)
    ) / len(paths)
    of_logits = (
        kl_by_hand(given, taught, temperature)
        if how == "kl"
        else ((given - taught) ** 2).sum() / given.numel()
    )
    total = task + features * of_features + logits * of_logits
    (total * scale).backward()
    return total.detach(), gradients(model), of_features.detach(), of_logits.detach()


def distilled(model, **fields):
    return petl.losses.attach(model, DistillConfig(**fields))


def agrees(model, name, batch, **fields):
    """Assert that loss, values and gradients are those written out; return the term."""
    names = {"feature_weight": "features", "logit_weight": "logits", "logits": "how"}
    by_hand = {names.get(key, key): value for key, value in fields.items()}
    total, expected, of_features, of_logits = written_out(model, name, batch, **by_hand)
    term = distilled(model, **fields)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    values = term.series()
    if fields.get("feature_weight", 1.0) > 0:
        assert values["distill_features"] == pytest.approx(float(of_features), rel=1e-4)
    if fields.get("logit_weight", 0.0) > 0:
        assert values["distill_logits"] == pytest.approx(float(of_logits), rel=1e-4)
    loss.backward()
    assert_same(gradients(model), expected)
    return term


# Value and gradient


@pytest.mark.parametrize("name", BLOCKS)
def test_features_of_all_blocks_are_compared(name):
    model, batch = wrapped(name)
    term = agrees(model, name, batch, feature_weight=30.0)
    assert [*term.blocks.values()] == blocks_of(name, testing.TINY_MODELS[name].base())
    assert set(term.series()) == {"distill_features"}
    assert petl.lifecycle(model).metrics()["aux_loss"] == pytest.approx(
        30 * term.series()["distill_features"]
    )


def test_a_block_that_runs_three_times_counts_once():
    sizes = {"vocab_size": 96, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=2, num_labels=5)
    base, seen = AlbertForSequenceClassification(config), []
    batch = testing.TINY_MODELS["bert"].batch()
    block = base.albert.encoder.albert_layer_groups[0].albert_layers[0]
    model = testing.stir(petl.wrap(base, "lora", target_modules=["ffn"])).train()
    block.register_forward_hook(lambda module, x, y: seen.append(y))
    model(**batch)
    with model.disable_adapter():
        model(**batch)
    squares = [(y - t).square().mean() for y, t in zip(seen[:3], seen[3:], strict=True)]
    term = distilled(model)
    model(**batch)
    assert term.series()["distill_features"] == pytest.approx(sum(squares).item() / 3, rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_weight": 0.0, "logit_weight": 2.0},
        {"feature_weight": 3.0, "logit_weight": 0.5},
        {"feature_weight": 0.0, "logit_weight": 2.0, "logits": "kl"},
        {"feature_weight": 3.0, "logit_weight": 0.5, "logits": "kl", "temperature": 2.5},
        {"feature_weight": 9.0, "layers": [0, 2]},
    ],
)
def test_logits_and_chosen_blocks_are_compared(fields):
    model, batch = wrapped("llama")
    agrees(model, "llama", batch, **fields)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_logits_of_other_models_are_compared(name):
    model, batch = wrapped(name)
    agrees(model, name, batch, feature_weight=0.0, logit_weight=2.0, logits="kl", temperature=2.0)


def test_the_term_has_a_gradient_of_its_own():
    """Without this, the tests of gradients could pass vacuously."""
    model, batch = wrapped("llama")
    without = written_out(model, "llama", batch, features=0.0)[1]
    along = written_out(model, "llama", batch, features=30.0)[1]
    name = next(n for n in along if "layers.0.mlp.gate_proj.lora_B" in n)
    assert (along[name] - without[name]).norm() > 0.1 * without[name].norm()


def test_logits_are_compared_where_a_trainer_computes_the_loss():
    """It is a gradient of the logits, whatever is computed from them."""
    model, batch = wrapped("llama")
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    weights = torch.randn(96)
    teacher = testing.TINY_MODELS["llama"].base()(**ids).logits.detach()
    logits = model.train()(**ids).logits
    ((logits @ weights).mean() + 2 * ((logits - teacher) ** 2).mean()).backward()
    expected = gradients(model)
    distilled(model, feature_weight=0.0, logit_weight=2.0)
    (model(**ids).logits @ weights).mean().backward()
    assert_same(gradients(model), expected)


# With methods and modes


# All of petl's methods but corda, which changes the base weights
METHODS = {
    "adapter": {"r": 8},
    "adapter beside blocks": {"r": 8, "locations": ["block"], "placement": "parallel"},
    "binary": {"bneck_dropout": 0.0},
    "compacter": {"r": 8},
    "increlora": {"total_step": 9, "init_r": 4, "target_r": 5},
    "mola": {},
    "mola with a recurrent router": {"router_type": "recurrent"},
    "mola with a pregated router": {"router_type": "pregated"},
    "mos": {"r": 3, "equivalent_rank": 3},
    "sparse": {"total_step": 9},
}


@pytest.mark.parametrize("case", METHODS)
def test_it_goes_with_all_methods_and_keeps_their_own_terms(case):
    method, fields = case.split()[0], METHODS[case]
    name, batch = "llama", testing.TINY_MODELS["llama"].batch()
    model = testing.Case(method, name, fields).wrap_stirred()
    term = agrees(model, name, batch, feature_weight=30.0)
    has_own = method in ("mola", "increlora")
    own = model.base_model.aux_loss() if has_own else 0.0
    assert not has_own or own > 0
    expected = 30 * term.series()["distill_features"] + float(own)
    assert float(petl.lifecycle(model).aux_loss()) == pytest.approx(expected)


@pytest.mark.parametrize("first", ["density", "distill"])
def test_it_goes_with_the_density_loss_in_either_order(first):
    model, batch = wrapped("llama")
    _, plain, value, _ = written_out(model, "llama", batch, features=0.0)
    along = written_out(model, "llama", batch, features=30.0)[1]
    density = petl.losses.build_loss("density", eps=1e-2)
    petl.losses.attach(model, density)
    model.train()(**batch).loss.backward()
    expected = gradients(model)
    dense = float(model.activation_density.loss)
    model.activation_density.remove()
    for key in expected:
        expected[key] += along[key] - plain[key]
    configs = [density, petl.losses.build_loss("distill", feature_weight=30.0)]
    for config in configs if first == "density" else reversed(configs):
        petl.losses.attach(model, config)
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)
    assert float(model.activation_density.loss) == pytest.approx(dense)
    assert model.distillation.series()["distill_features"] == pytest.approx(float(value), rel=1e-4)


def test_the_teacher_is_in_evaluation_mode_and_draws_no_random_numbers():
    """Dropout of the student is what it would be without the term."""
    base = testing.TINY_MODELS["bert"].base()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model, batch = lora(base), testing.TINY_MODELS["bert"].batch()
    model.train()
    frozen = base.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    plain = model(**batch)
    after = torch.rand(3)
    drawn = []
    layer = base.bert.encoder.layer[1]
    layer.register_forward_pre_hook(lambda module, args: drawn.append(torch.rand(())) and None)
    term = distilled(model, feature_weight=0.0, logit_weight=1.0)
    torch.manual_seed(3)
    output = model(**batch)
    assert not frozen.training
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(drawn) == 2
    teacher = testing.TINY_MODELS["bert"].base().eval()(**batch)
    expected = (output.logits - teacher.logits).square().mean()
    assert term.series()["distill_logits"] == pytest.approx(float(expected), rel=1e-4)
    # the student's own draw, one number, is not the teacher's
    torch.manual_seed(3)
    model.distillation.remove()
    again = model(**batch)
    assert torch.equal(again.logits, output.logits)
    assert not torch.equal(plain.logits, output.logits) or not torch.equal(after, torch.rand(3))


def test_there_is_no_term_in_evaluation_and_without_an_adapter():
    model, batch = wrapped("llama")
    task = model.eval()(**batch).loss
    base = testing.TINY_MODELS["llama"].base()(**batch).loss
    term, calls = distilled(model), []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(model(**batch).loss, task)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**batch).loss, task)
    with model.disable_adapter():
        torch.testing.assert_close(model.train()(**batch).loss, base)
    assert len(calls) == 3  # no teacher
    assert term.series() == {}
    assert model.train()(**batch).loss > task
    assert len(calls) == 5
    testing.training.train(model, batch, steps=1, lr=1e-3)
    assert model.eval()(**batch).loss != task


def test_requires_grad_is_left_alone():
    model, batch = wrapped("llama")
    some = model.get_base_model().model.layers[0].mlp.gate_proj.lora_A["default"].weight
    some.requires_grad_(False)
    distilled(model)
    model.train()(**batch).loss.backward()
    assert some.grad is None
    assert not some.requires_grad


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_lifecycle_scales_the_term_of_micro_batches(pieces):
    model, name = wrapped("llama")[0], "llama"
    batches = [testing.TINY_MODELS[name].batch(2, s) for s in range(pieces)]
    each = [
        written_out(model, name, b, features=30.0, logits=1.0, scale=1 / pieces)[1] for b in batches
    ]
    distilled(model, feature_weight=30.0, logit_weight=1.0)
    lifecycle = petl.lifecycle(model)
    lifecycle.aux_weight = 1 / pieces
    for batch in batches:
        (model.train()(**batch).loss / pieces).backward()
    assert_same(gradients(model), {n: sum(e[n] for e in each) for n in each[0]})
    assert set(lifecycle.metrics()) == {"aux_loss", "distill_features", "distill_logits"}


@pytest.mark.parametrize("size", [1, 2])
def test_trainer_sums_micro_batches(tmp_path, size):
    """Trainer divides by the items of the whole step, and so must the term."""

    class Stop(torch.optim.SGD):
        def step(self, closure=None):
            self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    model, name = wrapped("llama")[0], "llama"
    full = testing.TINY_MODELS[name].batch(2)
    full = {"input_ids": full["input_ids"], "labels": full["input_ids"]}
    expected = written_out(model, name, full, features=30.0, logits=1.0)[1]
    distilled(model, feature_weight=30.0, logit_weight=1.0)
    optimizer = Stop([p for p in model.parameters() if p.requires_grad], lr=0.0)
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2 // size,
        max_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
    )
    rows = [{key: value[i] for key, value in full.items()} for i in range(2)]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[petl.Callback()],
    )
    trainer.train()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert_same(dict(zip(names, optimizer.seen, strict=True)), expected)


def test_checkpointing_gives_the_same_gradients_and_reentrant_raises():
    model, batch = wrapped("llama")
    first, second = batch, testing.TINY_MODELS["llama"].batch(2, 5)
    both = [written_out(model, "llama", b, features=30.0) for b in (first, second)]
    distilled(model, feature_weight=30.0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # two forward passes before one backward: each is recomputed without a teacher
    (model(**first).loss + model(**second).loss).backward()
    assert_same(gradients(model), {n: sum(b[1][n] for b in both) for n in both[0][1]})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UnsupportedError):
        model(**batch)
    loss = model.eval()(**batch).loss  # the failed forward leaves no state
    torch.testing.assert_close(loss, model.eval()(**batch).loss)


def test_a_bfloat16_model_is_compared_in_float32():
    base = testing.TINY_MODELS["llama"].base().to(torch.bfloat16)
    model, batch = lora(base), testing.TINY_MODELS["llama"].batch()
    term = distilled(model, logit_weight=1.0)
    with torch.no_grad(), model.disable_adapter():
        teacher = model.eval()(**batch).logits.float()
    output = model.train()(**batch)
    expected = (output.logits.detach().float() - teacher).square().mean()
    assert term.series()["distill_logits"] == pytest.approx(float(expected), rel=1e-5)
    output.loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_autocast_keeps_the_gradient_of_parameters_that_both_use():
    """Autocast caches what it has cast; of the teacher's pass these have no gradient."""
    model, batch = wrapped("llama")
    distilled(model, feature_weight=0.5)
    norm = model.get_base_model().lm_head.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert norm.grad is not None


def test_one_difference_per_block_is_kept():
    """No more than a tensor of the size of a block's output; the teacher's outputs are freed."""
    model, batch = wrapped("llama")
    term = distilled(model)
    loss = model.train()(**batch).loss
    assert not term.features
    assert term.teacher_logits is None
    nodes, found, seen = [loss.grad_fn], [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.slope.shape] if hasattr(node, "slope") else []
        nodes += [following for following, _ in node.next_functions]
    assert found == [(*batch["input_ids"].shape, 64)] * 3


def test_the_teacher_of_a_language_model_computes_no_logits_that_nobody_compares():
    model, batch = wrapped("llama")
    positions = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, y: positions.append(y.shape[1]))
    distilled(model)
    model.train()(**batch)
    assert positions == [1, batch["input_ids"].shape[1]]


# Processes, compilation, training


def gradients_of_one_process():
    rank = torch.distributed.get_rank()
    model = wrapped("llama")[0]
    distilled(model, feature_weight=30.0, logit_weight=1.0)
    parallel = nn.parallel.DistributedDataParallel(model)
    batch = testing.TINY_MODELS["llama"].batch()
    rows = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    parallel.train()(**{k: v[2 * rank : 2 * rank + 2] for k, v in rows.items()}).loss.backward()
    return gradients(model)


@pytest.mark.thorough
def test_two_processes_average_their_terms():
    first, second = in_processes(2, gradients_of_one_process)
    batch = testing.TINY_MODELS["llama"].batch()
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    model = wrapped("llama")[0]
    expected = written_out(model, "llama", batch, features=30.0, logits=1.0)[1]
    assert_same(first, expected)
    assert_same(second, expected)


@pytest.mark.slow
def test_a_compiled_model_has_the_term():
    model, batch = wrapped("llama")
    expected = written_out(model, "llama", batch, features=30.0)[1]
    distilled(model, feature_weight=30.0)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager").train()(**batch).loss.backward()
    assert_same(gradients(model), expected)


@pytest.mark.thorough
def test_training_with_the_term_stays_nearer_to_the_base_model():
    distances = []
    for weight in (1e-6, 30.0):
        model, batch = wrapped("llama")
        term = distilled(model, feature_weight=weight)
        testing.training.train(model.train(), batch, steps=30, lr=1e-2)
        distances.append(term.series()["distill_features"])
    assert distances[1] < 0.5 * distances[0]


# Use, files, errors


def test_wrap_puts_the_term_on_the_method_named():
    base = testing.TINY_MODELS["llama"].base()
    model = petl.wrap(base, "distill", method="mola", method_config={"r": 2}, logit_weight=0.5)
    assert model.active_peft_config.r == 2
    assert model.distillation.config.logit_weight == 0.5
    assert petl.get("distill") is DistillConfig
    assert "distill" in petl.list_losses()


def test_the_command_line_composes_method_and_term():
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        cfg = compose("train", overrides=["+method=mola", "+loss=distill", "loss.layers=[0,1]"])
    config = petl.losses.read(OmegaConf.to_container(cfg.loss))
    assert config == DistillConfig(layers=[0, 1])


def test_the_map_shows_the_distance_of_each_block():
    model, batch = wrapped("llama")
    term = distilled(model, layers=[1, 2])
    assert term.heat_maps() == []
    teacher = testing.TINY_MODELS["llama"].base().eval()
    paths = BLOCKS["llama"][1:]
    with torch.no_grad():
        targets = outputs_of(teacher, teacher, paths, batch)[2]
        found = outputs_of(model.eval(), model.get_base_model(), paths, batch)[2]
    model.train()(**batch)
    (drawn,) = term.heat_maps()
    assert drawn.columns == ["1", "2"]
    expected = [100 * float((s - t).norm() / t.norm()) for s, t in zip(found, targets, strict=True)]
    assert drawn.cells == [pytest.approx(expected, rel=1e-4)]


def test_remove_restores_the_model():
    model, batch = wrapped("llama")
    hooks = testing.switching.hooks_of(model)
    term = distilled(model)
    with pytest.raises(InputError):
        distilled(model)
    term.remove()
    assert testing.switching.hooks_of(model) == hooks
    assert not petl.lifecycle(model).parts
    torch.testing.assert_close(model.train()(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_their_own_term(way):
    model, batch = wrapped("llama")
    distilled(model)
    loss = model.train()(**batch).loss.detach()
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.distillation.model is twin
    model.distillation.values = {}
    torch.testing.assert_close(twin.train()(**batch).loss.detach(), loss)
    assert model.distillation.values == {}
    twin.distillation.remove()
    torch.testing.assert_close(model(**batch).loss.detach(), loss)


def test_other_refusals():
    base = testing.TINY_MODELS["llama"].base
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedError):
        distilled(get_peft_model(base(), prompt))
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    model = get_peft_model(base(), config)
    with pytest.raises(UnsupportedError):
        distilled(model)
    distilled(model, feature_weight=0.0, logit_weight=1.0)  # no block is compared
    top = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], layers_pattern="layers")
    model, batch = get_peft_model(base(), top), testing.TINY_MODELS["llama"].batch()
    distilled(model, layers=[0, 1])
    with pytest.raises(UnsupportedError, match=r"layers=\[0, 1\]"):
        model.train()(**batch)
    model, _ = wrapped("llama")
    petl.segment_loss(model, 4)
    distilled(model, logit_weight=1.0)  # computes the loss from all logits again
    assert model.train()(**batch).logits is not None
    with pytest.raises(UnsupportedError):
        petl.segment_loss(model, 4)
