"""The fused CPU kernels as operators of PyTorch's own: what its graphs are told of them, and who is served by them."""

from __future__ import annotations

import importlib

import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance.kernel_inputs import need_kernels

need_kernels()
torch = importlib.import_module("torch")
ops = importlib.import_module("normkit.backends.torch.ops")
aot_autograd = importlib.import_module("torch._dynamo.backends.common").aot_autograd
make_boxed_func = importlib.import_module("functorch.compile").make_boxed_func

# torch.compile's own parts warn of each other when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

#: The layer, the shape of x, the shape of a parameter, and the operator's numbers.
ROWS = [
    ("layer_norm", (4, 5, 6), (5, 6), (0b110, 1, 1e-5, 0.0)),
    ("rms_norm", (4, 6, 5), (6,), (0b10, 1, 1e-6, 1.0)),
    ("group_norm", (3, 8, 2, 5), (8,), (0b10, 4, 1e-5, 0.0)),
    ("instance_norm", (3, 5, 6), (6,), (0b100, 1, 1e-5, 0.0)),
    ("batch_norm", (4, 6, 3, 2), (6,), (0b10, 1, 1e-5, 0.0)),
    ("batch_norm_train", (4, 6, 3, 2), (6,), (0b10, 1, 1e-5, 0.0)),
]


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(ops, "SMALLEST", (0, 0))
    monkeypatch.setattr(ops, "SMALLEST_GIVEN", 0)


@pytest.fixture
def count():
    """How many calls kernels serve from here on."""
    before = kernels.served()
    return lambda: kernels.served().since(before)


def _arrays(layer, shape, param, dtype=torch.float32, recorded=False):
    torch.manual_seed(0)
    statistics = (torch.randn(param), torch.rand(param) + 0.5) if layer == "batch_norm" else ()
    arrays = (torch.randn(shape), torch.randn(param), torch.randn(param), *statistics)
    return [a.to(dtype).requires_grad_(recorded) for a in arrays]


def _five(arrays):
    return (*arrays, *(None,) * (5 - len(arrays)))


@pytest.mark.parametrize("memory", ["row-major", "strided"])
@pytest.mark.parametrize(("layer", "shape", "param", "numbers"), ROWS)
def test_opcheck(layer, shape, param, numbers, memory):
    arrays = _arrays(layer, shape, param)
    if memory == "strided":
        arrays = [a.mT.contiguous().mT if a.ndim > 1 else a.repeat_interleave(2)[::2] for a in arrays]
    operands, call = _five(arrays), (ops.LAYERS.index(layer), *numbers)
    for operator in (torch.ops.normkit.forward, torch.ops.normkit.y):
        torch.library.opcheck(operator, (*operands, *call))
    stats = torch.ops.normkit.forward(*operands, *call)[1]
    needs = sum((a is not None) << i for i, a in enumerate(operands))
    torch.library.opcheck(torch.ops.normkit.backward, (*operands, stats, arrays[0], *call, needs))
    operands = _five([a.requires_grad_() for a in arrays])
    torch.library.opcheck(torch.ops.normkit.normalize, (*operands, *call))


def test_graphs_call_the_kernels_without_python():
    assert ops.native == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13))


@pytest.mark.parametrize("recorded", [False, True], ids=["", "with a gradient"])
def test_a_graph_without_a_gradient_makes_y_alone(recorded, monkeypatch):
    """Each from a size of its own on."""
    seen = []

    def loops(graph, _):
        seen.append([str(n.target) for n in graph.graph.nodes if "normkit" in str(n.target)])
        return make_boxed_func(graph.forward)

    def call(x, weight):
        return nk.layer_norm(x, weight)

    x, weight = torch.randn(5, 6), torch.ones(6, requires_grad=recorded)
    for smallest in ((30, 31), (31, 30)):
        monkeypatch.setattr(ops, "SMALLEST", smallest)
        torch.compiler.reset()
        torch.compile(call, backend=aot_autograd(fw_compiler=loops, bw_compiler=loops), fullgraph=True)(x, weight)
    served = ["normkit.forward.default" if recorded else "normkit.y.default"]
    assert [graph for graph in seen if graph] == [served]
    assert bool(seen[0]) != recorded


#: The layer, the shape of x, its axes as bits, groups, and the shape of a parameter.
PLAIN = [
    ("layer_norm", (4, 5, 6), 0b110, 1, (5, 6)),
    ("layer_norm", (37,), 0b1, 1, (37,)),
    ("rms_norm", (3, 1, 70), 0b100, 1, (70,)),
    ("group_norm", (3, 8, 2, 5), 0b10, 4, (8,)),
    ("group_norm", (2, 6), 0b10, 2, (6,)),
    ("instance_norm", (3, 5, 6, 2), 0b10, 1, (5,)),
    ("batch_norm", (4, 6, 3, 2), 0b10, 1, (6,)),
    ("batch_norm", (4, 3, 6), 0b100, 1, (6,)),
    ("batch_norm_train", (4, 6, 3, 2, 2), 0b10, 1, (6,)),
    ("batch_norm_train", (5, 7), 0b10, 1, (7,)),
    ("batch_norm_train", (6, 4, 3), 0b1, 1, (6,)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("layer", "shape", "axes", "groups", "param"), PLAIN)
def test_without_python_it_is_the_same(layer, shape, axes, groups, param, last, dtype):
    """What the extension finds in numbers is what the routes say of a plan, bit for bit; and it is served."""
    if not ops.native:
        pytest.skip("this PyTorch lets no extension in")
    arrays = _arrays(layer, shape, param, dtype)
    if last and len(shape) > 3:
        arrays[0] = arrays[0].to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    call = (ops.LAYERS.index(layer), axes, groups, 1e-5, 1.0 if layer == "rms_norm" else 0.0)
    wide = [a.float() if i % 2 else a for i, a in enumerate(arrays)]
    for operands in (_five(arrays), _five([wide[0], None, *wide[2:]]) if layer != "rms_norm" else _five(wide[:2])):
        y, stats = torch.ops.normkit.forward(*operands, *call)
        wanted = torch.ops.normkit.forward_of_any(*operands, *call)
        dy, needs = torch.randn_like(y), sum((a is not None) << i for i, a in enumerate(operands))
        found = torch.ops.normkit.backward(*operands, stats, dy, *call, needs)
        alone = [call_of(*operands, *call) for call_of in (torch.ops.normkit.y, torch.ops.normkit.y_of_any)]
        for mine, theirs in zip(
            (y, stats, *alone, *found),
            (*wanted, *wanted[:1] * 2, *torch.ops.normkit.backward_of_any(*operands, stats, dy, *call, needs)),
            strict=True,
        ):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("layer", "shape", "param", "numbers"), ROWS)
def test_the_operator_s_gradients(layer, shape, param, numbers):
    arrays = _arrays(layer, shape, param, torch.float64, recorded=True)

    def call(*given):
        return torch.ops.normkit.normalize(*_five(given), ops.LAYERS.index(layer), *numbers)[0]

    assert torch.autograd.gradcheck(call, arrays)
    assert torch.autograd.gradgradcheck(call, arrays)


#: The function's arguments for the same.
OPTIONS = {
    "layer_norm": {"axis": (1, 2)},
    "rms_norm": {"weight_offset": 1.0, "axis": 1},
    "group_norm": {"num_groups": 4},
    "instance_norm": {"axis": 2},
}


def _call(layer, x, weight, bias, *statistics):
    arguments = {"weight": weight} if layer == "rms_norm" else {"weight": weight, "bias": bias}
    out = getattr(nk, layer)(x, *statistics, **arguments, **OPTIONS.get(layer, {}))
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("layer", "shape", "param", "numbers"), ROWS)
def test_a_compiled_call_is_served(layer, shape, param, numbers, count):
    arrays = _arrays(layer, shape, param, recorded=True)
    used = [arrays[0], arrays[1], *arrays[3:]] if layer == "rms_norm" else arrays
    compiled = torch.compile(lambda *given: _call(layer, *given), backend="aot_eager", fullgraph=True)
    y = compiled(*arrays)
    found = torch.autograd.grad(y.sin().sum(), used)
    assert count() == (1, 1)
    eager = _call(layer, *arrays)
    assert torch.equal(y, eager) and y.stride() == eager.stride()
    for mine, theirs in zip(found, torch.autograd.grad(eager.sin().sum(), used), strict=True):
        assert torch.equal(mine, theirs)


def test_one_loop_is_left_to_the_compiler(count):
    """With given statistics, and no gradient to take."""
    arrays = _arrays("batch_norm", (4, 6, 3, 2), (6,))
    compiled = torch.compile(lambda *given: _call("batch_norm", *given), backend="aot_eager", fullgraph=True)
    y = compiled(*arrays)
    with torch.no_grad():
        again = compiled(arrays[0].requires_grad_(), *arrays[1:])
    assert count() == (0, 0)
    torch.testing.assert_close(y, _call("batch_norm", *arrays), rtol=1e-6, atol=1e-6)
    assert torch.equal(again, y)


def test_one_graph_for_any_batch(count):
    compiled = torch.compile(nk.layer_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        compiled(torch.randn(3, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (4, 9):
            x = torch.randn(n, 6)
            torch.testing.assert_close(compiled(x), nk.layer_norm(x), rtol=0, atol=0)
    assert count() == (5, 0)
    empty = torch.compile(nk.layer_norm, backend="aot_eager")(torch.empty(0, 6, requires_grad=True))
    assert empty.shape == (0, 6)


def test_what_stays_plain_operations(count, monkeypatch):
    """Exported programs run without normkit; transformations inside of a graph follow each operation."""
    x = torch.randn(4, 6)
    program = torch.export.export(importlib.import_module("normkit.torch").LayerNorm(6), (x,))
    assert not any("normkit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), nk.layer_norm(x))
    mapped = torch.compile(torch.func.vmap(nk.layer_norm), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(mapped(x), nk.layer_norm(x))

    def pushed(x):
        return torch.func.jvp(nk.layer_norm, (x,), (x.cos(),))[1]

    before = count().forward
    torch.testing.assert_close(torch.compile(pushed, backend="aot_eager", fullgraph=True)(x), pushed(x))
    compiled = torch.compile(nk.layer_norm, backend="aot_eager", fullgraph=True)
    with kernels.off():
        compiled(x)
    assert count().forward == before
    compiled(x)
    assert count().forward == before + 1  # another mode is another graph
    monkeypatch.setattr(ops, "SMALLEST", (25, 25))
    torch.compiler.reset()
    compiled(x)
    assert count().forward == before + 1


def test_a_variance_that_only_a_flag_makes_negative():
    """What is in memory is positive: the kernels, which look there, are not asked."""
    with pytest.raises(ValueError, match=r"var must not be negative; received a smallest value of -1\.0"):
        nk.batch_norm(torch.ones(4, 3), torch.zeros(3), torch._neg_view(torch.ones(3)))


def _first(layer):
    """The layer as a function of x alone that returns y."""
    options = {"group_norm": {"num_groups": 2}, "batch_norm": {"mean": torch.zeros(6), "var": torch.ones(6)}}
    function = getattr(nk, layer)

    def call(x):
        found = function(x, **options.get(layer, {}))
        return found[0] if layer == "batch_norm_train" else found

    return call


@pytest.mark.parametrize("layer", [row[0] for row in ROWS])
def test_many_gradients_at_once(layer, count):
    """As autograd maps them, as torch.func does, and the derivative of a gradient along its dy: those of one by one."""
    call, x = _first(layer), torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    y, dys = call(x), torch.randn(3, 4, 6, 5, dtype=torch.float64)

    def pull_back(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    wanted = torch.stack([pull_back(dy) for dy in dys])
    assert count() == (1, 3)
    (mapped,) = torch.autograd.grad(y, x, dys, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(mapped, wanted)
    torch.testing.assert_close(torch.func.vmap(pull_back)(dys), wanted)
    with torch.autograd.forward_ad.dual_level():
        found = pull_back(torch.autograd.forward_ad.make_dual(dys[0], dys[1]))
        moved = torch.autograd.forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(moved, wanted[1])
    assert count() == (1, 3)
