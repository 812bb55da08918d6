"""Watch a training: norms and rotations of weights on spheres, beside what the laws expect."""

from onsphere.monitor.flags import Thresholds
from onsphere.monitor.monitor import Monitor, ScalarWriter
from onsphere.monitor.page import to_html
from onsphere.monitor.watched import WatchError

__all__ = ["Monitor", "ScalarWriter", "Thresholds", "WatchError", "to_html"]
