"""All commands of `petl`: their options, help texts and functions.

Imports no torch and no Hydra: a wrong word is answered at once.
"""

import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, dataclass_transform

from petl.cli.arguments import (
    COUNT,
    FRACTION,
    POSITIVE,
    SEED,
    alphas,
    by_rule,
    byte_count,
    divisor,
    drafter,
    each,
    embedder,
    existing,
    file_or_setting,
    file_to_read,
    file_to_write,
    folder_to_write,
    layers,
    named_run,
    new_folder_to_write,
    number,
    repository_or_folder,
    saved_adapter,
    saved_model,
    saved_run,
    served_run,
    some_of,
    some_text,
    strength,
    table,
    table_or_folder,
    weights,
    writer,
)
from petl.cli.options import Command, Options, argument, choice, either, option, switch
from petl.system.imports.extras import install_hint
from petl.system.values import bounded

if TYPE_CHECKING:
    from petl.adapters.export.saved_adapter import SavedAdapter

MODEL = "folder of a run, of an adapter, or of a merged model"
JOBS = number(int, 1, 8 * (os.cpu_count() or 1))  # assumption: more jobs would only wait
# of the folder of a study
STUDY_MARKS = (".lock", "runs", "tune", "rates.json", "precision.json")
STUDY_FILES = (*STUDY_MARKS, "replaced", "index.html", "results.md", "*.svg")
# of the folder of an advice
ADVICE_MARKS = (".lock", "trials", "schedule.json", "advice.json")
ADVICE_FILES = (*ADVICE_MARKS, "last", "configs", "advice.html")
# as in petl.core.support, which imports torch, and formats of petl export
NEEDS = (
    *("merge", "lora", "gguf", "vllm", "onnx", "mixed", "ddp", "fsdp", "deepspeed", "4bit", "8bit"),
    *("torchao", "checkpointing", "compile", "new_tokens"),
)
ROLES, VECTOR_DTYPES = ("query", "document"), ("float32", "float16", "int8", "binary")
BATCH = 8  # prompts of a file at a time
API_KEY = "PETL_API_KEY"  # environment variable; words of a command are seen by all users
NO_DRAFTS = "none"  # the value of --drafter for plain decoding
# as in petl.adapters.shrink and petl.ranks, which import torch
WIDTHS, METRICS = ("even", "by_block"), ("angular", "cosine", "mse", "mae")
PETL, LLAMA = "petl", "llama.cpp"  # engines; the first serves all methods
TRAIN_USAGE = "petl train [-m] [--config-dir DIR] +method=NAME [GROUP=NAME ...] [SETTING=VALUE ...]"

Kind = TypeVar("Kind", bound=Options)
COMMANDS: dict[str, Command] = {}  # in the order of `petl --help`


@dataclass_transform(kw_only_default=True)
def command(
    name: str, function: str, usage: str | None = None
) -> Callable[[type[Kind]], type[Kind]]:
    """Make a dataclass of a class of options, and a command of `petl` with them."""

    def add(kind: type[Kind]) -> type[Kind]:
        options = dataclass(kw_only=True)(kind)
        COMMANDS[name] = Command(options, function, usage)
        return options

    return add


# Options of several commands


@dataclass(kw_only=True)
class ConfigOptions(Options):
    """A command that reads configurations."""

    config_dir: str | None = option(
        "a folder with configurations of yours, such as method/mine.yaml", metavar="DIR"
    )


@dataclass(kw_only=True)
class ComposeOptions(ConfigOptions):
    """A command that takes settings of `petl train`."""

    overrides: list[str] = argument(
        "settings of `petl train`", default=[], metavar="SETTING", nargs="*"
    )


@dataclass(kw_only=True)
class TrustOptions(Options):
    """A command that reads a base model."""

    trust_remote_code: bool = switch(
        "allow the base model to run code of its own, if the run was trained with "
        "model.trust_remote_code=true"
    )


@dataclass(kw_only=True)
class LoadOptions(TrustOptions):
    """A command that loads adapters on their base model."""

    other_base: bool = switch(
        "go on if the base model's weights differ from those that the adapter was trained on"
    )


@dataclass(kw_only=True)
class RunOptions(LoadOptions):
    """A command that loads the adapter of one run."""

    run: str = argument("folder of a run, or of an adapter", saved_adapter)

    def find(self) -> "SavedAdapter":
        """Return the adapter that is saved there."""
        from petl.adapters.export.saved_adapter import find

        trust = self.trust_remote_code
        return find(self.run, trust_remote_code=trust, other_base=self.other_base)


@dataclass(kw_only=True)
class FolderOptions(RunOptions):
    """A command that writes an adapter to another folder."""

    out: Path = argument("folder to write: new or empty", new_folder_to_write())


@dataclass(kw_only=True)
class CheckOptions(FolderOptions):
    """A command that compares outputs before it writes."""

    # None: the default depends on the dtype of the base model
    tolerance: float | None = option(
        "largest allowed difference of the outputs, relative to their norm (default: 1e-4 for a "
        "float32 base model, 5e-2 for bfloat16)",
        number(float, 0),
    )


# Before, across and after runs


@command("methods", "commands:methods")
class MethodsOptions(ConfigOptions):
    """List methods, extra losses and recipes.

    Methods are listed by what they are for, with the number of trainable parameters on one
    reference model, whether the adapter can be merged into the base model (`petl merge`) or
    exported as a plain LoRA (`petl export --lora`), whether petl or PEFT implements it, and the
    paper. A method's name goes after `+method=` and into `petl.wrap(model, NAME)`. Then list the
    extra losses, which `+loss=NAME` adds to the training of any method, the recipes: combinations
    of method, loss and settings from a paper, chosen by `+method=NAME` as well, and the method that
    is recommended for each need.
    """


@command("train", "start:main", usage=TRAIN_USAGE)
class TrainOptions(Options):
    """Train one adapter and save it, or several: a sweep.

    `petl train --help` lists the groups, their names and all settings.

      petl train +method=mola
      petl train -m +method=lora,mola train.seed=0,1,2      # one run for each combination
      torchrun --nproc_per_node 2 -m petl train +method=mola

    In a checkout, `python train.py` is the same.
    """


@command("show", "commands:show")
class ShowOptions(ConfigOptions):
    """Describe a method, loss or recipe and its fields.

    Prints paper, capabilities, usage, and each field with type, default and meaning. The default is
    that of petl.wrap; a value that configs/method/NAME.yaml sets for `petl train` has a column of
    its own. With FIELD, print the full description of that field.

      petl show mola
      petl show density
      petl show deft loss.eps
    """

    name: str = argument("a name from `petl methods`")
    field: str | None = argument("print one field in full", default=None, nargs="?")


@command("plan", "commands:plan")
class PlanOptions(ComposeOptions):
    """Estimate parameters, memory and length of a run without training.

    Prints what `petl train SETTING ...` would do, without loading weights: target modules,
    trainable and saved parameters, size of the adapter file, memory of a training step and of an
    evaluation, length and time of the run, settings that would make it cheaper, and what the
    adapter supports. Takes the settings of `petl train`.

      petl plan +method=mola
      petl plan +method=lora model=smollm2 data=hamlet train.batch_size=4 train.precision=bf16
    """


@command("data", "commands:data")
class DataOptions(ComposeOptions):
    """Preview the training data: examples, lengths, labels.

    Prints the examples that `petl train SETTING ...` would train on, as the model reads them:
    decoded, with the tokens that the loss is computed on in color (in brackets outside a terminal),
    the number of dropped and truncated examples, lengths, and label counts. Needs the tokenizer or
    processor of the model, not its weights. Files without a model are shown as they are, with
    lengths in characters; those of texts with classes as MiniLM reads them.

      petl data
      petl data model=smollm2 data=reasoning --examples 1
      petl data model=path model.path=FOLDER data=files data.train=rows.jsonl data.task=seq2seq
    """

    examples: int = option("number of training examples to print", number(int, 0, 10**6), 3)


@command("report", "commands:write_report")
class ReportOptions(Options):
    """Write the report of a run (report.html).

    It has scores, predictions, charts of the training log, what the method did by layer, time by
    activity, configuration, environment, and the code that loads the adapter. A finished run has
    this file already; use the command for a run that was stopped, or after an update of petl.
    """

    run: str = argument("folder of a run, finished or not", saved_run)


@command("compare", "commands:compare")
class CompareOptions(Options):
    """Compare finished runs: scores, sizes, times.

    Prints test score with its standard deviation over seeds, trainable parameters, file size,
    seconds per step, peak memory, and the difference to a baseline. Runs that differ only in the
    seed form one row; each data set has a table of its own. With --out, also write an HTML page
    with charts, and the tables in markdown. A run that is damaged, and a path without a finished
    run, is named and left out, and the exit status is then 1.

      petl compare runs --out page
      petl compare runs/a runs/b --answers    # which examples only one of them gets right

    To train and compare several methods with one command, see `petl study --help`.
    """

    runs: list[str] = argument(
        "folder of a run, or a folder that contains runs", metavar="RUN", nargs="+"
    )
    out: Path | None = option(
        "write index.html, results.md and charts to this folder",
        new_folder_to_write(("index.html", "results.md", "*.svg"), ("results.md",)),
    )
    baseline: str = option("the row that the others are compared with", default="lora")
    answers: bool = switch("of two runs, also show on which test examples their predictions differ")
    examples: int = option("number of such examples to show for each run", number(int, 0, 10**4), 5)


@command("study", "studies:study")
class StudyOptions(ComposeOptions):
    """Train several methods; write a page that compares them (FOLDER/index.html).

      petl study runs/nine --methods lora,mola,mos --seeds 0,1,2 \\
          --rates 3e-4,1e-3,3e-3 train.budget=340000

    Each learning rate is scored on validation examples, the best one and its neighbours with three
    seeds; with the lowest of those that are not told apart, each method is trained again for each
    seed and scored on the test set. With --together N, N rates or seeds of a method
    train in one process, in one pass over one base. The same command resumes a stopped study.
    SETTINGs are those of `petl train`, for every run; --method "binary method.inner=lora" adds a
    method with settings of its own.
    """

    folder: Path = argument(
        "folder of the study, new or to be resumed",
        new_folder_to_write(STUDY_FILES, STUDY_MARKS),
    )
    methods: str = option("names of methods", default="", metavar="A,B")
    # one text of several words: the settings in it hold for this method alone
    method: list[str] = option(
        "a method with settings of its own", default=[], metavar="WORDS", action="append"
    )
    seeds: list[int] = option("of the runs of each method", each(SEED), [0, 1, 2], metavar="S,S")
    rates: list[float] = option(
        "learning rates (default: that of each method)", each(POSITIVE), [], metavar="R,R"
    )
    tuning_seeds: int = option("seeds that choose a rate of --rates", number(int, 1, 100), 3)
    jobs: int = option("number of runs at a time", JOBS, 1)
    together: int = option(
        "runs of a method that train in one pass over one base (default: 1, each alone)", JOBS, 1
    )


@command("advise", "advise:advise")
class AdviseOptions(ComposeOptions):
    """Say which method, rank and learning rate to take, and how sure that is.

      petl advise data=files data.train=reviews.csv
      petl advise data=files data.train=chat.jsonl data.task=causal_lm model=hub \\
          model.name=NAME --cost 3 --need merge,gguf --bytes 2MB

    Short trainings are scored on rows held out for validation, the better ones again for longer;
    with --cost 2 or more the best is trained at full length, and that adapter is yours. The test
    rows are not touched; their score is predicted with an 80 % interval. Another method than LoRA
    is advised only where the 80 % interval of its gain is above 0. Costs are processor seconds, in
    plain runs (LoRA of rank 8, your epochs). SETTINGs are those of `petl train`, without a method.
    The same command resumes a stopped one.
    """

    cost: float = option("plain runs to spend, from 1", number(float, 1, 100), 2.0)
    need: list[str] = option(
        f"what the adapter has to support: {', '.join(NEEDS)}", some_of(NEEDS), [], metavar="A,B"
    )
    bytes: int | None = option("largest file of the adapter, such as 2MB", byte_count)
    lost: float | None = option(
        "most that may be lost on other texts, in nats per token (drift of encoders)", POSITIVE
    )
    seconds: float | None = option("processor seconds that a training may take", POSITIVE)
    out: Path = option(
        "folder of the advice, new or to be resumed",
        new_folder_to_write(ADVICE_FILES, ADVICE_MARKS),
        "runs/advice",
    )


@command("batch-sizes", "studies:batch_sizes")
class BatchSizesOptions(ComposeOptions):
    """Find the largest batch size for each length, for train.batch_sizes.

      petl batch-sizes +method=mola model=minilm train.buckets=10
      WORLD_SIZE=8 petl batch-sizes +method=lora model=smollm2 --memory 80GB

    SETTINGs are those of `petl train`; the default of train.buckets is 30 here. On a GPU, batch
    sizes are found by trial steps, limited to 90 % of its memory. With --memory, or without a GPU,
    they are estimated from tensor shapes, for 90 % of that memory, or of the free memory. Batch
    sizes are global; the number of processes is WORLD_SIZE.
    """

    # parsed by `bytes_of`, whose module imports torch
    memory: str | None = option("memory of the device of each process")
    # argparse reads the text of the default, if it is needed
    output: Path = option("YAML to write", file_to_write, "batch_sizes.yaml")


@command("train-predictors", "tokens:train_predictors")
class PredictorOptions(ComposeOptions):
    """Train networks that predict which tokens attention looks at, for +tokens=lemo.

      petl train-predictors model=smollm2 data=hamlet --out predictors.safetensors
      petl train +method=lora model=smollm2 data=hamlet +tokens=lemo tokens.scorer=predictor \\
          tokens.predictor=predictors.safetensors

    SETTINGs name the model and the rows, as those of `petl train`. The networks belong to the base
    model, which stays as it is.
    """

    out: Path = option("safetensors to write", file_to_write, MISSING)
    layers: str | list[int] = option(
        "second_half, all, or numbers from 0 (default: second_half)",
        layers,
        "second_half",
        metavar="N[,N...]",
    )
    block: int = option("tokens of a block (default: 64)", COUNT, 64)
    keep: float = option(
        "share kept, for the recall (default: 0.4)", number(float, 0, 1, above=True), 0.4
    )
    steps: int = option("batches, each of other rows (default: 500)", COUNT, 500)
    batch_size: int = option("rows of a batch (default: 1)", COUNT, 1)
    length: int = option("tokens of a row at most (default: 4096)", COUNT, 4096)
    lr: float = option("learning rate of Adam (default: 0.001)", POSITIVE, 1e-3)


@command("buckets", "studies:buckets")
class BucketsOptions(ComposeOptions):
    """Estimate how much padding length buckets save, and write their edges.

      petl buckets buckets.yaml model=smollm2 data=reasoning train.buckets=30

    SETTINGs are those of `petl train`; no method is needed. Without train.max_tokens, each step has
    train.batch_size examples. train.buckets=null counts as auto here.
    """

    file: Path = argument("YAML to write", file_to_write)


@command("configs", "studies:configs")
class ConfigsOptions(ConfigOptions):
    """List the configurations, or print one, to start your own from it.

      petl configs
      petl configs method/mola > configs/method/wide.yaml    # then: petl train +method=wide
      petl configs sweep/lora > sweep.yaml                   # then: wandb sweep sweep.yaml

    Your own are found in ./configs of the working directory, and in the folder of --config-dir.
    They replace those of petl of the same name; groups of your own, such as configs/experiment, are
    chosen with a plus: +experiment=NAME. A ./configs with a train.yaml is another program's, or a
    copy of petl's, so that only its further names are used, unless --config-dir names it.
    """

    name: str | None = argument(
        "print this file, such as method/mola", default=None, metavar="GROUP/NAME", nargs="?"
    )


# A saved adapter on data


@dataclass(kw_only=True)
class BatchOptions(RunOptions):
    """A command that passes rows of files through an adapted model."""

    max_new_tokens: int | None = option("longest answer of a model that writes", COUNT)
    batch_size: int | None = option("examples per batch", COUNT)


@command("eval", "predictions:evaluate")
class EvalOptions(BatchOptions):
    """Evaluate a run's adapter on its test set, or on files.

    Prints the scores on its test set next to those that the run saved in scores.json, or its scores
    on other data. An adapter file with missing or unexpected tensors is an error; a base model
    whose weights are others than in training is a warning.

      petl eval runs/mine
      petl eval runs/mine --data new.csv more.jsonl data.text=review
      petl eval runs/mine --retain      # of a model that writes: its loss on other texts

    The files have one of the formats of data=files; data.SETTINGs name their columns if they are
    others than in training. Labels are compared by name with those of the run. Scores, predictions,
    scores by class, confusion matrix, calibration, and the worst examples are written to a folder,
    with a page (index.html).
    """

    # files need --data here: without any, the test set is evaluated
    overrides: list[str] = argument(
        "columns of files", default=[], metavar="data.SETTING", nargs="*"
    )
    data: list[str] = option(
        "files with labels, or folders of images or sounds, in place of the test set",
        file_or_setting,
        default=[],
        nargs="+",
    )
    retain: list[str] | None = option(
        "measure what the model has lost on other texts: files with a column text, or none for "
        "those that petl brings",
        file_or_setting,
        metavar="FILE",
        nargs="*",
    )
    out: Path | None = option(
        "folder of the results (default: RUN/eval-NAME, by the name of the data)", folder_to_write
    )


@command("predict", "predictions:predict")
class PredictOptions(BatchOptions):
    """Predict the rows of files with a run's adapter.

    The rows need no labels, and are written with all of their columns and the predictions: the
    label with its probability and those of all labels, a number, a span of the context, or an
    answer.

      petl predict runs/mine new.csv --out predicted.csv
      petl predict runs/mine new.jsonl data.text=review > predicted.jsonl
      petl predict runs/images folder --out predicted.csv

    Files are csv, tsv, json, jsonl or parquet; the suffix of --out names the format to write. All
    rows are checked before the model is loaded, then read, predicted and written in windows, so
    that files may be larger than memory (json is read as a whole). data.SETTINGs name columns if
    they are others than in training. For images and sounds, FILE is one of them, a folder, or a
    table with the column path. With --processes, or under torchrun, several processes divide the
    rows; the output has the order of the input.

    An embedder (data.task=retrieval) writes vectors, one row a text, to a file of NumPy, or to
    parquet with the columns of the rows:

      petl predict runs/mine corpus.jsonl --out vectors.npy --as document --dtype int8
    """

    # in any order: `split_words` tells them apart
    overrides: list[str] = argument(
        "files or folders, and data.SETTINGs", file_or_setting, metavar="FILE", nargs="+"
    )
    out: Path | None = option(
        "csv, tsv, jsonl, parquet, or npy of vectors, to write (default: JSON lines on standard "
        "output)",
        file_to_write,
    )
    prefix: str = option("of the added columns", default="", metavar="NAME_")
    as_: str | None = choice(
        "of vectors: whose prefix is put before each text (default: document)", ROLES
    )
    dtype: str | None = choice(
        "of vectors: int8 in 255 steps, binary as bits of signs (default: float32)", VECTOR_DTYPES
    )
    calibrate: Path | None = option(
        "of int8: texts whose vectors give the range of each column (default: those of FILE)",
        file_to_read,
        metavar="FILE",
    )
    processes: int | None = option("processes on this machine, one per GPU", number(int, 1, 1024))


@command("retrieve", "retrieve:retrieve")
class RetrieveOptions(LoadOptions):
    """Find the texts that are nearest to queries, with an embedder.

      petl retrieve runs/mine corpus.jsonl --query "to draw breath"
      petl retrieve runs/mine notes --query "where is the key"
      petl predict runs/mine corpus.jsonl --out vectors.npy
      petl retrieve runs/mine corpus.jsonl --vectors vectors.npy --query "to draw breath"

    The search is exact. A file has a column text, and may have one with ids (id or _id); of a
    folder, the passages of its texts are searched (.md, .markdown, .txt), each with file and line.
    """

    run: str = argument(MODEL, embedder)
    corpus: str = argument(
        "csv, tsv, json, jsonl or parquet, or a folder of texts", table_or_folder, metavar="FILE"
    )
    query: list[str] = option(
        "a text; may be repeated", some_text, action="append", default=MISSING
    )
    k: int = option("texts for each query", COUNT, default=10)
    column: str | None = option("of the texts of a file (default: text)", metavar="NAME")
    vectors: Path | None = option(
        "those of the file, as petl predict --out=NAME.npy writes them (default: computed)",
        file_to_read,
    )


@command("mine", "retrieve:mine")
class MineOptions(LoadOptions):
    """Find hard negatives: texts that an embedder has near to a query, and that are no answers.

      petl mine runs/mine corpus.jsonl pairs.jsonl --out triples.jsonl --margin 0.05
      petl train +method=lora data=files data.task=reranking data.train=triples.jsonl

    The corpus has a column text; the rows of QUERIES have query and positive, and are written with
    negatives, a list. The nearest texts are taken without the positives of the query in any row.
    --column, --query and --positive name columns that are called otherwise.
    """

    run: str = argument(MODEL, embedder)
    corpus: str = argument("csv, tsv, json, jsonl or parquet", table_or_folder, metavar="CORPUS")
    queries: str = argument("likewise", table, metavar="QUERIES")
    out: Path = option("csv, tsv, jsonl or parquet to write", file_to_write, MISSING)
    k: int = option("negatives of a row at most", COUNT, default=5)
    column: str | None = option("of the corpus (default: text)", metavar="NAME")
    query: str = option("column of QUERIES", default="query", metavar="NAME")
    positive: str = option("column of QUERIES", default="positive", metavar="NAME")
    margin: float | None = option(
        "similarity at most that of the positive less this (default: any)", number(float, -2)
    )
    skip: int = option(
        "leave out so many of the nearest, which may be answers", number(int, 0), default=0
    )
    vectors: Path | None = option(
        "those of the corpus, as petl predict --out=NAME.npy writes them, read in chunks (default: "
        "computed)",
        file_to_read,
    )
    batch_size: int | None = option("texts per batch", COUNT)


@dataclass(kw_only=True)
class EngineOptions(Options):
    """A command that answers with a model."""

    engine: str = choice(
        "what computes: petl serves all methods; llama.cpp, through xllamacpp, is faster on a CPU "
        "and serves merged models and methods that export to LoRA, without drafts and schemas",
        (PETL, LLAMA),
        PETL,
    )
    weights: str | None = choice(
        "frozen weights in int8 or int4 answer faster on a CPU, with adapters in float32 beside "
        "them, and what that costs in quality is printed; of llama.cpp, the type of all weights "
        "(default: float32, or float16 if the model has 16 bits; int8 is its q8_0, int4 its q4_0)",
        ("float32", "float16", "q8_0", "int8", "int4"),
        None,
    )


@dataclass(kw_only=True)
class AnswerOptions(RunOptions, EngineOptions):
    """A command that lets a language model answer.

    Settings of sampling that are None have the value of the model's generation config.
    """

    run: str = argument(MODEL, writer)
    adapter: list[tuple[str, str]] = option(
        "a further adapter on the same base model, and its name; may be repeated",
        named_run,
        [],
        metavar="NAME=RUN",
        action="append",
    )
    system: str | None = option("system prompt (default: the run's)")
    drafter: str = option(
        "what guesses tokens ahead, for the same answer in less time: free (copies and recycles "
        "tokens), lookup or recycling (one of the two), none, the folder of a drafter, or auto, "
        "the run's own or else free",
        drafter,
        default="auto",
    )
    plain: bool | None = either(  # None is decided by the run
        "continue plain text, without the chat template (default: if the run has learned from "
        "plain text, or the model has no template)"
    )
    max_new_tokens: int | None = option(
        "tokens of an answer at most (default: the model's, else 512)", COUNT
    )
    temperature: float | None = option(
        "of sampling; 0: always the most likely token", number(float, 0, 100)
    )
    top_p: float | None = option("sample from the most likely tokens of this probability", FRACTION)
    top_k: int | None = option(
        "sample from this many most likely tokens; 0: from all", number(int, 0, 10**6)
    )
    repetition_penalty: float | None = option(
        "above 1: avoid tokens that occurred", number(float, 0.01, 100)
    )
    prompt_lookup: int | None = option(
        "guess up to this many tokens from earlier text and verify them in one pass: faster where "
        "answers repeat the prompt; greedy answers stay the same (up to rounding below float32)",
        number(int, 1, 1000),
    )
    stop: list[str] = option(
        "end an answer before this text; may be repeated", default=[], action="append"
    )
    json_schema: Path | None = option(
        "answer with JSON that follows the schema in this file", file_to_read
    )
    seed: int = option("of sampling", SEED, 0)


@command("generate", "writing:generate")
class GenerateOptions(AnswerOptions):
    """Let a model answer prompts.

    The model is the adapter of a run on its base model, or a merged model. Prompts are turns of the
    user in the model's chat template, or plain text to continue for models without one.

      petl generate RUN --prompt "What is MoLA?"
      petl generate RUN --image stamp.png --prompt "What is this?"
      petl generate RUN --file questions.jsonl --out answers.jsonl
      petl generate RUN --adapter other=RUN2 --base --prompt "What is MoLA?"  # side by side

    Rows of a file have the columns that the run was trained on, or those of a known format
    (messages, prompt, instruction, text); answers need not be there. Answers come in the order of
    the file, as rows with the columns of the file and `generated`; those of further adapters and of
    the base model are in generated_NAME.

    Without sampling settings, those of the model's generation config hold; if it has none, the most
    likely token is taken each time. One of --temperature, --top-p and --top-k turns sampling on.
    """

    ONE_OF = ("prompt", "file")
    prompt: list[str] = option(
        "a prompt; may be repeated; - reads stdin", default=[], action="append"
    )
    image: list[str] = option(
        "an image that each --prompt begins with; may be repeated",
        existing,
        default=[],
        action="append",
    )
    file: str | None = option("prompts: .txt (one per line), .jsonl, .csv, .parquet, ...", existing)
    out: Path | None = option(
        "write answers to this file: .jsonl, .csv, .tsv, .parquet", file_to_write
    )
    base: bool = switch("also answer with the base model, without an adapter")
    batch_size: int | None = option(
        f"prompts at a time (default: {BATCH}; 1 with a drafter, --stats or --prompt-lookup)", COUNT
    )
    check: bool = switch(
        "first test that passes over several tokens give what single ones give, and that an answer "
        "to the first prompt is what drafts promise"
    )
    stats: bool = switch("print what drafts saved; one prompt at a time")


@command("chat", "writing:chat")
class ChatOptions(AnswerOptions):
    """Chat with a model in the terminal.

    The model is the adapter of a run on its base model, or a merged model. The answer appears while
    it is written; Ctrl-C stops it, not the chat. /help lists the commands, such as /adapter NAME,
    which lets another adapter answer, or `base` the base model without one.

      petl chat RUN
      petl chat RUN --adapter other=RUN2 --temperature 0.7

    Settings of sampling are those of `petl generate`.
    """

    base: bool = switch("begin with the base model, without an adapter")


@command("serve", "serve:serve")
class ServeOptions(LoadOptions, EngineOptions):
    """Serve adapters over HTTP, with OpenAI's API.

    Any number of adapters share one base model. A request chooses an adapter by `model`: the name
    of its folder, or NAME; the base model's own name means no adapter. Requests of different
    adapters are computed together, and join and leave while others run.

      petl serve runs/french runs/legal
      petl serve fr=runs/french --port 8001 --max-batch 32

    Paths: /v1/models, /v1/chat/completions, /v1/completions, /health; of embedders
    (data.task=retrieval) /v1/embeddings, of rerankers /rerank. Ctrl-C ends the server.
    """

    runs: list[str] = argument(
        "folder of a run, of an adapter, or of a merged model, and its name for requests",
        served_run,
        metavar="[NAME=]RUN",
        nargs="+",
    )
    host: str = option("address to listen on (default: this machine only)", default="127.0.0.1")
    port: int = option("to listen on; 0: any free one", number(int, 0, 65535), 8000)
    api_key: str | None = option(
        f"that requests must have (default: ${API_KEY}; none: no key is needed)"
    )
    allow_anyone: bool = switch("with a --host that others reach: answer without a key")
    allow_host: list[str] = option(
        "a name by which clients call this server, such as that of a proxy in front; may be "
        "repeated (addresses, localhost and --host are allowed)",
        default=[],
        action="append",
    )
    max_batch: int = option(
        "answers, or texts, that are computed at the same time", number(int, 1, 10**6), 16
    )
    max_waiting: int = option(
        "further requests that may wait; the next ones get status 429", number(int, 1, 10**6), 256
    )
    max_tokens: int = option("tokens of an answer at most", number(int, 1, 10**6), 4096)
    plain: bool | None = either(  # None is decided by the run
        "read the turn of a chat as plain text, without the chat template (default: for runs that "
        "have learned from plain text, and models without a template)"
    )
    drafter: str | None = choice(
        "what guesses tokens ahead while one answer is computed alone, for the same answer in less "
        "time: free (copies and recycles tokens; the default), or none",
        ("free", NO_DRAFTS),
    )
    prefix_cache: int | None = option(
        "MB for keys and values of the beginnings of prompts, which later prompts that begin alike "
        "need not compute; 0: none (default: 256)",
        number(int, 0, 10**6),
    )


@command("draft", "drafts:draft")
class DraftOptions(RunOptions, ConfigOptions):
    """Train a drafter: faster answers of a run's model.

    The drafter is written to RUN/drafter, where petl generate finds it. The model answers prompts
    of its training examples; small heads learn to guess these answers ahead, or a table of likely
    next tokens is filled. Answers stay what they are, and come in fewer passes of the model.

      petl draft runs/mine +drafter=hydra
      petl draft runs/mine +drafter=hydra drafter.heads=4 draft.answers=500 draft.tokens=256
      petl draft runs/mine/adapter +drafter=hydra draft.file=prompts.jsonl
      petl draft runs/mine +drafter=recycling    # the table of a drafter without weights

    SETTINGs are those of configs/draft.yaml and configs/drafter. The folder of an adapter or a
    merged model has no training examples: draft.file names prompts. An earlier RUN/drafter is
    replaced.
    """

    run: str = argument(MODEL, writer)
    overrides: list[str] = argument(
        "+drafter=NAME, drafter.FIELD=VALUE, draft.SETTING=VALUE",
        default=[],
        metavar="SETTING",
        nargs="*",
    )


# From a saved adapter to another folder


@command("merge", "commands:merge")
class MergeOptions(CheckOptions):
    """Merge an adapter into its base model.

    Writes a plain model with config and tokenizer, which AutoModel...from_pretrained(OUT) loads
    without petl or PEFT. The outputs on test examples of the run are compared before and after
    merging; if they differ by more than the tolerance, nothing is written. Methods whose update
    depends on the input cannot be merged.
    """

    dtype: str | None = choice(
        "dtype of the merged model (default: that of the base; bfloat16 rounds the sum)",
        ("float32", "bfloat16"),
    )


@command("shrink", "shrink:shrink")
class ShrinkOptions(LoadOptions):
    """Make a model smaller: prune MLP channels, recover with a LoRA, merge.

      petl shrink runs/mine smaller --sparsity 0.3
      petl shrink runs/mine smaller --sparsity 0.5 --heads --recover 500 --rank 16
      petl shrink MODEL smaller --data reviews.csv data.label=stars

    RUN is the folder of a run, whose adapter is merged first, or of a model, to which --data gives
    rows. One forward pass over 128 training rows chooses the channels. Then a LoRA is trained on
    the training rows, with more rank in more important blocks, and merged. OUT is a plain model
    with shrink.json, README and page, which AutoModel...from_pretrained(OUT) loads; with --widths
    by_block, petl.load_shrunk(OUT). The model is scored on the test rows as it was, shrunk and
    recovered. OUT.train has the recovery, with which the same command goes on after an
    interruption.
    """

    run: str = argument("folder of a run, or of a model", saved_model)
    out: Path = argument("folder to write: new or empty", new_folder_to_write())
    overrides: list[str] = argument(
        "settings of `petl train` for a model, such as data.label=NAME",
        default=[],
        metavar="SETTING",
        nargs="*",
    )
    sparsity: float = option(
        "share of the MLP channels to remove", by_rule(float, bounded(gt=0, lt=1)), 0.3
    )
    widths: str = choice("channels of the blocks: equal, or by importance", WIDTHS, "even")
    multiple: int = option("of which the numbers of channels are multiples", COUNT, 8)
    heads: bool = switch("also remove heads of attention, the same number in every block")
    metric: str = choice("of the importance of blocks", METRICS, "angular")
    bias_correction: bool = switch("add what is removed, on average, to biases")
    recover: int | None = option(
        "optimizer steps of the recovery, 0 for none (default: as many as the run had)",
        number(int, 0, 10**9),
        metavar="STEPS",
    )
    rank: int = option("mean rank of the recovery's LoRA", COUNT, 8)
    data: Path | None = option("of a model: the file with its rows", file_to_read, metavar="FILE")


@command("export", "commands:export")
class ExportOptions(CheckOptions):
    """Convert an adapter (LoRA, small model, GGUF, ONNX) or a drafter.

    The outputs on test examples of the run are compared before anything is kept; if they differ by
    more than the tolerance, nothing is.

    --lora converts it to a plain LoRA, including trained heads, which PEFT and serving engines load
    without petl. The conversion is exact if the update is a low-rank product; any other update of
    the weight is factored by a full SVD. For a language model, the commands by which vLLM and
    SGLang serve the LoRA are printed, or why they cannot; `petl serve` serves the adapters of every
    method. A LoRA on stacks of experts is written as PEFT stores it; with --engine vllm, as vLLM
    reads it: by expert, unless the model's checkpoints have stacks too.
    --small writes the model that PELA (method pela) makes smaller: two thin layers in place of each
    adapted one, and ranks.json; petl.methods.pela.load, or the lines in OUT/README.md, loads it.
    --vllm writes the parallel heads of a drafter (petl draft RUN +drafter=hydra
    drafter.kind=parallel) as vLLM's Medusa model, which drafts beside the merged model. Give
    RUN/drafter in place of RUN.
    --gguf writes this LoRA of a decoder as OUT/adapter.gguf, for llama.cpp's --lora.
    --onnx merges the adapter of a classifier, or of an embedding model
    (task_type=FEATURE_EXTRACTION), and writes OUT/model.onnx in float32 with config and tokenizer.
    """

    run: str = argument("folder of a run, or of an adapter", saved_model)
    ONE_OF = ("lora", "small", "gguf", "vllm", "onnx")
    lora: bool = switch("a plain LoRA, for PEFT and serving engines")
    engine: str | None = choice("of --lora: what is to serve adapters of experts", ("vllm",))
    small: bool = switch("the plain small model of PELA (method pela), with low-rank layers")
    gguf: bool = switch(f"an adapter for llama.cpp ({install_hint('gguf')})")
    vllm: bool = switch("parallel heads of a drafter, RUN/drafter, as a Medusa model for vLLM")
    onnx: bool = switch(
        f"the merged model with its head, for ONNX runtime ({install_hint('onnx')})"
    )

    @property
    def format(self) -> str:
        """The name of the format."""
        return next(name for name in self.ONE_OF if getattr(self, name))


@command("check", "check:check")
class CheckAdapterOptions(Options):
    """Check a saved adapter for what makes it wrong without an error.

    PATH is the folder of an adapter from anywhere (PEFT, unsloth, LLaMA-Factory, axolotl, TRL,
    petl), of a run, or a repository on the Hub, of which only the adapter is downloaded. No pickle
    is read, no code is run, and no weights of a model are loaded without --base.

      petl check runs/mine
      petl check OWNER/NAME --engine vllm
      petl check FOLDER --base BASE --data rows.jsonl

    Exit status: 0 without errors (with --strict, and without warnings), 1 with one, 2 if PATH or
    the base cannot be read. What could not be checked is listed with the reason.
    """

    path: str = argument(
        "folder of an adapter or of a run, or OWNER/NAME on the Hub", repository_or_folder
    )
    base: str | None = option(
        "the base model: also compare weights, outputs, and what merging loses",
        metavar="FOLDER|NAME",
    )
    engine: str | None = choice(
        "what is to serve it: also an error if it cannot, or would compute something else",
        ("vllm", "sglang", "llama.cpp", "peft", "petl"),
    )
    data: Path | None = option("JSON Lines with rows of the training, such as chats", file_to_read)
    json: bool = switch("print JSON")
    strict: bool = switch("a warning gives exit status 1 as well")


@command("push", "hub:push")
class PushOptions(TrustOptions):
    """Upload an adapter or an exported model to the Hub.

    Uploads the adapter of a run, an adapter folder, or what `petl export` or `petl merge` wrote, to
    the Hugging Face Hub in one commit: weights, config, tokenizer or processor, names of labels and
    model card. Files are read strictly before; checkpoints, states of optimizers, code and links
    never go up. The base model is named as on the Hub, never by a folder of this machine. The token
    is that of HF_TOKEN or of `hf auth login`.

      petl push runs/verbs ada/verbs --dry-run
      petl push runs/verbs ada/verbs --private
    """

    run: str = argument("folder of a run, an adapter, or of `petl export` or `merge`", saved_model)
    name: str = argument("repository: OWNER/NAME, or NAME in your account")
    private: bool = switch("create a private repository")
    revision: str | None = option("branch to commit to (default: main)")
    message: str = option("message of the commit", default="")
    update: bool = switch("commit to a repository that exists already")
    base: str | None = option(
        "name of the base model on the Hub, if it was loaded from a folder of another name",
        metavar="OWNER/NAME[@REVISION]",
    )
    dry_run: bool = switch("list the files with their sizes, and upload nothing")


@command("pull", "hub:pull")
class PullOptions(Options):
    """Download an adapter or a model from the Hub, and check it.

    One commit of a repository is downloaded and read strictly: config, names and shapes of tensors,
    finite values. The folder appears once all of it was checked.

      petl pull ada/verbs
      petl pull ada/verbs verbs --revision 5e2f0a1
    """

    name: str = argument("repository: OWNER/NAME")
    folder: Path | None = argument(
        "folder to write, new or empty (default: the last part of NAME)",
        new_folder_to_write(),
        None,
        nargs="?",
    )
    revision: str | None = option("branch, tag or commit")


@dataclass(kw_only=True)
class ExcludeOptions(Options):
    """A command that changes tensors of adapters."""

    exclude: list[str] = option(
        "leave tensors unchanged in whose name a regular expression is found",
        default=[],
        metavar="PATTERN",
        nargs="+",
    )


@command("compress", "deltas:compress")
class CompressOptions(FolderOptions, ExcludeOptions):
    """Write an adapter 14 to 50 times smaller.

    Only the signs of the largest values are kept, with one magnitude (ComPEFT). `petl.load` and all
    commands read the folder; petl.deltas.expand makes a plain one of it.

      petl compress runs/mine small
      petl compress runs/mine small --density 0.1,0.2,0.5 --alpha fit,1,2,4

    Of several densities or alphas, the one that scores best on the run's validation rows is
    written.
    """

    density: list[float] = option(
        "fraction of the values kept", each(FRACTION), [0.5], metavar="D[,D...]"
    )
    alpha: list[float | str] = option(
        "their magnitude in standard deviations, or fit: the best in least squares",
        alphas,
        ["fit"],
        metavar="A[,A...]",
    )
    scope: str = choice(
        "the largest values of all tensors together, or of each", ("global", "tensor"), "tensor"
    )


@command("prune", "deltas:prune")
class PruneOptions(FolderOptions, ExcludeOptions):
    """Drop values of an adapter at random (DARE, DAREx).

    Writes an adapter of which a random fraction of the values is 0 and the others are divided by q.
    Of LoRA, only B is pruned: A does not start at 0.

      petl prune runs/mine thin --drop 0.9
      petl prune FINE_TUNED thin --drop 0.9 --q dare --base BASE
    """

    run: str = argument("folder of a run, or of an adapter", saved_model)
    drop: float = option("fraction of the values dropped", FRACTION, MISSING, metavar="P")
    q: float | Literal["auto", "dare", "searched"] = option(
        "divisor of the others: searched (the nearest outputs), dare (1 - P), auto (least "
        "expected error of each layer), or a number from 1 - P to 1",
        divisor,
        "searched",
    )
    base: Path | None = option(
        "RUN is a fully fine-tuned model: prune its difference from this one", Path
    )
    seed: int = option("of the masks", number(int, 0), 0)


@command("combine", "deltas:combine")
class CombineOptions(LoadOptions, ExcludeOptions):
    """Combine several adapters into one.

    Writes their sum (linear), or the sum of what is left of each after pruning by magnitude, by
    election of signs (ties), or at random (dare_linear, dare_ties).

      petl combine runs/verbs runs/nouns --out both --method ties --density 0.3
      petl combine runs/lora runs/mos --out both --level update
    """

    # one RUN alone is refused later, with a message that says why
    runs: list[str] = argument(
        "folder of a run, or of an adapter", saved_adapter, metavar="RUN", nargs="+"
    )
    out: Path = option("folder to write: new or empty", new_folder_to_write(), MISSING)
    # as in petl.adapters.deltas.combine, which imports torch
    method: str = choice(
        "how they are combined",
        ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"),
        "linear",
    )
    weights: list[float] | None = option("one a RUN", weights, metavar="W,W")
    density: float = option("fraction of each adapter's values kept", FRACTION, 1.0)
    level: str | None = choice(
        "update: of the weights, for any methods and ranks, as a LoRA (default, where the methods "
        "have one); tensors: of adapters of one method and size",
        ("tensors", "update"),
    )
    rank: int | None = option("largest rank of the LoRA", COUNT)
    seed: int = option("of the masks", number(int, 0), 0)
    scope: str = choice(
        "the largest values of all tensors together, or of each", ("global", "tensor"), "global"
    )


@command("strength", "strength:strength")
class StrengthOptions(RunOptions):
    """Turn an adapter up or down: what it learned and lost at each strength.

    The outputs of a layer are those of the base plus the strength times the adapter's update.
    Prints the score on the run's validation rows and what was lost on retained texts, and adds both
    to the run's scores and page; test rows decide nothing. A run without validation rows
    (train.eval_steps=null) needs --data.

      petl strength runs/mine
      petl strength runs/mine --choose 0.75 --out softer
      petl strength runs/mine --choose limit=0.1 --out softer
      petl strength runs/mine --data held-out.csv

    --choose writes an adapter with that strength in its weights, in its own format, which every
    command and PEFT load: with limit=L, the one with the best score of those that lose at most L
    nats per token (of models that do not write: a drift of L).
    """

    strengths: list[float] | None = option(
        "to try (default: 0 to 1.25; of icv, 0 to 0.4)", each(number(float, 0)), metavar="S[,S...]"
    )
    choose: tuple[str, float] | None = option(
        "the strength to write: a number, or limit=L", strength, metavar="S"
    )
    data: list[str] = option(
        "files with labels that the run was not trained on, in place of its validation rows",
        existing,
        default=[],
        metavar="FILE",
        nargs="+",
    )
    retain: list[str] | None = option(
        "files with a column text (default: the texts that petl brings)",
        file_or_setting,
        metavar="FILE",
        nargs="+",
    )
    out: Path | None = option("folder to write with --choose: new or empty", new_folder_to_write())
    batch_size: int | None = option("texts per batch", COUNT)


@command("narrow", "deltas:narrow")
class NarrowOptions(RunOptions):
    """Write the first components of an adapter as one of that width.

    RUN has an adapter of lora, rslora, dora, mola, adapter or compacter. Of a run with +loss=nested
    each of its widths was trained to work alone; another adapter can be cut too, to see what its
    first components do. Nothing is trained, and trained heads are copied.

      petl narrow runs/mine 8
      petl narrow runs/mine 8 --out small
    """

    width: int = argument("components to keep", COUNT)
    out: Path | None = option(
        "folder to write: new or empty (default: beside RUN, named after it)", new_folder_to_write()
    )


@command("squeeze", "squeeze:squeeze")
class SqueezeOptions(RunOptions):
    """Divide a budget of bytes over an adapter's layers.

    Writes an adapter whose file of weights has at most so many bytes, with the levels of its layers
    chosen by an evolutionary search (EvoPress): the outputs stay near those of the adapter as it
    is.

      petl squeeze runs/mine --bytes 100KB
      petl squeeze runs/mine --share 0.05 --what rank --generations 20

    density: how many values of each module ComPEFT keeps (`petl compress`), for any method; rank:
    of a LoRA, and of what `petl export --lora` takes; bits: of the tensors of the method binary.

    Candidates are compared on the run's validation rows, or on train rows without any; test rows
    decide nothing. Ctrl-C ends the search and writes the best so far; the same command goes on from
    there.
    """

    ONE_OF = ("bytes", "share")
    bytes: int | None = option("largest size of the file of weights: 100KB", byte_count)
    share: float | None = option(
        "the same as a fraction of the adapter's own file", number(float, 0, 1, above=True)
    )
    # as in petl.adapters.search.features, which imports torch
    what: str = choice("what is searched", ("density", "rank", "bits"), "density")
    out: Path | None = option(
        "folder to write: new, or of a search to resume (default: beside RUN, named after it)", Path
    )
    generations: int = option("to search", COUNT, 50)
    offspring: int = option("candidates of a generation", COUNT, 32)
    rows: int = option("rows to compare on", COUNT, 512)
    metric: str = choice(
        "kl: divergence from the adapter's outputs; loss: on the labels", ("kl", "loss"), "kl"
    )
    seed: int = option("of the search", number(int, 0), 0)
