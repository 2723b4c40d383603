"""What is on disk: the feature cache, its plan, its commit protocol and its checks. numpy and zarr only; never torch.

Readers and writers go through ``FeatureStore``; the format itself is described in FORMAT.md.
"""

from cache_schema.errors import CacheCorrupt, CacheError, CacheMismatch, CacheMissing, SegmentFailed
from cache_schema.plan import Plan, Segment, Task
from cache_schema.quantize import ChannelScale, TooInexact, calibrate
from cache_schema.report import Missing, TaskReport, VideoStatus
from cache_schema.spec import FeatureSpec
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, write_task

__all__ = [
    "CacheCorrupt",
    "CacheError",
    "CacheMismatch",
    "CacheMissing",
    "ChannelScale",
    "FeatureSpec",
    "FeatureStore",
    "Missing",
    "Plan",
    "Segment",
    "SegmentFailed",
    "SegmentResult",
    "Task",
    "TaskReport",
    "TooInexact",
    "VideoStatus",
    "calibrate",
    "write_task",
]
