"""Tokenization on a Ray cluster: the same pieces, made into the same shards by Ray Data, for more than one machine.

The driver cuts the sources and hands windows of pieces to Ray Data; whoever gets a piece reads it, tokenizes it and
puts its shard into the store's folder, which all machines must see (as the sources' files). Which shard that is follows
from its content, so the store is the one that a single process makes. Needs ``pip install '.[ray]'``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any

from hbp.data.build import Job, Made, MapPieces, make_shard
from hbp.data.files import Piece
from hbp.errors import HbpError

PIECES_A_CPU = 8
"""In a window, which Ray Data works on as one."""
WINDOW_BYTES = 1 << 30
"""Text that a window's pieces may carry themselves (of compressed files, which only the driver reads)."""


def pieces_on(address: str) -> MapPieces:
    """What makes shards of pieces on a Ray cluster, for :func:`hbp.data.build.build_store`.

    Args:
        address: of the cluster, ``auto`` for the one that this machine belongs to, ``local`` to start one here.

    Raises:
        HbpError: Ray is not installed, or nothing answers at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise HbpError("data.ray needs Ray; install with `pip install 'hierarchical-balance-packing[ray]'`") from None
    if not ray.is_initialized():
        try:
            ray.init(None if address == "local" else address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise HbpError(f"data.ray={address}: no Ray cluster ({reason}); start one or give `local`") from None

    def map_pieces(pieces: Iterator[Piece], job: Job) -> Iterator[tuple[Piece, Made]]:
        most = PIECES_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while window := list(_window(pieces, most)):
            rows = [{"number": n, "work": pickle.dumps((piece, job))} for n, piece in enumerate(window)]
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_make).take_all()
            for row in sorted(done, key=lambda row: row["number"]):
                made = pickle.loads(row["made"])
                if isinstance(made, str):
                    raise HbpError(made)
                yield window[row["number"]], made

    return map_pieces


def _window(pieces: Iterator[Piece], most: int) -> Iterator[Piece]:
    held = 0
    for piece in islice(pieces, most):
        yield piece
        held += sum(len(line) for _, line in piece.lines)
        if held >= WINDOW_BYTES:
            return


def _make(row: dict[str, Any]) -> dict[str, Any]:
    """One piece; what is wrong with the data comes back as text, since Ray wraps what is raised."""
    piece, job = pickle.loads(row["work"])
    try:
        made: Made | str = make_shard(piece, job)
    except HbpError as error:
        made = str(error)
    return {"number": row["number"], "made": pickle.dumps(made)}
