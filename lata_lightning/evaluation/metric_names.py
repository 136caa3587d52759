"""Names of the metrics that score a file of rows; torch is not imported, so that the command line starts fast."""

from __future__ import annotations

from typing import Literal, get_args

MetricName = Literal["exact_match", "perplexity", "accuracy"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
