"""A step's record, every field of it filled. No torch."""

from hbp.run_log import StepRecord

RECORD = StepRecord(
    step=3,
    loss=2.5,
    grad_norm=0.5,
    lr=1e-3,
    tokens=1000,
    loss_tokens=800,
    started_s=1.0,
    seconds=0.5,
    tokens_per_s=2000.0,
    group="4096/SP2/GC1 + 512/SP1/GC0",
    skew=0.25,
    slowest_rank=0,
    mean_wall_s=0.4,
    mean_busy_s=0.35,
    memory_bytes=2**30,
    rank_wall_s=[[0.4], [0.4]],
    rank_busy_s=[[0.4], [0.3]],
    tflops=1.5,
    mfu=0.4,
)
