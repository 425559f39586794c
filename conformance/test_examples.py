"""The examples in docstrings print what they say, and everything public that is called has one."""

import doctest
import importlib
import inspect

import pytest

import normkit
from normkit import diagnostics

#: Modules whose classes are a framework's own with other numbers, and what that runs on: one example serves them.
DROP_IN = {"normkit.torch": "torch", "normkit.keras": "tensorflow", "normkit.flax": "jax"}
#: What works on a framework's models, and whose its example has; all others are of NumPy.
OF_MODELS = dict.fromkeys(("convert", "fold", "inspect", "recalibrate", "replace", "restore"), "torch")

# What batch_norm_train returns is shown there: it is of the core, which names no library.
PUBLIC = {name: getattr(normkit, name) for name in normkit.__all__ if name != "BatchStats"}
PUBLIC |= {name: value for name in diagnostics.__all__ if inspect.isfunction(value := getattr(diagnostics, name))}


@pytest.mark.parametrize("name", [*PUBLIC, *DROP_IN])
def test_examples_print_what_they_say(name, request):
    library = (DROP_IN | OF_MODELS).get(name, "numpy")
    if library not in {tested.name for tested in request.config.libraries}:
        pytest.skip(f"the example is of {library}")
    pytest.importorskip({"normkit.keras": "keras", "normkit.flax": "flax"}.get(name, library))
    documented = importlib.import_module(name) if name in DROP_IN else PUBLIC[name]
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented), {}, name, None, None)
    assert example.examples, f"{name} has no example"
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
