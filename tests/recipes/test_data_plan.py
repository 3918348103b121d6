"""Which image goes into which batch, and how a loader keeps its place."""

import copy

import numpy as np
import pytest
import torch

from recipes.data.plan import FLIP, INDEX, LEFT, TOP, EvaluationPlan, PlanLoader, TrainingPlan


def plan_of(n=12, **changes):
    arguments = {"batch_size": 4, "flip": True, "crop": 2, "replacement": False, "seed": (0,)} | changes
    return TrainingPlan(torch.arange(n), **arguments)


def test_an_epoch_holds_every_image_once():
    plan = plan_of()
    drawn = torch.cat([plan[b] for b in range(len(plan))])[:, INDEX]
    assert sorted(drawn.tolist()) == list(range(12))
    assert drawn.tolist() != list(range(12))


def test_with_replacement_images_repeat_uniformly():
    plan = plan_of(n=8, batch_size=8, replacement=True)
    counts = torch.zeros(8)
    for plan.epoch in range(500):
        counts += torch.bincount(plan[0][:, INDEX], minlength=8)
    assert plan[0][:, INDEX].unique().numel() < 8
    # binomial, standard deviation sqrt(4000 * 1/8 * 7/8) = 21
    assert (counts - 500).abs().max() < 5 * 21


def test_every_flip_and_offset_is_equally_likely():
    plan = plan_of(n=4000, batch_size=4000, crop=2)
    rows = torch.cat([plan[0] for plan.epoch in range(5)])
    n = len(rows)
    cells = torch.bincount((rows[:, FLIP] * 5 + rows[:, TOP]) * 5 + rows[:, LEFT], minlength=50)
    expected = n / 50
    # chi-squared with 49 degrees of freedom: above 94 once in 10^4
    assert ((cells - expected) ** 2 / expected).sum() < 94
    assert len(cells) == 50


def test_the_same_seed_draws_the_same_batch_whatever_the_global_generators_do():
    first = plan_of()[1]
    torch.manual_seed(123)
    np.random.seed(123)
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(plan_of()[1], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(plan_of(seed=(1,))[1], first)


def test_epochs_differ():
    plan = plan_of()
    first = plan[0]
    plan.epoch = 1
    assert not torch.equal(plan[0], first)


def test_ranks_share_one_plan():
    whole = plan_of(batch_size=4)
    parts = [plan_of(batch_size=2, num_replicas=2, rank=rank) for rank in (0, 1)]
    for b in range(len(whole)):
        assert torch.equal(torch.cat([part[b] for part in parts]), whole[b])


def test_a_batch_larger_than_a_ranks_share_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the images per rank, 6, got 8"):
        plan_of(batch_size=8, num_replicas=2)


@pytest.mark.parametrize("n", [5, 6, 7, 16, 17])
def test_evaluation_sees_every_image_once_in_as_many_batches_on_every_rank(n):
    plans = [EvaluationPlan(torch.arange(n), batch_size=2, num_replicas=3, rank=rank) for rank in range(3)]
    seen = [row for plan in plans for b in range(len(plan)) for row in plan[b][:, INDEX].tolist()]
    assert sorted(seen) == list(range(n))
    assert len({len(plan) for plan in plans}) == 1
    assert max(len(plan[b]) for plan in plans for b in range(len(plan))) <= 2


def test_a_loader_goes_on_where_it_was_saved():
    loader = PlanLoader(plan_of())
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = list(batches)
    resumed = PlanLoader(plan_of())
    iterator = iter(resumed)  # a Trainer makes the iterator before it restores the state
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)
    assert [b.tolist() for b in iterator] == [b.tolist() for b in rest]
    assert len(list(resumed)) == 3, "the place in the epoch is used once"


def test_who_looks_at_the_batches_beside_the_training_does_not_move_its_place():
    loader = PlanLoader(plan_of())
    loader.sampler.set_epoch(2)
    batches = iter(loader)
    next(batches)
    beside = copy.copy(loader)
    assert [b.tolist() for b in beside] == [b.tolist() for b in PlanLoader(loader.dataset)]
    assert loader.state_dict() == {"epoch": 2, "drawn": 1}
    assert len(list(batches)) == 2
