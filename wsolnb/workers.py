"""Work on images side by side: processes of one thread each, results in order, nothing left behind.

    for result in results(task, named, workers=0):   # named: (name, item) pairs; result = task(item)
        ...

Every item is computed with one thread, here as in a worker: sums of several threads round otherwise, so that results
would depend on the number of cores. With it they are equal in every byte, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from wsolnb.errors import ParameterError, RunError, WsolnbError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items a worker that are under way at once: one that is computed, one that waits. It bounds the memory of results."""


def count(workers: int) -> int:
    """Return how many processes `workers` stands for; 0: as many as there are cores that this process may use.

    Where OMP_NUM_THREADS is set, as `wsolnb reproduce --jobs` does for its notebooks, that is this process's share.
    Raises ParameterError for a negative number.
    """
    if workers < 0:
        raise ParameterError(f"{workers} workers", "use 0 for all cores, or the number of processes")
    if workers:
        return workers
    from joblib import cpu_count  # here: it loads NumPy, which in a worker is to see its number of threads first

    share = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpu_count(), max(1, int(share))) if share.isdecimal() else cpu_count()


def results(task: Callable[[Item], Result], named: Iterable[tuple[str, Item]], workers: int = 1) -> Iterator[Result]:
    """Yield `task(item)` of each (name, item) in their order, computed in `count(workers)` processes.

    One worker is this process itself. More are started anew, each with its copy of the task, and end with this call,
    when it is left early as well, and when this process is killed. At most `AHEAD` items a worker are under way.
    task: a function of a module, or a `partial` of one, with arguments that can be pickled.

    Raises what the task raises, with the item's name in it: a WsolnbError as such, RunError for anything else, and
    for a worker that was killed. What is under way at other workers is finished first.
    """
    named = iter(named)
    first = list(itertools.islice(named, processes := count(workers)))
    named = itertools.chain(first, named)
    if len(first) < 2:  # one worker, or nothing to share out
        limited = _one_thread()
        for name, item in named:
            with limited():
                result = _named(task, name, item)
            yield result
        return
    try:
        sent = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        problem = f"{getattr(task, 'func', task)} cannot be sent to worker processes: {error}"
        raise RunError(problem, "work with `workers=1`") from error
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(min(processes, len(first)), context, _start, (sent,))
    waiting: deque[tuple[str, Future]] = deque()
    started: dict[int, Any] = {}
    try:
        for name, item in named:
            waiting.append((name, pool.submit(_work, name, item)))
            started = pool._processes or started  # the pool forgets them when it breaks
            if len(waiting) == AHEAD * processes:
                yield waiting[0][1].result()
                waiting.popleft()
        for _, future in waiting:
            yield future.result()
    except BrokenProcessPool as error:
        lost = [name for name, future in waiting if not future.done() or future.exception()]
        pool.shutdown(cancel_futures=True)  # all have ended then, those by SIGTERM whom the pool has ended
        codes = [process.exitcode or 0 for process in started.values()]
        code = next((code for code in codes if code not in (0, -signal.SIGTERM)), 0)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        remedy = "run again with `workers=1`, which shows what is wrong"
        if code == -signal.SIGKILL:
            remedy = "use fewer workers: what the system kills has most often run out of memory"
        elif code > 0:
            remedy += "; a script needs `if __name__ == '__main__':`"
        raise RunError(f"a worker process {how}; it worked on one of {', '.join(lost)}", remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _named(task: Callable[[Any], Any], name: str, item: Any) -> Any:
    """Return `task(item)`; an error names the item."""
    try:
        return task(item)
    except WsolnbError as error:
        if name in error.problem:
            raise
        raise type(error)(f"{name}: {error.problem}", error.remedy) from error
    except Exception as error:
        raise RunError(f"{name}: {type(error).__name__}: {error}", "look at this image, or its maps") from error


def _one_thread() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context in which the libraries that are loaded compute with one thread."""
    controller, torch = ThreadpoolController(), sys.modules.get("torch")

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        threads = torch.get_num_threads() if torch else 0
        try:
            with controller.limit(limits=1):
                if torch:
                    torch.set_num_threads(1)
                yield
        finally:
            if torch:
                torch.set_num_threads(threads)

    return limited


# In a worker

_task: Callable[[Any], Any]


def _start(sent: bytes) -> None:
    """Make a worker ready: one thread, the task, and an end together with the process that has started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA", "VECLIB_MAXIMUM"):  # before the task's modules load them
        os.environ[f"{library}_NUM_THREADS"] = "1"
    global _task
    _task = pickle.loads(sent)
    ThreadpoolController().limit(limits=1)  # of what the main module has loaded before
    for library, limit in (("torch", "set_num_threads"), ("cv2", "setNumThreads")):
        if library in sys.modules:
            getattr(sys.modules[library], limit)(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(name: str, item: Any) -> Any:
    return _named(_task, name, item)
