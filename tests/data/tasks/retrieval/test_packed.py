"""Texts of a training batch in rows of several: the vectors and gradients of each text alone."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    FNetConfig,
    FNetModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import petl
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.packed import WIDTH, Layout, layout_of
from petl.errors import InputError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
LENGTHS = [3, 20, 7, 1, 31, 16, 5, 2, 9, 12]
# name: class, config, whether a row may hold several texts
BASES = {
    "bert": (BertModel, BertConfig(**SIZES, pad_token_id=0), True),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig(**SIZES, pad_token_id=1), True),
    "mpnet": (MPNetModel, MPNetConfig(**SIZES, pad_token_id=1), True),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(**SIZES, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0),
        False,  # its windows are not those of the mask that it is given
    ),
    "fnet": (FNetModel, FNetConfig(**SIZES, pad_token_id=0), False),
    "llama": (LlamaModel, LlamaConfig(**SIZES, pad_token_id=0), False),  # reads what is before
    "t5": (
        T5EncoderModel,
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        False,
    ),
}


def padded(lengths, *, left: bool = False, pad: int = 0):
    torch.manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    ids = torch.randint(5, 300, mask.shape)
    return torch.where(mask > 0, ids, pad), mask


def embedder(name: str, pooling: str = "mean", attn: str | None = None, method: str = "lora"):
    """An embedder with an adapter that changes its vectors, as a run has it."""
    cls, config, _ = BASES[name]
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    base = cls._from_config(config, **({} if attn is None else {"attn_implementation": attn}))
    task = Retrieval(max_length=40, pooling=pooling)
    task.normalize = True
    task.adjust(base)
    model = petl.wrap(
        base, method, r=4, target_modules="block-linear", task_type="FEATURE_EXTRACTION"
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, task


def alone(model, ids, mask):
    """The vector of each text in a pass of its own, by its definition."""
    found = []
    for row, own in zip(ids, mask, strict=True):
        found.append(model(input_ids=row[own > 0][None], attention_mask=own[own > 0][None]))
    return torch.cat([each.sentence_embedding for each in found])


def gradients(model):
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [40, 40, 39], [5] * 9])
def test_each_token_has_one_place_in_one_row(lengths, left):
    ids, mask = padded(lengths, left=left)
    layout = Layout.of(mask)
    there = layout.source >= 0
    assert layout.source.shape[1] == max(WIDTH, *lengths)
    # all tokens of the batch, each once, in the row and order of their text
    assert sorted(layout.source[there].tolist()) == mask.flatten().nonzero().flatten().tolist()
    for number, length in enumerate(lengths):
        rows, columns = (layout.text == number).nonzero(as_tuple=True)
        assert len({*rows.tolist()}) == 1
        assert columns.tolist() == [*range(columns[0], columns[0] + length)]
        assert layout.position[rows, columns].tolist() == [*range(length)]
        own = ids[number][mask[number] > 0]
        assert ids.flatten()[layout.source[rows, columns]].tolist() == own.tolist()
    states = layout.source[..., None].float()
    back = layout.unpacked(states, mask)[..., 0]
    places = torch.arange(mask.numel()).view_as(mask)
    assert torch.equal(back[mask > 0].long(), places[mask > 0])


def test_rows_that_save_nothing_are_not_made():
    assert layout_of(padded([40, 40, 39])[1]) is None
    assert layout_of(padded([3, 4])[1]) is None  # one row of 32 for 8 positions
    assert layout_of(padded([200, 3, 3, 3])[1]) is None
    assert layout_of(padded(LENGTHS)[1]).source.numel() < 10 * 31


@pytest.mark.parametrize("name", BASES)
def test_a_base_packs_where_its_states_are_those_of_each_text_alone(name):
    model, task = embedder(name)
    task.check_model(model)
    assert (task.packing is not None) == BASES[name][2]
    assert model.training == model.get_base_model().training


@pytest.mark.parametrize(
    ("name", "pooling", "attn"),
    [
        *(("bert", "mean", "sdpa"), ("bert", "last", "eager"), ("xlm-roberta", "cls", "sdpa")),
        *(("xlm-roberta", "mean", "eager"), ("mpnet", "cls", "eager")),
    ],
)
def test_vectors_and_gradients_are_those_of_each_text_alone(name, pooling, attn):
    model, task = embedder(name, pooling, attn)
    model = model.double()
    pad = BASES[name][1].pad_token_id
    ids, mask = padded(LENGTHS, left=pooling == "last" and name == "bert", pad=pad)
    weights = torch.randn(len(ids), 16, dtype=torch.double)
    model.eval()
    expected = alone(model, ids, mask)
    (expected * weights).sum().backward()
    wanted = gradients(model)
    task.check_model(model)
    passes = []
    body = model.get_base_model()
    body.embeddings.register_forward_hook(lambda *a: passes.append([*a[2].shape[:2]]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    for layer in body.modules():
        if hasattr(layer, "dropout_prob"):
            layer.dropout_prob = 0.0
    found = model(input_ids=ids, attention_mask=mask).sentence_embedding
    (found * weights).sum().backward()
    (rows, width), *others = passes
    assert not others
    assert rows * width < mask.numel()
    assert rows * width == task.positions({"attention_mask": mask, "input_ids": ids})
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-8, rtol=1e-8)


def test_adapters_that_read_other_positions_keep_texts_apart():
    model, task = embedder("bert", method="mola")
    task.check_model(model)
    assert task.packing is None


def test_the_first_token_of_a_decoder_is_no_vector():
    model, task = embedder("llama", pooling="cls")
    with pytest.raises(InputError):
        task.check_model(model)
    model, task = embedder("bert", pooling="cls")
    task.check_model(model)
