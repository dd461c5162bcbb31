import pytest
from fuzz_data import CASES, fuzz
from fuzz_hdf5 import fuzz_layouts


@pytest.mark.slow
def test_mutated_datasets_are_refused_or_read_as_they_are(tmp_path):
    """A short run of tests/fuzz_data.py, which can also run for longer."""
    found = fuzz(tmp_path, seconds=600, examples=200)
    assert found.outcomes.total() >= 200
    assert {name.partition(":")[0] for name in found.outcomes} >= set(CASES)


@pytest.mark.slow
def test_hdf5_files_of_any_arrangement_are_read_as_they_were_written_or_refused(tmp_path):
    found = fuzz_layouts(tmp_path, seconds=600, examples=200)
    assert found.outcomes.total() >= 200
    layouts = {name.partition(":")[0] for name in found.outcomes}
    assert layouts == {"aloha", "grouped", "robomimic", "maniskill"}
