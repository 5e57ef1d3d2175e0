"""The study of sizes: its data, what it measures on a tiny model, its tables and its page."""

import csv
import gzip
import itertools
import statistics

import pandas as pd
import pytest
import sizes.divisors
import torch
from safetensors.torch import load_file
from sizes import cells, data, records, report, rows
from sizes.divisors import TOKENS, divisors, products
from sizes.records import Record
from sizes.remarks import remarks
from sizes.score import Scorer
from training_fixtures import train

import petl
from petl.adapters.deltas.adapters import read
from petl.adapters.deltas.measured import train_batches
from petl.adapters.export.saved_adapter import find
from petl.training.runs.records import read_results

pytest_plugins = ["training_fixtures"]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    """A study folder with a trained LoRA for two tasks, of three and of two classes."""
    folder = tmp_path_factory.mktemp("study")
    two = folder / "two.csv"
    with (tiny.folder / "train.csv").open(newline="") as opened:
        lines = [row for row in csv.reader(opened) if row[1] != "tool"]
    with two.open("w", newline="") as opened:
        csv.writer(opened).writerows(lines)
    other = [f"data.train={two}", f"data.test={two}"]
    for task, words in (("verbs", []), ("nouns", other)):
        run = folder / task / "runs" / "lora" / "seed-0"
        train([*tiny.steady, *words, "+method=lora", "train.steps=4"], run)
    return folder


# Data


def test_reviews_are_split_by_film_and_no_text_occurs_twice(monkeypatch):
    monkeypatch.setattr(data, "TEST_ROWS", 7)
    monkeypatch.setattr(data, "TRAIN_ROWS", 10)
    reviews = [(f"film {i % 9}", f"text {i}", "fresh" if i % 2 else "rotten") for i in range(40)]
    reviews += [("film 3", "text 5", "rotten"), ("film 3", "a plot", "plot")]
    table = pd.DataFrame(reviews, columns=["movie_name", "text", "category"])
    train_rows, test_rows = data.split_by_film(table)
    film_of = {text: film for film, text, _ in reversed(reviews)}
    assert (len(train_rows), len(test_rows)) == (10, 7)
    films = [{film_of[text] for _, text in part} for part in (train_rows, test_rows)]
    assert not films[0] & films[1]
    texts = [text for _, text in train_rows + test_rows]
    assert len(set(texts)) == len(texts)
    assert {label for label, _ in train_rows + test_rows} == {"fresh", "rotten"}


def test_nouns_are_read_from_the_database_and_written_as_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEST_ROWS", 1)
    monkeypatch.setattr(data, "TRAIN_ROWS", 2)
    place = tmp_path / "usr/share/wordnet"
    place.mkdir(parents=True)
    lines = ["  1 license", '001 03 n | that which is; "an example"', "002 05 n | a dog"]
    (place / "data.noun").write_text("\n".join([*lines, "003 28 n | an hour", "4 28 n | a day"]))
    found = data.nouns(tmp_path)
    assert found[:2] == [("tops", "that which is"), ("animal", "a dog")]
    data.write(tmp_path, "nouns", *data.split(found))
    written = [pd.read_csv(file) for file in data.files(tmp_path, "nouns")]
    assert [len(table) for table in written] == [2, 1]
    assert {*written[0]["text"], *written[1]["text"]} < {text for _, text in found}
    with pytest.raises(petl.InputError, match="apt-get download wordnet-base"):
        data.nouns(tmp_path / "nowhere")


# Measuring


def measured(study, group, **settings):
    (cell,) = (
        cell
        for cell in cells.cells(study, [0])
        if cell.group == group and all(cell.settings.get(k) == v for k, v in settings.items())
    )
    scorers = {task: Scorer(study / task / "runs/lora/seed-0") for task in cell.heads}
    return cells.measure(cell, scorers)


def test_an_adapter_as_trained_has_the_score_and_the_size_of_its_run(study):
    run = study / "verbs/runs/lora/seed-0"
    found = measured(study, "trained", method="lora")
    content = (run / "adapter" / WEIGHTS).read_bytes()
    assert found.bytes == len(content)
    assert found.packed == len(gzip.compress(content, 9))
    assert found.scores == {"verbs": read_results(run)["after"]["accuracy"]}
    assert found.rows == {"verbs": 20}


def test_only_cells_of_trained_adapters_are_due(study):
    groups = {cell.group for cell in cells.cells(study, [0, 1])}
    assert groups == {"trained", "compress", "prune", "combine"}
    assert {cell.seed for cell in cells.cells(study, [0, 1])} == {0}
    pairs = {cell.settings["tasks"] for cell in cells.cells(study, [0]) if cell.group == "combine"}
    assert pairs == {"verbs+nouns"}
    names = [
        records.path(study, cell.group, cell.settings, cell.seed)
        for cell in cells.cells(study, [0, 1], planned=True)
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", ["dare", "closed", "analytic"])
def test_divisors_are_in_their_range(study, kind, monkeypatch):
    monkeypatch.setattr(sizes.divisors, "ETAS", (0.1, 1.0))
    run = study / "verbs/runs/lora/seed-0"
    q, facts = divisors(find(run), read(run / "adapter"), 0.9, kind, 0)
    assert (q is None) == (kind == "dare")
    assert 0.1 - 1e-9 <= facts["q_low"] <= facts["q_high"] <= 1
    assert ("eta" in facts) == (kind == "analytic")
    if kind == "analytic":
        assert facts["eta"] in (0.1, 1.0)
        assert facts["q_low"] < facts["q_high"]


def test_products_are_those_of_the_inputs_of_each_layer(study):
    saved = find(study / "verbs/runs/lora/seed-0")
    material = read(saved.adapter)
    found = products(saved, material)
    # B times its input is the sum of the products: the output of lora_B for each token
    outputs, model = {}, saved.model()
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            key = f"{name.removesuffix('.default')}.weight"
            module.register_forward_hook(
                lambda module, args, output, key=key: outputs.setdefault(key, []).append(output)
            )
    with torch.no_grad():
        for batch in train_batches(saved):
            start = {key: len(parts) for key, parts in outputs.items()}
            model(**batch)
            for key, parts in outputs.items():
                assert len(parts) == start.get(key, 0) + 1
                parts[-1] = parts[-1][batch["attention_mask"].bool()]
    assert set(found) == set(outputs)
    for key, parts in outputs.items():
        every = torch.cat(parts)
        chosen = every[torch.linspace(0, len(every) - 1, TOKENS).long()]
        torch.testing.assert_close(found[key].sum(1), chosen.flatten())


def test_a_second_task_is_scored_with_its_own_head(study, tmp_path):
    verbs, nouns = (study / task / "runs/lora/seed-0/adapter" for task in ("verbs", "nouns"))
    separate = measured(study, "combine", method="separate")
    one, two = ((adapter / WEIGHTS).stat().st_size for adapter in (verbs, nouns))
    assert separate.bytes == one + two
    assert set(separate.facts) >= {"cosine of lora_A", "cosine of lora_B"}
    # an adapter with the head of the other task, whose matrix has another number of rows
    scorer = Scorer(study / "nouns/runs/lora/seed-0")
    assert scorer.score_with_head(nouns, nouns) == separate.scores["nouns"]
    alone = measured(study, "combine", method="nouns alone")
    assert alone.scores["nouns"] == separate.scores["nouns"]
    head = sum(t.numel() * 4 for n, t in load_file(verbs / WEIGHTS).items() if "classifier" in n)
    assert head < alone.bytes - two < head + 1000  # the head and the header of its file


def test_a_combination_is_of_both_adapters(study):
    found = measured(study, "combine", level="update", method="ties", density=0.2)
    assert set(found.scores) == {"verbs", "nouns"}
    assert 0 <= found.facts["lost"] < 1
    found = measured(study, "compress", density=0.2, scope="tensor", alpha=2)
    assert found.facts["emptied"] == 0
    found.write(study)
    assert records.read_all(study) == [found]


# Tables


def made(group, seed, score, size, facts=None, **settings):
    scores = score if isinstance(score, dict) else {"verbs": score}
    environment = {"time": f"2026-01-0{seed + 1}", "git": "abc", "processor": "a processor"}
    environment |= {"cores": 2, "threads": 1}
    environment["packages"] = dict.fromkeys(("petl", "torch", "transformers", "peft"), "1.0")
    test_rows = dict.fromkeys(scores, 400)
    return Record(
        group, settings, seed, size, size // 2, scores, test_rows, facts or {}, environment
    )


def some():
    found = []
    for seed, lora in enumerate((0.60, 0.62, 0.61)):
        found.append(made("trained", seed, lora, 100_000, method="lora"))
        found.append(made("trained", seed, lora - 0.01, 20_000, method="binary inner=lora bits=1"))
        for density, score in ((0.05, 0.30), (0.2, lora + 0.01)):
            code = {"density": density, "scope": "global", "alpha": "fit"}
            facts = {"bits": 0.34, "emptied": 3 if density < 0.1 else 0, "tensors": 12}
            found.append(made("compress", seed, score, int(60_000 * density), facts, **code))
        for kind, score, q in (("dare", 0.5, 0.1), ("closed", 0.4, 0.4), ("searched", 0.5, 0.1)):
            found.append(made("prune", seed, score, 100_000, {"q": q}, drop=0.9, q=kind))
        cosines = {"cosine of lora_A": 0.9, "cosine of lora_B": 0.0}
        for method, nouns, facts in (("separate", 0.7, cosines), ("verbs alone", 0.2, {})):
            scores = {"verbs": lora, "nouns": nouns}
            found.append(
                made("combine", seed, scores, 200_000, facts, tasks="verbs+nouns", method=method)
            )
        for level, nouns in (("tensors", 0.1), ("update", 0.6)):
            how = {"level": level, "method": "ties", "density": 0.2, "weight": 1.0}
            facts, scores = {"lost": 0.25}, {"verbs": lora, "nouns": nouns}
            found.append(made("combine", seed, scores, 110_000, facts, tasks="verbs+nouns", **how))
    return found


def test_tables_have_means_spreads_and_differences_by_seed():
    found = report.tables(some())
    lora, binary = found["Small by training"].rows
    assert lora[4:] == ["", ""]
    assert lora[1:4] == ["100 kB", "50 kB", "61.0 ± 1.0 %"]
    assert binary[3:] == ["60.0 ± 1.0 %", "-1.0 (-1.0 to -1.0)", "worse in all 3"]
    low, high = found["Compressed after training"].rows
    column = found["Compressed after training"].columns.index("alpha fit")
    assert low[:4] == ["0.05", "3 kB", "33.3", "0.340"]
    assert (low[column], high[column]) == ("30.0 ± 0.0 %", "62.0 ± 1.0 %")
    (pruned,) = found["Pruned after training"].rows
    assert pruned[3:7] == ["50.0 ± 0.0 %", "40.0 ± 0.0 %", "", "50.0 ± 0.0 %"]
    assert pruned[7:] == ["0.100", "0.400", "", "0.100"]
    pair = found["One adapter for two tasks: verbs and nouns"].rows
    assert [row[0].split(",")[0] for row in pair] == ["separate", "ties", "verbs alone", "ties"]
    assert pair[1][:2] == ["ties, density 0.2, update", "110 kB"]
    assert pair[1][2:] == ["61.0 ± 1.0 %", "60.0 ± 0.0 %", "-5.0 (-5.0 to -5.0)"]
    assert "One adapter for two tasks: verbs and reviews" not in found


def test_the_front_has_no_row_that_a_smaller_file_equals():
    groups = ("trained", "compress", "prune")
    every = [row for group in groups for row in rows.rows_of(some(), group)]
    best = rows.front(every)
    assert [row.bytes() for row in best] == [3_000, 12_000]
    for row, other in itertools.product(best, every):
        assert other.bytes() > row.bytes() or other.mean() <= row.mean()
    assert statistics.fmean((0.61, 0.63, 0.62)) == pytest.approx(best[-1].mean())


def test_sentences_say_what_did_not_work():
    said = "\n".join(remarks(some()))
    assert "One standard error of a score on these test rows is 2.4 points" in said
    assert "small by training, the smallest within two standard errors of lora is binary" in said
    assert "Above lora with every seed: compress, density 0.2, alpha fit." in said
    assert "density 0.05: with the largest values of all tensors together, up to 3 of 12" in said
    assert "prune 0.9: dare has the highest mean, 50.0 %; below it with every seed: closed." in said
    assert "In 3 of 3 searches the best divisor was 1 - P" in said
    assert "no better on average than verbs alone, with the heads of both tasks: ties, " in said
    assert "rank 16 loses of the norm of a combined update: 25 %" in said


def test_the_block_says_what_is_missing_and_where_it_was_measured():
    block = report.markdown(some(), missing=2)
    assert "Not complete: 2 adapters are not measured yet." in block
    assert "- machine: a processor, 2 cores, 1 thread(s)" in block


def test_the_figure_is_the_same_for_the_same_records(tmp_path):
    for name in ("one.svg", "two.svg"):
        report.draw(some(), tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    assert "test accuracy" in one


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(petl.InputError, match="contains no records"):
        records.read_all(tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records/x.json").write_text('{"group": 1}')
    with pytest.raises(petl.InputError, match="cannot be read as a record"):
        records.read_all(tmp_path)
