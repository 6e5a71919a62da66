"""Fair times on a machine that others use, too: contestants in turn, and only wide-awake threads."""

import time
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

Call = Callable[[], Any]

TURNS, EACH_TURN, SECONDS = 20, 3, 1.5  # of each contestant, at the most
PAUSE, AWAKE = 0.02, 0.01  # seconds
SHORT = 16  # tokens of a prompt, where what is written after it is timed


def in_turn(contestants: Mapping[str, Iterator[Call]]) -> dict[str, list[float]]:
    """Seconds of several calls of each. An iterator gives the next call, for which nothing is in a cache yet."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = Random(0)  # noqa: S311  (who comes after whom matters, so it is never the same)
    for _ in range(TURNS):
        for name in order.sample(list(contestants), len(contestants)):
            if sum(times[name]) < SECONDS:
                times[name] += timed(contestants[name])
    return times


def timed(calls: Iterator[Call]) -> list[float]:
    """Seconds of a few calls. The threads of other contestants have come to rest, and this one's are all running: a
    thread that was asleep may have to wait for the scheduler's next tick, 4 ms later."""
    time.sleep(PAUSE)
    began = time.perf_counter()
    next(calls)()
    while time.perf_counter() - began < AWAKE:
        next(calls)()
    return [seconds(next(calls)) for _ in range(EACH_TURN)]


def seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
