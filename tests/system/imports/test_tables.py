"""Names of methods and losses are known without an import of the methods."""

import warm_python
from fresh_python import fresh

from petl.system.imports.tables import LOSSES, METHODS

# PEFT's tables have stand-ins for a method until it is used
STAND_INS = """
import sys, petl, peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners

def rooms():
    return {name.split(".")[2] for name in sys.modules if name.startswith("petl.methods.")}

names = petl.list_methods() + petl.list_losses()
config, tuner = configs["PETL_MOS"], tuners[peft.PeftType.PETL_MOS]
assert not rooms(), rooms()
made = config(r=4)
assert rooms() <= {"mos", "families"}, rooms()
assert type(made) is petl.get("mos") is configs["PETL_MOS"]
assert (config.__name__, tuner.prefix) == ("MosConfig", "petl_mos_")
assert tuner.__init__ is tuners["PETL_MOS"].__init__
print(*names)
"""


def test_peft_has_stand_ins_for_methods_that_are_not_imported():
    found = fresh(STAND_INS, python=warm_python.without_peft())
    assert {"mola", "lora", "density"} <= set(found.split())


def test_names_are_known_without_torch():
    code = "import sys; from petl.system.imports.tables import METHODS, LOSSES; "
    found = fresh(code + "print('torch' in sys.modules, 'mola' in METHODS, *METHODS, *LOSSES)")
    assert found.split() == ["False", "True", *METHODS.index, *LOSSES.index]
