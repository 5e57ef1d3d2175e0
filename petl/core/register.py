"""Register a method, and generate the tuner class that PEFT needs for its type."""

from typing import Any, TypeVar

from petl.core.compat import add_method
from petl.core.layers.layer import AdapterLayer
from petl.core.method import A, C, Method
from petl.core.tuners.adapter import AdapterTuner
from petl.core.tuners.asking import AskingTuner
from petl.system.imports.tables import METHODS, check_free

M = TypeVar("M", bound=type[Method[Any, Any]])


def register(method_cls: M) -> M:
    """Register a method: its name is the word after `+method=`.

    A decorator for a `Method`. The PEFT type becomes `PETL_<NAME>` and the prefix of its tensors in
    state dicts `petl_<name>_`, since a later PEFT may have that name.

    Raises:
        ValueError: its name is taken.
    """
    entry: Any = method_cls()
    check_free(entry.name, entry.config_cls)
    own = entry.own = entry.over is None
    if entry.adapter_cls is not None:
        for fact in ("start_tolerance", "decays", "keep_float32"):
            setattr(entry, fact, getattr(entry.adapter_cls, fact))
    prefix = f"petl_{entry.name}_" if own else entry.over.prefix
    # of a method with variants, the base of their tuners
    tuner = entry.tuner_cls = make_tuner(entry, prefix, (AskingTuner,) if entry.has_inner else ())
    # MethodConfig reads the name, for its PEFT type
    entry.config_cls.method = entry.name
    add_method(f"petl_{entry.name}", prefix, entry.config_cls, tuner, is_own_prefix=own)
    METHODS[entry.name] = entry
    return method_cls


def make_tuner(entry: Method[C, A], prefix: str, bases: tuple[type, ...] = ()) -> type[AskingTuner]:
    """Generate the tuner class of a method.

    Args:
        entry: the method.
        prefix: of its tensors in state dicts.
        bases: its base classes; none: petl's tuner, or that of PEFT with what asks the method.
    """
    words = f"{entry.name}_{entry.inner}" if entry.inner else entry.name
    body: dict[str, object] = {"method": entry, "prefix": prefix, "__module__": __name__}
    if entry.over is not None:
        # PEFT walks over these, to activate or delete an adapter
        body["tuner_layer_cls"] = entry.over.tuner_layer_cls | AdapterLayer
    bases = bases or ((AdapterTuner,) if entry.over is None else (AskingTuner, entry.over))
    return type("".join(part.capitalize() for part in words.split("_")) + "Model", bases, body)
