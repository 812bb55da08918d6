"""Warnings point to the line of the user who can do something about them."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import onsphere as osp
from onsphere.geometry import Sphere


def without_spheres():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return net, osp.audit(net, torch.ones(2, 3)), torch.optim.SGD(net.parameters(), lr=0.1)


def _recipe():
    recipe = osp.sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, steps=300)
    return recipe, [{"params": [nn.Parameter(torch.ones(2, 3))], "sphere": Sphere()}]


WAYS = {
    "groups": lambda net, audit, _: audit.param_groups(net),
    "spheres": lambda net, audit, _: audit.spheres_of(net),
    "monitor": lambda net, audit, optimizer: osp.Monitor(net, optimizer, audit),
    "on_sphere": lambda _, audit, optimizer: osp.optim.on_sphere(optimizer, audit),
    "radius": lambda net, audit, _: osp.canonicalize(net, audit, radius="unit"),
    "recipe": lambda *_: _recipe()[0].groups(_recipe()[1]),
    "plain recipe": lambda *_: _recipe()[0].plain_groups(_recipe()[1]),
    "no sphere": lambda net, *_: _recipe()[0].groups([{"params": [*net.parameters()]}]),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_warning_points_here(way):
    given = without_spheres()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way(*given)
    assert [Path(one.filename).name for one in said] == [Path(__file__).name]
