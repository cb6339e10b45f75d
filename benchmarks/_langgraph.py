"""One graph of waits in LangGraph, run by that peer's own Python: durations and dependencies in, seconds out (JSON).

echo '{"durations": [0.1, 0.2], "needs": [[], [0]]}' | python _langgraph.py
"""

from __future__ import annotations

import asyncio
import json
import operator
import sys
import time
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    done: Annotated[list[int], operator.add]


async def run(durations: list[float], needs: list[list[int]]) -> dict[str, Any]:
    ended: dict[int, float] = {}
    graph = StateGraph(State)

    def node(number: int) -> Any:
        async def work(_: State) -> dict[str, list[int]]:
            await asyncio.sleep(durations[number])
            ended[number] = time.perf_counter()
            return {"done": [number]}

        return work

    for number in range(len(durations)):
        graph.add_node(f"t{number}", node(number))
    for number, needed in enumerate(needs):
        if needed:
            graph.add_edge([f"t{one}" for one in needed], f"t{number}")
        else:
            graph.add_edge(START, f"t{number}")
        if not any(number in other for other in needs):
            graph.add_edge(f"t{number}", END)
    compiled = graph.compile()
    started = time.perf_counter()
    result = await compiled.ainvoke({"done": []}, {"recursion_limit": 200})
    seconds = time.perf_counter() - started
    assert sorted(result["done"]) == list(range(len(durations)))
    return {"seconds": seconds, "ended_s": [ended[number] - started for number in range(len(durations))]}


if __name__ == "__main__":
    graph = json.load(sys.stdin)
    print(json.dumps(asyncio.run(run(graph["durations"], graph["needs"]))))
