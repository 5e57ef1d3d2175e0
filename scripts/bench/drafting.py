"""Section `drafting`: answers with drafts, relative to plain `generate`.

Four kinds of prompts: word problems (reasoning-gym), and Hamlet to continue, copy and explain.
Plain decoding and each drafter answer them in turn, prompt by prompt, in one process, so that the
load of the machine hits both parts of a ratio. Decoding is greedy, and answers are compared. One
more row samples after random ids at a high temperature: text that no drafter can guess.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import petl
from bench.clocks import Spread, in_turn
from bench.draft_prompts import KINDS, Prompts, blocks, pretrained, tiny
from bench.records import Record
from petl.drafting import Costs, Drafter, decode, drafter, load_drafter
from petl.errors import InputError
from petl.ops.packed import is_supported, packable, packed_weights

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens of the passes that are timed
OURS = ("lookup", "recycling", "free")
NONE, RANDOM = "no drafts", "free, random text"
THEIR_LOOKUP, THEIR_EXIT = "transformers' prompt lookup", "transformers' early exit"
GOALS: dict[tuple[str, str], float] = {  # of the speed: row, dtype
    (NONE, "float32"): 1.0,
    (NONE, "bfloat16"): 1.0,
    (RANDOM, "float32"): 0.97,
    (RANDOM, "bfloat16"): 0.97,
    ("free", "float32"): 1.35,
    ("free", "bfloat16"): 1.4,
}
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
        runs: finished runs, whose adapters are taken in place of those of these states.
        drafters: folders of saved drafters, each a row of the base model's tables.
    """

    model: str = "smollm2"
    prompts: int = 8
    tokens: int = 96
    dtypes: Sequence[str] = ("float32", "bfloat16")
    states: Sequence[str] = ("base", "lora", MERGED, "mola", "adapter")
    steps: int = 8
    runs: Mapping[str, str] = field(default_factory=dict)
    drafters: Sequence[str] = ()

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in ("base", MERGED, *FIELDS):
                known = ", ".join(("base", MERGED, *FIELDS))
                raise InputError(f"the section drafting has no state {state!r}; it has {known}")


QUICK = Plan(model="", prompts=1, tokens=12, states=("base", "lora"), steps=1)


@dataclass(frozen=True)
class Answerer:
    """A way to answer: arguments of `generate` beside the common ones, and its drafter."""

    name: str
    arguments: Mapping[str, Any]
    drafter: Drafter | None = None
    is_own: bool = True
    counts_passes: bool = True


def measure(plan: Plan) -> list[Record]:
    """Return a record for each row of each dtype and state."""
    records: list[Record] = []
    for dtype in plan.dtypes:
        base, prompts = (tiny if not plan.model else pretrained)(
            plan.model, plan.prompts, getattr(torch, dtype)
        )
        plain = 0.0  # seconds of a token of the base model
        for state in plan.states:
            began = time.process_time()
            model = base if state == "base" else adapted(base, state, plan, prompts)
            spent = time.process_time() - began
            found, seconds = _records(model.eval(), state, dtype, plan, prompts, plain, spent)
            plain = seconds if state == "base" else plain
            records += found
    return records


def adapted(base: Any, state: str, plan: Plan, prompts: Prompts) -> Any:
    """Return a copy of a model with an adapter of this state, trained a little or from its run."""
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


def answerers(model: Any, base: Any, plan: Plan, costs: Costs, *, pack: bool) -> list[Answerer]:
    """Return the rows of a model, transformers' own drafts included."""
    common = {"custom_generate": decode, "clock": time.process_time, "costs": costs}
    common["pack"] = pack
    rows = [Answerer(NONE, common)]
    for name in (*OURS, *plan.drafters):
        is_folder = name in plan.drafters
        own = load_drafter(name, model) if is_folder else drafter(name, model=model)
        rows.append(Answerer(name, {**common, "drafter": own}, own))
    layers = base.config.get_text_config().num_hidden_layers
    theirs = {THEIR_LOOKUP: {"prompt_lookup_num_tokens": 10}}
    if model is base:  # it takes the same passes with adapters
        theirs[THEIR_EXIT] = {"assistant_early_exit": max(1, layers // 5)}
    rows += [
        # drafts of the early exit are passes of the same model
        Answerer(name, more, is_own=False, counts_passes=name == THEIR_LOOKUP)
        for name, more in theirs.items()
    ]
    return rows


def _records(
    model: Any,
    state: str,
    dtype: str,
    plan: Plan,
    prompts: Prompts,
    plain_base: float,
    training: float,
) -> tuple[list[Record], float]:
    """Return the records of a state, and the seconds of a token of plain decoding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    pack = is_supported() and bool(packable(base))
    copies = packed_weights(base) if pack else None
    if copies is not None:
        copies.update(base)
    costs = Costs.measure(base, counts=COUNTS, rounds=3, packed=copies, clock=time.process_time)
    rows = answerers(model, base, plan, costs, pack=pack)
    shape = f"{plan.model or 'tiny'}, {state}, {dtype}"
    facts = {f"c({n})": costs.ratio(n) for n in (4, 8, 16)}
    facts |= {"packed MB": 0.0 if copies is None else copies.nbytes / 1e6}
    facts |= {} if state == "base" else {"training s": training}
    free = next(row for row in rows if row.name == "free")
    timed = Timed(model, base, plan.tokens, rows)
    for kind in KINDS:
        for ids in prompts.of(kind):
            timed.add(kind, ids)
    unguessable = Timed(model, base, plan.tokens, [free], temperature=TEMPERATURE)
    for ids in prompts.of("random"):
        unguessable.add("random", ids)
    unguessable.close()
    timed.close()
    records = []
    for row in rows:
        own = timed.facts(row, plain_base)
        goal = GOALS.get((row.name, dtype))
        own |= {} if goal is None or not plan.model else {"goal speed": goal}
        if row.drafter is not None:
            own["drafter MB"] = sum(t.nbytes for t in row.drafter.state_dict().values()) / 1e6
        own |= facts if row.name == NONE else {}
        records.append(timed.record(shape, row, own))
    own = {"speed": 1 / Spread.of(unguessable.ratios["free"]).median}
    own |= {"goal speed": GOALS[RANDOM, dtype]} if plan.model else {}
    records.append(
        Record(
            "drafting",
            shape,
            RANDOM,
            ratios={"time / plain": Spread.of(unguessable.ratios["free"])},
            counts={"unequal answers": unguessable.unequal["free"]},
            facts=own,
        )
    )
    return records, timed.plain_seconds()


class Timed:
    """Answers of plain decoding and of others to the same prompts, in turn.

    Attributes:
        ratios: time over plain decoding, of each prompt, by row.
        unequal: number of answers that are not those of plain decoding, by row.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        tokens: int,
        rows: Sequence[Answerer],
        *,
        temperature: float | None = None,
    ) -> None:
        self.model, self.tokens, self.rows = model, tokens, rows
        self.settings: dict[str, Any] = {
            "max_new_tokens": tokens, "min_new_tokens": tokens, "use_cache": True, "num_beams": 1,
            "do_sample": temperature is not None, "temperature": temperature, "pad_token_id": 0,
            "repetition_penalty": 1.0,
        }  # fmt: skip
        names = [row.name for row in rows]
        self.ratios: dict[str, list[float]] = {name: [] for name in names}
        self.by_kind: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        self.unequal = dict.fromkeys(names, 0)
        self.passes = dict.fromkeys(names, 0)
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in ("plain", *names)}
        self.count = 0
        self._hook = base.register_forward_hook(self._counted)

    def _counted(self, *_: Any) -> None:
        self.count += 1

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    def add(self, kind: str, ids: list[int]) -> None:
        """Answer a prompt in all ways."""
        prompt = torch.tensor([ids])
        answers: dict[str, Any] = {}

        def step(name: str, more: Mapping[str, Any]) -> Callable[[], None]:
            def run() -> None:
                before = self.count
                torch.manual_seed(0)
                answers[name] = self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    **{**self.settings, **more},
                )
                if name in self.passes:
                    self.passes[name] += self.count - before - 1  # not that over the prompt

            return run

        steps = {
            row.name: step(row.name, row.arguments)
            for row in self.rows
            if row.name not in self.failed
        }
        with torch.no_grad():
            for row in self.rows:
                if not row.is_own and row.name in steps and not self.seconds[row.name]:
                    self._try(row.name, steps)
            times = in_turn(step("plain", {}), steps, rounds=1, warm_up=0, device="cpu")
        for name in steps:
            (own,), (floor,) = times.candidate[name], times.floor[name]
            self.seconds[name].append(own)
            self.seconds["plain"].append(floor)
            self.ratios[name].append(own / floor)
            self.by_kind[name].setdefault(kind, []).append(own / floor)
            self.unequal[name] += int(not torch.equal(answers[name], answers["plain"]))

    def _try(self, name: str, steps: dict[str, Callable[[], None]]) -> None:
        """Run transformers' own drafts once: they may not serve a model."""
        try:
            steps[name]()
        except (ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            del steps[name]
        self.passes[name] = 0

    def plain_seconds(self) -> float:
        """Return the mean seconds of a token of plain decoding."""
        return sum(self.seconds["plain"]) / len(self.seconds["plain"]) / self.tokens

    def facts(self, row: Answerer, plain_base: float) -> dict[str, float]:
        """Return the speeds of a row: over plain decoding, and over the base model's."""
        if row.name in self.failed:
            return {}
        kinds = self.by_kind[row.name]
        speeds = {kind: len(values) / sum(values) for kind, values in kinds.items()}
        found = {"speed": sum(speeds.values()) / len(speeds), **speeds}
        if plain_base:
            own = sum(self.seconds[row.name]) / len(self.seconds[row.name]) / self.tokens
            found["speed / plain base"] = plain_base / own
        return found

    def record(self, shape: str, row: Answerer, facts: Mapping[str, float]) -> Record:
        """Return the record of a row."""
        if row.name in self.failed:
            why = self.failed[row.name]
            return Record("drafting", shape, row.name, failed=why, is_own=row.is_own)
        answers = len(self.ratios[row.name])
        counts: dict[str, float] = {"unequal answers": self.unequal[row.name]}
        if row.counts_passes:
            after_prompt = (self.tokens - 1) * answers
            facts = {**facts, "tokens / pass": after_prompt / self.passes[row.name]}
            counts["passes / token"] = self.passes[row.name] / after_prompt
        ratios = {"time / plain": Spread.of(self.ratios[row.name])}
        values: dict[str, Any] = {"ratios": ratios, "counts": counts, "facts": facts}
        return Record("drafting", shape, row.name, is_own=row.is_own, **values)
