"""The tokenizer and template that an adapter was trained with, whatever the base has now."""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from image_text_fixtures import built
from peft import LoraConfig

from petl.cli import main
from petl.data.models.loading import save_processor
from petl.data.models.saved_processor import load_saved_processor
from petl.data.tasks.image_text import ImageText
from petl.generation.inference.loading import load_language_model
from petl.generation.serving.models import load_served

pytest_plugins = ["writer_fixtures"]
TURN = [{"role": "user", "content": "Hi"}]
OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture
def changed(writers, tmp_path):
    """An adapter with the template of its training, on a base model with another one now."""
    shutil.copytree(writers.folder / "llama", tmp_path / "base")
    shutil.copytree(writers.folder / "lora", tmp_path / "lora")
    for file in (writers.folder / "llama").iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, tmp_path / "lora")
    config = tmp_path / "lora/adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": str(tmp_path / "base")}))
    (tmp_path / "base/chat_template.jinja").write_text(OTHER)
    return tmp_path


def trained(writers):
    return load_language_model(writers.folder / "llama").encode(TURN)


def test_answers_are_read_with_the_template_of_training_and_one_line_says_so(
    writers, changed, caplog
):
    with caplog.at_level(logging.WARNING):
        language = load_language_model(changed / "lora")
    assert language.encode(TURN) == trained(writers)
    lines = [each.message for each in caplog.records if "differs now" in each.message]
    assert len(lines) == 1
    assert lines[0].startswith("chat template of the base model base differs now")
    assert load_language_model(changed / "base").encode(TURN) != trained(writers)


def test_each_served_adapter_has_its_own_and_the_base_model_that_of_now(writers, changed):
    shutil.copytree(changed / "lora", changed / "second")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (changed / "second" / name).unlink(missing_ok=True)
    served = load_served({name: str(changed / name) for name in ("lora", "second")})
    ids = {name: each.language.encode(TURN) for name, each in served.items()}
    now = load_language_model(changed / "base").encode(TURN)
    assert ids == {"lora": trained(writers), "second": now, "base": now}


def test_no_line_is_printed_while_nothing_differs(writers, changed, caplog):
    shutil.copy(writers.folder / "llama/chat_template.jinja", changed / "base")
    with caplog.at_level(logging.WARNING):
        load_language_model(changed / "lora")
    assert not caplog.records


def test_a_merged_model_has_the_template_of_training(changed):
    assert main.main(["merge", str(changed / "lora"), str(changed / "merged")]) == 0
    template = Path("chat_template.jinja")
    assert (changed / "merged" / template).read_text() == (changed / "lora" / template).read_text()


def test_a_tokenizer_that_cannot_be_read_is_named(changed):
    (changed / "lora/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="lora"):
        load_language_model(changed / "lora")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="loads the part for videos, too")
def test_the_settings_of_a_part_for_videos_that_is_left_out_are_saved_with_the_rest(tmp_path):
    for part in built("qwen2_5_vl"):
        part.save_pretrained(tmp_path / "base")
    settings = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4}
    file = "video_preprocessor_config.json"
    (tmp_path / "base" / file).write_text(json.dumps(settings))
    of_base = {"name": "path", "source": "path", "path": str(tmp_path / "base"), "dtype": "float32"}
    save_processor(of_base, ImageText(max_length=64), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / file).read_text()) == settings
    LoraConfig().save_pretrained(tmp_path / "adapter")
    # and from an adapter into what is made of it
    own = load_saved_processor(of_base, ImageText(max_length=64), tmp_path / "adapter")
    save_processor(of_base, ImageText(max_length=64), tmp_path / "merged", own)
    assert json.loads((tmp_path / "merged" / file).read_text()) == settings
