"""Watch a training: norms and rotations of weights on spheres, beside what the laws expect."""

from onsphere.monitor.flags import Thresholds
from onsphere.monitor.html import to_html
from onsphere.monitor.layers import MonitorError
from onsphere.monitor.monitor import Monitor
from onsphere.monitor.run import Flag, Run, RunError, Sample
from onsphere.monitor.tensorboard import ScalarWriter

__all__ = [
    "Flag",
    "Monitor",
    "MonitorError",
    "Run",
    "RunError",
    "Sample",
    "ScalarWriter",
    "Thresholds",
    "to_html",
]
