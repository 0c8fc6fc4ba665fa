"""So much a minute and so much in all, with threads that wait."""

import threading
import time
from collections.abc import Callable

import pytest

from distill.evaluation.judge.limits import Budget, Pace, Spent, Stopped


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_pace_lets_nothing_gather_while_nobody_asks() -> None:
    pace = Pace(600)
    time.sleep(0.3)
    begin = time.monotonic()
    for _ in range(4):
        pace.take()
    assert time.monotonic() - begin >= 0.3


def test_what_is_given_back_may_be_taken_at_once() -> None:
    pace = Pace(60)
    pace.take(100)  # 100 seconds
    done = threading.Event()
    thread = started(lambda: (pace.take(), done.set()))
    assert not done.wait(0.1)
    pace.give_back(100)
    assert done.wait(10)
    thread.join()


def test_no_limit_is_no_wait() -> None:
    pace = Pace(None)
    begin = time.monotonic()
    for _ in range(1000):
        pace.take(1e9)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("wait", ["pace", "budget"])
def test_those_who_wait_are_sent_away(wait: str) -> None:
    pace, budget, errors = Pace(1), Budget(1.0), []
    pace.take()
    budget.reserve(1.0)

    def work() -> None:
        try:
            pace.take() if wait == "pace" else budget.reserve(1.0)
        except Stopped as error:
            errors.append(error)

    thread = started(work)
    time.sleep(0.05)
    assert thread.is_alive()
    pace.stop()
    budget.stop()
    thread.join(10)
    assert len(errors) == 1


def test_a_request_waits_for_what_others_may_leave() -> None:
    budget, done = Budget(10.0), threading.Event()
    budget.reserve(6.0)
    thread = started(lambda: (budget.reserve(6.0), done.set()))
    assert not done.wait(0.1)
    budget.settle(6.0, 3.0)
    assert done.wait(10)
    thread.join()
    budget.settle(6.0, 6.0)
    assert budget.spent == 9.0
    with pytest.raises(Spent):
        budget.reserve(1.5)
    budget.reserve(1.0)


def test_many_threads_never_spend_more_than_the_limit() -> None:
    budget, ends = Budget(50.0), []

    def work() -> None:
        try:
            while True:
                budget.reserve(3.0)
                budget.settle(3.0, 1.0)
        except Spent:
            ends.append(budget.spent)

    for thread in [started(work) for _ in range(8)]:
        thread.join(20)
    assert len(ends) == 8
    assert budget.spent == 48.0  # one of at most 3 more might pass 50
