"""Plans: what a run will do to weights on spheres, and whether one that was made did it."""

from onsphere.dynamics.schedule import PlanError, Schedule
from onsphere.planning.compare import LayerComparison, compare
from onsphere.planning.plan import Plan, plan

__all__ = [
    "LayerComparison",
    "Plan",
    "PlanError",
    "Schedule",
    "compare",
    "plan",
]
