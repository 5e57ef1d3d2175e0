"""Names of adapters that would lose or hide tensors are refused before anything changes."""

from typing import Any

import pytest
from peft import get_peft_model_state_dict

import petl
from petl.errors import InputError
from petl.testing import tiny_llama

REFUSED = (
    "__base__",
    "",
    " ",
    None,
    5,
    "a.b",
    "../x",
    "keys",
    "weight",
    "0",
    "layers",
    "base_layer",
)


@pytest.mark.cells(4)
@pytest.mark.parametrize("name", REFUSED)
def test_wrap_load_and_add_adapter_refuse_a_name(name, tmp_path):
    model = petl.wrap(tiny_llama(2), "mola")
    before = set(model.state_dict())
    # PEFT itself raises for what is no string
    with pytest.raises(InputError if isinstance(name, str) else TypeError):
        model.add_adapter(name, petl.build_config("mola"))
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    base: Any = tiny_llama(2)
    clean = set(base.state_dict())
    for method in ("mola", "lora"):
        with pytest.raises(InputError):
            petl.wrap(base, method, adapter_name=name)
    with pytest.raises(InputError):
        petl.load(base, tmp_path, adapter_name=name)
    assert set(base.state_dict()) == clean


@pytest.mark.parametrize(
    ("method", "name"), [("mola", "lora_A"), ("sparse", "values"), ("lora", "lora_B")]
)
def test_the_name_of_an_own_tensor_is_refused(method, name):
    """Saving another adapter would drop the tensors of that name."""
    base = tiny_llama(2)
    before = set(base.state_dict())
    with pytest.raises(InputError):
        petl.wrap(base, method, adapter_name=name)
    assert set(base.state_dict()) == before


@pytest.mark.parametrize("name", ["default", "lora_math", "модель", "x y", "mola", "v1-2"])
def test_any_other_name_leaves_both_adapters_complete(name):
    model = petl.wrap(tiny_llama(2), "mola")
    if name != "default":
        model.add_adapter(name, petl.build_config("mola"))
    sizes = {len(get_peft_model_state_dict(model, adapter_name=n)) for n in model.peft_config}
    assert sizes == {2 * 7 * 3}
