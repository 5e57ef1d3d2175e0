"""What `petl shrink` says of a smaller model."""

from petl.experiments.reports.shrunk import card, facts_of


def record_of(heads: bool):
    """The record of two blocks of 24 channels and 8 heads: 18 stay, and 6 (two groups of three)."""
    block = {"path": "layers.0", "importance": 1.0, "width": 24, "channels": [*range(18)]}
    kept = {"query_heads": 8, "heads": [*range(6)]} if heads else {}
    return {
        "settings": {"source": "mine", "sparsity": 0.3, "widths": "even", "heads": heads},
        "metric": "accuracy",
        "blocks": [block | kept] * 2,
        "class": "LlamaForCausalLM",
        "parameters": [2000, 1500],
        "bytes": [8000, 6000],
        "seconds": [0.2, 0.1],
        "scores": {"dense": {"accuracy": 0.5}, "shrunk": {"accuracy": 0.4}},
    }


def test_heads_that_leave_are_counted_beside_the_channels():
    facts = {name: rest for name, *rest in facts_of(record_of(heads=True))}
    assert facts["MLP channels"] == ["48", "36", "75.0 %"]
    assert facts["heads of attention"] == ["16", "12", "75.0 %"]
    assert "heads of attention" not in {row[0] for row in facts_of(record_of(heads=False))}


def test_the_readme_says_what_has_left_not_what_was_asked_for():
    for heads in (True, False):
        text = card(record_of(heads), "petl shrink")
        assert "25.0 % of the MLP channels" in text
        assert "30 %" not in text
        assert ("25.0 % of the heads of attention" in text) == heads
