"""Regular expressions of a stranger's config: those that may take long, and those that do not."""

import pytest
from peft import C3AConfig, DeloraConfig, FourierFTConfig, IA3Config, LoraConfig

import petl
from petl.system import patterns
from petl.system.patterns import check_patterns

NAMES = [f"model.layers.{i}.first_projection_of_all_of_the_inputs" for i in range(3)]
ENDLESS = "(.+)+!"


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    "config",
    [
        *(
            LoraConfig(target_modules=pattern)
            for pattern in (ENDLESS, "(?x)(.+) +!", "(?ix:(.+) +!)", ".?" * 60 + "!")
        ),
        LoraConfig(target_modules=r"(\w|.)" * 40 + "!"),
        LoraConfig(target_modules=["q"], modules_to_save=[ENDLESS]),
        LoraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern=ENDLESS),
        IA3Config(target_modules=".*", feedforward_modules=ENDLESS),
        FourierFTConfig(target_modules=["q"], n_frequency_pattern={ENDLESS: 4}),
        C3AConfig(target_modules=["q"], block_size_pattern={ENDLESS: 4}),
        DeloraConfig(target_modules=["q"], lambda_pattern={ENDLESS: 4}),
    ],
)
def test_a_pattern_that_takes_too_long_is_refused(config, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(petl.InputError, match="took more than"):
        check_patterns(config, NAMES)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier", "score"]),
        LoraConfig(target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"),
        LoraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern="layers"),
        LoraConfig(target_modules="q", rank_pattern={"^layers.0.q": 2}),
        LoraConfig(target_modules="q", alpha_pattern={rf"layers\.{i}\..*q": 2 for i in range(99)}),
    ],
)
def test_a_usual_pattern_needs_no_second_process(config, monkeypatch):
    monkeypatch.setattr(patterns, "_match_in_time", None)
    check_patterns(config, NAMES)
