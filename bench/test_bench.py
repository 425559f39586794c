"""The workloads for pytest-benchmark: normkit, the native layers and a copy, one group for each comparison.

``pytest --pyargs normkit.bench`` compares them; ``--benchmark-json FILE`` saves the figures with versions and device.
"""

import contextlib
import functools

import pytest

import normkit as nk
from normkit.bench import table
from normkit.bench.engines import EAGER
from normkit.bench.workloads import CALLS, DIRECTIONS, WORKLOADS
from normkit.conformance import natives
from normkit.conformance.tolerances import tolerance, units


def pytest_generate_tests(metafunc):
    """A test for each job, pass and contender."""
    engines = metafunc.config.engines
    jobs = list(table.jobs(engines, quick=metafunc.config.getoption("quick")))
    if metafunc.function is test_time:
        rows = [(j, p, name) for j in jobs for p in DIRECTIONS for name in ("normkit", *_natives(j.engine), "copy")]
        ids = [f"{job}-{direction}-{name}".replace(" ", "-") for job, direction, name in rows]
        metafunc.parametrize(("job", "direction", "contender"), rows, ids=ids)
    elif metafunc.function is test_same_work:
        small = [w for w in WORKLOADS if w.small]
        jobs = list(table.jobs(engines, workloads=small, modes=[EAGER]))
        rows = [(j, name) for j in jobs for name in _natives(j.engine)]
        metafunc.parametrize(("job", "contender"), rows, ids=[f"{job}-{name}".replace(" ", "-") for job, name in rows])
    else:
        metafunc.parametrize("engine", engines, ids=lambda engine: engine.library.name)


def test_time(benchmark, job, direction, contender):
    """One pass of one contender."""
    case, given = _operands(job)
    benchmark.group = f"{job} {direction}"
    benchmark.extra_info |= {
        "library": job.engine.library.name,
        "workload": job.workload.name,
        "shape": list(case.shape),
        "dtype": job.dtype,
        "mode": job.mode,
        "direction": direction,
        "contender": contender,
    }
    job.engine.forget()
    with natives.quiet():
        thunk = job.engine.copy(given["x"]) if contender == "copy" else _thunk(job, case, given, direction, contender)
        benchmark(_run, job.engine, thunk)


def test_same_work(job, contender):
    """What is timed as native is the same function as normkit's: y and the gradient of x agree."""
    case, given = _operands(job)
    limit = tolerance("native", job.dtype)
    for direction in ("forward", "both"):
        with natives.quiet():
            found = [_run(job.engine, _thunk(job, case, given, direction, name)) for name in ("normkit", contender)]
        own, theirs = (job.engine.library.numpy(r[0] if isinstance(r, tuple | list) else r) for r in found)
        assert units(theirs, own, job.dtype) <= limit.units, limit.reason


@pytest.mark.parametrize("workload", CALLS, ids=lambda workload: workload.layer)
def test_call(benchmark, engine, workload):
    """Checks, plan and dispatch alone."""
    benchmark.group = f"{engine.library.name} call"
    benchmark(table.call(engine, workload))


def _natives(engine):
    return [module.NAME for module in natives.of(engine.library.name)]


@functools.lru_cache(maxsize=1)
def _operands(job):
    case = job.workload.case(job.engine.library)
    return case, job.engine.arrays(case, job.dtype)


def _thunk(job, case, given, direction, contender):
    modules = {"normkit": nk, **{m.NAME: m for m in natives.of(job.engine.library.name)}}
    with _skipped():
        return job.engine.thunk(case, modules[contender], given, direction, job.mode)


def _run(engine, thunk):
    with _skipped():
        result = thunk()
    engine.wait()
    return result


@contextlib.contextmanager
def _skipped():
    """What a framework does not do is skipped with the reason."""
    try:
        yield
    except natives.Unsupported as unsupported:
        pytest.skip(table.last_line(unsupported))
