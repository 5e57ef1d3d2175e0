"""What a plan says comes true: sizes, steps, tokens, memory."""

import os
import shutil
from functools import cache

import pytest
import torch
from contract_cases import adaptable, ours_first
from torch import nn
from torch.utils.flop_counter import flop_registry
from training_fixtures import Tiny, bert_config, llama_config, train
from transformers import BertForSequenceClassification, LlamaForCausalLM

import petl
from petl import testing
from petl.cli.catalog.reference import counted
from petl.core.adapter_file import safetensors_bytes, saved_shapes
from petl.core.parameters import LiveBytes
from petl.core.registry import needs_calibration, on_shapes
from petl.core.spec.facts import modifies_base_weights
from petl.data.models.loading import load_processor
from petl.errors import UnsupportedError
from petl.experiments.planning.dry_run import pass_memory, without_values
from petl.experiments.planning.plan import RunPlan, groups_of, plan_run
from petl.system.settings.command_line import preset_of
from petl.training.compose import compose
from petl.training.runs.checkpoint import save_adapter
from petl.training.runs.config import method_fields
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_cheaper(monkeypatch):
    """Leave out other plans of the same run, which take half of the time: `test_savings.py`."""
    monkeypatch.setattr("petl.experiments.planning.plan.savings_of_passes", lambda *_: [])
    monkeypatch.setattr("petl.experiments.planning.plan.upper_blocks", lambda *_: [])


def plan(tiny: Tiny, *overrides: str) -> RunPlan:
    return planned((*tiny.steady, *overrides), os.environ.get("PETL_CACHE"))


@cache
def planned(overrides: tuple[str, ...], stores: str | None) -> RunPlan:
    """A plan, computed once for each folder of stores."""
    return plan_run(compose([*overrides]))


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config()).eval()


def on_meta() -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(bert_config()).eval()


@pytest.mark.thorough
def test_frozen_blocks_are_planned_with_the_size_of_their_store_and_what_it_saves(tiny):
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=14"]
    planned = plan(tiny, *words)
    frozen = planned.frozen
    assert frozen is not None
    assert (frozen.k, frozen.blocks, frozen.reason) == (1, 2, "")
    # float32 states of width 32; a key, an offset, a number and a check of each of 50 + 20 rows
    splits = small_splits(tiny)
    tokens = sum(len(row) for part in splits for row in part["input_ids"])
    assert frozen.bytes == tokens * 32 * 4 + 70 * (16 + 8 + 8)
    # of block 0: four projections, two of the MLP, and two of attention if torch counts them
    positions = planned.memory.rows * planned.memory.tokens
    block = 2 * positions * (4 * 32 * 32 + 2 * 32 * 48)
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry:  # from 2.15
        block += 2 * 2 * positions * planned.memory.tokens * 32
    assert frozen.saved == pytest.approx(block / planned.memory.pass_.operations)
    assert "block 0 of 2, computed once (train.cache_frozen): 71 kB on disk" in str(frozen)
    every = plan(tiny, *words[:1], words[2])
    assert every.frozen is None
    once = plan(tiny, *words, "train.steps=7").frozen
    assert once.reason == "the run reads its examples 1 times, and computing them costs as much"
    assert once.remedy
    assert plan(tiny, *words, "train.cache_frozen=false").frozen is None


@pytest.mark.thorough
def test_dropout_below_the_first_trained_block_is_planned_as_a_reason(tiny):
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=14"]
    planned = plan_run(compose([*tiny.classify, *words])).frozen
    assert planned.reason.endswith("embeddings.dropout (0.1)")
    planned = plan_run(compose([*tiny.classify, *words, "train.cache_frozen=true"])).frozen
    assert planned.reason == ""


@pytest.mark.thorough
def test_an_adapter_of_the_embeddings_is_planned_as_a_reason(tiny):
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=14"]
    planned = plan(tiny, *words, "+method.trainable_token_indices=[1,2]").frozen
    assert planned.reason.endswith(
        "word_embeddings, which has an adapter, is read before the blocks"
    )
    assert not planned.remedy


@pytest.mark.thorough
def test_a_store_that_is_there_needs_no_space(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=14"]
    before = plan(tiny, *words).frozen
    assert before.missing == before.bytes > 0
    train([*tiny.steady, *words], tmp_path / "run")
    # whatever the rate, the seed or the method: the store has the same name
    others = ["+method=mola", *words[1:], "train.lr=0.1", "train.seed=3"]
    monkeypatch.setattr("petl.efficiency.frozen.store.free_bytes", lambda _: 0)
    after = plan(tiny, *others)
    assert (after.frozen.missing, after.frozen.reason) == (0, "")
    assert "in a store on disk" in str(after.frozen)
    # other rows, another precision, another kernel
    for change in ("data.max_length=5", "train.precision=bf16", "model.attn=eager"):
        changed = plan(tiny, *words, change).frozen
        assert changed.missing > 0, change
        assert "has 0 MB free" in changed.reason
    # the test rows are those of the run, the train rows are not
    fewer = plan(tiny, *words, "data.train_rows=30").frozen
    assert 0 < fewer.missing < fewer.bytes


def small_splits(tiny):
    config = read_config(compose([*tiny.steady, "+method=lora"]))
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    return [data.task.encode(processor, rows) for rows in (data.train, data.test)]


def fields(name: str, **changes) -> dict:
    settings = {"name": name, **preset_of(name), **changes}
    if name == "vblora":
        settings["vector_length"] = 16  # divides the tiny widths
    if name == "compacter":
        settings["r"] = 8  # a multiple of its four Kronecker terms
    if name == "icv":
        settings |= {"train": True, "pairs": None, "scale": "plain", "keep_norm": False}
    if name == "polyhistor":
        settings["tasks"] = ["only"]
    if name == "mos":
        settings |= {"r": 3, "equivalent_rank": 3}  # two layers have few shards to share
    if name in ("oft", "c3a"):
        settings["oft_block_size" if name == "oft" else "block_size"] = 16
    return method_fields(settings, "SEQ_CLS", total_steps=1000)


@pytest.mark.cells(5)
@pytest.mark.parametrize("name", ours_first(adaptable("bert")))
def test_adapter_file_has_the_planned_size_to_the_byte(name, tmp_path):
    planned = safetensors_bytes(saved_shapes(on_shapes(on_meta, fields(name))))
    data = [{"input_ids": torch.tensor([[1, 2, 1, 3]])}]
    calibration = data if needs_calibration(petl.build_config(**fields(name))) else None
    save_adapter(petl.wrap(classifier(), calibration=calibration, **fields(name)), tmp_path)
    assert planned == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_an_adapter_saved_relative_to_its_start_has_twice_the_rank(tmp_path):
    given = fields("lora", init_lora_weights="pissa")
    assert modifies_base_weights(petl.build_config(**given))
    plain = on_shapes(on_meta, {**given, "init_lora_weights": True})
    planned = safetensors_bytes(saved_shapes(plain, rank_factor=2))
    model = petl.wrap(classifier(), **given)
    model.peft_config["default"].init_lora_weights = True
    save_adapter(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    save_adapter(model, tmp_path / "end", start=tmp_path / "start")
    assert planned == (tmp_path / "end" / "adapter_model.safetensors").stat().st_size


def test_the_plan_equals_what_the_run_does(tiny, tmp_path):
    overrides = [
        "+method=mola",
        "train.steps=9",
        "train.batch_size=8",
    ]  # a whole pass and two steps
    planned = plan(tiny, *overrides)
    finished = train([*tiny.steady, *overrides], tmp_path / "run")
    trained = sum(group.parameters for group in planned.groups)
    assert trained == finished.scores["trainable_parameters"]
    assert planned.file_bytes == finished.scores["adapter_bytes"]
    assert str(planned.coverage) == finished.scores["coverage"]["summary"]
    assert planned.length.steps == finished.scores["steps"]
    assert planned.length.amount == finished.scores["tokens"]
    assert 0.1 < planned.length.padding < 0.6
    assert planned.saved == sum(tensor.numel() for tensor in finished.adapter.values())


@pytest.mark.thorough
def test_the_plan_of_a_stream_of_classes_counts_its_repeats(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))  # of the run's store
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=null"]
    words += ["data.order=by_class", "data.stream_repeats=3"]
    planned = plan(tiny, *words)
    finished = train([*tiny.steady, *words], tmp_path / "run")
    assert planned.length.steps == finished.scores["steps"]
    assert planned.length.amount == finished.scores["tokens"]
    assert planned.length.epochs == 3
    assert planned.frozen.reason == ""  # the store is read three times


def test_the_plan_has_the_rates_that_a_method_sets():
    model = petl.wrap(testing.tiny_vit(), "pyra", schedule=[3, 0], vector_lr=1e-4)
    planned = {(group.lr, group.parameters) for group in groups_of(model, TrainConfig(lr=1e-3))}
    assert planned == {(1e-4, sum(p.numel() for p in model.parameters() if p.requires_grad))}


@pytest.mark.thorough
def test_the_plan_has_the_steps_of_a_token_budget_and_their_padding(tiny, tmp_path):
    overrides = ["+method=lora", "train.steps=null", "train.epochs=1"]
    overrides += ["train.buckets=4", "train.max_tokens=64"]
    planned = plan(tiny, *overrides)
    finished = train([*tiny.steady, *overrides], tmp_path / "run")
    assert planned.length.steps == finished.scores["steps"]
    assert planned.length.amount == finished.scores["tokens"]
    assert planned.length.padding == pytest.approx(finished.scores["padding"])
    assert planned.length.padding < 0.2
    assert planned.memory.rows * planned.memory.tokens <= 64
    assert planned.memory.gradients == 0  # each step is one pass
    cut = plan(tiny, *overrides, "train.micro_batch_size=3").memory
    assert cut.rows == 3
    assert cut.gradients > 0


def test_plan_needs_no_weights(tiny, tmp_path):
    model = shutil.copytree(tiny.folder / "steady", tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert plan(tiny, "+method=lora", f"model.path={model}").groups


@pytest.mark.thorough
def test_targets_are_counted_by_their_place_in_a_layer(tiny):
    planned = plan(tiny, "+method=lora", "method.target_modules=[query,dense]")
    assert [(t.name, t.shape, t.modules) for t in planned.targets] == [
        ("attention.self.query", (32, 32), 2),
        ("attention.output.dense", (32, 32), 2),
        ("intermediate.dense", (48, 32), 2),
        ("output.dense", (32, 48), 2),
        ("bert.pooler.dense", (32, 32), 1),
    ]
    assert planned.targets[0].example == "bert.encoder.layer.0.attention.self.query"


@pytest.mark.thorough
def test_a_wrapping_method_is_planned_with_the_yaml_of_the_inner_one(tiny):
    rate = "train.lr=1e-3"  # else each has the rate that suits it
    inner = plan(tiny, "+method=lora", rate)
    planned = plan(tiny, "+method=binary", "method.inner=lora", rate)
    assert planned.targets == inner.targets
    assert planned.groups == inner.groups
    assert planned.file_bytes < inner.file_bytes


def test_head_and_adapter_are_counted_separately(tiny):
    adapter, head = plan(tiny, "+method=lora", "method.r=4", "method.target_modules=[query]").groups
    assert (adapter.role, adapter.parameters) == ("adapter", 2 * 4 * (32 + 32))
    assert (head.role, head.parameters) == ("head", 32 * 3 + 3)


@pytest.mark.thorough
def test_weights_gradients_and_moments_take_four_bytes_per_value(tiny):
    memory = plan(tiny, "+method=lora", "train.micro_batch_size=4").memory
    trained = sum(g.parameters for g in plan(tiny, "+method=lora").groups)
    assert memory.optimizer == 8 * trained
    assert memory.gradients == 4 * trained
    assert memory.rows == 4
    assert plan(tiny, "+method=lora").memory.gradients == 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "tensors", "meaning"),
    [
        (["+method=dkvb"], 0, "state of SGD"),  # no momentum
        # two moments; a counter of 4 bytes each for keys, values and so on is far below the rest
        (["+method=dkvb", "method.optimizer=sparse_adam"], 2, "state of SparseAdam"),
    ],
)
def test_the_optimizer_that_a_method_needs_is_planned(tiny, method, tensors, meaning):
    planned = plan(tiny, *method)
    trained = sum(group.parameters for group in planned.groups)
    assert planned.memory.optimizer == pytest.approx(tensors * 4 * trained, rel=1e-3)
    assert planned.memory.optimizer_state == meaning


@pytest.mark.thorough
def test_sm3_has_two_vectors_for_each_weight_and_adamw_the_head(tiny):
    words = ["+method=sparse", "method.selection_algorithm=sm3", "method.target_modules=[query]"]
    alone = plan(tiny, *words)
    layers = sum(target.modules for target in alone.targets)
    # weights [32, 32], head [3, 32] with bias
    assert alone.memory.optimizer == 4 * (layers * (32 + 32) + 2 * (32 * 3 + 3))
    assert plan(tiny, *words, "+launch=fsdp").memory.optimizer == alone.memory.optimizer


@pytest.mark.thorough
def test_bf16_base_halves_its_weights_but_not_the_adapter(tiny):
    whole, half = (plan(tiny, "+method=lora", *w) for w in ([], ["model.dtype=bfloat16"]))
    trained = 4 * sum(group.parameters for group in whole.groups)
    assert half.file_bytes == whole.file_bytes
    # the frozen copy of the head that PEFT keeps, and integer buffers, account for the rest
    assert half.memory.weights - trained == pytest.approx(
        (whole.memory.weights - trained) / 2, rel=0.05
    )


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("name", "fused"), [("lora", False), ("lora", True), ("mola", False), ("ia3", False)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_without_data_needs_the_memory_of_a_real_one(name, fused, checkpointing):
    batch = {
        "input_ids": torch.randint(4, 15, (3, 9)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 9, [1] * 4 + [0] * 5]),
        "labels": torch.tensor([0, 1, 1]),
    }
    real, shapes = petl.wrap(classifier(), **fields(name)), on_shapes(on_meta, fields(name))
    for model in (real, shapes):
        model.train()
        if fused:
            petl.fuse_lora(model)
        if checkpointing:
            options = {"use_reentrant": False}
            base = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with without_values(shapes, CPU):
        planned = pass_memory(shapes, batch, CPU)
    with LiveBytes((*real.parameters(), *real.buffers(), *batch.values())) as live:
        loss = real(**batch).loss
        kept = live.now
        loss.backward()
    assert (planned.kept, planned.peak) == (kept, live.peak)


@pytest.mark.thorough
@pytest.mark.parametrize("trained", [False, True])
def test_segments_of_the_loss_need_the_memory_of_a_real_pass(trained):
    config = llama_config()
    config.vocab_size = 500
    method = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"] if trained else None}
    method = {"name": "lora", "task_type": "CAUSAL_LM", **method}

    def base():
        return LlamaForCausalLM(config)

    def on_meta():
        with torch.device("meta"):
            return base()

    ids = torch.randint(4, 15, (3, 9))
    batch = {"input_ids": ids, "labels": torch.nn.functional.pad(ids, (1, 0))[:, 1:]}
    batch["shift_labels"] = ids  # each position has a label: a plan assumes it
    passes = []
    for segment in (None, 5):
        real, shapes = petl.wrap(base(), **method).train(), on_shapes(on_meta, method).train()
        for model in (real, shapes) if segment else ():
            petl.segment_loss(model, segment)
        with without_values(shapes, CPU):
            planned = pass_memory(shapes, batch, CPU)
        with LiveBytes((*real.parameters(), *real.buffers(), *batch.values())) as live:
            loss = real(**batch).loss
            kept = live.now
            loss.backward()
        assert (planned.kept, planned.peak) == (kept, live.peak)
        passes.append(planned)
    if not trained:  # else the gradient of the head takes the place of what is saved
        # of float32 logits [27, 500] and of their softmax, no more than a segment is there
        assert passes[0].kept - passes[1].kept > (27 - 5) * 500 * 4
        assert passes[0].peak - passes[1].peak > (27 - 5) * 500 * 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_pass_of_some_tokens_needs_the_memory_of_a_real_one(attention):
    config = llama_config()
    config._attn_implementation = attention
    method = {"name": "lora", "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}

    def on_meta():
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    ids = torch.randint(4, 15, (3, 27))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["position_ids"] = torch.arange(27).expand(3, -1)
    batch["attention_mask"][1, 20:] = 0
    passes = []
    for keep in (None, 0.4):
        real, shapes = petl.wrap(LlamaForCausalLM(config), **method), on_shapes(on_meta, method)
        for model in (real.train(), shapes.train()) if keep else ():
            petl.drop_tokens(model, keep=keep, block=4, layers="all")
        real.train(), shapes.train()
        with without_values(shapes, CPU):
            planned = pass_memory(shapes, batch, CPU)
        with LiveBytes((*real.parameters(), *real.buffers(), *batch.values())) as live:
            loss = real(**batch).loss
            kept = live.now
            loss.backward()
        assert (planned.kept, planned.peak) == (kept, live.peak)
        passes.append(planned)
    assert passes[1].kept < passes[0].kept
    assert passes[1].operations < passes[0].operations


def test_shared_weights_stay_shared_without_values():
    with torch.device("meta"):
        base = LlamaForCausalLM(llama_config())
    base.lm_head.weight = base.model.embed_tokens.weight
    model = petl.wrap(base, "lora", task_type="CAUSAL_LM")
    with without_values(model, CPU):
        assert base.lm_head.weight is base.model.embed_tokens.weight


def test_the_pass_of_a_smaller_width_is_part_of_the_plan(tiny):
    plain, nested = plan(tiny, "+method=lora"), plan(tiny, "+method=lora", "+loss=nested")
    assert not nested.memory.unknown
    assert nested.memory.pass_.kept > plain.memory.pass_.kept
    assert nested.memory.pass_.operations > 1.2 * plain.memory.pass_.operations


def test_the_memory_of_a_pass_that_reads_values_is_unknown():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x[x > 0].view(-1, 4))

    model = petl.wrap(Asking(), "lora", target_modules=["linear"])
    with without_values(model, CPU), pytest.raises(UnsupportedError):
        pass_memory(model, {"x": torch.ones(2, 4)}, CPU)


@pytest.mark.thorough
def test_supports_gives_the_reason_of_a_refusal(tiny):
    supports = plan(tiny, "+method=mola").supports
    assert supports["petl merge"].startswith("no: MoLA adapters depend on the input")
    assert supports["petl export --lora"].startswith("no: MoLA adapters depend on the input")
    assert set(plan(tiny, "+method=lora").supports.values()) == {"yes"}
    # its layers would take the argument
    mixed = plan(tiny, "+method=sherl").supports["mixed batches (adapter_names)"]
    assert mixed == "no: one side network at a time feeds the late blocks"


def test_an_initialization_from_data_is_planned_with_the_default_and_a_note(tiny):
    planned = plan(tiny, "+method=lora", "method.init_lora_weights=eva")
    assert any("init_lora_weights=eva" in note for note in planned.notes)
    assert planned.file_bytes == plan(tiny, "+method=lora").file_bytes


def test_a_method_that_computes_its_adapter_is_counted_on_a_model_that_generates():
    assert counted("icv")[0] == 30 * 576


def test_reference_counts_equal_counts_by_hand():
    square, up = 384 + 384, 384 + 1536
    assert counted("lora")[0] == 6 * 8 * (4 * square + 2 * up)
    # value and query: 2 x 6 layers, 1,000 coefficients each
    assert counted("fourierft")[0] == 12 * 1000
    # inverted triangle, floor(4 j / 6): layers of 2, 2, 4, 6, 6, 8 experts; routers read the input
    experts = sum([2, 2, 4, 6, 6, 8])
    assert counted("mola")[0] == experts * (8 * (4 * square + 2 * up) + 5 * 384 + 1536)
