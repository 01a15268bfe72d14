"""Running tasks on Ray: a few in flight at a time, retries, a row for each, a line of progress."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from census.grid import Task
from census.rows import DONE, FAILED, Results
from utils.session import ROOT

LEAN = Path(__file__).parent / "lean"
sys.path.insert(0, str(LEAN))  # see what is in there
import ray  # noqa: E402

ATTEMPTS = 3
AHEAD = 2  # tasks in flight for each one that can run: no worker waits for the driver
ELSEWHERE = 5  # seconds until it is looked again for what another driver has in its hands
TOLD_EVERY = 10  # seconds between lines of progress where they cannot overwrite each other
NOT_SENT = [".*", "**/__pycache__", "build", "my", "project-*", "tests", "docs", "tools"]


def start(address: str | None, workers: int | None, dashboard: bool = False) -> None:
    """Start Ray on this machine, or join a cluster; ConnectionError if there is none.

    On this machine workers take what this process has in its environment: one thread each.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS - 1))  # else for ever
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    options = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        os.environ |= one_thread | {"PYTHONPATH": os.pathsep.join([str(LEAN), str(ROOT)])}
        options |= {"num_cpus": workers, "include_dashboard": dashboard}
        _start_here(options | {"object_store_memory": 2**27})  # rows are small
        return
    # a cluster's nodes have the packages installed; the code comes from here
    environment = {"working_dir": str(ROOT), "excludes": NOT_SENT, "env_vars": one_thread}
    try:
        ray.init(address, runtime_env=environment, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"address: no Ray cluster at {address} ({reason})") from error


def _start_here(options: dict) -> None:
    """A busy machine can be too slow for Ray's own patience, so it is asked twice."""
    for attempt in (1, 2):
        try:
            ray.init("local", **options)
            return
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            if attempt == 2:
                reason = str(error).splitlines()[0]
                raise ConnectionError(f"Ray does not start on this machine ({reason})") from error


def check_resources(tasks: Sequence[Task]) -> None:
    """ValueError for a task that no node could ever run, which would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, field in (("CPU", "cpus"), ("GPU", "gpus")):
        most = max(node.get(name, 0) for node in nodes)
        wanted = max(getattr(task, field) for task in tasks)
        if wanted > most:
            raise ValueError(f"{field}: tasks want {wanted:g}, the largest node here has {most:g}")


def run(tasks: Sequence[Task], results: Results, work: Callable[[Task], dict]) -> int:
    """Do every task that has no row yet, here or through another driver; how many failed here.

    `work` gives the figures of a row. Raises OSError when a row cannot be written; what was written
    stays, and the next run goes on from there.
    """
    left = [task for task in tasks if not results.has(task.key)]
    line = Line(len(tasks), len(left))
    in_flight = {}  # task and its lock, by what Ray calls its result
    failed = 0
    remote = ray.remote(max_retries=ATTEMPTS - 1, retry_exceptions=True)(timed)
    try:
        while left or in_flight:
            waiting = []
            n_at_once = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))  # nodes may join
            while left and len(in_flight) < n_at_once:
                task = left.pop(0)
                if lock := results.take(task.key):
                    resources = {"num_cpus": task.cpus, "num_gpus": task.gpus}
                    in_flight[remote.options(**resources).remote(work, task)] = task, lock
                elif not results.has(task.key):
                    waiting.append(task)  # another driver's, for as long as that lives
            left += waiting
            if not in_flight:
                time.sleep(ELSEWHERE if left else 0)
            for ref in ray.wait(list(in_flight), timeout=1)[0] if in_flight else []:
                task, lock = in_flight.pop(ref)
                row = row_of(task, ref)
                results.write(row)
                lock.release()
                failed += row["state"] == FAILED
            line.tell(failed, len(left) + len(in_flight))
    finally:
        for ref in in_flight:
            ray.cancel(ref, force=True)
        for _, lock in in_flight.values():
            lock.release()
        line.tell(failed, len(left) + len(in_flight), last=True)
    return failed


def row_of(task: Task, ref: ray.ObjectRef) -> dict:
    """The row of a task that has ended, well or not."""
    setting = task.setting._asdict()
    versions = {name: version(name) for name in ("torch", "transformer_lens")}
    row = {"key": task.key, "kind": type(task.setting).__name__.lower(), **setting, **versions}
    try:
        return row | {"state": DONE, "error": "", **ray.get(ref)}
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        said = f"{type(cause).__name__}: {cause}"
    except ray.exceptions.RayError as error:  # its worker or node died, every time
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row | {"state": FAILED, "error": said[:500]}


def timed(work: Callable[[Task], dict], task: Task) -> dict:
    """The figures and the seconds that they took."""
    began = time.perf_counter()
    return work(task) | {"seconds": time.perf_counter() - began}


class Line:
    """The line of progress: done, failed, left, and the time to go at the pace so far."""

    def __init__(self, n_tasks: int, n_left: int):
        self.n_tasks, self.n_left = n_tasks, n_left
        self.began = self.told = time.monotonic()
        self.live = sys.stderr.isatty()

    def tell(self, failed: int, left: int, last: bool = False) -> None:
        """Print it, over the one before in a terminal, else every few seconds and at the end."""
        now = time.monotonic()
        if not last and now - self.told < (0.2 if self.live else TOLD_EVERY):
            return
        ended = self.n_left - left
        pace = (now - self.began) / ended if ended else None
        to_go = "" if pace is None else f", {_clock(pace * left)} to go"
        done = self.n_tasks - left - failed
        text = f"{done} done, {failed} failed, {left} left{to_go if left else ''}"
        begin, end = ("\r\033[K", "\n" if last else "") if self.live else ("", "\n")
        print(f"{begin}{text}", end=end, file=sys.stderr, flush=True)
        self.told = now


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
