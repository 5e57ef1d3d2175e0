"""The code in a model card: load the base model and the adapter, and predict; its YAML block.

Values in the code are literals, in which `repr` escapes what could end the block of code.
"""

from dataclasses import dataclass
from pprint import pformat
from typing import Any

import yaml
from transformers import AutoTokenizer

from petl.core.types import Settings
from petl.data.models.sources import ModelSource, RandomInit
from petl.data.tasks.base import Task
from petl.system.files.paths import OnHub

BASE = "base"  # subfolder for the config of a base model that has no files elsewhere
WIDTH = 96
# `petl push` writes the name on the Hub in place of the folder
ADAPTER = 'adapter = "."  # this folder'
MERGED = 'merged = "."  # this folder'
LOCAL_BASE = 'base_model = "path/to/base_model"  # a folder of your own, see below'
TEXT = '"Replace this by your own text."'
RESIZED = """\
if len({tokenizer}) > base.get_input_embeddings().num_embeddings:  # rows for new tokens
    base.resize_token_embeddings(len({tokenizer}), mean_resizing=False)"""
LOGITS = "with torch.no_grad():\n    logits = model(**inputs).logits"
CLASS = "print(classes[int(logits.argmax())])"
GENERATE = """\
output = model.generate(**inputs, max_new_tokens={new_tokens})
print(tokenizer.decode(output[{answer}], skip_special_tokens=True))"""
# by the task's name; `texts` are the arguments of the tokenizer
PREDICT = {
    "classification": f"inputs = {{encode}}\n{LOGITS}\n{CLASS}",
    "multi_label": f"""\
inputs = {{encode}}
{LOGITS}
print([classes[i] for i in (logits[0].sigmoid() >= {{threshold}}).nonzero().flatten().tolist()])""",
    "multitask_classification": f"""\
inputs = {{encode}}
{LOGITS}
own = [i for i, name in enumerate(classes) if name.startswith(task + "/")]
print(classes[own[int(logits[0, own].argmax())]])""",
    "regression": f"inputs = {{encode}}\n{LOGITS}\nprint(float(logits))",
    "reranking": f"""\
inputs = tokenizer(
    "a query", "a document", truncation=True, max_length={{max_length}}, return_tensors="pt"
)
{LOGITS}
print(float(logits))  # the higher, the earlier the document comes for this query""",
    "retrieval": """\
inputs = {encode}
with torch.no_grad():
    states = model(**inputs).last_hidden_state[0]
print({vector})  # of a document""",
    "token_classification": f"""\
inputs = {{encode}}
{LOGITS}
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
print([(token, classes[int(label)]) for token, label in zip(tokens, logits[0].argmax(-1))])""",
    "question_answering": """\
question, context = "Who wrote it?", "It was written by Ada."
inputs = tokenizer(question, context, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
first, last = int(output.start_logits.argmax()), int(output.end_logits.argmax())
print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))""",
    "causal_lm": f"""\
inputs = tokenizer({TEXT}, return_token_type_ids=False, return_tensors="pt")
{GENERATE}""",
    "chat": f"""\
messages = [{{{{"role": "user", "content": "Replace this by your own question."}}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(
    prompt, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
)
{GENERATE}""",
    "seq2seq": f"inputs = {{encode}}\n{GENERATE}",
    "reward": f"""\
messages = [
    {{{{"role": "user", "content": "Replace this by your own question."}}}},
    {{{{"role": "assistant", "content": "Replace this by an answer."}}}},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
{LOGITS}
print(float(logits))""",
    "image_classification": f"""\
image = Image.new("RGB", (64, 64))  # or Image.open(FILE).convert("RGB")
inputs = processor(image, return_tensors="pt")
{LOGITS}
{CLASS}""",
    "image_text": """\
image = Image.new("RGB", (64, 64))  # or Image.open(FILE).convert("RGB")
question = "Replace this by your own question."
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens={new_tokens})
print(processor.decode(output[{answer}], skip_special_tokens=True))""",
    "image_question": """\
image = Image.new("RGB", (64, 64))  # or Image.open(FILE).convert("RGB")
question = "Replace this by your own question."
if processor.chat_template is None:  # it puts the image before one question
    inputs = processor(text=question, images=image, return_tensors="pt")
else:
    content = [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
output = model.generate(**inputs, max_new_tokens={new_tokens})
print(processor.decode(output[{answer}], skip_special_tokens=True))""",
    "audio_classification": f"""\
rate = processor.sampling_rate  # samples per second that the model was trained on
sound = np.zeros({{seconds}} * rate, np.float32)  # mono
inputs = processor(sound, sampling_rate=rate, return_tensors="pt")
{LOGITS}
{CLASS}""",
}
IMPORTS = {
    "image_classification": "from PIL import Image",
    "image_text": "from PIL import Image",
    "audio_classification": "import numpy as np",
}


@dataclass(frozen=True)
class Usage:
    """What the lines of code depend on.

    Attributes:
        task: of the adapter.
        source: of the base model.
        base: where the Hub has it; None: nowhere.
        loader: of the adapter: "petl.load", "PeftModel.from_pretrained", or "" if it is merged
            into the base model.
        pair: rows have a second text.
        takes_task_ids: the adapter serves several tasks, and needs the one of each row.
    """

    task: Task
    source: ModelSource
    base: OnHub | None
    loader: str
    pair: bool = False
    takes_task_ids: bool = False

    @property
    def code(self) -> str:
        """The lines that load the adapter or merged model in a folder, and make a prediction."""
        place = ADAPTER if self.loader else MERGED
        return f"{self.imports}\n\n{place}\n{self.loading}\n\n{self.prediction}"

    @property
    def imports(self) -> str:
        """The import statements, sorted as usual."""
        auto, processor = self.task.auto_class.__name__, self.task.processor_class.__name__
        config = ["AutoConfig"] if self.loader and self.is_random else []
        lines = {
            "petl.load": ["import petl"],
            "PeftModel.from_pretrained": ["from peft import PeftModel"],
        }
        own = IMPORTS.get(self.task.name)
        return "\n".join(
            [
                *([own] if own else []),
                "import torch",
                *lines.get(self.loader, []),
                f"from transformers import {', '.join([*config, auto, processor])}",
            ]
        )

    @property
    def is_random(self) -> bool:
        """True if the base model has random weights."""
        return isinstance(self.source, RandomInit)

    @property
    def loading(self) -> str:
        """The statements that build `model`, and the tokenizer or processor."""
        labels = self.task.labels
        place = "adapter" if self.loader else "merged"
        named = [] if labels is None else [_assignment("classes", labels)]
        processor = f"{self.task.processor_class.__name__}.from_pretrained"
        loading = call(self.word, processor, [place, *self.trust])
        if not self.loader:
            auto = f"{self.task.auto_class.__name__}.from_pretrained"
            words = [place, f"dtype={literal(self.source.dtype)}", *self.trust]
            return "\n".join([*named, call("model", auto, words), loading])
        base = self._random() if self.is_random else self._pretrained()
        model = f"model = {self.loader}(base, adapter).eval()"
        if self.task.new_tokens:
            is_text = self.word == "tokenizer"
            resized = RESIZED.format(tokenizer="tokenizer" if is_text else "processor.tokenizer")
            return "\n".join([*named, *base, loading, resized, model])
        return "\n".join([*named, *base, model, loading])

    @property
    def trust(self) -> list[str]:
        """The argument that allows the code of a repository, if the model needs it."""
        trusted = getattr(self.source, "trust_remote_code", False)
        return ["trust_remote_code=True"] if trusted else []

    @property
    def word(self) -> str:
        """The name of the variable for the tokenizer or processor."""
        return "tokenizer" if self.task.processor_class is AutoTokenizer else "processor"

    def _pretrained(self) -> list[str]:
        fields = self.task.model_kwargs()
        options = [
            f"{k}={literal(v)}" for k, v in fields.items() if k not in ("id2label", "label2id")
        ]
        if self.task.labels is not None:
            options += ["id2label=dict(enumerate(classes))"]
        if "num_labels" in fields:  # the adapter has the head; that of the base model may differ
            options += ["ignore_mismatched_sizes=True"]
        options += self.trust
        if self.base is not None and self.base.revision:
            options = [f"revision={literal(self.base.revision)}", *options]
        auto = f"{self.task.auto_class.__name__}.from_pretrained"
        named = f"base_model = {literal(self.base.name)}" if self.base else LOCAL_BASE
        words = ["base_model", f"dtype={literal(self.source.dtype)}", *options]
        return [named, call("base", auto, words)]

    def _random(self) -> list[str]:
        assert isinstance(self.source, RandomInit)
        auto = f"{self.task.auto_class.__name__}.from_config"
        return [
            f"config = AutoConfig.from_pretrained(adapter, subfolder={literal(BASE)})",
            f"torch.manual_seed({self.source.seed})",
            call("base", auto, ["config", f"dtype=torch.{self.source.dtype}"]),
        ]

    @property
    def prediction(self) -> str:
        """The statements that make a prediction."""
        task = self.task
        # a decoder of its own gives the answer alone
        is_apart = task.peft_task_type == "SEQ_2_SEQ_LM"
        name = "image_question" if is_apart and task.used_as == "image_text" else task.used_as
        # of several sets, the code is for the first
        limit = getattr(task, "limits", [getattr(task, "max_length", None)])[0]
        is_pair = self.pair or (bool(task.tasks) and task.tasks[0] in getattr(task, "pairs", ()))
        texts = [TEXT, *(['"The second text."'] if is_pair else [])]
        prefix = task.prefix or getattr(task, "document_prefix", "")
        if prefix:  # of seq2seq and of retrieval
            texts = [f"{literal(prefix)} + {TEXT}"]
        options = ["truncation=True", f"max_length={limit}"]
        if name == "seq2seq":
            options += ["return_token_type_ids=False"]
        encode = call("inputs", "tokenizer", [*texts, *options, 'return_tensors="pt"'])
        code = PREDICT[name].format(
            encode=encode.removeprefix("inputs = "),
            max_length=limit,
            threshold=task.threshold or 0.5,
            vector=vector_of(task) if name == "retrieval" else "",
            seconds=round(getattr(task, "max_seconds", 1)) or 1,
            new_tokens=task.generate or getattr(task, "max_target_length", 64),
            answer="0" if is_apart else '0, inputs["input_ids"].shape[1] :',
        )
        return self._of_a_task(code) if task.tasks else code

    def _of_a_task(self, code: str) -> str:
        """Return the code of a prediction for a row of the first of several tasks."""
        tasks = list(self.task.tasks)
        lines = [_assignment("tasks", tasks), "task = tasks[0]  # of the text"]
        if self.takes_task_ids:
            lines.append("task_ids = torch.tensor([tasks.index(task)])")
            code = code.replace("(**inputs", "(**inputs, task_ids=task_ids")
        return "\n".join([*lines, code])


def vector_of(task: Any) -> str:
    """The expression of a text's vector, from the states of its tokens."""
    pooled = {"mean": "states.mean(0)", "cls": "states[0]", "last": "states[-1]"}
    vector = pooled[task.pooling or "mean"]
    return f"torch.nn.functional.normalize({vector}, dim=0)" if task.normalize else vector


def call(name: str, function: str, arguments: list[str]) -> str:
    """The statement `name = function(arguments)`, on several lines if it is long."""
    line = f"{name} = {function}({', '.join(arguments)})"
    if len(line) <= WIDTH:
        return line
    return f"{name} = {function}(\n" + "".join(f"    {each},\n" for each in arguments) + ")"


def placed(text: str, place: str) -> str:
    """Return a card in whose code the adapter or model is at `place`, a folder or repository."""
    for line in (ADAPTER, MERGED):
        name = line.partition(" ")[0]
        text = text.replace(f"\n{line}\n", f"\n{name} = {literal(place)}\n")
    return text


def literal(value: object) -> str:
    """Return `repr(value)`, a text in double quotes if nothing in it needs an escape."""
    text = repr(value)
    is_plain = isinstance(value, str) and not set(text[1:-1]) & {"'", '"', "\\"}
    return f'"{value}"' if is_plain else text


def _assignment(name: str, value: object) -> str:
    line = f"{name} = {value!r}"
    if len(line) <= WIDTH:
        return line
    return f"{name} = {pformat(value, compact=True, width=WIDTH)}"


def front_matter(fields: Settings) -> str:
    """Return the YAML block at the start of a markdown file, with its marks."""
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"
