"""Model FLOPs utilisation: the FLOPs that the model needs, over what the device could do in the same time.

Counted as PaLM's appendix B does, with the documents' own attention: forward once, backward twice, nothing for
recomputation (so that recomputing does not look like work), attention only over the pairs that the mask keeps.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from hbp.cost.model_spec import ModelSpec
from hbp.plan import Plan

FORWARD_AND_BACKWARD = 3
PEAK_BF16_FLOPS = {  # dense, from the data sheets; the longest name that matches counts
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
PROBE = 1024
PROBE_S = 0.1


def step_flops(plan: Plan, spec: ModelSpec) -> npt.NDArray[np.float64]:
    """Model FLOPs of each optimizer step, all ranks together, float64 ``[steps]``."""
    per_token = spec.linear_flops_per_token() + spec.head_flops_per_token()
    flops = plan.lengths * per_token + spec.attention_pairs(plan.lengths) * spec.attention_flops_per_pair()
    step_of_sample = np.repeat(plan.step, np.diff(plan.sample_offsets))
    sums = np.bincount(step_of_sample, weights=flops, minlength=plan.n_steps)
    return np.asarray(FORWARD_AND_BACKWARD * sums)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device: a GPU's dense bf16 figure from its data sheet, None if not known; on CPU a measured one.

    On CPU the peak is what a float32 matrix product of 1,024² reaches with this process's threads, on this machine as
    busy as it is: a yardstick, not a data sheet.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_BF16_FLOPS if key in name]
        return PEAK_BF16_FLOPS[max(known, key=len)] if known else None
    a = torch.ones(PROBE, PROBE)
    a @ a
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PROBE_S:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * PROBE**3 / best if best < float("inf") else None
