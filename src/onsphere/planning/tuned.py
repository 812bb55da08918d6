r"""A tuned optimizer's settings as a recipe for the sphere.

Source: Kosson et al., 2023 (arXiv 2305.17212), for rotation as what a recipe sets.
"""

import math

from onsphere.dynamics.optimizers import OPTIMIZERS, RecipeError, Vector, settings_of
from onsphere.planning.recipe import SphereRecipe

_WITHOUT_A_RECIPE = {
    "adam": "Adam with its decay in the gradient (L2) turns each weight by an angle that depends "
    "on the size of its gradient, so no one rotation matches it; tune AdamW and move that, or see "
    "onsphere.dynamics.adam_l2_equilibrium"
}


def sphere_recipe(
    method: str,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    momentum: float | None = None,
    dampening: float | None = None,
    nesterov: bool | None = None,
    decoupled: bool | None = None,
    shape: tuple[int, int] | None = None,
    steps: int | None = None,
    initial_norm_ratio: float | None = None,
) -> SphereRecipe:
    r"""Say what a tuned recipe does to weights on spheres, ready for the sphere optimizers.

    .. math:: \theta \approx \sqrt{2\eta\lambda\,\frac{1-\beta}{1+\beta}}\ \text{(AdamW)}, \qquad
              \theta \approx \sqrt{\frac{2\eta\lambda}{1+\alpha}}\ \text{(SGD as PyTorch has it)},

    with :math:`1+\alpha` replaced by :math:`(1+\alpha)/(1+2\alpha-2\alpha^3)` for Nesterov's
    momentum; Lion and Muon as :mod:`onsphere.dynamics.equilibrium` has them. The laws take
    gradients for noise: networks turned 3% (SGD), 6 to 9% (AdamW) and 13 to 24% (Lion) less.

    Args:
        method: ``"adamw"``, ``"sgd"``, ``"lion"`` or ``"muon"``.
        lr: the tuned learning rate :math:`\eta`, at the top of its schedule.
        weight_decay: the tuned decay :math:`\lambda`: for SGD coupled, as in ``torch.optim.SGD``,
            else decoupled.
        betas: of AdamW (0.9, 0.999) and Lion (0.9, 0.99).
        momentum: :math:`\alpha`, of SGD (0) and Muon (0.95).
        dampening: of SGD (0).
        nesterov: of SGD (no) and Muon (yes).
        decoupled: of SGD (no): the decay shrinks the weight directly.
        shape: of Muon: rows and columns of the weights; square ones turn 16% faster than thin ones (so
            each shape has a recipe of its own). Without it, that of long thin matrices.
        steps: how long the run lasts. A run of few relaxation times does not get to the
            equilibrium; with its length the recipe turns by what the tuned run would on average,
            and its schedules follow that run.
        initial_norm_ratio: the norm at the start in units of the equilibrium's (``osp.plan`` and
            ``osp.Monitor`` tell). AdamW and Lion do without: for them the weights say it.

    Returns:
        The recipe.

    Raises:
        RecipeError: an unknown method, an option that it does not have or out of its range, no
            weight decay.

    Example:
        >>> recipe = sphere_recipe("adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        >>> print(recipe)
        adamw(lr=0.001, weight_decay=0.1, betas=(0.9, 0.95)): turns by 0.00324 radians per step, settles in some 5,000 steps

    Source: Kosson et al., 2023 (arXiv 2305.17212), and the derivations of
    :mod:`onsphere.dynamics.equilibrium`.
    """  # noqa: E501
    method = str(method).lower()
    if method in _WITHOUT_A_RECIPE:
        raise RecipeError(_WITHOUT_A_RECIPE[method])
    for name, value in (("steps", steps), ("initial_norm_ratio", initial_norm_ratio)):
        if value is not None and not 0 < value < math.inf:
            raise RecipeError(f"{name} is positive and finite, got {value}")
    if initial_norm_ratio is not None and steps is None:
        raise RecipeError(
            "initial_norm_ratio says what a run does before it settles; give its steps, too"
        )
    given = {
        "betas": betas,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "decoupled": decoupled,
        "shape": shape,
    }
    settings = settings_of(method, lr, weight_decay, given)
    if lr == 0 or weight_decay == 0:
        raise RecipeError(
            f"lr={lr:g} with weight_decay={weight_decay:g} has no equilibrium: without decay the "
            "norm grows and the rotation falls as long as the run lasts. Choose the rotation "
            'yourself: lr_mode="angle"'
        )
    try:
        equilibrium = OPTIMIZERS[method].equilibrium(
            float(lr), float(weight_decay), Vector(), settings
        )
    except ValueError as error:
        raise RecipeError(str(error)) from None
    keywords = {"lr": float(lr), "weight_decay": float(weight_decay), **settings}
    keywords.pop("shape", None)
    if keywords.pop("decoupled", False):
        # Coupled decay comes out of the momentum buffer larger by 1 / (1 - momentum).
        keywords["weight_decay"] *= 1 - keywords["momentum"]
    return SphereRecipe(method, equilibrium, keywords, steps, initial_norm_ratio)
