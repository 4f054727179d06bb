"""All ranks of a group say what they are about to run, and go on only where they say the same.

Collectives match by order alone: a rank that runs another plan gives wrong sums, or waits for
ever. So before a graph runs, each rank puts its facts (versions, model, plan) into the store that
the process group was made with, and reads every other rank's. The store needs no collective and no
device, and it tells which ranks have said nothing.
"""

import contextlib
import contextvars
import hashlib
import json
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.match import Reject
from ridgeline.passes.parallel.differences import differences, first_difference, listed

T = TypeVar("T")

_POLL, _LISTEN = 0.005, 0.05
"""Seconds between two looks into the store: where an answer is due, and where none may come."""
_BROKEN = ("closed by peer", "timed out", "timeout", "connection re", "gloo", "nccl", "socket")
"""What transports say of a rank that is gone; gloo raises plain RuntimeErrors."""
_TURNS: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""How often the ranks of a group have talked: what was said before must not be read again."""
_SAID: weakref.WeakKeyDictionary[dist.ProcessGroup, set[int]] = weakref.WeakKeyDictionary()
"""The turns of which the store still has what this rank said."""
_LINGER = 5.0
"""Seconds that a rank stays for others to read what it said; one that has ended reads nothing."""


class RankMismatch(RidgelineError):
    """The ranks are about to run different things."""


class RankLost(RidgelineError, RuntimeError):
    """A rank failed, ended, or did not answer within the timeout."""


class LeftAsItIs(RidgelineError):
    """Raised on all ranks alike: the graph stays as it came, because of `reject`."""

    def __init__(self, reject: Reject) -> None:
        super().__init__(f"{reject.reason}{f'; {reject.needed}' if reject.needed else ''}")
        self.reject = reject


@dataclass(slots=True)
class Ranks:
    """The ranks that a model is split over, seen from one of them.

    group: their process group. timeout: how long this rank waits for the others, in all.
    """

    group: dist.ProcessGroup
    timeout: timedelta

    @classmethod
    def of(cls, mesh: Any, timeout: timedelta | None = None) -> "Ranks":
        """Of a one-dimensional `DeviceMesh` or a process group; None is the default group.

        The timeout is the group's own unless given.

        Raises:
            RidgelineError: torch.distributed is not initialised, this rank is not in the group, or
                the mesh has several dimensions.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RidgelineError(
                "expected an initialised torch.distributed, found none; start with torchrun and"
                " call torch.distributed.init_process_group first"
            )
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise RidgelineError(
                    f"expected a mesh of one dimension, found {mesh.mesh_dim_names or mesh.shape};"
                    ' pass the one to split over, as mesh["tp"]'
                )
            mesh = mesh.get_group()
        group = dist.group.WORLD if mesh is None else mesh
        if not isinstance(group, dist.ProcessGroup):
            raise RidgelineError(
                f"expected a DeviceMesh, a process group or None, found {type(group).__name__};"
                " a rank that is not in the group must not call this"
            )
        return cls(group, timeout or _timeout_of(group))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def name(self) -> str:
        return self.group.group_name

    @property
    def turn(self) -> int:
        """How often the ranks have talked; the same on all, but for one that failed alone."""
        return _TURNS.get(self.group, 0)

    def agree(
        self, subject: str, facts: Mapping[str, str], advice: Mapping[str, str] | None = None
    ) -> None:
        """Return where every rank has called this with equal `facts`.

        advice: name of a fact -> what to do where it differs, beside what is always said.

        Raises:
            RankMismatch: on all ranks, naming the facts that differ and who says what.
            RankLost: a rank said that it failed, or nothing within the timeout.
        """
        self._refuse_others(self._exchange({"subject": subject, **facts}), advice)

    def agree_on_lines(self, subject: str, lines: Sequence[tuple[str, str]]) -> None:
        """`agree` on many lines in any order, of which the first that differs is named.

        lines: what is compared, and what it is called in the error.
        """
        told = hashlib.sha256("\n".join(sorted({text for text, _ in lines})).encode()).hexdigest()
        said = self._exchange({"subject": subject, "lines": told})
        if len({each["subject"] for each in said}) == 1 < len({each["lines"] for each in said}):
            said = self._exchange({"subject": subject, "lines": json.dumps(lines)})
            first = first_difference([json.loads(each["lines"]) for each in said])
            said = [{"subject": subject, **each} for each in first]
        self._refuse_others(said)

    def _refuse_others(
        self, said: Sequence[Mapping[str, str]], advice: Mapping[str, str] | None = None
    ) -> None:
        """Raise RankMismatch where not every rank says the same, naming what differs."""
        if told := differences(said):
            todo = "".join(f". {does}" for name, does in (advice or {}).items() if name in told)
            raise RankMismatch(
                f"the {self.world} ranks expected to agree on {said[self.rank]['subject']}, and"
                f" found: {'; '.join(listed(told))}. Run one version of the code, one model and one"
                " target on all ranks, and call it in the same order with the same inputs"
                f"{todo}"
            )

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each of `values` where it is largest: a decision on them is one for all ranks.

        Raises RankMismatch and RankLost as `agree` does.
        """
        said = self._exchange({"subject": "what they measured", "values": json.dumps(list(values))})
        self._refuse_others([{"subject": each["subject"]} for each in said])
        columns = zip(*(json.loads(each["values"]) for each in said), strict=True)
        return [math.nan if any(map(math.isnan, c)) else max(c) for c in columns]

    def barrier(self) -> None:
        """Return on all ranks within microseconds, as the transport allows."""
        device = "cpu" if "cpu" in map(str, self.group._device_types) else "cuda"
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What raises inside is made known to the others, who would wait for this rank."""
        try:
            yield
        except (RankMismatch, RankLost, LeftAsItIs):
            raise  # the others know, or are gone
        except Exception as error:
            self.say_failed(error)
            raise

    def beside(self, work: Callable[[], T]) -> T:
        """What `work` gives, which sends, done in a thread while this one listens to the others.

        Nothing wakes a thread that waits in a collective of gloo for a rank that has failed: it is
        left behind, the group is of no use any more, and this raises RankLost at once.
        """
        context, threads = contextvars.copy_context(), torch.get_num_threads()
        graded, outcome = torch.is_grad_enabled(), Future[T]()

        def beside() -> None:
            torch.set_num_threads(threads)  # of OpenMP, which counts them by thread
            try:
                with torch.set_grad_enabled(graded):
                    outcome.set_result(context.run(self.guarded(work)))
            except BaseException as error:  # this thread has nobody to raise it to
                outcome.set_exception(error)

        threading.Thread(target=beside, name="ridgeline ranks", daemon=True).start()
        while not wait([outcome], _LISTEN).done:
            try:
                self.refuse_failed()
            except RankLost:
                self.group.abort()  # where the transport knows how
                raise
        return outcome.result()

    def guarded(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, whose collectives say RankLost where another rank is gone."""

        def guarded(*args: Any) -> Any:
            try:
                return run(*args)
            except RankLost:
                raise
            except RuntimeError as error:
                if not _is_broken(error):
                    raise
                self.refuse_failed()
                raise self.lost(error) from error

        return guarded

    def lost(self, error: Exception) -> "RankLost":
        """What to raise where a transport gave `error`."""
        return RankLost(
            f"rank {self.rank} of {self.world} waited for another rank, which has ended or"
            f" did not answer within the group's timeout ({str(error).strip()}); look"
            " into the other ranks' logs, and start all of them again"
        )

    def _exchange(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank says at this turn, by rank."""
        turn = self.turn
        _TURNS[self.group] = turn + 1
        try:
            return self._exchanged(turn, facts)
        except RuntimeError as error:
            if isinstance(error, RankLost) or not _is_broken(error):
                raise
            raise self.lost(error) from error  # the store was in the rank that ended

    def _exchanged(self, turn: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
        self._say(turn, facts)
        keys = self._keys(turn)

        def refuse() -> None:
            self._refuse_failed(self._all_heard(turn))

        missing = self._await(keys, self.timeout.total_seconds(), refuse)
        if missing:
            raise RankLost(
                f"rank {self.rank} of {self.world} waited {self.timeout.total_seconds():g} s for"
                f" rank {', '.join(str(keys.index(k)) for k in missing)} to agree on"
                f" {facts['subject']}; it has ended, or it does not make this call"
            )
        said = [json.loads(self._store.get(key)) for key in keys]
        self._forget_before(turn)
        # The store may live in one of the ranks, which must not end before all have read.
        self._store.set(f"{keys[self.rank]}/read", b"")
        heard = [key for key, each in zip(keys, said, strict=True) if "failed" not in each]
        self._await([f"{key}/read" for key in heard], min(_LINGER, self.timeout.total_seconds()))
        self._refuse_failed(said)
        return said

    def _forget_before(self, turn: int) -> None:
        """Who speaks at a turn has read what was said before: this rank's part is deleted."""
        mine = _SAID.setdefault(self.group, set())
        for past in [t for t in mine if t < turn]:
            self._store.delete_key(_key(past, self.rank))
            self._store.delete_key(f"{_key(past, self.rank)}/read")
            mine.remove(past)

    def in_step(self, turns: Sequence[int], failed: Sequence[bool]) -> None:
        """Return where all ranks have talked as often; else all are at the same turn again.

        turns, failed: of each rank, and whether it has failed just now, at the turn before its own.

        Raises RankLost on all ranks but those of `failed`, with what a rank that failed has said.
        """
        first = min(turn - now for turn, now in zip(turns, failed, strict=True))
        last = max(turns)
        if first == last:
            return
        _TURNS[self.group] = last
        told: dict[int, str] = {}
        for turn in range(first, last):
            for rank, each in enumerate(self._all_heard(turn)):
                if "failed" in each:
                    told[rank] = each["failed"]
        if not told:
            raise RankLost(
                f"the {self.world} ranks are out of step: they have talked {turns} times"
            )
        self._refuse_failed([{"failed": told[r]} if r in told else {} for r in range(self.world)])

    def refuse_failed(self) -> None:
        """Raise RankLost where another rank has said that it failed, since all agreed."""
        turn = self.turn
        try:
            self._refuse_failed(self._all_heard(turn))
        except RankLost:
            _TURNS[self.group] = turn + 1  # where the one that failed goes on too
            raise

    def _all_heard(self, turn: int) -> list[dict[str, Any]]:
        """What each rank has said at a turn so far; {} where nothing."""
        return [self._heard(key) for key in self._keys(turn)]

    def _refuse_failed(self, said: Sequence[Mapping[str, Any]]) -> None:
        for rank, each in enumerate(said):
            if "failed" in each:
                raise RankLost(f"rank {rank} of {self.world} failed: {each['failed']}")

    def _heard(self, key: str) -> dict[str, Any]:
        """What is said there; nothing where the store is gone with its rank."""
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else {}
        except RuntimeError:
            return {}

    def _keys(self, turn: int) -> list[str]:
        """Where each rank says something at a turn."""
        return [_key(turn, rank) for rank in range(self.world)]

    def say_failed(self, error: Exception) -> None:
        """At the turn at which the others wait, and go on from: all are at the next one then."""
        turn = self.turn
        _TURNS[self.group] = turn + 1
        with contextlib.suppress(dist.DistError):  # the store is gone, and so are the others
            self._say(turn, {"failed": f"{type(error).__name__}: {error}"})

    def _say(self, turn: int, facts: Mapping[str, Any]) -> None:
        self._store.set(_key(turn, self.rank), json.dumps(dict(facts)))
        _SAID.setdefault(self.group, set()).add(turn)

    @property
    def _store(self) -> Any:
        return distributed_c10d._get_process_group_store(self.group)

    def _await(
        self, keys: list[str], seconds: float, look: Callable[[], None] | None = None
    ) -> list[str]:
        """The keys that have not appeared in that time; look: called while they have not."""
        end = time.monotonic() + seconds
        missing = keys
        while True:
            if look is not None:
                look()
            missing = [key for key in missing if not self._store.check([key])]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(_POLL)


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the collectives of a group wait."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", distributed_c10d.default_pg_timeout)


def _is_broken(error: Exception) -> bool:
    """Is it what a transport says of a rank that is gone?"""
    text = str(error).lower()
    known = isinstance(error, dist.DistError) or any(t in text for t in _BROKEN)
    return isinstance(error, RuntimeError) and known


def _key(turn: int, rank: int) -> str:
    return f"ridgeline/{turn}/{rank}"
