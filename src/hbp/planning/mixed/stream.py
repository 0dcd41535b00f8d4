"""Plan a stream: data whose lengths are not known in advance, through a bounded buffer.

Samples are numbered as they come. When the buffer is full it is planned as one window of `hbp-mixed`
(:mod:`hbp.planning.mixed.windows`): whole micro-steps leave as a plan of their own, what fills none stays. The
invariants of a plan hold of every piece, but that a piece holds only some of the samples; of all pieces together they
hold entirely. Groups are searched on the first full buffer and stay, so a trainer knows its settings from the start;
the last one holds the longest sample that may come, and what is longer is dropped by name.

What a bounded buffer costs is balance: it holds fewer packs to choose neighbours from (``benchmarks/packing.py``
reports padding and imbalance by buffer size). Memory: the buffer, 12 bytes a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Group, Plan, hash_lengths
from hbp.planning.mixed.groups import search_groups
from hbp.planning.mixed.hbp_mixed import HBP_MIXED
from hbp.planning.mixed.windows import TooFewSamples, windowed_schedule
from hbp.planning.packs import Lengths
from hbp.planning.planner import to_plan
from hbp.planning.settings import longest_settings
from hbp.planning.strategy import Problem


def check_groups(groups: Sequence[Group], cost: CostModel, longest: int) -> None:
    """Refuse groups that samples of up to `longest` tokens cannot be planned with.

    Raises:
        HbpError: the first group that is wrong, and what it may be.
    """
    capacities = [group.capacity for group in groups]
    if capacities != sorted(set(capacities)) or not capacities or capacities[0] < 1:
        raise HbpError(f"groups of {capacities} tokens are not in order; give at least one, of rising capacity")
    if capacities[-1] < longest:
        raise HbpError(
            f"the last group holds {capacities[-1]} tokens, but samples may have {longest}; give it that capacity "
            "or a lower max_length"
        )
    for group in groups:
        if group.sp_degree not in cost.degrees():
            raise HbpError(
                f"{cost.world_size} ranks have no groups of SP degree {group.sp_degree} ({group}); "
                f"give one of {', '.join(map(str, cost.degrees()))}"
            )
        fewest, layers = cost.fewest_gc_layers(group.capacity, group.sp_degree), cost.model.n_layers
        if fewest is None or not fewest <= group.gc_layers <= layers:
            may = "a shorter group or a higher degree" if fewest is None else f"{fewest} to {layers} recomputed layers"
            raise HbpError(f"a group of {group} does not fit the model or its memory; give {may}")


class StreamPlanner:
    """Lengths in, pieces of a plan out. Its whole state is :meth:`state`, plain data."""

    def __init__(
        self,
        cost: CostModel,
        buffer_samples: int,
        max_length: int,
        *,
        groups: Sequence[Group] | None = None,
        global_batch_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Args: as for :func:`hbp.planning.planner.make_plan`; `groups` replaces the search on the first buffer.

        Raises:
            HbpError: a buffer of no samples, a `max_length` that fits memory at no setting, or groups that do not hold
                it, are out of order, or do not fit the world or the memory.
        """
        if buffer_samples < 1:
            raise HbpError(f"a buffer of {buffer_samples} samples holds none; give at least 1")
        longest_settings(cost, np.array([max_length]), max_length)
        if groups is not None:
            check_groups(groups, cost, max_length)
        self.cost, self.buffer_samples = cost, buffer_samples
        self.groups = None if groups is None else tuple(groups)
        self.max_length, self.global_batch_tokens, self.seed = max_length, global_batch_tokens, seed
        self.ids = np.zeros(0, np.int64)
        self.lengths = np.zeros(0, np.int32)
        self.too_long: list[tuple[int, int]] = []
        """Id and length of samples dropped since the last rows."""
        self.next_id = self.next_step = self.planned = 0

    def add(self, lengths: Lengths) -> Iterator[Plan]:
        """Take the next samples' lengths, tokens; yields the rows of each full buffer.

        A piece is a plan of its own, to be saved and trained on as any other: its steps run from 0
        (``info.settings["stream"]`` says how many came before it), its ``sample_ids`` number the samples of the stream
        from 0, and its ``info`` describes the piece alone, samples too long to pack listed under ``dropped``.

        Raises:
            HbpError: a length below 1.
        """
        array = np.asarray(lengths, np.int32)
        if len(array) and int(array.min()) < 1:
            where = self.next_id + int(array.argmin())
            raise HbpError(f"sample {where} has {int(array.min())} tokens; every length must be 1 or more")
        while len(array):
            room = self.buffer_samples - len(self.ids)
            now, array = array[:room], array[room:]
            ids, fits = np.arange(self.next_id, self.next_id + len(now)), now <= self.max_length
            self.too_long += zip(ids[~fits].tolist(), now[~fits].tolist(), strict=True)
            self.ids = np.concatenate([self.ids, ids[fits]])
            self.lengths = np.concatenate([self.lengths, now[fits]])
            self.next_id += len(now)
            if len(self.ids) >= self.buffer_samples:
                yield self._plan(to_the_end=False)

    def finish(self) -> Plan | None:
        """The rows of everything that is left; None if nothing is (:attr:`too_long` may still name samples)."""
        return self._plan(to_the_end=True) if len(self.ids) else None

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain data (JSON can hold it)."""
        return {
            "groups": None if self.groups is None else [[g.capacity, g.sp_degree, g.gc_layers] for g in self.groups],
            "buffer_samples": self.buffer_samples,
            "max_length": self.max_length,
            "global_batch_tokens": self.global_batch_tokens,
            "seed": self.seed,
            "ids": self.ids.tolist(),
            "lengths": self.lengths.tolist(),
            "too_long": [list(sample) for sample in self.too_long],
            "next_id": self.next_id,
            "next_step": self.next_step,
            "planned": self.planned,
        }

    @classmethod
    def restore(cls, cost: CostModel, state: Mapping[str, Any]) -> StreamPlanner:
        """A planner that goes on from :meth:`state`, and yields what the first one would have.

        Raises:
            HbpError: keys are missing or make no sense.
        """
        try:
            groups = None if state["groups"] is None else [Group(*map(int, group)) for group in state["groups"]]
            planner = cls(
                cost,
                int(state["buffer_samples"]),
                int(state["max_length"]),
                groups=groups,
                global_batch_tokens=state["global_batch_tokens"],
                seed=int(state["seed"]),
            )
            planner.ids = np.array(state["ids"], np.int64)
            planner.lengths = np.array(state["lengths"], np.int32)
            planner.too_long = [(int(i), int(n)) for i, n in state["too_long"]]
            planner.next_id, planner.next_step = int(state["next_id"]), int(state["next_step"])
            planner.planned = int(state["planned"])
        except (KeyError, TypeError, ValueError) as error:
            raise HbpError(f"the stream's state is damaged ({error}); start the stream anew") from None
        return planner

    def _plan(self, *, to_the_end: bool) -> Plan:
        """Rows of the buffer; what fills no whole micro-step stays, unless this is the end or nothing would leave."""
        if self.groups is None:
            longest, batch = self.max_length, self.global_batch_tokens
            self.groups = search_groups(self.cost, self.lengths, longest, longest, batch)
        problem = self._problem(self.groups[-1])
        try:
            outcome = windowed_schedule(problem, self.groups, to_the_end=to_the_end)
        except TooFewSamples:
            outcome = windowed_schedule(self._problem(self.groups[-1]), self.groups)
        plan = to_plan(outcome, problem, HBP_MIXED.name, self.seed)
        dropped = tuple((i, f"{n} tokens, longer than the longest group ({self.max_length})") for i, n in self.too_long)
        info = replace(
            plan.info,
            n_samples=self.next_id,
            dropped=dropped,
            lengths_sha256=hash_lengths(plan.lengths[np.argsort(plan.sample_ids)]),  # renumbering keeps their order
            settings={**plan.info.settings, "stream": {"piece": self.planned, "first_step": self.next_step}},
        )
        piece = replace(plan, info=info, sample_ids=self.ids[plan.sample_ids])
        waits = np.sort(outcome.waiting)
        self.ids, self.lengths, self.too_long = self.ids[waits], self.lengths[waits], []
        self.next_step += plan.n_steps
        self.planned += 1
        return piece

    def _problem(self, last: Group) -> Problem:
        """The buffer as a data set of its own, its samples numbered from 0."""
        return Problem(
            lengths=self.lengths,
            dropped=np.zeros(0, np.int64),
            static=last,
            longest=last.capacity,
            cost=self.cost,
            global_batch_tokens=self.global_batch_tokens or self.cost.world_size // last.sp_degree * last.capacity,
            batch_given=self.global_batch_tokens is not None,
            short_steps=0,
            windows=1,
            rng=np.random.default_rng([self.seed, self.planned]),
        )
