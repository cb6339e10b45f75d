"""Start the learner's processes on this machine, as `torchrun` does and by its own code.

    shoal _learner RUN ──▶ launch ──▶ torchrun's agent ──▶ shoal _learner RUN, `processes` times, each a rank

The same command under a `torchrun` of one's own, over several machines that share the run's folder, works as well.

1. The store in which ranks meet is a file in the run's folder, and they speak over loopback. torchrun's usual store is
   a port on all interfaces that asks nobody who he is: whoever reached it could speak for the leader.

Invariants: when one rank dies, by whatever, the others are ended within `END_S`, and this returns an exit code other
than 0, upon which the run starts all of them again from the newest checkpoint; what ends this process ends them too.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from shoal.errors import ConfigError, RunError
from shoal.learner.ranks import STORE_VARIABLE

END_S = 5
"""A rank that was told to end because another has died, and has not by then, is killed."""


def launch(arguments: Sequence[str], processes: int, folder: Path) -> int:
    """Run `python -m shoal.cli ARGUMENTS` as so many ranks; gives the exit code of the first that failed, or 0.

    Args:
        folder: made anew, for this user only: where they meet.

    Raises:
        ConfigError: the folder's name cannot be said in a URL, which is what torch wants.
    """
    if set("?#") & set(str(folder.resolve())):
        raise ConfigError(f"several processes cannot meet in {folder}.", "Name a run folder without '?' and '#'.")
    shutil.rmtree(folder, ignore_errors=True)  # of a learner that was killed
    folder.mkdir(mode=0o700)
    os.environ[STORE_VARIABLE] = str(folder.resolve() / "store")
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own tracebacks would bury what the rank said
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's name may lead nowhere
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        role="learner",
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder.resolve() / "agent"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # what ranks print goes where this process prints
        shutdown_timeout=END_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "shoal.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == RunError.exit_code:
            return failure.exitcode  # it has said why
        how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"Error: rank {rank} of the learner's {processes} ended with {how}.", file=sys.stderr, flush=True)
        return max(1, failure.exitcode)
    except SignalException as signal:
        return 128 + int(signal.sigval)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0
