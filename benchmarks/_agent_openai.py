"""An agent of one call, written for OpenAI's SDK alone: a task on standard input, its answer on standard output."""

import json
import sys

from openai import OpenAI

task = json.load(sys.stdin)
client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY say where
answer = client.chat.completions.create(model="gpt-4o-mini", messages=task["messages"], temperature=0.2)
print(json.dumps({"answer": answer.choices[0].message.content}))
