"""Cards have metadata of the Hub and name no folder of the machine that trained."""

import json

import pytest
import yaml
from image_text_fixtures import PAIRS, built
from peft import LoraConfig
from tiny_tokenizers import word_tokenizer

from petl.data.models.loading import save_processor
from petl.data.models.sources import read_source
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.token_classification import TokenClassification
from petl.system.files.paths import OnHub, origin_of
from petl.training.runs.card_code import TEXT, Usage, placed
from petl.training.runs.model_card import CardInfo, known_base, model_card, without_folders

pytest_plugins = ["export_fixtures", "hub_server", "training_fixtures"]

TASKS = {
    "minilm": Classification(classes=["a", "b"], max_length=8),
    "smollm2": CausalLM(max_length=8, chat=True),
}


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_packaged_models_have_their_names_on_the_hub(name, base):
    source = read_source({"name": name, "source": name})
    config = LoraConfig(base_model_name_or_path="/home/ada/site-packages/model")
    it = CardInfo(TASKS[name], source, config, known_base(source, None))
    card = model_card(it)
    assert metadata(card)["base_model"] == base
    assert metadata(card)["library_name"] == "peft"
    assert f'base_model = "{base}"\n' in card
    assert "/home/ada" not in card
    assert ("4-bit weights" in card) == (name == "smollm2")


def test_the_card_says_what_was_lost_on_other_text():
    source = read_source({"name": "smollm2", "source": "smollm2"})
    lost = {"loss_before": 3.2, "loss_after": 3.331, "lost": 0.131, "ratio": 1.14, "rows": 9}
    more = {"kind": "language", "tokens": 900, "divergence": 0.2, "agreement": 0.913}
    scores = {"after": {"loss": 1.5}, "retained": {**lost, **more, "interval": [0.09, 0.172]}}
    it = CardInfo(TASKS["smollm2"], source, LoraConfig(), known_base(source, None), scores=scores)
    (line,) = (line for line in model_card(it).splitlines() if "other text" in line)
    for part in ("3.20", "3.33", "+0.13", "0.09 to 0.17", "+14 %", "91 %"):
        assert part in line


def test_of_a_path_only_the_last_part_is_shown():
    words = {
        "data.train=/home/ada/a.csv": "data.train=a.csv",
        "data.train=[~/x/a.csv,../b.csv]": "data.train=[a.csv,b.csv]",
        "model.path=C:\\Users\\ada\\model": "model.path=C:model",
        "--config-dir": "--config-dir",
        "+method=lora": "+method=lora",
    }
    for word, shown in words.items():
        assert without_folders(word) == shown


def test_a_command_with_an_open_quote_is_left_out(lora_run):
    source = read_source({"name": "minilm", "source": "minilm"})
    known = json.loads((lora_run.path / "environment.json").read_text())
    for command, is_shown in (("petl train a=b", True), ("petl train data.train='it", False)):
        environment = {**known, "command": command}
        it = CardInfo(TASKS["minilm"], source, LoraConfig(), None, environment=environment)
        assert ("petl train" in model_card(it)) == is_shown


def test_the_command_keeps_names_on_the_hub_and_templates():
    source = read_source({"name": "minilm", "source": "minilm"})
    words = "/v/petl train model.name=a/b data.train=/x/y.csv 'data.text={c}/{d}' --config-dir /z/k"
    it = CardInfo(TASKS["minilm"], source, LoraConfig(), None, environment=environment(words))
    assert (
        "petl train model.name=a/b data.train=y.csv 'data.text={c}/{d}' --config-dir k\n"
        in model_card(it)
    )


def environment(command):
    return {"command": command, "device": "cpu", "processor": "x", "packages": {"torch": "2"}}


def test_a_folder_in_the_cache_of_the_hub_has_a_name(tmp_path):
    folder = tmp_path / "models--ada--base" / "snapshots" / "abc"
    assert origin_of(folder) == OnHub("ada/base", "abc")
    assert origin_of(tmp_path) is None


def test_the_code_for_tags_reads_tokens_as_the_training_did():
    task = TokenClassification(classes=["O", "B"], max_length=64)
    usage = Usage(task, read_source({"name": "minilm", "source": "minilm"}), None, "petl.load")
    names = {"tokenizer": word_tokenizer("this", "text.")}
    exec(usage.prediction.split("with torch")[0], names)
    words = TEXT.strip('"').split()
    encoded = task.encode_rows(names["tokenizer"], {"tokens": [words]})
    assert names["inputs"]["input_ids"].tolist() == encoded["input_ids"]


def test_the_adapters_place_in_the_code_can_be_set():
    text = placed('\nadapter = "."  # this folder\nx\nmerged = "."  # this folder\n', "ada/verbs")
    assert text == '\nadapter = "ada/verbs"\nx\nmerged = "ada/verbs"\n'


@pytest.mark.parametrize("kind", ["llava", "florence2", "t5gemma2"])
def test_the_lines_for_images_print_the_whole_answer(kind, tmp_path, monkeypatch, capsys):
    model, processor = built(kind)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    settings = {"name": "path", "source": "path", "path": str(tmp_path), "dtype": "float32"}
    apart = True if kind in PAIRS else None
    task = ImageText(max_length=256, apart=apart, generate=6)
    save_processor(settings, task, tmp_path)
    generate, answers = type(model).generate, []

    def kept(*args, **words):
        answers.append(generate(*args, **words)[0])
        return answers[-1][None]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(model), "generate", kept)
    exec(Usage(task, read_source(settings), None, "").code, {})
    answer = answers[0] if apart else answers[0][-6:]
    assert capsys.readouterr().out.strip("\n") == processor.decode(answer, skip_special_tokens=True)
