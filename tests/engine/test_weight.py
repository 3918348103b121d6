"""The state of one parameter, and of several at once."""

import torch

from lightning_entropy.engine.weight import Weight, add_gradients, means_of, running_means


def weight(value: list[float], anchor: list[float], dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(torch.nn.Parameter(torch.tensor(value, dtype=dtype)), torch.tensor(anchor))


@torch.no_grad()
def test_y_is_what_is_kept_or_else_the_parameter_and_z_is_y_where_there_is_no_mean() -> None:
    w = weight([1.0], [5.0])
    assert (w.inner.item(), w.mean.item(), w.anchor.item()) == (1, 1, 5)
    w.kept = torch.tensor([2.0])
    assert (w.inner.item(), w.mean.item()) == (2, 2)
    w.average = torch.tensor([3.0])
    assert (w.inner.item(), w.mean.item()) == (2, 3)
    w.restart()
    assert (w.param.item(), w.inner.item(), w.mean.item(), w.kept) == (5, 5, 5, None)


@torch.no_grad()
def test_the_anchor_that_an_optimizer_steps_is_one_object() -> None:
    w = weight([1.0], [5.0])
    assert w.whole_anchor is w.whole_anchor is w.anchor


@torch.no_grad()
def test_a_running_mean_starts_at_x_and_is_updated_in_place() -> None:
    two = [weight([1.0], [5.0]), weight([2.0], [6.0])]
    two[1].average = torch.tensor([4.0])
    means = running_means(two)
    assert [z.item() for z in means] == [5, 4] and two[0].average is means[0] is not two[0].anchor


@torch.no_grad()
def test_means_have_the_anchors_precision() -> None:
    two = [weight([1.0], [5.0], torch.bfloat16), weight([2.0], [6.0])]
    two[1].average = torch.tensor([4.0])
    means = means_of(two)
    assert [(z.dtype, z.item()) for z in means] == [(torch.float32, 1), (torch.float32, 4)]
    assert two[0].average is None  # as it is asked for at the end alone


@torch.no_grad()
def test_gradients_are_summed_dense_unscaled_and_in_the_anchors_type() -> None:
    w = weight([0.0] * 3, [0.0] * 3, torch.bfloat16)
    w.param.grad = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    add_gradients([w], None)
    w.param.grad.zero_()  # the sum is a copy
    w.param.grad = torch.sparse_coo_tensor([[1]], [8.0], (3,), dtype=torch.bfloat16, check_invariants=True)
    add_gradients([w], torch.tensor(4.0))
    assert w.gradient is not None
    assert w.gradient.dtype == torch.float32
    assert w.gradient.tolist() == [1, 4, 4]
