"""Combining adapters of different methods, ranks and targets by their updates."""

import json
import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training_fixtures import llama_config, write_model
from transformers import LlamaForCausalLM

import petl
from petl import testing
from petl.adapters import deltas, search
from petl.adapters.deltas.updates import combined_updates, cut, update_of
from petl.adapters.export.lora import export_lora
from petl.adapters.export.saved_adapter import find
from petl.errors import InputError, UnsupportedError

KINDS = {
    "lora": ("lora", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}),
    "mos": ("mos", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "sparse": (
        "sparse",
        {"density": 0.05, "selection_algorithm": "none", "target_modules": ["v_proj"]},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("updates")
    write_model(root / "base", LlamaForCausalLM, llama_config())
    for seed, (name, (method, fields)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = petl.wrap(base(root), method, task_type="CAUSAL_LM", **fields)
        testing.stir(model).save_pretrained(root / name)
    return root


def base(root):
    return LlamaForCausalLM.from_pretrained(root / "base").eval()


def weights(root, name):
    """The merged weights of the base with an adapter, less those of the base."""
    plain = base(root).state_dict()
    merged = petl.load(base(root), root / name).merge_and_unload().state_dict()
    return {key: merged[key] - tensor for key, tensor in plain.items()}


def test_linear_is_exact_for_any_methods(folders, tmp_path):
    lost = deltas.combine_adapters(
        [folders / name for name in KINDS],
        folders / "sum",
        "linear",
        level="update",
        weights=[1, -0.5, 2],
    )
    assert lost == 0
    found = weights(folders, "sum")
    parts = [weights(folders, name) for name in KINDS]
    for key, tensor in found.items():
        expected = parts[0][key] - 0.5 * parts[1][key] + 2 * parts[2][key]
        torch.testing.assert_close(tensor, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_by_default_updates_are_combined_and_of_loras_no_base_is_read(folders, tmp_path, fields):
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        own = {"r": 3 + seed, "target_modules": ["q_proj", "v_proj"], **fields}
        model = petl.wrap(base(folders), "lora", task_type="CAUSAL_LM", **own)
        testing.stir(model).save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        absent = {"base_model_name_or_path": "nobody/has-this-model"}
        file.write_text(json.dumps({**json.loads(file.read_text()), **absent}))
    deltas.combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", "linear")
    plain = base(folders).state_dict()
    found = [
        petl.load(base(folders), tmp_path / name).merge_and_unload().state_dict()
        for name in ("one", "two", "sum")
    ]
    for key, tensor in plain.items():
        if "proj" in key:
            one, two, both = (state[key] - tensor for state in found)
            torch.testing.assert_close(both, one + two, atol=1e-6, rtol=1e-5)


def test_by_default_tensors_are_combined_where_a_method_has_no_update(folders, tmp_path):
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = petl.wrap(base(folders), "adapter", task_type="CAUSAL_LM")
        testing.stir(model).save_pretrained(tmp_path / name)
    deltas.combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", "linear")
    assert petl.load(base(folders), tmp_path / "sum").peft_type.value == "PETL_ADAPTER"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_excluded_layers_are_those_of_the_first(folders, method):
    updates = [update_of(folders / name) for name in ("lora", "mos")]
    _, tensors, _ = combined_updates(updates, method, exclude=["layers.0"])
    for name, (A, B) in updates[0].pairs.items():
        if "layers.0" in name:
            found = [tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA"]
            torch.testing.assert_close(found[0] @ found[1], B @ A, atol=1e-5, rtol=1e-4)
    assert method != "linear" or not any("layers.0.mlp" in name for name in tensors)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear"])
def test_other_methods_are_those_of_the_updates(folders, method):
    updates = [update_of(folders / name) for name in ("lora", "mos")]
    config, tensors, lost = combined_updates(updates, method, density=0.5, rank=64)
    names = {name for update in updates for name in update.pairs}
    states = []
    for update in updates:
        full = {}
        for name in names:
            other = next(u.pairs[name] for u in updates if name in u.pairs)
            size = len(other[1]), other[0].shape[1]
            A, B = update.pairs.get(name, (None, None))
            full[name] = torch.zeros(size) if A is None else B @ A
        states.append(full)
    expected = deltas.combine(states, method, density=0.5)
    assert lost < 1e-5
    for name, tensor in expected.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        rank = config.rank_pattern.get(name, config.r)
        assert len(A) == rank == config.alpha_pattern.get(name, config.lora_alpha)
        torch.testing.assert_close(B @ A, tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("level", ["tensors", "update"])
def test_adapters_of_two_bases_are_combined_only_if_it_is_meant(folders, tmp_path, level):
    write_model(tmp_path / "base", LlamaForCausalLM, llama_config())
    torch.manual_seed(5)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "base")
    kind, fields = KINDS["lora"]
    model = petl.wrap(base(tmp_path), kind, task_type="CAUSAL_LM", **fields)
    testing.stir(model).save_pretrained(tmp_path / "other")
    both = [folders / "lora", tmp_path / "other"]
    with pytest.raises(petl.InputError):
        deltas.combine_adapters(both, tmp_path / "sum", "linear", level=level)
    assert not (tmp_path / "sum").exists()
    deltas.combine_adapters(both, tmp_path / "sum", "linear", level=level, other_base=True)
    assert (tmp_path / "sum" / "adapter_model.safetensors").is_file()


def test_a_rank_cuts_by_singular_values():
    torch.manual_seed(0)
    A, B = torch.randn(6, 20), torch.randn(30, 6)
    (a, b), lost, whole = cut((A, B), 4)
    values = torch.linalg.svdvals(B @ A)
    assert whole == pytest.approx(values.square().sum().item(), rel=1e-5)
    assert lost == pytest.approx(values[4:6].square().sum().item(), rel=1e-4)
    assert (b @ a - B @ A).square().sum().item() == pytest.approx(lost, rel=1e-4)
    assert len(a) == 4


def test_tensors_of_one_method(folders, tmp_path):
    torch.manual_seed(9)
    method, fields = KINDS["lora"]
    other = testing.stir(petl.wrap(base(folders), method, task_type="CAUSAL_LM", **fields))
    other.save_pretrained(tmp_path / "other")
    pair = [folders / "lora", tmp_path / "other"]
    deltas.combine_adapters(pair, tmp_path / "out", "linear", level="tensors")
    loaded = petl.load(base(folders), tmp_path / "out").state_dict()
    one = petl.load(base(folders), folders / "lora").state_dict()
    for key, tensor in other.state_dict().items():
        if "lora_" in key:
            torch.testing.assert_close(loaded[key], one[key] + tensor)


@pytest.mark.parametrize(
    ("names", "arguments", "reason"),
    [
        (["lora"], {}, "at least two"),
        (["lora", "mos"], {"level": "tensors"}, "peft_type.*level update"),
        (["lora", "mos"], {"level": "rows"}, "level='rows'"),
        (["lora", "lora"], {"level": "tensors", "rank": 2}, "rank=2"),
        (["lora", "nowhere"], {}, "nowhere"),
        (["lora", "mos"], {"level": "update", "weights": [1]}, "weights"),
        (["lora", "mos"], {"level": "update", "density": 2}, "density=2"),
        (["lora", "mos"], {"level": "update", "weights": [1, math.inf]}, "weights=.*not finite"),
        (["lora", "mos"], {"level": "update", "rank": 0}, "rank=0 is not an integer from 1"),
        (["lora", "mos"], {"level": "update", "rank": -1}, "rank=-1 is not an integer from 1"),
    ],
)
def test_what_does_not_fit_is_refused(folders, tmp_path, names, arguments, reason):
    with pytest.raises(petl.InputError, match=reason):
        deltas.combine_adapters(
            [folders / name for name in names], tmp_path / "out", "linear", **arguments
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"trainable_token_indices": [5]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.filterwarnings("ignore:.*(lora_bias|invalid shape|save_embedding_layers)")
def test_a_lora_that_is_more_than_factors_is_refused(folders, tmp_path, fields):
    fields = {"r": 3, "target_modules": ["q_proj"], **fields}
    model = testing.stir(petl.wrap(base(folders), "lora", task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path / "more")
    pair = [folders / "lora", tmp_path / "more"]
    combined = partial(deltas.combine_adapters, pair, tmp_path / "out", "linear", level="update")
    for call in (combined, partial(search.levels_of, model, "rank")):
        with pytest.raises(UnsupportedError, match=r"biases or tokens|no linear layer|use_dora"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "is_tied"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, False),
        # of which safetensors takes no two names of one tensor
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=["replicated blocks", "tied copies"],
)
@pytest.mark.every_cell
@pytest.mark.parametrize("command", ["combine", "export"])
def test_what_else_a_config_says_of_the_model_is_kept(tmp_path, fields, is_tied, command):
    config = llama_config()
    config.tie_word_embeddings = is_tied
    write_model(tmp_path / "base", LlamaForCausalLM, config)
    own = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    model = get_peft_model(base(tmp_path), own)
    testing.stir(model).save_pretrained(tmp_path / "one")
    if command == "combine":
        deltas.combine_adapters([tmp_path / "one"] * 2, tmp_path / "out", "linear", weights=[2, -1])
    else:
        export_lora(find(tmp_path / "one"), tmp_path / "out", None)
    ids = torch.arange(1, 9)[None]
    outputs = [
        PeftModel.from_pretrained(base(tmp_path), tmp_path / name)(input_ids=ids).logits
        for name in ("one", "out")
    ]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], base(tmp_path)(input_ids=ids).logits, atol=1e-3)


def test_adapters_of_other_replicated_blocks_are_refused(folders, tmp_path):
    for name, blocks in {"one": [[0, 2], [1, 2]], "two": [[0, 1], [0, 2]]}.items():
        own = LoraConfig(r=2, layer_replication=blocks, target_modules=["q_proj"])
        get_peft_model(base(folders), own).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r"layer_replication=.*\[0, 2\]"):
        deltas.combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", "linear")
