"""Values that are lent to tensors."""

import torch

from lightning_entropy.engine.substitutes import Substitutes


@torch.no_grad()
def test_tensors_lent_to_others_come_back_but_where_they_were_written() -> None:
    a, b, c = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    substitutes = Substitutes()
    substitutes.show({a: torch.tensor([10.0]), b: torch.tensor([20.0])})
    substitutes.show({c: torch.tensor([30.0])})
    assert (a.item(), b.item(), c.item(), substitutes.shown) == (10, 20, 3, True)
    b.fill_(7.0)
    assert [t.item() for t in substitutes.own([a, b, c])] == [1, 7, 3]
    substitutes.hide()
    assert (a.item(), substitutes.shown) == (10, True)
    substitutes.hide()
    substitutes.hide()
    assert (a.item(), b.item(), c.item(), substitutes.shown) == (1, 7, 3, False)
    substitutes.show({})
    assert substitutes.shown
