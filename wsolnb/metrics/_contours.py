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
it; `x` and `y` count from 1. Boxes are half-open, `x, y, x + w, y + h`, and count from 0.
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit

_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""(dy, dx) of the eight neighbours, clockwise from the upper left; bit `i` of a neighbourhood stands for entry `i`."""

_AREA, _SIZE, _X0, _X1, _Y1, _FIRST, _INTO, _AT = range(8)
"""Columns of components: area in half pixels, components joined, extent, first pixel in raster order; the component
that took this one in, and at which value (-1 while it stands)."""


def _table(connectivity: int) -> np.ndarray:
    """Tabulate what adding a pixel does, for each of the 256 sets of neighbours that are already there.

    Packed: bits 0-2 how many locally unconnected groups the neighbours form, bits 3-5 half pixels by which the contour
    area grows, then three bits each the ring position of one neighbour per group.
    """
    table = np.zeros(256, np.int64)
    for bits in range(256):
        patch = np.zeros((3, 3), np.uint8)
        for i, (dy, dx) in enumerate(_RING):
            patch[1 + dy, 1 + dx] = bits >> i & 1
        group = cv2.connectedComponents(patch, connectivity=connectivity)[1]
        touching = [(group[1 + y, 1 + x], i) for i, (y, x) in enumerate(_RING) if connectivity == 8 or x * y == 0]
        members = list({g: i for g, i in touching if g}.values())
        # Of the four 2x2 blocks at the pixel, each with two or three other pixels there gains half a pixel of area.
        area = sum(sum(bits >> (i % 8) & 1 for i in (c - 1, c, c + 1)) >= 2 for c in (0, 2, 4, 6))
        table[bits] = len(members) | area << 3 | sum(i << 6 + 3 * k for k, i in enumerate(members))
    return table


_FOREGROUND, _BACKGROUND = _table(8), _table(4)
_EULER = 1 - (_FOREGROUND & 7) + (np.arange(256) & 0b10101010 == 0b10101010)
"""Change of components minus holes by a pixel; it fills a hole where it has all four neighbours that share an edge."""


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
    width, low, high = v.shape[1], v.ravel(), filled.ravel()
    queue = np.empty(v.size, np.int64)
    waits = np.zeros(v.size, np.uint8)
    head = waiting = 0
    for p in range(width, v.size - width):  # of the frame none changes
        new = max(low[p], min(min(high[p - width], high[p + width]), min(high[p - 1], high[p + 1])))
        if high[p] > new:
            high[p] = new
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
    """Return the set of neighbours of each pixel that precede it in the order of `_sorted`, as bits (vectorizes)."""
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
def _tally(v, earlier):
    """Return for each grey value how many pixels have it, and how many components minus holes they make (256,)."""
    value, bits = v.ravel(), earlier.ravel()
    pixels, euler = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for p in range(v.size):
        pixels[value[p]] += 1
        euler[value[p]] += _EULER[bits[p]]
    return pixels, euler


@njit(cache=True)
def _sorted(v, above, floor):
    """Return the pixels above `floor`: descending grey value, then raster order. above (256,): pixels above each."""
    value, place = v.ravel(), above.copy()
    order = np.empty(above[floor], np.int64)
    for p in range(v.size):
        if value[p] > floor:
            order[place[value[p]]] = p
            place[value[p]] += 1
    return order


@njit(cache=True)
def _extents(v, levels):
    """Return the boxes of the whole foreground at ascending levels, as rows of `_joined`, the last level first."""
    found = np.empty((levels.size, 6), np.int32)
    height, width = v.shape
    columns, rows = np.zeros(width, np.uint8), np.zeros(height, np.uint8)
    for y in range(height):
        peak = np.uint8(0)
        for x in range(width):
            columns[x] = max(columns[x], v[y, x])
            peak = max(peak, v[y, x])
        rows[y] = peak
    x0 = y0 = 0
    x1, y1 = width - 1, height - 1
    for i in range(levels.size):
        while columns[x0] <= levels[i]:
            x0 += 1
        while columns[x1] <= levels[i]:
            x1 -= 1
        while rows[y0] <= levels[i]:
            y0 += 1
        while rows[y1] <= levels[i]:
            y1 -= 1
        found[-1 - i] = x0 - 1, y0 - 1, x1, y1, 0, 0
    return found


@njit(cache=True)
def _component(label, components, p, level):
    """Return the component of pixel `p` at a level; at -1 the one that stands now."""
    c = np.uintp(label[np.uintp(p)])
    while components[c, _AT] > level:
        c = np.uintp(components[c, _INTO])
    return c


@njit(cache=True)
def _extend(components, c, x0, x1, y1, first):
    """Extend a component to a box, or to a pixel."""
    components[c, _X0] = min(components[c, _X0], x0)
    components[c, _X1] = max(components[c, _X1], x1)
    components[c, _Y1] = max(components[c, _Y1], y1)
    components[c, _FIRST] = min(components[c, _FIRST], first)


@njit(cache=True)
def _joined(v, bits, order, levels, table, ends, largest):
    """Join the pixels of `order` to components one by one, and list those that stand at each of the ascending levels.

    bits (H * W,): earlier neighbours of each pixel. ends (H * W,): a component is left out from the level down that its
    first pixel has here. largest: list the largest one of a level only, of equal ones that with the last first pixel.

    Returns found (m, 6): box, first pixel, component; begin (n + 1,): of level i are found[begin[i + 1]:begin[i]];
    label (H * W,): a component of each pixel; components (c, 8), of which 0 is none of these. Smaller components are
    joined to larger ones and paths are left as they are, so the component at any level can be looked up later.
    """
    value, width = v.ravel(), v.shape[1]
    offset = np.array((-width - 1, -width, -width + 1, 1, width + 1, width, width - 1, -1)).astype(np.uintp)
    label = np.zeros(v.size, np.int32)
    components = np.empty((order.size + 1, 8), np.int32)
    components[0, _AT] = -1
    alive = np.empty(order.size + 1, np.int32)
    found = np.empty((levels.size + 64, 6), np.int32)
    begin = np.zeros(levels.size + 1, np.int64)
    count, n, m, i = 1, 0, 0, 0
    for k in range(levels.size - 1, -1, -1):
        while i < order.size and value[order[i]] > levels[k]:
            p = np.uintp(order[i])
            i += 1
            y, x = p // np.uintp(width), p % np.uintp(width)
            entry = table[bits[p]]
            if entry & 7:
                c = _component(label, components, p + offset[entry >> 6 & 7], -1)
            else:
                c = np.uintp(count)
                components[c, _AREA], components[c, _SIZE], components[c, _AT] = 0, 1, -1
                components[c, _X0], components[c, _X1], components[c, _Y1], components[c, _FIRST] = x, x, y, p
                alive[n] = count
                count += 1
                n += 1
            for j in range(1, entry & 7):
                d = _component(label, components, p + offset[entry >> 6 + 3 * j & 7], -1)
                if c == d:
                    continue
                if components[c, _SIZE] < components[d, _SIZE]:
                    c, d = d, c
                components[d, _INTO], components[d, _AT] = c, value[p]
                components[c, _AREA] += components[d, _AREA]
                components[c, _SIZE] += components[d, _SIZE]
                x0, x1, y1, first = components[d, _X0], components[d, _X1], components[d, _Y1], components[d, _FIRST]
                _extend(components, c, x0, x1, y1, first)
            label[p] = c
            components[c, _AREA] += entry >> 3 & 7
            _extend(components, c, x, x, y, p)

        if m + n > len(found):
            found = np.concatenate((found, np.empty((m + n, 6), np.int32)))
        known, n, best = n, 0, -1
        for j in range(known):
            c = alive[j]
            area, first = components[c, _AREA], components[c, _FIRST]
            if components[c, _AT] >= 0 or ends[first] > levels[k]:
                continue
            alive[n] = c
            n += 1
            if not largest or area > best or (area == best and first > found[m, 4]):
                best = area
                found[m, 0], found[m, 1] = components[c, _X0] - 1, first // width - 1
                found[m, 2], found[m, 3] = components[c, _X1], components[c, _Y1]
                found[m, 4], found[m, 5] = first, c
                m += not largest
        m += largest
        begin[k] = m
    return found, begin, label, components


@njit(cache=True)
def _components(v, levels, table, ends, holes, largest):
    """Return what `_joined` does for the levels, (n,) ascending.

    holes (n,): how many each level has. At the lowest levels, where balance and holes show that there is one component,
    that is the whole foreground: no pixel is looked at, and its number is 0. Empty: no level is treated so.
    """
    earlier = _earlier_neighbours(v)
    pixels, euler = _tally(v, earlier)
    above, balance = pixels.sum() - pixels.cumsum(), euler.sum() - euler.cumsum()
    simple = 0
    while simple < holes.size and balance[levels[simple]] + holes[simple] == 1:
        simple += 1
    order = _sorted(v, above, levels[simple] if simple < levels.size else 255)
    found, begin, label, components = _joined(v, earlier.ravel(), order, levels[simple:], table, ends.ravel(), largest)
    found = np.concatenate((found[: begin[0]], _extents(v, levels[:simple])))
    return found, np.concatenate((begin[0] + np.arange(simple, 0, -1), begin)), label, components


@njit(cache=True)
def _in_order(levels, outer, holes, filled, width):
    """Return the boxes of all contours of the ascending levels, as OpenCV lists them: boxes (m, 4), size (n,).

    outer, holes: what `_components` returns; holes are those of the levels from the last to the first.
    """
    outer_found, outer_begin, outer_label, outer_components = outer
    hole_found, hole_begin, hole_label, hole_components = holes
    boxes = np.empty((len(outer_found) + len(hole_found), 4), np.int32)
    size = np.empty(levels.size, np.int64)
    # Where a component is among the contours of the level; 1 is right wherever it is the whole foreground.
    place, hole_place = np.ones(len(outer_components), np.int32), np.ones(len(hole_components), np.int32)
    m = 0
    for i, level in enumerate(levels):
        own = outer_found[outer_begin[i + 1] : outer_begin[i]]
        n, h = len(own), levels.size - 1 - i
        own = np.concatenate((own, hole_found[hole_begin[h + 1] : hole_begin[h]]))
        size[i] = len(own)
        if len(own) == 1:
            boxes[m] = own[0, :4]
            m += 1
            continue
        # Entry 0 is the frame. A contour is inside the one that the pixel beside or above its first one belongs to.
        first, inside = np.full(1 + len(own), -1), np.zeros(1 + len(own), np.int64)
        first[1:] = own[:, 4]
        for k in range(1, len(first)):
            (place if k <= n else hole_place)[own[k - 1, 5]] = k
        for k in range(1, len(first)):
            if k > n:
                inside[k] = place[_component(outer_label, outer_components, first[k] - width, level)]
            elif filled[first[k] - 1] > level:
                inside[k] = hole_place[_component(hole_label, hole_components, first[k] - 1, 254 - level)]
        # Parent first, then its children in reverse of the order they are met in.
        child, sibling = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
        for k in np.argsort(first)[1:]:
            sibling[k] = child[inside[k]]
            child[inside[k]] = k
        k = child[0]
        for _ in own:
            for j in range(4):
                boxes[m, j] = own[k - 1, j]
            m += 1
            if child[k]:
                k = child[k]
            else:
                while k and not sibling[k]:
                    k = inside[k]
                k = sibling[k]
    return boxes, size


def _framed(grey: np.ndarray) -> np.ndarray:
    """Return `grey` with a frame of zeros one pixel wide."""
    return cv2.copyMakeBorder(grey, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)


def largest_boxes(grey: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return, for each level, the rectangle of the largest contour of the foreground `grey > level`.

    grey: (H, W) uint8; levels: (n,) int64, ascending, all below the maximum of `grey`, so that there is a foreground.
    Returns (n, 4) int32, half-open. Of equally large contours the one that OpenCV lists first.
    """
    v = _fill_holes(_framed(grey))
    found, *_ = _components(v, levels, _FOREGROUND, np.zeros_like(v), np.zeros_like(levels), True)
    return found[::-1, :4]


def all_boxes(grey: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each level, the rectangles of all contours of the foreground `grey > level`, holes included.

    Arguments as for `largest_boxes`. Returns boxes (m, 4) int32, half-open, begin (n,) and size (n,): those of level i
    are boxes[begin[i]:begin[i] + size[i]], in OpenCV's order.
    """
    v = _framed(grey)
    filled = _fill_holes(v)
    # A pixel is in a hole at the levels from its own value to below its filled value. Holes grow with the level.
    inverse = np.where(filled > v, ~v, 0).astype(np.uint8)
    holes = _components(inverse, 254 - levels[::-1], _BACKGROUND, ~filled, levels[:0], False)
    holes[0][:, :4] += np.array([-1, -1, 1, 1], np.int32)
    number = (holes[1][:-1] - holes[1][1:])[::-1]
    outer = _components(v, levels, _FOREGROUND, np.zeros_like(v), number, False)
    boxes, size = _in_order(levels, outer, holes, filled.ravel(), v.shape[1])
    return boxes, size.cumsum() - size, size
