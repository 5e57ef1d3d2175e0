"""The benchmark on shapes that take milliseconds; no time is asserted."""

import copy
import json
import math
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from bench import many, serve, shapes
from bench.contenders import CONTENDERS, IMPORTS, LORA, contenders, import_methods
from bench.files import information
from bench.records import Result
from bench.report import tables
from bench.run import Settings, run
from bench.scale import AXES, Axis, enlarged, sized
from bench.shapes import Bench
from tiny_shapes import TINY, TINY_LLAMA

import petl

pytest_plugins = ["export_fixtures"]
pytestmark = pytest.mark.usefixtures("pair_method")

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench.py"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(shapes.SUITES, "quick", TINY)


def records(section, *rows, shape="llama"):
    settings = Settings(sections=[section], shapes=[shape], rows=rows, rounds=2)
    return run(settings, progress=lambda line: None).records


def contender(name):
    return next(row for row in CONTENDERS if row.name == name)


@pytest.mark.thorough
def test_the_step_section_measures_the_floor_lora_and_what_was_asked_for():
    """In half precision other activations are saved."""
    floor, lora, mola = records("step", "mola 8/2")
    assert (floor.row, lora.row, mola.row) == ("floor", "PEFT's lora", "mola 8/2")
    assert set(mola.ratios) == {"time / floor", "time / LoRA"}
    assert mola.counts["kernels / layer"] > lora.counts["kernels / layer"] > 0
    assert lora.counts["waits"] == mola.counts["waits"] == 0
    assert lora.counts["peak / floor"] > 1
    _, half = records("bf16", LORA)[:2]
    assert half.shape == "llama 2 x 32 bf16"
    assert half.counts["kept B / token, layer"] != lora.counts["kept B / token, layer"]


@pytest.mark.thorough
def test_a_row_with_an_error_has_no_values(monkeypatch):
    monkeypatch.setattr("bench.step.check", lambda *_: "the loss is off by 1e-02")
    floor, *others = records("step", "mola 8/2")
    assert floor.ratios
    assert [(r.row, r.failed) for r in others] == [
        ("PEFT's lora", ""),  # not ours to check
        ("mola 8/2", "the loss is off by 1e-02"),
    ]
    assert not others[1].ratios
    assert not others[1].counts


@pytest.mark.thorough
def test_the_file_section_counts_bytes_and_merges_what_merges():
    lora, mola = records("file", "lora", "mola")
    assert lora.counts["bytes"] > lora.counts["bytes"] / lora.counts["bytes / information"]
    assert "merge ms" in lora.facts
    assert "merge ms" not in mola.facts


@pytest.mark.thorough
def test_the_serve_section_decodes_and_reads_with_several_adapters(monkeypatch):
    monkeypatch.setattr("bench.serve.COUNTS", (1, 17))
    monkeypatch.setattr("bench.serve.NEW", 2)
    found = records("serve", "lora", "adapter")
    rows = [LORA, "lora", "adapter 48"]
    assert [r.row for r in found] == [row for row in rows for _ in range(2)]
    assert set(found[0].ratios) == {"1 adapters", "17 adapters"}  # of 64 rows, PEFT's
    assert set(found[2].ratios) == {"1 adapters", "17 adapters", "17 adapters, first call"}
    assert set(found[1].ratios) == {"1 adapters"}  # of 16
    assert {r.shape for r in records("serve", "lora", shape="minilm")} == {
        "minilm, 16 prompts of 64 tokens"  # an encoder decodes nothing
    }


def test_calls_after_the_first_find_their_adapters_stacked(monkeypatch):
    monkeypatch.setattr("bench.serve.NEW", 2)
    bench = Bench(replace(TINY_LLAMA, rows=3, length=1))
    model = serve.served(contender("lora"), bench)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.eval()
    call = serve.decoding(model, bench, adapter_names=["default", "other", "default"])
    steps = serve.first_call(model, call)
    assert list(steps) == ["forget", "first"]
    kept = model.base_model.kept_rows
    call()
    rows = kept.rows
    call()
    assert kept.rows is rows is not None
    steps["forget"]()
    assert kept.rows is None
    steps["first"]()
    assert kept.rows == rows
    assert kept.rows is not rows


@pytest.mark.thorough
def test_the_scale_section_gives_exponents(monkeypatch):
    axes = (Axis("layers", (2, 4)), Axis("experts", (2, 8), {"num_experts": int}))
    monkeypatch.setattr("bench.scale.AXES", axes)
    found = {r.row: r for r in records("scale", "mola 8/2", "adalora", "lora, dropout")}
    assert set(found) == {f"{LORA}, layers 2, 4", "mola 8/2, layers 2, 4", "mola 8/2, experts 2, 8"}
    experts = found["mola 8/2, experts 2, 8"]
    assert experts.counts["kernels exponent"] == pytest.approx(0, abs=1e-9)
    layers = found["mola 8/2, layers 2, 4"]
    assert layers.counts["FLOPs exponent"] == pytest.approx(1, abs=0.2)


def test_a_larger_shape_keeps_the_share_of_the_head():
    whole = shapes.LLAMA
    assert sized(whole, "layers", 3).vocabulary == whole.vocabulary // 2
    assert sized(whole, "tokens", 2048).tokens == 2048
    row = contender("mos")
    axis = {axis.name: axis for axis in AXES}
    assert enlarged(row, axis["rank"], 8, TINY_LLAMA).fields["equivalent_rank"] == 4
    fields = {row.name: row.fields for row in CONTENDERS}
    grown = enlarged(contender("increlora"), axis["rank"], 32, TINY_LLAMA).fields
    assert grown == {**fields["increlora"], "init_r": 31, "target_r": 32}
    sparse = contender("sparse 1 %")
    assert enlarged(sparse, axis["per mille"], 20, TINY_LLAMA).fields["density"] == 0.02
    assert not axis["rank"].has(sparse)


@pytest.mark.thorough
def test_the_peak_section_measures_processes_of_their_own():
    floor, lora, mola = records("peak", "mola 8/2")
    assert floor.facts["peak MB"] > 0
    assert set(lora.facts) == set(mola.facts) == {"peak MB", "peak / floor"}


@pytest.mark.thorough
def test_the_generate_section_decodes_merged_and_not(monkeypatch):
    monkeypatch.setattr("bench.generate.NEW", 3)
    found = {r.row: set(r.ratios) for r in records("generate", "lora", "mola")}
    assert found["lora"] == {"unmerged / base", "merged / base"}
    assert found["mola 8/2"] == {"unmerged / base"}  # it cannot be merged
    assert "lora, dropout" not in found
    assert records("generate", "lora", shape="minilm") == []


@pytest.mark.thorough
def test_the_dist_section_runs_processes_and_threads():
    lora, compacter = records("dist", "compacter")
    assert (lora.row, compacter.row) == ("PEFT's lora", "compacter 48")
    assert lora.counts["B reduced"] > compacter.counts["B reduced"] > 0
    assert lora.counts["collectives"] == compacter.counts["collectives"]
    assert lora.counts["collectives"] == 2  # buffers, and so few gradients in one
    assert {f"steps / s, {way}" for way in ("1 x 1", "1 x 2", "2 x 1")} <= set(lora.facts)


@pytest.mark.thorough
def test_the_many_section_adds_adapters_and_wraps_many_modules(monkeypatch):
    monkeypatch.setattr(many, "COUNTS", (1, 3))
    monkeypatch.setattr(many, "MODULES", (14, 28))
    found = {r.row: r for r in records("many", "lora")}
    per_linear = sum(64 + 64 for _ in "qo") + sum(64 + 32 for _ in "kv") + 3 * (64 + 96)
    one, three = found["lora, 1"], found["lora, 3"]
    assert three.counts["B each"] == 2 * 8 * per_linear * 4
    assert "B each" not in one.counts
    assert set(three.ratios) == {"mixed / one, 16 x 8", "mixed / one, 64 x 1"}
    assert {"switch ms", "disable ms", "load ms", "save ms", "add ms"} <= set(three.facts)
    assert {"wrap s", "wrap exponent", "write exponent"} <= set(found["lora"].facts)


def test_a_peer_that_cannot_run_names_what_it_needs():
    settings = Settings(sections=["peers"], shapes=["llama"], peers=sys.executable)
    with pytest.raises(petl.InputError, match="pip install adapters"):
        run(settings, progress=lambda line: None)


def test_a_model_of_the_configurations_can_be_a_shape():
    shape = shapes.hydra_shape("minilm")
    assert (shape.hidden, shape.ff, shape.layers, shape.is_decoder) == (384, 1536, 6, False)
    assert shape.product_weights == replace(shape, source=None, name="minilm").product_weights
    small = Bench(replace(shape, layers=1, rows=1, length=4))
    assert small.base.config.num_hidden_layers == 1
    assert float(small.step(small.twin().requires_grad_(True))()) > 0
    with pytest.raises(petl.InputError):
        shapes.hydra_shape("vit_random")


@pytest.mark.thorough
def test_a_method_without_a_dense_reference_is_measured_with_a_note(pair_method):
    floor, lora, pair = records("step", "test_pair")
    assert (lora.note, pair.note) == ("", "no dense reference")
    assert pair.ratios
    assert not pair.failed
    assert not pair.is_own  # an error in it would not be a bug of petl
    table = next(iter(tables(Result({}, [floor, lora, pair])).values()))
    assert table.rows[2][0] == "test_pair (no dense reference)"


def test_modules_that_register_methods_can_be_imported(monkeypatch, tmp_path):
    (tmp_path / "registers_something.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(IMPORTS, "registers_something")
    import_methods()
    assert "registers_something" in sys.modules


def test_every_own_method_has_a_row():
    own = {name for name in petl.list_methods() if petl.method(name).by == "petl"}
    assert own <= {row.method for row in contenders()}
    assert {row.method for row in CONTENDERS} >= {"adalora", "vera", "shira", "xlora", "density"}


def test_an_unknown_row_shape_or_section_is_refused():
    for settings, word in (
        (Settings(rows=["mloa"]), "mloa"),
        (Settings(shapes=["gpt"]), "gpt"),
        (Settings(sections=["stop"]), "stop"),
    ):
        with pytest.raises(petl.InputError, match=word):
            run(settings, progress=lambda line: None)


def test_information_of_chosen_weights_counts_the_choice():
    bench = Bench(TINY_LLAMA)
    row = next(row for row in CONTENDERS if row.name == "sparse 1 %")
    model = row.wrap(bench)
    layers = [m for m in model.modules() if hasattr(m, "adapters")]
    sizes = [(m.in_features * m.out_features, len(m.adapters["default"].values)) for m in layers]
    choices = sum(math.log2(math.comb(N, K)) for N, K in sizes)
    expected = 4 * sum(K for _, K in sizes) + choices / 8
    assert information(row, model) == pytest.approx(expected, rel=1e-9)


@pytest.mark.thorough
def test_the_script_writes_a_result_and_fails_on_a_worse_one(tmp_path, monkeypatch, capsys):
    spec = spec_from_file_location("bench_script", SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "quieten", lambda: None)  # other tests read the log
    out, page = tmp_path / "bench.json", tmp_path / "bench.md"

    def status(*words):
        line = ["bench.py", "--sections", "step", "--shape", "llama", "--methods", "lora"]
        monkeypatch.setattr(sys, "argv", [*line, "--rounds", "2", "--out", str(out), *words])
        return script.main()

    page.write_text("Before.\n<!-- bench: summary -->\nold\n<!-- end -->\nAfter.\n")
    assert status("--page", str(page)) == 0
    printed = capsys.readouterr().out
    assert "kernel launches per adapted layer" in printed
    assert "| lora |" in page.read_text()
    assert "kernels" not in page.read_text()
    assert "old" not in page.read_text()
    assert out.is_file()
    found = json.loads(out.read_text())
    assert found["environment"]["threads"] == 1
    lora = next(r for r in found["records"] if r["row"] == "lora")
    lora["counts"]["kernels / layer"] /= 2
    lora["ratios"] = {}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(found))
    assert status("--check", str(old)) == 1
    assert "worse: step, llama 2 x 32, lora: kernels / layer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        status("--check", str(tmp_path / "none.json"))


@pytest.mark.slow
def test_a_compiled_step_is_timed_relative_to_the_eager_one():
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    lora, mos = records("compile", "mos")
    assert (lora.row, mos.row) == ("PEFT's lora", "mos")
    for record in (lora, mos):
        assert record.ratios["compiled / eager"].median > 0
        assert record.counts["graph breaks"] == 0
        assert record.facts["seconds to compile"] > 0


@pytest.mark.thorough
def test_the_watch_section_compares_steps_with_and_without_it():
    (record,) = records("watch")
    assert record.ratios["watched / not"].median > 0
