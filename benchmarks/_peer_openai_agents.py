"""What the OpenAI Agents SDK does with scripted turns, run by that peer's own Python: measures out (JSON).

python _peer_openai_agents.py COMMAND ARGUMENTS...      (an MCP server to connect, as a user would)
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from agents.items import ModelResponse
from agents.mcp import MCPServerStdio
from agents.models.interface import Model
from agents.tracing import TracingProcessor
from agents.usage import Usage
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from agents import Agent, Runner, function_tool, set_trace_processors

MANY = 500

Calls = list[tuple[str, dict[str, Any]]]


class Scripted(Model):
    """Makes these turns' calls, then answers."""

    def __init__(self, turns: list[Calls]) -> None:
        self._turns = turns
        self._number = 0

    async def get_response(self, *_: Any, **__: Any) -> ModelResponse:
        self._number += 1
        if self._turns:
            output: list[Any] = [
                ResponseFunctionToolCall(
                    type="function_call", name=name, arguments=json.dumps(given), call_id=f"c{self._number}_{n}"
                )
                for n, (name, given) in enumerate(self._turns.pop(0))
            ]
        else:
            text = ResponseOutputText(type="output_text", text="done", annotations=[])
            output = [
                ResponseOutputMessage(id="m", type="message", role="assistant", status="completed", content=[text])
            ]
        return ModelResponse(output=output, usage=Usage(), response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise NotImplementedError("nothing is streamed here")


class Spans(TracingProcessor):
    """Counts what tracing tells by itself."""

    def __init__(self) -> None:
        self.count = 0

    def on_trace_start(self, trace: Any) -> None:
        self.count += 1

    def on_trace_end(self, trace: Any) -> None: ...

    def on_span_start(self, span: Any) -> None:
        self.count += 1

    def on_span_end(self, span: Any) -> None: ...

    def shutdown(self) -> None: ...

    def force_flush(self) -> None: ...


running = peak = 0
ended: dict[int, float] = {}


@function_tool
async def nap(seconds: float, mark: int = -1) -> str:
    """Waits."""
    global running, peak
    running += 1
    peak = max(peak, running)
    await asyncio.sleep(seconds)
    running -= 1
    ended[mark] = time.perf_counter()
    return "ok"


async def run(turns: list[Calls], **more: Any) -> tuple[float, str]:
    agent = Agent(name="peer", model=Scripted(turns), tools=[nap], **more)
    clock = time.perf_counter()
    result = await Runner.run(agent, "go", max_turns=40)
    return time.perf_counter() - clock, str(result.to_input_list())


async def main(server: list[str]) -> dict[str, float]:
    global peak
    spans = Spans()
    set_trace_processors([spans])
    fan: Calls = [("nap", {"seconds": 0.3})] * 16
    fanout, _ = await run([fan])
    clock = time.perf_counter()
    # The second call of the branch needs the first one's result, so it stands in the next turn.
    branch: list[Calls] = [[("nap", {"seconds": 1.0}), ("nap", {"seconds": 0.02, "mark": 0})]]
    branch += [[("nap", {"seconds": 0.02, "mark": n})] for n in range(1, 5)]
    await run(branch)
    branch_s = ended[4] - clock
    peak = 0
    await run([[("nap", {"seconds": 0.02})] * MANY])
    most = peak
    spans.count = 0
    await run([[("nap", {"seconds": 0.0})] * 3])
    told = spans.count
    async with MCPServerStdio(
        params={"command": server[0], "args": server[1:]}, client_session_timeout_seconds=60
    ) as mcp:
        _, said = await run([[("calculate", {"expression": "6 * 7"})]], mcp_servers=[mcp])
    return {
        "fanout16_s": fanout,
        "branch_s": branch_s,
        "peak_of_500": most,
        "records_of_a_run": told,
        "mcp_server_works": float("42" in said),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1:]))))
