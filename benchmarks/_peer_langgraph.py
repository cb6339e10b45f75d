"""What LangGraph does with scripted turns and graphs, run by that peer's own Python: measures out (JSON).

The fan-out, the five hundred calls and the records are those of its prebuilt tool node behind a scripted model; the
branch is a graph of its own, which is LangGraph's way to say what depends on what.
"""

from __future__ import annotations

import asyncio
import json
import operator
import time
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

MANY = 500

running = peak = 0


@tool
async def nap(seconds: float) -> str:
    """Waits."""
    global running, peak
    running += 1
    peak = max(peak, running)
    await asyncio.sleep(seconds)
    running -= 1
    return "ok"


def agent(turns: list[list[float]]) -> Any:
    """A ReAct graph whose model makes these turns' calls, then answers."""

    def model(_: MessagesState) -> dict[str, Any]:
        if not turns:
            return {"messages": [AIMessage("done")]}
        waits = turns.pop(0)
        calls = [{"name": "nap", "args": {"seconds": one}, "id": f"c{n}"} for n, one in enumerate(waits)]
        return {"messages": [AIMessage("", tool_calls=calls)]}

    def route(state: MessagesState) -> str:
        last = state["messages"][-1]
        return "tools" if isinstance(last, AIMessage) and last.tool_calls else END

    graph = StateGraph(MessagesState)
    graph.add_node("model", model)
    graph.add_node("tools", ToolNode([nap]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", route, ["tools", END])
    graph.add_edge("tools", "model")
    return graph.compile()


class State(TypedDict):
    done: Annotated[list[int], operator.add]


async def branch_seconds() -> float:
    """Five waits of 0.02 s in a row beside one of 1 s: when the fifth has ended."""
    graph = StateGraph(State)
    ended: dict[int, float] = {}

    def node(number: int, seconds: float) -> Any:
        async def work(_: State) -> dict[str, list[int]]:
            await asyncio.sleep(seconds)
            ended[number] = time.perf_counter()
            return {"done": [number]}

        return work

    for number in range(6):
        graph.add_node(f"t{number}", node(number, 0.02 if number else 1.0))
        graph.add_edge(f"t{number - 1}" if number > 1 else START, f"t{number}")
    graph.add_edge("t0", END)
    graph.add_edge("t5", END)
    compiled = graph.compile()
    clock = time.perf_counter()
    await compiled.ainvoke({"done": []})
    return ended[5] - clock


async def main() -> dict[str, float]:
    global peak
    clock = time.perf_counter()
    await agent([[0.3] * 16]).ainvoke({"messages": []})
    fanout = time.perf_counter() - clock
    branch_s = await branch_seconds()
    peak = 0
    await agent([[0.02] * MANY]).ainvoke({"messages": []})
    most = peak
    told = [event async for event in agent([[0.0] * 3]).astream_events({"messages": []}, version="v2")]
    return {"fanout16_s": fanout, "branch_s": branch_s, "peak_of_500": most, "records_of_a_run": len(told)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
