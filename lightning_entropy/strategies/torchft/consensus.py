"""The consensus of replicas that come and go: the last mean of those that met, known to each of them."""

import torch
from torch import Tensor
from torch.nn import Module

from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.methods.targets import OuterTarget
from lightning_entropy.strategies.consensus import Consensus
from lightning_entropy.strategies.torchft.exchange import ElasticCoupling


class ElasticConsensus(Consensus):
    """Forms the consensus of what the loops exchange anyway, without an exchange of its own.

    Where the anchors travel, it is their mean at the last outer step: the exchange that the next batch would start is
    started now, and waited for. Where the averages do, it is the last mean of them; where pseudo-gradients do, it is x,
    which all replicas have in common. Buffers are those that came with it. What could not be had is the replica's own.

    Args:
        module: whose parameters and buffers.
        loops: that hold x.
        couplings: their exchanges; buffers travel with the first.
        target: what they exchange.
        replica: this one's number, for messages.
    """

    def __init__(
        self,
        module: Module,
        loops: ModuleLoops,
        couplings: list[ElasticCoupling],
        target: OuterTarget,
        *,
        replica: int,
    ) -> None:
        super().__init__(module, loops, None, couplings, early=target.early, every=False, replica=replica)
        self._elastic, self._target = couplings, target

    @torch.no_grad()
    def _means(self, *, alone: bool) -> list[tuple[Tensor, Tensor]]:
        pairs: list[tuple[Tensor, Tensor]] = []
        if self._target.early:
            if not alone:
                for loop, coupling in zip(self._loops.loops, self._elastic, strict=False):
                    if coupling.round is None:
                        loop.prepare()
                    if coupling.round is not None:
                        coupling.round.wait()
            pairs = self.known()
        elif not self._target.common:
            for loop, coupling in zip(self._loops.loops, self._elastic, strict=False):
                pairs += zip([w.param for w in loop.weights], coupling.last, strict=False)
        buffers = self.buffers()
        for buffer, mean in zip(buffers, self._elastic[0].last_extras if self._elastic else [], strict=False):
            if mean.isfinite().all():
                pairs.append((buffer, mean.to(buffer.dtype)))
        return pairs

    def known(self) -> list[tuple[Tensor, Tensor]]:
        """Return the means of x that have arrived; nothing where a peer was lost, and there is none."""
        rounds = [coupling.round for coupling in self._elastic]
        try:
            lost = any(r is not None and r.arrived and r.wait() is None for r in rounds)
        except Exception:  # which is on its way already
            return []
        return [] if lost else super().known()
