"""The loops of one replica, its exchanges with the others, and the consensus, as both strategies use them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.formats import check_format
from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.engine.shards import is_sharded
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.consensus import Consensus
from lightning_entropy.strategies.exchange import Coupling, Meeting, Round
from lightning_entropy.strategies.links import Links
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.resharding import Place, place_of
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.consensus import ElasticConsensus
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.exchange import ElasticCoupling

FORMAT = 1  # of ReplicaLoops.state_dict()


class ReplicaLoops:
    """One loop per optimizer, stepped together with the other replicas'. Made on all ranks.

    Args:
        module: whose parameters the optimizers hold; the same weights on the ranks of a replica.
        optimizers: of this rank.
        relaxation: the method.
        grid: where this rank stands.
        outer: makes the outer optimizer.
        seed: common to all ranks, >= 0.
        communication_dtype: of what is sent.
        overlap: False waits for every exchange at once.
        compile: an inner step in one compiled pass over memory; on CUDA also what is rounded.
        offload_anchor: x in the host's memory between outer steps.
        apart: parameters that no optimizer has may differ between replicas.
        timeout: of the exchanges.
        meeting: waits for other ranks.
        bystander: whether a step passes the loops by, as in :class:`InnerOuter`.
        assembly: where replicas meet that come and go; None: they stay.

    Attributes:
        loops: of the optimizers.
        couplings: their exchanges, a stream for each optimizer and fragment; none with one replica.
        consensus: of the module.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Sequence[Optimizer],
        relaxation: Relaxation,
        grid: Grid,
        *,
        outer: OuterFactory | None,
        seed: int,
        communication_dtype: Format,
        overlap: bool,
        compile: bool = False,
        offload_anchor: bool = False,
        apart: bool,
        timeout: timedelta | None,
        meeting: Meeting,
        bystander: Callable[[], bool] = lambda: False,
        assembly: Assembly | Delegation | None = None,
    ) -> None:
        self._relaxation, self._grid, self._assembly = relaxation, grid, assembly
        self._unjudged: list[tuple[int, int, Round]] = []  # exchanges, with their optimizer and the outer step
        self._diverged: dict[int, Round] = {}  # by optimizer: the exchange whose mean this replica goes back to
        self._exchange_timeout, self._meeting = timeout, meeting
        self._format: Format = communication_dtype
        self._overlap, self._compile = overlap, compile
        self._links: list[Links] = []
        self._sharded = is_sharded(p for o in optimizers for group in o.param_groups for p in group["params"])
        # The consensus is exchanged by itself, in full precision: what is compressed reaches no checkpoint.
        self._mean: Coupling | None = None
        if grid.replicas > 1:
            self._mean = Coupling(self._open(), overlap=False, meeting=meeting, name="the consensus")
        self._several = grid.replicas > 1 or assembly is not None
        self.couplings: list[Any] = []
        self._means: list[list[Any]] = []  # the same, by optimizer
        self._couple(len(optimizers))
        self.loops = ModuleLoops(
            module,
            optimizers,
            relaxation,
            outer=outer,
            replica_mean=self._means if self._several else None,
            seed=grid.seed(seed),
            count_attempts=True,
            compile=compile,
            offload_anchor=offload_anchor,
            bystander=bystander,
        )
        if assembly is not None:
            target, replica = relaxation.outer_target, grid.replica
            self.consensus: Consensus = ElasticConsensus(module, self.loops, self.couplings, target, replica=replica)
            return
        self.consensus = Consensus(
            module,
            self.loops,
            self._mean,
            self.couplings,
            early=relaxation.outer_target.early,
            every=apart,
            replica=grid.replica,
        )

    def _open(self) -> Links:
        links = Links(self._grid.replicas, self._grid.data_parallel, self._exchange_timeout, sharded=self._sharded)
        self._links.append(links)
        return links

    def _couple(self, optimizers: int) -> None:
        """Open the streams of exchanges of optimizers that have none."""
        for i in range(len(self._means), optimizers if self._several else 0):
            own = [self._coupling(i, fragment) for fragment in range(self._relaxation.fragments)]
            self._means.append(own)
            self.couplings += own

    def _of(self, i: int) -> list[Any]:
        """Return the exchanges of the i-th optimizer."""
        return self._means[i] if self._several else []

    def _coupling(self, i: int, fragment: int) -> Any:
        """Open a stream of exchanges for a fragment of the i-th optimizer's weights."""
        if self._assembly is not None:
            return self._elastic_coupling(i, fragment)
        return Coupling(
            self._open(),
            format=self._format,
            differences=self._relaxation.outer_target.near,
            overlap=self._overlap,
            compile=self._compile,
            meeting=self._meeting,
            name="an outer step",
        )

    def _elastic_coupling(self, i: int, fragment: int) -> ElasticCoupling:
        assert self._assembly is not None
        target = self._relaxation.outer_target
        stream = i * self._relaxation.fragments + fragment
        return ElasticCoupling(
            self._assembly,
            stream,
            format=self._format,
            differences=target.near,
            overlap=self._overlap,
            keep=not target.early and not target.common,
            extras=lambda: [] if stream else self.consensus.buffers(),
            common=(lambda: self.loops.loops[i].common_state(fragment)) if target.common else None,
            catch_up=lambda state: self.loops.loops[i].load_common_state(state),
        )

    def begin(self) -> None:
        """Put y into the parameters and start the exchanges that can travel early. All ranks call it together."""
        rounds = [coupling.round for coupling in self.couplings]
        self.loops.prepare()
        if not self._relaxation.outer_target.early:
            return
        for i, (coupling, before) in enumerate(zip(self.couplings, rounds, strict=True)):
            if coupling.round is not before:
                self._judge_later(i, coupling.round)
                self._judge()
                self._mend(i)

    def count(self, optimizer: Optimizer) -> bool:
        """Count an attempted step of an optimizer, whether or not a gradient scaler skipped it.

        Args:
            optimizer: one of this rank's; every rank calls with its counterpart.

        Returns:
            Whether the outer step was taken.
        """
        for i, loop in enumerate(self.loops.loops):
            if loop.optimizer is not optimizer:
                continue
            before, rounds = loop.outer_step, [coupling.round for coupling in self._of(i)]
            loop.advance()
            stepped = loop.outer_step > before
            for coupling, round in zip(self._of(i), rounds, strict=True):
                coupling.progress()
                if coupling.round is not round and not self._relaxation.outer_target.early:
                    self._judge_later(i, coupling.round)
            self._judge()
            if self._several:
                self._mend(i)
            for fragment, coupling in enumerate(self._of(i)):
                # Nobody will ask again: it is of weights that are no more, and holds a copy of them.
                if (stepped or self._relaxation.streams) and fragment not in loop.under_way:
                    coupling.round = None
            return stepped
        return False

    def _judge_later(self, i: int, round: Round | None) -> None:
        if round is not None:
            self._unjudged.append((i, self.loops.loops[i].outer_step, round))

    def _judge(self) -> None:
        """Say so where this replica's weights are not finite in an exchange, as soon as a device has found out.

        That is at once on a CPU, and else a step or two after the exchange has begun, or when it is used.
        """
        waiting, self._unjudged = self._unjudged, []
        for i, outer_step, round in waiting:
            if round.finite is None:
                self._unjudged.append((i, outer_step, round))
            elif not round.finite and i not in self._diverged:
                warnings.warn(
                    f"replica {self._grid.replica} has nan or inf in its weights at outer step {outer_step}: "
                    "it is left out of the mean and starts again from the consensus",
                    stacklevel=2,
                )
                self._diverged[i] = round

    def _mend(self, i: int) -> None:
        """Put a replica that has diverged back to the mean of the others, which is waited for."""
        if i in self._diverged:
            loop, round = self.loops.loops[i], self._diverged.pop(i)
            if self._relaxation.outer_target.common:  # x goes the others' way; y has not
                target = [w.anchor for w in loop.weights]
            else:
                target = round.wait()
            if target is None:  # a peer was lost in the exchange: the next one will do
                return
            loop.restart(target)
            self.consensus.mend_buffers()

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Attach to optimizers that have come and detach from those that are gone. All ranks call it together.

        Args:
            optimizers: that are to be stepped now.
        """
        self.loops.resume()
        for loop in self.loops.loops:
            loop.forget_mean()
        self._couple(len(optimizers))
        self._unjudged, self._diverged = [], {}
        self.loops.follow(optimizers)

    def close(self) -> None:
        """End every unfinished loop with what it has, at the end of training. All ranks call it together."""
        self.loops.close()
        self._unjudged = []
        for coupling in self.couplings:
            coupling.round = None

    def give_notice(self, wanted: bool) -> None:
        """Say in the exchanges to come whether this rank wants something that all ranks must do together."""
        for coupling in self._all_couplings:
            coupling.notice = wanted

    def take_notice(self) -> bool:
        """Return whether any rank has given notice since the last call: the same on all ranks after an exchange."""
        noticed = any(coupling.noticed for coupling in self._all_couplings)
        for coupling in self._all_couplings:
            coupling.noticed = False
        return noticed

    @property
    def _all_couplings(self) -> list[Coupling]:
        return [*self.couplings, *([] if self._mean is None else [self._mean])]

    def metrics(self) -> dict[str, Any]:
        """Return what is logged at outer steps, with the replicas' spread."""
        values = self.loops.metrics()
        for i, couplings in enumerate(self._means):
            spreads = [coupling.spread for coupling in couplings if coupling.spread is not None]
            if spreads:  # of several fragments, which are of about one size
                name = "entropy/spread" if len(self._means) == 1 else f"entropy/{i}/spread"
                values[name] = spreads[0] if len(spreads) == 1 else (sum(s * s for s in spreads) / len(spreads)) ** 0.5
        if self._assembly is not None:
            values["entropy/replicas"] = len(self._assembly.present)
        return values

    def traffic(self) -> tuple[float, float]:
        """Return the bytes that this rank has sent to other replicas, and the seconds it has waited for theirs."""
        return sum(c.sent for c in self.couplings), sum(c.waited for c in self.couplings)

    def peak(self) -> float:
        """Return the largest number of bytes that this rank has sent to other replicas in one exchange."""
        return max((c.peak for c in self.couplings), default=0.0)

    def receive(self) -> None:
        """Take what exchanges have brought whose turn is yet to come, so that a replica that joins gets it too."""
        for coupling in self.couplings:
            if self._relaxation.streams and coupling.round is not None and coupling.round.arrived:
                coupling.round.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return this replica's own state, from which :meth:`load_state_dict` goes on exactly."""
        repeat = self._relaxation.outer_target.early or self._relaxation.streams
        return {
            "format": FORMAT,
            "loops": [loop.state_dict(anchor=True) for loop in self.loops.loops],
            "couplings": [coupling.state_dict(repeat=repeat) for coupling in self.couplings],
            "layouts": self._layouts(),
            "module": self.consensus.own(),
        }

    def _layouts(self) -> list[list[Place] | None]:
        """Return of which parts the flat tensors of each stream's memory consist; None where they are shares."""
        layouts: list[list[Place] | None] = []
        for loop, couplings in zip(self.loops.loops, self._means, strict=False):
            names = {w: name for name, w in loop.weights.named()}
            for fragment, coupling in enumerate(couplings):
                weights = loop.exchanged(fragment)
                size = sum(w.value.numel() for w in weights)
                known = isinstance(coupling, Coupling) and coupling.covers(size)
                layouts.append([place_of(names[w], w.param) for w in weights] if known else None)
        return layouts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; or only :meth:`counters` or :meth:`position`, with the module's weights for x."""
        self._unjudged = []
        if "counters" in state:
            for loop, counters in zip(self.loops.loops, state["counters"], strict=True):
                loop.load_state_dict({**loop.state_dict(), "inner_step": 0, **counters, "slots": {}})
            owners = [(i, fragment) for i, own in enumerate(self._means) for fragment in range(len(own))]
            memories = state.get("couplings", [])
            for coupling, (i, fragment), memory in zip(self.couplings, owners, memories, strict=False):
                coupling.load_state_dict(memory)
                loop = self.loops.loops[i]
                begun = loop.inner_step > 0 or memory["begun"]  # at a save or a validation already
                coupling.passes = self._relaxation.outer_target.early and begun
                if memory["under_way"] is not None:
                    loop.take_under_way(fragment, memory["under_way"])
            return
        check_format("the state of a replica", state, FORMAT)
        self.consensus.load_own(state["module"])
        if len(state["couplings"]) == len(self.couplings):  # or else fragments has changed, which is said
            for coupling, memory in zip(self.couplings, state["couplings"], strict=True):
                coupling.load_state_dict(memory)  # before the loops, which may start an exchange
        self.loops.load_state_dict(state["loops"])

    @staticmethod
    def counters(state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the part of a state that does not depend on the number of replicas: t."""
        return [{"outer_step": loop["outer_step"]} for loop in state["loops"]]

    @staticmethod
    def position(state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a state that a replica needs that joins others at their x."""
        keys = ("inner_step", "outer_step", "outer")
        return {
            "counters": [{key: loop[key] for key in keys} for loop in state["loops"]],
            "couplings": state["couplings"],
        }

    def detach(self, *, close: bool) -> None:
        """Leave in the parameters what they show, or x, and no hook behind.

        Args:
            close: destroy the process groups. All ranks do.
        """
        self.loops.detach()
        for links in self._links if close else []:
            links.close()


def replica_loops(
    module: Module,
    optimizers: Sequence[Optimizer],
    options: ReplicaOptions,
    grid: Grid,
    *,
    seed: int,
    timeout: timedelta | None,
    meeting: Meeting,
    bystander: Callable[[], bool] = lambda: False,
    assembly: Assembly | Delegation | None = None,
) -> ReplicaLoops:
    """Return the loops of this rank's optimizers, as the options say; for the arguments see :class:`ReplicaLoops`."""
    return ReplicaLoops(
        module,
        optimizers,
        options.relaxation,
        grid,
        outer=options.outer,
        seed=seed,
        communication_dtype=options.communication_dtype,
        overlap=options.overlap,
        compile=options.compile,
        offload_anchor=options.offload_anchor,
        apart=options.independent_init,
        timeout=timeout,
        meeting=meeting,
        bystander=bystander,
        assembly=assembly,
    )
