"""Plans: what a run will do to weights on spheres, and whether one that was made did it."""

from onsphere.dynamics.schedule import PlanError, Schedule
from onsphere.planning.codegen import command_of, recipe_code
from onsphere.planning.compare import LayerComparison, compare
from onsphere.planning.plan import Dependence, Plan, plan
from onsphere.planning.trajectory import Motion, Path, follow

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
