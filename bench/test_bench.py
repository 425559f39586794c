"""The workloads for pytest-benchmark: normkit, the plain path, the native layers and a copy, a group each comparison.

``pytest --pyargs normkit.bench`` compares them; ``--benchmark-json FILE`` saves the figures with versions and device.
With ``-k "not test_time"`` nothing is timed, but every row of `normkit bench` is made once, on few samples.
"""

import contextlib
import functools

import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.bench import rows
from normkit.bench.engines import EAGER
from normkit.bench.rows import COPY, OWN, PLAIN
from normkit.bench.workloads import CALLS, DIRECTIONS, WORKLOADS
from normkit.conformance import natives
from normkit.conformance.tolerances import tolerance, units


def pytest_generate_tests(metafunc):
    """A test for each job, pass and contender."""
    engines = metafunc.config.engines
    jobs = list(rows.jobs(engines, quick=metafunc.config.getoption("quick")))
    if metafunc.function is test_time:
        found = [(j, p, name) for j in jobs for p in DIRECTIONS for name in (OWN, PLAIN, *_natives(j.engine), COPY)]
        ids = [f"{job}-{direction}-{name}".replace(" ", "-") for job, direction, name in found]
        metafunc.parametrize(("job", "direction", "contender"), found, ids=ids)
    elif metafunc.function is test_same_work:
        small = [w for w in WORKLOADS if w.small]
        jobs = list(rows.jobs(engines, workloads=small, modes=[EAGER]))
        found = [(j, name) for j in jobs for name in _natives(j.engine)]
        metafunc.parametrize(
            ("job", "contender"), found, ids=[f"{job}-{name}".replace(" ", "-") for job, name in found]
        )
    elif metafunc.function is test_row:
        shrunk = [w.shrunk() for w in WORKLOADS]
        compiled = [w for w in shrunk if w.small]  # compiling takes seconds
        jobs = list(rows.jobs(engines, workloads=shrunk, modes=[EAGER]))
        jobs += list(rows.jobs(engines, workloads=compiled, modes=["compiled"]))
        metafunc.parametrize("job", jobs, ids=[str(job).replace(" ", "-") for job in jobs])
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
    with natives.quiet(), _within(contender):
        thunk = job.engine.copy(given["x"]) if contender == COPY else _thunk(job, case, given, direction, contender)
        if contender in (OWN, PLAIN):
            _run(job.engine, thunk)
            benchmark.extra_info["path"] = rows.path(thunk, direction)
        benchmark(_run, job.engine, thunk)


def test_row(job):
    """No row of `normkit bench` is broken, and what has no native figure says why."""
    for row in rows.measure(job, seconds=0, rounds=1):
        assert not row.error
        assert row.time and row.copy_time and row.path in ("kernel", "plain", "mixed")
        assert (row.plain_time is None) is (row.path == "plain")
        assert row.native_time or row.reason
        assert (row.bare_to_floor is not None) is (row.direction in job.directions)


def test_same_work(job, contender):
    """What is timed as native is the same function as normkit's: y and the gradient of x agree."""
    case, given = _operands(job)
    limit = tolerance("native", job.dtype)
    for direction in ("forward", "both"):
        with natives.quiet():
            found = [_run(job.engine, _thunk(job, case, given, direction, name)) for name in (OWN, contender)]
        own, theirs = (job.engine.library.numpy(r[0] if isinstance(r, tuple | list) else r) for r in found)
        assert units(theirs, own, job.dtype) <= limit.units, limit.reason


@pytest.mark.parametrize("workload", CALLS, ids=lambda workload: workload.layer)
def test_call(benchmark, engine, workload):
    """Checks, plan and dispatch alone."""
    benchmark.group = f"{engine.library.name} call"
    benchmark(rows.call(engine, workload))


def _natives(engine):
    return [module.NAME for module in natives.of(engine.library.name)]


def _within(contender):
    return kernels.off() if contender == PLAIN else contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _operands(job):
    case = job.workload.case(job.engine.library)
    return case, job.engine.arrays(case, job.dtype)


def _thunk(job, case, given, direction, contender):
    modules = {OWN: nk, PLAIN: nk, **{m.NAME: m for m in natives.of(job.engine.library.name)}}
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
        pytest.skip(rows.last_line(unsupported))
