"""Answers with small weights beside llama.cpp: processor milliseconds of a token after the prompt.

    taskset -c 1 python scripts/bench/small_weights.py FOLDER --tokens 4 36 --rounds 3
    taskset -c 1 python scripts/bench/small_weights.py --layers 4

FOLDER is that of a plain model or of a run; --layers makes a Llama of the widths of one with 1 B
parameters, with random weights and so many layers. All are loaded, and answer one prompt of 16
tokens by turns, greedily and without drafts, with both numbers of tokens: the difference is the
time of the tokens between them. Processor time, since other work on a machine does not count in it.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from petl.data.models import smollm2
from petl.generation.inference.language_model import LanguageModel
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.generation.serving.engine_model import load_engine_model

PETL, LLAMA = "petl", "llama.cpp"
CASES = [(PETL, None), (PETL, "int8"), (LLAMA, "int8"), (PETL, "int4"), (LLAMA, "int4")]
PROMPT = 16  # tokens


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Answers with small weights beside llama.cpp.")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, nargs=2, default=[4, 36])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=[PETL, LLAMA], choices=[PETL, LLAMA])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = given.folder
        if folder is None:
            folder = str(smollm2.folder()) if given.layers is None else wide(name, given.layers)
        cases = [case for case in CASES if case[0] in given.engines]
        models = {case: loaded(folder, *case, Path(name) / str(i)) for i, case in enumerate(cases)}
        seconds = {(case, n): [] for case in cases for n in given.tokens}
        for turn in range(given.rounds + 1):
            for case, n in seconds:
                spent = answered(models[case], n)
                if turn:  # the first one prepares what the others find
                    seconds[case, n].append(spent)
    few, many = given.tokens
    print("| engine | weights | ms a token |\n| --- | --- | --: |")
    for case in cases:
        pairs = zip(seconds[case, few], seconds[case, many], strict=True)
        each = statistics.median(1e3 * (b - a) / (many - few) for a, b in pairs)
        print(f"| {case[0]} | {case[1] or 'full'} | {each:.1f} |", flush=True)
    os._exit(0)  # llama.cpp's server has threads of its own


def wide(folder: str, layers: int) -> str:
    """Save a Llama of the widths of 1 B parameters, with the tokenizer of SmolLM2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    config = LlamaConfig(
        **sizes, **heads, num_hidden_layers=layers, vocab_size=49152, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/wide")
    smollm2.tokenizer().save_pretrained(f"{folder}/wide")
    return f"{folder}/wide"


def loaded(folder: str, engine: str, weights: str | None, files: Path) -> LanguageModel:
    """Load a model that writes on, past its end token."""
    if engine == LLAMA:
        files.mkdir()
        model = load_engine_model({"default": folder}, files, seed=0, weights=weights)
    else:
        model = load_language_model(folder, drafting="none", weights=weights)
    model.base.generation_config.eos_token_id = None
    model.__dict__["ends"] = [0]
    return model


def answered(model: LanguageModel, tokens: int) -> float:
    """Processor seconds of an answer."""
    ids = torch.randint(5, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    with model.using(model.names[0]):
        begun = time.process_time()
        (answer,) = model.answer([ids], Sampling(max_new_tokens=tokens, temperature=0))
        spent = time.process_time() - begun
    assert answer.tokens == tokens
    return spent


if __name__ == "__main__":
    main()
