"""Training processes that are started, watched, started again and stopped together: a thin layer over torch's agent."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_train.config import Settings
from dist_train.errors import DistTrainError, ProcessLostError, UserError
from dist_train.runtime.stop import Stop, listening
from dist_train.worker import LAUNCHER

if TYPE_CHECKING:
    from dist_train.runtime.agent import Agent

# A process that lost another one has ended within this time, unless it is saving; one that hangs has not. Less where
# the run's own timeout is short: the others have waited for that long already.
_MOST_PEER_SECONDS = 30.0


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line of `launch` says beside the settings."""

    processes: str
    """On this node: a number, or `auto` for one per GPU, or one."""
    nodes: int = 1
    head: str | None = None
    job: str = "dist_train"
    max_restarts: int = 3
    grace: float = 300.0
    join: float = 600.0

    def __post_init__(self) -> None:
        """Raise `UserError` for what cannot be."""
        if self.processes != "auto" and (not self.processes.isdecimal() or int(self.processes) < 1):
            raise UserError(f"{self.processes!r} is no number of processes; use 1, 2, … or auto, one for each GPU")
        if self.nodes < 1 or self.max_restarts < 0 or min(self.grace, self.join) <= 0:
            raise UserError(
                "--nodes, --grace and --join are positive, and --max-restarts is 0 or more; see launch --help"
            )
        if self.nodes > 1 and not self.head:
            raise UserError(f"--nodes={self.nodes} needs --head=host:port, the same on all nodes, where they meet")

    def count(self, device: str) -> int:
        """Return how many processes that is where `runtime.device` is `device`."""
        if self.processes != "auto":
            return int(self.processes)
        import torch

        return max(1, torch.cuda.device_count() if device in ("auto", "cuda") else 1)


def launch(
    settings: Settings, arguments: Sequence[str], options: LaunchOptions, note_end: Callable[[int], None]
) -> int:
    """Run `dist-train train *arguments` in several processes, again after a failure; return the exit status.

    `note_end` is told of a status other than 0: processes that were killed could not write it down themselves.
    Raises `DistTrainError` for what they have not said either.
    """
    # Before torch is imported, which takes a second: what is stopped meanwhile has lost nothing.
    with listening() as stop:
        try:
            status = _run(settings, arguments, options, stop)
        except DistTrainError as error:
            note_end(error.exit_status)
            raise
        if status:
            note_end(status)
        return status


def _run(settings: Settings, arguments: Sequence[str], options: LaunchOptions, stop: Stop) -> int:
    _quiet_torch()
    from dist_train.runtime.agent import EndedError
    from dist_train.runtime.shares import micro_batch_size

    processes = options.count(settings.runtime.device)
    micro_batch_size(settings.train, processes * options.nodes)  # each process would refuse it with a line of its own
    _set_environment(processes)
    agent = _agent(settings, arguments, options, processes, stop)
    try:
        if agent.run() is None:  # a rendezvous that ended without this node
            raise ProcessLostError(f"job {options.job} has its {options.nodes} nodes already; use another --job")
        return 0
    except EndedError as ended:
        return ended.status
    finally:
        agent.get_worker_group().spec.rdzv_handler.shutdown()


def _agent(settings: Settings, arguments: Sequence[str], options: LaunchOptions, processes: int, stop: Stop) -> "Agent":
    """Return what starts and watches this node's processes."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from dist_train.runtime.agent import MAX_RESTARTS, Agent, Patience
    from dist_train.runtime.rendezvous import ManyNodes, OneNode

    spec = WorkerSpec(
        role="train",
        local_world_size=processes,
        entrypoint=sys.executable,
        # Unbuffered, or what was printed before a kill is lost.
        args=("-u", "-m", "dist_train", "train", *verbatim(arguments)),
        rdzv_handler=ManyNodes(options.nodes, str(options.head), options.job, options.join)
        if options.nodes > 1
        else OneNode(),
        max_restarts=MAX_RESTARTS,
    )
    peer_seconds = min(settings.runtime.timeout_seconds / 2, _MOST_PEER_SECONDS)
    patience = Patience(options.grace, peer_seconds, options.max_restarts)
    return Agent(spec, patience, settings.run.out_dir / "checkpoints", stop)


def verbatim(arguments: Iterable[str]) -> list[str]:
    """Return `arguments` so that they reach the processes as they are: torch fills in what follows a dollar."""
    return [argument.replace("$", "$$") for argument in arguments]


def _quiet_torch() -> None:
    """Keep torch's records of its own work to itself: what users need to know is said in one line."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def _set_environment(processes: int) -> None:
    """Set what torch's agent and the processes read."""
    os.environ[LAUNCHER] = str(os.getpid())
    # torch's own handlers would raise wherever the agent is, and leave processes behind.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    # With the agents' store, processes that start again read the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if processes > 1:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable // processes)))
