"""The trained adapters of the study: `petl.experiments.sweeps.study`, a `petl train` for each."""

from pathlib import Path

from petl.experiments.sweeps.study import Contender, Study, slug
from sizes import data

LORA, MOS, BINARY = "lora", "mos", "binary"
BITS = (1, 2, 4, 8)
BITS_RATES = [1e-3, 3e-3]  # the defaults of lora and of binary, of which neither was tuned for both
# the settings of the quickstart, without what this study does not read, and a pass less
SETTINGS = [
    "train.epochs=2",
    "train.buckets=8",
    "train.linear_probe=false",
    "train.score_before=false",
]


def quantized(bits: int) -> str:
    """Return the words of a LoRA that is trained in a number of bits."""
    return f"binary method.inner=lora method.bits={bits}"


def studies(folder: Path, seeds: list[int], settings: list[str]) -> dict[str, Study]:
    """Return the trainings by name: one per task, and one of binary over LoRA."""
    contenders = {"verbs": [LORA, MOS, BINARY], "nouns": [LORA], "reviews": [LORA]}
    found = {
        task: Study(
            folder / task,
            [Contender(words) for words in contenders[task]],
            seeds,
            [],
            [*data.settings(folder / "data", task), *SETTINGS, *settings],
        )
        for task in data.TASKS
    }
    found["bits"] = Study(
        folder / "bits",
        [Contender(quantized(bits)) for bits in BITS],
        seeds,
        BITS_RATES,
        [*data.settings(folder / "data", "verbs"), *SETTINGS, *settings],
    )
    return found


def run_of(folder: Path, study: str, words: str, seed: int) -> Path:
    """Return the folder of a run of a study."""
    return folder / study / "runs" / slug(Contender(words).name) / f"seed-{seed}"
