"""Weights that are no numbers: NaN and infinity, counted tensor by tensor while the weights pass."""

import threading

import numpy as np

from medllm_jax.errors import UserError

_BLOCK = 1 << 17  # elements that are looked at together: what is computed of them stays in the processor's cache
_LISTED = 5
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


class NonFinite:
    """What was found so far, in the threads of one conversion."""

    def __init__(self):
        self._found: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def count(self, name: str, values: np.ndarray) -> bool:
        """Counts what a part of a tensor has; has it any?"""
        nan, infinite = non_finite(values)
        if nan or infinite:
            with self._lock:
                found = self._found.setdefault(name, [0, 0])
                found[0] += nan
                found[1] += infinite
        return bool(nan or infinite)

    def check(self, where: str, dtype: np.dtype, *, stored: np.dtype) -> None:
        """UserError that names the tensors and counts their values, where any was found.

        dtype: that they were counted in. stored: that they had before.
        """
        if not self._found:
            return
        tensors = sorted(self._found)
        said = ", ".join(f"{name} ({self._said(*self._found[name])})" for name in tensors[:_LISTED])
        more = f" and {len(tensors) - _LISTED} more" if len(tensors) > _LISTED else ""
        narrower = dtype.itemsize < stored.itemsize or (dtype == np.float16 and stored != dtype)
        advice = f"{dtype.name} can't hold all of {stored.name}: give another --dtype; or " if narrower else ""
        raise UserError(
            f"{where}: weights that are no finite numbers, in {len(tensors)} tensors: {said}{more}; {advice}"
            "--allow-non-finite takes them as they are"
        )

    @staticmethod
    def _said(nan: int, infinite: int) -> str:
        return " and ".join(f"{count:,} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count)


def non_finite(values: np.ndarray) -> tuple[int, int]:
    """How many values are NaN, and how many are infinite."""
    flat = np.ascontiguousarray(values).reshape(-1)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENT[flat.dtype.name])
    mantissa = bits.dtype.type(np.iinfo(bits.dtype).max >> 1 & ~int(exponent))
    nan = infinite = 0
    for first in range(0, len(bits), _BLOCK):
        block = bits[first : first + _BLOCK]
        exponents = block & exponent
        if exponents.max() == exponent:
            odd = block[exponents == exponent]
            are_nan = int(np.count_nonzero(odd & mantissa))
            nan, infinite = nan + are_nan, infinite + len(odd) - are_nan
    return nan, infinite
