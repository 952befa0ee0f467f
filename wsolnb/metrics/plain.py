"""The protocols in their obvious form, threshold by threshold and image by image; the tests compare with it."""

import cv2
import numpy as np

EMPTY = {"wsolevaluation": [0, 0, 0, 0], "tscam": [0, 0, 1, 1], "scm": [0, 0, 0, 0]}


def boxes(score_map, threshold, multi=False, protocol="wsolevaluation"):
    """List of boxes [x0, y0, x1, y1] at one threshold, from OpenCV."""
    height, width = score_map.shape
    grey = (score_map * 255).astype(np.uint8)
    kind = cv2.THRESH_TOZERO if protocol == "tscam" else cv2.THRESH_BINARY
    _, foreground = cv2.threshold(grey, int(threshold * np.max(grey)), 255, kind)
    contours, _ = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 0:
        return [EMPTY[protocol]]
    if not multi:
        contours = [max(contours, key=cv2.contourArea)]
    found = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        x1, y1 = x + w, y + h
        if protocol != "tscam":
            x1, y1 = min(x1, width - 1), min(y1, height - 1)
        found.append([x, y, x1, y1])
    return found


def overlap(a, b):
    """(intersection, area of a, area of b) of two boxes with inclusive ends."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inter = max(0, width) * max(0, height)
    return inter, (a[2] - a[0] + 1) * (a[3] - a[1] + 1), (b[2] - b[0] + 1) * (b[3] - b[1] + 1)


def iou(a, b):
    """IoU of two boxes with inclusive ends."""
    inter, area_a, area_b = overlap(a, b)
    return inter / (area_a + area_b - inter)


def truth(gt_boxes, size, protocol):
    """True boxes as the protocol sees them: clipped for `tscam`, truncated but for `scm`."""
    height, width = size
    if protocol == "tscam":
        last = [width - 1, height - 1] * 2
        gt_boxes = [[min(max(v, 0), end) for v, end in zip(box, last, strict=True)] for box in gt_boxes]
    return [[v if protocol == "scm" else int(v) for v in box] for box in gt_boxes]


def best_iou(score_map, gt_boxes, threshold, multi=False, protocol="wsolevaluation"):
    """Largest IoU of any predicted with any true box at one threshold."""
    gt = truth(gt_boxes, score_map.shape, protocol)
    return max(iou(a, b) for a in boxes(score_map, threshold, multi, protocol) for b in gt)


def error(score_map, gt_boxes, threshold, protocol="tscam"):
    """The kind of error of a well classified image, "" if it is well localized."""
    gt = truth(gt_boxes, score_map.shape, protocol)
    (box,) = boxes(score_map, threshold, False, protocol)
    ious = [iou(box, b) for b in gt]
    if max(ious) > 0.5:
        return ""
    covered = []
    for b in gt:
        inter, _, area = overlap(box, b)
        covered.append(inter / area)
    if len(gt) > 1 and sum(c > 0.3 for c in covered) > 1:
        return "several_instances"
    nearest = ious.index(max(ious))
    inter, area, _ = overlap(box, gt[nearest])
    if inter / area > 0.5:
        return "part"
    return "more" if covered[nearest] >= 0.7 else "other"
