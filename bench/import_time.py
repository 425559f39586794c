"""What ``import normkit`` costs over ``import numpy``: ``python -m normkit.bench.import_time [ROUNDS]``."""

import statistics
import subprocess
import sys

ROUNDS = 25
CODE = """
from time import perf_counter as now
start = now()
import numpy
middle = now()
import normkit
print(middle - start, now() - middle)
"""


def once() -> tuple[float, float]:
    """Milliseconds for NumPy and then for normkit in a fresh interpreter, without the environment's PYTHON settings."""
    done = subprocess.run([sys.executable, "-I", "-c", CODE], capture_output=True, text=True, check=True)
    numpy, normkit = map(float, done.stdout.split())
    return numpy * 1e3, normkit * 1e3


def measure(rounds: int = ROUNDS) -> tuple[float, float]:
    """The medians of both."""
    once()  # writes and warms the bytecode
    numpy, normkit = zip(*(once() for _ in range(rounds)), strict=True)
    return statistics.median(numpy), statistics.median(normkit)


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    numpy, normkit = measure(rounds)
    print(f"import numpy: {numpy:.1f} ms; import normkit after it: {normkit:.1f} ms (medians of {rounds})")


if __name__ == "__main__":
    main()
