"""What a plan's samples would take on other hardware: planned anew, since the best groups change with it, and played.

The samples, model, strategy, seed, the settings that were asked for and the tokens of an optimizer step stay those of
the plan: the same training run on more or fewer devices. A step cannot hold less than one micro-step of the whole
world, though, so with very many devices its tokens grow. On the plan's own devices the plan itself comes out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hbp.cost.cluster import ClusterSpec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Group, Plan
from hbp.planning.planner import FASTEST, STRATEGIES, make_plan
from hbp.simulator import plan_cost_model


def plan_elsewhere(
    plan: Plan, gpus: int, cluster: ClusterSpec | None = None, global_batch_tokens: int | None = None
) -> Plan:
    """The plan's samples planned anew.

    Args:
        plan: says samples, model, strategy and settings; samples that it dropped stay dropped.
        gpus: world size.
        cluster: the plan's own if None.
        global_batch_tokens: tokens of an optimizer step; the plan's own if None.

    Raises:
        HbpError: nothing fits these devices, or the plan does not say how it was made.
    """
    info, own = plan.info, plan_cost_model(plan)
    if info.strategy not in STRATEGIES or own is None:
        raise HbpError(
            f"the plan (strategy {info.strategy!r}) does not say how to plan it anew; make one with `hbp plan`"
        )
    where = cluster or own.cluster
    lengths = plan.lengths[np.argsort(plan.sample_ids, kind="stable")]
    # What was left to its default follows the samples and the world. Plans of streams say only what became of it.
    asked: Mapping[str, Any] = info.settings.get("asked") or info.settings
    same = (gpus, where) == (info.world_size, own.cluster)
    try:
        static = Group(**asked["static"]) if same and asked.get("static") else None
        options = {name: asked.get(name) for name in ("max_length", "short_steps", "windows")}
        options["order"] = str(info.settings.get("order", FASTEST))
    except (AttributeError, TypeError) as error:
        raise HbpError(f"the plan's settings are damaged ({error}); make the plan again with `hbp plan`") from None
    return make_plan(
        lengths,
        CostModel(own.model, where, gpus),
        strategy=info.strategy,
        seed=info.seed,
        global_batch_tokens=global_batch_tokens or (asked if same else info.settings).get("global_batch_tokens"),
        static=static,
        **options,
    )
