"""The networks of the studies by name, and what each of them can be asked."""

from collections.abc import Callable
from dataclasses import dataclass

from onsphere.errors import OnsphereError, nearest
from onsphere.studies.setup import vit
from onsphere.studies.setup.network import STUDIED, Network, SmallConvNet
from onsphere.studies.setup.resnet import ResNet20


@dataclass(frozen=True)
class Architecture:
    """One kind of network.

    Args:
        build: makes one, from a method's key, the images and ``width``, ``seed`` and ``eps``.
        title: as a report calls it.
        methods: the methods that make sense in it.
        width: the width it is studied at; ``None`` for that of the study's size.
        own_spheres: whether every hidden weight lives on spheres of its own, under every method.
            Some claims speak of nothing else.
        stacks: whether several can be trained in one stack.
        cost: rough seconds of a step on one core, for 64 images of 8 x 8 pixels.
    """

    build: Callable[..., Network]
    title: str
    methods: tuple[str, ...] = STUDIED
    width: int | None = None
    own_spheres: bool = True
    stacks: bool = False
    cost: float = 0.0017


ARCHITECTURES: dict[str, Architecture] = {
    "small": Architecture(SmallConvNet, "a small convolutional network", stacks=True),
    "resnet20": Architecture(ResNet20, "a ResNet-20", width=16, cost=0.03),
    "vit-tiny": Architecture(
        vit.TinyViT,
        "a small vision transformer",
        methods=vit.METHODS,
        width=64,
        own_spheres=False,
        cost=0.05,
    ),
}
"""Every network by its name on the command line; ``small`` is the default."""


def architecture(name: str) -> Architecture:
    """Look a network up.

    Raises:
        OnsphereError: there is no such network.
    """
    if name not in ARCHITECTURES:
        raise OnsphereError(f"unknown network {name!r}{nearest(name, list(ARCHITECTURES))}")
    return ARCHITECTURES[name]
