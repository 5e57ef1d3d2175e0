"""ICV: vectors of a model against numpy's SVD, both paddings, decoding; see test_steering.py."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from kept_processes import in_processes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import petl
from petl import testing
from petl.core.strengths import best_strength
from petl.errors import InputError, UnsupportedError
from petl.methods import icv
from petl.methods.icv.config import hosts
from petl.methods.icv.directions import last_states
from petl.methods.icv.steering import Steer, steered
from petl.testing import TINY_MODELS, logits
from petl.testing.models import tiny_gpt2, tiny_llama

CONTRACT = {
    "models": ("llama", "gpt2", "bert", "vit"),  # a T5 has two stacks
    # vectors that train from zero; calibrated ones have nothing to train
    "fields": {
        "train": True,
        "pairs": None,
        "scale": "plain",
        "keep_norm": False,
        "strength": 1.0,
    },
    "lr": 0.1,
    "excused": {
        # 3 % with any rate; the test of training below replaces it
        "only_the_adapter_trains": "one shift for all tokens cannot learn random tokens by heart",
        "layers_that_are_never_called_are_refused": "it refuses all target_modules that are given",
    },
    "idle": {
        "calibration_data": "runs read it, and take demonstrations from it",
        "keep_norm": "vectors without demonstrations start at zero, which has no direction",
        "scale": "likewise",
        "rank": "likewise",
        "pairs": "the cases have no demonstrations",
        "train": "vectors without demonstrations are trained",
    },
}
ZERO = {"train": True, "scale": "plain", "keep_norm": False}


def test_many_linear_hosts_are_loaded_by_the_names_that_peft_shortens(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    config = OPTConfig(
        **sizes, num_hidden_layers=24, num_attention_heads=2, max_position_embeddings=64
    )
    torch.manual_seed(0)
    base = OPTForCausalLM(config).eval()
    model = wrapped(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    loaded = petl.load(base, tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def texts(rows, seed, lengths=(4, 9)):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (rows,), generator=generator).tolist()
    return [torch.randint(3, 90, (size,), generator=generator) for size in sizes]


def padded(rows, side="right"):
    """Ids and mask of rows of unequal length."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def demonstrations(rows=6, seed=1, size=4, side="right"):
    """Batches of `rows` demonstrations, `size` each."""
    both = list(zip(texts(rows, seed), texts(rows, seed + 100), strict=True))
    return [batch_of(both[i : i + size], side) for i in range(0, rows, size)]


def batch_of(pairs, side="right"):
    batch = {}
    for name, rows in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = padded(rows, side)
    return batch


def wrapped(base=None, calibration=None, **fields):
    calibration = demonstrations() if calibration is None else calibration
    return petl.wrap(tiny_llama() if base is None else base, "icv", calibration=calibration,
                     **fields).eval()  # fmt: skip


def vectors(model, name="default"):
    """By path of the module, in the order of the model."""
    return {key: a.vector for key, a in model.base_model.placed[name].items()}


# Hidden states, check 3


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_states_of_a_batch_are_those_of_single_texts(make, side):
    model, rows = make(), texts(4, seed=5)
    with torch.no_grad():
        found = last_states(model, *padded(rows, side))
        for i, row in enumerate(rows):
            outputs = model(row[None], output_hidden_states=True)
            # the first is the embedding; the last comes behind the model's final norm
            *inner, last = [states[0, -1] for states in outputs.hidden_states[1:]]
            torch.testing.assert_close(found[i, :-1], torch.stack(inner), atol=1e-5, rtol=0)
            norm = model.model.norm if make is tiny_llama else model.transformer.ln_f
            torch.testing.assert_close(norm(found[i, -1]), last, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["mlp", "stream"])
def test_vectors_are_the_direction_of_the_differences(mode):
    base, both = tiny_llama(), demonstrations()
    model = wrapped(mode=mode, calibration=both)
    d = []
    with torch.no_grad():
        for batch in both:
            y, x = (
                last_states(base, batch[f"{s}_input_ids"], batch[f"{s}_attention_mask"])
                for s in ("target", "source")
            )
            d += list((y - x).numpy().reshape(len(y), -1))
    d = np.stack(d)
    U, _, Vt = np.linalg.svd(d - d.mean(0), full_matrices=False)
    expected = d.mean(0) + Vt[0] * np.sign(U[np.argmax(np.abs(U[:, 0])), 0])
    found = torch.cat(list(vectors(model).values()))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    suffix = ".mlp" if mode == "mlp" else ""
    assert list(vectors(model)) == [f"model.layers.{i}{suffix}" for i in range(3)]


def test_batches_and_padding_do_not_change_the_vectors():
    expected = vectors(wrapped())
    for other in (demonstrations(size=1), demonstrations(size=6, side="left")):
        for key, vector in vectors(wrapped(calibration=iter(other))).items():
            torch.testing.assert_close(vector, expected[key], atol=1e-5, rtol=0)


def test_nothing_is_left_on_the_base():
    base = tiny_llama().train()
    icv.directions.differences(base, demonstrations())
    assert base.training
    assert not any(module._forward_hooks for module in base.modules())
    assert all(parameter.grad is None for parameter in base.parameters())


# The adapter


def test_the_tensors_are_those_of_the_contract():
    model = wrapped()
    names = {n for n, _ in model.named_buffers() if "icv" in n}
    assert names == {
        f"base_model.model.model.layers.{i}.mlp.petl_icv_adapters.default.vector" for i in range(3)
    }
    assert not testing.trainable(model)
    assert model.base_model.planned_parameters() == 3 * 64
    assert list(vectors(wrapped(tiny_gpt2()))) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]


def test_smollm2_has_17280_numbers():
    config = LlamaConfig(
        vocab_size=32, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    model = petl.wrap(base, "icv")
    assert model.base_model.planned_parameters() == 17_280


@pytest.mark.parametrize("mode", ["mlp", "stream"])
def test_outputs_of_the_chosen_modules_are_shifted(mode):
    base, batch = tiny_llama(), TINY_MODELS["llama"].batch()
    model = wrapped(mode=mode, layers=[1, 2], strength=0.3)
    v = vectors(model)
    block, mlp = base.model.layers[1], "mlp" if mode == "mlp" else ""
    assert list(v) == [".".join(filter(None, ("model.layers", str(i), mlp))) for i in (1, 2)]
    for index in (1, 2):
        block = base.model.layers[index]
        steers = [Steer(v[".".join(filter(None, ("model.layers", str(index), mlp)))], 0.3, True)]
        host = block.mlp if mode == "mlp" else block
        host.register_forward_hook(lambda _, args, y, s=steers: steered(y, s, keep_norm=True))
    torch.testing.assert_close(logits(model, batch), logits(base, batch), atol=1e-5, rtol=0)


def test_the_strength_is_read_in_each_forward_pass():
    batch = TINY_MODELS["llama"].batch()
    model, base = wrapped(strength=0.4), logits(tiny_llama(), batch)
    config = model.peft_config["default"]
    strong = logits(model, batch)
    config.strength = 0.1
    weak = logits(model, batch)
    assert 0 < (weak - base).norm() < (strong - base).norm()
    config.strength = 0
    assert torch.equal(logits(model, batch), base)
    config.strength = 0.4
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), strong)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.peft_config["default"].strength = 0
        assert torch.equal(logits(twin, batch), base)
        assert torch.equal(logits(model, batch), strong)


def with_two(**second):
    """A model with adapters of different vectors and strengths, the second under "b"."""
    model = wrapped(strength=0.3)
    model.add_adapter("b", petl.build_config("icv", strength=0.2, **second))
    icv.calibrate(model, demonstrations(seed=7), "b")
    return model.eval()


def test_calibrating_an_added_adapter_equals_wrapping_with_it():
    model = with_two()
    for key, vector in vectors(wrapped(calibration=demonstrations(seed=7))).items():
        torch.testing.assert_close(vectors(model, "b")[key], vector)


@pytest.mark.parametrize("mode", ["mlp", "stream"])
def test_active_adapters_shift_by_their_mean_in_any_order(mode):
    base, batch = tiny_llama(), TINY_MODELS["llama"].batch()
    model = wrapped(strength=0.3, mode=mode)
    model.add_adapter("b", petl.build_config("icv", strength=0.2, scale="plain", mode=mode))
    icv.calibrate(model, demonstrations(seed=7), "b")
    found = []
    for names in (["default", "b"], ["b", "default"]):
        model.base_model.set_adapter(names)
        found.append(logits(model, batch))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    for index, block in enumerate(base.model.layers):
        key = f"model.layers.{index}" + ".mlp" * (mode == "mlp")
        steers = [
            Steer(vectors(model, "default")[key], 0.3, True),
            Steer(vectors(model, "b")[key], 0.2, False),
        ]
        host = block.mlp if mode == "mlp" else block
        host.register_forward_hook(lambda _, args, y, s=steers: steered(y, s, keep_norm=True))
    torch.testing.assert_close(found[0], logits(base, batch), atol=1e-5, rtol=0)


def test_two_adapters_of_one_vector_and_strength_equal_one(tmp_path):
    batch, model = TINY_MODELS["llama"].batch(), wrapped(strength=0.3)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="again")
    model.base_model.set_adapter(["default", "again"])
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-6, rtol=0)
    for config in model.peft_config.values():
        config.strength = 0.0
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))


def test_adapters_that_keep_the_norm_and_others_are_not_active_together():
    model = with_two(scale="plain", keep_norm=False)
    with pytest.raises(UnsupportedError):
        model.base_model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default"]


def test_strength_and_scale_are_saved_and_the_runs_data_are_not(tmp_path):
    wrapped(strength=0.25, calibration_data={"num_samples": 4}).save_pretrained(tmp_path)
    config = petl.load(tiny_llama(), tmp_path).peft_config["default"]
    assert config.strength == 0.25
    assert config.calibration_data is None


def test_without_a_module_around_the_mlp_its_last_projection_is_shifted():
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = wrapped(OPTForCausalLM(config))
    assert list(vectors(model)) == [f"model.decoder.layers.{i}.fc2" for i in range(2)]
    assert hosts(petl.build_config("icv"), model.base_model.model) == {
        f"model.decoder.layers.{i}.fc2": i for i in range(2)
    }


# Training, check 5


def test_training_starts_at_the_base_and_moves_the_vectors_alone():
    case = testing.Case("icv", "llama", CONTRACT["fields"])
    model, batch = case.wrap(), case.batch()
    assert torch.equal(logits(model, batch), logits(case.base(), batch))
    found = testing.gradients(model, batch)
    assert {name.rpartition(".")[2] for name in found} == {"vector"}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_calibrated_vectors_can_train():
    calibrated, model = vectors(wrapped()), wrapped(train=True)
    for key, vector in vectors(model).items():
        assert isinstance(vector, nn.Parameter)
        assert torch.equal(vector, calibrated[key])
    gradients = testing.gradients(model, TINY_MODELS["llama"].batch())
    assert len(gradients) == 3


def test_a_classifier_is_steered_only_by_training():
    tiny = TINY_MODELS["bert"]
    model = petl.wrap(tiny.base(), "icv", **ZERO)
    assert set(vectors(model)) == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}


# Two processes, check 6


def of_rank():
    rank = torch.distributed.get_rank()
    rows = list(zip(texts(5, 1), texts(5, 101), strict=True))[rank::2]
    found = wrapped(calibration=[batch_of([pair]) for pair in rows])
    bad = "none"
    try:
        wrapped(calibration=[{}] if rank else [batch_of(rows)])
    except InputError as error:
        bad = str(error)
    return torch.cat(list(vectors(found).values())), bad


@pytest.mark.thorough
def test_two_processes_give_the_vectors_of_one():
    rows = list(zip(texts(5, 1), texts(5, 101), strict=True))
    expected = torch.cat(list(vectors(wrapped(calibration=[batch_of(rows)])).values()))
    for found, bad in in_processes(2, of_rank):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert "has no tensor source_input_ids" in bad  # in both processes


# Strengths


def test_the_best_strength_is_chosen_and_scores_are_returned():
    model, batch = wrapped(strength="auto"), TINY_MODELS["llama"].batch()
    with pytest.raises(InputError):
        model(**batch)
    config = model.peft_config["default"]

    def distance():
        return abs(config.strength - 0.19)

    found = icv.choose_strength(model, distance)
    assert found == pytest.approx({s: abs(s - 0.19) for s in (0.0, 0.05, 0.1, 0.2, 0.4)})
    assert config.strength == 0.2
    assert icv.choose_strength(model, distance, [0.0, 1.0], higher_is_better=True)
    assert config.strength == 1.0
    losses = icv.scores_by_strength(model, lambda: model(**batch).loss.item(), [0.0, 0.5])
    assert losses[0.0] == tiny_llama()(**batch).loss.item()
    assert losses[0.5] != losses[0.0]
    assert config.strength == 1.0


def test_equal_scores_choose_the_smaller_strength_and_nan_is_left_out():
    assert best_strength({0.4: 1.0, 0.1: 1.0, 0.2: 2.0}, higher_is_better=False) == 0.1
    assert best_strength({0.1: math.nan, 0.2: 2.0}, higher_is_better=False) == 0.2


# Refusals


def without(key):
    return [{name: value for name, value in demonstrations()[0].items() if name != key}]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (print, "batches"),
        (without("target_input_ids"), "target_input_ids"),
        ([{**demonstrations()[0], "source_attention_mask": torch.ones(4, 2)}], "shape"),
        ([{**demonstrations()[0], "source_input_ids": torch.ones(3, 2)}], "equal rows"),
        ([{k: v * 0 for k, v in demonstrations()[0].items()}], "empty"),
    ],
)
def test_wrong_demonstrations_are_refused(batches, message):
    base = tiny_llama()
    with pytest.raises(InputError, match=message):
        wrapped(base, batches)
    assert not any("icv" in name for name, _ in base.named_modules())


def test_states_that_are_not_finite_are_refused():
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0] = math.nan
    with pytest.raises(InputError, match="block 1"):
        wrapped(base)
