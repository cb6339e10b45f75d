"""Models whose template opens a thought: what must match a grammar is the answer, and not the thought."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_cases import SMOL_TEMPLATE, make_tokenizer

from shoal.config import Serving
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.protocol.sampling import Grammar
from shoal.serving.api import Api
from shoal.serving.chat import Asked, ask
from shoal.serving.dialect import Dialect, Reply
from shoal.serving.responses import ResponseBody
from shoal.serving.schema import ChatBody, Tool

OPENED = SMOL_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}{# until </think> #}"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name":"add","arguments":{}}\n</tool_call>'


@pytest.fixture
async def api(model: Path, tmp_path: Path) -> AsyncIterator[Api]:
    directory = shutil.copytree(model, tmp_path / "thinks")
    make_tokenizer(OPENED).save_pretrained(directory)
    local = LocalModel("thinks", directory)
    async with LocalEngine(local, dtype="fp32", device="cpu", max_sequences=2, context_tokens=512) as engine:
        yield Api(engine, "thinks", Serving(context_tokens=512))


async def asked(api: Api, **more: Any) -> Asked:
    body = {"model": "thinks", "messages": [{"role": "user", "content": "1?"}], "max_tokens": 4, **more}
    return await ask(api, ChatBody.model_validate(body))


async def test_a_thought_is_ended_where_the_answer_must_match_a_grammar(api: Api) -> None:
    free = await asked(api)
    assert free.thinking and not free.closing
    assert free.read("hm</think>\n\n42") == Reply("42", "hm")
    assert (await asked(api, response_format={"type": "text"})).thinking
    assert (await asked(api, tools=[TOOL])).thinking, "it may call, after it has thought"
    for bound in ({"response_format": {"type": "json_object"}}, {"tools": [TOOL], "tool_choice": "required"}):
        found = await asked(api, **bound)
        assert not found.thinking and found.closing
        assert api.engine.tokenizer.hf.decode(found.job.prompts[0]).endswith("<think>\n\n</think>\n\n")
        assert found.read("{}") == Reply("{}")
    assert found.read(CALL).calls


async def test_a_model_that_thinks_by_itself_may_do_so_before_it_calls(api: Api) -> None:
    def allows(dialect: Dialect, text: str, *, must_call: bool = False) -> bool:
        lark = dialect.grammar([Tool.model_validate(TOOL)], must_call=must_call, parallel=True)
        return api.engine.grammars.allows(Grammar(kind="lark", text=lark), api.engine.tokenizer.encode(text))

    thinks, speaks = Dialect(thinks=True), Dialect()
    assert allows(thinks, f"<think>\nhm\n</think>\n\n{CALL}") and allows(thinks, CALL) and allows(thinks, "2")
    assert not allows(thinks, "<tool_call>2") and not allows(thinks, "<think>", must_call=True)
    assert not allows(speaks, "<think>") and allows(speaks, CALL)


def test_a_response_is_asked_for_by_its_user_and_with_instructions_beside_the_longest_input() -> None:
    said = {"role": "user", "content": "1?"}
    body = ResponseBody.model_validate({"model": "m", "input": [said] * 4095, "instructions": "Add.", "user": "ann"})
    chat = body.as_chat()
    assert chat.user == "ann" and len(chat.messages) == 4096
    with pytest.raises(ValueError, match="at most 4095"):
        ResponseBody.model_validate({"model": "m", "input": [said] * 4096})
