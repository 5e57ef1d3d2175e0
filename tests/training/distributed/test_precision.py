"""What `train.precision=auto` chooses for a device."""

from types import SimpleNamespace

import pytest
import torch

from petl.errors import InputError
from petl.training.distributed import precision
from petl.training.distributed.launch import start
from petl.training.distributed.precision import automatic, bf16_units, described, device_of_run
from petl.training.runs.settings import TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx", "onednn", "units"),
    [
        (True, True, True, "AMX"),
        (False, True, True, "AVX512_BF16"),
        (False, False, True, ""),
        (True, False, False, ""),  # no kernels for its units
    ],
)
def test_a_cpu_has_amx_or_avx512(monkeypatch, amx, avx, onednn, units):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert bf16_units(CPU) == units


@pytest.mark.parametrize("native", [True, False])
def test_products_that_a_gpu_emulates_do_not_count(monkeypatch, native):
    def is_supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert bool(bf16_units(torch.device("cuda"))) is native


@pytest.mark.parametrize(
    ("module", "found"),
    [(SimpleNamespace(is_bf16_supported=lambda: True), True), (SimpleNamespace(), False)],
)
def test_of_another_device_torch_is_asked(monkeypatch, module, found):
    monkeypatch.setattr(torch, "mps", module)
    assert bool(bf16_units(torch.device("mps"))) is found


def test_auto_is_the_precision_of_this_machine_and_a_choice_is_kept(monkeypatch):
    for there, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(precision, "bf16_units", lambda _, there=there: "AMX" * there)
        assert automatic() == TrainConfig(precision="auto").computes_in("float32") == expected
        for chosen in ("no", "bf16"):
            assert TrainConfig(precision=chosen).computes_in("float32") == chosen
        # a float32 adapter on a bfloat16 base needs autocast, whatever the hardware
        assert TrainConfig(precision="auto").computes_in("bfloat16") == "bf16"


def test_a_precision_is_described_with_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(precision, "device_of_run", lambda: CPU)
    monkeypatch.setattr(precision, "bf16_units", lambda _: "AMX")
    assert described("bf16") == "bf16 (cpu has AMX)"
    assert described("no") == "float32 (cpu has AMX)"
    monkeypatch.setattr(precision, "bf16_units", lambda _: "")
    assert described("no") == "float32 (cpu has no products in bfloat16)"
    assert "emulates them" in described("bf16")


def test_accelerates_switch_to_the_cpu_counts(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_of_run() == CPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert device_of_run().type == "cuda"


def test_a_device_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "is_bf16_available", lambda **_: False)
    with pytest.raises(InputError, match="precision=bf16 is not possible on"):
        start(0, "bf16")
    assert start(0, "no").mixed_precision == "no"
