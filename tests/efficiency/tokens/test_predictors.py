"""Networks that predict where attention looks: trained, written, read, refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import petl
from petl.efficiency.tokens import train_predictors
from petl.efficiency.tokens.predictors import Network, Predictors, by_head
from petl.errors import InputError

NEEDLE = 7


def planted() -> LlamaForCausalLM:
    """A model whose queries look for one token, wherever it is, in its upper two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
        attention_bias=True,
        rope_theta=1e9,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[NEEDLE, 0] += 30.0
        for layer in model.model.layers[2:]:
            # the last numbers of each head turn slowly with the distance
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(0.03)
            layer.self_attn.q_proj.bias[7::8] = 10.0
            layer.self_attn.k_proj.weight[7::8, 0] = 2.0
            layer.self_attn.k_proj.bias[7::8] = -4.0  # the products of other tokens are negative
    return model


def batches(count: int, rows: int = 4, tokens: int = 64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(8, 50, (rows, tokens), generator=generator)
        # in seven blocks of a row
        blocks = torch.rand(rows, tokens // 4, generator=generator).argsort(1)[:, :7]
        ids.scatter_(1, 4 * blocks + torch.randint(0, 4, (rows, 7), generator=generator), NEEDLE)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_oracle_keeps_planted_needles():
    model = petl.wrap(planted(), "lora", r=2, target_modules=["q_proj"]).train()
    settings = {"block": 4, "keep": 0.42, "always_first": 0, "always_last": 0}
    assert petl.drop_tokens(model, **settings, scorer="oracle") == 2
    needles = torch.stack([batch["input_ids"] == NEEDLE for batch in batches(3)])
    blocks = needles.unflatten(-1, (16, 4)).any(-1)
    assert torch.equal(kept_tokens(model), blocks.repeat_interleave(4, dim=-1))


@pytest.fixture(scope="module")
def trained():
    return train_predictors(planted(), batches(290), block=4, keep=0.42, lr=3e-3)


@pytest.mark.thorough
def test_trained_predictors_keep_what_attention_looks_at(trained, tmp_path):
    assert trained.recall > 0.9
    assert {*trained.predictors.layers} == {"2", "3"}
    # units that were not above 0 in 4 of 5 inputs are gone, of 512 and 4 x 8
    sides = trained.predictors.each()["2"].sides.values()
    assert min(len(network.weights[1]) for network in sides) < 32
    file = tmp_path / "predictors.safetensors"
    trained.predictors.save(file)
    assert {name.rsplit(".", 1)[0] for name in load_file(file)} == {
        f"{layer}.lemo_{side}{number}" for layer in (2, 3) for side in "qk" for number in (1, 2, 3)
    }
    model = petl.wrap(planted(), "lora", r=2, target_modules=["q_proj"]).train()
    kept = {}
    for scorer, path in (("oracle", None), ("predictor", file), ("norm", None)):
        petl.drop_tokens(
            model, block=4, keep=0.42, scorer=scorer, predictor=path, always_first=0, always_last=0
        )
        kept[scorer] = kept_tokens(model)
    share = (kept["oracle"] & kept["predictor"]).float().sum() / kept["oracle"].sum()
    assert share > 0.9


def kept_tokens(model) -> torch.Tensor:
    """True for the tokens that the last layer keeps, [batches, rows, tokens]."""
    found = []
    attention = model.get_base_model().model.layers[3].self_attn

    def look(module, args, kwargs):
        if module.kept is not None:  # the oracle asks the layer first
            mask = torch.zeros(4, 64, dtype=torch.bool)
            found.append(mask.scatter(1, module.kept, value=True))

    hook = attention.register_forward_pre_hook(look, with_kwargs=True)
    for batch in batches(3):
        model(**batch)
    hook.remove()
    return torch.stack(found)


def test_the_map_is_that_of_two_networks_summed_over_heads():
    torch.manual_seed(0)
    predictors = Predictors.new([1], block=4, heads=2, hidden=12)
    hidden, valid = torch.randn(2, 10, 12), torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    found = predictors.map_of(1, hidden, valid)
    expected = torch.zeros(2, 3, 3)
    sides = predictors.each()["1"].sides
    for row in range(2):
        for head in range(2):
            outputs = {"q": [], "k": []}
            for block in range(3):
                numbers = []
                for token in range(4 * block, 4 * block + 4):
                    own = torch.zeros(6)
                    if token < 10 and valid[row, token]:
                        scale = hidden[row, token].square().mean().sqrt()
                        own = hidden[row, token, 6 * head : 6 * head + 6] / scale
                    numbers.append(own)
                for side, network in sides.items():
                    one, two, three = network.weights
                    x = torch.cat(numbers)
                    outputs[side].append(three @ (two @ (one @ x).relu()).relu())
            for i in range(3):
                for j in range(i + 1):
                    expected[row, i, j] += (outputs["q"][i] @ outputs["k"][j]).detach()
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)
    assert by_head(hidden, valid, 4, 2).shape == (2, 2, 3, 24)


def test_idle_units_are_left_out_without_changing_what_others_give():
    torch.manual_seed(0)
    network = Network.new(2, 3, torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        network.weights[0][5:] = 0.0  # never above 0: 507 of 512
    x = torch.randn(40, 6)
    before = network(x)
    network.prune(40)
    assert network.weights[0].shape[0] <= 5
    torch.testing.assert_close(network.eval()(x), before)


def test_all_units_idle_leave_one():
    network = Network.new(2, 3, torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        network.weights[0].zero_()
    network(torch.randn(4, 6))
    network.prune(4)
    assert [tuple(w.shape) for w in network.weights] == [(1, 6), (1, 1), (3, 1)]


@pytest.mark.parametrize(
    ("changed", "settings", "words"),
    [
        ({}, {"block": 8}, "block=4"),
        ({"notes": torch.ones(1)}, {"layers": "all"}, "no 0.lemo_q1.weight"),
        ({}, {"layers": "all"}, "no 0.lemo_q1.weight"),
        ({"2.lemo_k2.weight": torch.ones(3, 3)}, {}, "2.lemo_k2.weight has shape"),
        ({"2.lemo_q3.weight": torch.ones(9, 2)}, {}, "lemo_q3.weight has shape"),
        ({"2.lemo_q2.weight": torch.ones(4, 4, dtype=torch.int64)}, {}, "lemo_q2.* torch.int64"),
        ({"3.lemo_q1.weight": torch.full((2, 32), torch.nan)}, {}, "3.lemo_q1.weight"),
    ],
)
@pytest.mark.thorough
def test_a_file_that_does_not_fit_is_refused(changed, settings, words, trained, tmp_path):
    file = tmp_path / "predictors.safetensors"
    trained.predictors.save(file)
    save_file({**load_file(file), **changed}, file, {"block": "4", "heads": "4"})
    model = planted().train()
    given = {"block": 4, "scorer": "predictor", "predictor": file, **settings}
    with pytest.raises(InputError, match=words):
        petl.drop_tokens(model, **given)
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError):
        petl.drop_tokens(model, **given)


def test_the_recall_is_a_share():
    assert 0 <= train_predictors(planted(), batches(2), block=4, keep=0.1).recall <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_file_of_another_floating_type_is_read_in_float32(dtype, tmp_path):
    file = tmp_path / "predictors.safetensors"
    Predictors.new([2, 3], 4, 4, 32).save(file)
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(rounded, file, {"block": "4", "heads": "4"})
    loaded = Predictors.load(file, [2, 3], 4, 4, 32)
    weight = loaded.each()["3"].sides["k"].weights[1]
    assert torch.equal(weight, rounded["3.lemo_k2.weight"].float())
    model = planted().train()
    petl.drop_tokens(model, block=4, scorer="predictor", predictor=file)
    assert model(**next(batches(1))).logits.isfinite().all()


def test_a_file_of_integers_is_refused_with_the_name(tmp_path):
    file = tmp_path / "predictors.safetensors"
    Predictors.new([2, 3], 4, 4, 32).save(file)
    save_file({k: v.long() for k, v in load_file(file).items()}, file, {"block": "4", "heads": "4"})
    with pytest.raises(InputError, match=r"2\.lemo_q1\.weight"):
        Predictors.load(file, [2, 3], 4, 4, 32)


def test_batches_with_fewer_tokens_than_a_block_are_left_out():
    long = [*batches(2)]
    short = [{name: t[:, :16] for name, t in batch.items()} for batch in batches(3)]
    both = train_predictors(planted(), [short[0], long[0], *short[1:], long[1]], block=32)
    alone = train_predictors(planted(), long, block=32)
    assert (both.recall, both.loss) == (alone.recall, alone.loss)
