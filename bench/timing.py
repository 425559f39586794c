"""The clock: contenders take turns, so that what disturbs one disturbs all, and ratios are taken within a round."""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

Thunk = Callable[[], Any]
#: Makes what a thunk runs in; entering and leaving it is not timed.
Within = Callable[[], contextlib.AbstractContextManager[Any]]

#: A turn takes at least this many seconds: calls are repeated within it, so that the clock's own cost does not count.
TURN = 2e-4
ROUNDS = 5
#: Seconds for a call from which on one more call to warm up would be a waste.
SLOW = 0.02


@dataclass(frozen=True)
class Spread:
    """The middle of a sample, and its quartiles."""

    median: float
    low: float
    high: float


def spread(sample: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(sample) == 1:
        return Spread(sample[0], sample[0], sample[0])
    low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(above: Sequence[float], below: Sequence[float], divisor: float = 1.0) -> Spread:
    """``above / (below * divisor)``, round by round."""
    return spread([a / (b * divisor) for a, b in zip(above, below, strict=True)])


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Garbage is collected before, and not during."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleaved(
    thunks: Mapping[str, Thunk],
    wait: Callable[[], None] = lambda: None,
    *,
    within: Mapping[str, Within] | None = None,
    seconds: float = 0.5,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Seconds per call of each thunk in each round: A B C B C A ... for ``seconds``, and ``rounds`` times at least.

    All make as many calls in a turn as the fastest needs to fill it: the first of them finds another's data in the
    caches, the others their own. Who comes first changes, for the memory that one frees may be what the next must ask
    the system for.

    ``within`` has the contexts of those thunks that run in one, entered for each turn. ``wait`` blocks until the device
    has done what it was told. A result lives until the clock has been read.
    """
    within = within or {}
    calls = 1
    for name, thunk in thunks.items():
        with within.get(name, contextlib.nullcontext)():
            calls = max(calls, _warmed(thunk, wait))
    times: dict[str, list[float]] = {name: [] for name in thunks}
    order = collections.deque(thunks)
    with without_collection():
        end = perf_counter() + seconds
        while len(next(iter(times.values()))) < rounds or perf_counter() < end:
            for name in order:
                with within.get(name, contextlib.nullcontext)():
                    times[name].append(_turn(thunks[name], wait, calls))
            order.rotate(-1)
    return times


def _warmed(thunk: Thunk, wait: Callable[[], None]) -> int:
    """How many calls fill a turn; the first ones compile, trace and fill caches."""
    _turn(thunk, wait, 1)
    if _turn(thunk, wait, 1) > SLOW:
        return 1
    calls = math.ceil(TURN / min(_turn(thunk, wait, 1) for _ in range(2)))
    return calls if calls == 1 else math.ceil(TURN / _turn(thunk, wait, calls))


def _turn(thunk: Thunk, wait: Callable[[], None], calls: int) -> float:
    """Seconds per call; of ``calls`` calls the last result outlives the clock, and the others no call.

    Were one kept while the next is made, the memory of every other call would be new.
    """
    wait()
    start = perf_counter()
    for _ in itertools.repeat(None, calls - 1):
        thunk()
    result = thunk()
    wait()
    elapsed = perf_counter() - start
    del result
    return elapsed / calls
