"""Tasks for `DecoderPool` that misbehave, or that report the state of their process."""

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np


def read(video):
    """Yield the contents of the file."""
    yield {"text": Path(video.file).read_text()}


def report(video):
    """Yield the state of the process."""
    names = ("AS", "FSIZE", "NOFILE", "CPU", "CORE")
    yield {
        "pid": os.getpid(),
        "modules": sorted(sys.modules),
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names},
        "open_files": len(os.listdir("/proc/self/fd")),
        "environment": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
    }


def echo(video, *values, **options):
    """Yield each value, and then the options."""
    for value in values:
        yield {"value": value}
    yield options


def abort(video, after=0):
    """Crash after some messages."""
    for i in range(after):
        yield {"i": i}
    os.abort()


def hang(video):
    """Yield one message with the process id, and sleep."""
    yield {"pid": os.getpid()}
    time.sleep(3600)


def spin(video):
    """Compute without end, and without yielding anything."""
    while True:
        pass
    yield {}


def allocate(video, num_bytes):
    """Allocate memory."""
    yield {"sum": int(np.ones(num_bytes, np.uint8).sum())}


def yield_forever(video):
    """Yield without end."""
    i = 0
    while True:
        yield {"i": i, "array": np.zeros(1000)}
        i += 1


def write(video, path):
    """Write a file."""
    Path(path).write_bytes(bytes(10_000))
    yield {}


def fail(video):
    """Raise an exception that no task should raise."""
    raise KeyError("a defect")
    yield {}


def forge(video, data):
    """Send bytes that are not a message, as a process that a video has taken over may do."""
    module = sys.modules["__main__"]  # decoder_process
    original = module._send
    module._send = lambda connection, kind, message: connection.sendall(data)
    try:
        yield {}
        time.sleep(3600)
    finally:
        module._send = original
