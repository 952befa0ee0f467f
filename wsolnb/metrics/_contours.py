"""Bounding boxes of the contours of every grey level of a map, from one pass over its pixels.

`cv2.findContours` looks at one foreground at a time. The foregrounds `grey > level` of one map are nested, so what
changes from one level to the next is little: here the pixels are sorted by grey level and joined to components one by
one (union-find, as in a component tree), and each level's boxes are read off on the way. The facts about OpenCV's
contours (`RETR_TREE`) that make the result equal, box for box:

* An outer contour belongs to an 8-connected component of the foreground; its rectangle is the component's.
* A hole contour belongs to a 4-connected component of the background that does not reach the frame around the image;
  its rectangle is the hole's, grown by one pixel, since the contour runs on the foreground pixels around it.
* `cv2.contourArea` of an outer contour is that of the polygon through pixel centres, holes filled: each 2x2 block of
  pixels adds 1 when its four pixels are inside and 1/2 when three are. It is additive, so it can be kept per component.
* Contours are met in raster order of the first pixel of their component or hole. The list is the tree of contours,
  parent before children, siblings in reverse of the order they were met in. A contour inside another never has a
  larger area, so the first largest one is an outermost one: of equal ones, that with the last first pixel.

Filling the holes of all levels at once is a morphological reconstruction of the map from its frame (`_fill_holes`).

Throughout: `v` is a map with a one-pixel frame of zeros, and 0 is never foreground; positions `p` are flat indices into
it; `x` and `y` count from 1. Boxes that leave the module are half-open, `x, y, x + w, y + h`, and count from 0.
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit

_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""(dy, dx) of the eight neighbours, clockwise from the upper left; bit `i` of a neighbourhood stands for entry `i`."""

_AREA, _X0, _X1, _Y1, _FIRST, _SIZE = range(6)
"""Columns of a component's statistics: area in half pixels, extent, first pixel in raster order, components joined."""


def _tables(connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate what adding a pixel does, for each of the 256 sets of neighbours that are already there.

    Returns table (256,), packed: bits 0-2 how many locally unconnected groups the neighbours form, bits 3-5 half pixels
    by which the contour area grows, then three bits each the ring position of one neighbour per group; and
    euler (256,): change of components minus holes.
    """
    table, euler = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for bits in range(256):
        present = [i for i in range(8) if bits >> i & 1]
        group = {i: i for i in present}
        for _ in present:  # labels spread by at least one neighbour per round
            for i in present:
                for j in present:
                    dy, dx = abs(_RING[i][0] - _RING[j][0]), abs(_RING[i][1] - _RING[j][1])
                    if max(dy, dx) == 1 if connectivity == 8 else dy + dx == 1:
                        group[i] = group[j] = min(group[i], group[j])
        touching = [i for i in present if connectivity == 8 or i % 2]  # odd ring positions share an edge
        members = list({group[i]: i for i in touching}.values())
        # Of the four 2x2 blocks at the pixel, each with two or three other pixels there gains half a pixel of area.
        area = sum(sum(bits >> (i % 8) & 1 for i in (c - 1, c, c + 1)) >= 2 for c in (0, 2, 4, 6))
        table[bits] = len(members) | area << 3 | sum(i << 6 + 3 * k for k, i in enumerate(members))
        closed = all(bits >> i & 1 for i in (1, 3, 5, 7))  # the pixel was a hole
        euler[bits] = 1 if closed else 1 - len(members)
    return table, euler


_FOREGROUND = _tables(8)
_BACKGROUND = _tables(4)


@njit(cache=True)
def _flow(row, floor, beside, changed):
    """Set a row to max(floor, min(row, beside)) and mark the columns where that changes it (vectorizes)."""
    for x in range(row.size):
        old = row[x]
        new = beside[x] if beside[x] < old else old
        new = floor[x] if floor[x] > new else new
        row[x] = new
        changed[x] |= old ^ new


@njit(cache=True)
def _sweep(filled, v):
    """Let values flow down all columns, then up. Return whether any changed."""
    changed = np.zeros(v.shape[1], np.uint8)
    for y in range(1, v.shape[0] - 1):
        _flow(filled[y], v[y], filled[y - 1], changed)
    for y in range(v.shape[0] - 2, 0, -1):
        _flow(filled[y], v[y], filled[y + 1], changed)
    return changed.any()


@njit(cache=True)
def _settle(filled, v):
    """Let values flow along any path until none changes; each pixel waits in the queue at most once."""
    height, width = v.shape
    low, high = v.ravel(), filled.ravel()
    queue = np.empty(v.size, np.int64)
    waits = np.zeros(v.size, np.uint8)
    head = tail = waiting = 0
    for y in range(1, height - 1):
        for p in range(y * width + 1, (y + 1) * width - 1):
            least = min(min(high[p - width], high[p + width]), min(high[p - 1], high[p + 1]))
            if high[p] > least and high[p] > low[p]:
                high[p] = max(low[p], least)
                queue[waiting] = p
                waits[p] = 1
                waiting += 1
    tail = waiting
    while waiting:
        p = queue[head]
        head = head + 1 if head + 1 < v.size else 0
        waiting -= 1
        waits[p] = 0
        for q in (p - width, p - 1, p + 1, p + width):
            new = max(low[q], high[p])
            if high[q] > new:
                high[q] = new
                if not waits[q]:
                    queue[tail] = q
                    tail = tail + 1 if tail + 1 < v.size else 0
                    waits[q] = 1
                    waiting += 1


def _fill_holes(v: np.ndarray) -> np.ndarray:
    """Return the map whose foreground at every level is that of `v` with its holes filled.

    The value of a pixel becomes the least height over which a 4-connected path leads to the frame. Where the paths
    have few turns, a few rounds of sweeps find them; the queue finds the others.
    """
    filled = np.zeros_like(v)
    filled[1:-1, 1:-1] = 255
    across = cv2.transpose(v)
    for _ in range(8):
        down = _sweep(filled, v)
        turned = cv2.transpose(filled)
        if not _sweep(turned, across) and not down:
            return filled
        filled = cv2.transpose(turned)
    _settle(filled, v)
    return filled


@njit(cache=True)
def _earlier_neighbours(v):
    """Return for each pixel the set of its neighbours that precede it in the order of `_sort`, as bits (vectorizes)."""
    height, width = v.shape
    earlier = np.zeros_like(v)
    zero = np.uint8(0)
    for y in range(1, height - 1):
        above, row, below, out = v[y - 1], v[y], v[y + 1], earlier[y]
        for x in range(1, width - 1):
            here = row[x]
            out[x] = (
                (np.uint8(1) if above[x - 1] >= here else zero)
                | (np.uint8(2) if above[x] >= here else zero)
                | (np.uint8(4) if above[x + 1] >= here else zero)
                | (np.uint8(8) if row[x + 1] > here else zero)
                | (np.uint8(16) if below[x + 1] > here else zero)
                | (np.uint8(32) if below[x] > here else zero)
                | (np.uint8(64) if below[x - 1] > here else zero)
                | (np.uint8(128) if row[x - 1] >= here else zero)
            )
    return earlier


@njit(cache=True)
def _tally(v, earlier, euler):
    """Return per grey level: pixels (256,), and components minus holes of the foreground above it (256,)."""
    height, width = v.shape
    pixels = np.zeros(256, np.int64)
    balance = np.zeros(256, np.int64)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            pixels[v[y, x]] += 1
            balance[v[y, x]] += euler[earlier[y, x]]
    above = np.zeros(256, np.int64)
    for level in range(254, -1, -1):
        above[level] = above[level + 1] + balance[level + 1]
    return pixels, above


@njit(cache=True)
def _sort(v, pixels, floor):
    """Sort the pixels above `floor`: descending grey level, then raster order.

    Returns order: packed `y << 32 | x`; start (257,): the pixels of grey level g are order[start[g + 1]:start[g]].
    """
    height, width = v.shape
    start = np.zeros(257, np.int64)
    for g in range(255, -1, -1):
        start[g] = start[g + 1] + (pixels[g] if g > floor else 0)
    order = np.empty(start[0], np.int64)
    place = start[1:].copy()
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            g = v[y, x]
            if g > floor:
                order[place[g]] = (y << 32) | x
                place[g] += 1
    return order, start


@njit(cache=True)
def _join(order, begin, end, g, earlier, table, label, parent, joined, stats, count):
    """Add the pixels order[begin:end], all of value `g`, to the components; return the number of components so far.

    label (H * W,): a component of each pixel; parent, joined (n,): the component that took it in and at which value
    (-1 while it stands); stats (n, 6). Smaller components are joined to larger ones and paths are left as they are, so
    the component at any earlier value can be looked up later.
    """
    width = earlier.shape[1]
    bits = earlier.ravel()
    offset = np.array((-width - 1, -width, -width + 1, 1, width + 1, width, width - 1, -1))
    for i in range(begin, end):
        y, x = order[i] >> 32, order[i] & 0xFFFFFFFF
        p = y * width + x
        entry = table[bits[np.uintp(p)]]
        groups = entry & 7
        if groups == 0:
            c = count
            count += 1
            label[p], parent[c], joined[c] = c, c, -1
            stats[c, _AREA], stats[c, _SIZE], stats[c, _FIRST] = 0, 1, p
            stats[c, _X0], stats[c, _X1], stats[c, _Y1] = x, x, y
            continue
        c = np.uintp(label[np.uintp(p + offset[entry >> 6 & 7])])
        while parent[c] != c:
            c = np.uintp(parent[c])
        for k in range(1, groups):
            d = np.uintp(label[np.uintp(p + offset[entry >> 6 + 3 * k & 7])])
            while parent[d] != d:
                d = np.uintp(parent[d])
            if c == d:
                continue
            if stats[c, _SIZE] < stats[d, _SIZE]:
                c, d = d, c
            parent[d], joined[d] = c, g
            stats[c, _AREA] += stats[d, _AREA]
            stats[c, _SIZE] += stats[d, _SIZE]
            stats[c, _X0] = min(stats[c, _X0], stats[d, _X0])
            stats[c, _X1] = max(stats[c, _X1], stats[d, _X1])
            stats[c, _Y1] = max(stats[c, _Y1], stats[d, _Y1])
            stats[c, _FIRST] = min(stats[c, _FIRST], stats[d, _FIRST])
        label[np.uintp(p)] = c
        stats[c, _AREA] += entry >> 3 & 7
        if stats[c, _X0] > x:
            stats[c, _X0] = x
        if stats[c, _X1] < x:
            stats[c, _X1] = x
        if stats[c, _Y1] < y:
            stats[c, _Y1] = y
        if stats[c, _FIRST] > p:
            stats[c, _FIRST] = p
    return count


@njit(cache=True)
def _components(positions, most):
    """Allocate the arrays of up to `most` components: label, parent, joined, alive, stats (untouched, so free)."""
    label = np.empty(positions, np.int32)
    parent, joined, alive = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    return label, parent, joined, alive, np.empty((most, 6), np.int32)


@njit(cache=True)
def _standing(alive, n, known, count, parent):
    """Drop joined components from alive[:n], append the new ones known..count that stand; return the new length."""
    kept = 0
    for i in range(n):
        if parent[alive[i]] == alive[i]:
            alive[kept] = alive[i]
            kept += 1
    for c in range(known, count):
        if parent[c] == c:
            alive[kept] = c
            kept += 1
    return kept


@njit(cache=True)
def _extents(v, levels, n, boxes):
    """Write the boxes of the whole foreground at the first `n` of the ascending levels to `boxes` (n or more, 4)."""
    height, width = v.shape
    columns = np.zeros(width, np.uint8)
    rows = np.zeros(height, np.uint8)
    for y in range(1, height - 1):
        row = v[y]
        peak = np.uint8(0)
        for x in range(1, width - 1):
            columns[x] = max(columns[x], row[x])
            peak = max(peak, row[x])
        rows[y] = peak
    x0 = y0 = 0
    x1, y1 = width - 1, height - 1
    for i in range(n):
        while columns[x0] <= levels[i]:
            x0 += 1
        while columns[x1] <= levels[i]:
            x1 -= 1
        while rows[y0] <= levels[i]:
            y0 += 1
        while rows[y1] <= levels[i]:
            y1 -= 1
        boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3] = x0 - 1, y0 - 1, x1, y1


@njit(cache=True)
def _largest(v, levels, tables):
    """Return the rectangle (n, 4) of each ascending level's first contour with the largest area; `v` has no holes."""
    table, euler = tables
    width = v.shape[1]
    earlier = _earlier_neighbours(v)
    pixels, above = _tally(v, earlier, euler)
    simple = 0  # up to here the foreground is a single component, and needs no search
    while simple < levels.size and above[levels[simple]] == 1:
        simple += 1
    boxes = np.empty((levels.size, 4), np.int32)
    _extents(v, levels, simple, boxes)
    if simple == levels.size:
        return boxes

    order, start = _sort(v, pixels, levels[simple])
    label, parent, joined, alive, stats = _components(v.size, order.size)
    count = known = n = 0
    g = 255
    for i in range(levels.size - 1, simple - 1, -1):
        while g > levels[i]:
            count = _join(order, start[g + 1], start[g], g, earlier, table, label, parent, joined, stats, count)
            g -= 1
        n = _standing(alive, n, known, count, parent)
        known = count
        best = alive[0]
        for k in range(1, n):
            c = alive[k]
            if stats[c, _AREA] > stats[best, _AREA] or (
                stats[c, _AREA] == stats[best, _AREA] and stats[c, _FIRST] > stats[best, _FIRST]
            ):
                best = c
        boxes[i, 0], boxes[i, 1] = stats[best, _X0] - 1, stats[best, _FIRST] // width - 1
        boxes[i, 2], boxes[i, 3] = stats[best, _X1], stats[best, _Y1]
    return boxes


@njit(cache=True)
def _more_room(table, rows):
    """Return `table` (n, columns), or a copy at least twice as long when it has fewer than `rows` rows."""
    if rows <= table.shape[0]:
        return table
    longer = np.empty((max(rows, 2 * table.shape[0]), table.shape[1]), table.dtype)
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            longer[i, j] = table[i, j]
    return longer


@njit(cache=True)
def _holes(v, filled, levels, tables):
    """Find the holes of every level.

    Returns found (m, 6): x0, y0, x1, y1 of the contour, first pixel, component; begin (n + 1,): the holes of level i
    are found[begin[i]:begin[i + 1]]; label, parent, joined: by which the hole of a pixel at a level is looked up.
    """
    table, euler = tables
    height, width = v.shape
    # A pixel is in a hole at the levels from its own value to below its filled value. Holes grow with the level.
    inverse = np.zeros_like(v)
    for y in range(height):
        for x in range(width):
            if filled[y, x] > v[y, x]:
                inverse[y, x] = 255 - v[y, x]
    earlier = _earlier_neighbours(inverse)
    pixels, _ = _tally(inverse, earlier, euler)
    order, start = _sort(inverse, pixels, 0)
    label, parent, joined, alive, stats = _components(v.size, order.size)
    opens = filled.ravel()
    found = np.empty((64, 6), np.int32)
    begin = np.zeros(levels.size + 1, np.int64)
    count = known = n = m = 0
    g = 255
    for i in range(levels.size):
        while g >= 255 - levels[i]:
            count = _join(order, start[g + 1], start[g], g, earlier, table, label, parent, joined, stats, count)
            g -= 1
        standing = _standing(alive, n, known, count, parent)
        known = count
        found = _more_room(found, m + standing)
        n = 0
        for k in range(standing):
            c = alive[k]
            first = stats[c, _FIRST]
            if opens[first] <= levels[i]:
                continue  # it has opened to the frame, for good
            alive[n] = c
            n += 1
            found[m, 0], found[m, 1] = stats[c, _X0] - 2, first // width - 2
            found[m, 2], found[m, 3] = stats[c, _X1] + 1, stats[c, _Y1] + 1
            found[m, 4], found[m, 5] = first, c
            m += 1
        begin[i + 1] = m
    return found, begin, label, parent, joined


@njit(cache=True)
def _listed(first, inside):
    """Return the contours 1..n as OpenCV lists them: parent first, siblings in reverse of the order they are met in.

    first, inside (n + 1,): first pixel of each and the contour around it; entry 0 is the frame (first pixel -1).
    """
    if first.size == 2:
        return np.ones(1, np.int64)
    child = np.zeros(first.size, np.int64)
    sibling = np.zeros(first.size, np.int64)
    for k in np.argsort(first)[1:]:
        sibling[k] = child[inside[k]]
        child[inside[k]] = k
    listed = np.empty(first.size - 1, np.int64)
    k = child[0]
    for i in range(listed.size):
        listed[i] = k
        if child[k]:
            k = child[k]
        else:
            while k and not sibling[k]:
                k = inside[k]
            k = sibling[k]
    return listed


@njit(cache=True)
def _every(v, filled, levels, tables, hole_tables):
    """Return the rectangles of all contours of each ascending level: boxes (m, 4), begin (n,), size (n,)."""
    table, euler = tables
    width = v.shape[1]
    holes, hole_begin, hole_label, hole_parent, hole_joined = _holes(v, filled, levels, hole_tables)
    earlier = _earlier_neighbours(v)
    pixels, above = _tally(v, earlier, euler)
    simple = 0
    while simple < levels.size and above[levels[simple]] + hole_begin[simple + 1] - hole_begin[simple] == 1:
        simple += 1
    whole = np.empty((simple, 4), np.int32)
    _extents(v, levels, simple, whole)
    order, start = _sort(v, pixels, levels[simple] if simple < levels.size else 255)
    label, parent, joined, alive, stats = _components(v.size, order.size)

    boxes = np.empty((levels.size + hole_begin[-1], 4), np.int32)
    begin = np.empty(levels.size, np.int64)
    size = np.empty(levels.size, np.int64)
    place = np.empty(v.size, np.int32)  # of a component or hole, among the contours of the level
    hole_place = np.empty(v.size, np.int32)
    outside = filled.ravel()
    count = known = n = m = 0
    g = 255
    for i in range(levels.size - 1, -1, -1):
        level = levels[i]
        n_holes = hole_begin[i + 1] - hole_begin[i]
        own = holes[hole_begin[i] : hole_begin[i + 1]]
        if i < simple:
            n = 1
        else:
            while g > level:
                count = _join(order, start[g + 1], start[g], g, earlier, table, label, parent, joined, stats, count)
                g -= 1
            n = _standing(alive, n, known, count, parent)
            known = count
        first = np.empty(1 + n + n_holes, np.int64)
        inside = np.zeros(1 + n + n_holes, np.int64)
        first[0] = -1
        for k in range(n_holes):
            first[1 + n + k] = own[k, 4]
            hole_place[own[k, 5]] = 1 + n + k
        if i < simple:
            first[1] = 0
            inside[2:] = 1
        else:
            for k in range(n):
                c = alive[k]
                place[c] = 1 + k
                first[1 + k] = stats[c, _FIRST]
                beside = stats[c, _FIRST] - 1
                if outside[beside] > level:
                    c = hole_label[beside]
                    while hole_parent[c] != c and 255 - hole_joined[c] <= level:
                        c = hole_parent[c]
                    inside[1 + k] = hole_place[c]
            for k in range(n_holes):
                c = label[own[k, 4] - width]
                while parent[c] != c:
                    c = parent[c]
                inside[1 + n + k] = place[c]
        begin[i], size[i] = m, n + n_holes
        boxes = _more_room(boxes, m + n + n_holes)
        for k in _listed(first, inside):
            if k > n:
                for j in range(4):
                    boxes[m, j] = own[k - n - 1, j]
            elif i < simple:
                for j in range(4):
                    boxes[m, j] = whole[i, j]
            else:
                c = alive[k - 1]
                boxes[m, 0], boxes[m, 1] = stats[c, _X0] - 1, stats[c, _FIRST] // width - 1
                boxes[m, 2], boxes[m, 3] = stats[c, _X1], stats[c, _Y1]
            m += 1
    return boxes[:m], begin, size


def _framed(grey: np.ndarray) -> np.ndarray:
    """Return `grey` with a frame of zeros one pixel wide."""
    framed = np.zeros((grey.shape[0] + 2, grey.shape[1] + 2), np.uint8)
    framed[1:-1, 1:-1] = grey
    return framed


def largest_boxes(grey: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return, for each level, the rectangle of the largest contour of the foreground `grey > level`.

    grey: (H, W) uint8; levels: (n,) int64, ascending, all below the maximum of `grey`, so that there is a foreground.
    Returns (n, 4) int32, half-open. Of equally large contours the one that OpenCV lists first.
    """
    return _largest(_fill_holes(_framed(grey)), levels, _FOREGROUND)


def all_boxes(grey: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each level, the rectangles of all contours of the foreground `grey > level`, holes included.

    Arguments as for `largest_boxes`. Returns boxes (m, 4) int32, half-open, begin (n,) and size (n,): those of level i
    are boxes[begin[i]:begin[i] + size[i]], in OpenCV's order.
    """
    v = _framed(grey)
    return _every(v, _fill_holes(v), levels, _FOREGROUND, _BACKGROUND)
