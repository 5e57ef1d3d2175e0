"""Answers that the model writes: what is asked, what is written, how it is compared."""

import functools
import json

import pytest
import torch
from datasets import Dataset
from tiny_tokenizers import CHATML, byte_tokenizer
from training_fixtures import train, words, write_model
from transformers import GPT2Config, GPT2LMHeadModel

import petl
from petl import testing
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_processor
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.metrics import rouge
from petl.efficiency.drafting import engine
from petl.errors import InputError
from petl.training import generation
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.generation import padded
from petl.training.runs.run_config import read_config

pytest_plugins = ["task_fixtures"]


def written(model, tokenizer, row, most):
    """The answer to one row alone, token by token, without a cache and without padding."""
    pair = model.config.is_encoder_decoder
    prompt = torch.tensor([row["input_ids"] if pair else row["_prompt"]], device=model.device)
    made = torch.zeros_like(prompt[:, :1]) if pair else prompt
    for _ in range(most):
        inputs = {"input_ids": prompt, "decoder_input_ids": made} if pair else {"input_ids": made}
        token = model(**inputs).logits[:, -1].argmax(-1)
        if token.item() == tokenizer.eos_token_id:
            break
        made = torch.cat([made, token[None]], 1)
    return tokenizer.decode(made[0, 1 if pair else prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.cells(1)
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_scores_are_those_of_answers_written_one_by_one(families, task, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path))
    cfg = compose(families(task, "+method=lora", "data.generate=4"))
    settings = read_config(cfg).train
    accelerator = start(settings.seed, "no")
    data = read_data(cfg.data)
    splits = encode_splits(data, load_processor(cfg.model, data.task), settings, accelerator)
    base = load_base(cfg.model, data.task).to(accelerator.device)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # else a tiny model writes one word for ever
    model = petl.wrap(base, "lora", task_type=data.task.peft_task_type, target_modules="all-linear")
    prompts = {tuple(row["_prompt" if task == "causal_lm" else "input_ids"]) for row in splits.test}
    assert len({len(prompt) for prompt in prompts}) > 1  # some are padded
    model.eval()
    guesses = [written(base, splits.processor, row, 4) for row in splits.test]
    assert len(set(guesses)) > 1
    answers = list(guesses)  # right in a third of the rows, then
    for i in range(len(answers)):
        answers[i] = f" {guesses[i]}\n" if i % 3 == 0 else f"{guesses[i]} cat the"
    test = splits.test.remove_columns("_answer").add_column("_answer", answers)
    object.__setattr__(splits, "test", test)
    scores = Evaluator(model, splits, accelerator, 5).answers()
    pairs = list(zip(guesses, answers, strict=True))
    exact = sum(g.split() == a.split() for g, a in pairs) / len(pairs)
    assert 0 < exact < 1
    assert scores["exact_match"] == pytest.approx(exact)
    assert scores["answers"] == len(splits.test)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = sum(rouge(g, a)[name] for g, a in pairs) / len(pairs)
        assert scores[name] == pytest.approx(expected, rel=1e-5)


def test_the_last_answer_of_a_chat_is_asked_for_with_all_that_came_before():
    tokenizer = byte_tokenizer(pad_token="<unk>", chat_template=CHATML)
    said = ["a?", "b", "c?", "d e", "f"]
    turns = zip(["user", "assistant"] * 3, said, strict=False)
    chat = [{"role": role, "content": content} for role, content in turns]
    task = CausalLM(max_length=200, chat=True, generate=5)
    row = task.encode_rows(tokenizer, Dataset.from_dict({"messages": [chat]}).to_dict())
    assert row["_answer"] == ["d e"]
    asked = tokenizer.decode(row["_prompt"][0])
    assert asked.endswith("user\nc?<|im_end|>\n<|im_start|>assistant\n")
    assert asked.startswith("<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>")
    learned = [t for t in row["labels"][0] if t != -100]
    assert tokenizer.decode(learned) == "b<|im_end|>d e<|im_end|>"  # both answers, however


def test_prompts_are_padded_where_nothing_is_written():
    left = padded([[5, 6, 7], [8]], 0, on_left=True)
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded([[5, 6, 7], [8]], 0, on_left=False)["input_ids"][1].tolist() == [8, 0, 0]


def test_answers_end_where_a_table_of_positions_ends():
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    config = GPT2Config(vocab_size=260, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config)
    base.generation_config.eos_token_id = None
    model = petl.wrap(base, "lora", r=2, task_type="CAUSAL_LM", target_modules=["c_attn"]).eval()
    long = [65 + i for i in range(12)]
    # of the long one alone: 12 tokens leave 4 positions
    both = generation.written(model, tokenizer, [long, long[:3]], 10)
    assert both[0] == written(model, tokenizer, {"_prompt": long}, 4)
    assert both[1] == written(model, tokenizer, {"_prompt": long[:3]}, 10)
    with pytest.raises(InputError):
        generation.written(model, tokenizer, [long[:3], [*long, *long[:4]]], 10)


def test_a_prompt_without_room_for_its_answer_is_found_before_training(tmp_path):
    config = GPT2Config(vocab_size=len(words()), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    template = "{% for m in messages %}{{ m.content }} [SEP] {% endfor %}"
    write_model(tmp_path / "gpt2", GPT2LMHeadModel, config, chat_template=template)
    for name, length in (("train", 2), ("test", 30)):
        # the first answer is within data.max_length, the last is behind a long question
        texts = ["old", f"cat {name}", "red " * length, "dog"]
        roles = ["user", "assistant"] * 2
        chat = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 4)
    files = [f"data.{name}={tmp_path}/{name}.jsonl" for name in ("train", "test")]
    run = ["model=path", f"model.path={tmp_path}/gpt2", "data=files", "data.task=causal_lm", *files]
    few = ["data.max_length=12", "data.generate=4", "train.steps=1", "train.score_before=false"]
    with pytest.raises(InputError, match="24"):
        train([*run, *few, "+method=lora"], tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_single_row_is_written_with_drafts_in_float32_and_as_without(monkeypatch):
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    model = petl.wrap(testing.tiny_llama(vocabulary=260), "lora", task_type="CAUSAL_LM").eval()
    prompts = [[50, 60, 50, 60], [70, 80, 90]]
    together = generation.written(model, tokenizer, prompts, 12)
    drafted = []
    monkeypatch.setattr(engine, "decode", counting(engine.decode, drafted))
    alone = [generation.written(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert alone == together
    assert len(drafted) == 2
    # one drafter for all rows, so that it learns
    assert drafted[0] is drafted[1]
    generation.written(model.bfloat16(), tokenizer, prompts[:1], 3)
    assert len(drafted) == 2


@torch.no_grad()
def test_an_answer_of_a_chat_ends_with_the_turn_of_its_template():
    # as of a base model, which ends texts by another token
    tokenizer = byte_tokenizer(pad_token="<unk>", eos_token="<s>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = petl.wrap(testing.tiny_llama(vocabulary=260), "lora", task_type="CAUSAL_LM").eval()
    prompt = [50, 60, 70, 80]
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, eos_token_id=None)
    answer = ids[0, len(prompt) :].tolist()
    count = next(i for i in range(2, 8) if answer[i] not in answer[:i])
    # the model writes the end of the turn in place of that token
    end, rows = tokenizer.convert_tokens_to_ids("<|im_end|>"), model.get_output_embeddings().weight
    rows[[end, answer[count]]] = rows[[answer[count], end]]
    expected = tokenizer.decode(answer[:count])
    for prompts in ([prompt], [prompt, prompt]):  # with drafts, and in a batch
        for text in generation.written(model, tokenizer, prompts, 8, is_chat=True):
            assert text == expected
        for text in generation.written(model, tokenizer, prompts, 8):
            assert len(text) > len(expected)


def counting(decode, drafted):
    """`decode`, which keeps its drafters."""

    @functools.wraps(decode)
    def counted(*args, **kwargs):
        drafted.append(kwargs["drafter"])
        return decode(*args, **kwargs)

    return counted


def test_answers_in_bfloat16_are_written_from_weights_that_were_cast_once(monkeypatch):
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    model = petl.wrap(testing.tiny_llama(vocabulary=260), "lora", task_type="CAUSAL_LM").eval()
    weight, casts = model.get_base_model().lm_head.weight, []
    monkeypatch.setattr(torch.Tensor, "to", counting_to(torch.Tensor.to, weight, casts))
    with torch.autocast("cpu", torch.bfloat16):
        texts = generation.written(model, tokenizer, [[50, 60, 50, 60], [70, 80, 90]], 12)
    assert len(casts) == 1
    assert len(texts) == 2


def counting_to(to, weight, casts):
    def counted(tensor, *args, **options):
        if tensor.data_ptr() == weight.data_ptr() and args == (torch.bfloat16,):
            casts.append(args)
        return to(tensor, *args, **options)

    return counted
