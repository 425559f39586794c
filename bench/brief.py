"""A few rows of a library, timed in seconds: for the page of `normkit check`."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from normkit.bench import rows
from normkit.bench.rows import Row
from normkit.bench.workloads import WORKLOADS
from normkit.conformance.libraries import LIBRARIES

#: Of the table, by where the library has its channels.
NAMES = {
    1: ("LN 8192x768", "RMS 8192x768", "GN32 56x56", "BN train 56x56"),
    -1: ("LN 8192x768", "RMS 8192x768", "GN32 56x56 NHWC", "BN train 56x56 NHWC"),
}
DIRECTIONS = ("forward", "backward")
#: For one comparison, and its rounds.
SECONDS, ROUNDS = 0.15, 3
#: Seconds after which no other comparison of a library begins: a machine that is busy takes a hundred times as long.
LIMIT = 12.0


def count(name: str) -> int:
    """How many comparisons there are."""
    return len(NAMES[LIBRARIES[name].channel_axis]) * len(DIRECTIONS)


def measure(name: str) -> Iterator[list[Row]]:
    """Rows in float32, in the mode that the library is meant for, one comparison after another while there is time."""
    named = NAMES[LIBRARIES[name].channel_axis]
    chosen = sorted((w for w in WORKLOADS if w.name in named), key=lambda w: named.index(w.name))
    jobs = list(rows.jobs(rows.chosen([name]), workloads=chosen, dtypes=("float32",), sweep=True))
    end = perf_counter() + LIMIT
    for direction in DIRECTIONS:
        for job in jobs:
            if perf_counter() < end:
                yield rows.measure(job, (direction,), SECONDS, rounds=ROUNDS)
