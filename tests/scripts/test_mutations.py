"""The planted faults are lines of petl; their tests exist."""

import mutations


def test_every_planted_fault_is_a_line_of_petl():
    faults = mutations.read_faults()
    assert len({fault.digest for fault in faults}) == len(faults) >= 200
    lost = [f"{f.file}: {f.old}" for f in faults if mutations.place_of(f) is None]
    assert not lost, "edit them in scripts/mutations/faults.yaml as the code was, or remove them"


def test_a_fault_takes_the_place_of_its_line_alone():
    fault = mutations.read_faults()[0]
    file = mutations.place_of(fault)
    before = (mutations.ROOT / file).read_text().split("\n")
    after = mutations.planted(fault, file).split("\n")
    differing = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert [(old.strip(), new.strip()) for old, new in differing] == [(fault.old, fault.new)]


def test_a_file_is_tested_by_its_mirror_first_and_a_method_by_its_contract_too():
    runs = mutations.tests_of(mutations.Path("petl/methods/dkvb/keys.py"))
    assert runs[0][0].startswith("tests/methods/")
    assert runs[-2] == [*mutations.CONTRACT, "-k", "[dkvb-"]
