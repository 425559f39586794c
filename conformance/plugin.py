"""The pytest plugin through which ``pytest --pyargs normkit.conformance`` (or ``bench``) knows the suite's options."""

from importlib import import_module

SUITES = ("normkit.conformance", "normkit.bench")


def pytest_load_initial_conftests(early_config, args):
    """Load a suite's conftest before options are parsed, which pytest does for a path but not for ``--pyargs``."""
    for suite in SUITES:
        if any(argument == "normkit" or argument.startswith(suite) for argument in args):
            conftest = import_module(f"{suite}.conftest")
            early_config.pluginmanager.register(conftest, name=conftest.__file__)
