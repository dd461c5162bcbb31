import os
import time

import pytest

from common.data import workers
from common.data.workers import Died, guarded_map, kept_pool


def work(number, what):
    if what == "die":
        os._exit(9)
    if what == "abort":
        os.abort()
    if what == "hang":
        time.sleep(60)
    if what == "raise":
        raise ValueError(f"number {number}")
    return number * number


def test_results_come_with_their_tasks():
    results = dict(guarded_map(work, [(n, "square") for n in range(500)], 2))
    assert results == {(n, "square"): n * n for n in range(500)}


def test_a_task_that_dies_or_hangs_costs_itself_only(monkeypatch):
    monkeypatch.setattr(workers, "STALL_SECONDS", 3.0)
    tasks = [(0, "square"), (1, "die"), (2, "abort"), (3, "hang"), *((n, "square") for n in range(4, 12))]
    results = dict(guarded_map(work, tasks, 2))
    died = {task: result for task, result in results.items() if isinstance(result, Died)}
    assert set(died) == {(1, "die"), (2, "abort"), (3, "hang")}
    assert "exit code 9" in str(died[1, "die"])
    assert "signal 6" in str(died[2, "abort"])
    assert "did not end within 3 s" in str(died[3, "hang"])
    assert all(results[n, "square"] == n * n for n in (0, *range(4, 12)))


def test_other_exceptions_are_the_callers():
    with pytest.raises(ValueError, match="number 7"):
        list(guarded_map(work, [(7, "raise"), (8, "square")], 1))


def test_closing_early_stops_what_runs():
    results = guarded_map(work, [(1, "square"), (2, "hang"), (3, "hang")], 2)
    assert next(results)[1] == 1
    began = time.monotonic()
    results.close()
    assert dict(guarded_map(work, [(5, "square")], 1)) == {(5, "square"): 25}
    assert time.monotonic() - began < workers.STALL_SECONDS - 10  # it did not wait for the hanging ones


def test_a_kept_pool_is_used_again_and_then_stopped(monkeypatch):
    fresh = workers._Pool()
    monkeypatch.setattr(workers, "_pool", fresh)
    with kept_pool():
        (first,) = (result for _, result in guarded_map(os.getpid, [()], 1))
        (second,) = (result for _, result in guarded_map(os.getpid, [()], 1))
        assert first == second != os.getpid()
    assert fresh.pool is None
    (third,) = (result for _, result in guarded_map(os.getpid, [()], 1))
    assert third != first
    assert fresh.pool is None
