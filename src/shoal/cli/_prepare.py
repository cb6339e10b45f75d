"""`shoal _prepare MODEL`: fetch and convert a model, telling the parent process about it in JSON lines."""

from __future__ import annotations

from shoal.cli.output import print_json
from shoal.errors import ShoalError


def run(model: str, /) -> int:
    """Make a model ready for use. Started by `shoal train`; not for people."""
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    try:
        local = resolve(model, model_cache(), lambda message: print_json({"say": message}))
    except ShoalError as error:
        print_json({"error": {"problem": error.problem, "remedy": error.remedy}})
        return error.exit_code
    print_json({"directory": str(local.directory)})
    return 0
