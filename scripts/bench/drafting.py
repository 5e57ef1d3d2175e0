"""Section `drafting`: answers with drafts, relative to plain `generate`.

Four kinds of prompts: word problems (reasoning-gym), and Hamlet to continue, copy and explain.
Plain decoding and each drafter answer them in turn, prompt by prompt, in one process, so that the
load of the machine hits both parts of a ratio. Decoding is greedy, and answers are compared. One
more row samples after random ids at a high temperature: text that no drafter can guess.
Each answered prompt is a file, and is not answered again by a later run.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import petl
from bench.draft_prompts import KINDS, RANDOM, Prompts, blocks, pretrained, tiny
from bench.draft_times import Answerer, plain_seconds, record, timed
from bench.kept import Content, keep, kept
from bench.records import Record
from petl.efficiency.drafting import Costs, answers, decode, drafter, fit, load_drafter
from petl.efficiency.drafting.lookup import LookupFirst
from petl.errors import InputError
from petl.ops.packed import is_supported, packable, packed_weights
from petl.training.runs.environment import git_revision

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens of the passes that are timed
PARTS = ("lookup", "recycling")  # of "free", measured alone on the base model
NONE, FREE, RANDOM_TEXT = "no drafts", "free", "free, random text"
HEADS = "lookup, else trained heads"
THEIRS = "transformers' prompt lookup"
GOALS: dict[tuple[str, str], float] = {  # of the speed: row, dtype
    (NONE, "float32"): 1.0,
    (NONE, "bfloat16"): 1.0,
    (RANDOM_TEXT, "float32"): 0.97,
    (RANDOM_TEXT, "bfloat16"): 0.97,
    (FREE, "float32"): 1.35,
    (FREE, "bfloat16"): 1.4,
    (HEADS, "float32"): 1.6,
    (HEADS, "bfloat16"): 1.6,
}
MANY = 160  # answers that heads are trained on, with which the goal of HEADS is
GOALS_OF_MANY = {"float32": 2.0, "bfloat16": 1.8}
GOAL_OF_MOLA = 1.0  # of FREE with MoLA, which does not merge: over the base model's plain decoding
# of the adapted models, trained a little: their answers are to differ from the base model's
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": "block-linear"},
    "mola": {"r": 8, "num_experts": 8, "top_k": 2},
    "adapter": {"r": 48},
}
MERGED = "merged"  # LoRA
LR = 1e-3
TEMPERATURE = 3.0  # at which hardly a token is the likeliest


@dataclass(frozen=True)
class Plan:
    """What the section measures.

    Attributes:
        model: a name in configs/model; "": a tiny model with random weights.
        prompts: of each kind.
        tokens: of an answer.
        dtypes: of the model.
        states: "base", a method of `FIELDS`, or `MERGED`.
        steps: of training an adapter.
        heads: answers that draft heads are trained on, for each state; 0: no heads.
        runs: finished runs, whose adapters are taken in place of those of these states.
        drafters: folders of saved drafters, each a row behind lookup.
        folder: of the answered prompts, to be resumed.
        report: measure nothing: what is finished.
    """

    model: str = "smollm2"
    prompts: int = 8
    tokens: int = 96
    dtypes: Sequence[str] = ("float32", "bfloat16")
    states: Sequence[str] = ("base", "lora", MERGED, "mola", "adapter")
    steps: int = 8
    heads: int = 80
    runs: Mapping[str, str] = field(default_factory=dict)
    drafters: Sequence[str] = ()
    folder: Path = Path("runs/drafting")
    report: bool = False

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in ("base", MERGED, *FIELDS):
                known = ", ".join(("base", MERGED, *FIELDS))
                raise InputError(f"the section drafting has no state {state!r}; it has {known}")


QUICK = Plan(model="", prompts=1, tokens=12, states=("base", "lora"), steps=1, heads=8)


def measure(plan: Plan, progress: Callable[[str], Any] = lambda line: None) -> list[Record]:
    """Return a record for each row of each dtype and state; what is finished is not repeated."""
    records: list[Record] = []
    for dtype in plan.dtypes:
        loaded = Loaded(plan, dtype)
        plain_base = 0.0  # seconds of a token of the base model
        for state in plan.states:
            own = State(plan, loaded, state, progress)
            if not plan.report:
                own.measure()
            if own.greedy and state == "base":
                plain_base = plain_seconds(own.greedy, plan.tokens)
            records += own.records(0.0 if state == "base" else plain_base)
    return records


@dataclass(frozen=True)
class Loaded:
    """A base model and its prompts, loaded when a state needs them."""

    plan: Plan
    dtype: str

    @cached_property
    def both(self) -> tuple[Any, Prompts]:
        """The model and the prompts."""
        load = pretrained if self.plan.model else tiny
        plan = self.plan
        return load(plan.model, plan.prompts, getattr(torch, self.dtype), plan.heads)


def adapted(base: Any, state: str, plan: Plan, prompts: Prompts) -> Any:
    """Return a model with an adapter of this state, trained a little or from its run."""
    method = "lora" if state == MERGED else state
    model: Any = copy.deepcopy(base)
    if method in plan.runs:
        model = petl.load(model, plan.runs[method])
    else:
        torch.manual_seed(0)
        model = petl.wrap(model, method, task_type="CAUSAL_LM", **FIELDS[method]).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)
        for ids in blocks(prompts, plan.steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    if state == MERGED:
        model.merge_adapter()
    else:
        petl.fuse_lora(model)
    return model


class State:
    """A base or adapted model in a dtype, and the answers to prompts that it has given.

    Drafters learn while they decode. So they are saved after each prompt, and a run that goes on
    begins with their tables and frequencies (the latter with the weight of a prior).
    """

    def __init__(
        self, plan: Plan, loaded: Loaded, state: str, progress: Callable[[str], Any]
    ) -> None:
        self.plan, self.loaded, self.state, self.progress = plan, loaded, state, progress
        self.name = f"{plan.model or 'tiny'}, {state}, {loaded.dtype}"
        settings = {
            "prompts": plan.prompts, "tokens": plan.tokens, "steps": plan.steps,
            "heads": plan.heads, "run": plan.runs.get("lora" if state == MERGED else state),
            "drafters": list(plan.drafters),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        self.folder = plan.folder / f"{self.name.replace(', ', '-')}-{key}"
        counts = dict.fromkeys(KINDS, plan.prompts) | {"random": RANDOM * plan.prompts}
        # kinds by turns, as in use
        order = [(i, kind) for kind, count in counts.items() for i in range(count)]
        order.sort(key=lambda pair: (pair[1] == "random", pair[0]))
        self.files = {
            (kind, i): self.folder / f"{n:03}-{kind}.json" for n, (i, kind) in enumerate(order)
        }

    # What is finished

    @cached_property
    def about(self) -> Content | None:
        """What was measured before the first prompt."""
        return kept(self.folder / "about.json")

    @property
    def finished(self) -> list[Content]:
        """The prompts that were answered."""
        return [content for file in self.files.values() if (content := kept(file))]

    @property
    def greedy(self) -> list[Content]:
        """Those of them that were answered greedily."""
        return [content for content in self.finished if content["kind"] != "random"]

    # Measuring

    def measure(self) -> None:
        """Answer the prompts that are not answered yet."""
        left = {key: file for key, file in self.files.items() if not file.is_file()}
        if not left:
            return
        self.progress(f"drafting: {self.name}, {len(left)} of {len(self.files)} prompts")
        base, prompts = self.loaded.both
        began = time.process_time()
        model = base if self.state == "base" else adapted(base, self.state, self.plan, prompts)
        training = time.process_time() - began
        model.eval()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        pack = is_supported() and bool(packable(inner))
        copies = packed_weights(inner) if pack else None
        if copies is not None:
            copies.update(inner)
        about = keep(
            self.folder / "about.json", lambda: self._about(model, inner, copies, training)
        )
        costs = Costs({int(n): seconds for n, seconds in about["seconds"].items()})
        rows = self._rows(model, inner, costs, 0 if copies is None else copies.nbytes)
        tokens = self.plan.tokens
        for (kind, i), file in left.items():
            self.progress(f"drafting: {self.name}, {kind} {i + 1}")
            own = [row for row in rows if row.name == FREE] if kind == "random" else rows
            temperature = TEMPERATURE if kind == "random" else None
            ids = prompts.of(kind)[i]
            # another seed for each prompt: the drafter learns
            found = timed(model, inner, ids, own, tokens, seed=i, temperature=temperature)
            self._save(rows)
            keep(file, lambda kind=kind, found=found: {"kind": kind, "rows": found})
            self._tidy()

    def _about(self, model: Any, inner: Any, copies: Any, training: float) -> Content:
        """Measure passes, and train heads."""
        clock = time.process_time
        costs = Costs.measure(inner, counts=COUNTS, rounds=3, packed=copies, clock=clock)
        facts = {f"c({n})": costs.ratio(n) for n in (4, 8, 16)}
        facts |= {} if self.state == "base" else {"training s": training}
        if self.plan.heads:
            began = clock()
            others = self.loaded.both[1].others
            heads = drafter("hydra", model=inner)
            fit(heads, answers(model, others, tokens=self.plan.tokens, pad_token_id=0))
            facts["heads' training s"] = clock() - began
            heads.save(self.folder / "heads")
        return {
            "facts": facts,
            "seconds": costs.seconds,
            "git": git_revision(Path(__file__).parent),
        }

    def _rows(self, model: Any, inner: Any, costs: Costs, packed: int) -> list[Answerer]:
        """Return the ways to answer, transformers' own drafts included."""
        common = {"custom_generate": decode, "clock": time.process_time, "costs": costs}
        common["pack"] = bool(packed)
        rows = [replace(Answerer(NONE), arguments=common)]
        for row in self.rows[1:]:
            if not row.is_own:
                rows.append(replace(row, arguments={"prompt_lookup_num_tokens": 10}))
                continue
            own = self._drafter(row.name, model)
            arguments = {**common, "drafter": own}
            rows.append(replace(row, arguments=arguments, drafter=own, memory=packed))
        return rows

    def _drafter(self, name: str, model: Any) -> Any:
        """Return the drafter of a row, as it was after the last prompt."""
        saved = self._place(len(self.finished)) / self._slug(name)
        if name == FREE or name in PARTS:
            return load_drafter(saved, model) if saved.is_dir() else drafter(name, model=model)
        source = saved if saved.is_dir() else self.folder / "heads" if name == HEADS else name
        return LookupFirst(load_drafter(source, model))

    def _save(self, rows: Sequence[Answerer]) -> None:
        place = self._place(len(self.finished) + 1)
        shutil.rmtree(place, ignore_errors=True)  # of a run that was ended in between
        for row in rows:
            own: Any = row.drafter
            if own is not None:
                inner = own.drafter if isinstance(own, LookupFirst) else own
                inner.save(place / self._slug(row.name))

    def _tidy(self) -> None:
        count = len(self.finished)
        for place in self.folder.glob("drafters-*"):
            if place != self._place(count):
                shutil.rmtree(place)

    def _place(self, count: int) -> Path:
        return self.folder / f"drafters-{count}"

    def _slug(self, name: str) -> str:
        return str([row.name for row in self.rows].index(name))

    # Records

    @property
    def rows(self) -> list[Answerer]:
        """The rows of the table, without what they need to answer."""
        names = [NONE, *(PARTS if self.state == "base" else ()), FREE]
        names += [*([HEADS] if self.plan.heads else ()), *self.plan.drafters]
        return [*map(Answerer, names), Answerer(THEIRS, is_own=False)]

    def records(self, plain_base: float) -> list[Record]:
        """Return the records of what is finished."""
        found = self.finished
        if self.about is None or not self.greedy:
            return []
        records = []
        tokens = self.plan.tokens
        for row in self.rows:
            facts = self.about["facts"] if row.name == NONE else {}
            facts = {**self._goal(row.name), **facts}
            records.append(record(self.name, row, self.greedy, tokens, plain_base, facts))
        drawn = [
            {**content, "rows": {RANDOM_TEXT: content["rows"][FREE]}}
            for content in found
            if content["kind"] == "random"
        ]
        if drawn:
            row, facts = Answerer(RANDOM_TEXT), self._goal(RANDOM_TEXT)
            records.append(record(self.name, row, drawn, tokens, plain_base, facts))
        return records

    def _goal(self, row: str) -> dict[str, float]:
        if not self.plan.model:  # a tiny one, for tests
            return {}
        dtype = self.loaded.dtype
        goal = GOALS.get((row, dtype))
        if row == HEADS and self.plan.heads >= MANY:
            goal = GOALS_OF_MANY[dtype]
        found = {} if goal is None else {"goal speed": goal}
        if row == FREE and self.state == "mola":
            found["goal speed / plain base"] = GOAL_OF_MOLA
        return found
