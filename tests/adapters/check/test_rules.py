"""`petl.check`: healthy folders are fine, and each class of sick ones is found by its id."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checked_folders as folders
import pytest
import torch
from architectures.small import Type
from contract_cases import OWN, adopted, models_of
from contract_cases import own as own_case
from hub_server import OWNER
from huggingface_hub import try_to_load_from_cache
from mixtures import MODELS, mixture
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES

import petl
from petl.system import patterns
from petl.testing.case import stir

pytest_plugins = ["hub_server"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def ids(folder, *severities, **given) -> set[str]:
    severities = severities or ("warning", "error")
    return {found.id for found in petl.check(folder, **given) if found.severity in severities}


@pytest.mark.parametrize("layout", folders.LAYOUTS)
@pytest.mark.parametrize("config", folders.CONFIGS)
def test_a_healthy_folder_has_no_warning(config, layout):
    checked = petl.check(folders.healthy(config, layout))
    assert checked.ok, [*checked]
    assert "3 blocks" in checked.kind or config == "one layer"
    # without a tokenizer nothing is said about templates
    unknown = {name for name, _ in checked.not_checked}
    assert ("stop.token" in unknown) == (layout == "peft")


@pytest.mark.cells(6)
@pytest.mark.parametrize("method", OWN)
def test_what_a_method_of_petl_saves_is_healthy(method, tmp_path):
    own_case(method, models_of(method)[0]).wrap_stirred().save_pretrained(tmp_path)
    checked = petl.check(tmp_path)
    assert checked.ok, [*checked]
    assert checked.made_by.startswith("petl ")
    assert "import petl" not in checked.kind


@pytest.mark.parametrize("method", ["adalora", "ia3", "ln_tuning", "vblora", "vera"])
def test_other_methods_of_peft_are_healthy(method, tmp_path):
    adopted(method, "llama").wrap_stirred().save_pretrained(tmp_path)
    checked = petl.check(tmp_path)
    assert checked.ok, [*checked]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},  # of experts, names of parameters alone
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": ["0.self_attn.q_proj"], "target_modules": ["q_proj", "v_proj"]},
        {"exclude_modules": r".*\.0\..*q_proj", "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["norm"]},  # and those of the blocks, whose names end so
        {"layers_to_transform": 0},
        {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_experts_embeddings_and_patterns_are_healthy(fields, tmp_path):
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
    stir(get_peft_model(FAMILIES["mixtral"].build(), config)).save_pretrained(tmp_path)
    checked = petl.check(tmp_path)
    assert checked.ok, [*checked]
    # not that of all experts
    assert checked.kind.partition(",")[0] in ("LoRA r 8", "rsLoRA r 2 to 8")


@pytest.mark.parametrize("kind", ["deepseek_v3", "jamba"])
def test_blocks_of_a_hybrid_have_one_kind_of_layer_each(kind, tmp_path):
    """Dense blocks have what those of experts, of state spaces and of attention have not."""
    base = mixture(kind) if kind in MODELS else Type("causal", kind).build()
    model = stir(petl.wrap(base, "lora", target_modules="block-linear", r=2))
    model.save_pretrained(tmp_path)
    checked = petl.check(tmp_path)
    assert checked.ok, [*checked]
    # but one that has lost a tensor of an expert's block is still found
    tensors = load_file(tmp_path / WEIGHTS)
    lost = [name for name in tensors if ".experts." in name and "lora_B" in name]
    save_file({n: t for n, t in tensors.items() if n not in lost}, tmp_path / WEIGHTS)
    assert not petl.check(tmp_path).ok


def test_of_a_repository_only_the_adapter_is_downloaded(hub_server):
    name = f"{OWNER}/adapter"
    hub_server.add(name, folders.healthy("lora", "llama-factory"))
    checked = petl.check(name)
    assert checked.ok, [*checked]
    assert checked.made_by == "LLaMA-Factory (README.md)"
    cached = Path(try_to_load_from_cache(name, CONFIG)).parent
    assert "training_args.bin" not in {file.name for file in cached.iterdir()}


# Sick folders


def config(**fields):
    return lambda folder: folders.change(folder, **fields)


def without(*names):
    def remove(folder: Path) -> None:
        kept = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in kept.items() if k not in names}))

    return remove


def tensors(edit):
    """Edit the tensors of a folder: names to tensors."""

    def write(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file({k: v.contiguous() for k, v in edit(found).items()}, folder / WEIGHTS)

    return write


def each(part, make):
    return tensors(lambda found: {k: make(v) if part in k else v for k, v in found.items()})


def renamed(old, new):
    return tensors(lambda found: {k.replace(old, new): v for k, v in found.items()})


def file(name, content=b""):
    return lambda folder: (folder / name).write_bytes(content)


def tokenizer(template=folders.CHATML, **settings):
    return lambda folder: folders.save_tokenizer(folder, template, **settings)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def nan(tensor):
    tensor.view(-1)[0] = torch.nan
    return tensor


def embedded(folder: Path) -> None:
    """The tokenizer has a token more than the embedding has rows."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 300, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))


def newer(folder: Path) -> None:
    os.utime(folder / "checkpoint-3" / WEIGHTS, (2e9, 2e9))


def of_blocks(folder: Path, **counts) -> None:
    """Write a config of the base there, which says how many blocks it has."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(counts))


def cut_off(**counts):
    """The last of three blocks has no tensor, and something says that it is there."""

    def damage(folder: Path) -> None:
        tensors(lambda found: {k: v for k, v in found.items() if "layers.2." not in k})(folder)
        config(**counts)(folder) if "layers_to_transform" in counts else of_blocks(folder, **counts)

    return damage


BLOCK_1 = "layers.1.self_attn.v_proj.lora"
SICK = {
    "unknown method": ("format.type", config(peft_type="LORAX")),
    "text for a rank": ("format.values", config(r="8")),
    "rank 0": ("format.values", config(r=0)),
    "no regular expression": ("format.values", config(target_modules="((")),
    "none for a rank": ("format.values", config(rank_pattern={"(((": 4})),
    "number for a pattern": ("format.values", config(layers_pattern=[5])),
    "mlx": ("format.layout", config(fine_tune_type="lora", lora_parameters={"rank": 8})),
    "torchtune": (
        "format.layout",
        tensors(
            lambda found: {
                k.removeprefix("base_model.model.model.").lower(): v for k, v in found.items()
            }
        ),
    ),
    "kohya": (
        "format.layout",
        tensors(
            lambda found: {f"lora_unet_{i}.lora_up.weight": v for i, v in enumerate(found.values())}
        ),
    ),
    "diffusers": ("format.layout", renamed("base_model.model.model", "unet")),
    "pickle": ("format.weights", pickled),
    "truncated": ("format.weights", lambda f: os.truncate(f / WEIGHTS, 4000)),
    "empty": ("format.weights", tensors(lambda found: {})),
    "integers": ("format.weights", each("lora_", lambda v: (100 * v).to(torch.int8))),
    "code": ("format.code", config(megatron_core="os")),
    "no prefix": ("keys.prefix", renamed("base_model.model.", "")),
    "compiled": ("keys.prefix", renamed("base_model.model.", "base_model.model._orig_mod.")),
    "wrapped twice": ("keys.prefix", renamed("base_model.", "base_model.model.base_model.")),
    "literal": ("keys.literal", config(target_modules="all-linear")),
    "other target": ("keys.target", config(target_modules=["q_proj"])),
    "other block": ("keys.target", config(layers_to_transform=[0])),
    "misspelt target": ("keys.absent", config(target_modules=["q_proj", "v_proj", "v_porj"])),
    "head not saved": ("keys.absent", config(modules_to_save=["score"])),
    "classifier without head": ("keys.head", config(task_type="SEQ_CLS")),
    "no magnitudes": ("keys.pairs", config(use_dora=True)),
    "half of a pair": (
        "keys.pairs",
        tensors(lambda found: {k: v for k, v in found.items() if f"{BLOCK_1}_B" not in k}),
    ),
    "no product": ("keys.pairs", each(f"{BLOCK_1}_B", lambda v: v[:, :4])),
    "other rank": ("keys.ranks", config(r=4)),
    "lost block": (
        "keys.blocks",
        tensors(lambda found: {k: v for k, v in found.items() if BLOCK_1 not in k}),
    ),
    "cut off": ("keys.end", cut_off(num_hidden_layers=3)),
    "cut off, as GPT-2 counts": ("keys.end", cut_off(n_layer=3)),
    "cut off, in a part for text": ("keys.end", cut_off(text_config={"num_hidden_layers": 3})),
    "cut off, with named blocks": ("keys.end", cut_off(layers_to_transform=[0, 1, 2])),
    "no effect": ("dead.all", each("lora_B", torch.zeros_like)),
    "one layer dead": ("dead.some", each(f"{BLOCK_1}_B", torch.zeros_like)),
    "nan": ("dead.finite", each(f"{BLOCK_1}_A", nan)),
    "constant": ("dead.rows", each(f"{BLOCK_1}_A", torch.ones_like)),
    "no alpha": ("scale.alpha", without("lora_alpha")),
    "alpha 0": ("scale.alpha", config(lora_alpha=0)),
    "alpha below 0": ("scale.alpha", config(lora_alpha=-16)),
    "alpha of a layer below 0": ("scale.alpha", config(alpha_pattern={"q_proj": -16})),
    "other prefix": ("base.fits", renamed("_model.model.", "_model.model.language_model.")),
    "other width": ("base.fits", each("lora_A", lambda v: torch.cat([v, v], 1))),
    "changed weights": ("format.changed", each(f"{BLOCK_1}_B", lambda v: 1.001 * v)),
    "other alpha": ("scale.config", config(lora_alpha=64)),
    "other scale": ("scale.config", config(alpha_pattern={"q_proj": 64})),
    "float16": ("dtype.range", each(f"{BLOCK_1}_A", lambda v: torch.full_like(v, 64000).half())),
    "tokens beyond": ("vocabulary.tokens", embedded),
    "indices beyond": ("vocabulary.indices", config(trainable_token_indices=[400])),
    "other template": (
        "template.base",
        tokenizer(folders.CHATML.replace("m.role", "m.role | upper")),
    ),
    "endless template": ("template.fails", tokenizer("{{ 9 ** 9 ** 9 }}")),
    "two starts": ("template.bos", tokenizer("<s>{{ bos_token }}" + folders.CHATML)),
    "other end": ("stop.token", tokenizer(folders.CHATML.replace("im_end", "im_start"))),
    "no answer": ("stop.token", tokenizer("{{ messages[0].content }}")),
    "optimizer": ("leftovers.files", file("optimizer.pt")),
    "merged model": ("leftovers.files", file("model.safetensors")),
    "two adapters": ("leftovers.files", file("adapter_model.bin")),
    "newer checkpoint": ("leftovers.newer", newer),
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_folder_is_found_by_its_class(case, tmp_path):
    wanted, damage = SICK[case]
    layout = "petl" if wanted in ("scale.config", "format.changed") else "llama-factory"
    folder = shutil.copytree(folders.healthy("lora", layout), tmp_path / "adapter")
    damage(folder)
    found = {each.id: each for each in petl.check(folder)}
    assert wanted in found
    assert found[wanted].severity != "note"
    assert found[wanted].what
    assert found[wanted].remedy


@pytest.mark.parametrize("layout", ["peft", "petl"])
@pytest.mark.parametrize("name", folders.CONFIGS)
def test_all_blocks_of_a_base_of_known_size_are_there(name, layout, tmp_path):
    folder = shutil.copytree(folders.healthy(name, layout), tmp_path / "adapter")
    of_blocks(folder, num_hidden_layers=3, hidden_size=32)
    assert petl.check(folder).ok


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": ["layers.2.self_attn.q_proj", "layers.2.self_attn.v_proj"]},
        {"target_modules": r".*layers\.[01]\..*(q|v)_proj"},
        {"layers_to_transform": [0, 1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_upper_blocks_that_the_config_leaves_out_are_not_missed(changes, tmp_path):
    folder = shutil.copytree(folders.healthy("lora", "llama-factory"), tmp_path / "adapter")
    cut_off(num_hidden_layers=3)(folder)
    assert "keys.end" in ids(folder)
    config(**changes)(folder)
    assert "keys.end" not in ids(folder)


@pytest.mark.parametrize("counts", [None, {"num_hidden_layers": 3, "is_encoder_decoder": True}])
def test_where_nothing_tells_the_number_of_blocks_a_command_does(counts, tmp_path):
    folder = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    if counts:
        of_blocks(folder, **counts)
    reason = dict(petl.check(folder).not_checked)["keys.end"]
    assert f"petl check {folder} --base" in reason


@pytest.mark.parametrize(("kind", "part"), [("dora", "magnitude"), ("head", "score")])
def test_zeros_in_place_of_weights_of_the_base_are_an_error(kind, part, tmp_path):
    folder = shutil.copytree(folders.healthy(kind, "llama-factory"), tmp_path / "adapter")
    each(part, torch.zeros_like)(folder)
    assert ids(folder) == {"dead.zero"}


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def in_shards(base: Path) -> None:
    no_weights(base)
    folders.tiny().save_pretrained(base, max_shard_size="20KB")
    assert len([*base.glob("*.safetensors")]) > 1


def of_four_bits(base: Path) -> None:
    found = load_file(base / "model.safetensors")
    packed = {k: v.flatten()[:1].to(torch.uint8) for k, v in found.items()}
    save_file(packed, base / "model.safetensors")


@pytest.mark.every_cell
@pytest.mark.parametrize("damage", ["other prefix", "other width", None])
@pytest.mark.parametrize("form", [no_weights, in_shards, of_four_bits])
def test_a_base_on_this_machine_tells_names_and_sizes(form, damage, tmp_path):
    folder = shutil.copytree(folders.healthy("lora", "llama-factory"), tmp_path / "adapter")
    form(shutil.copytree(folders.base(), tmp_path / "base"))
    folders.change(folder, base_model_name_or_path=str(tmp_path / "base"))
    if damage is not None:
        SICK[damage][1](folder)
    # of packed weights, sizes are not known without the model
    is_known = damage is not None and (form, damage) != (of_four_bits, "other width")
    assert ids(folder) == ({"base.fits"} if is_known else set())
    # the model, which takes seconds to build, was not asked
    assert ("base.fits" in dict(petl.check(folder).not_checked)) == (not is_known)


def test_a_module_that_the_base_has_and_its_files_do_not_name_fits(tmp_path):
    """A tied head is in no file."""
    base = folders.tiny(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    targets = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    stir(get_peft_model(base, targets)).save_pretrained(tmp_path / "adapter")
    folders.change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    assert ids(tmp_path / "adapter") == {"tied.merge"}


def test_a_base_in_the_folder_of_the_adapter_is_not_built(tmp_path):
    """It may be a stranger's: of a thousand million blocks, say."""
    folder = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    shutil.copytree(folders.base(), folder / "base")
    SICK["other width"][1](folder)
    assert "base.fits" in dict(petl.check(folder).not_checked)


def test_notes_do_not_count(tmp_path):
    folder = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    each(f"{BLOCK_1}_B", lambda v: 1e5 * v)(folder)
    checked = petl.check(folder)
    assert {f.id for f in checked} == {"dead.norm"}
    assert checked.ok


@pytest.mark.parametrize(
    ("kind", "engine", "found"),
    [
        ("lora", "sglang", False),
        ("rslora", "sglang", True),
        ("rslora", "vllm", False),
        ("dora", "vllm", True),
        ("bias", "llama.cpp", True),
        ("rank_pattern", "vllm", True),
        ("rank_pattern", "peft", False),
    ],
)
def test_an_engine_that_was_asked_for_is_an_error(kind, engine, found):
    assert ("engine.asked" in ids(folders.healthy(kind, "peft"), engine=engine)) == found
    # without one, it is a note
    noted = [n for n in petl.check(folders.healthy(kind, "peft")) if n.id == "engine.others"]
    assert any(engine in note.what.lower() for note in noted) == found


@pytest.mark.parametrize(("engine", "wanted"), [(None, "tied.merge"), ("llama.cpp", "tied.gguf")])
def test_a_tied_head_is_told_by_the_config_of_the_base(engine, wanted, tmp_path):
    base = shutil.copytree(folders.base(), tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    folder = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    renamed("base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.lm_head")(folder)
    targets = ["q_proj", "v_proj", "lm_head"]
    folders.change(folder, base_model_name_or_path=str(base), target_modules=targets)
    assert wanted in ids(folder, engine=engine)


def test_chats_without_a_template_are_told(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n{"text": "a"}\n{"messages": 5}\n{"messages": ["a"]}\n')
    checked = petl.check(folders.healthy("lora", "peft"), data=rows)
    assert "1 of 4 rows" in next(f.what for f in checked if f.id == "template.missing")


@pytest.mark.parametrize(("part", "is_left_out"), [("p.text", False), ("", True)])
def test_a_template_of_contents_in_parts_writes_answers(part, is_left_out, tmp_path):
    """Those of models for images and text take no content that is a text alone."""
    shutil.copytree(folders.healthy("lora", "petl"), tmp_path / "adapter")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ PART }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    text = template.replace("PART", part or "''")
    folders.save_tokenizer(tmp_path / "adapter", template=text)
    found = [f.what for f in petl.check(tmp_path / "adapter") if f.id.startswith("stop")]
    assert any("leaves out the assistant" in what for what in found) == is_left_out


# Reading


def test_no_model_library_is_imported_without_a_base(tmp_path):
    unknown = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    folders.change(unknown, peft_type="LORAX")
    script = (
        "import sys, petl; [petl.check(folder) for folder in sys.argv[1:]]; "
        "print({'torch', 'peft', 'transformers'} & {*sys.modules})"
    )
    words = [sys.executable, "-c", script, folders.healthy("lora", "petl"), unknown]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_run_is_checked_by_its_adapter(tmp_path):
    shutil.copytree(folders.healthy("lora", "petl"), tmp_path / "adapter")
    assert petl.check(tmp_path).ok


def test_rows_to_check_with_are_needed(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(petl.InputError, match=r"rows\.jsonl"):
        petl.check(folders.healthy("lora", "peft"), data=tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b"\xff", b'{"peft_type": "LORA", "r": 8, "r": 9}', b"[" * 100_000],
)
def test_a_config_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(petl.InputError, match=CONFIG):
        petl.check(tmp_path)


def test_links_that_lead_out_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = shutil.copytree(folders.healthy("lora", "peft"), tmp_path / "adapter")
    for name in (WEIGHTS, "tokenizer_config.json", "base_fingerprint.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "chat_template.jinja")
    links = [found.where for found in petl.check(folder) if found.id == "format.link"]
    assert {*links} == {
        WEIGHTS,
        "tokenizer_config.json",
        "base_fingerprint.json",
        "chat_template.jinja",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.+)+!"},
        {"target_modules": ["("]},
        {"rank_pattern": {"(": 8}},
        {"rank_pattern": []},
        {"layers_to_transform": "all"},
        {"trainable_token_indices": {"embed": 3}},
        {"base_model_name_or_path": "//host/share"},
        {"base_model_name_or_path": "\0"},
        {"modules_to_save": [[]]},
        {"peft_type": ["LORA"]},
        {"lora_alpha": float("nan")},
        {"r": 10**30},
    ],
)
def test_hostile_values_are_told_or_not_checked(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    folder = shutil.copytree(folders.healthy("lora", "unsloth"), tmp_path / "adapter")
    folders.change(folder, **fields)
    try:
        checked = petl.check(folder)
    except petl.InputError:
        return
    assert not checked.ok or "base_model_name_or_path" in fields or checked.not_checked


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("base/config.json", '{"vocab_size": "x", "eos_token_id": [[1]]}'),
        ("base/generation_config.json", '{"eos_token_id": [[1], "x"]}'),
        (
            "tokenizer_config.json",
            '{"chat_template": 3, "eos_token": [], "added_tokens_decoder": 1}',
        ),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [[[[{'),
        ("tokenizer.json", '"added_tokens"' + "[" * 100_000),
        ("added_tokens.json", '{"a": "b", "c": [1]}'),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("base_fingerprint.json", '{"version": 2, "layers": {"a": {"scale": "x"}}}'),
        ("base_fingerprint.json", "[1]"),
        ("chat_template.jinja", "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}"),
        ("chat_template.jinja", "{{ messages.__class__.__mro__ }}"),
        ("chat_template.jinja", "{{ raise_exception('no') }}"),
        ("chat_template.jinja", "{{ messages[7].content.x }}"),
        ("chat_template.jinja", "{% include 'x' %}"),
        ("README.md", "\0" * 1000),
    ],
)
def test_hostile_files_end_in_findings_or_reasons(name, content, tmp_path):
    folder = shutil.copytree(folders.healthy("lora", "unsloth"), tmp_path / "adapter")
    (folder / "base").mkdir()
    (folder / name).write_text(content)
    petl.check(folder)  # raises nothing: what fails is named by rules
