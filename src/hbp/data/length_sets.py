"""Lengths that mirror published data sets, for planning without data: benchmarks, tests, "what if".

- ``short-*`` and ``mix-*``: lognormal with median 500 and sigma 1.0, clipped to 16..8192; ``mix`` replaces 5 % of the
  samples by uniform 8192..131072; both clipped to the capacity in their name.
- ``tulu3-longcite``: Tulu3 as lognormal with median 400 and sigma 1.1, clipped to 16..32768 (mean about 730, tail to
  32K), and 0.2 % of LongCite as uniform 2048..131072 (about 2,000 of a million, as in the paper).
- ``openhermes-longcite``: OpenHermes as lognormal with median 300 and sigma 0.8, clipped to 16..4096, and 0.2 %
  LongCite.
- ``tulu3-longwriter``: Tulu3, and 0.6 % of LongWriter as lognormal with median 6000 and sigma 0.7, clipped to 131072.
- ``mix-1m``: the short set with 2 % log-uniform 8192..1048576.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError

Float = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Float]


def _lognormal(median: float, sigma: float, longest: int) -> Draw:
    return lambda rng, n: np.clip(rng.lognormal(np.log(median), sigma, n), 16, longest)


def _uniform(low: int, high: int) -> Draw:
    return lambda rng, n: rng.uniform(low, high + 1, n)


def _log_uniform(low: int, high: int) -> Draw:
    return lambda rng, n: np.exp(rng.uniform(np.log(low), np.log(high), n))


_SHORT = _lognormal(500, 1.0, 8192)
_TULU3 = _lognormal(400, 1.1, 32768)
_LONGCITE = _uniform(2048, 131072)

LENGTH_SETS: Mapping[str, tuple[Draw, Draw, float, int]] = {
    # short samples, long samples, share of long ones, longest
    "short-32k": (_SHORT, _SHORT, 0.0, 32768),
    "short-128k": (_SHORT, _SHORT, 0.0, 131072),
    "mix-32k": (_SHORT, _uniform(8192, 131072), 0.05, 32768),
    "mix-128k": (_SHORT, _uniform(8192, 131072), 0.05, 131072),
    "tulu3-longcite": (_TULU3, _LONGCITE, 0.002, 131072),
    "openhermes-longcite": (_lognormal(300, 0.8, 4096), _LONGCITE, 0.002, 131072),
    "tulu3-longwriter": (_TULU3, _lognormal(6000, 0.7, 131072), 0.006, 131072),
    "mix-1m": (_SHORT, _log_uniform(8192, 1048576), 0.02, 1048576),
}


def generate(name: str, n: int, seed: int) -> npt.NDArray[np.int32]:
    """`n` lengths of a set, int32 ``[n]``; the same for the same seed.

    Raises:
        HbpError: no set by that name.
    """
    if name not in LENGTH_SETS:
        raise HbpError(f"no length set {name!r}: give one of {', '.join(LENGTH_SETS)}")
    short, long, share, longest = LENGTH_SETS[name]
    rng = np.random.default_rng(seed)
    lengths = short(rng, n)
    picked = rng.random(n) < share
    lengths[picked] = long(rng, int(picked.sum()))
    return np.minimum(lengths, longest).astype(np.int32)
