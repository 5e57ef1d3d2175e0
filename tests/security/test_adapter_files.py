"""Adapter files of strangers: each fault is refused with one short message, by every way in."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import adaptable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import petl
from petl import testing
from petl.adapters import deltas
from petl.core.adapter_folder import Folder
from petl.core.registry import METHODS
from petl.ops.ternary import FILE
from petl.system import patterns

pytestmark = pytest.mark.every_cell

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN = sorted(name for name in adaptable("llama") if METHODS[name].own)
NAMES = [*OWN, "lora", "adalora", "vera", "ia3", "vblora"]


def assert_short(error: BaseException) -> None:
    message = str(error)
    assert message.count("\n") < 3, message
    assert len(message) < 1500, message


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an adapter of each method, saved once; not to be changed."""
    written: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            testing.stir(model := wrapped(name))
            model.save_pretrained(written[name])
        return written[name]

    return of


def wrapped(name: str) -> Any:
    fields = {
        "binary": {"inner": "lora", "target_modules": ["q_proj"]},
        "mos": {"r": 2, "equivalent_rank": 2, "private_rank": 1, "shards_per_vector": 2},
        "lora": {"target_modules": ["q_proj"]},
        "icv": {"train": True, "pairs": None, "scale": "plain", "keep_norm": False},
        "polyhistor": {"tasks": ["only"]},
        "vblora": {"target_modules": ["q_proj"], "num_vectors": 16, "vector_length": 4},
        "adalora": {"target_modules": ["q_proj"], "total_step": 10},
        "increlora": {"target_modules": ["q_proj", "v_proj"], "total_step": 10},
    }.get(name, {})
    return petl.wrap(testing.tiny_llama(), name, task_type="CAUSAL_LM", **fields)


@pytest.fixture
def copied(folders, tmp_path) -> Callable[[str], Path]:
    """A copy of that folder, to be changed."""
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def set_fields(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **fields}))


def assert_refused(folder: Path, match: str, load: Callable = petl.load) -> None:
    base = testing.tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(petl.InputError, match=match) as caught:
        load(base, folder)
    assert_short(caught.value)
    if load is petl.load:  # the base can be used for another adapter
        assert before.keys() == base.state_dict().keys()
        assert all(torch.equal(before[name], t) for name, t in base.state_dict().items())


# Tensors


@pytest.mark.cells(4)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_is_refused(name, copied):
    folder = copied(name)
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        assert_refused(folder, "cannot be read")
    (folder / WEIGHTS).write_bytes(content + b"\0")  # longer than its header says
    assert_refused(folder, "cannot be read")


@pytest.mark.cells(24)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_kind_of_dtype_is_refused(name, dtype, copied):
    folder = copied(name)

    def cast(tensors):
        key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
        tensors[key] = tensors[key].to(dtype)

    edit(folder, cast)
    assert_refused(folder, "not of a floating-point type|is of dtype C64")


@pytest.mark.cells(12)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_finite_is_refused(name, value, copied):
    folder = copied(name)

    def spoil(tensors):
        key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
        tensors[key].view(-1)[-1] = value

    edit(folder, spoil)
    assert_refused(folder, "not finite")
    if METHODS[name].own:  # PEFT's tuners leave nothing to ask us
        assert_refused(folder, "not finite", PeftModel.from_pretrained)


@pytest.mark.parametrize("load", [petl.load, PeftModel.from_pretrained])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.fill_(-1), r"index -1, outside of \[0, "),
        (lambda t: t.fill_(10**6), r"index 1000000, outside of \[0, "),
        (lambda t: t.copy_(t[0].expand_as(t)), "indices twice"),
        (lambda t: t.to(torch.float32), "is F32, not of an integer type"),
    ],
)
def test_positions_of_sparse_are_entries_of_the_weight(change, match, load, copied):
    folder = copied("sparse")
    key = next(key for key in load_file(folder / WEIGHTS) if key.endswith("indices"))
    edit(folder, lambda tensors: tensors.update({key: change(tensors[key])}))
    assert_refused(folder, match, load)


@pytest.mark.parametrize("load", [petl.load, PeftModel.from_pretrained])
@pytest.mark.parametrize("index", [-1, 10**6])
def test_shards_of_mos_are_rows_of_the_pools(index, load, copied):
    folder = copied("mos")
    key = next(key for key in load_file(folder / WEIGHTS) if key.endswith("index_B"))
    edit(folder, lambda tensors: tensors[key].view(-1)[0].fill_(index))
    assert_refused(folder, rf"index {index}, outside of \[0, ", load)


def test_the_rank_of_increlora_is_not_negative(copied):
    folder = copied("increlora")
    key = next(key for key in load_file(folder / WEIGHTS) if key.endswith(".rank"))
    edit(folder, lambda tensors: tensors[key].fill_(-1))
    assert_refused(folder, "-1 of them active")


@pytest.mark.parametrize("shape", [(2**38, 2), (2**39, 2**39, 0)])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_sizes_in_a_compressed_file_are_compared_before_it_is_expanded(
    name, shape, folders, tmp_path, monkeypatch
):
    """The tensor would take two terabytes, or has none of more entries than an integer counts."""
    found = deltas.compress_adapter(folders(name), tmp_path / "small")
    last = list(found.shapes)[-1]
    start = found.places[last][2].start
    damaged = dataclasses.replace(
        found,
        shapes={**found.shapes, last: (torch.float32, torch.Size(shape))},
        kept={**found.kept, last: 0},
        positions=found.positions[:start],
        signs=found.signs[:start],
    )
    damaged.save(tmp_path / "small" / FILE)
    with pytest.raises(petl.InputError):
        deltas.expand(tmp_path / "small", tmp_path / "out")  # there is no model to compare with
    monkeypatch.setattr(deltas.Ternary, "dense", lambda *_: pytest.fail("it was expanded"))
    assert_refused(tmp_path / "small", r"small/ternary\.safetensors does not fit .* has shape")


def test_one_short_message_for_any_number_of_tensors(copied):
    folder = copied("lora")
    edit(folder, lambda tensors: tensors.update({k: t[:, :1].clone() for k, t in tensors.items()}))
    assert_refused(folder, r"has shape \[\d+, 1\], not .* \(\d+ tensors differ\)")


# Config


@pytest.mark.parametrize("name", sorted({*NAMES} - {"ia3", "icv"}))  # which have no size
def test_sizes_that_the_file_does_not_justify_are_refused_before_they_are_allocated(name, copied):
    """The dense factors of these ranks would take terabytes."""
    sizes = {
        "mola": "num_experts",
        "vblora": "num_vectors",
        "adalora": "init_r",
        "increlora": "init_r",
    }
    folder, value = copied(name), 10**11
    if name == "sparse":
        raw = json.loads((folder / CONFIG).read_text())
        set_fields(folder, num_deltas=dict.fromkeys(raw["num_deltas"], value))
    else:
        set_fields(folder, **{sizes.get(name, "r"): value})
    assert_refused(folder, ".")


WRONG = ["x", "", -1, 1.5, True, None, [], {}, [[]], {"a": {}}, [1], float("nan"), 10**30, ["\0"]]


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_another_type_is_refused_or_used_but_never_a_traceback(name, folders, tmp_path):
    raw = json.loads((folders(name) / CONFIG).read_text())
    for field in raw.keys() - {"peft_type"}:
        for value in WRONG:
            (tmp_path / CONFIG).write_text(json.dumps({**raw, field: value}))
            try:
                assert Folder(tmp_path).config
            except petl.InputError as error:
                assert_short(error)


@pytest.mark.parametrize("name", ["mola", "lora"])
@pytest.mark.parametrize("value", [-1, 0, True, "x", [2], None, 10**30])
def test_a_rank_of_another_type_or_size_does_not_load(name, value, copied):
    folder = copied(name)
    set_fields(folder, r=value)
    assert_refused(folder, "r=|shape|adapter of this config|more than 64 bits")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0, -1, "x", None])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha, copied):
    folder = copied("lora")
    set_fields(folder, lora_alpha=alpha)
    assert_refused(folder, "lora_alpha=")


@pytest.mark.parametrize(
    "pattern",
    [{"q_proj": 10**9}, {"q_proj": 0}, {"q_proj": "x"}, {"(": 1}, {"q_proj": float("nan")}],
)
@pytest.mark.parametrize("name", ["lora", "mola", "adapter"])
def test_a_pattern_of_ranks_is_checked(name, pattern, copied):
    folder = copied(name)
    if name != "lora":  # other targets
        pattern = {key.replace("q_proj", ".*"): rank for key, rank in pattern.items()}
    set_fields(folder, rank_pattern=pattern)
    assert_refused(folder, "rank_pattern|shape|smaller r")


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lora", "target_modules"),
        ("lora", "exclude_modules"),
        ("lora", "rank_pattern"),
        ("mola", "rank_pattern"),
    ],
)
def test_a_pattern_that_takes_too_long_is_refused(name, field, copied, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    folder = copied(name)
    endless = r"((\w+\.?)+)+!"
    set_fields(folder, **{field: {endless: 4} if field == "rank_pattern" else endless})
    assert_refused(folder, "took more than")


@pytest.mark.parametrize("pattern", ["(", "a{9999999999}", "[", "x" * 20_000])
def test_a_pattern_that_is_no_regular_expression_is_refused(pattern, copied):
    folder = copied("lora")
    set_fields(folder, exclude_modules=pattern)
    assert_refused(folder, "exclude_modules")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"peft_type": ' + "9" * 5000 + "}", "\udcff", ""])
def test_a_config_that_is_no_plain_json_is_refused(text, copied):
    folder = copied("lora")
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(folder, "adapter_config")


# Fuzzing


@pytest.mark.thorough
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_load(data, folders, tmp_path_factory):
    """Bytes of an adapter file or its config are replaced, removed or added."""
    name = data.draw(st.sampled_from(NAMES))
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(folders(name), folder)
    file = folder / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # the header is at the beginning
        start = data.draw(st.integers(0, min(len(content), 3000)))
        length = data.draw(st.integers(0, 8))
        content[start : start + length] = data.draw(st.binary(max_size=8))
    file.write_bytes(content)
    with contextlib.suppress(petl.InputError):
        petl.load(testing.tiny_llama(), folder)
    shutil.rmtree(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_nonsense_in_a_config_is_refused_or_loads(data, folders, tmp_path_factory):
    name = data.draw(st.sampled_from(NAMES))
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(folders(name), folder)
    raw = json.loads((folder / CONFIG).read_text())
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(raw)), JSON, min_size=1, max_size=2))
    set_fields(folder, **chosen)
    try:
        petl.load(testing.tiny_llama(), folder)
    except petl.InputError as error:
        assert_short(error)
    shutil.rmtree(folder)
