"""What no fused kernel serves, as data: where kernels are required, the suite expects each refusal by its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plain:
    """Tests that are refused: of a masked case as it is, or those of these names (all their parameters, or one)."""

    reason: str
    tests: tuple[str, ...] = ()
    masked: bool = False

    def covers(self, name: str, case: Any | None) -> bool:
        """Whether the test of this name, with this case if it has one, is one of them."""
        masked = self.masked and case is not None and case.masked and not _of(NATIVE, name)
        # What is compiled is made of plain operations in any mode, but in JAX, where all is.
        compiled = name.startswith("test_compiled") and "[jax-" not in name
        return (masked and not compiled) or _of(self.tests, name)


def _of(tests: tuple[str, ...], name: str) -> bool:
    return any(name == test or name.startswith(f"{test}[") for test in tests)


#: Tests that have cases and run no kernel: of native layers alone, and of the oracle.
NATIVE = ("test_other_dtypes_agree", "test_closed_form_is_the_derivative")

PLAIN = (
    Plain(
        "a mask was given",
        ("test_mask", "test_a_padded_batch_is_its_samples"),
        masked=True,
    ),
    Plain("x is not of native floating-point numbers in host memory", ("test_meta_device",)),
)


def reason(name: str, case: Any | None) -> str | None:
    """Why no kernel serves a test; ``None`` where one does."""
    return next((row.reason for row in PLAIN if row.covers(name, case)), None)
