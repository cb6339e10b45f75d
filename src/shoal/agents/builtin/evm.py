"""Reading an EVM chain and trying transactions on it without consequence, as the quests' own tools do (docs/evm.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.envs.evm import tools as chain_tools
from shoal.envs.evm.actions import ActionError, Pay, Send, read_action
from shoal.envs.evm.chain import ChainBackend, Reverted

Account = Annotated[str, Field(max_length=100, description="an address or a name; 'me' is the agent")]
Arguments = Annotated[list[Any], Field(max_length=32)]
Amount = Annotated[str, Field(max_length=100, description='in base units, or as "0.5 ether"')]


@cache
def _chain() -> ChainBackend:
    """The offline chain of this process, made when it is first asked."""
    from shoal.envs.evm.pyrevm_chain import PyrevmChain

    return PyrevmChain()


def _asked(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return question()
    except (ActionError, Reverted) as error:
        raise ToolError(str(error)) from None


def balance(account: Account = "me", token: Annotated[str, Field(max_length=100)] = "") -> dict[str, Any]:
    """What an account holds of BNB, or of a token."""
    return _asked(lambda: dict(chain_tools.balance(_chain(), account, token)))


def call(
    to: Account,
    function: Annotated[str, Field(max_length=200, description='such as balanceOf, or "balanceOf(address)"')],
    args: Arguments | None = None,
) -> dict[str, Any]:
    """What a contract's function returns; nothing is sent."""
    return _asked(lambda: chain_tools.call(_chain(), to, function, args or []))


def simulate(
    action: Literal["send", "pay"],
    to: Account,
    function: Annotated[str, Field(max_length=200, description="for send")] = "",
    args: Arguments | None = None,
    value: Amount = "0",
) -> dict[str, Any]:
    """What a transaction would do if it were sent now: success, reason, events, what it costs; then undone."""
    written: dict[str, Any] = {"action": action, "to": to, "value": value}
    if action == "send":
        written |= {"function": function, "args": args or []}

    def tried() -> dict[str, Any]:
        made = read_action(json.dumps(written))
        assert isinstance(made, Send | Pay), "these two actions only"
        return chain_tools.simulate(_chain(), made)

    return _asked(tried)


def tools() -> Sequence[Callee]:
    """The chain's tools. One at a time: they share a chain."""
    use = Use(idempotent=True, max_concurrency=1, timeout_s=30)
    return [FunctionTool(one, use) for one in (balance, call, simulate)]
