"""What the tests of the census have workers do; theirs is another process, so it is imported."""

import os
import signal
import time
from pathlib import Path

from census.grid import Model, Task


def task(name, text=""):
    """A task whose model's name carries what it is to do."""
    return Task(name, Model(text))


def count(folder, key):
    """Leave a mark that the task ran; how often it did before."""
    marks = list(Path(folder).glob(f"{key}.*"))
    (Path(folder) / f"{key}.{os.getpid()}.{time.time_ns()}").touch()
    return len(marks)


def quick(job):
    """Marks that it ran in the folder that the name is, and gives a figure."""
    count(job.setting.name, job.key)
    return {"figure": float(len(job.key))}


def slow(job):
    time.sleep(0.5)
    return quick(job)


def busy(job):
    """A second of a core's time."""
    until = time.process_time() + 1
    while time.process_time() < until:
        pass
    return quick(job)


def fails(job):
    count(job.setting.name, job.key)
    if job.key == "bad":
        raise ValueError("no such thing")
    return {"figure": 1.0}


def dies_once(job):
    if count(job.setting.name, job.key) == 0 and job.key == "mortal":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"figure": 2.0}


def dies(job):
    if count(job.setting.name, job.key) >= 0 and job.key == "mortal":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"figure": 3.0}
