"""What trials say: compared with tables whose true scores are known."""

import math
import statistics

import numpy as np
import pytest

from petl.experiments.advice.evidence import Evidence, RowErrors, Setting, Trial, row_error

LORA, WIDE, MOLA = Setting("lora", 8, 1e-3), Setting("lora", 32, 1e-3), Setting("mola", 8, 3e-3)
FEW = RowErrors(0.02, 0.015, 500)


def table(scores, steps=100, **more):
    """Trials of one length: by setting, the score of each seed."""
    return [
        Trial(setting, seed, steps, score, **more)
        for setting, found in scores.items()
        for seed, score in enumerate(found)
    ]


def simulated(rng, levels, *, seeds, full=True):
    """Evidence of trials that answer rows right or wrong, and the test score of one run more.

    A row is right if the setting's level, what the seed adds, the row's own ease and an accident of
    row and run are above 0 together (probit), so that runs agree on most rows.
    """
    validation, test = rng.normal(size=300), rng.normal(size=600)

    def accuracy(level, rows):
        drawn = rng.normal(scale=0.05)
        return float(
            np.mean(level + drawn + 1.2 * rows + rng.normal(scale=0.7, size=len(rows)) > 0)
        )

    settings = [Setting("lora", 8, 10.0**-k) for k in range(len(levels))]
    trials = [
        Trial(setting, seed, 100, accuracy(level, validation))
        for setting, level in zip(settings, levels, strict=True)
        for seed in range(seeds)
    ]
    best = max(trials, key=lambda trial: trial.score)
    spread = {"accuracy": best.score}
    rows = RowErrors(row_error("accuracy", spread, 300), row_error("accuracy", spread, 600), 300)
    evidence = Evidence(trials, rows, 100 if full else 400)
    return evidence, accuracy(levels[settings.index(evidence.best)], test)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("levels", [[0.3] * 6, [0.0, 0.2, 0.3, 0.3, 0.1], [-1.0, -0.8, 0.4]])
def test_intervals_hold_the_score_of_another_run_on_other_rows(levels, seeds):
    rng = np.random.default_rng(len(levels) + 10 * seeds)
    found = [simulated(rng, levels, seeds=seeds) for _ in range(300)]
    inside = [e.predicted()[0].low <= score <= e.predicted()[0].high for e, score in found]
    # 300 cases of 80 % have a standard error of 2.3 %; the few degrees of freedom make them wider
    assert 0.76 <= statistics.fmean(inside) <= 0.97
    width = statistics.fmean(e.predicted()[0].high - e.predicted()[0].low for e, _ in found)
    assert width < 0.16


def test_the_best_of_equal_settings_is_not_predicted_to_be_as_good_as_it_looks():
    rng = np.random.default_rng(3)
    found = [simulated(rng, [0.3] * 8, seeds=1) for _ in range(200)]
    looks = statistics.fmean(max(e.means.values()) - score for e, score in found)
    predicted = statistics.fmean(e.predicted()[0].center - score for e, score in found)
    assert looks > 0.015
    assert abs(predicted) < 0.4 * looks


def test_a_setting_far_ahead_is_not_drawn_to_the_others():
    evidence = Evidence(table({LORA: [0.8], WIDE: [0.3], MOLA: [0.2]}), FEW, 100)
    assert evidence.predicted()[0].center == pytest.approx(0.8)


def test_lora_is_taken_unless_another_method_is_surely_better():
    close = Evidence(table({LORA: [0.60, 0.61], MOLA: [0.61, 0.62]}), FEW, 100)
    assert close.ranked()[0] == MOLA
    assert close.best == LORA
    assert close.gain.low < 0 <= close.gain.center
    far = Evidence(table({LORA: [0.60, 0.61], MOLA: [0.75, 0.76]}), FEW, 100)
    assert far.best == MOLA
    assert far.gain.low > 0
    # of LoRA's own settings, the best is taken
    own = Evidence(table({LORA: [0.60, 0.61], WIDE: [0.61, 0.62]}), FEW, 100)
    assert own.best == WIDE
    assert own.gain is None


def test_equal_methods_seldom_replace_lora():
    rng, taken = np.random.default_rng(0), 0
    for _ in range(300):
        scores = {s: rng.normal(0.6, 0.01, size=2) for s in (LORA, MOLA, Setting("mos", 16, 1e-3))}
        taken += Evidence(table(scores), FEW, 100).best != LORA
    assert taken / 300 < 0.1


def test_short_trials_that_cannot_tell_rates_apart_give_the_lowest():
    fast = LORA._replace(rate=3e-3)
    near = table({LORA: [0.595, 0.60], fast: [0.60, 0.605]})
    assert Evidence(near, FEW, 1000).best == LORA
    assert Evidence(near, FEW, 100).best == fast
    far = table({LORA: [0.5, 0.5], fast: [0.60, 0.605]})
    assert Evidence(far, FEW, 1000).best == fast
    # few rows tell nothing apart, and are no reason to hardly train
    slow = LORA._replace(rate=1e-4)
    all_near = table({slow: [0.595], LORA: [0.6], fast: [0.605]})
    assert Evidence(all_near, FEW, 1000).best == LORA
    # another rank is another choice
    wide = table({LORA: [0.595, 0.60], WIDE._replace(rate=3e-3): [0.60, 0.605]})
    assert Evidence(wide, FEW, 1000).best.rank == 32


def test_without_lora_the_best_is_taken():
    mos = Setting("mos", 16, 1e-3)
    assert Evidence(table({mos: [0.60], MOLA: [0.61]}), FEW, 100).best == MOLA


def test_losses_are_predicted_as_gains_of_their_negative():
    losses = {LORA: [-2.0, -2.1], WIDE: [-1.5, -1.45], MOLA: [-1.6, -1.7]}
    evidence = Evidence(table(losses), RowErrors(0.03, 0.03, 300), 100)
    assert evidence.best == WIDE
    found, variances = evidence.predicted()
    assert found.low < found.center < found.high < 0
    assert found.high - found.center == pytest.approx(found.center - found.low)
    assert sum(variances.values()) == pytest.approx(
        variances["seeds"] + variances["rows"] + variances["selection"]
    )


def test_equal_scores_are_decided_by_the_loss():
    trials = [Trial(LORA, 0, 10, 0.5, -1.2), Trial(WIDE, 0, 10, 0.5, -1.1)]
    assert Evidence(trials, FEW, 10).best == WIDE


def test_losses_of_equal_scores_are_means_over_seeds():
    losses = {LORA: (-1.0, -1.0), WIDE: (-9.0, -0.9)}
    trials = [
        Trial(setting, seed, 10, 0.5, loss)
        for setting, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    assert Evidence(trials, FEW, 10).ranked() == [LORA, WIDE]


def test_a_curve_is_extrapolated_with_what_is_not_known_of_it():
    # exactly 0.7 - 0.8 n^-0.5, of which the middle exponent is right
    curve = {steps: 0.7 - 0.8 * steps**-0.5 for steps in (50, 200)}
    trials = [t for steps, score in curve.items() for t in table({LORA: [score]}, steps)]
    trials += table({WIDE: [0.6]}, 200)
    quiet = RowErrors(1e-4, 1e-4, 300)
    found, variances = Evidence(trials, quiet, 800).predicted()
    assert found.center == pytest.approx(0.7 - 0.8 * 800**-0.5, abs=1e-3)
    assert variances["length"] > 0
    assert found.low < found.center < found.high
    further, _ = Evidence(trials, quiet, 3200).predicted()
    assert further.high - further.low > found.high - found.low
    whole, variances = Evidence(trials, quiet, 200).predicted()
    assert variances["length"] == 0
    assert whole.center == pytest.approx(curve[200], abs=1e-3)


def test_a_run_of_full_length_is_the_center():
    trials = [*table({LORA: [0.5], WIDE: [0.4]}, 50), *table({LORA: [0.6]}, 400)]
    found, variances = Evidence(trials, FEW, 400).predicted()
    assert variances["length"] == 0
    assert 0.59 < found.center <= 0.6


def test_what_a_constraint_costs_is_a_difference_at_one_length():
    fast = LORA._replace(rate=0.1)  # of another rate, which WIDE was not tried with
    trials = [*table({LORA: [0.5], WIDE: [0.58], fast: [0.6]}, 20), *table({fast: [0.7]}, 100)]
    evidence = Evidence(trials, FEW, 100, excluded={WIDE})
    assert evidence.best == fast
    setting, gain = evidence.forgone([WIDE])
    assert setting == WIDE
    assert gain.center == pytest.approx(0.08)
    assert evidence.forgone([MOLA]) is None


def test_errors_for_the_choice_of_rows():
    assert row_error("accuracy", {"accuracy": 0.5}, 400) == pytest.approx(0.025)
    assert row_error("accuracy", {"accuracy": 1.0}, 100) > 0
    assert row_error("pearson", {"pearson": 0.8}, 101) == pytest.approx(0.036)
    assert row_error("loss", {"loss": 2.0}, 100) == pytest.approx(0.1)
    # half a 95 % interval on 100 queries, on four times as many
    given = {"ndcg_at_10": 0.6, "ndcg_at_10_interval": 0.0392, "rows": 100.0}
    assert row_error("ndcg_at_10", given, 400) == pytest.approx(0.01, rel=1e-3)
    assert math.isfinite(row_error("loss", {"loss": 0.0}, 1))
