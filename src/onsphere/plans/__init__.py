"""Plans: what a run will do to weights on spheres, and whether one that was made did it."""

from onsphere.plans.code import command_of, recipe_code
from onsphere.plans.comparison import LayerComparison, compare
from onsphere.plans.motion import Motion, Path, follow
from onsphere.plans.plan import Dependence, Plan, plan
from onsphere.plans.schedule import PlanError, Schedule

__all__ = [
    "Dependence",
    "LayerComparison",
    "Motion",
    "Path",
    "Plan",
    "PlanError",
    "Schedule",
    "command_of",
    "compare",
    "follow",
    "plan",
    "recipe_code",
]
