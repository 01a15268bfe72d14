"""Results on disk: one small Parquet file a task, whole or not there, each written exactly once.

    <folder>/rows/<key>.parquet     a task that is done, or failed for good
    <folder>/locks/<key>.lock       held while a driver has the task in its hands

A lock is the operating system's own (`flock`): it goes with the process that holds it, however that
ends. The folder must be one whose file system can lock; several drivers may share it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

FREE = 50_000_000  # bytes that a census wants free before it starts
DONE, FAILED = "done", "failed"


class Results:
    """The folder of a census."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, folder / "rows"

    def prepare(self) -> None:
        """Make the folder; ValueError where nothing can be written or locked, or it is full."""
        probe = self.folder / "locks" / f".probe-{os.getpid()}"
        try:
            for name in ("rows", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with FileLock(probe, timeout=1):
                pass
            probe.unlink(missing_ok=True)
        except (OSError, NotImplementedError) as error:
            raise ValueError(f"results: {self.folder} cannot be written ({error})") from error
        if (free := shutil.disk_usage(self.folder).free) < FREE:
            want = f"{free / 1e6:.0f} MB are free, {FREE / 1e6:.0f} MB are wanted"
            raise ValueError(f"results: no space left for {self.folder}: {want}")

    def path(self, key: str) -> Path:
        return self.rows / f"{key}.parquet"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def take(self, key: str) -> FileLock | None:
        """The task's lock, held; None if its row is there, or another driver holds it."""
        lock = FileLock(self.folder / "locks" / f"{key}.lock", timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            if not self.has(key):
                return lock
            lock.release()
        return None

    def write(self, row: dict) -> None:
        """Write a task's row; to be called by who holds its lock."""
        path = self.path(row["key"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pd.DataFrame([row]).to_parquet(temporary, index=False)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def forget_failed(self) -> int:
        """Remove the rows of failed tasks, to be tried again; how many there were."""
        failed = [row for row in self if row["state"] == FAILED]
        for row in failed:
            self.path(row["key"]).unlink(missing_ok=True)
        return len(failed)

    def __iter__(self) -> Iterator[dict]:
        for path in sorted(self.rows.glob("*.parquet")):
            with contextlib.suppress(FileNotFoundError):  # taken back meanwhile
                yield pd.read_parquet(path).iloc[0].to_dict()

    def table(self) -> pd.DataFrame:
        """All rows that are there, at any time, in the order of their keys."""
        return pd.DataFrame(list(self))
