"""What torch.compile sees of a call: one operator, whether or not kernels serve it; and what it says of refusals."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import oracle
from normkit.conformance.libraries import first
from normkit.conformance.package import fresh
from normkit.conformance.tolerances import tolerance, units

torch = importlib.import_module("torch")
layers = importlib.import_module("normkit.torch")

# torch.compile's own parts warn of each other when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Seen:
    """A backend of torch.compile that runs a graph as it is, and keeps what it calls."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph, _):
        calls = [str(n.target) for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
        self.graphs.append([c for c in calls if "getitem" not in c])
        return graph.forward


CALLS = {
    "layer_norm": lambda x, w, b: nk.layer_norm(x, w, b),
    "layer_norm of several axes": lambda x, w, b: nk.layer_norm(x, axis=(1, 2)),
    "rms_norm": lambda x, w, b: nk.rms_norm(x, w, weight_offset=1.0),
    "group_norm": lambda x, w, b: nk.group_norm(x, 2, axis=1),
    "instance_norm": lambda x, w, b: nk.instance_norm(x, w, b, axis=-1),
    "batch_norm": lambda x, w, b: nk.batch_norm(x, b, w, w, b, axis=2),
    "batch_norm_train": lambda x, w, b: nk.batch_norm_train(x, w, b, axis=2)[0],
    "a layer": layers.LayerNorm(5),
}


def _arrays():
    torch.manual_seed(0)
    return torch.randn(3, 4, 5), torch.rand(5) + 0.5, torch.randn(5)


@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_reads_one_operator(name):
    """What it reads it also checks before each call: 22 microseconds of a call, when it was all of normkit's Python."""
    call, seen, (x, w, b) = CALLS[name], Seen(), _arrays()
    arrays = (x,) if name == "a layer" else (x, w, b)
    compiled = torch.compile(call, backend=seen, fullgraph=True)
    torch.testing.assert_close(compiled(*arrays), call(*arrays), rtol=1e-6, atol=1e-6)  # composed, not a kernel
    assert seen.graphs == [["normkit.call.default"]]


COLD = """
import torch, normkit as nk
seen = []

def backend(graph, _):
    seen.append([str(n.target) for n in graph.graph.nodes if "normkit" in str(n.target)])
    return graph.forward

call = torch.compile(lambda x: nk.layer_norm(x, mask=x > 0) if {masked} else nk.layer_norm(x), backend=backend)
for _ in range(2):
    call(torch.ones(3, 4))
print(len(seen), bool(seen[0]))
"""


@pytest.mark.parametrize("masked", [False, True], ids=["operator", "composed"])
def test_the_first_call_of_a_program_may_be_compiled(masked, tmp_path):
    """What loads normkit's PyTorch backend is read once, and again as if it had been loaded; compiled once, too."""
    assert fresh.run(COLD.format(masked=masked), tmp_path) == f"1 {not masked}"


LATE = """
import torch, normkit as nk
torch.compile(lambda x: nk.layer_norm(x), backend="eager")(torch.ones(3, 4))
import normkit.torch
layer = normkit.torch.BatchNorm1d(4)
torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(3, 4))
print(int(layer.num_batches_tracked))
"""


def test_layers_may_be_loaded_after_a_function_was_compiled(tmp_path):
    """What torch.compile is to read of them, it is told then."""
    assert fresh.run(LATE, tmp_path) == "1"


def test_statistics_leave_the_graph():
    x, seen = _arrays()[0], Seen()
    stats = torch.compile(lambda x: nk.batch_norm_train(x, axis=1)[1], backend=seen, fullgraph=True)(x)
    wanted = nk.batch_norm_train(x, axis=1)[1]
    assert isinstance(stats, nk.BatchStats) and stats.count == wanted.count == 15
    torch.testing.assert_close(stats[:2], wanted[:2], rtol=1e-6, atol=1e-6)
    assert seen.graphs == [["normkit.call.default"]]


def test_a_batch_norm_layer_is_two_operators():
    """Its statistics are merged by the second, as without a compiler."""
    (x, *_), seen, eager = _arrays(), Seen(), layers.BatchNorm1d(4, momentum=None)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend=seen, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-6)
    assert seen.graphs == [["normkit.call.default", "normkit.count.default"]] and int(layer.num_batches_tracked) == 2


def test_numbers_may_be_symbols():
    """eps, an axis and a number of groups that come from outside, where nothing is constant."""
    x = torch.randn(3, 4, 6)
    torch.compiler.reset()
    for call, given in (
        (lambda x, a, eps: nk.layer_norm(x, axis=a, eps=eps), ((1, 1e-5), (2, 1e-3), (2, 1e-2))),
        (lambda x, g, eps: nk.group_norm(x, g, eps=eps), ((2, 1e-5), (4, 1e-3))),
        (lambda x, a, offset: nk.rms_norm(x, axis=a, weight_offset=offset), ((1, 1.0), (2, 0.5))),
    ):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
        for numbers in given:
            torch.testing.assert_close(compiled(x, *numbers), call(x, *numbers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm_train", "a layer"])
def test_the_third_batch_size_finds_a_graph(name):
    call, (_, w, b) = CALLS[name], _arrays()
    seen = Seen()
    torch.compiler.reset()
    compiled = torch.compile(call, backend=seen, fullgraph=True)
    for n in (3, 5, 7, 9):
        x = torch.randn(n, 4, 5)
        compiled(*((x,) if name == "a layer" else (x, w, b)))
    assert len(seen.graphs) == 2
    x = torch.randn(6, 4, 5)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(call, backend=Seen(), fullgraph=True)
    compiled(*((x,) if name == "a layer" else (x, w, b)))


REFUSED = {
    "axis": (lambda x: nk.layer_norm(x, axis=3), r"axis must be in \[-3, 2\] for x of shape \(3, 4, 5\); received 3\."),
    "no integer": (lambda x: nk.group_norm(x, 2, axis=True), r"axis must be an integer; received True\."),
    "several": (lambda x: nk.group_norm(x, 2, axis=(1,)), r"axis must be an integer; received tuple\."),
    "eps": (lambda x: nk.rms_norm(x, eps=-1.0), r"eps must be a finite number >= 0; received -1\.0\."),
    "text": (lambda x: nk.rms_norm(x, eps="a"), r"eps must be a number; received str 'a'\."),
    "groups": (lambda x: nk.group_norm(x, 3), r"num_groups must divide the number of channels, 4; received 3\."),
    "weight": (lambda x: nk.layer_norm(x, x[0, :, 0]), r"weight must have shape \(5,\); received shape \(4,\)\."),
    "integers": (lambda x: nk.layer_norm(x.int()), r"x must be of a real floating-point dtype .*; received int32"),
    "one value": (lambda x: nk.batch_norm_train(x[:1, :, :1]), r"batch_norm_train needs more than one value"),
    "a list": (lambda x: nk.layer_norm([1.0, 2.0]), r"x must be an array .*; received list\."),
    "a weight": (lambda x: nk.layer_norm(x, [1.0] * 5), r"weight must be an array .*; received list\."),
    "a bias": (lambda x: nk.layer_norm(x, None, 1.0), r"bias must be an array .*; received float 1\.0\."),
    "a mean": (lambda x: nk.batch_norm(x, [0.0] * 4, x[0, :, 0]), r"mean must be an array .*; received list\."),
    "a variance": (lambda x: nk.batch_norm(x, x[0, :, 0], 1.0), r"var must be an array .*; received float 1\.0\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_the_same_words(name):
    call, words = REFUSED[name]
    torch.compiler.reset()
    with pytest.raises((TypeError, ValueError), match=words):
        torch.compile(call, backend="eager")(_arrays()[0])


@pytest.mark.parametrize("lengths", [False, True], ids=["mask", "lengths"])
def test_masks_are_read(lengths):
    """What no operator is there for is composed, in the same graph."""
    x = _arrays()[0]
    seen, valid = Seen(), {"lengths": torch.tensor([1, 4, 5])} if lengths else {"mask": x > -1}

    def call(x, **valid):
        return nk.batch_norm_train(x, **valid)[0]

    compiled = torch.compile(call, backend=seen, fullgraph=True)
    torch.testing.assert_close(compiled(x, **valid), call(x, **valid), rtol=1e-6, atol=1e-6)
    assert not any("normkit" in c for c in seen.graphs[0])


def test_a_program_on_disk_is_of_these_files(monkeypatch):
    """torch.compile looks for one by what it has read: that names all that decides what the operator is made of."""
    graphs = importlib.import_module("normkit.backends.torch.graphs")
    plan = importlib.import_module("normkit._calls").layer_plan
    labels = {graphs.label(plan, mode) for mode in ("0", "1")}
    monkeypatch.setattr(graphs.ops, "SMALLEST", (1, 1))
    labels.add(graphs.label(plan, "1"))
    monkeypatch.setattr(graphs, "_digest", lambda: "of other files")
    labels.add(graphs.label(plan, "1"))
    assert len(labels) == 4


CHECKED = """
import torch, normkit as nk, normkit.torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as entries

layers = [(m.LayerNorm(4), m.BatchNorm1d(4)) for m in (torch.nn, normkit.torch)]

def theirs(x, w):
    return torch.nn.functional.layer_norm(x, (4,), w)

def ours(x, w):
    return nk.layer_norm(x, w)

def their_norm(x, w):
    return layers[0][0](x)

def our_norm(x, w):
    return layers[1][0](x)

def their_batch_norm(x, w):
    return layers[0][1](x)

def our_batch_norm(x, w):
    return layers[1][1](x)

for f in theirs, ours, their_norm, our_norm, their_batch_norm, our_batch_norm:
    torch.compile(f, backend="eager")(torch.ones(3, 4), torch.ones(4))
    print(str(entries(f.__code__)[0].guard_manager).count("+-"), end=" ")
"""


def test_a_graph_checks_little_more_than_with_what_is_torchs(tmp_path):
    """Defaults, the kernels' mode, of a layer its settings: it was 88 for a function, 180 for a batch norm layer."""
    theirs, ours, *of_layers = map(int, fresh.run(CHECKED, tmp_path).split())
    their_norm, our_norm, their_batch_norm, our_batch_norm = of_layers
    assert 20 < ours <= theirs + 25
    assert 20 < our_norm <= their_norm + 5
    assert 40 < our_batch_norm <= their_batch_norm + 40


@pytest.mark.parametrize("name", ["backend.py", "ops.py", "moments.py", "plan.py"])
def test_a_changed_file_is_another(name, monkeypatch):
    digest, read = importlib.import_module("normkit.backends.torch.graphs")._digest.__wrapped__, Path.read_bytes
    before = digest()
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b"#" * (file.name == name))
    assert digest() != before


#: What 32 sets of n normal numbers are made into.
SETS = {
    "normal": lambda x: x,
    "an offset": lambda x: x + 1e6,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "sorted": lambda x: np.sort(x),
    "a first value far away": lambda x: _with(x, 0, 1e3),
    "a last value far away": lambda x: _with(x, -1, 1e3),
    "all alike but the first": lambda x: _with(np.full_like(x, 3.1), 0, 4.0),
    "all alike but the last": lambda x: _with(np.full_like(x, 3.1), -1, 4.0),
}
#: Of whole vectors, and of more; in runs of one set, and of two.
SMALL = {
    "layer_norm": ((32, 192), {}),
    "group_norm": ((8, 16, 6, 8), {"num_groups": 4}),
    "instance_norm": ((8, 4, 14, 14), {}),
    "batch_norm_train": ((2, 32, 7, 14), {}),
}


def _with(x, place, value):
    x[:, place] = value
    return x


@pytest.mark.parametrize("layer", SMALL)
def test_small_graphs_keep_their_digits(layer):
    """Within the 2 units of every plain path: in one pass, whichever value that starts from; in sums side by side."""
    shape, options = SMALL[layer]
    torch.compiler.reset()
    call = torch.compile(
        lambda x: first(getattr(nk, layer)(x, **options)), backend="aot_eager_decomp_partition", fullgraph=True
    )
    for name, made in SETS.items():
        x = made(np.random.default_rng(0).standard_normal((32, math.prod(shape) // 32))).astype("f4")
        if layer == "batch_norm_train":
            x = x.reshape(32, 2, 7, 14).swapaxes(0, 1)
        x = np.ascontiguousarray(x.reshape(shape))
        wanted = oracle.forward(layer, {"x": x}, options)
        off = np.abs(call(torch.tensor(x)).numpy() - wanted).max() / np.abs(wanted).max()
        assert off <= 2 * 2.0**-23, (name, off * 2**23)


def test_a_first_value_far_away_has_its_gradient():
    """Where dy has a mean: 44 units where what is left of the mean of x̂ was not taken out again."""
    torch.compiler.reset()
    rng = np.random.default_rng(0)
    x = (1 + 1e-3 * rng.standard_normal((2, 30000))).astype("f4")
    x[:, 0] = 10.3
    dy = (100 + rng.standard_normal(x.shape)).astype("f4")
    given = torch.tensor(x, requires_grad=True)
    y = torch.compile(nk.layer_norm, fullgraph=True)(given)
    found = torch.autograd.grad(y, given, torch.tensor(dy))[0].numpy()
    wanted, scales = oracle.vjp_and_scales("layer_norm", {"x": x}, dy, {})
    assert units(found, wanted["x"], "float32", scales["x"]) <= tolerance("gradient", "float32").units


@pytest.mark.parametrize("rows", [1024, 1021], ids=["in stages", "in float64"])
def test_gradients_of_parameters_add_few_numbers_to_one_another(rows):
    """Numbers that are alike, whose roundings all lean one way: the sum of a thousand would be 80 units off."""
    parameters = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
    torch.compiler.reset()
    y = torch.compile(lambda x, w, b: nk.layer_norm(x, w, b), fullgraph=True)(torch.randn(rows, 24), *parameters)
    found = torch.autograd.grad(y, parameters, torch.full_like(y, 0.1))[1]
    wanted = np.float32(0.1).astype("f8") * rows
    assert np.abs(found.numpy() / wanted - 1).max() <= 8 * 2.0**-23


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorded", [False, True], ids=["", "with a gradient"])
def test_torch_jit_follows_the_operations(recorded):
    """Of autograd's functions and of kernels it would see nothing."""
    x, w, b = _arrays()
    traced = torch.jit.trace(lambda x: nk.layer_norm(x, w, b), x.requires_grad_(recorded), check_trace=False)
    other = torch.randn(3, 4, 5)
    torch.testing.assert_close(traced(other), nk.layer_norm(other, w, b), rtol=1e-5, atol=1e-6)
