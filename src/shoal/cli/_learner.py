"""`shoal _learner RUN`: the learner's process, which a run starts itself."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from shoal.coordinator.processes import die_with_parent


def run(directory: str, /) -> None:
    """Be the learner of a run. Started by `shoal train`; not for people."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    from shoal.config import load_config
    from shoal.fabric.ticket import Ticket
    from shoal.learner.process import run_learner

    path = Path(directory)
    config = load_config(str(path / "config.toml"), [])
    ticket = Ticket.decode((path / "own-ticket.txt").read_text())
    from shoal.serving.sessions_host import hosting

    asyncio.run(run_learner(config, path, ticket, hosting))
