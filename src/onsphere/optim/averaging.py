r"""Averages of weights that stay on their spheres: EMA and SWA.

The mean of unit vectors is shorter than 1, and for a weight that is not followed by an exact
normalization (or is, behind an eps) a shorter vector is another function. The point of a sphere
nearest to all of its points in the mean square is the projection of their mean,

.. math:: \bar p = r\,\frac{\sum_t c_t p_t}{\left|\sum_t c_t p_t\right|},

with the weights :math:`c_t` of the average: equal for SWA, geometric for EMA. What is carried from
step to step is the mean itself, not its projection: projecting every time would give the past more
weight the further the points are spread, and the result would depend on their order.

Source: Mardia & Jupp, *Directional Statistics*, 2000, section 9.2 (the mean direction); Izmailov et
al., *Averaging weights leads to wider optima*, 2018 (arXiv 1803.05407), for SWA.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from onsphere.geometry import Sphere
from onsphere.optim.checks.validation import check_sphere
from onsphere.optim.distributed import placement
from onsphere.optim.families import Spheres, families
from onsphere.optim.steps.project import ConstrainedParameters, record
from onsphere.optim.updates.geodesic import center_, spread, total, working_dtype

AverageOne = Callable[[Tensor, Tensor, Tensor | int], Tensor]
AverageMany = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def project_mean(
    means: Sequence[Tensor], sphere: Sphere, radius: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    r"""Return the points of a product of spheres nearest to means of their points.

    .. math:: \bar p = r\,m/|m|

    for each vector :math:`m`, without its mean entry first where the sphere is centred. A mean
    shorter than rounding, as of a point and its antipode, has no direction.

    Args:
        means: one tensor, or those of a joint sphere.
        sphere: which entries form a vector.
        radius: one number per vector; where it is 0 the vector has no sphere (yet), and its mean
            is returned as it is.

    Returns:
        The points, in the means' shapes and precision; the mean resultant length :math:`|m|/r` of
        each vector, 1 where all points agree and 0 where they cancel; and which vectors have a
        direction. Those that have none are returned as zero.

    Example:
        >>> import torch
        >>> from onsphere.geometry import VectorAxes
        >>> mean = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> points, length, sound = project_mean(
        ...     [mean], Sphere(VectorAxes((0,))), torch.full((2,), 2.0))
        >>> points[0], length.tolist(), sound.tolist()
        (tensor([[0., 2.],
                [0., 0.]]), [0.25, 0.0], [True, False])
    """
    points = [mean.to(working_dtype(mean), copy=True) for mean in means]
    views = [sphere.axes.split(point) for point in points]
    if sphere.centered:
        for view, inside in views:
            center_(view, inside)
    square = torch.stack([total(view.double().square(), inside) for view, inside in views]).sum(0)
    norms, at = square.sqrt(), radius.reshape(-1).double()
    known = at > 0
    # Where points cancel, what is left of their sum is rounding of the size of one of them.
    rounding = 4 * torch.finfo(points[0].dtype).eps
    sound = norms.isfinite() & (norms > rounding * at)
    factor = torch.where(known, torch.where(sound, at / norms, 0), 1)
    for view, inside in views:
        scale = spread(factor.to(view.dtype), view, inside)
        view.copy_(torch.where(scale == 0, 0, view * scale))
    length = torch.where(known, norms / at, 0).to(radius.dtype)
    return points, length, sound | ~known


class SphereAveragedModel(AveragedModel):
    r"""``torch.optim.swa_utils.AveragedModel`` whose averages stay on spheres.

    Ordinary parameters and buffers are averaged as there. For weights on spheres the mean is
    carried in at least float32, and the averaged model holds its projection to the radius that the
    vector had when it was first averaged (or the sphere's own). ``update_bn``, ``state_dict`` and
    every averaging function work as there. The mean takes the memory of one more copy of the
    weights on spheres.

    A mean without direction, as of a point and its antipode, leaves the average where it was, and
    so does one that is not finite.

    Args:
        model: the model to average.
        spheres: as :func:`~onsphere.optim.on_sphere` takes them: parameter of ``model`` -> sphere,
            a tuple of parameters -> their joint sphere, or param groups.
        device: where the average is kept.
        avg_fn: as in ``AveragedModel``; equal weights (SWA) without one.
        multi_avg_fn: as in ``AveragedModel``, such as ``get_ema_multi_avg_fn(0.999)``. It is given
            the means in place of the averaged weights, so it must be an average: linear, with
            weights that do not depend on the values.
        use_buffers: average buffers too instead of copying them.

    Raises:
        ValueError: a parameter is not the model's, is given two spheres, or does not fit its own.
        TypeError: ``spheres`` holds something that is not a Sphere.

    Example:
        >>> import torch
        >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
        >>> from onsphere.geometry import VectorAxes
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> rows = {layer.weight: Sphere(VectorAxes((0,)), radius=1.0)}
        >>> ema = SphereAveragedModel(layer, rows, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        >>> for point in ([1.0, 0.0], [0.0, 1.0]):
        ...     _ = layer.weight.data.copy_(torch.tensor([point]))
        ...     ema.update_parameters(layer)
        >>> ema.module.weight.data            # AveragedModel has (0.5, 0.5), of length 0.71
        tensor([[0.7071, 0.7071]])
        >>> ema.concentration
        {'weight': tensor([0.7071])}
    """

    def __init__(
        self,
        model: nn.Module,
        spheres: Spheres,
        device: int | torch.device | None = None,
        avg_fn: AverageOne | None = None,
        multi_avg_fn: AverageMany | None = None,
        use_buffers: bool = False,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("avg_fn and multi_avg_fn are two ways to say one thing; give one")
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        own = list(model.parameters())
        numbers = {param: number for number, param in enumerate(own)}
        taken: set[int] = set()
        self._families: list[tuple[tuple[int, ...], Sphere]] = []
        for params, sphere in families(spheres):
            check_sphere(params, sphere)
            family = tuple(_number(param, numbers, taken) for param in params)
            self._families.append((family, sphere))
            self.register_buffer(
                f"radius_{family[0]}", placement.numbers(params, sphere).to(device)
            )
            for number in family:
                mean = torch.zeros_like(own[number], dtype=working_dtype(own[number]))
                self.register_buffer(f"mean_{number}", mean.detach().to(device))

    @property
    def concentration(self) -> dict[str, Tensor]:
        r"""The mean resultant length :math:`|m|/r` of each vector, by parameter.

        1 where all averaged points agree, 0 where they cancel: how far apart the weights were. Of
        a joint sphere it is given with its first parameter.
        """
        names = [name for name, _ in self.module.named_parameters()]
        return {
            names[family[0]]: project_mean(self._means(family), sphere, self._radius(family))[1]
            for family, sphere in self._families
        }

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        Args:
            model: the trained model, or a wrapper with the same parameters in the same order.
        """
        averaged, trained = list(self.module.parameters()), list(model.parameters())
        own = [number for family, _ in self._families for number in family]
        before = {number: averaged[number].clone() for number in own}
        count = self.n_averaged.clone()
        super().update_parameters(model)
        means = self._means(own)
        points = [trained[n].detach().to(mean) for n, mean in zip(own, means, strict=True)]
        if count == 0:
            before = {number: averaged[number].clone() for number in own}
            torch._foreach_copy_(means, points)
        else:
            self._average(means, points, count)
        found = dict(zip(own, points, strict=True))
        for family, sphere in self._families:
            members = tuple(found[number] for number in family)
            radius = self._radius(family)
            skipped = radius.new_zeros((), dtype=torch.int64)
            record([ConstrainedParameters(members, sphere, radius, skipped)])
            nearest, _, sound = project_mean(self._means(family), sphere, radius)
            for number, point in zip(family, nearest, strict=True):
                view, inside = sphere.axes.split(point)
                stay, _ = sphere.axes.split(before[number].to(point))
                view.copy_(torch.where(spread(sound, view, inside), view, stay))
                averaged[number].copy_(point)

    def _means(self, numbers: Sequence[int]) -> list[Tensor]:
        return [self.get_buffer(f"mean_{number}") for number in numbers]

    def _radius(self, family: tuple[int, ...]) -> Tensor:
        return self.get_buffer(f"radius_{family[0]}")

    def _average(self, means: list[Tensor], points: list[Tensor], count: Tensor) -> None:
        if self.avg_fn is not None:
            for mean, point in zip(means, points, strict=True):
                mean.copy_(self.avg_fn(mean, point, count.to(mean.device)))
            return
        if self.multi_avg_fn is None:
            # Not torch's function for this, whose share is a float32 whatever the weights are.
            torch._foreach_lerp_(means, points, 1 / (int(count) + 1))
            return
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for number, mean in enumerate(means):
            alike.setdefault((mean.device, mean.dtype), []).append(number)
        for (device, _), some in alike.items():
            of_means, of_points = ([x[n] for n in some] for x in (means, points))
            self.multi_avg_fn(of_means, of_points, count.to(device))


def _number(param: Tensor, numbers: dict[nn.Parameter, int], taken: set[int]) -> int:
    """Find a parameter in the model, once."""
    number = numbers.get(param)  # type: ignore[call-overload]
    shape = tuple(param.shape)
    if number is None:
        raise ValueError(
            f"a parameter of shape {shape} is given a sphere but is not the model's; give the "
            "spheres of this very model"
        )
    if number in taken:
        raise ValueError(f"a parameter of shape {shape} is given two spheres; a parameter has one")
    taken.add(number)
    return number
