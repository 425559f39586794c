"""As much of XLA's runtime as a handler of its foreign function interface sees, for the tests to be in its place."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from normkit.backends import kernels


class Fields(ctypes.Structure):
    """A structure of the interface: its size first, then extensions, then what it is for."""

    def __init__(self, *values):
        super().__init__(ctypes.sizeof(self), None, *values)


def _structure(name, **fields):
    head = {"size": ctypes.c_size_t, "extensions": ctypes.c_void_p}
    return type(name, (Fields,), {"_fields_": list({**head, **fields}.items())})


_P, _I, _N = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS = ("create_error", "message", "destroy_error", *(f"other{i}" for i in range(8)), "schedule", "threads")
Version = _structure("Version", major=_I, minor=_I)
Buffer = _structure("Buffer", type=_I, data=_P, rank=_N, shape=_P)
List = _structure("List", count=_N, kinds=_P, items=_P)
Attributes = _structure("Attributes", count=_N, kinds=_P, names=_P, values=_P)
Api = _structure("Api", version=Version, internal=_P, **dict.fromkeys(_FUNCTIONS, _P))
Frame = _structure("Frame", api=_P, context=_P, stage=_I, operands=List, results=List, attributes=Attributes)
Error = _structure("Error", message=ctypes.c_char_p, code=_I)
Schedule = _structure("Schedule", context=_P, task=_P, data=_P)
Threads = _structure("Threads", context=_P, threads=ctypes.POINTER(_N))
_REFUSED, _EXECUTE = 0xBAD, 3


def pointer(capsule) -> int:
    """What a capsule without a name points to."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _P, (ctypes.py_object, ctypes.c_char_p)
    return get(capsule, None)


class Runtime:
    """Says what XLA would not: other versions, no threads, late ones; or has its threads in sight of a sanitizer."""

    def __init__(self, count: int = 4, refuses: str = "", prompt: bool = False) -> None:
        self.errors: list[str] = []
        self.destroyed = 0
        self.late: list = []
        self.threads: list[threading.Thread] = []
        self._alive: list = []

        def create_error(given):
            self.errors.append(ctypes.cast(given, ctypes.POINTER(Error)).contents.message.decode())
            return _REFUSED

        def destroy_error(_):
            self.destroyed += 1

        def schedule(given):
            asked = ctypes.cast(given, ctypes.POINTER(Schedule)).contents
            if refuses == "schedule":
                return _REFUSED
            task, data = ctypes.CFUNCTYPE(None, _P)(asked.task), asked.data
            if prompt:
                self.threads.append(threading.Thread(target=task, args=(data,)))
                self.threads[-1].start()
            else:
                self.late.append(lambda: task(data))
            return None

        def threads(given):
            ctypes.cast(given, ctypes.POINTER(Threads)).contents.threads[0] = count
            return _REFUSED if refuses == "threads" else None

        self.api = Api(Version(0, 3))
        for function in (create_error, destroy_error, schedule, threads):
            pointer = self._kept(ctypes.CFUNCTYPE(_P, _P)(function))
            setattr(self.api, function.__name__, ctypes.cast(pointer, _P).value)

    def _kept(self, a):
        self._alive.append(a)
        return a

    def _row(self, kind, values):
        return ctypes.addressof(self._kept((kind * len(values))(*values)))

    def _list(self, arrays):
        self._alive += arrays
        buffers = [self._kept(Buffer(11, a.ctypes.data, a.ndim, self._row(_N, a.shape))) for a in arrays]
        return List(
            len(buffers), self._row(_I, [1] * len(buffers)), self._row(_P, list(map(ctypes.addressof, buffers)))
        )

    def frame(self, operands, results, attributes):
        """A call of float32 arrays."""
        names, values = [], []
        for name, value in sorted(attributes.items()):
            cell = self._kept(np.array([value]))
            text = self._kept(ctypes.create_string_buffer(name.encode()))
            names.append(self._row(ctypes.c_size_t, [ctypes.addressof(text), len(name)]))
            values.append(self._row(ctypes.c_size_t, [5 if cell.dtype.kind == "i" else 12, cell.ctypes.data]))
        given = Attributes(len(names), self._row(_I, [3] * len(names)), self._row(_P, names), self._row(_P, values))
        api = ctypes.addressof(self.api)
        return Frame(api, None, _EXECUTE, self._list(operands), self._list(results), given)

    def run(self, frame):
        """Whether the handler had nothing to say against it."""
        handler = ctypes.CFUNCTYPE(_P, _P)(pointer(kernels.xla_handler()))
        return handler(ctypes.addressof(frame)) is None
