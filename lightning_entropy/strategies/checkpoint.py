"""What belongs to one replica, in a file of its own beside the checkpoint: ``<file>.replicas/<r>.pt``.

If a replica has several ranks, what its other ranks do not share with the first is in ``<r>-<position>.pt``. Where its
weights are sharded, that is their shards, and with them where in the whole they are.

A save is complete or absent. The ranks write their files under provisional names that contain the save's token, which
says the run, the number of the save and the step; then the checkpoint with the same token replaces the old one; then
the files get their final names. A crash before the replacement leaves the old checkpoint and the old files; one after
it leaves the new ones, some under provisional names. A rank that saves alone, after an exception, leaves its file under
the provisional name, and the last complete set beside it. So a load finds a set of one save, with all its files, or
goes on from the consensus and says what was missing.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.replica_files import (
    ReplicaFileError,
    commit,
    contents,
    final_path,
    is_local,
    run_of,
    save_whole,
    stage,
    surplus,
    tidy,
)
from lightning_entropy.strategies.resharding import UnknownPlaceError, resharded
from lightning_entropy.trainer.ownership import REPLICAS

KEY = REPLICAS  # in the main checkpoint: replicas, token, and the loops' counters


LEFT_OUT = (
    "what rounding has left over in the exchanges before {} cannot be divided anew between ranks that each exchange a "
    "share of whole weights: it is left out, and the next exchange begins without it"
)


def new_run(broadcast: Callable[[str], str]) -> str:
    """Return a name that no other run has, the first rank's on all ranks. A collective."""
    return str(broadcast(uuid.uuid4().hex[:12]))


# Of a rank's own state, what it does not share with the first rank of its replica.
OF_A_RANK = ("couplings", "module", "rng")


class ReplicaFiles:
    """Saves a checkpoint in parts: one main file, and one for every rank.

    Args:
        grid: where this rank stands.
        run: a name that no other run has, the same on all ranks.
        barrier: waits for all ranks.
    """

    def __init__(self, grid: Grid, run: str, barrier: Callable[[], None]) -> None:
        self._grid, self._run, self._barrier = grid, run, barrier
        self._saves = 0
        self._last: dict[str, str] = {}  # token of the last save to a path

    def save(
        self,
        io: CheckpointIO,
        checkpoint: dict[str, Any],
        own: dict[str, Any],
        info: dict[str, Any],
        path: Any,
        storage_options: Any = None,
        alone: bool = False,
        sharded: bool = False,
    ) -> None:
        """Write the ranks' files, then the main one.

        Args:
            io: writes the main file.
            checkpoint: the main file's content; only the first rank's is written.
            own: this rank's own state.
            info: added to the main file, for a load with another number of replicas.
            path: of the main file.
            storage_options: for ``io``.
            alone: other ranks may not be saving, or not at this step: what there is stays as it is.
            sharded: a replica's ranks share nothing.
        """
        self._saves += 1  # the same on all ranks, so the token needs no message
        step = checkpoint.get("global_step")  # of a Trainer
        token = f"{self._run}-{self._saves}-{step if isinstance(step, int) else 0}"
        name = self._grid.file
        own = own if sharded or self._grid.position == 0 else {key: own[key] for key in OF_A_RANK if key in own}
        stage({"token": token, "replica": name, **own}, path, name, token)
        self._barrier()
        if self._grid.rank == 0:
            grid = {"replicas": self._grid.replicas, "data_parallel": self._grid.data_parallel, "sharded": sharded}
            save_whole(io, {**checkpoint, KEY: {**grid, "token": token, **info}}, path, storage_options)
        self._barrier()
        if not alone and type(io) is TorchCheckpointIO:
            commit(path, name, token)
        elif (
            not alone
        ):  # the main file may be written later: both saves' files stay, and a load picks those of its token
            tidy(path, name, keep={token, self._last.get(str(path), "")})
        self._last[str(path)] = token


def load(
    checkpoint: dict[str, Any],
    path: Any,
    grid: Grid,
    weights_only: bool | None,
    *,
    sharded: bool = False,
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Any] | None:
    """Read this rank's part of a checkpoint that has replicas. A collective.

    Args:
        checkpoint: the main file's content. What :meth:`ReplicaFiles.save` added is removed.
        path: the main file.
        grid: where this rank stands.
        weights_only: as for ``torch.load``.
        sharded: this rank has shards.
        params: of this rank's module, by name, for a load by other ranks than those that have saved shards.

    Returns:
        The rank's own state, or ``{"counters": ...}`` if all start from the consensus, with a warning that says why;
        None if the checkpoint has no replicas.

    Raises:
        ReplicaFileError: a file cannot be read or is of another run; on all ranks.
    """
    info = checkpoint.pop(KEY, None)
    if info is None:
        return None
    counters = {"counters": info["counters"]}
    path = os.path.realpath(path) if is_local(path) else path  # "last.ckpt" may be a link
    start = "all of them start from the consensus, with the momentum of the first"
    if info["replicas"] != grid.replicas:
        rank_zero_warn(f"{path} has {info['replicas']} replicas, and there are {grid.replicas}: {start}")
        return counters
    was_sharded, ranks = info.get("sharded", False), info.get("data_parallel", 1)
    anew = (was_sharded or sharded) and (was_sharded, ranks) != (sharded, grid.data_parallel)
    parts = ranks if was_sharded else 1  # ranks of a replica that each have a part of what is to be loaded anew
    names = [f"{grid.replica}"]
    if anew:
        names += [_name(grid.replica, d) for d in range(1, parts)]
    # Version 0.1 wrote a file a replica; with another number of ranks, what a rank had of its own has no heir.
    elif grid.position and info.get("data_parallel") == grid.data_parallel:
        names.append(grid.file)
    found: list[dict[str, dict[str, Any]]] = []
    steps: list[dict[str, int | None]] = []
    error = None
    try:
        for name in names:
            by_token = contents(path, name, info["token"], weights_only)
            steps.append({token: _step(content) for token, content in by_token.items()})
            found += [] if anew else [by_token]  # all of a replica's shards may be more than there is memory for
    except ReplicaFileError as caught:
        error = str(caught)
    tokens = {token: steps[0][token] for token in (set.intersection(*map(set, steps)) if steps else ())}
    absent = [name for name, own in zip(names, steps, strict=False) if info["token"] not in own]
    answers: list[Any] = [None] * grid.world_size
    dist.all_gather_object(answers, (error, tokens, absent))
    errors = sorted({error for error, _, _ in answers if error is not None})
    if errors:
        raise ReplicaFileError("; ".join(errors))
    token = _complete([tokens for _, tokens, _ in answers], info["token"])
    if token is None or token != info["token"]:
        gone = sorted({final_path(path, name) for *_, absent in answers for name in absent})
        lack = (
            f"{', '.join(gone)}, of one of {grid.replicas} replicas, is missing"
            if gone
            else "its files are of different steps"
        )
        if token is None:
            rank_zero_warn(f"{path} is not complete: {lack}: {start}")
            return counters
        rank_zero_warn(
            f"{path} is not complete: {lack}: training goes on from the last complete save, at step {tokens[token]}"
        )
    known = {_name(r, d) for r in range(grid.replicas) for d in range(info.get("data_parallel", 1))}
    for extra in surplus(path, known):
        rank_zero_warn(f"{extra} belongs to none of the {grid.replicas} replicas of {path} and is not read")
    if not anew:
        state = {key: value for contents in found for key, value in contents[token].items()}
        if info.get("data_parallel", grid.data_parallel) != grid.data_parallel and _has_memory(state["couplings"]):
            rank_zero_warn(LEFT_OUT.format(path))
            state["couplings"] = []
        return state
    read = _Reader(path, token, weights_only, sharded=was_sharded)
    shares = not sharded and grid.data_parallel > 1
    state, unknown = _anew(read, params or {}, grid, parts, shares=shares)
    if unknown is not None:
        then, now = (
            f"{'shards' if s else 'whole weights'} of {n} ranks each"
            for s, n in ((was_sharded, ranks), (sharded, grid.data_parallel))
        )
        rank_zero_warn(
            f"{path} has replicas with {then}, and here they have {now}, which cannot be made of them, as it is not "
            f"known of which parameter now {unknown} is: {start}"
        )
        return counters
    return state


class _Reader:
    """Reads what the ranks have saved: called with the numbers of a replica and of a position in it."""

    def __init__(self, path: Any, token: str, weights_only: bool | None, *, sharded: bool) -> None:
        self.path, self._token, self._weights_only, self._sharded = path, token, weights_only, sharded

    def __call__(self, replica: int, position: int) -> dict[str, Any]:
        content = contents(self.path, _name(replica, position), self._token, self._weights_only)[self._token]
        if self._sharded and "places" not in content:
            raise UnknownPlaceError("any of it")
        return {"places": {}, "layouts": [None] * len(content["couplings"]), **content}


def _anew(
    read: _Reader, params: Mapping[str, Tensor], grid: Grid, ranks: int, *, shares: bool
) -> tuple[dict[str, Any], str | None]:
    """Return this rank's state of a save by other ranks, and what of it is not known on some rank. A collective."""
    state: dict[str, Any] = {}
    unknown, kept = None, True
    try:
        state, kept = resharded(
            read,
            params,
            replica=grid.replica,
            position=grid.position,
            replicas=grid.replicas,
            ranks=ranks,
            shares=shares,
        )
    except UnknownPlaceError as caught:
        unknown = str(caught)
    answers: list[Any] = [None] * grid.world_size
    dist.all_gather_object(answers, unknown)
    if not kept:
        rank_zero_warn(LEFT_OUT.format(read.path))
    return state, next((answer for answer in answers if answer is not None), None)


def _has_memory(couplings: Any) -> bool:
    return any(isinstance(value, Tensor) for memory in couplings for value in memory.values())


def _name(replica: int, position: int) -> str:
    return f"{replica}" if position == 0 else f"{replica}-{position}"


def _step(content: dict[str, Any]) -> int | None:
    """Return the Trainer's step of a replica's file; None where there is no Trainer."""
    step = content.get("checkpoint", {}).get("global_step")
    return None if step is None else int(step)


def _complete(tokens: list[dict[str, int | None]], wanted: str) -> str | None:
    """Return the save of which all ranks have their files, of one step: the wanted one or else the last; or None."""
    common = [t for t in set.intersection(*map(set, tokens)) if run_of(t) == run_of(wanted)]
    whole = [t for t in common if len({own[t] for own in tokens}) == 1]
    return max(whole, key=lambda t: (t == wanted, int(t.split("-")[1])), default=None)
