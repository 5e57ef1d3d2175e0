"""The density term: value and gradients, against explicit sums over activations."""

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from density_cases import (
    EPS,
    MODELS,
    assert_same,
    batch_of,
    dense,
    gradients,
    llama,
    lora,
    written_out,
)
from kept_processes import in_processes
from tiny_tokenizers import byte_tokenizer
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.methods.losses.density.tokens import rows_of

# The term alone


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", [None, "given"])
def test_loss_and_gradients_equal_explicit_sums(name, task):
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


@pytest.mark.parametrize(
    ("eps", "dtype", "warns"),
    [(1e-7, torch.bfloat16, True), (1e-5, torch.bfloat16, False), (1e-7, torch.float32, False)],
)
def test_a_gradient_that_bfloat16_rounds_away_is_said(petl_log, eps, dtype, warns):
    model, batch = lora(llama()), batch_of("llama-relu")
    dense(model, eps=eps)
    model.train()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(**batch)
    assert petl_log.text.count("train.precision=no") == warns


def test_the_term_alone_gives_the_adapter_a_gradient():
    """Without this, the tests of gradients could pass vacuously."""
    model, batch = lora(llama()), batch_of("llama-relu")
    _, without, _, _ = written_out(model, batch, weight=0.0)
    _, along, _, _ = written_out(model, batch, weight=2.0)
    name = next(n for n in along if "layers.0.mlp.gate_proj.lora_B" in n)
    assert (along[name] - without[name]).norm() > 0.1 * without[name].norm()


def test_evaluation_missing_labels_and_weight_0_leave_the_task_loss():
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
    torch.testing.assert_close(term.loss, value)  # computed anyway, for the log


def test_a_part_in_evaluation_mode_is_not_counted():
    """Such as a frozen part of a model that trains."""
    batch, acts = batch_of("llama-relu"), [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)]
    whole, part = lora(llama()).train(), lora(llama()).train()
    both, other = dense(whole, activation_modules=acts), dense(part, activation_modules=acts[1:])
    whole.get_base_model().get_submodule(acts[0]).eval()
    for model in (whole, part):
        model(**batch).loss.backward()
    torch.testing.assert_close(both.loss, other.loss)
    assert_same(gradients(whole), gradients(part))


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_disabled_adapter_leaves_the_task_loss(checkpointing):
    model, batch = lora(llama()), batch_of("llama-relu")
    term = dense(model)
    if checkpointing:  # then activations have a gradient anyway
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with model.disable_adapter():
        loss = model.train()(**batch).loss
        torch.testing.assert_close(loss, model.eval()(**batch).loss)
    assert term.loss is not None
    assert model.train()(**batch).loss > loss + 0.1


def test_a_tiny_eps_counts_exact_nonzeros():
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


def test_activations_of_the_last_tokens_have_the_end_of_the_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])  # of tokens in front of them, too
    assert rows_of(mask, torch.zeros(2, 3, 4)).tolist() == [1, 1, 1, 1, 1, 0]


def test_mask_padding_leaves_out_padding():
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
    fractions = [(a[row][keep[row]] != 0).float().mean() for a in seen for row in range(4)]
    assert term.measure([batch])["density"] == pytest.approx(float(sum(fractions) / 8), abs=1e-6)
    with pytest.raises(InputError):
        model(**batch | {"attention_mask": torch.ones(4, 1, 10, 10, dtype=torch.bool)})


def test_the_decoder_of_an_encoder_decoder_has_its_own_mask():
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
    assert all(name.endswith("down_proj") for name in found.sites.layers)


def test_only_the_activation_is_saved_for_backward():
    """The next layer saves it anyway if it has LoRA; autograd would save two more tensors."""

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
def test_the_lifecycle_scales_the_term_of_micro_batches(pieces):
    model, life_batches = lora(llama()), [batch_of("llama-relu", 2, s) for s in range(pieces)]
    expected = [written_out(model, b, scale=1 / pieces)[1] for b in life_batches]
    dense(model)
    lifecycle = petl.lifecycle(model)
    lifecycle.aux_weight = 1 / pieces
    for batch in life_batches:
        (model.train()(**batch).loss / pieces).backward()
    assert_same(gradients(model), {n: sum(e[n] for e in expected) for n in expected[0]})
    assert lifecycle.has_aux
    assert set(lifecycle.metrics()) == {"aux_loss", "density_loss"}


def test_the_accumulation_field_divides_the_term():
    model, batch = lora(llama()), batch_of("llama-relu")
    total, expected, _, _ = written_out(model, batch, weight=1 / 4)
    dense(model, gradient_accumulation_steps=4)
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), total)
    loss.backward()
    assert_same(gradients(model), expected)
    with pytest.raises(InputError):
        petl.lifecycle(model).prepare([batch])


class Stop(torch.optim.SGD):
    """Records the gradients of each step."""

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
    """Gradients at one optimizer step of two micro-batches."""
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
    """The mean over micro-batches is added, whatever Trainer does with the task's loss."""
    rows = batch_of(name, 4)
    del rows["attention_mask"]
    if rows["labels"].dim() == 2:  # equal counts of labels, so that both halves have equal weight
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


@pytest.mark.thorough
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


def test_checkpointing_gives_the_same_gradients_and_reentrant_raises():
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
    with pytest.raises(UnsupportedError):
        model(**batch)
    loss = model.eval()(**batch).loss  # the failed forward leaves no state
    torch.testing.assert_close(loss, model.eval()(**batch).loss)


def test_two_forwards_before_one_backward_under_checkpointing():
    """Each is recomputed with its own count, although their sizes differ."""
    model = lora(llama())
    first, second = batch_of("llama-relu", 4), batch_of("llama-relu", 2, seed=5)
    expected = [written_out(model, b)[1] for b in (first, second)]
    dense(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    (model(**first).loss + model(**second).loss).backward()
    assert_same(gradients(model), {n: sum(e[n] for e in expected) for n in expected[0]})


def gradients_of_one_process():
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
    one = [{k: v[:1] for k, v in batch_of("llama-relu").items()}] if rank == 0 else []
    return gradients(model), (measured, found), model.activation_density.report(one)


@pytest.mark.thorough
def test_two_processes_average_their_terms_and_agree_on_metrics():
    results = in_processes(2, gradients_of_one_process)
    (first, (density, ppl), of_one), (second, others, of_none) = results
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
    row = {k: v[:1] for k, v in batch_of("llama-relu").items()}
    assert of_one == of_none == pytest.approx(term.report([row]))  # fewer rows than processes


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
