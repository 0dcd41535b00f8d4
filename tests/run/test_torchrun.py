"""Jobs as users start, stop and lose them: torchrun on one and two nodes, signals, ranks that raise or are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from jobs import ranks_of, start, steps_of, write_job

from hbp.train.checkpoint import list_checkpoints, read_position

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Python runs this at its start. It makes steps slow, so that there is time to interfere, or one rank's third one fail.
INTERFERE = """
import atexit, os, sys, time
if os.environ.get("TEST_ABORT") and "RANK" in os.environ:
    atexit.register(os.abort)  # registered before all else, so called after it
if os.environ.get("RANK") and "hbp" in sys.orig_argv:
    import hbp.train.measure.micro_batch  # takes the plain one: trials of memory are left alone
    import hbp.train.loop as loop
    plain, calls = loop.forward_backward, 0
    def forward_backward(model, batch, scale):
        global calls
        calls += 1
        time.sleep(float(os.environ.get("TEST_SLOW", "0")))
        if os.environ["RANK"] == "1" and str(calls) == os.environ.get("TEST_FAIL_AT"):
            raise RuntimeError("the device\\nfell off the bus")
        return plain(model, batch, scale)
    loop.forward_backward = forward_backward

    if os.environ.get("TEST_SLOW_SAVE"):
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        write = FileSystemWriter.write_data
        def write_data(*arguments):
            time.sleep(float(os.environ["TEST_SLOW_SAVE"]))
            return write(*arguments)
        FileSystemWriter.write_data = write_data

    stuck = os.environ.get("TEST_STUCK") if os.environ["RANK"] == "1" else None
    if stuck == "data":  # from the sixth micro-batch on; the heartbeat's thread lives
        batches = loop.micro_batches
        def micro_batches(*arguments):
            for number, batch in enumerate(batches(*arguments)):
                time.sleep(600 if number == 5 else 0)
                yield batch
        loop.micro_batches = micro_batches
    if stuck == "loading":
        import hbp.run.engine
        def load_sharded(*arguments, **options):
            open(os.environ["TEST_MARK"], "w").close()
            time.sleep(600)
        hbp.run.engine.load_sharded = load_sharded
    if os.environ.get("TEST_STUCK"):
        import hbp.train.watch as watch
        watch.watch_others.__wrapped__.__defaults__ = (0.5, 15.0)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = write_job(tmp_path_factory.mktemp("torchrun"), train={"export": False, "save_steps": None})
    (folder / "sitecustomize.py").write_text(INTERFERE)
    return folder


@pytest.fixture
def interfering(job, monkeypatch):
    """Sets what the processes that a test starts do."""
    monkeypatch.setenv("PYTHONPATH", f"{job}:{os.environ.get('PYTHONPATH', '')}")
    return monkeypatch.setenv


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_one_node(job):
    run = f"run_dir={job / 'one'}"
    running = start(job, run, "--json", arguments=(*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "hbp"))
    out, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    (result,) = json.loads(out)["results"]
    assert result["world_size"] == 2
    assert result["steps"] == len(steps_of(job / "one" / "hbp"))


def nodes(job: Path, run: str) -> list:
    """Two launchers of one process, which meet as those of two machines do."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "job")
    launch = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *meeting, "-m", "hbp")
    return [start(job, f"run_dir={job / run}", "--json", arguments=launch) for _ in range(2)]


def test_two_nodes(job):
    outs = [(launcher.communicate(timeout=120), launcher.returncode) for launcher in nodes(job, "two")]
    assert [code for _, code in outs] == [0, 0], outs
    (printed,) = [out for (out, _), _ in outs if out]  # rank 0 alone prints
    assert json.loads(printed)["results"][0]["world_size"] == 2


def test_a_rank_of_another_node_is_killed(job, interfering):
    interfering("TEST_SLOW", "0.1")
    launchers = nodes(job, "lost")
    victim = ranks_of(launchers[1], 1)[0]
    wait_for(lambda: len(steps_of(job / "lost" / "hbp")) >= 2)
    os.kill(victim, signal.SIGKILL)
    outs = [launcher.communicate(timeout=60) for launcher in launchers]
    assert all(launcher.returncode != 0 for launcher in launchers)
    assert any("hbp: error: rank" in said and "in step " in said for _, said in outs)


@pytest.mark.parametrize("launcher", ["hbp train", "torchrun"])
def test_a_rank_is_killed_and_the_others_stop_within_a_minute(job, interfering, launcher):
    """In the middle of a step, by a signal that it cannot answer."""
    interfering("TEST_SLOW", "0.1")
    run = job / f"killed by {launcher}"
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "hbp")
    running = start(job, f"run_dir={run}", arguments=torchrun if launcher == "torchrun" else ())
    ranks = ranks_of(running, 2)
    wait_for(lambda: len(steps_of(run / "hbp")) >= 2)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    if launcher == "hbp train":
        (error,) = [line for line in said.splitlines() if line.startswith("hbp: error: ")]
        assert error.startswith("hbp: error: rank 1 was ended by SIGKILL and the others were stopped")
    else:
        assert "exitcode  : -9" in said  # torchrun names the rank that was killed


def test_a_rank_that_is_killed_during_a_save_is_named_as_killed(job, interfering):
    """And not as a save that failed, which is what the others see."""
    interfering("TEST_SLOW_SAVE", "3")
    run = job / "killed-in-save"
    running = start(job, f"run_dir={run}", "train.save_steps=2")
    ranks = ranks_of(running, 2)
    wait_for(lambda: any((run / "hbp" / "checkpoints").glob("*.partial")))
    os.kill(ranks[1], signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 1, said
    (error,) = [line for line in said.splitlines() if line.startswith("hbp: error: ")]
    assert error.startswith("hbp: error: rank 1 was ended by SIGKILL and the others were stopped")


def test_a_rank_that_raises_names_itself_the_step_and_the_pack(job, interfering):
    interfering("TEST_FAIL_AT", "3")
    running = start(job, f"run_dir={job / 'raised'}")
    ranks = ranks_of(running, 2)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("hbp: error: ")]
    assert error.startswith("hbp: error: rank 1 failed in step ")
    assert "(samples " in error
    assert error.endswith("RuntimeError: the device fell off the bus")
    assert "in forward_backward" in said  # where it happened, for us
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"),
        (signal.SIGUSR1, "rank"),
        (signal.SIGHUP, "launcher"),  # a terminal that is gone
        (signal.SIGINT, "all"),  # Ctrl-C
    ],
)
def test_a_signal_saves_and_exits(job, interfering, number, to):
    """Case run-signals; what the interpreter does at its end, in which threads of torch may abort, is not reached."""
    interfering("TEST_SLOW", "0.1")
    interfering("TEST_ABORT", "1")
    run = job / f"stopped-{number}"
    running = start(job, f"run_dir={run}")
    ranks = ranks_of(running, 2)
    wait_for(lambda: len(steps_of(run / "hbp")) >= 2)
    assert listening_on([running.pid, *ranks]) == {"0100007F"}  # 127.0.0.1: nobody else is heard
    for process in {"launcher": [running.pid], "rank": ranks[1:], "all": [running.pid, *ranks]}[to]:
        os.kill(process, number)
    _, said = running.communicate(timeout=120)
    stopped_and_saved(running.returncode, said, number, run)


def listening_on(pids: list[int]) -> set[str]:
    """Addresses that these processes' sockets wait for connections on, as the kernel writes them."""
    own = {str(file.readlink()) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def stopped_and_saved(code: int, said: str, number: int, run: Path) -> None:
    assert code == 85, said
    assert f"hbp: {signal.Signals(number).name}: stopped after step " in said.splitlines()[-1]
    assert "Traceback" not in said
    (checkpoint,) = list_checkpoints(run / "hbp" / "checkpoints")
    assert read_position(checkpoint).run_step == len(steps_of(run / "hbp"))


OURS = (sys.executable, "-m", "hbp", "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "hbp")


def test_a_signal_as_slurm_sends_it(job, interfering):
    """Case run-slurm-usr1: SIGUSR1 to the launcher and its ranks at once, in the middle of a step."""
    interfering("TEST_SLOW", "0.5")
    run = job / "slurm"
    running = start(job, f"run_dir={run}", arguments=OURS)
    ranks = ranks_of(running, 2)
    wait_for(lambda: len(steps_of(run / "hbp")) >= 2)
    assert listening_on([running.pid, *ranks]) == {"0100007F"}  # torchrun itself is heard on every network
    for process in (running.pid, *ranks):
        os.kill(process, signal.SIGUSR1)
    _, said = running.communicate(timeout=120)
    stopped_and_saved(running.returncode, said, signal.SIGUSR1, run)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_under_our_torchrun_a_run_ends_with_the_codes_that_it_has_alone(job, interfering):
    """Case run-torchrun-exit: to be continued, finished, wrong input."""
    interfering("TEST_SLOW", "0.05")
    run = f"run_dir={job / 'codes'}"
    running = start(job, run, "train.max_steps=3", "--json", arguments=OURS)
    out, said = running.communicate(timeout=120)
    assert (running.returncode, out) == (85, ""), said
    assert "hbp: train.max_steps=3: stopped after step 3, " in said.splitlines()[-1]
    running = start(job, run, "--json", arguments=OURS)
    out, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert json.loads(out)["results"][0]["steps"] == len(steps_of(job / "codes" / "hbp")) > 3
    running = start(job, f"run_dir={job / 'wrong'}", "model.path=nowhere", arguments=OURS)
    out, said = running.communicate(timeout=120)
    assert running.returncode == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("hbp: error: ")]
    assert "nowhere" in error


def test_plain_torchrun_tells_stopped_from_finished(job, interfering):
    """It makes 1 of every code that is not 0, and names ours."""
    interfering("TEST_SLOW", "0.05")
    arguments = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "hbp")
    running = start(job, f"run_dir={job / 'plain'}", "train.max_steps=3", arguments=arguments)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "exitcode  : 85" in said


def test_a_rank_that_hangs_while_its_heartbeat_lives_is_named(job, interfering):
    interfering("TEST_STUCK", "data")
    running = start(job, f"run_dir={job / 'stuck'}", "train.hang_minutes=0.05")
    _, said = running.communicate(timeout=120)
    assert running.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("hbp: error: ")]
    assert error.startswith("hbp: error: rank 1 hangs in step ")


def test_a_rank_of_another_node_is_lost_before_the_first_step(job, interfering):
    """While the model is loaded: its machine says nothing any more, and no connection ends."""
    interfering("TEST_STUCK", "loading")
    interfering("TEST_MARK", str(job / "loads"))
    launchers = nodes(job, "lost-early")
    ranks = [ranks_of(launcher, 1)[0] for launcher in launchers]
    wait_for((job / "loads").exists)
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
    second = 1 if b"RANK=1" in environments[1] else 0
    os.kill(ranks[second], signal.SIGSTOP)
    _, said = launchers[1 - second].communicate(timeout=60)
    os.kill(ranks[second], signal.SIGKILL)
    launchers[second].communicate(timeout=60)
    assert launchers[1 - second].returncode != 0
    assert "rank 1 has not been heard of for 15 s" in said
