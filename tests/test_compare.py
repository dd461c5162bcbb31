import pytest

from common.compare import compare, holm, paired_test


def test_paired_tests_agree_with_closed_forms():
    assert paired_test("1111111100", "0000000000") == pytest.approx(2 * 0.5**8)
    assert paired_test("10", "01") == 1.0
    assert paired_test("1100", "1100") == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_pairs_are_compared_together():
    clear, even = compare([("1111111100", "0000000000"), ("1100", "1010")])
    assert clear == (10, 8, 0, pytest.approx(4 * 0.5**8))  # twice the p of a single comparison
    assert (clear.points, clear.verdict) == (80.0, "distinguishable")
    assert even == (4, 1, 1, 1.0)
    assert (even.points, even.verdict) == (0.0, "not distinguishable")
    assert compare([]) == []
    with pytest.raises(ValueError):
        compare([("10", "1")])  # other episodes
