import copy
import math

import pytest
import torch
from peft import PeftModel
from tiny_families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig, SwinForImageClassification

import petl
from petl import testing
from petl.core.layers.task_rows import TaskRows
from petl.methods.polyhistor import export_task
from petl.testing import TINY_MODELS

CONTRACT = {
    "fields": {"tasks": ["only"], "r": 16, "rank": 8, "locations": ["attn", "ffn"]},
    "starts_at_base": False,
    "lr": 3e-2,
    "acts_with": {
        "reduction_factor": {"r": None},
        "tasks": {"tasks": ["one", "two"]},
        "input_modules": {
            "placement": "parallel",
            "target_modules": ["o_proj"],
            "input_modules": {"o_proj": "o_proj"},
        },
    },
    "idle": {"kernel_first": "all layers have the smallest width, which needs no kernel"},
}
TASKS = ["a", "b"]


def swin(**fields) -> SwinForImageClassification:
    """Three stages of widths 8, 16 and 32, in windows of 2 x 2 patches."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 8}
    sizes |= {"depths": [1, 1, 2], "num_heads": [1, 2, 4], "num_labels": 3}
    return SwinForImageClassification(SwinConfig(**sizes, **fields)).eval()


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def wrapped(base: nn.Module | None = None, **fields) -> PeftModel:
    fields = {"tasks": TASKS, "task_dim": 3, "hidden_dim": 5, "code_dim": 4, "r": 2, **fields}
    model = petl.wrap(swin() if base is None else base, "polyhistor", **fields)
    return stir(model).eval()


@torch.no_grad()
def stir(model: PeftModel) -> PeftModel:
    """Draw all trained tensors, so that biases count and terms are of the order of one."""
    generator = torch.Generator().manual_seed(4)
    for parameter in testing.trainable(model).values():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters(model: PeftModel, adapter_name: str = "default") -> dict[str, nn.Module]:
    return model.base_model.placed[adapter_name]


def saved_tensors(model: PeftModel, path: str) -> dict[str, Tensor]:
    """The tensors of one layer and those that all share, by the last part of their saved names."""
    state = model.state_dict()
    own = f"base_model.model.{path}.petl_polyhistor_adapters.default."
    pool = "base_model.petl_polyhistor_pools.default."
    return {k.removeprefix(p): t for k, t in state.items() for p in (own, pool) if k.startswith(p)}


# The equations, entry by entry


def matvec(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = [sum(weight[i, j] * x[j] for j in range(len(x))) for i in range(len(weight))]
    return torch.stack(rows) if bias is None else torch.stack(rows) + bias


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def by_equations(t: dict[str, Tensor], task: int, config) -> dict[str, Tensor]:
    """What the network writes for one task and layer, from its saved tensors `t`."""
    K0, R = len(t["up_shift_weight"]), config.rank
    D0, S = len(t["down_shift_weight"]), len(t["layer_embedding"])
    codes = []
    for i in range(S):
        inner = torch.cat([t["task_embedding"][task], t["layer_embedding"][i]])
        inner = matvec(t["hyper_in_weight"], inner, t["hyper_in_bias"]).clamp(min=0)
        code = matvec(t["hyper_out_weight"], inner, t["hyper_out_bias"])
        codes.append(normed(code, t["code_norm_weight"], t["code_norm_bias"], 1e-6))

    def enlarged(kernel: Tensor, template: Tensor) -> Tensor:
        return torch.kron(*(kernel, template)[:: 1 if config.kernel_first else -1])

    made = {}
    for side, rows, columns in (("up", K0, D0), ("down", D0, K0)):
        total = torch.zeros(S * rows, S * columns)
        for i, code in enumerate(codes):
            numbers = matvec(t[f"{side}_weight"], code, t[f"{side}_bias"])
            P, Q = numbers[: rows * R].view(rows, R), numbers[rows * R :].view(R, columns)
            kernel = t["kernel"][i] if S > 1 else torch.ones(1, 1)
            total = total + enlarged(kernel, P @ Q)
        made[side] = total
    kernels = {"up_shift": "shift", "down_shift": "shift", "norm_scale": "norm"}
    for name, kind in {**kernels, "norm_shift": "norm"}.items():
        total = 0
        for i, code in enumerate(codes):
            vector = matvec(t[f"{name}_weight"], code, t[f"{name}_bias"])
            kernel = t[f"{kind}_kernel"][i] if S > 1 else torch.ones(1)
            total = total + enlarged(kernel[:, None], vector[:, None])[:, 0]
        made[name] = total
    return made


def network(made: dict[str, Tensor], h: Tensor) -> Tensor:
    """f(h) for one token."""
    z = matvec(made["down"], h, made["down_shift"])
    f = matvec(made["up"], z / (1 + torch.exp(-z)), made["up_shift"])
    return normed(f, made["norm_scale"], made["norm_shift"], 1e-5)


@pytest.mark.parametrize("kernel_first", [True, False])
def test_outputs_equal_the_equations_for_widths_1_2_and_4(kernel_first):
    model = wrapped(kernel_first=kernel_first, bneck_dropout=0.5)  # none in evaluation
    scales = set()
    for path, adapter in adapters(model).items():
        scales.add(len(adapter.layer_embedding))
        h = torch.randn(2, 3, adapter.width, generator=torch.Generator().manual_seed(5))
        adapter.info.context.given_tasks = TaskRows([0, 1])
        with torch.no_grad():
            found = adapter(h, h)
            for task in (0, 1):
                made = by_equations(saved_tensors(model, path), task, model.active_peft_config)
                expected = torch.stack([v + network(made, v) for v in h[task]])
                torch.testing.assert_close(found[task], expected, atol=1e-4, rtol=1e-4)
    assert scales == {1, 2, 4}


def test_the_kernel_form_without_the_matrix_is_the_same():
    model = wrapped()
    path = next(path for path, adapter in adapters(model).items() if adapter.width == 32)
    t = saved_tensors(model, path)
    h = torch.randn(32, generator=torch.Generator().manual_seed(6))
    made = by_equations(t, 1, model.active_peft_config)
    one = {**t, "kernel": torch.zeros(4, 4, 4)}
    templates = []
    for i in range(4):  # T_i: the block of a kernel with a single one
        one["kernel"] = torch.zeros(4, 4, 4)
        one["kernel"][i, 0, 0] = 1
        templates.append(by_equations(one, 1, model.active_peft_config)["down"][:2, :8])
    blocks = h.view(4, 8)
    parts = [
        sum(t["kernel"][i, j, k] * templates[i] @ blocks[k] for i in range(4) for k in range(4))
        for j in range(4)
    ]
    torch.testing.assert_close(torch.cat(parts), made["down"] @ h, atol=1e-4, rtol=1e-4)


def test_bert_equals_hooks_with_the_formula():
    family = FAMILIES["bert"]
    model = wrapped(family.build())
    batch = family.batch()
    rows = len(next(iter(batch.values())))
    ids = torch.arange(rows) % 2
    plain = family.build()
    for path in adapters(model):
        made = [
            by_equations(saved_tensors(model, path), task, model.active_peft_config)
            for task in (0, 1)
        ]

        def hook(module, args, y, made=made):
            def f(h: Tensor, m: dict[str, Tensor]) -> Tensor:
                z = F.silu(h @ m["down"].T + m["down_shift"])
                out = z @ m["up"].T + m["up_shift"]
                mean, variance = out.mean(-1, keepdim=True), out.var(-1, False, keepdim=True)
                return (out - mean) / (variance + 1e-5).sqrt() * m["norm_scale"] + m["norm_shift"]

            return torch.stack([h + f(h, made[int(i)]) for h, i in zip(y, ids, strict=True)])

        plain.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        expected = family.outputs(plain, **batch)
        found = family.outputs(model, **batch, task_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Counts and names


def test_counts_are_those_published_for_swin_tiny():
    with torch.device("meta"):
        base = SwinForImageClassification(SwinConfig())  # widths 96 to 768, depths 2, 2, 6, 2
        model = petl.wrap(base, "polyhistor", tasks=["seg", "parts", "sal", "normals"])
    sizes = {name: p.numel() for name, p in testing.trainable(model).items()}

    def count(*words: str) -> int:
        return sum(n for name, n in sizes.items() if any(f".{w}" in name for w in words))

    assert sum(sizes.values()) == 77_564
    assert count("task_embedding") == 256
    assert count("hyper_", "code_norm") == 24_896
    assert count("up_") == 20_280
    assert count("down_") == 14_820
    assert count("norm_scale", "norm_shift") == 12_480
    assert count("layer_embedding") == 2_944
    assert count("kernel", "shift_kernel", "norm_kernel") == 1_888
    assert all(".mlp." in n or "petl_polyhistor_pools" in n or ".output." in n for n in sizes)


def test_tensors_have_the_names_and_shapes_of_the_contract():
    model = wrapped()
    pool = {n: [*p.shape] for n, p in model.base_model.shared["default"].named_parameters()}
    maps = {"up": 20, "down": 20, "up_shift": 8, "down_shift": 2, "norm_scale": 8, "norm_shift": 8}
    expected = {"task_embedding": [2, 3], "hyper_in_weight": [5, 6], "hyper_in_bias": [5]}
    expected |= {"hyper_out_weight": [4, 5], "hyper_out_bias": [4]}
    expected |= {"code_norm_weight": [4], "code_norm_bias": [4]}
    for name, rows in maps.items():
        expected |= {f"{name}_weight": [rows, 4], f"{name}_bias": [rows]}
    assert pool == expected
    for adapter in adapters(model).values():
        S = adapter.width // 8
        own = {name: [*p.shape] for name, p in adapter.named_parameters()}
        kernels = {"kernel": [S, S, S], "shift_kernel": [S, S], "norm_kernel": [S, S]}
        assert own == {"layer_embedding": [S, 3], **(kernels if S > 1 else {})}


def test_the_start_is_that_of_the_paper_or_exactly_the_base():
    base = swin()
    model = petl.wrap(copy.deepcopy(base), "polyhistor", tasks=["a"]).eval()
    pool = model.base_model.shared["default"]
    assert pool.code_norm_weight.eq(1).all()
    assert pool.hyper_in_bias.eq(0).all()
    assert 0.008 < pool.up_weight.std() < 0.012
    wide = nn.ModuleDict({"wide": nn.Linear(4, 512)})
    (adapter,) = adapters(
        petl.wrap(wide, "polyhistor", tasks=["a"], target_modules=["wide"])
    ).values()
    with torch.no_grad():  # 64 inputs of variance 1, weights of sd 0.01: 0.08
        assert 0.06 < float(adapter.generated((0,), torch.float32).norm_weight.std()) < 0.1
    zero = petl.wrap(copy.deepcopy(base), "polyhistor", tasks=["a"], zero_init_norm=True).eval()
    with torch.no_grad():
        assert torch.equal(zero(images()).logits, base(images()).logits)
        assert not torch.equal(model(images()).logits, base(images()).logits)


# Rows of several tasks


@pytest.mark.parametrize("fields", [{}, {"locations": ["attn", "ffn"]}, {"use_bias": False}])
def test_rows_of_several_tasks_equal_single_runs(fields):
    model, x, ids = wrapped(**fields), images(5), [1, 0, 0, 1, 0]
    with torch.no_grad():
        mixed = model(x, task_ids=torch.tensor(ids)).logits
        for row, task in enumerate(ids):
            alone = model(x[[row]], task_ids=torch.tensor([task])).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)
        other = model(x, task_ids=torch.zeros(5, dtype=torch.long)).logits
    assert (mixed - other)[0].abs().max() > 1e-3  # the tasks differ


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_task_classes_of_peft_pass_the_ids_on(kind):
    tiny = TINY_MODELS[kind]
    model = wrapped(tiny.base(), task_type=tiny.task_type)
    assert type(model).original is not PeftModel  # a task class
    batch, ids = tiny.batch(4), torch.tensor([0, 1, 1, 0])
    loss = model.train()(**batch, task_ids=ids).loss
    loss.backward()
    mixed = testing.logits(model, batch, task_ids=ids)
    for task in (0, 1):
        same = testing.logits(model, batch, task_ids=torch.full((4,), task))
        rows = ids == task
        torch.testing.assert_close(mixed[rows], same[rows], atol=1e-5, rtol=1e-5)
        assert (mixed[~rows] - same[~rows]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_takes_ids_of_each_row(kind, beams):
    tiny = TINY_MODELS[kind]
    model = wrapped(tiny.base(), task_type=tiny.task_type)
    prompt = {n: t[:, :6] for n, t in tiny.batch(3).items() if n != "labels"}
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([0, 1, 0])
    mixed = model.generate(**prompt, **settings, task_ids=ids)
    for row, task in enumerate(ids):
        single = {n: t[[row]] for n, t in prompt.items()}
        alone = model.generate(**single, **settings, task_ids=task[None])
        assert torch.equal(mixed[row], alone[0])
    with pytest.raises(petl.InputError):
        model.generate(**prompt, **settings, task_ids=ids[:2])
    with pytest.raises(petl.InputError):
        model.generate(**prompt, **settings)


def test_a_mixed_batch_of_adapters_with_other_task_lists():
    tiny = TINY_MODELS["bert"]
    model = wrapped(tiny.base())
    model.add_adapter("other", petl.build_config("polyhistor", tasks=["x", "y", "z"]))
    stir(model)
    model.set_adapter("other")
    stir(model).eval()
    batch, ids = tiny.batch(4), [1, 2, 0, 2]
    names = ["default", "other", "default", "other"]
    mixed = testing.logits(model, batch, task_ids=torch.tensor(ids), adapter_names=names)
    for row, (task, name) in enumerate(zip(ids, names, strict=True)):
        model.set_adapter(name)
        single = {n: t[[row]] for n, t in batch.items()}
        alone = testing.logits(model, single, task_ids=torch.tensor([task]))
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_tasks_of_the_batch_alone():
    model = wrapped(tasks=["a", "b", "c"])
    labels = torch.tensor([0, 1, 2])
    model.train()(images(), labels=labels, task_ids=torch.tensor([2, 0, 2])).loss.backward()
    gradient = model.base_model.shared["default"].task_embedding.grad
    assert gradient[1].eq(0).all()
    assert gradient[0].ne(0).any()
    assert gradient[2].ne(0).any()
    assert all(p.grad is not None for p in testing.trainable(model).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_with_the_same_tasks(use_reentrant):
    tiny = TINY_MODELS["llama"]
    model = wrapped(tiny.base(), task_type=tiny.task_type)
    model.enable_input_require_grads()
    batch = {**tiny.batch(4), "task_ids": torch.tensor([0, 1, 1, 0])}
    plain = testing.gradients(model, batch)
    kwargs = {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    # an evaluation of another task between forward and backward
    testing.logits(model, tiny.batch(2), task_ids=torch.tensor([1, 1]))
    model.train()
    loss.backward()
    for name, gradient in plain.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.thorough
def test_compiled_models_take_ids_without_reading_them():
    tiny = TINY_MODELS["bert"]
    model = wrapped(tiny.base(), r=4)
    batch, ids = tiny.batch(4), torch.tensor([0, 1, 1, 0])
    expected = testing.logits(model, batch, task_ids=ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = testing.logits(compiled, batch, task_ids=ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Kept weights


def test_kept_weights_follow_every_change_of_a_parameter():
    model, x, ids = wrapped(), images(), torch.tensor([0, 1, 0])
    adapter = next(iter(adapters(model).values()))
    made = []

    def counted(*args):
        made.append(args)
        return type(adapter)._make(adapter, *args)

    adapter._make = counted

    @torch.no_grad()
    def run() -> Tensor:
        return model(x, task_ids=ids).logits

    first = run()
    assert torch.equal(run(), first)
    assert len(made) == 1
    pool = model.base_model.shared["default"]
    fresh = {}
    for name, change in {
        "in place": lambda: pool.task_embedding.add_(1.0),
        "own tensor": lambda: adapter.layer_embedding.add_(1.0),
        "new data": lambda: setattr(pool.up_bias, "data", torch.full_like(pool.up_bias, 0.3)),
        "loaded": lambda: pool.load_state_dict({k: v * 1.1 for k, v in pool.state_dict().items()}),
    }.items():
        with torch.no_grad():
            change()
        fresh[name] = run()
        assert not torch.equal(fresh[name], first), name
        # without anything kept
        for other in adapters(model).values():
            other.kept.clear()
        assert torch.equal(run(), fresh[name]), name
        first = fresh[name]
    count = len(made)
    model.train()
    model.eval()
    run()
    assert len(made) == count + 1


def test_a_training_step_leaves_no_stale_weights():
    model, x, ids = wrapped(), images(), torch.tensor([0, 1, 0])
    optimizer = torch.optim.SGD(testing.trainable(model).values(), lr=0.1)
    with torch.no_grad():
        before = model(x, task_ids=ids).logits
    model(x, labels=ids, task_ids=ids).loss.backward()  # in evaluation mode
    optimizer.step()
    with torch.no_grad():
        after = model(x, task_ids=ids).logits
        copied = copy.deepcopy(model)(x, task_ids=ids).logits
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(after, copied)


# Export


@pytest.mark.parametrize(
    "fields",
    [{}, {"kernel_first": False, "locations": ["attn", "ffn"]}, {"post_norm": False}],
)
def test_an_exported_task_is_a_plain_adapter(fields):
    model = wrapped(**fields)
    for task in (0, 1):
        form, tensors = export_task(model, TASKS[task])
        plain = petl.wrap(swin(), "adapter", **form).eval()
        placed = plain.base_model.placed["default"]
        assert placed.keys() == tensors.keys()
        with torch.no_grad():
            for path, adapter in placed.items():
                own = dict(adapter.named_parameters())
                assert own.keys() == tensors[path].keys()
                for name, parameter in own.items():
                    parameter.copy_(tensors[path][name])
            found = plain(images()).logits
            expected = model(images(), task_ids=torch.full((3,), task)).logits
        assert torch.equal(found, expected)
    made = (
        by_equations(saved_tensors(model, path), 1, model.active_peft_config) if not fields else {}
    )
    if made:
        torch.testing.assert_close(tensors[path]["up_weight"], made["up"])
        torch.testing.assert_close(tensors[path]["norm_after_bias"], made["norm_shift"])
    with pytest.raises(petl.InputError):
        export_task(model, "c")


def test_binary_quantizes_the_network_that_writes_adapters():
    model = petl.wrap(swin(), "binary", inner="polyhistor", tasks=TASKS, bits=4).eval()
    ids = torch.tensor([0, 1, 1])
    with torch.no_grad():
        mixed = model(images(), task_ids=ids).logits
        single = model(images()[[1]], task_ids=ids[[1]]).logits[0]
    torch.testing.assert_close(mixed[1], single, atol=1e-5, rtol=1e-5)
    model.base_model.heat_maps()
    with torch.no_grad():
        assert torch.equal(model(images(), task_ids=ids).logits, mixed)


# Refusals


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "a, b"),
        (torch.tensor([0, 1]), "2 entries"),
        (torch.tensor([0, 1, 2]), "has 2"),
        (torch.tensor([0, 1, -1]), "-1"),
        (torch.tensor([0.0, 1.0, 1.0]), "float32"),
        (torch.tensor([[0, 1, 1]]), r"shape \[1, 3\]"),
        ("aab", "aab"),
    ],
)
def test_missing_and_bad_ids_are_refused(ids, message):
    model = wrapped()
    with pytest.raises(petl.InputError, match=message):
        model(images(), task_ids=ids)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(images()).logits, swin()(images()).logits)


def test_one_task_needs_no_ids_and_merging_names_the_export():
    model = wrapped(tasks=["only"])
    with torch.no_grad():
        found = model(images()).logits
        assert torch.equal(found, model(images(), task_ids=torch.zeros(3).long()).logits)
    assert math.isfinite(float(found.sum()))
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
