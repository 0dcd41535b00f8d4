"""Processes and devices: under torchrun as it says, alone by local processes through torch's launcher.

Signals ask a run to save and end: SIGTERM from a scheduler or a user, SIGUSR1 from Slurm before its limit, SIGINT from
a keyboard, SIGHUP from a terminal that is gone. The handler only notes the signal (:func:`stop_signals`). Every rank
reports what it has received with the numbers that are gathered at the end of each step anyway, so that all ranks learn
of it at the same step, whichever of them got it, at no cost.

torchrun ends with 1 whatever its ranks end with. `hbp torchrun` (:func:`launch_torchrun`) is torchrun, all its options
included, with our exit codes, and with SIGUSR1 among the signals that it hands on.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from hbp.disk import is_disk_fault
from hbp.errors import ERROR_FILE, HbpError, OutOfMemory, RankFailed, Stopped, report_to_parent, reported_by_rank
from hbp.progress import QUIET, say
from hbp.train.watch import silence_is_fine

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


# glibc gives large blocks back to the kernel at once and pays for their pages again at the next micro-step. Keeping
# them is what CUDA's caching allocator does; without it every CPU measurement is mostly page faults.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    **QUIET,
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CUDA_ENVIRONMENT = {
    # Packs of other sizes from micro-step to micro-step leave holes in segments of fixed size.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that a launcher hands on to its ranks."""
RANKS_PRINT = "HBP_RANKS_PRINT"
"""Environment variable: rank 0 prints the results, though a launcher of ours hears its errors."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where all ranks are on this machine, what they say to each other in collectives is said on no network."""
REPLANS = 3
"""How often a job starts its ranks again, since a step ran out of memory and what is left is planned for less."""
MEETS_HERE, LOOPBACK_ADDRESS = "hbp-loopback", "127.0.0.1"
"""How ranks of one machine find each other, where nobody else can."""
SAVE_TIMEOUT_S = 600
"""How long ranks may take to end a step and save after a signal, before they are killed."""
NOTHING_NEW = "stopped before there was anything new to save; the same command goes on"
PREPARE_TIMEOUT = timedelta(days=1)
"""Ranks wait this long for rank 0 to prepare data and plan, where a collective's usual limit is minutes."""


def under_torchrun() -> bool:
    """Whether this process is one rank of a started job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_local(arguments: Sequence[str], processes: int) -> None:
    """Run ``python -m hbp`` with these arguments in local processes and wait for them.

    Raises:
        HbpError: a rank ended with wrong input; its message.
        RankFailed: a rank failed otherwise; names the rank.
        Stopped: a signal ended the run.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _only_here()

    def launch(scratch: str) -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend=MEETS_HERE,
            local_addr=LOOPBACK_ADDRESS,
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=scratch, redirects=Std.NONE),
            signals_to_handle=handed_on(),
        )
        elastic_launch(config, sys.executable)("-m", "hbp", *arguments)

    again_with_less_memory(launch)


def _only_here() -> None:
    """Have ranks meet and talk on this machine alone."""
    if sys.platform == "linux":
        for name, value in LOOPBACK.items():
            os.environ.setdefault(name, value)
    meet_on_loopback()


def handed_on(others: str = HANDED_ON) -> str:
    """Signals that the launcher hands on, and `others`; under nohup, which ignores SIGHUP, that stays ignored."""
    names = dict.fromkeys([*others.split(","), *HANDED_ON.split(",")])
    return ",".join(name for name in names if name != "SIGHUP" or not hangup_ignored())


def hangup_ignored() -> bool:
    """Whether whoever started this process wants it to outlive its terminal, as nohup does."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def meet_on_loopback() -> None:
    """Make :data:`MEETS_HERE` known to torch's launcher; its own ways listen on every network of the machine."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Here(StaticTCPRendezvous):
        """Static, in that this one launcher is all there is; its store, which ranks use too, listens here alone."""

        def get_backend(self) -> str:
            return MEETS_HERE

        def next_rendezvous(self) -> RendezvousInfo:
            if self._store is None:
                listening = socket.create_server((self.master_addr, 0))
                self.master_port = listening.getsockname()[1]
                self._store = TCPStore(
                    self.master_addr,
                    self.master_port,
                    self.world_size,
                    is_master=True,
                    timeout=self.timeout,
                    multi_tenant=True,
                    master_listen_fd=listening.detach(),
                )
            meet = RendezvousStoreInfo(self.master_addr, self.master_port)
            return RendezvousInfo(PrefixStore(self.run_id, self._store), self.rank, self.world_size, meet)

    def here(parameters: RendezvousParameters) -> RendezvousHandler:
        return Here(LOOPBACK_ADDRESS, 0, 0, 1, parameters.run_id, SAVE_TIMEOUT_S)

    with suppress(ValueError):  # known already
        rendezvous_handler_registry.register(MEETS_HERE, here)


def launch_torchrun(arguments: Sequence[str]) -> None:
    """Run torchrun with these arguments in this process; what its ranks end with comes out as of :func:`launch_local`.

    Raises:
        HbpError, RankFailed, Stopped: as there.
    """
    from torch.distributed.run import parse_args, run

    given = parse_args(list(arguments))
    if hasattr(given, "signals_to_handle"):
        given.signals_to_handle = handed_on(given.signals_to_handle)
    os.environ[RANKS_PRINT] = "1"
    alone = str(given.nnodes).rpartition(":")[2] == "1"  # launchers of several nodes would have to agree
    asked = given.rdzv_backend != "static" or given.rdzv_endpoint or given.master_port is not None
    if alone and (given.standalone or not asked) and not given.max_restarts:  # a store here serves one start alone
        _only_here()
        given.standalone, given.rdzv_backend, given.rdzv_id = False, MEETS_HERE, uuid.uuid4().hex
        given.local_addr = given.local_addr or LOOPBACK_ADDRESS
    again_with_less_memory(lambda scratch: run(given), REPLANS if alone else 0)


def again_with_less_memory(launch: Callable[[str], object], times: int = REPLANS) -> None:
    """Start ranks, and start them again where a step of theirs ran out of memory; the run then counts on less.

    Args:
        launch: starts them and waits for them, given a folder to use meanwhile.
        times: that they are started again at most.

    Raises:
        HbpError, RankFailed, Stopped: what the ranks ended with.
    """
    for time_again in range(times + 1):
        try:
            with _ranks_report() as scratch:
                launch(scratch)
            return
        except OutOfMemory as error:
            if time_again == times:
                said = f"; that was tried {times} times in this job: lower cluster.memory_gib" if times else ""
                raise RankFailed(f"{error}{said}") from None
            say(f"{error}; starting the ranks again ({time_again + 1} of {times} times in this job)")


@contextmanager
def _ranks_report() -> Iterator[str]:
    """A folder for the launcher that the body runs; what the ranks reported, or how they ended, is raised from here."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name, value in (CUDA_ENVIRONMENT if torch.cuda.is_available() else CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    # What the launcher logs of a failed rank, we say in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_TIMEOUT_S))
    with TemporaryDirectory() as scratch:
        os.environ[ERROR_FILE] = str(Path(scratch) / "error")
        try:
            yield scratch
        except ChildFailedError as failed:
            raise _why(failed) from None
        except SignalException as received:
            name = signal.Signals(received.sigval).name
            raise reported_by_rank() or Stopped(f"{name}: {NOTHING_NEW}") from None
        else:
            if (reported := reported_by_rank()) is not None:
                raise reported
        finally:
            del os.environ[ERROR_FILE]


def _why(failed: ChildFailedError) -> Exception:
    """What ended a job, from what its ranks reported and how they ended."""
    reported = reported_by_rank()
    # Before what others reported: a save or a collective that broke, since that rank was gone.
    # The launcher itself ends the ranks that are left, by SIGTERM.
    killed = {r: f for r, f in failed.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if killed:
        rank, failure = min(killed.items(), key=lambda item: item[1].timestamp)
        name = failure.signal_name()
        hint = "; the machine may be out of memory: lower cluster.memory_gib" if name == "SIGKILL" else ""
        seen = f" ({reported})" if reported else ""
        return RankFailed(f"rank {rank} was ended by {name} and the others were stopped{hint}{seen}")
    if reported:
        return reported
    # A rank that was ended by SIGTERM before it could note it.
    if all(f.exitcode == -signal.SIGTERM for f in failed.failures.values()):
        return Stopped(f"SIGTERM: {NOTHING_NEW}")
    rank, failure = failed.get_first_failure()
    return RankFailed(f"rank {rank} failed first (exit code {failure.exitcode}); its own output is above")


def reports_here() -> bool:
    """Whether this rank prints the results: rank 0, unless the `hbp` that started it will."""
    return dist.get_rank() == 0 and (ERROR_FILE not in os.environ or RANKS_PRINT in os.environ)


def raise_open_files() -> None:
    """Allow as many open files as the system lets us: gloo opens a socket to each other rank in every group."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems refuse their own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def process_group(meet_minutes: float | None = None) -> Iterator[torch.device]:
    """Join the job's processes; yields this rank's device.

    Args:
        meet_minutes: how long to wait for the others; None: as long as torch's collectives do.

    Raises:
        RankFailed: not all ranks came. Without a launcher they meet in rank 0, and whether that one is late or dead
            the others cannot tell.
    """
    raise_open_files()
    for name, value in CUDA_ENVIRONMENT.items():  # read when the allocator first allocates
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        _join("cuda:nccl,cpu:gloo", meet_minutes, device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        _join("gloo", meet_minutes)
    try:
        yield device
    except Exception as error:  # said before the others see that this rank is gone, and fail for that
        known = isinstance(error, HbpError | RankFailed | Stopped) and not is_disk_fault(error)
        message = f"rank {dist.get_rank()} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        report_to_parent(error if known else RankFailed(str(error) if isinstance(error, HbpError) else message))
        raise
    finally:
        dist.destroy_process_group()


def _join(backend: str, meet_minutes: float | None, device: torch.device | None = None) -> None:
    """torch's own way through the environment, but that meeting has a limit apart from that of collectives."""
    within = dist.default_pg_timeout if meet_minutes is None else timedelta(minutes=meet_minutes)
    try:
        store, rank, world = next(rendezvous("env://", timeout=within))
        store.set_timeout(dist.default_pg_timeout)
        met = PrefixStore("default_pg", store)
        # Connecting has the limit, too: one that came may end before the others know where it listens.
        dist.init_process_group(backend, store=met, rank=rank, world_size=world, timeout=within, device_id=device)
    except (dist.DistError, RuntimeError) as error:
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankFailed(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} waited {within.total_seconds():.0f} s for the "
            f"others at {place} (train.hang_minutes): one of them has ended or cannot reach it; its own output says why"
        ) from None
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(dist.default_pg_timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(dist.default_pg_timeout)


@contextmanager
def rank_zero_first(group: dist.ProcessGroup | None = None) -> Iterator[bool]:
    """Rank 0 runs the body while the others wait, however long it takes; yields whether this is rank 0.

    Args:
        group: of all ranks, to wait in; None: a new one.

    Raises:
        HbpError: on the other ranks, rank 0's; so that all end with the same message.
        RankFailed: on the other ranks, if rank 0 failed in any other way.
    """
    own = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if group is None else None
    group = group or own
    first = dist.get_rank() == 0
    failure: list[Exception | None] = [None]
    try:
        with silence_is_fine() if first else nullcontext():  # planning may not let another thread run for minutes
            yield first
    except HbpError as error:
        failure = [RankFailed(str(error)) if is_disk_fault(error) else HbpError(str(error))]
        raise
    except BaseException as error:
        failure = [RankFailed(f"rank 0 failed ({type(error).__name__}); its own output says why")]
        raise
    finally:
        if first:
            dist.broadcast_object_list(failure, src=0, group=group)
    if not first:
        dist.broadcast_object_list(failure, src=0, group=group)
        if failure[0] is not None:
            raise failure[0]
    if own is not None:
        dist.destroy_process_group(own)


def free_memory() -> None:
    """Give back what models held that nobody refers to any more: their modules and hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether layers are compiled: as asked, or else on CUDA where what inductor needs there is installed."""
    if asked is not None:
        return asked
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    return device.type == "cuda" and compiler is not None and importlib.util.find_spec("triton") is not None


def device_name(device: torch.device) -> str:
    """For people and for profile files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} thread a process"


STARTED = time.monotonic()
"""When this process began, as near as we know."""
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
TIME_IS_UP = int(signal.SIGALRM)
"""Stands among the signals for ``train.max_minutes``; nobody sends it."""
AGAIN_S = 3.0
"""Ctrl-C reaches ranks twice, from the terminal and from their launcher; a third one later than this is meant."""


class Received:
    """The last signal that this process got, 0 for none."""

    number = 0
    interrupted: float | None = None
    """When the first SIGINT came."""

    def __call__(self) -> int:
        """The signal's number."""
        return self.number

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler.

        Raises:
            KeyboardInterrupt: somebody at a terminal will not wait for the save.
        """
        self.number, now = number, time.monotonic()
        if number == signal.SIGINT and self.interrupted is not None and now - self.interrupted > AGAIN_S:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.interrupted is None:
            self.interrupted = now


@contextmanager
def stop_signals() -> Iterator[Received]:
    """Note :data:`STOPPING` signals while the body runs instead of dying of them."""
    received = Received()
    with _handled_by(received.note, STOPPING):
        yield received


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """End the body, in which nothing is trained yet, at a signal of a scheduler.

    Raises:
        Stopped: at SIGTERM, SIGUSR1 or SIGHUP; Ctrl-C stays what it is.
    """
    received = Received()

    def end(number: int, frame: FrameType | None) -> None:
        received.number = number
        raise KeyboardInterrupt  # which nobody takes for an error of a record

    try:
        with _handled_by(end, tuple(number for number in STOPPING if number != signal.SIGINT)):
            yield
    except BaseException:
        if not received.number:
            raise
    if received.number:  # also where the body took it for something else and went on
        raise Stopped(f"{signal.Signals(received.number).name}: {NOTHING_NEW}")


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals, but for a SIGHUP that is to be ignored, handled so while the body runs."""
    numbers = [number for number in numbers if number != signal.SIGHUP or not hangup_ignored()]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
