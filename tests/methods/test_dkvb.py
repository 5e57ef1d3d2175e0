"""DKVB: nearest keys, the key phase, values and their gradients against explicit loops."""

import json

import pytest
import torch
from kept_processes import in_processes
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW

import petl
from petl import testing
from petl.errors import InputError
from petl.methods.dkvb import Keys, SparseAdam, learn_keys
from petl.methods.dkvb.keys import nearest, use_of

CONTRACT = {
    "models": ("bert", "vit"),
    "fields": {"codebooks": 16, "pairs": 8, "key_dim": 4},
    # the gradient of a value is divided by the number of codebooks
    "lr": 2.0,
    "starts_at_base": False,
    "refuses": ("both_adapters_can_be_active",),
    "excused": {
        "layers_that_are_never_called_are_refused": "it refuses all target_modules that are given",
    },
    "acts_with": {"value_dim": {"decoder": "linear"}, "projection": {"key_dim": 8}},
    "idle": {"key_batches": "the keys of the cases are those of one batch"},
}
SMALL = {"codebooks": 4, "pairs": 6, "key_dim": 3}


def small(**fields) -> dict:
    """Fields of small codebooks; split pieces have the width that follows."""
    of_split = {"key_dim": 8} if fields.get("projection") == "split" else {}
    return {**SMALL, **of_split, **fields}


class Plain(nn.Module):
    """A model of a head alone: its input is the encoder's output."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


def on_plain(rows: Tensor, classes: int = 3, **fields) -> PeftModel:
    torch.manual_seed(0)
    model = Plain(rows.shape[1], classes)
    return petl.wrap(model, "dkvb", calibration=[{"x": rows}], **small(**fields))


def adapter_of(model):
    (adapter,) = model.base_model.placed["default"].values()
    return adapter


def set_keys(model, keys: Tensor) -> None:
    adapter_of(model).keys.copy_(keys)


def train(model, x: Tensor, labels: Tensor, steps: int = 1, lr: float = 0.3, **options) -> None:
    hooks = petl.lifecycle(model)
    group = {"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, **options}
    optimizer = hooks.make_optimizer([group])
    hooks.attach_optimizer(optimizer)
    for _ in range(steps):
        model(x=x, labels=labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def picked_by_hand(adapter, z: Tensor) -> list[int]:
    """k(c) of the equations for one row z [D]."""
    found = []
    for c in range(len(adapter.keys)):
        if hasattr(adapter, "projection"):
            piece = adapter.projection[c] @ z
        else:
            piece = z.view(len(adapter.keys), -1)[c]
        distances = [float(((piece - key) ** 2).sum()) for key in adapter.keys[c]]
        found.append(distances.index(min(distances)))
    return found


@pytest.mark.parametrize("projection", ["random", "split"])
def test_logits_and_gradient_equal_loops_over_codebooks(projection):
    torch.manual_seed(1)
    rows, labels = torch.randn(7, 12), torch.randint(3, (7,))
    model = testing.stir(on_plain(rows, projection=projection))
    adapter = adapter_of(model)
    values, C = adapter.values.detach(), 4
    expected = torch.zeros(7, 3)
    gradient = torch.zeros_like(values)
    for n, z in enumerate(rows):
        picks = picked_by_hand(adapter, z)
        for c, k in enumerate(picks):
            expected[n] += values[c, k] / C
    for n, z in enumerate(rows):
        error = expected[n].softmax(-1) - nn.functional.one_hot(labels[n], 3)
        for c, k in enumerate(picked_by_hand(adapter, z)):
            gradient[c, k] += error / C / 7
    out = model(x=rows, labels=labels)
    torch.testing.assert_close(out["logits"], expected)
    by_hand = -sum(row.log_softmax(-1)[label] for row, label in zip(expected, labels, strict=True))
    torch.testing.assert_close(out["loss"], by_hand / 7)
    out["loss"].backward()
    torch.testing.assert_close(adapter.values.grad, gradient)


def test_a_linear_decoder_reads_the_concatenated_values():
    torch.manual_seed(1)
    rows = torch.randn(5, 12)
    model = testing.stir(on_plain(rows, decoder="linear", value_dim=2))
    adapter = adapter_of(model)
    assert adapter.decoder.shape == (3, 8)
    logits = model(x=rows)["logits"]
    for z, found in zip(rows, logits, strict=True):
        parts = [adapter.values[c, k] for c, k in enumerate(picked_by_hand(adapter, z))]
        torch.testing.assert_close(found, adapter.decoder @ torch.cat(parts))


def moved_by_hand(keys, N, M, pieces, decay):
    """One update of one codebook, without dead keys: the equations, key by key."""
    K = len(keys)
    n, s = [0] * K, [torch.zeros_like(keys[0]) for _ in range(K)]
    for piece in pieces:
        distances = [float(((piece - key) ** 2).sum()) for key in keys]
        k = distances.index(min(distances))
        n[k] += 1
        s[k] = s[k] + piece
    N = [decay * N[k] + (1 - decay) * n[k] for k in range(K)]
    M = [decay * M[k] + (1 - decay) * s[k] for k in range(K)]
    smoothed = [(N[k] + 1e-5) / (sum(N) + K * 1e-5) * sum(N) for k in range(K)]
    return [M[k] / smoothed[k] for k in range(K)], N, M


@pytest.mark.parametrize("decay", [0.8, 0.02])  # of small counts, which are smoothed
def test_the_key_phase_equals_a_moving_average_by_hand(decay):
    torch.manual_seed(2)
    start, batches = torch.randn(2, 5, 3), torch.randn(3, 8, 2, 3)
    keys = Keys(start, decay=decay, dead=0.0)
    state = [(list(start[c]), [1.0] * 5, list(start[c])) for c in range(2)]
    for batch in batches:
        keys.update(batch)
        state = [moved_by_hand(*state[c], batch[:, c], decay) for c in range(2)]
    for c in range(2):
        torch.testing.assert_close(keys.keys[c], torch.stack(state[c][0]))
        torch.testing.assert_close(keys.counts[c], torch.tensor(state[c][1]))
    assert not torch.equal(keys.keys, start)


def test_a_dead_key_restarts_at_a_piece_of_the_batch():
    start = torch.tensor([[[0.0, 0.0], [100.0, 100.0], [200.0, 200.0]]])
    keys = Keys(start, decay=0.5, dead=0.3)
    batches = torch.randn(2, 6, 1, 2)
    keys.update(batches[0])
    assert keys.counts[0].tolist() == [3.5, 0.5, 0.5]
    keys.update(batches[1])  # 0.25 is below 0.3
    assert keys.counts[0, 1:].tolist() == [1.0, 1.0]
    for k in (1, 2):
        assert any(torch.equal(keys.keys[0, k], piece) for piece in batches[1][:, 0])
    assert not torch.equal(keys.keys[0, 1], keys.keys[0, 2])
    torch.testing.assert_close(keys.sums[0, 1:], keys.keys[0, 1:])


def update_a_part(start: Tensor, batches: Tensor) -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    keys = Keys(start, decay=0.5, dead=0.4, seed=3)
    for batch in batches:  # 3 and 5 rows; process 1 has none of the last batch
        part = batch[:3] if rank == 0 else batch[3:]
        if batch is batches[-1]:
            part = batch if rank == 0 else batch[:0]
        keys.update(part)
    return keys.keys, keys.counts


@pytest.mark.thorough
def test_two_processes_equal_one_on_the_joint_batch():
    torch.manual_seed(4)
    start, batches = 3 * torch.randn(2, 6, 3), torch.randn(3, 8, 2, 3)
    joint = Keys(start, decay=0.5, dead=0.4, seed=3)
    for batch in batches:
        joint.update(batch)
    assert (joint.counts == 1).any()  # some restarted
    (keys, counts), (others, _) = in_processes(2, update_a_part, start, batches)
    assert torch.equal(keys, others)
    torch.testing.assert_close(keys, joint.keys)
    torch.testing.assert_close(counts, joint.counts)


def test_the_order_of_rows_does_not_matter_and_the_first_of_equal_keys_is_picked():
    torch.manual_seed(5)
    start, pieces = torch.randn(2, 6, 3), torch.randn(9, 2, 3)
    order = torch.randperm(9)
    one, other = Keys(start, dead=0.99), Keys(start, dead=0.99)
    one.update(pieces)
    other.update(pieces[order])
    torch.testing.assert_close(one.keys, other.keys)
    assert torch.equal(nearest(pieces, start)[order], nearest(pieces[order], start))
    doubled = torch.cat([start, start], 1)
    assert torch.equal(nearest(pieces, doubled), nearest(pieces, start))
    same = torch.zeros(2, 4, 3)
    assert nearest(pieces, same).eq(0).all()


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("units", [1, 8])  # 6 between the keys of a small ViT
def test_a_piece_near_equal_keys_has_the_first_of_them_but_for_rounding(length, units):
    """The same row has other rounding in a batch than alone: it must have the same key."""
    torch.manual_seed(7)
    keys = length * torch.randn(4, 32, 8)
    eps = torch.finfo(torch.float32).eps
    for later in (9, 20):  # restarted at the same piece as key 3, in other batches
        keys[:, later] = keys[:, 3] * (1 + eps * torch.randint(-units, units + 1, (4, 8)))
    pieces = keys[:, 3].expand(64, 4, 8) * (1 + eps * torch.randint(-units, units + 1, (64, 4, 8)))
    assert nearest(pieces, keys).eq(3).all()
    assert nearest(pieces + length * 0.1 * torch.randn(64, 4, 8), keys).eq(3).all()


@pytest.mark.parametrize("change", ["one long key", "long rows", "far from 0"])
def test_the_nearest_key_is_picked_whatever_the_lengths_are(change):
    torch.manual_seed(6)
    pieces, keys = torch.randn(64, 4, 8), torch.randn(4, 32, 8)
    if change == "one long key":
        keys[:, 7] *= 1000 / keys[:, 7].norm(dim=-1, keepdim=True)
    elif change == "long rows":
        pieces *= 1e4
    else:
        pieces, keys = pieces + 1e4, keys + 1e4
    differences = pieces.double().unsqueeze(2) - keys.double()
    distances = differences.norm(dim=-1)
    picked = nearest(pieces, keys)
    found = distances.gather(-1, picked.unsqueeze(-1)).squeeze(-1)
    assert (found / distances.amin(-1) - 1).max() < 1e-6
    assert (picked != distances.argmin(-1)).double().mean() < 0.02  # equal within rounding
    assert torch.equal(nearest(pieces[:1], keys), picked[:1])


@pytest.mark.parametrize("fields", [{}, {"optimizer": "sparse_adam"}])
def test_values_that_no_row_picked_keep_their_bits(fields):
    torch.manual_seed(6)
    rows, labels = torch.randn(64, 12), torch.tensor([0, 1, 2, 0])
    model = testing.stir(on_plain(rows, pairs=32, **fields))
    rows = rows[:4]
    adapter = adapter_of(model)
    before = adapter.values.detach().clone()
    for part in (slice(0, 2), slice(2, 4), slice(0, 2)):
        # whatever the group says
        train(model, rows[part], labels[part], 2, weight_decay=0.1, momentum=0.9)
    picked = torch.zeros(4, 32, dtype=torch.bool)
    for z in rows:
        for c, k in enumerate(picked_by_hand(adapter, z)):
            picked[c, k] = True
    assert torch.equal(adapter.values[~picked], before[~picked])
    assert (adapter.values[picked] != before[picked]).all()
    assert picked.sum() < picked.numel() / 4


def test_sparse_adam_equals_torchs_on_sparse_gradients():
    torch.manual_seed(7)
    start = torch.randn(6, 3)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own, torchs = SparseAdam([one], lr=0.1), torch.optim.SparseAdam([other], lr=0.1)
    for rows in ([0, 1], [1, 4], [0], [5, 1]):
        gradient = torch.zeros(6, 3)
        gradient[rows] = torch.randn(len(rows), 3)
        gradient[rows[0], 1] = 0  # of a row that has a gradient
        one.grad, other.grad = gradient, gradient.to_sparse(1)
        own.step()
        torchs.step()
    torch.testing.assert_close(one, other)
    assert torch.equal(one[[2, 3]], start[[2, 3]])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: AdamW(p, lr=0.1, weight_decay=0.0), "moments"),
        (lambda p: torch.optim.Adam(p, lr=0.1), "moments"),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "momentum=0.9"),
        (lambda p: SGD(p, lr=0.1, weight_decay=0.01), "weight_decay=0.01"),
        (lambda p: Adagrad(p, lr=0.1, weight_decay=0.01), "weight_decay=0.01"),
        (lambda p: torch.optim.Rprop(p, lr=0.1), "Rprop"),
    ],
)
def test_optimizers_that_move_other_values_are_refused(make, reason):
    model = on_plain(torch.randn(8, 12))
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(InputError, match=reason):
        petl.lifecycle(model).attach_optimizer(optimizer)


def test_plain_optimizers_are_accepted():
    model = on_plain(torch.randn(8, 12))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (SGD(parameters, lr=0.1), Adagrad(parameters, lr=0.1), SparseAdam(parameters)):
        petl.lifecycle(model).attach_optimizer(optimizer)


def test_training_on_a_distant_cluster_changes_no_logit_of_disjoint_keys():
    torch.manual_seed(8)
    near, far = torch.randn(6, 12), 50 + torch.randn(6, 12)
    model = on_plain(torch.cat([near, far]), pairs=12, projection="split")
    set_keys(model, torch.cat([near, far]).view(12, 4, 3).transpose(0, 1))
    train(model, near, torch.zeros(6, dtype=torch.long), 3)
    before = model(x=near)["logits"]
    train(model, far, torch.ones(6, dtype=torch.long), 3)
    assert torch.equal(model(x=near)["logits"], before)
    # one key in common is enough for a change
    keys = adapter_of(model).keys.clone()
    keys[0, :] = keys[0, 0]
    set_keys(model, keys)
    before = model(x=near)["logits"]
    train(model, far, torch.ones(6, dtype=torch.long), 1)
    assert not torch.equal(model(x=near)["logits"], before)


def test_one_pair_learns_the_prior_of_the_classes():
    rows, labels = torch.randn(10, 12), torch.tensor([0] * 6 + [1] * 3 + [2])
    model = on_plain(rows, pairs=1)
    train(model, rows, labels, 300, lr=4.0)
    probabilities = model(x=rows)["logits"].softmax(-1)
    torch.testing.assert_close(
        probabilities, torch.tensor([[0.6, 0.3, 0.1]] * 10), atol=1e-3, rtol=0
    )


def test_keys_on_the_rows_fit_them():
    torch.manual_seed(9)
    rows, labels = torch.randn(10, 12), torch.randint(3, (10,))
    model = on_plain(rows, pairs=10, projection="split")
    set_keys(model, rows.view(10, 4, 3).transpose(0, 1))
    train(model, rows, labels, 200, lr=20.0)
    assert torch.equal(model(x=rows)["logits"].argmax(-1), labels)


def test_start_keys_are_different_pieces_where_there_are_enough():
    torch.manual_seed(10)
    rows = torch.randn(6, 12)
    # decay 0 and no batch for the average would still move keys: none is dead, each has its piece
    model = on_plain(rows, projection="split", pairs=6)
    pieces = rows.view(6, 4, 3)
    for c in range(4):
        distances = torch.cdist(adapter_of(model).keys[c], pieces[:, c]).min(-1)
        assert distances.values.max() < 1e-3
        assert sorted(distances.indices.tolist()) == list(range(6))


def test_only_the_first_batches_count_and_labels_are_not_read():
    torch.manual_seed(11)
    batches = [{"x": torch.randn(8, 12), "labels": torch.full((8,), -1)} for _ in range(4)]

    def keys(used, **fields):
        model = petl.wrap(Plain(12, 3), "dkvb", calibration=iter(used), **SMALL, **fields)
        return adapter_of(model).keys

    assert torch.equal(keys(batches, key_batches=2), keys(batches[:2]))
    assert not torch.equal(keys(batches, key_batches=2), keys(batches))


def test_modes_are_as_before_the_keys_are_learned():
    torch.manual_seed(12)
    base = Plain(12, 3)
    base.add_module("one", nn.Dropout(0.5).eval())
    base.add_module("other", nn.Dropout(0.5).train())
    base.eval().other.train()
    petl.wrap(base, "dkvb", calibration=[{"x": torch.randn(8, 12)}], **SMALL)
    assert (base.one.training, base.other.training) == (False, True)


def test_padding_is_no_piece_of_a_head_that_runs_per_token():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (4, 6))
    mask = torch.ones_like(ids)
    ids[0, 3:], mask[0, 3:] = 0, 0
    keys = []
    for padding in (0, 5):  # what is at masked places must not matter
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(config).eval()
        with torch.no_grad():
            base.model.embed_tokens.weight[0] = padding
        batch = {"input_ids": ids, "attention_mask": mask}
        for pool in ("model", "mean"):
            model = petl.wrap(base, "dkvb", calibration=[batch], pool=pool, **SMALL)
            keys.append(adapter_of(model).keys.clone())
            assert model(**batch).logits.shape == (4, 3)
            base = model.unload()
    torch.testing.assert_close(keys[0], keys[2])
    torch.testing.assert_close(keys[1], keys[3])


def test_the_mean_is_over_the_mask():
    model = testing.tiny_bert()
    batch = testing.TINY_MODELS["bert"].batch(6)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        states = model.bert(**inputs).last_hidden_state
    z = torch.stack(
        [
            row[mask.bool()].mean(0)
            for row, mask in zip(states, batch["attention_mask"], strict=True)
        ]
    )
    wrapped = petl.wrap(
        model, "dkvb", calibration=[batch], pool="mean", task_type="SEQ_CLS", **SMALL
    )
    testing.stir(wrapped)
    adapter = adapter_of(wrapped)
    expected = torch.stack(
        [
            sum(adapter.values[c, k] for c, k in enumerate(picked_by_hand(adapter, row))) / 4
            for row in z
        ]
    )
    torch.testing.assert_close(wrapped(**inputs).logits, expected)


def reloaded(folder: str, batch) -> Tensor:
    model = petl.load(testing.tiny_bert(), folder)
    return model(**batch).logits.detach()


@pytest.mark.parametrize(
    "fields", [{}, {"projection": "split"}, {"decoder": "linear", "pool": "mean"}]
)
def test_a_saved_head_gives_the_same_logits_and_leaves_out_the_models_own(tmp_path, fields):
    batch = testing.TINY_MODELS["bert"].batch(6)
    base = testing.tiny_bert()
    own = base(**batch).logits
    model = petl.wrap(base, "dkvb", calibration=[batch], task_type="SEQ_CLS", **small(**fields))
    assert model(**batch).logits.eq(0).all()
    testing.stir(model).eval()
    model.save_pretrained(tmp_path)
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names <= {"values", "keys", "projection", "decoder"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None
    again = reloaded(str(tmp_path), batch)
    assert torch.equal(again, model(**batch).logits)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, own)
    assert torch.equal(model.unload()(**batch).logits, own)


def test_another_width_of_the_encoder_is_refused(tmp_path):
    rows = torch.randn(8, 12)
    on_plain(rows).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="16"):
        petl.load(Plain(16, 3), tmp_path)


def test_counts_of_the_example():
    bert = testing.tiny_bert()
    bert.classifier = nn.Linear(384, 15)
    with torch.device("meta"):
        model = petl.wrap(bert.to("meta"), "dkvb", task_type="SEQ_CLS")
    tensors = get_peft_model_state_dict(model)
    sizes = {key.rpartition(".")[2]: tensor.numel() for key, tensor in tensors.items()}
    assert sizes == {"values": 245_760, "keys": 131_072, "projection": 64 * 8 * 384}
    assert model.get_nb_trainable_parameters()[0] == 245_760


def test_projections_come_from_the_seed_alone():
    rows = torch.randn(8, 12)
    projections = [adapter_of(on_plain(rows, seed=seed)).projection for seed in (1, 1, 2)]
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])
    wide = adapter_of(on_plain(torch.randn(8, 400), key_dim=50, codebooks=20)).projection
    torch.testing.assert_close(wide.var(), torch.tensor(1 / 400), rtol=0.02, atol=0)
    assert abs(float(wide.mean())) < 1e-3


def test_keys_and_distances_are_float32_on_a_bfloat16_base():
    rows = torch.randn(16, 12)
    model = Plain(12, 3).to(torch.bfloat16)
    model = petl.wrap(model, "dkvb", calibration=[{"x": rows.bfloat16()}], **SMALL)
    adapter = testing.stir(model) and adapter_of(model)
    assert {t.dtype for t in (adapter.keys, adapter.projection, adapter.values)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        out = adapter.logits(rows.bfloat16())
        head = model(x=rows.bfloat16())["logits"]
    assert out.dtype == head.dtype == torch.float32  # no two classes get one rounded score
    assert torch.equal(out, head)
    torch.testing.assert_close(out, adapter.logits(rows.bfloat16().float()))


def test_use_is_reported():
    assert use_of(torch.tensor([[4.0, 4, 0, 0], [8, 0, 0, 0]])) == pytest.approx((3 / 8, 1.5))
    rows, labels = torch.randn(8, 12), torch.randint(3, (8,))
    model = on_plain(rows).train()
    assert petl.lifecycle(model).metrics() == {}
    train(model, rows, labels, 2)
    picks = {(c, k) for z in rows for c, k in enumerate(picked_by_hand(adapter_of(model), z))}
    metrics = petl.lifecycle(model).metrics()
    assert metrics["keys_used"] == pytest.approx(len(picks) / 24)
    assert 1 <= metrics["key_perplexity"] <= 6
    (shown,) = petl.lifecycle(model).heat_maps()
    assert all(sum(row) == pytest.approx(100) for row in shown.cells)


def test_an_added_adapter_learns_keys_of_its_own(caplog):
    rows = torch.randn(16, 12)
    model = on_plain(rows)
    model.add_adapter("other", petl.build_config("dkvb", **SMALL))
    model.set_adapter("other")
    (other,) = model.base_model.placed["other"].values()
    optimizer = SGD(other.parameters(), lr=0.1)
    with caplog.at_level("WARNING"):
        petl.lifecycle(model).attach_optimizer(optimizer)
    assert "learn_keys" in caplog.text
    learn_keys(model, [{"x": 9 + rows}], "other")
    assert model.active_adapters == ["other"]
    caplog.clear()
    petl.lifecycle(model).attach_optimizer(optimizer)
    assert not caplog.text
    assert not torch.equal(other.keys, adapter_of(model).keys)


def two_layers_as_head() -> Plain:
    model = Plain(12, 3)
    model.classifier = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: on_plain(torch.randn(4, 12), pool="mean"), "pool=mean"),
        (lambda: on_plain(torch.full((4, 12), torch.nan)), "finite"),
        (lambda: on_plain(torch.randn(4, 12), projection="split", codebooks=5), "codebooks=5.* 12"),
        (
            lambda: petl.wrap(
                two_layers_as_head(), "dkvb", calibration=[{"x": torch.randn(4, 12)}]
            ),
            "2 linear",
        ),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
