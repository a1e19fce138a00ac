"""The edge's processor, shared by all turns of a node.

`fair` decides which job goes next (pure); `thread` runs the jobs, one step at a time.
"""

from segue_edge.compute.fair import Priority
from segue_edge.compute.thread import ComputeThread, Job, Load

__all__ = ["ComputeThread", "Job", "Load", "Priority"]
