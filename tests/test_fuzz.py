import pytest
from fuzz_data import CASES, fuzz


@pytest.mark.slow
def test_mutated_datasets_are_refused_or_read_as_they_are(tmp_path):
    """A short run of tests/fuzz_data.py, which anyone can run for longer."""
    found = fuzz(tmp_path, seconds=600, examples=200)
    assert found.outcomes.total() >= 200
    assert {name.partition(":")[0] for name in found.outcomes} >= set(CASES)
