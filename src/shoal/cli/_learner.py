"""`shoal _learner RUN`: the learner's process, which a run starts itself."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from shoal.coordinator.processes import child_of_this, die_with_parent


def run(directory: str, /) -> int:
    """Be the learner of a run, or one of its ranks. Started by `shoal train`; not for people."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    from shoal.config import load_config
    from shoal.fabric.ticket import Ticket

    path = Path(directory)
    config = load_config(str(path / "config.toml"), [])
    from shoal.learner.ranks import is_rank, leads

    if config.learner.processes > 1 and not is_rank():
        from shoal.learner.launch import launch

        os.environ |= child_of_this()  # its ranks die with it
        return launch(["_learner", directory], config.learner.processes, path / "ranks")
    if not leads():
        from shoal.learner.making import follow_run

        follow_run(config, path)
        return 0
    from shoal.learner.process import run_learner

    ticket = Ticket.decode((path / "own-ticket.txt").read_text())
    from shoal.serving.sessions_host import hosting

    asyncio.run(run_learner(config, path, ticket, hosting))
    return 0
