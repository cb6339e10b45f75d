"""Scripts: an agent writes a program that reads the chain and returns an unsigned transaction or a query's result.

The life of a script: `reply` finds it in what the agent wrote; `runner` gives it to a warm sandbox, with an address
of its own on the `front`, where `rpc` answers what may be read of the chain; what it returned is read by `outcome` and
becomes an act like any other, which the platform signs and sends.

    async with ScriptRunner("typescript") as runner:
        quest.begin()
        feedback = quest.act(await runner.run(quest, script))

Invariants: a script reaches one chain, its own episode's, to read it and nothing else; what it did beyond that is in
its result alone, which is read as a stranger's text.
"""

from shoal.envs.evm.scripts.reply import Language, find_script
from shoal.envs.evm.scripts.runner import ScriptRunner

__all__ = ["Language", "ScriptRunner", "find_script"]
