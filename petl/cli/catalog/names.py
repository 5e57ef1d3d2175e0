"""Names of methods, losses, recipes and their fields, looked up without torch."""

from petl.errors import UnknownNameError, did_you_mean
from petl.system.imports.peft_hook import plugins
from petl.system.imports.tables import LOSSES, METHODS
from petl.system.settings.command_line import options_of


def look_up(name: str, field: str | None) -> None:
    """Refuse a wrong name, or field of it, as far as both are known without imports.

    Raises:
        UnknownNameError: there is none; the message suggests similar names.
    """
    known = [*METHODS, *LOSSES, *options_of("method")]
    if name not in known and not plugins():  # which may register more
        raise UnknownNameError(f"no method, loss or recipe {name!r}{did_you_mean(name, known)}")
    indexed = METHODS.index.get(name) or LOSSES.index.get(name)
    # a method over another one takes the fields of that one too
    if indexed is None or field is None or "inner" in indexed.fields:
        return
    if field not in indexed.fields:
        every = set.intersection(*(set(each.fields) for each in METHODS.index.values()))
        hint = did_you_mean(field, set(indexed.fields) - every)  # without PEFT's bookkeeping
        raise UnknownNameError(f"{name!r} has no field {field!r}{hint}")
