"""What a base model's folder says of pooling, normalization and prompts, in both forms."""

from types import SimpleNamespace

import pytest

from petl.data.models.sources import read_source
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.base_folder import Folder
from petl.errors import InputError

POOLING, NORMALIZE = (
    {"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"}
    for i, name in enumerate(("Pooling", "Normalize"), 1)
)
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
SOFTMAX = {
    "in_features": 4,
    "out_features": 2,
    "activation_function": "torch.nn.modules.activation.Softmax",
}
TRANSFORMER = {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""}


def taken(files=None, is_decoder=False, has_decoder=False, **fields) -> Retrieval:
    files = files or {}
    task = Retrieval(**fields)
    task.take_base(
        SimpleNamespace(json_file=files.get, is_decoder=is_decoder, has_decoder=has_decoder)
    )
    return task


def folder(pooling: dict, *modules: dict) -> dict:
    return {"modules.json": [TRANSFORMER, POOLING, *modules], "1_Pooling/config.json": pooling}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_is_that_of_the_folder(config, pooling):
    task = taken(folder(config, NORMALIZE))
    assert (task.pooling, task.normalize) == (pooling, True)
    assert taken(folder(config), pooling="cls").pooling == "cls"


def test_without_a_folder_decoders_have_their_last_token_and_encoders_the_mean():
    assert taken(is_decoder=True).pooling == "last"
    task = taken()
    assert (task.pooling, task.normalize, task.query_prefix) == ("mean", False, "")


def test_prefixes_are_the_prompts_of_the_folder():
    files = {"config_sentence_transformers.json": {"prompts": {"query": "Q: ", "document": "D: "}}}
    task = taken(files)
    assert (task.query_prefix, task.document_prefix) == ("Q: ", "D: ")
    assert taken(files, query_prefix="").query_prefix == ""


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"passage": "P: ", "query": "Q: "}, ("Q: ", "P: ")),
        ({"corpus": "C: ", "passage": "P: "}, ("", "P: ")),
        ({"corpus": "C: ", "document": ""}, ("", "")),
        ({"clustering": "X: "}, ("", "")),
    ],
)
def test_the_prompt_of_documents_has_the_names_that_sentence_transformers_looks_for(
    prompts, expected
):
    task = taken({"config_sentence_transformers.json": {"prompts": prompts}})
    assert (task.query_prefix, task.document_prefix) == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (folder({"pooling_mode": "max"}), "max.*data.pooling=mean, cls, last"),
        (folder({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}), "max_tokens"),
        (folder({"pooling_mode": "mean", "include_prompt": False}), "include_prompt=false"),
        (folder({"pooling_mode": "mean"}, {"type": "models.WordWeights", "path": "2"}), "Weights"),
        (folder({"pooling_mode": "mean"}, NORMALIZE, DENSE), "Normalize, Dense"),
        (folder({"pooling_mode": "mean"}, DENSE), "2_Dense/config.json.*missing"),
        (folder({"pooling_mode": "mean"}, {**DENSE, "path": "../up"}), "../up.*out of"),
        (
            {**folder({"pooling_mode": "mean"}, DENSE), "2_Dense/config.json": SOFTMAX},
            "Softmax.*Tanh",
        ),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case=true"),
    ],
)
def test_what_petl_does_not_compute_is_refused(files, words):
    with pytest.raises(InputError, match=words):
        taken(files)


def test_lower_case_by_the_tokenizer_is_no_reason_to_refuse():
    lower = {"do_lower_case": True}
    files = {"sentence_bert_config.json": lower, "tokenizer_config.json": lower}
    assert taken(files).pooling == "mean"


def test_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(InputError, match="encoder and a decoder"):
        taken(has_decoder=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("modules.json", [{"path": "1_Pooling"}], "type"),
        ("modules.json", {"0": TRANSFORMER}, "list"),
        ("modules.json", [{**POOLING, "path": 1}], "path"),
        ("1_Pooling/config.json", [{"pooling_mode": "cls"}], "mapping"),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}, "query.*5"),
        ("config_sentence_transformers.json", ["query"], "mapping"),
        ("sentence_bert_config.json", "lower", "mapping"),
    ],
)
def test_damaged_files_are_named_with_the_reason(name, content, words):
    files = {**folder({"pooling_mode": "cls"}), name: content}
    with pytest.raises(InputError, match=f"{name}.*{words}"):
        taken(files)


@pytest.mark.parametrize("content", [b"[", b"[\xff]", b"[" * 9000, b" " * 2**24 + b"[]"])
def test_files_beside_the_weights_are_read_within_bounds(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "modules.json").write_bytes(content)
    source = read_source({"name": "own", "source": "path", "path": str(tmp_path)})
    with pytest.raises(InputError, match=rf"{tmp_path}/modules\.json cannot be"):
        Retrieval().take_base(source)


def test_a_length_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    source = read_source({"name": "own", "source": "path", "path": str(tmp_path)})
    with pytest.raises(InputError, match=r"max_seq_length.*long"):
        assert Folder(source).max_length
