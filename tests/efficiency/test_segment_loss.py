"""`petl.segment_loss`: the model's own loss and gradients, without its logits."""

import copy

import pytest
import torch
from kept_processes import in_processes
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import petl
from petl.errors import UnsupportedError
from petl.system.collectives import to_full

V = 90
SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ROUTED = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}


class DividedForCausalLM(LlamaForCausalLM):
    """A Llama whose head gets a fourth of the hidden states, as that of MiniCPM3 gets a part."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state / 4
        logits, loss = self.lm_head(hidden[:, -logits_to_keep:]), None
        if labels is not None:
            vocab = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "tied": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, **NO_DROPOUT),
    ),
    "soft cap": (
        Gemma2ForCausalLM,
        Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=3.0),
    ),
    "scale": (CohereForCausalLM, CohereConfig(**GROUPED, logit_scale=0.3)),
    "divided": (DividedForCausalLM, LlamaConfig(**GROUPED)),
    "bias": (PhiForCausalLM, PhiConfig(**SMALL, resid_pdrop=0.0)),
    # whose `get_decoder` returns the model itself
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48),
    ),
    "router": (MixtralForCausalLM, MixtralConfig(**GROUPED, **ROUTED)),
}
HEADS = {
    "frozen": ("lora", ["q_proj"], {}),
    "trained": ("lora", ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "adapted": ("lora", ["q_proj", "lm_head"], {}),
    "mola": ("mola", ["q_proj", "lm_head"], {"num_experts": 4, "router_aux_loss_coef": 1.0}),
}


def model_of(name):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls(copy.deepcopy(config))


def wrapped(name, method="lora", targets=("q_proj",), **fields):
    base = model_of(name)
    if name == "gpt2":
        targets = ["c_attn" if target == "q_proj" else target for target in targets]
    fields = {"task_type": "CAUSAL_LM", **fields}
    model = petl.wrap(base, method, target_modules=list(targets), **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(**extra):
    torch.manual_seed(1)
    ids = torch.randint(0, V, (3, 11))
    labels = ids.clone()
    labels[0, :5] = -100  # a prompt
    labels[2, 8:] = -100  # padding
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), **extra}


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, grads


def assert_same_step(one, other, tolerance=2e-6):
    (a, to_a), (b, to_b) = one, other
    assert abs(a.loss - b.loss) <= tolerance * abs(a.loss)
    assert to_a.keys() == to_b.keys()
    for name, gradient in to_a.items():
        # 1e-9: gradients that are zero but for rounding
        difference = (gradient - to_b[name]).norm()
        assert difference <= 2 * tolerance * gradient.norm() + 1e-9, name


def segmented(model, tokens):
    other = copy.deepcopy(model)
    petl.segment_loss(other, tokens)
    return other


@pytest.mark.cells(3)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, head):
    method, targets, fields = HEADS[head]
    model = wrapped(name, method, targets, **fields)
    for tokens, inputs in [(5, batch()), (1000, batch()), (5, batch(num_items_in_batch=7))]:
        output, grads = step(segmented(model, tokens), inputs)
        assert output.logits is None
        assert_same_step(step(model, inputs), (output, grads))


class NeedsImages(LlavaModel):
    """A model inside a causal LM that requires images; that of Voxtral Realtime requires sounds."""

    def forward(self, *args, pixel_values=None, **kwargs):
        assert pixel_values is not None
        return super().forward(*args, pixel_values=pixel_values, **kwargs)


def test_an_encoder_of_images_is_called_once():
    text = {**GROUPED, "model_type": "llama"}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    config = LlavaConfig(
        vision_config={**vision, "num_hidden_layers": 2},
        text_config=text,
        image_token_index=V - 1,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(config)
    base.model.__class__ = NeedsImages
    targets = r".*language_model.*(q_proj|v_proj)|lm_head"
    model = petl.wrap(base, "lora", target_modules=targets, task_type="CAUSAL_LM").train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = batch(pixel_values=torch.randn(3, 3, 8, 8))
    inputs["input_ids"] %= V - 1
    inputs["input_ids"][:, :4] = V - 1
    segments, calls = segmented(model, 5), []
    tower = segments.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda *call: calls.append(None))
    assert_same_step(step(model, inputs), step(segments, inputs))
    assert len(calls) == 1


def test_shifted_labels_a_single_label_and_checkpointing():
    model = wrapped("llama")
    inputs = batch()
    one = batch()
    one["labels"][:, :] = -100
    one["labels"][1, 4] = 3
    shifted = batch(shift_labels=torch.roll(inputs["labels"], 2, dims=1))
    for chosen in (one, shifted):
        assert_same_step(step(model, chosen), step(segmented(model, 5), chosen))
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same_step(step(model, inputs), step(segmented(model, 5), inputs))


def test_prompts_in_front_have_no_labels():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).train()
    assert_same_step(step(model, batch()), step(segmented(model, 5), batch()))


def test_bf16_is_as_close_to_float32_as_the_models_own():
    model = wrapped("llama")
    exact, _ = step(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        plain, to_plain = step(model, batch())
        found, to_found = step(segmented(model, 5), batch())
    assert found.loss.dtype == torch.float32
    assert abs(found.loss - plain.loss) <= abs(plain.loss - exact.loss) + 1e-3
    for name, gradient in to_plain.items():
        assert (gradient - to_found[name]).norm() <= 0.03 * gradient.norm()


def test_other_passes_are_as_before_to_the_bit():
    model = wrapped("llama")
    other = segmented(model, 5)
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    del inputs["labels"]
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    model.eval(), other.eval()
    inputs = batch()
    assert torch.equal(model(**inputs).loss, other(**inputs).loss)
    written = [
        m.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for m in (model, other)
    ]
    assert torch.equal(*written)


def test_a_merged_model_keeps_its_segments():
    model = wrapped("llama")
    petl.segment_loss(model, 5)
    merged = model.merge_and_unload()
    assert merged.train()(**batch()).logits is None
    assert isinstance(merged, LlamaForCausalLM)


def test_a_loss_function_of_the_users_own_is_used():
    model = segmented(wrapped("llama"), 5)
    model.get_base_model().loss_function = lambda logits, labels, **_: logits.sum()
    output = model(**batch())
    assert torch.equal(output.loss, output.logits.sum())


def test_a_plain_peft_model_and_tuples():
    model = segmented(wrapped("llama", task_type=None), 5)
    assert model(**batch()).logits is None
    assert len(model(**batch(), return_dict=False)[1]) == 3


def test_segments_again_change_the_size():
    model = wrapped("llama")
    petl.segment_loss(model, 5)
    kind = type(model.get_base_model())
    petl.segment_loss(model, 7)
    assert type(model.get_base_model()) is kind
    assert model.get_base_model().loss_segment == 7


def test_a_model_of_masked_tokens_is_refused():
    with pytest.raises(UnsupportedError, match="next tokens"):
        petl.segment_loss(BertForMaskedLM(BertConfig(**SMALL)))


def test_labels_of_another_shape_are_refused():
    model = segmented(wrapped("llama"), 5)
    with pytest.raises(petl.InputError, match="labels"):
        model(**{**batch(), "labels": batch()["labels"][:, :-1]})


@pytest.mark.thorough
def test_two_processes_average_to_the_gradients_of_one():
    found = in_processes(2, gradients_sharded_or_not)
    for name, head, gradients in gradients_of_all():
        for process in [each for processes in found for each in processes]:
            ours = process[name, head]
            assert ours.keys() == gradients.keys()
            for key, gradient in gradients.items():
                assert (ours[key] - gradient).norm() <= 5e-6 * gradient.norm() + 1e-8, (name, key)


CASES = [("llama", "frozen"), ("llama", "trained"), ("llama", "adapted"), ("soft cap", "frozen")]


def four_rows():
    """Four rows without padding: each process has two, and half of the labels."""
    torch.manual_seed(1)
    ids = torch.randint(0, V, (4, 7))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gradients_of_all():
    for name, head in CASES:
        method, targets, fields = HEADS[head]
        yield name, head, step(wrapped(name, method, targets, **fields), four_rows())[1]


def gradients_sharded_or_not():
    return [gradients_of_half(sharded) for sharded in (False, True)]


def gradients_of_half(sharded):
    rank, found = distributed.get_rank(), {}
    rows = {key: tensor[2 * rank : 2 * rank + 2] for key, tensor in four_rows().items()}
    for name, head in CASES:
        method, targets, fields = HEADS[head]
        model = wrapped(name, method, targets, **fields)
        petl.segment_loss(model, 5)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for block in model.get_base_model().model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        runs = model if sharded else torch.nn.parallel.DistributedDataParallel(model)
        runs(**rows).loss.backward()
        found[name, head] = {
            key: to_full(p.grad) for key, p in model.named_parameters() if p.grad is not None
        }
    return found
