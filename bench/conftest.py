"""The options of the benchmarks, and what is written beside their figures."""

import pytest

from normkit.bench import machine, rows
from normkit.conformance import libraries


def pytest_addoption(parser):
    """Add ``--backend NAME``, unless the conformance suite, which runs along, has it already."""
    group = parser.getgroup("normkit")
    text = f"array library to time ({', '.join(rows.LIBRARIES)}); may be repeated; default: all that are installed"
    try:
        group.addoption("--backend", action="append", metavar="NAME", help=text)
    except ValueError as error:
        if "already added" not in str(error):
            raise
    group.addoption("--quick", action="store_true", help="time fewer workloads, in float32")


def pytest_configure(config):
    """Import the libraries that are to be timed; one that was asked for must be there."""
    try:
        config.engines = rows.chosen(config.getoption("backend"))
    except (libraries.Missing, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions, device and threads, for ``--benchmark-json``."""
    machine_info["normkit"] = machine.describe(config.engines)
