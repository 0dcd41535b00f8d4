"""Hierarchical Balance Packing: plan and train mixed-length fine-tuning whose ranks finish together.

The library's names, each fetched from its module when it is first asked for, so that ``import hbp`` costs nothing and
planning never imports torch (docs/library.md has an example of each):

- planning: :class:`CostModel`, :func:`make_plan`, :class:`Plan`, :func:`simulate`, :func:`lower_bound`,
  :class:`StreamPlanner`; :func:`describe_model`, which alone needs transformers, for families that nothing here knows;
- training: :func:`steps`, :func:`make_mesh`, :func:`register_attention`, :func:`set_gc_layers`, :func:`open_store`;
- wrong input: :class:`HbpError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbp.cost.predict import CostModel as CostModel
    from hbp.data.store import open_store as open_store
    from hbp.errors import HbpError as HbpError
    from hbp.parallel.mesh import make_mesh as make_mesh
    from hbp.parallel.ulysses import register_attention as register_attention
    from hbp.plan import Plan as Plan
    from hbp.planning.lower_bound import lower_bound as lower_bound
    from hbp.planning.mixed.stream import StreamPlanner as StreamPlanner
    from hbp.planning.planner import make_plan as make_plan
    from hbp.simulator import simulate as simulate
    from hbp.train.batch import steps as steps
    from hbp.train.check.describe import describe_model as describe_model
    from hbp.train.model import set_gc_layers as set_gc_layers

__version__ = "0.1.0"

_HOMES = {
    "CostModel": "hbp.cost.predict",
    "HbpError": "hbp.errors",
    "Plan": "hbp.plan",
    "StreamPlanner": "hbp.planning.mixed.stream",
    "describe_model": "hbp.train.check.describe",
    "lower_bound": "hbp.planning.lower_bound",
    "make_mesh": "hbp.parallel.mesh",
    "make_plan": "hbp.planning.planner",
    "open_store": "hbp.data.store",
    "register_attention": "hbp.parallel.ulysses",
    "set_gc_layers": "hbp.train.model",
    "simulate": "hbp.simulator",
    "steps": "hbp.train.batch",
}
"""The module of each name. No module here may have a name of the library, or importing it would hide that name."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
