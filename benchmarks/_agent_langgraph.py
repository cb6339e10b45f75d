"""An agent of two calls, written for LangGraph: a draft, then the answer once more after a look at it."""

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

task = json.load(sys.stdin)
llm = ChatOpenAI(model="gpt-4o-mini", temperature=0.2)  # OPENAI_BASE_URL and OPENAI_API_KEY say where


def draft(state: MessagesState) -> dict[str, Any]:
    return {"messages": [llm.invoke(state["messages"])]}


def revise(state: MessagesState) -> dict[str, Any]:
    once_more = {"role": "user", "content": task["messages"][-1]["content"]}
    return {"messages": [once_more, llm.invoke([*state["messages"], once_more])]}


graph = StateGraph(MessagesState)
graph.add_node("draft", draft)
graph.add_node("revise", revise)
graph.add_edge(START, "draft")
graph.add_edge("draft", "revise")
graph.add_edge("revise", END)
result = graph.compile().invoke({"messages": task["messages"]})
print(json.dumps({"answer": result["messages"][-1].content}))
