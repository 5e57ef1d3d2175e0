"""Telephone prompts in five languages as files by what they are about, and Whisper's encoder.

The clips, of 8 kHz, are in the Debian packages asterisk-core-sounds-LANGUAGE-wav; one name is one
sentence, which each language has. All clips of a name are in one part, so that no sentence of the
test rows is trained on in another language. The class is that of the name: which language is spoken
would be known from the voice, since each language has one speaker.
"""

import os
import shutil
from pathlib import Path

import whisper_tiny
from transformers import WhisperConfig, WhisperForAudioClassification

from petl.data.base import shuffled
from petl.data.folders import Speech
from petl.errors import InputError

PLACE, VARIABLE = "/usr/share/asterisk/sounds", "ASTERISK_SOUNDS"
LANGUAGES = ("en", "es", "fr", "it", "ru")
TOPICS = {  # by the folder of a name, or its first word
    "vm": "voicemail",
    "conf": "conferences",
    "confbridge": "conferences",
    "digits": "numbers",
    "letters": "spelling",
    "phonetic": "spelling",
}
OTHER = "other"
SECONDS = 2  # of a clip: 100 of Whisper's 1,500 positions
TRAIN_ROWS, TEST_ROWS = 1000, 1200
SEED = 13  # of the shuffles

Prompt = tuple[str, Path]  # the name, such as digits/1.wav, and the file


def folder_of_prompts() -> Path:
    """Return the folder with one folder per language: $ASTERISK_SOUNDS, or where Debian puts it.

    Raises:
        InputError: it lacks a language.
    """
    folder = Path(os.environ.get(VARIABLE, PLACE))
    for language in LANGUAGES:
        if not any(folder.glob(f"{language}_*")):
            package = f"asterisk-core-sounds-{language}-wav"
            raise InputError(
                f"{folder} has no prompts in {language!r}; run: apt-get install {package}; or: "
                f"apt-get download {package} && dpkg -x {package}_*.deb DIR && "
                f"export {VARIABLE}=DIR{PLACE}"
            )
    return folder


def is_installed() -> bool:
    """Return True if the prompts and Whisper are there."""
    try:
        folder_of_prompts()
    except InputError:
        return False
    return whisper_tiny.PACKAGE.is_installed()


def write_prompts(folder: Path) -> None:
    """Write train/TOPIC and test/TOPIC with clips, and whisper with the encoder.

    Raises:
        InputError: a package is missing, or has another model.
    """
    write_encoder(folder / "whisper")
    train, test = parts(prompts())
    write_files(folder / "train", train)
    write_files(folder / "test", test)


def prompts() -> list[Prompt]:
    """Return the prompts of all languages, sorted by language and name."""
    root = folder_of_prompts()
    source = Speech(name="speech", source="speech", path=str(root))
    return [
        (file.relative_to(root).as_posix().partition("/")[2], file)
        for language in LANGUAGES
        for file, _ in source.prompts(root, language)
    ]


def parts(found: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Return train and test prompts, at most TRAIN_ROWS and TEST_ROWS; no name is in both."""
    names = sorted({name for name, _ in found})
    of_train = {names[i] for i in shuffled(len(names), SEED)[: len(names) // 2]}
    mixed = [found[i] for i in shuffled(len(found), SEED)]
    train = [each for each in mixed if each[0] in of_train]
    test = [each for each in mixed if each[0] not in of_train]
    return train[:TRAIN_ROWS], test[:TEST_ROWS]


def topic(name: str) -> str:
    """Return what a prompt is about, by its name."""
    return TOPICS.get(name.partition("/")[0].partition("-")[0], OTHER)


def write_files(folder: Path, chosen: list[Prompt]) -> None:
    """Copy clips to FOLDER/TOPIC/LANGUAGE-NAME, with dashes for the slashes of the name."""
    for name in {*TOPICS.values(), OTHER}:
        (folder / name).mkdir(parents=True)
    root = folder_of_prompts()
    for name, file in chosen:
        language = file.relative_to(root).parts[0].partition("_")[0]
        shutil.copyfile(file, folder / topic(name) / f"{language}-{name.replace('/', '-')}")


def write_encoder(folder: Path) -> None:
    """Write Whisper's encoder without a head, which each run initializes by its seed."""
    sizes = {**whisper_tiny.CONFIG, "decoder_layers": 0}
    config = WhisperConfig(**sizes, max_source_positions=50 * SECONDS)
    model = WhisperForAudioClassification(config)
    model.encoder.load_state_dict(whisper_tiny.load(SECONDS).get_encoder().state_dict())
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    model.save_pretrained(folder, state_dict=weights)
    whisper_tiny.feature_extractor(SECONDS).save_pretrained(folder)
