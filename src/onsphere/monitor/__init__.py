"""Watch a training: norms and rotations of weights on spheres, beside what the laws expect."""

from onsphere.monitor.flags import Thresholds
from onsphere.monitor.layers import MonitorError
from onsphere.monitor.monitor import Monitor
from onsphere.monitor.rendering.html import to_html
from onsphere.monitor.rendering.tensorboard import ScalarWriter
from onsphere.monitor.run import Flag, Run, RunError, Sample

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
