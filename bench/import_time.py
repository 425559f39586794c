"""What ``import normkit`` costs over ``import numpy``: ``python -m normkit.bench.import_time [ROUNDS]``."""

import statistics
import subprocess
import sys

ROUNDS = 25
NUMPY = "import numpy"
BOTH = "import numpy, normkit"
CODE = "from time import perf_counter as now; start = now(); {}; print((now() - start) * 1e3)"


def milliseconds(statement: str) -> float:
    """How long one import statement takes in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE.format(statement)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of ``import numpy`` and of ``import numpy, normkit``, run in turns so that both see the same machine."""
    milliseconds(BOTH)  # writes and warms the bytecode
    times = [(milliseconds(NUMPY), milliseconds(BOTH)) for _ in range(rounds)]
    numpy, both = (statistics.median(column) for column in zip(*times, strict=True))
    return numpy, both


def main() -> None:
    """Print the three figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    numpy, both = measure(rounds)
    print(f"{NUMPY}: {numpy:.1f} ms; {BOTH}: {both:.1f} ms; normkit adds {both - numpy:.1f} ms (medians of {rounds})")


if __name__ == "__main__":
    main()
