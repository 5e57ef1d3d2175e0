"""What `train.precision=auto` chooses for a device."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from petl.core.support import Capability
from petl.errors import InputError
from petl.training.compose import compose
from petl.training.distributed import precision
from petl.training.distributed import trial as bf16_trial
from petl.training.distributed.launch import start
from petl.training.distributed.precision import bf16_units, described, device_of_run
from petl.training.linear_probe import LinearProbe
from petl.training.runs.config import RunConfig
from petl.training.runs.run_config import read_config

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


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """Sets what a machine has, and the time of a step in bfloat16; returns the widths tried."""
    tried = []

    def make(*, has_bf16: bool, fraction: float) -> list[int]:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
        monkeypatch.setenv("PETL_CACHE", str(tmp_path))
        monkeypatch.setattr(precision, "device_of_run", lambda: CPU)
        monkeypatch.setattr(precision, "bf16_units", lambda _: "AMX" if has_bf16 else "")
        monkeypatch.setattr(bf16_trial, "measure", lambda width, _: tried.append(width) or fraction)
        bf16_trial.share_of_float32.cache_clear()
        return tried

    yield make
    bf16_trial.share_of_float32.cache_clear()


def run_of(*words: str, model: str = "minilm") -> RunConfig:
    return read_config(compose(["+method=lora", f"model={model}", *words]))


@pytest.mark.parametrize(
    ("has_bf16", "fraction", "expected"),
    [(True, 0.7, "bf16"), (True, 0.95, "no"), (True, 1.3, "no"), (False, 0.7, "no")],
)
def test_by_default_the_precision_is_what_a_trial_found_faster(trial, has_bf16, fraction, expected):
    tried = trial(has_bf16=has_bf16, fraction=fraction)
    assert run_of().precision == expected
    assert tried == [384] * has_bf16  # the width of MiniLM
    assert run_of("train.precision=bf16").precision == "bf16"
    assert run_of("train.precision=no").precision == "no"
    # a float32 adapter on a bfloat16 base needs autocast, whatever the hardware
    assert run_of("model.dtype=bfloat16").precision == "bf16"


def test_a_trial_is_made_once_on_a_machine_and_again_if_its_file_is_damaged(trial, tmp_path):
    tried = trial(has_bf16=True, fraction=0.7)
    for damage in (None, None, "{", '{"fraction": "x"}', "{}", *map(fraction_of, (-1, 0, 1e9))):
        if damage is not None:
            (file,) = (tmp_path / "precision").iterdir()
            file.write_text(damage)
        bf16_trial.share_of_float32.cache_clear()
        assert run_of().precision == "bf16"
    assert tried == [384] * 7


def fraction_of(value: float) -> str:
    return json.dumps({"fraction": value})


def test_a_cache_that_cannot_be_read_leads_to_a_trial(trial, monkeypatch):
    tried = trial(has_bf16=True, fraction=0.7)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert bf16_trial.share_of_float32(384, CPU) == 0.7
    assert tried == [384]


def test_a_busy_processor_makes_as_many_steps_as_an_idle_one(monkeypatch):
    def steps(*, share: float) -> int:
        """The steps of a trial whose process gets a share of the processor."""
        made, now = [], [0.0]

        class Step(torch.nn.Module):
            config = SimpleNamespace(vocab_size=4)

            def forward(self, input_ids):
                made.append(1)
                now[0] += 0.01
                return SimpleNamespace(last_hidden_state=torch.ones(2, requires_grad=True))

        monkeypatch.setattr(bf16_trial, "_model", lambda width: Step())
        monkeypatch.setattr(bf16_trial.time, "process_time", lambda: now[0])
        monkeypatch.setattr(bf16_trial.time, "perf_counter", lambda: now[0] / share)
        bf16_trial.measure(64, CPU)
        return len(made)

    assert steps(share=0.1) == steps(share=1) > 50


@pytest.mark.parametrize(
    ("width", "tried"),
    [(64, []), (200, [192]), (2048, [1024])],
)
def test_a_narrow_model_needs_no_trial_and_a_wide_one_is_tried_as_a_smaller(trial, width, tried):
    found = trial(has_bf16=True, fraction=0.6)
    words = ("model.architecture=bert", f"+model.settings.hidden_size={width}")
    chosen = run_of(*words, model="config").precision
    assert (chosen, found) == ("bf16" if tried else "no", tried)


def test_what_accelerate_launch_was_told_counts(trial, monkeypatch):
    tried = trial(has_bf16=True, fraction=0.6)
    for told in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert run_of().precision == told
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="ACCELERATE_MIXED_PRECISION=fp16"):
        run_of().precision  # noqa: B018
    assert run_of("train.precision=no").precision == "no"
    assert not tried


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["+loss=density"], "no"),
        (["+loss=density", "loss.eps=1e-5"], "bf16"),  # float32 is not needed
        (["+loss=density", "loss.weight=0"], "bf16"),
        (["+loss=density", "train.precision=bf16"], "bf16"),  # as it was asked for
        (["+loss=density", "model.dtype=bfloat16"], "bf16"),
    ],
)
def test_auto_is_float32_where_the_loss_needs_it(trial, words, expected):
    tried = trial(has_bf16=True, fraction=0.6)
    run = run_of(*words)
    assert run.precision == expected
    assert run.with_train(lr=0.5).precision == expected
    if expected == "no":
        assert not tried
        assert "eps=1e-07" in described("no", run.model, run.float32)


def test_any_feature_can_need_float32(trial, monkeypatch):
    trial(has_bf16=True, fraction=0.6)
    assert run_of("train.linear_probe=true").precision == "bf16"
    monkeypatch.setattr(LinearProbe, "lacks", {Capability.BF16: "it counts small shares"})
    run = run_of("train.linear_probe=true")
    assert run.precision == "no"
    assert "it counts small shares" in described("no", run.model, run.float32)


def test_what_accelerate_launch_was_told_counts_with_a_loss_for_float32(trial, monkeypatch):
    trial(has_bf16=True, fraction=0.6)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = run_of("+loss=density")
    assert run.precision == "bf16"
    assert "is set to bf16" in described("bf16", run.model, run.float32)


@pytest.mark.thorough
def test_a_trial_leaves_the_random_state_and_measures_a_time():
    before = torch.get_rng_state()
    assert 0.05 < bf16_trial.measure(64, CPU) < 20
    assert torch.equal(before, torch.get_rng_state())


def test_a_precision_is_described_with_its_reason(trial):
    source = run_of().model
    trial(has_bf16=True, fraction=0.7)
    assert described("bf16", source) == "bf16 (cpu has AMX, a step takes 0.70 of float32's time)"
    narrow = run_of("model.architecture=bert", "+model.settings.hidden_size=64", model="config")
    assert "which pays for states of 128 numbers or more" in described("no", narrow.model)


def test_a_trial_that_saves_nothing_is_described_as_one(trial):
    trial(has_bf16=True, fraction=1.0)
    assert (
        described("no", run_of().model)
        == "float32 (cpu has AMX, a step takes 1.00 of float32's time)"
    )


@pytest.mark.parametrize("asked", ["no", None])
def test_of_a_model_in_bfloat16_its_dtype_is_the_reason(trial, monkeypatch, asked):
    tried = trial(has_bf16=True, fraction=1.3)
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    run = run_of("model.dtype=bfloat16")
    assert described(run.precision, run.model).startswith("bf16 (model.dtype=bfloat16")
    assert not tried


def test_of_a_machine_without_bfloat16_it_is_said(trial, monkeypatch):
    source = run_of().model
    trial(has_bf16=False, fraction=0.7)
    assert described("no", source) == "float32 (cpu has no products in bfloat16)"
    assert "emulates them" in described("bf16", source)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert described("no", source) == "float32 (ACCELERATE_MIXED_PRECISION is set to no)"


def test_accelerates_switch_to_the_cpu_counts(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_of_run() == CPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert device_of_run().type == "cuda"


def test_a_device_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "is_bf16_available", lambda **_: False)
    with pytest.raises(InputError):
        start(0, "bf16")
    assert start(0, "no").mixed_precision == "no"
