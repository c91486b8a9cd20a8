"""What every process does that works for another one of the same command."""

import multiprocessing
import os
import signal
from threading import Thread


def start_worker() -> None:
    """Leave Ctrl-C to the process that gives the work, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end and follow it: an executor's queues never would, as both ends are held here too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
