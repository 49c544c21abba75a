"""Training data: photographs, pairs or shards in, samples by global index out.

data = open_training_set(folder, data_format="auto", crop=512, ...)
loader = DataLoader(data, batch_sampler=StepBatches(...), collate_fn=collate, worker_init_fn=worker_init)
"""

from __future__ import annotations

from .batches import Batch, Sample, StepBatches, collate, worker_init
from .dataset import (
    BrokenPictureWarning,
    TrainingSet,
    ValidationSet,
    open_training_set,
    open_validation_set,
)
from .device import degraded
from .pictures import DataError, Skipped

__all__ = [
    "Batch",
    "BrokenPictureWarning",
    "DataError",
    "Sample",
    "Skipped",
    "StepBatches",
    "TrainingSet",
    "ValidationSet",
    "collate",
    "degraded",
    "open_training_set",
    "open_validation_set",
    "worker_init",
]
