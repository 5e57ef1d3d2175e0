"""ComPEFT: what is kept, its magnitude, its code, and the file."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import petl
from petl.adapters.deltas import Ternary, compress, states
from petl.adapters.deltas.compress import compress_each
from petl.ops import rice
from petl.ops.ternary import CODE, METADATA

ZEROS = torch.zeros(3, 3)
PUBLISHED = {0.05: (4, 0.339), 0.1: (3, 0.576), 0.2: (2, 0.939), 0.3: (1, 1.188), 0.5: (0, 1.5)}


def bits_one_by_one(positions, signs, b):
    """The code as the format says it, bit by bit."""
    stream, last = [], -1
    for position, sign in zip(positions, signs, strict=True):
        gap = position - last - 1
        stream += [1] * (gap >> b) + [0] + [(gap >> i) & 1 for i in range(b)] + [int(sign)]
        last = position
    return stream


@given(
    st.sets(st.integers(0, 400), max_size=60),
    st.integers(0, 6),
    st.integers(0, 2**60),
)
def test_the_code_is_that_of_the_format(chosen, b, coins):
    positions = np.array(sorted(chosen), np.int64)
    signs = np.array([bool(coins >> i & 1) for i in range(len(positions))], bool)
    code, bits = rice.encode(positions, signs, b)
    assert np.unpackbits(code, bitorder="little")[:bits].tolist() == bits_one_by_one(
        positions.tolist(), signs.tolist(), b
    )
    found, also = rice.decode(code, bits, len(positions), 401, b, "it")
    assert found.tolist() == positions.tolist()
    assert also.tolist() == signs.tolist()


@given(st.binary(max_size=40), st.integers(0, 330), st.integers(0, 50), st.integers(0, 70))
def test_any_code_is_decoded_or_refused(code, bits, kept, b):
    try:
        positions, _ = rice.decode(np.frombuffer(code, np.uint8), bits, kept, 300, b, "it")
    except petl.InputError:
        return
    assert len(positions) == kept
    assert not kept or ((np.diff(positions) > 0).all() and 0 <= positions[0] <= positions[-1] < 300)


@pytest.mark.parametrize("density", PUBLISHED)
def test_bits_are_those_of_the_table(density):
    torch.manual_seed(0)
    found = compress({"w": torch.randn(1_000_000)}, density=density)
    b, bits = PUBLISHED[density]
    assert rice.parameter(len(found.positions), found.numel) == b
    assert found.bits == pytest.approx(bits, abs=0.002)
    entropy = -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)
    assert 0.999 * entropy < found.bits < 1.025 * entropy


@pytest.mark.parametrize("d", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
def test_exactly_the_largest_are_kept_the_first_ones_among_equals(d, density):
    torch.manual_seed(d)
    tau = torch.randint(1, 4, (d,)).float() * torch.randint(0, 2, (d,)).mul(2).sub(1)
    found = compress({"w": tau}, density=density)
    n = min(d, max(1, math.floor(density * d + 0.5)))
    chosen = sorted(range(d), key=lambda i: (-abs(tau[i].item()), i))[:n]
    assert found.positions.tolist() == sorted(chosen)
    assert found.kept == {"w": n}
    assert found.signs.tolist() == [tau[i] > 0 for i in sorted(chosen)]


def test_zeros_are_never_kept_and_one_magnitude_is_all_there_is():
    torch.manual_seed(0)
    state = {"a": torch.zeros(6), "b": torch.randn(3, 4), "index": torch.arange(5)}
    found = compress(state, density=1.0, alpha=0.5)
    assert found.kept == {"a": 0, "b": 12}
    every = torch.cat([state["a"], state["b"].flatten()])
    assert found.scale["b"] == pytest.approx(0.5 * every.std().item())
    dense = found.dense()
    torch.testing.assert_close(dense["b"], found.scale["b"] * state["b"].sign())
    assert torch.equal(dense["a"], state["a"])
    assert torch.equal(dense["index"], state["index"])


def test_scopes():
    torch.manual_seed(0)
    state = {"large": 100 * torch.randn(50), "small": torch.randn(50)}
    assert compress(state, density=0.2).kept == {"large": 20, "small": 0}
    each = compress(state, density=0.2, scope="tensor")
    assert each.kept == {"large": 10, "small": 10}
    assert each.sigma["small"] == pytest.approx(state["small"].std().item())


def test_several_settings_at_once_are_those_one_by_one_from_one_selection(monkeypatch):
    torch.manual_seed(0)
    # ties and zeros
    state = {"a": torch.randint(-3, 4, (90,)).float(), "b": 2 * torch.randn(4, 20)}
    settings = [(0.1, 1.0), (0.7, "fit"), (0.02, 2.0), (0.1, "fit"), (1.0, 1.0)]
    lengths, select = [], states.largest

    def counted(values, count):
        lengths.append(len(values))
        return select(values, count)

    monkeypatch.setattr(states, "largest", counted)
    found = compress_each(state, settings)
    assert sorted(lengths)[-2:] == [170 - int((state["a"] == 0).sum()), 170]
    for (density, alpha), one in zip(settings, found, strict=True):
        alone = compress(state, density=density, alpha=alpha)
        assert one.positions.tolist() == alone.positions.tolist()
        assert one.signs.tolist() == alone.signs.tolist()
        assert (one.scale, one.kept, one.settings) == (alone.scale, alone.kept, alone.settings)


def test_the_fitted_magnitude_is_the_best_in_least_squares():
    torch.manual_seed(0)
    state = {"w": torch.randn(500)}
    found = compress(state, density=0.2, alpha="fit")
    scale, sigma = found.scale["w"], found.sigma["w"]

    def error(alpha):
        return (compress(state, density=0.2, alpha=alpha).dense()["w"] - state["w"]).norm()

    kept = state["w"].abs().topk(100).values
    assert scale == pytest.approx(kept.mean().item())
    assert error(scale / sigma) < min(error(0.9 * scale / sigma), error(1.1 * scale / sigma))


def test_a_reference_and_16_bits():
    torch.manual_seed(0)
    state = {"w": torch.ones(40, dtype=torch.bfloat16) + torch.randn(40).bfloat16()}
    reference = {"w": torch.ones(40)}
    found = compress(state, density=0.25, reference=reference)
    dense = found.dense(reference)["w"]
    assert dense.dtype == torch.bfloat16
    assert (dense == 1).sum() == 30
    assert torch.equal((dense - 1).sign()[dense != 1], (state["w"].float() - 1).sign()[dense != 1])


@pytest.mark.parametrize("density", [0.3, 1.0])  # 1: the first entry of each tensor is kept, too
def test_dot_is_that_of_the_dense_differences(density):
    torch.manual_seed(0)
    states = [{"a": torch.randn(70), "b": 3 * torch.randn(3, 30)} for _ in range(2)]
    one, two = (compress(state, density=density, scope="tensor") for state in states)
    expected = sum((one.dense()[n] * two.dense()[n]).sum().item() for n in "ab")
    assert one.dot(two) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(petl.InputError):
        one.dot(compress({"a": torch.randn(70)}))


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    state = {"a": torch.randn(300), "b": torch.randn(4, 50).half(), "index": torch.arange(9)}
    compress(state, density=0.1).save(tmp_path / "ternary.safetensors")
    return tmp_path / "ternary.safetensors"


def test_a_file_gives_the_state_again(file):
    found = Ternary.load(file)
    torch.manual_seed(0)
    again = compress(
        {"a": torch.randn(300), "b": torch.randn(4, 50).half(), "index": torch.arange(9)},
        density=0.1,
    )
    assert found.settings == {"density": 0.1, "alpha": 1.0, "scope": "global"}
    assert (found.kept, found.scale, found.sigma) == (again.kept, again.scale, again.sigma)
    for name, tensor in again.dense().items():
        assert torch.equal(found.dense()[name], tensor)
        assert found.dense()[name].dtype == tensor.dtype


@pytest.fixture
def file_apart(tmp_path):
    """A file with a code for each tensor."""
    torch.manual_seed(0)
    state = {"a": torch.randn(300), "b": torch.randn(4, 50), "empty": torch.zeros(0), "z": ZEROS}
    found = replace(compress(state, density=0.3, scope="tensor"), apart=True)
    found.save(tmp_path / "apart.safetensors")
    return tmp_path / "apart.safetensors"


def test_codes_of_single_tensors_are_read_again(file_apart):
    found = Ternary.load(file_apart)
    assert found.apart
    torch.manual_seed(0)
    state = {"a": torch.randn(300), "b": torch.randn(4, 50), "empty": torch.zeros(0), "z": ZEROS}
    together = compress(state, density=0.3, scope="tensor")
    assert found.positions.tolist() == together.positions.tolist()
    assert found.signs.tolist() == together.signs.tolist()
    assert found.kept == together.kept == {"a": 90, "b": 60, "empty": 0, "z": 0}
    for name, tensor in together.dense().items():
        assert torch.equal(found.dense()[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1"),
        ({"format": 3}, "formats 1 and 2"),
        ({"b": 3}, "b=3"),
        ({"b": [1, 1, 1]}, "format 2"),
        ({"bits": [1, 1, 0, 0]}, "bytes for codes of"),
        ({"bits": [-8, 8, 0, 0]}, "bits"),
        ({"counts": [60, 90, 0, 0]}, "its code"),
        ({"b": [99, 1, 0, 0]}, "its code"),
        ({"b": [True, 1, 0, 0]}, "b"),
        ({"names": [], "counts": [], "shapes": [], "dtypes": [], "scales": [], "sigmas": [],
          "b": [], "bits": [], "entries": 0}, "format 2"),
    ],
)  # fmt: skip
def test_damaged_codes_of_single_tensors_are_refused(file_apart, changes, message):
    rewritten(file_apart, **changes)
    with pytest.raises(petl.InputError, match=message):
        Ternary.load(file_apart)


def rewritten(file, tensors=None, **changes):
    """Write the file with other tensors or metadata, as a stranger could."""
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()[METADATA])
    found = load_file(file) if tensors is None else tensors
    record |= {"sha256": hashlib.sha256(found[CODE].numpy().tobytes()).hexdigest(), **changes}
    save_file(found, file, {METADATA: json.dumps(record)})


def test_a_flipped_bit_is_refused(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(petl.InputError):
        Ternary.load(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"names": ["b", "a"]},
        {"names": ["a"]},
        {"names": ["a", "index"]},
        {"shapes": [[300], [-4, -50]]},
        {"shapes": [[300], [2**50]]},
        {"shapes": [[300], "x"]},
        {"dtypes": ["F32", "I64"]},
        {"dtypes": ["F32", "object"]},
        {"scales": [float("nan"), 1.0]},
        {"scales": [-1.0, 1.0]},
        {"counts": [50, -2]},
        {"counts": [0, 50]},
        {"entries": 49},
        {"bits": 10},
        {"bits": 10**6},
        {"b": -1},
        {"b": 10**9},
        {"b": True},
        {"sha256": None},
    ],
)
def test_metadata_of_a_stranger_are_checked(file, changes):
    rewritten(file, **changes)
    with pytest.raises(petl.InputError) as caught:
        Ternary.load(file)
    assert len(str(caught.value).splitlines()) <= 3
    assert str(file) in str(caught.value)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_changed_codes_are_decoded_or_refused(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("code")
    torch.manual_seed(0)
    compress({"a": torch.randn(300)}, density=0.1).save(folder / "f")
    tensors = load_file(folder / "f")
    tensors[CODE][at % len(tensors[CODE])] = byte
    rewritten(folder / "f", tensors)
    try:
        found = Ternary.load(folder / "f")
    except petl.InputError:
        return
    assert found.dense()["a"].isfinite().all()
