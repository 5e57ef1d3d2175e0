"""Batches: answers of requests that share passes equal those of each request alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
)
from writer_fixtures import adapt

from petl.core.model.copies import share_weights
from petl.efficiency.in_place_cache import cache_argument
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import AnswerText, Sampling
from petl.generation.serving import kv_cache
from petl.generation.serving.batch import Batch, BatchPasses
from petl.generation.serving.choice import Chooser, TokenChooser
from petl.generation.serving.engine import Slot
from petl.generation.serving.models import load_served
from petl.generation.serving.prefixes import BLOCK, PrefixCache
from petl.generation.serving.request import Request

pytest_plugins = ["writer_fixtures"]

PROMPTS = ["Hi", "the cat and the dog and the cat and", "a b a b a", "?", "What is it?", "no"]


def request(model: LanguageModel, text: str, adapter: str, tokens: int, stop=()) -> Request:
    """A request whose pieces are kept in `request.emit.__self__`."""
    prompt = model.encode(text)
    chooser = Chooser(Sampling(max_new_tokens=tokens), TokenChooser(), model.base, prompt)
    pieces: list = []
    text_of = AnswerText(model.tokenizer, stop)
    return Request(prompt, adapter, chooser, text_of, model.ends, pieces.append, tokens)


def pieces_of(request: Request) -> list:
    return request.emit.__self__  # type: ignore[attr-defined]


def answer_of(request: Request) -> tuple[str, int, str]:
    pieces = pieces_of(request)
    return "".join(piece.text for piece in pieces), pieces[-1].tokens, pieces[-1].finish


def alone(model: LanguageModel, request: Request) -> tuple[str, int, str]:
    """The answer that transformers' `generate` gives to the request by itself."""
    with model.using(request.adapter):
        (answer,) = model.answer([request.prompt], Sampling(max_new_tokens=request.max_tokens))
    return answer.text, answer.tokens, answer.finish


def run_staggered(lane: Slot, requests: list[Request]) -> None:
    """Let two requests join after each step, until all are answered."""
    left = list(requests)
    while left or lane.batches:
        now, left = left[:2], left[2:]
        lane.advance(now)


@pytest.mark.cells(1)
@pytest.mark.parametrize(("first", "second"), [("lora", "other"), ("mola", None)])
def test_requests_of_several_adapters_share_passes_and_answer_as_alone(writers, first, second):
    model = writers.load(first, **({"second": second} if second else {}))
    names = [*model.adapters, BASE]
    requests = [
        request(model, text, names[i % len(names)], 4 + 3 * i) for i, text in enumerate(PROMPTS)
    ]
    lane = Slot(BatchPasses(model, None))
    run_staggered(lane, requests)
    for each in requests:
        assert answer_of(each) == alone(model, each)
    # two prompts at a time, and one pass for the next token of all rows
    longest = max(len(pieces_of(each)) for each in requests)
    assert lane.passes.count <= 3 + longest + 2
    assert lane.passes.count < sum(len(pieces_of(each)) for each in requests) / 2


@pytest.mark.thorough
@torch.no_grad()
def test_rows_that_join_and_leave_get_the_logits_of_a_cache_that_concatenates():
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=256,  # shorter texts are concatenated
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    caches = [kv_cache.new_cache(model.config, mergeable=True), DynamicCache()]

    def step(caches: list, rows: int, tokens: int, mask: torch.Tensor) -> None:
        ids = torch.randint(3, 90, (rows, tokens), generator=generator)
        mine, usual = (
            model(ids, attention_mask=mask, **{cache_argument(model): cache}).logits
            for cache in caches
        )
        assert torch.equal(mine, usual)

    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    step(caches, 2, 5, mask)
    for rows in ([0, 1, 2], [2, 1], [1]):  # of those left, behind a newcomer
        for _ in range(20):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step(caches, len(mask), 1, mask)
        new = [kv_cache.new_cache(model.config, mergeable=True), DynamicCache()]
        step(new, 1, 7, torch.ones(1, 7, dtype=torch.long))
        added = torch.zeros(1, mask.shape[1], dtype=torch.long)
        added[:, -7:] = 1
        mask = torch.cat([mask, added])[rows]
        start = int(mask.any(0).int().argmax())
        mask = mask[:, start:]
        for cache, newcomer in zip(caches, new, strict=True):
            kv_cache.append(cache, newcomer)
            kv_cache.keep(cache, torch.tensor(rows), start)
    step(caches, 1, 2, torch.nn.functional.pad(mask, (0, 2), value=1))


@pytest.mark.thorough
def test_a_method_without_mixed_batches_has_a_lane_for_each_adapter(writers, tmp_path):
    llama = writers.folder / "llama"
    for seed, name in enumerate(["first", "second"]):
        adapt(AutoModelForCausalLM, llama, "ia3", "CAUSAL_LM", tmp_path / name, seed)
    model = load_language_model(tmp_path / "first", {"second": str(tmp_path / "second")})
    lanes = {name: Slot(BatchPasses(model, name)) for name in model.names}
    requests = [request(model, text, model.names[i % 3], 9) for i, text in enumerate(PROMPTS)]
    for name, lane in lanes.items():
        lane.advance([each for each in requests if each.adapter == name])
    while any(lane.batches for lane in lanes.values()):  # in turn, so adapters are switched
        for lane in lanes.values():
            lane.advance([])
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def plain(writers, model) -> LanguageModel:
    """A model without adapters, with the tokenizer of `plain`."""
    return LanguageModel(model.eval(), writers.load("plain").tokenizer, "tiny", is_chat=False)


def test_rows_with_a_sliding_window_answer_as_alone(writers):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        initializer_range=0.3,
        eos_token_id=3,
    )
    model = plain(writers, MistralForCausalLM(config))
    requests = [request(model, text, BASE, 6 + 2 * i) for i, text in enumerate(PROMPTS)]
    run_staggered(Slot(BatchPasses(model, BASE)), requests)
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def test_a_model_with_recurrent_states_answers_each_request_by_itself(writers):
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=260, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=3
    )
    model = plain(writers, MambaForCausalLM(config))
    lane = Slot(BatchPasses(model, BASE))
    assert not lane.passes.mergeable
    requests = [request(model, text, BASE, 8) for text in PROMPTS[:3]]
    run_staggered(lane, requests)
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def test_a_model_whose_state_is_not_in_the_cache_is_refused(writers):
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=260, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    model = plain(writers, RwkvForCausalLM(config))
    with pytest.raises(UnsupportedError):
        BatchPasses(model, BASE).check(model.encode(PROMPTS[1]), BASE)


def test_rows_are_not_put_together_where_padding_changes_logits(writers):
    torch.manual_seed(0)
    config = TrOCRConfig(
        vocab_size=260,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        init_std=0.3,
        eos_token_id=3,
    )
    model = plain(writers, TrOCRForCausalLM(config))
    lane = Slot(BatchPasses(model, BASE))
    lane.passes.check(model.encode(PROMPTS[1]), BASE)
    requests = [request(model, text, BASE, 8) for text in PROMPTS[:4]]
    run_staggered(lane, requests)
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def test_padding_that_all_rows_have_is_dropped(writers):
    model = writers.load("llama")
    batch = Batch(BatchPasses(model, BASE))
    batch.join([request(model, "x" * 50, BASE, 1 + 1), request(model, "x", BASE, 9)])
    long = batch.mask.shape[1]
    batch.step()  # the end of the first
    assert batch.mask.shape[1] < long - 40
    assert batch.cache.get_seq_length() == batch.mask.shape[1]


def test_a_cancelled_request_leaves_at_its_next_token(writers):
    model = writers.load("llama")
    batch = Batch(BatchPasses(model, BASE))
    requests = [request(model, "x", BASE, 50), request(model, "y", BASE, 50)]
    batch.join(requests)
    requests[0].cancelled.set()
    batch.step()
    assert batch.requests == requests[1:]


def test_a_request_that_fails_leaves_the_others(writers, caplog):
    model = writers.load("llama")
    requests = [request(model, text, BASE, 9) for text in PROMPTS[:3]]
    requests[1].chooser.is_argmax = False
    requests[1].chooser.choose = lambda logits: 1 / 0
    run_staggered(Slot(BatchPasses(model, BASE)), requests)
    assert isinstance(pieces_of(requests[1])[-1], ZeroDivisionError)
    assert "a request failed" in caplog.text
    for each in (requests[0], requests[2]):
        assert answer_of(each) == alone(model, each)


def test_layers_of_a_cache_are_padded_on_the_left():
    first, second = DynamicCache(), DynamicCache()
    first.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    second.update(2 * torch.ones(1, 1, 5, 4), 2 * torch.ones(1, 1, 5, 4), 0)
    kv_cache.append(first, second)
    keys = first.layers[0].keys[:, 0, :, 0]
    assert keys.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]
    kv_cache.keep(first, torch.tensor([1]), 2)
    assert first.layers[0].values[:, 0, :, 0].tolist() == [[1, 1, 1]]


def test_models_of_several_methods_share_the_tensors_of_their_base(writers):
    base = writers.load("llama").base
    other = share_weights(base)
    assert other is not base
    assert other.model.layers[0].mlp is not base.model.layers[0].mlp
    ours, theirs = dict(base.named_parameters()), dict(other.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours)


@pytest.mark.thorough
def test_an_adapter_that_changes_the_base_weights_changes_no_other_answer(writers, tmp_path):
    folders = {name: writers.folder / name for name in ("lora", "mola")}
    folders["pissa"] = tmp_path / "pissa"
    # not saved relative to its start, it changes the base weights again as it is loaded
    llama = writers.folder / "llama"
    own = {"init_lora_weights": "pissa"}
    adapt(LlamaForCausalLM, llama, "lora", "CAUSAL_LM", folders["pissa"], 2, **own)
    served = load_served({name: str(folder) for name, folder in folders.items()})
    for name, folder in {**folders, "llama": llama}.items():
        found = served[name]
        own = request(found.language, "Hi", found.adapter, 12)
        run_staggered(found.lane, [own])
        model = load_language_model(folder)
        expected = alone(model, request(model, "Hi", model.names[0], 12))
        assert answer_of(own) == expected, name


def test_an_adapter_that_changes_the_base_weights_writes_alone(writers, tmp_path):
    own = {"init_lora_weights": "pissa"}
    llama, pissa = writers.folder / "llama", tmp_path / "pissa"
    adapt(LlamaForCausalLM, llama, "lora", "CAUSAL_LM", pissa, 2, **own)
    with pytest.raises(InputError, match="'pissa'"):
        writers.load("lora", pissa=str(pissa))
    model = load_language_model(pissa)
    with pytest.raises(UnsupportedError), model.using(BASE):
        pass


SHARED = "the cat and the dog and " * 6
TEXTS = [SHARED + "who", "no", SHARED + "what is it?", SHARED, "a b a b", SHARED[:60] + " a dog"]


def lane_of(model, prefixes, adapter=None, drafter=None):
    return Slot(BatchPasses(model, adapter, drafter=drafter, prefixes=prefixes))


def answered(model, lane, names):
    requests = [
        request(model, text, names[i % len(names)], 5 + i)
        for i, text in enumerate([*TEXTS, *TEXTS])
    ]
    run_staggered(lane, requests)
    return requests


@pytest.mark.parametrize("drafter", [None, "free"])
@pytest.mark.parametrize(("first", "second"), [("lora", "other"), ("mola", None)])
def test_answers_are_those_of_whole_prompts(writers, first, second, drafter):
    model = writers.load(first, **({"second": second} if second else {}))
    names = [*model.adapters, BASE]
    prefixes = PrefixCache(2**30)
    found = answered(model, lane_of(model, prefixes, drafter=drafter), names)
    whole = answered(model, lane_of(model, None), names)
    assert [*map(answer_of, found)] == [*map(answer_of, whole)]
    assert not any(each.cached for each in whole)
    for before, again in zip(found[: len(TEXTS)], found[len(TEXTS) :], strict=True):
        same = before.adapter == again.adapter
        most = (len(again.prompt) - 1) // BLOCK * BLOCK
        # what one adapter has computed is not for another
        assert again.cached == most or not same
    assert any(each.cached for each in found)


def test_a_pass_behind_a_known_beginning_reads_the_rest_alone(writers):
    model, widths = writers.load("lora"), []
    (name,) = model.adapters
    lane = lane_of(model, PrefixCache(2**30))

    def note(module, args, kwargs, output):
        widths.append(kwargs["input_ids"].shape[1])

    handle = model.base.register_forward_hook(note, with_kwargs=True)
    for text in (SHARED, SHARED + "what"):
        run_staggered(lane, [request(model, text, name, 1)])
    handle.remove()
    one, two = (model.encode(text) for text in (SHARED, SHARED + "what"))
    pairs = enumerate(zip(one, two, strict=False))
    shared = next(number for number, pair in pairs if len({*pair}) > 1)
    assert shared >= BLOCK
    assert widths == [len(one), len(two) - shared // BLOCK * BLOCK]


@pytest.mark.parametrize("drafter", [None, "free"])
def test_a_model_that_counts_places_in_the_cache_has_no_padding_behind_a_beginning(
    writers, drafter
):
    torch.manual_seed(0)
    config = MptConfig(
        d_model=32,
        n_heads=2,
        n_layers=2,
        vocab_size=260,
        max_seq_len=512,
        initializer_range=0.3,
        eos_token_id=3,
    )
    model = plain(writers, MptForCausalLM(config))
    lane = lane_of(model, PrefixCache(2**30), BASE, drafter)
    run_staggered(lane, [request(model, SHARED, BASE, 1)])
    requests = [request(model, SHARED + text, BASE, 9) for text in ("no", "what is it?", "w")]
    lane.advance(requests)
    run_staggered(lane, [request(model, SHARED + "xy", BASE, 9)])
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def test_the_states_of_a_router_are_no_beginning_of_another_prompt(writers, tmp_path):
    fields = {"router_type": "pregated", "router_hidden_size": 8, "num_experts": 4, "r": 2}
    adapt(LlamaForCausalLM, writers.folder / "llama", "mola", "CAUSAL_LM", tmp_path, 2, **fields)
    model = load_language_model(tmp_path)
    (name,) = model.adapters
    lane = lane_of(model, PrefixCache(2**30))
    requests = [request(model, SHARED + text, name, 6) for text in ("who", "what", "no")]
    for each in requests:
        run_staggered(lane, [each])
    assert [answer_of(each) for each in requests] == [alone(model, each) for each in requests]


def test_of_little_memory_the_latest_used_stay(writers):
    model = writers.load("lora")
    (name,) = model.adapters
    many = PrefixCache(2**30)
    run_staggered(lane_of(model, many), [request(model, SHARED, name, 1)])
    of_one = many.nbytes
    few = PrefixCache(of_one)
    lane = lane_of(model, few)
    for text in (SHARED, SHARED + "what", "b " * 80):
        run_staggered(lane, [request(model, text, name, 1)])
        assert few.nbytes <= of_one
    again = request(model, "b " * 80 + "a", name, 1)
    run_staggered(lane, [again])
    assert again.cached >= BLOCK
    gone = request(model, SHARED, name, 1)
    run_staggered(lane, [gone])
    assert gone.cached == 0


def test_blocks_are_of_all_tokens_before_them():
    cache = PrefixCache(2**20)
    keys = torch.arange(3 * BLOCK, dtype=torch.float).view(1, 1, -1, 1)
    behind = SimpleNamespace(layers=[SimpleNamespace(is_initialized=True, keys=keys, values=keys)])
    ids = [*range(3 * BLOCK)]
    cache.add("a", ids, behind, 0, 0)
    found = cache.find("a", [*ids, 7])
    assert torch.equal(torch.cat([b.layers[0][0] for b in found], 2), keys)
    # the last token of a prompt is computed in any case
    assert len(cache.find("a", ids)) == 2
    other = [9, *ids[1:]]
    assert cache.find("a", [*other, 7]) == []
    assert cache.find("b", [*ids, 7]) == []
    assert len(cache.find("a", ids[: 2 * BLOCK] + other[:BLOCK])) == 2


def test_the_end_of_a_beginning_goes_before_its_first_block():
    keys = torch.zeros(1, 1, 3 * BLOCK, 1)
    behind = SimpleNamespace(layers=[SimpleNamespace(is_initialized=True, keys=keys, values=keys)])
    ids = [*range(3 * BLOCK)]
    cache = PrefixCache(3 * 2 * keys.nbytes // 3)
    cache.add("a", ids, behind, 0, 0)
    assert len(cache.find("a", [*ids, 7])) == 3
    # of another prompt, one block: one has to go
    short = SimpleNamespace(
        layers=[
            SimpleNamespace(is_initialized=True, keys=keys[:, :, :BLOCK], values=keys[:, :, :BLOCK])
        ]
    )
    cache.add("b", ids[:BLOCK], short, 0, 0)
    assert len(cache.find("a", [*ids, 7])) == 2
