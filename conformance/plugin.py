"""The pytest plugin through which ``pytest --pyargs normkit.conformance`` knows the suite's options."""

from importlib import import_module


def pytest_load_initial_conftests(early_config, args):
    """Load the suite's conftest before options are parsed, which pytest does for a path but not for ``--pyargs``."""
    if any(argument.startswith("normkit.conformance") for argument in args):
        conftest = import_module("normkit.conformance.conftest")
        early_config.pluginmanager.register(conftest, name=conftest.__file__)
