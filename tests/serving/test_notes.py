"""A server may put what it remembers before a conversation's last message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoal.config import Serving
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.screening import RECALLED_CLOSE, RECALLED_OPEN
from shoal.serving.api import Api
from shoal.serving.chat import ask
from shoal.serving.notes import Notes
from shoal.serving.schema import ChatBody

sys.path.append(str(Path(__file__).parents[1] / "memory"))

from memory_makers import make_entry, noisy_trials

COMMON, OWN = "Carry the one to the next column.", "Ann wants columns with a frame."


async def test_conversations_get_notes_within_a_budget_and_of_their_user(model: Path, tmp_path: Path) -> None:
    with Keeper(tmp_path / "m", "n") as keeper:
        for text, user in ((COMMON, ""), (OWN, "ann")):
            memory = keeper.add(make_entry(text, user=user))
            assert keeper.report(memory.id, noisy_trials(0.5, 200, 1)).verdict == "accept"
    local = LocalModel("tiny", model)
    async with LocalEngine(local, dtype="fp32", device="cpu", max_sequences=2, context_tokens=1024) as engine:
        api = Api(engine, "tiny", Serving(context_tokens=1024))
        tokenizer = engine.tokenizer

        async def read(user: str | None, *said: tuple[str, str]) -> str:
            messages = [{"role": role, "content": content} for role, content in said]
            body = ChatBody.model_validate({"model": "tiny", "messages": messages, "user": user, "max_tokens": 4})
            return str(tokenizer.hf.decode((await ask(api, body)).job.prompts[0]))

        question = ("user", "How do I carry to the next column?")
        bare = await read(None, question)
        assert RECALLED_OPEN not in bare
        api.notes = Notes(tmp_path / "m", tokenizer, 400)
        shown = await read(None, question)
        assert COMMON in shown and OWN not in shown
        assert shown.index(RECALLED_OPEN) < shown.index(RECALLED_CLOSE) < shown.index(question[1])
        framed = ("user", "Which columns have a frame for Ann?")
        assert OWN in await read("ann", framed) and OWN not in await read(None, framed)
        assert RECALLED_OPEN not in await read(None, question, ("assistant", "By columns."))
        api.notes.close()
        api.notes = Notes(tmp_path / "m", tokenizer, 20)
        assert await read(None, question) == bare
        api.notes.close()
        with pytest.raises(ConfigError, match="no memories"):
            Notes(tmp_path / "nowhere", tokenizer, 20)
