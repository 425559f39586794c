"""The installed package: its names, its version, its metadata, and what importing it brings along."""

import ast
import inspect
import re
import shutil
from importlib import metadata, resources
from pathlib import Path

import pytest

import normkit
from normkit.conformance.package import fresh

FRAMEWORKS = {
    "array_api_strict", "click", "cupy", "dask", "flax", "jax", "jaxlib", "keras", "ndonnx", "pytest", "rich", "scipy",
    "sklearn", "sparse", "tensorflow", "torch",
}  # fmt: skip

NORMS = ("batch_norm", "batch_norm_train", "group_norm", "instance_norm", "layer_norm", "rms_norm")
LAYERS = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")

#: What installation puts beside the modules.
PARTS = {"backends", "bench", "conformance"}

LOADED = f"""
import sys
parts = [name.split(".") for name in sys.modules]
frameworks = {sorted(FRAMEWORKS)}
print(*sorted(".".join(p) for p in parts if p[0] in frameworks or p[0] == "array_api_compat" and p[-1] in frameworks))
"""


def test_all_names_exist_once_and_in_order():
    assert len(set(normkit.__all__)) == len(normkit.__all__)
    assert list(normkit.__all__) == sorted(normkit.__all__)
    assert all(getattr(normkit, name) is not None for name in normkit.__all__)


SOURCE_TREE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "_editable" not in type(finder).__module__]
sys.path.insert(0, {folder!r})
try:
    import normkit
except ImportError as error:
    print(error)
"""


def test_a_source_tree_says_what_it_is(tmp_path):
    """Python that is started in a checkout finds it before what is installed."""
    shutil.copytree(Path(normkit.__file__).parent, tmp_path / "normkit", ignore=lambda *_: PARTS)
    said = fresh.run(SOURCE_TREE.format(folder=str(tmp_path)), tmp_path)
    assert said.startswith(f"normkit is imported from {tmp_path / 'normkit'}, its source tree") and said.endswith("-e.")


def test_completion_shows_what_is_public():
    """Also what is loaded when it is asked for, and nothing else."""
    shown = {name for name in dir(normkit) if not name.startswith("__")}
    assert shown == {*normkit.__all__, "diagnostics", "flax", "keras", "torch"}


def test_nothing_public_is_missing_from_all():
    public = ast.parse(resources.files(normkit).joinpath("__init__.py").read_text())
    imports = [node for node in ast.walk(public) if isinstance(node, ast.ImportFrom) and node.level]
    imported = {a.asname or a.name for node in imports for a in node.names}
    assert {name for name in imported if not name.startswith("_")} == set(normkit.__all__)


def test_version_is_the_distributions():
    assert normkit.__version__ == metadata.version("normkit")


def test_hard_dependencies_are_two():
    required = [r for r in metadata.requires("normkit") or () if "extra ==" not in r]
    assert sorted(re.split(r"[^\w-]", r)[0] for r in required) == ["array-api-compat", "numpy"]


def test_every_framework_has_an_extra():
    extras = set(metadata.metadata("normkit").get_all("Provides-Extra") or ())
    assert extras >= {"torch", "tensorflow", "jax", "cupy-cuda12x", "cupy-cuda13x", "check", "bench", "test", "all"}


def test_console_script_points_at_the_command():
    (script,) = metadata.entry_points(group="console_scripts", name="normkit")
    assert script.value == "normkit.__main__:main"
    assert callable(script.load())


def test_types_are_marked_as_shipped():
    assert resources.files(normkit).joinpath("py.typed").is_file()


def test_every_folder_is_mapped_into_the_package():
    for part in ("core", "backends", "conformance", "bench"):
        assert resources.files(f"normkit.{part}").joinpath("__init__.py").is_file(), part


@pytest.mark.parametrize(
    "use",
    [
        "import normkit",
        "import normkit, numpy; x = numpy.ones((4, 3)); normkit.layer_norm(x); normkit.batch_norm_train(x)",
    ],
    ids=["imported", "used on NumPy"],
)
def test_no_framework_is_imported(use, tmp_path):
    assert fresh.run(use + LOADED, tmp_path) == ""


def test_the_search_for_frameworks_finds_one(tmp_path):
    found = fresh.run("import array_api_strict, array_api_compat.numpy" + LOADED, tmp_path)
    assert "array_api_strict" in found.split()


def test_core_names_no_framework():
    core = resources.files("normkit.core")
    named = {
        file.name: re.findall(r"\b(?:torch|tensorflow|jax|cupy|keras|flax|numpy)\b", file.read_text(encoding="utf-8"))
        for file in core.iterdir()
        if file.name.endswith(".py")
    }
    assert named.keys() >= {"plan.py", "moments.py", "normalize.py"}
    assert not any(named.values()), named


@pytest.mark.parametrize("name", [*NORMS, *LAYERS, "vjp"])
def test_docstrings_name_every_argument(name):
    text = inspect.getdoc(getattr(normkit, name))
    arguments = re.findall(r"^(\S.*?) : ", text[text.index("Parameters\n") : text.index("Raises\n")], re.MULTILINE)
    named = {argument.strip(" *") for words in arguments for argument in words.split(",")}
    assert named >= set(inspect.signature(getattr(normkit, name)).parameters)
    assert name == "vjp" or "``y = " in text[: text.index("Parameters\n")]
    assert name in LAYERS or "Returns\n" in text
    assert name not in NORMS or "Source: " in text


@pytest.mark.parametrize("name", [*NORMS, *LAYERS])
def test_docstrings_say_what_the_frameworks_call_it(name):
    lines = inspect.getdoc(getattr(normkit, name)).splitlines()
    first, second, last, *_ = (i for i, line in enumerate(lines) if line.startswith("==="))  # others may follow
    assert lines[first] == lines[second] == lines[last]
    gaps = [i for i, character in enumerate(lines[first]) if character == " "]
    table = lines[first : last + 1]
    assert not any(line[i : i + 1].strip() for line in table for i in gaps)
    assert all(word in table[1] for word in ("here", "torch", "keras", "flax", "ONNX"))
    named = {line.split("  ")[0] for line in table[3:-1]}
    assert named >= {"weight", "bias", "eps", "axis"}
    assert ("mask" in named) is (name in NORMS)
