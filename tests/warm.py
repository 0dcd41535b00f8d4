"""Done once by the server that ranks of tests fork from, so that no rank does it again.

Two seconds of processor time a rank: modules that are imported when they are first needed, compiled kernels that are
read from numba's cache, and a collection of everything that was imported, which `gc.freeze` keeps out of later ones.
"""

import gc
from contextlib import suppress

import numpy as np
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
from plans import tiny_cost

from hbp.planning.planner import make_plan

with suppress(ImportError):
    import pandas  # noqa: F401  pyarrow does, where it is there

for strategy in ("hbp", "hbp-mixed", "bfd"):
    make_plan(np.array([9, 30, 12, 25, 8, 14, 28, 10, 11], np.int32), tiny_cost(2), strategy=strategy)
gc.collect()
gc.freeze()
