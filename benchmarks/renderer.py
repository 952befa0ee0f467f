"""Images per second of the rendered benchmark on one core, with and without writing the files."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import cv2

from wsolnb.data import aviary


def main() -> dict:
    cv2.setNumThreads(1)
    result = {}
    for variant, count in (("single", 400), ("scenes", 200)):
        config = aviary.AviaryConfig(variant=variant)
        aviary.render(config, "train", 0)
        started = time.perf_counter()
        for index in range(count):
            aviary.render(config, "train", index)
        result[f"{variant}_rendered_per_second"] = count / (time.perf_counter() - started)
        small = config.model_copy(update={"train": count, "val": 1, "test": 1})
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            aviary.ensure(small, Path(folder), workers=1)
            result[f"{variant}_written_per_second"] = (count + 2) / (time.perf_counter() - started)
    for name, value in result.items():
        print(f"{name}: {value:.0f} (claim for single_rendered_per_second: >= 150)")
    return result


if __name__ == "__main__":
    main()
