"""Functions of many points at once, with their gradients."""

import torch


def batched(formula):
    def function(points):
        points = points.detach().requires_grad_()
        values = formula(points)
        return values.detach(), torch.autograd.grad(values.sum(), points)[0]

    return function
