"""`petl.cache_frozen` in one's own loop and under Trainer: what is read, and when blocks run."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from kept_processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import petl
from petl import testing
from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.efficiency.frozen.prefix import find_prefix
from petl.errors import UnsupportedError

ROWS, K = 12, 2  # of 3 blocks in the tiny Llama
pytest_plugins = ["training_fixtures"]
NEAR = {"rtol": 0, "atol": 1e-5}


def examples(model="llama") -> list[dict[str, torch.Tensor]]:
    """Rows without padding, of several lengths."""
    batch = testing.TINY_MODELS[model].batch(ROWS)
    mask = batch.get("attention_mask")
    lengths = [None] * ROWS if mask is None else mask.sum(1).tolist()
    return [
        {name: value[i][:n] if value.dim() == 2 else value[i] for name, value in batch.items()}
        for i, n in enumerate(lengths)
    ]


def collate(rows):
    """Pad on the right."""
    padding = {"labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=padding.get(name, 0)
        )
        if rows[0][name].dim() == 1
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }


def upper(model="llama", method="lora", **fields):
    """A tiny model with adapters in its last block."""
    tiny = testing.TINY_MODELS[model]
    fields = {"layers_to_transform": "top:1", "task_type": tiny.task_type, **fields}
    if method == "lora":
        fields.setdefault("target_modules", "block-linear")
    torch.manual_seed(0)
    model = petl.wrap(tiny.base(), method, **fields)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:  # else A has no gradient at first
            nn.init.normal_(parameter, std=0.1)
    return model


def train(model, steps=4):
    """A few steps of SGD over batches of several widths; return the losses."""
    rows, losses = examples(model_name(model)), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(steps):
        first = 3 * step % ROWS
        loss = model(**collate(rows[first : first + 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def model_name(model):
    return model.get_base_model().config.model_type


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Runs:
    """Counts the passes of each block."""

    def __init__(self, model) -> None:
        self.counts = [0] * len(blocks_of(model))
        for number, block in enumerate(blocks_of(model)):
            # an inner module: the block itself is called in any case
            inner = next(module for module in block.modules() if not list(module.children()))
            inner.register_forward_hook(lambda *_, n=number: self.note(n))

    def note(self, number) -> None:
        self.counts[number] += 1


def blocks_of(model):
    return find_prefix(model).blocks


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_training_from_the_store_equals_training_without_it(name, tmp_path):
    plain, first, second = upper(name), upper(name), upper(name)
    expected = train(plain)
    losses = []
    for model, there in ((first, False), (second, True)):
        cache = petl.cache_frozen(model, tmp_path)
        assert cache.fill(examples(name), collate) is there
        runs = Runs(model)
        losses.append(train(model))
        assert (cache.hits, cache.misses) == (4, 0)
        assert set(runs.counts[: cache.k]) == {0}
        assert set(runs.counts[cache.k :]) == {4}
        cache.close()
    assert losses[0] == losses[1]  # to the digit: they read one store
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    for key, value in weights(plain).items():
        assert torch.equal(weights(first)[key], weights(second)[key])
        torch.testing.assert_close(weights(first)[key], value, **NEAR)


def test_the_store_has_the_same_bits_in_whatever_order_its_rows_come(tmp_path):
    states = []
    for number, order in enumerate((range(ROWS), reversed(range(ROWS)))):
        with petl.cache_frozen(upper(), tmp_path / str(number)) as cache:
            cache.fill([examples()[i] for i in order], collate)
            states.append(cache._feed.stores[0].states.clone())
            name = cache._feed.stores[0].folder.parent.name
    assert torch.equal(*states)
    assert {folder.name for folder in tmp_path.glob("*/*")} == {name}


@pytest.mark.parametrize("damage", ["zeros", "signs", "absent"])
def test_a_damaged_store_is_made_again(damage, tmp_path, petl_log):
    results = []
    for number in range(3):
        model = upper()
        with petl.cache_frozen(model, tmp_path) as cache:
            assert cache.fill(examples(), collate) is (number == 2)
            results.append(train(model))
            assert cache.misses == 0
            assert ("are computed again" in petl_log.text) is (number == 1)
            states = cache._feed.stores[0].folder / "states.bin"
        petl_log.clear()
        if number:
            continue
        values = torch.from_numpy(np.fromfile(states, dtype=np.float32))
        if damage == "absent":
            states.unlink()
        else:
            part = values[20:90]
            part.zero_() if damage == "zeros" else part.neg_()
            states.write_bytes(values.numpy().tobytes())
    assert results[0] == results[1] == results[2]


def test_runs_of_other_methods_ranks_and_seeds_read_one_store(tmp_path):
    for number, fields in enumerate(
        ({}, {"r": 2}, {"method": "mola", "target_modules": ["q_proj"]}, {"method": "adapter"})
    ):
        torch.manual_seed(number)
        with petl.cache_frozen(upper(**fields), tmp_path) as cache:
            assert cache.fill(examples(), collate) is (number > 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_weights_blocks_precision_or_rows_have_a_store_of_their_own(tmp_path):
    def fill(model, rows, dtype=None):
        with (
            petl.cache_frozen(model, tmp_path) as cache,
            torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            return cache.fill(rows, collate)

    rows = examples()
    assert not fill(upper(), rows)
    changed = upper()
    with torch.no_grad():
        changed.get_base_model().model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert not fill(changed, rows)
    assert not fill(upper(layers_to_transform="top:2"), rows)
    assert not fill(upper(), rows, torch.bfloat16)
    assert not fill(upper(), rows[:-1])
    # what is above does not count
    above = upper()
    with torch.no_grad():
        above.get_base_model().model.norm.weight.add_(1)
    assert fill(above, rows)


def test_autocast_reads_what_it_computed_and_nothing_else(tmp_path):
    model = upper()
    with petl.cache_frozen(model, tmp_path) as cache:
        with torch.autocast("cpu", torch.bfloat16):
            cache.fill(examples(), collate)
            model(**collate(examples()[:2]))
        assert (cache.hits, cache.misses) == (1, 0)
        model(**collate(examples()[:2]))
        assert (cache.hits, cache.misses) == (1, 1)
        assert cache.reason == "the precision is another one than that of the store"


@pytest.mark.cells(1)
@pytest.mark.parametrize("kind", [None, True, "reentrant"])
def test_trainer_reads_the_store_with_every_kind_of_checkpointing(kind, tmp_path):
    results = []
    for cached in (False, True):
        model = upper()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=3,
            max_steps=6,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=kind is not None,
            gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"},
            disable_tqdm=True,
            use_cpu=True,
        )
        if cached:
            cache = petl.cache_frozen(model, tmp_path / "store")
            cache.fill(examples(), collate)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples(),
            eval_dataset=examples(),
            data_collator=collate,
        )
        loss = trainer.train().training_loss
        score = trainer.evaluate()["eval_loss"]
        if cached:
            assert (cache.hits, cache.misses) == (8, 0)  # 6 steps, 2 batches of the evaluation
            cache.close()
        results.append((loss, score, weights(model)))
    (loss, score, expected), (other, other_score, trained) = results
    assert other == pytest.approx(loss, abs=1e-5)
    assert other_score == pytest.approx(score, abs=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-4)


def test_reentrant_checkpoints_above_the_store_have_their_gradients(tmp_path):
    found = []
    for reentrant in (False, True):
        model = upper().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with petl.cache_frozen(model, tmp_path) as cache:
            cache.fill(examples(), collate)
            model(**collate(examples()[:3])).loss.backward()
            assert cache.hits == 1
        found.append([p.grad for p in trained(model)])
    torch.testing.assert_close(*found)


def test_generation_and_other_outputs_run_all_blocks(tmp_path):
    model = upper().eval()
    batch = {k: v for k, v in collate(examples()[:1]).items() if k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**batch, **options)
    states = model(**batch, output_hidden_states=True).hidden_states
    past = model(**batch, use_cache=True).past_key_values
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(examples(), collate)
        assert torch.equal(model.generate(**batch, **options), answer)
        again = model(**batch, output_hidden_states=True).hidden_states
        assert all(map(torch.equal, again, states))
        other = model(**batch, use_cache=True).past_key_values
        assert torch.equal(other.layers[0].keys, past.layers[0].keys)
        assert cache.hits == 0
        # a pass that reads the store has no cache, which would lack the first blocks
        model.config.use_cache = True
        assert model(**batch).past_key_values is None
        assert cache.hits == 1


def test_a_batch_with_a_new_row_runs_all_blocks(tmp_path):
    model, rows = upper().eval(), examples()
    expected = model(**collate(rows[2:5])).logits
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(rows[:4], collate)
        assert torch.equal(model(**collate(rows[2:5])).logits, expected)
        assert (cache.hits, cache.misses, cache.reason) == (0, 1, "rows that are in no store")
        cache.fill(rows[4:], collate)  # a second store beside the first
        close = model(**collate(rows[2:5])).logits
        assert cache.hits == 1
        real = collate(rows[2:5])["attention_mask"].bool()
        torch.testing.assert_close(close[real], expected[real], **NEAR)


def test_blocks_that_change_are_not_skipped(tmp_path):
    model, batch = upper(), collate(examples()[:3])
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(examples(), collate)
        weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            weight.copy_(weight.clone())  # the same values, as DDP writes them
        model(**batch)
        assert (cache.hits, cache.misses) == (1, 0)
        with torch.no_grad():
            weight.mul_(1.5)
        model(**batch)
        assert (cache.hits, cache.misses) == (1, 1)
        assert cache.reason == "the frozen blocks have changed since the store was opened"
        model.add_adapter("low", petl.build_config("lora", target_modules=["q_proj"]))
        model(**batch)
        assert (cache.hits, cache.misses) == (1, 2)
        with pytest.raises(petl.InputError):
            cache.fill(examples()[:3], collate)


def test_a_pass_after_an_interrupted_one_has_its_own_states(tmp_path):
    model = upper()
    model.eval()
    rows = examples()
    first, second = collate(rows[:2]), collate(rows[2:4])
    expected = model(**second).logits
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(rows, collate)

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = cache.prefix.blocks[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**first)
        hook.remove()
        real = second["attention_mask"].bool()
        torch.testing.assert_close(model(**second).logits[real], expected[real], **NEAR)
        assert cache.hits == 2


def test_blocks_whose_class_was_changed_again_run_after_closing(tmp_path):
    model, rows = upper().eval(), examples()
    expected = model(**collate(rows)).logits
    cache = petl.cache_frozen(model, tmp_path)
    cache.fill(rows, collate)
    swap_class(cache.prefix.blocks[0], SwappedClass)
    cache.close()
    assert torch.equal(model(**collate(rows)).logits, expected)


def test_weights_that_no_row_has_used_yet_belong_to_the_store(tmp_path):
    for seed in (0, 1):
        model, rows = upper().eval(), examples()
        torch.manual_seed(seed)
        # as an expert that a router has not chosen
        find_prefix(model).blocks[0].mlp.spare = nn.Linear(2, 2).requires_grad_(False)
        with petl.cache_frozen(model, tmp_path) as cache:
            assert not cache.fill(rows, collate)


def test_a_weight_that_was_exchanged_is_seen(tmp_path):
    model, rows = upper().eval(), examples()
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(rows, collate)
        weight = cache.prefix.blocks[0].mlp.up_proj.weight
        weight.data = weight.data + 1
        model(**collate(rows))
        assert cache.misses == 1
        assert "have changed" in cache.reason


def test_a_saved_adapter_is_that_of_a_model_without_a_store(tmp_path):
    model = upper()
    with petl.cache_frozen(model, tmp_path / "store") as cache:
        cache.fill(examples(), collate)
        train(model)
        model.save_pretrained(tmp_path / "adapter")
        loaded = petl.load(testing.tiny_llama(), tmp_path / "adapter")
        copied = weights(deepcopy(model))
    batch = collate(examples()[:3])
    assert torch.equal(model.eval()(**batch).logits, loaded.eval()(**batch).logits)
    assert copied.keys() == weights(model).keys()


def test_an_encoder_decoder_caches_its_encoder(tmp_path):
    from tiny_families import FAMILIES

    model = FAMILIES["bart"].build().requires_grad_(False)
    model.model.decoder.requires_grad_(True)
    model.model.shared.requires_grad_(False)
    batch = FAMILIES["bart"].batch(rows=3)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(3)]
    expected = model(**batch).logits
    with petl.cache_frozen(model, tmp_path, without_dropout=True) as cache:
        assert cache.k == 2  # all of the encoder
        cache.fill(rows, lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]})
        assert torch.equal(model(**batch).logits, expected)
        assert cache.hits == 1


# Refusals


def test_a_prefix_without_frozen_blocks_is_refused(tmp_path):
    hooked, lossy = upper(), upper()
    blocks_of(hooked)[0].mlp.register_forward_hook(lambda *_: None)
    petl.losses.attach(lossy, petl.losses.build_loss("density"))
    for model, words in (
        (upper(layers_to_transform=None), "q_proj"),
        (hooked, "hook"),
        (lossy, "loss"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            petl.cache_frozen(model, tmp_path)


@pytest.mark.parametrize("kind", ["torchao", "4bit"])
def test_a_quantized_base_is_refused_and_left_as_it_is(kind, tmp_path):
    model = upper()
    base = model.get_base_model()
    # what transformers sets when it loads quantized weights
    setattr(
        base, *(("is_loaded_in_4bit", True) if kind == "4bit" else ("quantization_method", kind))
    )
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedError):
        petl.cache_frozen(model, tmp_path)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_that_run_several_times_in_a_pass_are_refused(groups, tmp_path):
    sizes = {"vocab_size": 96, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48}
    config = AlbertConfig(
        **sizes, num_attention_heads=4, num_hidden_layers=4, num_hidden_groups=groups
    )
    model = AlbertForSequenceClassification(config).requires_grad_(False)
    model.classifier.requires_grad_(True)
    cache = petl.cache_frozen(model, tmp_path, without_dropout=True)
    with pytest.raises(UnsupportedError, match=f"{4 // groups} times"):
        cache.fill(examples(), collate)
    cache.close()


def test_a_block_that_is_in_the_list_twice_is_refused(tmp_path):
    model = upper()
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    with (
        petl.cache_frozen(model, tmp_path) as cache,
        pytest.raises(UnsupportedError, match="2 times"),
    ):
        cache.fill(examples(), collate)


def test_copies_for_nn_data_parallel_run_their_blocks(tmp_path):
    model = upper().eval()
    batch = collate(examples()[:3])
    expected = model(**batch).logits
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(examples(), collate)
        # as torch.nn.parallel.replicate, on one device
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, copied in copies.items():
            for name, child in module.named_children():
                setattr(copied, name, copies[child])
            for name, parameter in module._parameters.items():
                setattr(copied, name, None if parameter is None else parameter.view_as(parameter))
        assert torch.equal(copies[model](**batch).logits, expected)
        assert (cache.hits, cache.misses) == (0, 1)
        assert "nn.DataParallel" in cache.reason
        real = batch["attention_mask"].bool()  # those of padding are zeros in the store
        torch.testing.assert_close(model(**batch).logits[real], expected[real], **NEAR)
        assert cache.hits == 1


@pytest.mark.thorough
def test_a_base_that_is_sharded_over_processes_is_refused(tmp_path):
    for said in in_processes(2, refused_when_sharded, str(tmp_path)):
        assert "sharded over processes" in said
    assert not list(tmp_path.iterdir())


def refused_when_sharded(folder):
    """The message in a process of two that share the weights."""
    model = upper()
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedError) as raised:
        petl.cache_frozen(model, folder)
    return str(raised.value)


def test_embeddings_that_train_are_refused_also_as_a_tied_head(tmp_path):
    for name in ("embed_tokens", "lm_head"):
        base = testing.tiny_llama()
        base.config.tie_word_embeddings = True
        base.tie_weights()
        model = petl.wrap(base, "lora", target_modules=["q_proj"], layers_to_transform=[2])
        model.get_base_model().get_submodule(
            "model.embed_tokens" if name == "embed_tokens" else "lm_head"
        ).weight.requires_grad_(True)
        with (
            petl.cache_frozen(model, tmp_path) as cache,
            pytest.raises(UnsupportedError, match=r"embed_tokens\.weight"),
        ):
            cache.fill(examples(), collate)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*embed_tokens|.*layers\.2\..*q_proj", "layers_to_transform": None},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=["low-rank", "tokens"],
)
def test_adapters_of_the_embeddings_are_refused(tmp_path, fields):
    """Their tensors are in containers, which no pass calls; a store would leave them untrained."""
    model = upper(**fields)
    with (
        petl.cache_frozen(model, tmp_path) as cache,
        pytest.raises(UnsupportedError, match="embed_tokens"),
    ):
        cache.fill(examples(), collate)


def test_dropout_below_the_first_trained_block_is_refused_unless_it_may_be_left_out(tmp_path):
    model = upper("bert", layers_to_transform=[1])
    model.get_base_model().bert.embeddings.dropout.p = 0.1
    with (
        petl.cache_frozen(model, tmp_path) as cache,
        pytest.raises(UnsupportedError),
    ):
        cache.fill(examples("bert"), collate)
    with petl.cache_frozen(model, tmp_path, without_dropout=True) as cache:
        cache.fill(examples("bert"), collate)
        assert cache.left_out == ["embeddings.dropout (0.1)"]
        model.train()
        batch = collate(examples("bert")[:3])
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        assert cache.hits == 2


def test_dropout_as_a_function_is_found_by_what_it_does(tmp_path):
    from tiny_families import FAMILIES

    model = FAMILIES["opt"].build().requires_grad_(False)
    model.model.decoder.layers[1].requires_grad_(True)
    rows = [{"input_ids": row} for row in FAMILIES["opt"].batch()["input_ids"]]
    state = torch.get_rng_state()
    with (
        petl.cache_frozen(model, tmp_path) as cache,
        pytest.raises(UnsupportedError),
    ):
        cache.fill(rows, collate)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_rows_that_change_each_time_are_refused(tmp_path):
    class Augmented:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i):
            return {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(0)}

    with (
        petl.cache_frozen(upper("vit"), tmp_path) as cache,
        pytest.raises(petl.InputError),
    ):
        cache.fill(Augmented(), collate)
    assert not list(tmp_path.glob("*/content"))


def test_a_collate_that_returns_no_dict_is_refused(tmp_path):
    with petl.cache_frozen(upper(), tmp_path) as cache:
        with pytest.raises(petl.InputError):
            cache.fill(examples(), lambda rows: [row["input_ids"] for row in rows])
        assert not cache.fill(examples(), collate)  # nothing of it is left


def test_a_file_is_no_folder_of_stores(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    wrong = [(file, str(file)), (file / "below", str(file)), (str(file), str(file))]
    for folder, words in [*wrong, (5, "folder=5"), ("", "folder=''")]:
        with pytest.raises(petl.InputError, match=words):
            petl.cache_frozen(upper(), folder)
    petl.cache_frozen(upper(), tmp_path / "new" / "one").close()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.thorough
def test_a_compiled_model_reads_the_store(name, tmp_path):
    rows, passes = examples(name), []
    new = {key: value.flip(0) if key == "input_ids" else value for key, value in rows[0].items()}
    # twice the same width, and one that is in no store
    batches = [collate(rows[:3]), collate(rows[3:6]), collate(rows[:3]), collate([rows[1], new])]
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = upper(name).train()
        with petl.cache_frozen(model, tmp_path) as cache:
            cache.fill(rows, collate)
            called = torch.compile(model, backend="eager") if is_compiled else model
            passes.append([])
            for batch in batches:
                model.zero_grad()
                loss = called(**batch).loss
                loss.backward()
                passes[-1].append([loss.detach(), *(p.grad for p in trained(model))])
            assert (cache.hits, cache.misses) == (3, 1)
            assert cache.reason == "rows that are in no store"
    for eager, compiled in zip(*passes, strict=True):
        for one, other in zip(eager, compiled, strict=True):
            torch.testing.assert_close(other, one, **NEAR)


def test_a_graph_of_a_whole_model_has_no_place_for_a_look_up(tmp_path):
    model = upper()
    batch = collate(examples()[:2])
    with petl.cache_frozen(model, tmp_path) as cache:
        cache.fill(examples(), collate)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="fullgraph"):
            torch.compile(model, backend="eager", fullgraph=True)(**batch)


def test_a_model_has_one_cache_at_a_time(tmp_path):
    model = upper()
    with (
        petl.cache_frozen(model, tmp_path),
        pytest.raises(UnsupportedError),
    ):
        petl.cache_frozen(model, tmp_path)
    petl.cache_frozen(model, tmp_path).close()
