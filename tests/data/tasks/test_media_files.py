"""Reading image and audio files."""

from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from petl.data.tasks.media_files import as_float, gray_image, read_audio, read_image
from petl.errors import InputError


def tone(rate, hertz=440.0, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("uint8", lambda x: np.rint(x * 128 + 128).astype(np.uint8)),
        ("int16", lambda x: np.rint(x * 2**15).astype(np.int16)),
        ("int32", lambda x: np.rint(x * 2**31).astype(np.int32)),
        ("float32", lambda x: x.astype(np.float32)),
    ],
)
def test_samples_of_every_dtype_give_the_same_wave(tmp_path, kind, numbers):
    wavfile.write(tmp_path / "a.wav", 16000, numbers(tone(16000)))
    found = read_audio(tmp_path / "a.wav", 16000, seconds=10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tone(16000), atol=1 / 128 if kind == "uint8" else 2e-5)


def test_extreme_samples_stay_within_the_range():
    assert as_float(np.array([-(2**15), 2**15 - 1], np.int16)).tolist() == [-1.0, 1 - 2.0**-15]
    assert as_float(np.array([0, 128, 255], np.uint8)).tolist() == [-1.0, 0.0, 127 / 128]


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_resampling_keeps_the_tone(tmp_path, rate):
    wavfile.write(tmp_path / "a.wav", rate, tone(rate).astype(np.float32))
    found = read_audio(tmp_path / "a.wav", 16000, seconds=10)
    assert abs(len(found) - 8000) <= 1
    inside = slice(500, 7500)  # at its ends the filter sees silence
    np.testing.assert_allclose(found[inside], tone(16000)[inside], atol=2e-3)


def test_channels_are_averaged_and_long_clips_are_truncated(tmp_path):
    left, right = tone(8000), tone(8000, hertz=200)
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([left, right], 1).astype(np.float32))
    found = read_audio(tmp_path / "a.wav", 8000, seconds=0.25)
    np.testing.assert_allclose(found, ((left + right) / 2)[:2000], atol=1e-6)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    wavfile.write(tmp_path / "empty.wav", 8000, np.zeros(0, np.int16))
    wavfile.write(tmp_path / "nan.wav", 8000, np.array([0, np.nan, np.inf], np.float32))
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "deep.png")
    sound = partial(read_audio, sampling_rate=8000, seconds=1)
    for name, read in (("empty.wav", sound), ("nan.wav", sound), ("deep.png", read_image)):
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)


def test_other_audio_formats_name_the_package_that_reads_them(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(InputError, match=r"soundfile.*\[audio\]"):
        read_audio(tmp_path / "a.flac", 8000, seconds=1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}")
    assert (found.mode, found.size) == ("RGB", (3, 2))
    assert np.asarray(found).min() == 255


def test_images_are_rotated_by_their_exif_orientation(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    notes = Image.Exif()
    notes[0x0112] = 6  # orientation: turn clockwise to see it upright
    image.save(tmp_path / "a.png", exif=notes)
    found = read_image(tmp_path / "a.png")
    assert found.size == (2, 4)
    assert found.getpixel((1, 0)) == (255, 0, 0)


def test_gray_levels_are_equal_in_all_channels():
    assert np.asarray(gray_image([[0, 255], [7, 8]])).tolist() == [
        [[0, 0, 0], [255, 255, 255]],
        [[7, 7, 7], [8, 8, 8]],
    ]


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 2**32 - 1])
def test_a_sampling_rate_of_no_sound_is_refused(tmp_path, rate):
    file = tmp_path / "a.wav"
    wavfile.write(file, 16000, np.zeros(100, np.int16))
    content = bytearray(file.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(InputError):
        read_audio(file, 8000, seconds=1)
