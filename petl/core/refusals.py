"""What is a plain LoRA, and more than one."""

from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from petl.core.compat import LoraLayer
from petl.core.spec.facts import facts_of
from petl.errors import UnsupportedError


def is_lora(config: PeftConfig) -> bool:
    """Return True for PEFT's own LoRA.

    AdaLoRA's config is a subclass, but its tensors are different, so the type is compared.
    """
    return config.peft_type == PeftType.LORA


def is_plain(config: PeftConfig) -> bool:
    """Return True for a LoRA that trains nothing but its factors, and heads."""
    more = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
    plain = is_lora(config) and facts_of(config).bias == "none"
    return plain and not any(getattr(config, name) for name in more)


def refuse_more_than_factors(model: PeftModel, adapter_name: str = "default") -> None:
    """Raise UnsupportedError if an adapter is more than the factors A and B of linear layers.

    A DoRA is, for one, or a LoRA with trained biases.
    """
    config = model.peft_config[adapter_name]
    facts = facts_of(config)
    if facts.trains_biases or facts.trainable_token_indices:
        raise UnsupportedError(
            "the adapter trains biases or tokens besides its updates of weights, which two factors "
            "a layer cannot hold"
        )
    for path, layer in model.named_modules() if is_lora(config) else ():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        A = dict(layer.lora_A.items()).get(adapter_name)
        more = layer.lora_variant.get(adapter_name) or layer.lora_bias.get(adapter_name)
        # stacked experts have one A of all their ranks
        if more or type(A) is not nn.Linear or len(A.weight) != layer.r[adapter_name]:
            raise UnsupportedError(
                f"{path} is no linear layer, or its update is not the product of two factors of "
                f"rank {layer.r[adapter_name]} (DoRA, another variant, a bias, stacked experts)"
            )
