"""The parts of a model for images and text, and where adapters go by default."""

import copy
import logging

import pytest
from image_text_fixtures import built
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import petl
from petl import testing
from petl.core.model.linear import linear_names
from petl.core.model.names import PRESETS, language_path, part_in
from petl.system.towers import is_beside_text

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
SEEN = {**SIZES, "image_size": 16, "patch_size": 8}


def llava():
    text, vision = LlamaConfig(**SIZES, num_key_value_heads=2), CLIPVisionConfig(**SEEN)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    )


def qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**SIZES, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def git():
    return GitForCausalLM(GitConfig(**SIZES, vision_config=SEEN))


PATHS = {
    llava: ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    qwen: ("model.language_model.", "model.visual.blocks.", "model.visual.merger."),
    git: ("git.encoder.", "git.image_encoder.", None),
}


def adapted(model) -> list[str]:
    return [name.removeprefix("base_model.model.") for name in testing.tuner_layers(model)]


@pytest.mark.parametrize("build", PATHS)
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {}),
        ("lora", {"target_modules": "block-linear"}),
        ("lora", {"target_modules": "attention-linear"}),
        ("mola", {}),
    ],
)
def test_adapters_stand_in_the_language_model_and_the_log_says_so(build, method, fields, caplog):
    with caplog.at_level(logging.INFO):
        names = adapted(petl.wrap(build(), method, **fields))
    assert names
    assert all(name.startswith(PATHS[build][0]) for name in names)
    assert "no adapter on the part 'vision'" in caplog.text


@pytest.mark.parametrize("build", PATHS)
@pytest.mark.parametrize("part", ["language", "vision", "projector"])
def test_each_part_is_a_preset(build, part):
    path = PATHS[build][["language", "vision", "projector"].index(part)]
    if path is None:
        return
    names = adapted(petl.wrap(build(), "pst", target_modules=part))
    assert names
    assert all(name.startswith(path) for name in names)


def test_blocks_without_an_adapter_are_said_where_the_projector_has_one(caplog):
    with caplog.at_level(logging.INFO):
        petl.wrap(llava(), "lora", target_modules="projector")
    (line,) = [m for m in caplog.messages if "of the block weights" in m]
    assert line.startswith("adapters reach 0.0 %")
    assert "'language'" in line
    assert "'vision'" in line


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["florence2", "t5gemma2"])
def test_in_encoder_decoders_the_vision_tower_is_left_out_too_and_said(kind, caplog):
    def model():
        return copy.deepcopy(built(kind)[0])

    with caplog.at_level(logging.INFO):
        names = adapted(
            petl.wrap(copy.deepcopy(built(kind)[0]), "lora", target_modules="block-linear")
        )
    assert {"encoder", "decoder"} <= {part for name in names for part in name.split(".")}
    assert not any("vision" in name for name in names)
    assert "no adapter on the part 'vision'" in caplog.text
    names = adapted(petl.wrap(model(), "lora", target_modules="vision"))
    assert names
    assert all(".vision_tower." in name for name in names)


def test_towers_for_sound_belong_to_no_part():
    """As in Phi-4 multimodal, where both towers are inside of the decoder."""
    path = "model.embed_tokens_extend.{}_embed.encoder.encoders.0.self_attn.q_proj"
    assert part_in(path.format("audio"), "model") == "other"
    assert part_in(path.format("image"), "model") == "vision"
    assert part_in("model.layers.0.self_attn.q_proj", "model") == "language"


def test_models_of_one_part_have_no_language_path():
    for build in testing.TINY_MODELS.values():
        assert language_path(build.base()) is None
    assert {"language", "vision", "projector"} <= PRESETS.keys()


def test_a_classifier_of_images_has_one_part():
    parts = CLIPConfig(text_config=SIZES, vision_config=SEEN)
    model = petl.wrap(CLIPForImageClassification(parts), "lora", target_modules="block-linear")
    assert len(testing.tuner_layers(model)) == 2 * 6


def test_pefts_all_linear_keeps_its_meaning():
    names = adapted(petl.wrap(llava(), "lora", target_modules="all-linear"))
    assert all(any(n.startswith(path) for n in names) for path in PATHS[llava])


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])
def test_names_alone_tell_towers_from_the_language_model(kind):
    model = built(kind)[0]
    path = language_path(model)
    for name in linear_names(model):
        if name != "lm_head":
            assert is_beside_text(name) == (part_in(name, path) != "language"), name
