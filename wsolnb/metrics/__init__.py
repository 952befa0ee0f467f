"""Metrics with the published protocols, in NumPy, OpenCV and numba: no model code, and the whole threshold curve.

An accumulator takes one image per `update`. Its `compute` returns a result with a `curve` over thresholds, the best
threshold (an oracle, unless the images are a validation split), and `at(threshold)` for a threshold chosen elsewhere.
"""

from wsolnb.metrics.boxes import PROTOCOLS, TSCAM, WSOLEVALUATION, BoxProtocol, box_iou, boxes_from_score_map
from wsolnb.metrics.curves import ThresholdCurve
from wsolnb.metrics.localization import ERRORS, LocalizationAccuracy, MaxBoxAcc, PxAP, pixel_auc
from wsolnb.metrics.parts import PartCoverage
from wsolnb.metrics.segmentation import SeedScores, SegmentationScores, seed_mask
from wsolnb.metrics.spill import Spill, spill
