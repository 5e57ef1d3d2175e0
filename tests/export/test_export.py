"""Merged models and plain LoRAs equal the adapted model, or are refused and nothing is written."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_fixtures import SPECIAL, Finished, Tiny, bert_config, tiny, train, words, write_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.core.model.targets import place
from petl.core.registry import METHODS
from petl.core.spec.config import MethodConfig
from petl.errors import InputError, RunStopped, UnsupportedError
from petl.export.export import export_lora, merge
from petl.export.lora import as_lora
from petl.export.saved_adapter import find, score
from petl.models.loading import load_base
from petl.tasks import CausalLM

__all__ = ["tiny"]


@dataclass
class PairConfig(MethodConfig):
    r: int = field(default=2, metadata={"help": "rank of the first layer; each next one adds 1"})
    scale: float = field(default=0.75, metadata={"help": "of every odd layer; 2.0 of the others"})


class PairAdapter(petl.Adapter):
    """A low-rank pair whose rank and scale depend on the layer."""

    def __init__(self, shape, config, info) -> None:
        super().__init__(shape, config, info)
        rank = config.r + info.settings["index"]
        self.scale = config.scale if info.settings["index"] % 2 else 2.0
        self.lora_A = nn.Parameter(torch.randn(rank, shape.in_features) / 8)
        self.lora_B = nn.Parameter(torch.randn(shape.out_features, rank) / 8)

    def factors(self) -> petl.Factors:
        return petl.Factors(self.lora_A, self.lora_B, self.scale)


class PairModel(petl.MethodTuner):
    config_cls, adapter_cls = PairConfig, PairAdapter

    def layout(self, config, model, shapes) -> dict[str, dict[str, Any]]:
        places = {key: place(model, key) for key in shapes}
        return {key: {"index": where.index if where else 0} for key, where in places.items()}


@pytest.fixture(scope="module", autouse=True)
def _pair() -> Iterator[None]:
    """A method of a stranger, known while this module's tests run."""
    petl.register("test_pair", summary="a pair", paper="none")(PairModel)
    yield
    del METHODS["test_pair"]


@pytest.fixture(scope="module")
def lora_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    overrides = [*tiny.steady, "+method=lora", "train.lr=0.05"]
    return train(overrides, tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def mola_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train([*tiny.steady, "+method=mola"], tmp_path_factory.mktemp("mola") / "run")


def save_stirred(base: nn.Module, name: str, folder: Path, **fields) -> Path:
    """An adapter alone in `folder`, every trained tensor of it away from its start."""
    model = petl.wrap(base, name, **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(folder)
    return folder


def classifier(tiny: Tiny) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(str(tiny.folder / "steady"))


def tokens() -> Tensor:
    return torch.randint(len(SPECIAL), len(words()), (4, 9))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    ids = ids.to(next(model.parameters()).device)
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.cpu()


def adapted(saved: Path) -> nn.Module:
    return find(saved).model()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Merging


def test_a_merged_model_is_a_plain_one_with_the_same_outputs(lora_run, tmp_path):
    written = merge(find(lora_run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = tokens()
    close(logits(plain, ids), logits(adapted(lora_run.path), ids))
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert not [key for key in plain.state_dict() if "lora" in key or "modules_to_save" in key]
    assert plain.config.id2label == {0: "beast", 1: "color", 2: "tool"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"][0] == 2
    assert written.difference is not None
    assert written.difference.same == 1.0
    assert written.difference.effect > 0.01


def test_a_method_that_cannot_merge_says_why_and_writes_nothing(mola_run, tmp_path):
    with pytest.raises(UnsupportedError, match="depend on the input through the router"):
        merge(find(mola_run.path), tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_changes_outputs_is_refused_and_writes_nothing(tiny, tmp_path, monkeypatch):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    monkeypatch.setattr(PairAdapter, "delta", lambda self: 2 * petl.Adapter.delta(self))
    with pytest.raises(RunStopped, match="tolerance of 1e-04, so nothing was written") as stopped:
        merge(find(saved), tmp_path / "out", None)
    assert stopped.value.status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    merge(find(saved), tmp_path / "out", 100.0)  # who asks for it gets it


def test_a_folder_with_something_in_it_is_never_written_to(lora_run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for write in (merge, export_lora):
        with pytest.raises(InputError, match="exists already"):
            write(find(lora_run.path), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_empty_folder_may_be_written_to(lora_run, tmp_path):
    (tmp_path / "out").mkdir()
    export_lora(find(lora_run.path), tmp_path / "out", None)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_norms_and_head_of_a_method_without_layers_of_its_own_are_merged(tiny, tmp_path):
    saved = save_stirred(
        classifier(tiny),
        "ln_tuning",
        tmp_path / "norms",
        target_modules=["LayerNorm"],
        task_type="SEQ_CLS",
    )
    merge(find(saved), tmp_path / "out", None)
    ids = tokens()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    close(logits(plain, ids), logits(adapted(saved), ids))


def test_a_run_whose_data_are_gone_is_compared_on_random_tokens(tiny, tmp_path, caplog):
    data = tmp_path / "train.csv"
    with data.open("w", newline="") as opened:
        rows = [("the red one", "color"), ("a cat", "beast")] * 6
        csv.writer(opened).writerows([("text", "label"), *rows])
    moved = [f"data.train={data}", f"data.test={data}", "+method=lora"]
    run = train([*tiny.steady, *moved], tmp_path / "run")
    data.unlink()
    with pytest.raises(InputError, match=r"train\.csv"):
        score(find(run.path))
    merge(find(run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = tokens()
    close(logits(plain, ids), logits(adapted(run.path), ids))


# A plain LoRA


def test_factors_are_exported_as_they_are(tiny, tmp_path):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    before = load_file(saved / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(before) == len(after)
    for name, tensor in after.items():
        source = name.replace(".lora_", ".petl_test_pair_adapters.lora_").removesuffix(".weight")
        assert torch.equal(tensor, before.get(source, before.get(name)))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted({config["r"], *config["rank_pattern"].values()}) == [2, 3]
    assert config["modules_to_save"] == ["classifier", "score"]


STOCK = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base, adapter, tokens, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).eval()
ids = torch.load(tokens)
with torch.no_grad():
    torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, out)
assert "petl" not in sys.modules
"""


def test_stock_peft_loads_the_lora_without_petl(tiny, tmp_path):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    ids = tokens()
    torch.save(ids, tmp_path / "tokens")
    paths = [tiny.folder / "steady", tmp_path / "out", tmp_path / "tokens", tmp_path / "logits"]
    line = [sys.executable, "-W", "error::UserWarning:peft", "-c", STOCK, *map(str, paths)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "logits"), logits(adapted(saved), ids))


def test_a_hadamard_product_becomes_a_lora_of_at_most_the_square_of_its_rank(tiny, tmp_path):
    fields = {"r": 2, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"}
    saved = save_stirred(classifier(tiny), "loha", tmp_path / "loha", **fields)
    written = export_lora(find(saved), tmp_path / "out", None)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {4}
    assert written.difference is not None
    assert written.difference.effect > 1e-3


def test_an_update_of_zero_becomes_a_lora_of_rank_one(tiny):
    model = petl.wrap(classifier(tiny), "loha", target_modules=["query"], task_type="SEQ_CLS")
    config, tensors = as_lora(model)
    assert config.r == 1
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_lora_of_pefts_own_is_copied(lora_run, tmp_path):
    written = export_lora(find(lora_run.path), tmp_path / "out", None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        source = lora_run.path / "adapter" / name
        assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()
    assert written.difference is None


def test_what_is_no_weight_update_does_not_become_a_lora(mola_run, tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="mola cannot become a LoRA: MoLA adapters depend"):
        export_lora(find(mola_run.path), tmp_path / "out", None)
    scales = {"target_modules": ["query"], "feedforward_modules": [], "task_type": "SEQ_CLS"}
    saved = save_stirred(classifier(tiny), "ia3", tmp_path / "ia3", **scales)
    with pytest.raises(UnsupportedError, match="no conversion of ia3 to LoRA; petl merge"):
        export_lora(find(saved), tmp_path / "out", None)
    # its config is a subclass of LoRA's
    pruned = {"total_step": 9, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    saved = save_stirred(classifier(tiny), "adalora", tmp_path / "adalora", **pruned)
    with pytest.raises(UnsupportedError, match="no conversion of adalora"):
        export_lora(find(saved), tmp_path / "out", None)


def test_a_head_of_several_layers_is_kept_whole(tmp_path):
    shared = bert_config().to_dict() | {"num_labels": 3, "max_position_embeddings": 40}
    kinds = ("model_type", "architectures", "id2label", "label2id")
    config = RobertaConfig(**{k: v for k, v in shared.items() if k not in kinds})
    write_model(tmp_path / "roberta", RobertaForSequenceClassification, config)
    base = RobertaForSequenceClassification.from_pretrained(tmp_path / "roberta")
    saved = save_stirred(base, "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    export_lora(find(saved), tmp_path / "out", None)
    merge(find(saved), tmp_path / "merged", None)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    heads = {name.partition(".classifier.")[2] for name in tensors if ".classifier." in name}
    assert heads == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("name", ["test_pair", "vera"])
def test_a_conv1d_base_is_served_as_well(name, tmp_path):
    config = GPT2Config(
        vocab_size=len(words()), n_positions=40, n_embd=32, n_layer=2, n_head=2, n_inner=48
    )
    write_model(tmp_path / "gpt2", GPT2LMHeadModel, config)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    fields = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    fields |= {"r": 4, "d_initial": 1.0, "fan_in_fan_out": True} if name == "vera" else {}
    saved = save_stirred(base, name, tmp_path / "adapter", **fields)
    lora = export_lora(find(saved), tmp_path / "lora", None)
    merged = merge(find(saved), tmp_path / "merged", None)
    ids = tokens()
    wanted = logits(adapted(saved), ids)
    close(logits(adapted(tmp_path / "lora"), ids), wanted)
    close(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), ids), wanted)
    assert lora.difference is not None
    assert merged.difference is not None
    assert lora.difference.effect > 1e-3


def test_a_bf16_base_merges_within_its_own_tolerance_and_exactly_in_float32(tiny, tmp_path):
    run = train([*tiny.steady, "+method=lora", "model.dtype=bfloat16"], tmp_path / "run")
    written = merge(find(run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.bfloat16
    assert written.difference is not None
    assert 0 < written.difference.relative < 2e-2
    exact = merge(find(run.path).in_dtype("float32"), tmp_path / "exact", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exact", dtype="auto")
    assert plain.dtype == torch.float32
    assert exact.difference is not None
    assert exact.difference.relative < 1e-5


# Finding a run


def test_a_runs_adapter_folder_is_as_good_as_the_run(lora_run):
    assert find(lora_run.path / "adapter").run == lora_run.path.absolute()


def test_a_checkpoint_serves_as_an_adapter_alone(lora_run):
    saved = find(lora_run.path / "checkpoints" / lora_run.checkpoints[-1])
    assert saved.run is None
    assert saved.model().active_peft_config.r == 8


def test_what_is_missing_is_said(tiny, tmp_path, lora_run):
    with pytest.raises(InputError, match="is no folder"):
        find(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds neither adapter/ nor adapter_config\.json"):
        find(tmp_path)
    (tmp_path / "config.yaml").write_text("method: {name: lora}\n")
    with pytest.raises(InputError, match=r"saved no adapter yet; finish it with train\.resume="):
        find(tmp_path)
    with pytest.raises(InputError, match="an adapter without a run"):
        score(find(lora_run.path / "checkpoints" / lora_run.checkpoints[-1]))


def test_a_run_with_a_damaged_configuration_is_refused(lora_run, tmp_path):
    (tmp_path / "adapter").symlink_to(lora_run.path / "adapter")
    (tmp_path / "config.yaml").write_text("method: [")
    with pytest.raises(InputError, match="is not the configuration of a run"):
        find(tmp_path)


def test_scores_of_the_saved_adapter_are_those_of_the_run(lora_run, mola_run):
    for run in (lora_run, mola_run):
        assert score(find(run.path)) == pytest.approx(run.scores["after"], abs=1e-6)


def test_a_language_model_run_is_scored_and_merged_too(tiny, tmp_path):
    run = train([*tiny.complete, "+method=lora"], tmp_path / "run")
    assert score(find(run.path)) == pytest.approx(run.scores["after"], abs=1e-6)
    merge(find(run.path), tmp_path / "out", None)
    settings = {"name": "out", "source": "path", "path": str(tmp_path / "out")}
    ids = tokens()
    close(logits(load_base(settings, CausalLM(max_length=16)), ids), logits(adapted(run.path), ids))
