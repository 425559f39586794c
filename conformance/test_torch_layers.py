"""normkit.torch against torch.nn: arguments, values, state, misuse, and everything that PyTorch does to a module."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import normkit.torch as nt
from normkit._policies import SETTINGS
from normkit.backends import kernels
from normkit.conformance.package import fresh
from normkit.conformance.tolerances import tolerance, units


class Site(NamedTuple):
    """A layer of torch.nn, its arguments, and a shape that it takes."""

    kind: str
    args: tuple
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    def pair(self, **options):
        """Ours and torch's, with the same parameters that are no identity."""
        made = [getattr(module, self.kind)(*self.args, **self.options, **options) for module in (nt, nn)]
        numbers = torch.Generator().manual_seed(0)
        for parameter in made[1].parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=numbers))
        made[0].load_state_dict(made[1].state_dict())
        return made

    def x(self, seed=0, dtype=torch.float32, offset=3.0):
        """Some input."""
        numbers = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=numbers) * 2 + offset).to(dtype)


SITES = (
    Site("BatchNorm1d", (6,), (9, 6)),
    Site("BatchNorm1d", (6,), (4, 6, 7), {"affine": False}),
    Site("BatchNorm2d", (6,), (3, 6, 5, 7)),
    Site("BatchNorm2d", (6,), (3, 6, 5, 7), {"track_running_stats": False, "eps": 1e-3}),
    Site("BatchNorm2d", (6,), (3, 6, 5, 7), {"momentum": None}),
    Site("BatchNorm2d", (6, 1e-4, 0.3), (3, 6, 5, 7), {"bias": False}),
    Site("BatchNorm3d", (4,), (2, 4, 3, 5, 2)),
    Site("LayerNorm", (7,), (3, 5, 7)),
    Site("LayerNorm", ((5, 7), 1e-12), (3, 5, 7), {"bias": False}),
    Site("LayerNorm", ([7],), (3, 5, 7), {"elementwise_affine": False}),
    Site("GroupNorm", (3, 6), (2, 6, 5, 7)),
    Site("GroupNorm", (2, 6), (4, 6), {"affine": False}),
    Site("InstanceNorm1d", (6,), (2, 6, 9)),
    Site("InstanceNorm1d", (6,), (6, 9)),
    Site("InstanceNorm2d", (6,), (2, 6, 5, 7), {"affine": True}),
    Site("InstanceNorm2d", (6,), (2, 6, 5, 7), {"affine": True, "track_running_stats": True}),
    Site("InstanceNorm3d", (4,), (2, 4, 3, 5, 2), {"track_running_stats": True, "momentum": None}),
    Site("RMSNorm", (7,), (3, 5, 7)),
    Site("RMSNorm", ((5, 7), 1e-6), (3, 5, 7), {"elementwise_affine": False}),
)
sites = pytest.mark.parametrize("site", SITES, ids=str)
KINDS = tuple(dict.fromkeys(site.kind for site in SITES))
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def close(found, reference, quantity, scale=None):
    """A float32 tensor is as near to torch.nn's float64 result as the table asks."""
    limit = tolerance(quantity, "float32")
    error = units(found.detach().double().numpy(), reference.detach().double().numpy(), "float32", scale)
    assert error <= limit.units, f"{error:.3g} units off: {limit.reason}"


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_and_types_are_torchs(kind):
    ours, theirs = getattr(nt, kind), getattr(nn, kind)
    parameters, more = inspect.signature(ours).parameters, SETTINGS if "Batch" in kind or "Instance" in kind else {}
    assert {n: p for n, p in parameters.items() if n not in more} == dict(inspect.signature(theirs).parameters)
    assert issubclass(ours, theirs) and ours is not theirs


@sites
def test_repr_and_state_are_torchs(site):
    ours, theirs = site.pair()
    assert repr(ours) == repr(theirs)
    assert same_state(ours, theirs)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


LAYOUTS = [(site, False) for site in SITES] + [(site, True) for site in SITES if len(site.shape) in FORMATS]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("site", "last"), LAYOUTS, ids=str)
def test_values_and_gradients(site, last, training):
    """Against torch.nn in float64; channels_last stays in y and in the gradient."""
    ours, theirs = site.pair()
    theirs.double()
    ours(site.x(1)), theirs(site.x(1).double())
    x = site.x()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    if last:
        x = x.to(memory_format=FORMATS[x.dim()])
        dy = dy.to(memory_format=FORMATS[x.dim()])
    results = []
    for layer, value in ((ours, x), (theirs, x.double())):
        value = value.detach().requires_grad_()
        y = layer.train(training)(value)
        y.backward(dy.to(y.dtype))
        results.append((y, value.grad, {n: p.grad for n, p in layer.named_parameters()}, dict(layer.named_buffers())))
    (y, dx, gradients, buffers), (y0, dx0, gradients0, buffers0) = results
    close(y, y0, "forward")
    close(dx, dx0, "gradient")
    for name, gradient in gradients.items():
        close(gradient, gradients0[name], "gradient")
    for name, buffer in buffers.items():
        close(buffer, buffers0[name], "running")
    if last:
        assert y.is_contiguous(memory_format=FORMATS[y.dim()])
        assert dx.is_contiguous(memory_format=FORMATS[y.dim()])


@pytest.mark.parametrize("momentum", [0.1, 0.003, 1.0, 0.0, None])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "InstanceNorm2d"])
def test_ten_steps_of_running_statistics(kind, momentum):
    site = Site(kind, (6,), (3, 6, 5, 7), {"momentum": momentum, "track_running_stats": True})
    ours, theirs = site.pair()
    theirs.double()
    for k in range(10):
        ours(site.x(k)), theirs(site.x(k).double())
    close(ours.running_mean, theirs.running_mean, "running", np.asarray(8.0))
    close(ours.running_var, theirs.running_var, "running")
    assert ours.num_batches_tracked == theirs.num_batches_tracked == (10 if kind == "BatchNorm2d" else 0)
    assert momentum != 0 or not ours.running_mean.any()


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm"])
def test_far_from_zero(kind, offset):
    """What torch.nn is out of tolerance on; so these are not torch's kernels."""
    site = {"BatchNorm2d": SITES[2], "GroupNorm": SITES[10], "InstanceNorm2d": SITES[14], "LayerNorm": SITES[7]}[kind]
    ours, theirs = site.pair()
    x = site.x(offset=offset)
    close(ours(x), theirs.double()(x.double()), "forward")


@sites
def test_no_kernel_of_torchs_is_called(site):
    """Not in training, in inference, or in the backward pass."""

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    for layer, native in zip(site.pair(), (False, True), strict=True):
        seen = set()
        with Calls():
            layer(site.x().requires_grad_()).sum().backward()
            layer.eval()(site.x())
        assert any(name.endswith("_norm") for name in seen) is native, seen


@sites
@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "plain"])
def test_an_activation_in_place(site, fused):
    """As in nn.Sequential(norm, nn.ReLU(inplace=True)): y is no view that autograd would not let be written to."""
    gradients = []
    for inplace in (False, True):
        layer, x = site.pair()[0], site.x().requires_grad_()
        with contextlib.nullcontext() if fused else kernels.off():
            nn.Sequential(layer, nn.ReLU(inplace))(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@sites
def test_state_loads_both_ways(site):
    ours, theirs = site.pair()
    ours(site.x(1))
    theirs.load_state_dict(ours.state_dict())
    assert same_state(ours, theirs)
    theirs(site.x(2))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert same_state(ours, theirs)


def test_state_from_before_batches_were_counted():
    """Version 1 of torch's state has no num_batches_tracked; a newer one without it is refused."""
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        nt.BatchNorm2d(3).load_state_dict(old)
    old._metadata[""]["version"] = 1
    layer = nt.BatchNorm2d(3)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


MISUSE = {
    "rank": ("BatchNorm2d", (4,), {}, (2, 4, 5), True),
    "rank 1d": ("BatchNorm1d", (4,), {}, (2, 4, 5, 5), True),
    "channels": ("BatchNorm2d", (4,), {}, (2, 3, 5, 5), True),
    "channels in eval": ("BatchNorm2d", (4,), {}, (2, 3, 5, 5), False),
    "channels without statistics": ("BatchNorm2d", (4,), {"track_running_stats": False}, (2, 3, 5, 5), False),
    "one value": ("BatchNorm2d", (4,), {}, (1, 4, 1, 1), True),
    "one value without statistics": ("BatchNorm1d", (4,), {"track_running_stats": False}, (1, 4), False),
    "eps": ("BatchNorm1d", (4,), {"eps": 0.0}, (3, 4), True),
    "negative eps": ("BatchNorm1d", (4,), {"eps": -1.0}, (3, 4), False),
    "lengths": ("LayerNorm", (4,), {}, (2, 3), True),
    "too few axes": ("LayerNorm", ((4, 3),), {}, (3,), True),
    "no lengths": ("LayerNorm", ((),), {}, (2, 3), True),
    "lengths of rms": ("RMSNorm", (4,), {}, (2, 3), True),
    "channels of groups": ("GroupNorm", (2, 4), {}, (2, 6, 3), True),
    "channels of groups without affine": ("GroupNorm", (2, 4), {"affine": False}, (2, 5, 3), True),
    "one axis": ("GroupNorm", (2, 4), {}, (4,), True),
    "one value of a group": ("GroupNorm", (4, 4), {}, (1, 4, 1), True),
    "channels of instances": ("InstanceNorm2d", (4,), {"affine": True}, (2, 3, 5, 5), True),
    "rank of instances": ("InstanceNorm2d", (4,), {}, (2, 4), True),
    "one value of an instance": ("InstanceNorm2d", (4,), {}, (2, 4, 1, 1), False),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_raises_what_torch_raises(misuse):
    """And changes no statistics."""
    kind, args, options, shape, training = MISUSE[misuse]
    ours, theirs = (getattr(module, kind)(*args, **options).train(training) for module in (nt, nn))
    before = copy.deepcopy(ours)
    with pytest.raises((ValueError, RuntimeError)) as error:
        theirs(torch.ones(shape))
    with pytest.raises(error.type):
        ours(torch.ones(shape))
    assert same_state(ours, before)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_refused(kind):
    site = next(site for site in SITES if site.kind == kind)
    for layer in site.pair():
        with pytest.raises(RuntimeError):
            layer(site.x().long())


# Instance norm's look at the rank, which comes first, is torch's own.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Instance" not in kind])
def test_other_than_tensors_are_refused(kind):
    site = next(site for site in SITES if site.kind == kind)
    with pytest.raises(TypeError, match=r"takes a torch\.Tensor; received list\.$"):
        site.pair()[0](site.x().tolist())


def test_constructor_errors_are_torchs():
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        nt.GroupNorm(3, 4)
    with pytest.raises(TypeError):
        nt.BatchNorm2d()
    with pytest.raises(ValueError, match="one length; received"):
        nt.LayerNorm2d((3, 4))


def test_an_empty_batch_counts_for_nothing():
    for layer, x in (
        (nt.BatchNorm2d(4, momentum=None), torch.zeros(0, 4, 3, 3)),
        (nt.GroupNorm(2, 4), torch.zeros(0, 4)),
    ):
        before = copy.deepcopy(layer)
        y = layer(x.requires_grad_())
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        assert same_state(layer, before)


@sites
@pytest.mark.parametrize("enabled", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_under_autocast(site, dtype, enabled):
    ours, theirs = site.pair()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), contextlib.suppress(UserWarning):
        assert ours(site.x(dtype=dtype)).dtype == dtype
        assert theirs(site.x(dtype=dtype)).dtype == dtype


@sites
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_layers(site, dtype):
    """Parameters and statistics are narrow as torch's; values are those of float32, rounded."""
    ours, theirs = (layer.to(dtype) for layer in site.pair())
    assert same_state(ours, theirs)
    x = site.x(dtype=dtype)
    y, reference = ours(x), copy.deepcopy(theirs).double()(x.double())
    name = str(dtype).removeprefix("torch.")
    assert y.dtype == dtype
    assert units(y.detach().double().numpy(), reference.detach().numpy(), name) <= tolerance("forward", name).units
    assert [b.dtype for b in ours.buffers()] == [b.dtype for b in theirs.buffers()]


@sites
def test_meta_device(site):
    layer = getattr(nt, site.kind)(*site.args, **site.options, device="meta")
    assert layer(site.x().to("meta")).shape == site.shape
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters() if hasattr(layer, "reset_parameters") else None
    assert same_state(layer, getattr(nt, site.kind)(*site.args, **site.options))


@sites
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_duplicates(site, how):
    layer = site.pair()[0].eval()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(layer) and repr(twin) == repr(layer) and same_state(twin, layer)
    assert torch.equal(twin(site.x()), layer(site.x()))
    twin.train()(site.x())
    moves = bool(list(layer.buffers())) and (site.kind.startswith("Batch") or layer.momentum is not None)
    assert same_state(twin, layer) is not moves


@sites
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(site, training):
    """In one graph; batches of other sizes as well, in a graph of unknown sizes."""
    ours = site.pair()[0].train(training)
    twin = copy.deepcopy(ours)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for size in (site.shape[0], site.shape[0] + 1, site.shape[0] + 4):
        if len(site.shape) == 2 and site.kind.startswith("Instance"):
            size = site.shape[0]
        values = torch.cat([site.x(k) for k in range(3)])[:size]
        x, x0 = values.clone().requires_grad_(), values.clone().requires_grad_()
        y, y0 = compiled(x), ours(x0)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(size))
        y.backward(dy), y0.backward(dy)
        close(y, y0.double(), "cross")
        close(x.grad, x0.grad.double(), "gradient")
    for name, buffer in twin.named_buffers():
        close(buffer, ours.get_buffer(name).double(), "running")


def test_compile_as_the_first_thing_of_a_process(tmp_path):
    """With parameters of types that nothing has met yet."""
    code = """
import warnings; warnings.simplefilter("ignore")
import torch, normkit.torch
layer = normkit.torch.BatchNorm2d(4, momentum=None)
torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 4, 3, 3))
print(int(layer.num_batches_tracked))
"""
    assert fresh.run(code, tmp_path) == "1"


@sites
@pytest.mark.parametrize("strict", [False, True], ids=["export", "strict"])
def test_export(site, strict):
    """With any number of samples; statistics are counted by the exported program too."""
    if len(site.shape) == 2 and site.kind.startswith("Instance"):
        shapes, more = None, site.x(1)
    else:
        shapes, more = ({0: torch.export.Dim.AUTO},), torch.cat([site.x(1), site.x(2)])
    ours = site.pair()[0]
    program = torch.export.export(copy.deepcopy(ours), (site.x(),), dynamic_shapes=shapes, strict=strict).module()
    close(program(more), ours(more).double(), "cross")
    for name, buffer in program.named_buffers():
        close(buffer, ours.get_buffer(name).double(), "running")


@pytest.mark.parametrize("samples", [3, 3000], ids=["few", "many"])
@pytest.mark.parametrize("named", [False, True], ids=["AUTO", "Dim"])
def test_export_of_any_number_of_samples(samples, named):
    """Also of more, and of fewer, than there is a kernel for."""
    shapes = ({0: torch.export.Dim("n") if named else torch.export.Dim.AUTO},)
    for layer, shape in ((nt.LayerNorm(128), (128,)), (nt.BatchNorm2d(4), (4, 5, 5)), (nt.GroupNorm(2, 4), (4, 5, 5))):
        program = torch.export.export(layer, (torch.randn(samples, *shape),), dynamic_shapes=shapes).module()
        for other in (2, 5000):
            x = torch.randn(other, *shape)
            close(program(x), layer(x).double(), "cross")


@sites
def test_functional_call(site):
    """With parameters and buffers of others, which are counted into; the layer's own stay."""
    ours = site.pair()[0]
    before = copy.deepcopy(ours)
    parameters = {name: a.detach().clone() for name, a in ours.named_parameters()}
    buffers = {name: a.clone() for name, a in ours.named_buffers()}
    dy = torch.randn(site.shape, generator=torch.Generator().manual_seed(2))

    def loss(parameters, x, buffers):
        return (torch.func.functional_call(ours, {**parameters, **buffers}, (x,)) * dy).sum()

    gradients, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, site.x(), buffers)
    assert same_state(ours, before)
    torch.func.functional_call(ours, {**parameters, **buffers}, (site.x(),))
    assert same_state(ours, before)

    x = site.x().requires_grad_()
    for _ in range(2):
        y = ours(x)
    y.backward(dy)
    close(dx, x.grad.double(), "gradient")
    for name, parameter in ours.named_parameters():
        close(gradients[name], parameter.grad.double(), "gradient")
    for name, buffer in ours.named_buffers():
        close(buffers[name], buffer.double(), "running")


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "InstanceNorm2d"])
def test_checkpointing_counts_once_when_asked(kind, reentrant):
    site = Site(kind, (6,), (3, 6, 5, 7), {"track_running_stats": True})
    reference = site.pair()[0]
    reference(site.x())

    def step(context):
        model = nn.Sequential(site.pair()[0], nn.Conv2d(6, 6, 1), nn.GELU())
        with context:
            checkpoint(model, site.x().requires_grad_(), use_reentrant=reentrant).sum().backward()
        return model[0]

    assert same_state(step(nt.count_once()), reference)
    assert not same_state(step(contextlib.nullcontext()), reference)


def test_counting_once_leaves_other_passes_alone():
    layer = nt.BatchNorm2d(6)
    with nt.count_once(), nt.count_once():
        layer(torch.randn(3, 6, 2, 2)), layer(torch.randn(3, 6, 2, 2))
    assert layer.num_batches_tracked == 2


DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
import normkit.torch as nt

def build(module):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), module.BatchNorm2d(4), nn.ReLU(), module.GroupNorm(2, 4), nn.Flatten(),
        nn.Linear(4 * 36, 5), module.LayerNorm(5), nn.Linear(5, 1)).double()

def work(rank, store):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    print("connected", flush=True)
    results = []
    for module in (nt, nn):
        model = nn.parallel.DistributedDataParallel(build(module))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for k in range(3):
            torch.manual_seed(10 * k + rank)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        results.append({**dict(model.module.named_parameters()), **dict(model.module.named_buffers())})
    ours, theirs = results
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for value in (p for n, p in ours.items() if "running" not in n):
        other = value.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value)
    dist.barrier()

work(int(sys.argv[1]), sys.argv[2])
print("done", flush=True)
os._exit(0)  # gloo's threads, alive in a normal exit, now and then abort the process ("terminate called")
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes: gradients are averaged, buffers broadcast, and the model is torch's after three steps."""
    import subprocess
    import sys

    runs = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", DDP, str(rank), str(tmp_path / "store")],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = []
    for run in runs:
        try:
            ends.append(run.communicate(timeout=120))
        except subprocess.TimeoutExpired:
            run.kill()
            ends.append(run.communicate())
    if not any("connected" in out for out, _ in ends):
        pytest.skip(f"gloo connects no two processes here: {ends[0][1].strip().splitlines()[-1:]}")
    for run, (out, err) in zip(runs, ends, strict=True):
        assert run.returncode == 0 and out == "connected\ndone\n", err


def test_layer_norm_2d_is_layer_norm_of_the_channels():
    layer, reference = nt.LayerNorm2d(6, eps=1e-6), nn.LayerNorm(6, eps=1e-6)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
    layer.load_state_dict(reference.state_dict())
    assert isinstance(layer, nn.LayerNorm) and repr(layer) == repr(reference).replace("LayerNorm", "LayerNorm2d")
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 3, 5).to(memory_format=format)
        y = layer(x)
        close(y, reference.double()(x.double().permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "forward")
        assert y.is_contiguous(memory_format=format)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 6, 3))
    with pytest.raises(RuntimeError, match="Given normalized_shape"):
        layer(torch.randn(2, 5, 3, 3))


def test_frozen_batch_norm_never_changes():
    trained = nn.BatchNorm2d(6)
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    trained(torch.randn(5, 6, 3, 3) + 2)
    layer = nt.FrozenBatchNorm2d(6)
    layer.load_state_dict(trained.state_dict())
    before = copy.deepcopy(layer)
    x = torch.randn(2, 6, 3, 5, requires_grad=True)
    y = layer.train()(x)
    close(y, trained.eval().double()(x.double()), "forward")
    y.sum().backward()
    assert x.grad.any() and same_state(layer, before) and not list(layer.parameters())
    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert repr(layer) == "FrozenBatchNorm2d(6, eps=1e-05)"


def test_statistics_that_were_taken_away():
    """Without its buffers a batch norm goes by the batch, as torch's does."""
    x = torch.randn(4, 3, 2, 2)
    for training in (True, False):
        ours, theirs = nt.BatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)
        for layer in (ours, theirs):
            layer.running_mean = layer.running_var = None
        close(ours(x), theirs.double()(x.double()), "forward")
        assert ours.num_batches_tracked == theirs.num_batches_tracked


def test_the_door_opens_when_it_is_used(tmp_path):
    code = """
import sys, normkit
assert "torch" not in sys.modules
import torch
assert "normkit.torch" not in sys.modules
assert issubclass(normkit.torch.BatchNorm2d, torch.nn.BatchNorm2d)
try:
    normkit.brandnew
except AttributeError as error:
    print(error)
"""
    assert fresh.run(code, tmp_path) == "module 'normkit' has no attribute 'brandnew'"
    assert nt.__all__ == sorted(nt.__all__) and all(hasattr(nt, name) for name in nt.__all__)
