"""An agent that knows nothing of Shoal: it asks an OpenAI-compatible API, with the standard library alone.

`MODE` says what it does: one question (default), two in a conversation, two side by side, or one of several faults.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.request
from typing import Any

MODE = os.environ.get("MODE", sys.argv[1] if len(sys.argv) > 1 else "one")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read() or b"{}"))


def chat(messages: list[dict[str, Any]], **more: Any) -> str:
    body = {"model": "gpt-whatever", "messages": messages, "temperature": 0.1, "top_p": 0.5, **more}
    found = post(f"{os.environ['OPENAI_BASE_URL']}/chat/completions", body)
    return str(found["choices"][0]["message"]["content"])


def main() -> None:
    task = json.loads(sys.stdin.readline())
    assert task == json.loads(os.environ["SHOAL_TASK"])
    messages = task["messages"]
    if MODE == "silent":
        return
    answer = chat(messages)
    if MODE == "two":
        answer = chat([*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "again?"}])
    elif MODE == "side":
        found: list[str] = []
        asked = [*messages, {"role": "assistant", "content": answer}]
        threads = [
            threading.Thread(target=lambda n=n: found.append(chat([*asked, {"role": "user", "content": f"{n}?"}])))
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif MODE == "crash":
        raise ValueError("the agent divided by a banana")
    elif MODE == "hang":
        threading.Event().wait()
    elif MODE == "post":
        post(os.environ["SHOAL_REWARD_URL"], {"reward": 0.25, "parts": {"posted": 1.0}})
    print("thinking aloud")
    print(json.dumps({"answer": answer, "reward": 0.5, "parts": {"half": 0.5}}))


if __name__ == "__main__":
    main()
