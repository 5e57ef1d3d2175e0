"""What a base model's folder says of pooling, normalization and prompts, in both forms."""

from types import SimpleNamespace

import pytest

from petl.data.models.sources import read_source
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.base_folder import BaseFolder
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


def damaged(name, content, words):
    return {**folder({"pooling_mode": "cls"}), name: content}, f"{name}.*{words}"


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
        ({"modules.json": []}, r"\[\]"),
        ({"modules.json": [TRANSFORMER]}, "Transformer"),
        (folder({"pooling_mode": "mean"}, POOLING), "1_Pooling.*twice"),
        (folder({"pooling_mode": "mean"}, {**POOLING, "path": "2"}), "Pooling, Pooling"),
        (
            folder({"pooling_mode": "mean"}, NORMALIZE, {**NORMALIZE, "path": "3"}),
            "Normalize, Normalize",
        ),
        (folder({"pooling_mode": "mean"}, {**NORMALIZE, "type": "own.Normalize"}), "own.Normalize"),
        (
            {"modules.json": [{**TRANSFORMER, "path": "0_Transformer"}, POOLING]},
            "0_Transformer.*save",
        ),
        damaged("modules.json", [{"path": "1_Pooling"}], "type"),
        damaged("modules.json", {"0": TRANSFORMER}, "list"),
        damaged("modules.json", [{**POOLING, "path": 1}], "path"),
        damaged("1_Pooling/config.json", [{"pooling_mode": "cls"}], "mapping"),
        damaged("config_sentence_transformers.json", {"prompts": {"query": 5}}, "query.*5"),
        damaged("config_sentence_transformers.json", ["query"], "mapping"),
        damaged("sentence_bert_config.json", "lower", "mapping"),
    ],
)
def test_what_petl_does_not_compute_is_refused(files, words):
    with pytest.raises(InputError, match=words):
        taken(files)


def test_lower_case_by_the_tokenizer_is_no_reason_to_refuse():
    with pytest.raises(InputError):
        taken(has_decoder=True)  # which is one
    lower = {"do_lower_case": True}
    files = {"sentence_bert_config.json": lower, "tokenizer_config.json": lower}
    assert taken(files).pooling == "mean"


@pytest.mark.parametrize("content", [b"[", b"[\xff]", b"[" * 9000, b" " * 2**24 + b"[]"])
def test_files_beside_the_weights_are_read_within_bounds(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "modules.json").write_bytes(content)
    source = read_source({"name": "own", "source": "path", "path": str(tmp_path)})
    with pytest.raises(InputError, match=str(tmp_path / "modules.json")):
        Retrieval().take_base(source)


def of(**files) -> BaseFolder:
    names = {"config": "config.json", "modules": "modules.json"}
    names |= {"st": "config_sentence_transformers.json", "lengths": "sentence_bert_config.json"}
    content = {names[name]: value for name, value in files.items()}
    return BaseFolder(SimpleNamespace(json_file=content.get))


SCORER = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
SIGMOID, IDENTITY, RELU = (
    f"torch.nn.modules.{name}" for name in ("activation.Sigmoid", "linear.Identity", "ReLU")
)


@pytest.mark.parametrize(
    ("files", "is_reranker"),
    [
        ({"st": {"model_type": "CrossEncoder"}}, True),
        ({"st": {"model_type": "SentenceTransformer"}, "config": SCORER}, False),
        ({"config": SCORER}, True),
        ({"config": {**SCORER, "sentence_transformers": {}}}, True),
        ({"config": {**SCORER, "problem_type": "regression"}}, False),
        ({"config": {**SCORER, "id2label": {"0": "no", "1": "yes"}}}, False),
        ({"config": {"architectures": SCORER["architectures"]}}, False),  # two classes
        ({"config": {**SCORER, "architectures": ["BertModel"]}}, False),
        ({"config": {"id2label": {"0": "LABEL_0"}}}, False),
        ({}, False),
    ],
)
def test_folders_of_rerankers(files, is_reranker):
    assert of(**files).is_cross_encoder is is_reranker


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"st": {"activation_fn": IDENTITY}}, False),
        ({"st": {"activation_fn": SIGMOID}, "config": {"sentence_transformers": {}}}, True),
        ({"config": {"sentence_transformers": {"activation_fn": IDENTITY}}}, False),
        ({"config": {"sbert_ce_default_activation_function": IDENTITY}}, False),
        ({"st": {"activation_fn": RELU}}, None),
        ({"config": {"sbert_ce_default_activation_function": "os.system"}}, None),
    ],
)
def test_scores_of_a_reranker_are_logits_or_probabilities(files, expected):
    if expected is None:
        with pytest.raises(InputError, match="activation_fn"):
            assert of(**files).has_probabilities
    else:
        assert of(**files).has_probabilities is expected


def test_what_a_reranker_computes_beyond_its_scores_is_refused():
    assert of(st={"prompts": {"web": "Q: "}}, modules=[TRANSFORMER]).has_probabilities
    logits = {"type": "sentence_transformers.cross_encoder.modules.LogitScore", "path": "1"}
    prompted = {"prompts": {"web": "Q: "}, "default_prompt_name": "web"}
    for files, word in (
        ({"modules": [TRANSFORMER, logits]}, "LogitScore"),
        ({"st": prompted}, "web"),
    ):
        with pytest.raises(InputError, match=word):
            assert of(**files).has_probabilities


def test_vectors_are_compared_as_the_folder_says():
    assert of().similarity() is None
    for name in ("cosine", "dot"):
        given = of(st={"similarity_fn_name": name})
        task = Retrieval(loss="in_batch", normalize=name == "dot")
        task.take_folder(given)
        assert given.similarity() == task.similarity == name
    with pytest.raises(InputError, match="manhattan"):
        Retrieval().take_folder(of(st={"similarity_fn_name": "manhattan"}))


@pytest.mark.parametrize("length", [-1, 0, 1, "long"])
def test_texts_have_two_tokens_at_least(length):
    assert of(lengths={"max_seq_length": 2}).max_length == 2
    with pytest.raises(InputError, match=f"max_seq_length.*{length}"):
        assert of(lengths={"max_seq_length": length}).max_length
