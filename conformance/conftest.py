"""The suite's options, and how a test is repeated over libraries, dtypes and cases."""

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.conformance import cases, libraries, natives, plain
from normkit.conformance.tolerances import judged

#: What Keras runs on: a process has one of its backends.
KERAS = os.environ.get("KERAS_BACKEND", "tensorflow")
#: The files that test libraries' own layers: they import them, and are collected where all of these are tested.
ONLY = {
    "test_convert_models.py": "jax tensorflow torch",
    "test_flax_layers.py": "jax",
    "test_flax_policies.py": "jax",
    "test_flax_recalibrate.py": "jax",
    "test_flax_replace.py": "jax",
    "test_inspect_models.py": "jax tensorflow torch",
    "test_keras_fold.py": KERAS,
    "test_keras_layers.py": KERAS,
    "test_keras_policies.py": KERAS,
    "test_keras_recalibrate.py": KERAS,
    "test_keras_models.py": KERAS,
    "test_keras_replace.py": KERAS,
    "test_keras_train.py": KERAS,
    "test_kernels_jax.py": "jax",
    "test_kernels_tensorflow.py": "tensorflow",
    "test_kernels_tensorflow_graphs.py": "tensorflow",
    "test_kernels_torch.py": "torch",
    "test_kernels_xla.py": "jax",
    "test_recalibrate_functions.py": "jax tensorflow torch",
    "test_recalibrate_tf_keras.py": "jax tensorflow torch",
    "test_replace.py": "torch",
    "test_resnet_pair.py": f"torch {KERAS}",
    "test_torch_devices.py": "torch",
    "test_rms_styles.py": "torch",
    "test_torch_fold.py": "torch",
    "test_torch_graphs.py": "torch",
    "test_torch_layers.py": "torch",
    "test_torch_models.py": "torch",
    "test_torch_policies.py": "torch",
    "test_torch_recalibrate.py": "torch",
    "test_torch_variants.py": "torch",
}
#: What no library makes a difference to, collected where one of these is tested.
ONCE = {
    "package": "numpy",
    "test_convert.py": "numpy",
    "test_convert_commands.py": "numpy",
    "test_convert_pairs.py": "numpy",
    "test_diagnostics.py": "numpy",
    "test_diagnostics_exact.py": "numpy",
    "test_diagnostics_more.py": "numpy",
    "test_divergences.py": "numpy torch jax",
    "test_inspect.py": "numpy",
    "test_kernels.py": "numpy",
    "test_kernels_custom_call.py": "numpy",
    "test_kernels_safety.py": "numpy torch",
    "test_oracle.py": "numpy",
    "test_study.py": "numpy",
}
#: The files of the case table, which ``--kernels both`` runs with the kernels required and without them.
BOTH = ("test_edges", "test_forward", "test_gradient", "test_layers")


def pytest_addoption(parser):
    """Add ``--backend NAME``, ``--device NAME``, ``--kernels MODE`` and ``--huge``."""
    group = parser.getgroup("normkit")
    group.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"array library to test: {', '.join(libraries.LIBRARIES)}; repeatable; default: all that are installed",
    )
    group.addoption(
        "--kernels",
        choices=(*kernels.MODES, "both"),
        help="the fused kernels' mode, in place of NORMKIT_KERNELS; where they are required, what they cannot serve is "
        "expected to be refused; both: the case table with them required, and without, and the rest by NORMKIT_KERNELS",
    )
    group.addoption("--huge", action="store_true", help="also what takes 12 GB of memory")
    group.addoption("--device", metavar="NAME", help="PyTorch's default device, such as cuda; the others choose theirs")


def pytest_configure(config):
    """Import the libraries that are to be tested, PyTorch before TensorFlow; one that was asked for must be there."""
    mode = config.getoption("kernels") or kernels.mode
    if mode != "both":
        os.environ["NORMKIT_KERNELS"] = kernels.mode = mode
    if mode in ("require", "both") and not kernels.built:
        raise pytest.UsageError("Kernels are required, but they are not built into this installation.")
    config.addinivalue_line("markers", "grid(cases, dtypes, thrifty): what a test of a library is repeated for")
    config.addinivalue_line("filterwarnings", "error")
    asked = config.getoption("backend") or libraries.available()[0]
    try:
        for name in asked:
            libraries.library(name)
    except (libraries.Missing, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    config.libraries = [a for name, a in libraries.LIBRARIES.items() if name in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a framework says on import is its own affair
        for library in config.libraries:
            assert library.xp
            natives.of(library.name)
    if device := config.getoption("device"):
        if "torch" not in asked:
            raise pytest.UsageError("--device is PyTorch's default device: it wants --backend torch.")
        libraries.library("torch").xp.set_default_device(device)


def pytest_ignore_collect(collection_path, config):
    """Leave out what is another library's, as the header says, and whole models where they are not named."""
    if collection_path == Path(__file__).parent / "models":
        return None if any("conformance.models" in argument for argument in config.args) else True
    here = Path(__file__).parent
    if collection_path.parent not in (here, here / "models"):
        return None
    tested, name = {library.name for library in config.libraries}, collection_path.name
    once = ONCE.get(name)
    left_out = {*ONLY.get(name, "").split()} - tested or (once and not tested & {*once.split()})
    return True if left_out else None


def pytest_report_header(config):
    """Name the libraries that are tested and those that are not installed."""
    missing = libraries.available()[1]
    tested = ", ".join(library.name for library in config.libraries)
    mode = config.getoption("kernels") or kernels.mode
    return f"normkit on: {tested}; kernels: {mode}" + (f"; not installed: {', '.join(missing)}" * bool(missing))


def pytest_collection_modifyitems(items):
    """Where kernels are required, what none serves is refused: a refusal that fails to come shows as a failure."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("_mode", kernels.mode) != "require":
            continue
        reason = plain.reason(item.name, params.get("case"))
        if reason is not None:
            item.user_properties.append(("refused", reason))
            item.add_marker(pytest.mark.xfail(strict=True, raises=kernels.KernelError, reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A refusal that was expected has the words that were expected."""
    try:
        return (yield)
    except kernels.KernelError as refused:
        words = dict(item.user_properties).get("refused", "")
        assert words in str(refused), f"expected {words!r}; received {refused}"
        raise


def pytest_generate_tests(metafunc):
    """Repeat a test that takes ``library`` (and ``dtype``, ``case``, as its grid says) for those that go together."""
    names = [name for name in ("library", "dtype", "case") if name in metafunc.fixturenames]
    if "library" not in names:
        return
    both = metafunc.config.getoption("kernels") == "both" and metafunc.module.__name__.rpartition(".")[2] in BOTH
    names += ["_mode"] * both
    marker = metafunc.definition.get_closest_marker("grid")
    grid = marker.kwargs if marker else {}
    rows = []
    for library in metafunc.config.libraries:
        dtypes = [d for d in grid.get("dtypes", ("float32",)) if d in library.dtypes and judged(d)]
        chosen = grid.get("thrifty" if library.thrifty and "thrifty" in grid else "cases", (None,))
        for dtype, case in itertools.product(dtypes, chosen):
            if case is None or case.layout in library.layouts:
                modes = _modes(metafunc.function.__name__, library, case) if both else (None,)
                rows += [{"library": library, "dtype": dtype, "case": case, "_mode": mode} for mode in modes]
    unique = {tuple(str(getattr(row[n], "name", row[n])) for n in names): [row[n] for n in names] for row in rows}
    metafunc.parametrize(names, list(unique.values()), ids=["-".join(key) for key in unique], indirect=["_mode"] * both)


def _modes(name, library, case):
    """The kernels' modes that a test is repeated for: what they are to refuse is served without them in the default."""
    if not library.kernels:
        return (kernels.mode,)
    if plain.reason(name, case):
        return ("require", "1")
    return ("require",) if case in cases.LARGE else ("require", "0")


@pytest.fixture(autouse=True)
def _mode(request, monkeypatch):
    """The kernels' mode that a test is repeated for."""
    if hasattr(request, "param"):
        monkeypatch.setattr(kernels, "mode", request.param)


@pytest.fixture(autouse=True)
def _session(request):
    """The settings under which a library has all its dtypes; NumPy warns as it does by default, an error here."""
    library = request.node.callspec.params.get("library") if hasattr(request.node, "callspec") else None
    if library is None:
        yield
        return
    with library.session(), np.errstate(divide="warn", over="warn", invalid="warn", under="ignore"):
        yield
