"""One quest being done: the chain set as it should be, acts carried out, and what was done remembered for the judge.

Invariants: whatever happens, `end` leaves the chain as `begin` found it; an act that makes no sense changes nothing
but the count of attempts.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.envs.evm.abi import AbiError, decode, encode
from shoal.envs.evm.actions import (
    CHAIN_FUNCTIONS,
    Action,
    ActionError,
    Call,
    Found,
    Pay,
    Permit,
    Query,
    Report,
    Send,
    Submit,
    address,
    outputs,
    resolve,
    transaction,
)
from shoal.envs.evm.chain import ChainBackend, Receipt, Reverted, Transaction
from shoal.envs.evm.judging import Judge, Verdict
from shoal.envs.evm.language import Form, LanguageError, World, parse, plain
from shoal.envs.evm.permit import permit_transaction
from shoal.envs.evm.record import Asked, Record
from shoal.envs.evm.sampling import Instance

MAX_SHOWN_CHARS = 600
MAX_ATTEMPTS = 3
"""Failed acts in a row after which a composite quest ends."""
ROUNDS_PER_STEP = 2


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the agent reads after an act, and whether that was the end."""

    text: str
    done: bool


@dataclass
class Quest:
    """One instance on one chain."""

    instance: Instance
    chain: ChainBackend
    record: Record = field(default_factory=Record)
    values: dict[str, Any] = field(default_factory=dict)
    """The instance's parameters and, once it began, what its file's `let` names."""
    rounds: int = 0
    _failures: int = 0
    _point: Hashable | None = None
    _judge: Judge | None = None

    def begin(self) -> None:
        """Set the stage and note what the checks need of the state before."""
        self._point = self.chain.snapshot()
        world = World(self.chain, self.instance.values)
        for step in self.instance.definition.setup:
            node = parse(step)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "wait":
                self.chain.mine(world.evaluate(node.args[0]))
                continue
            receipt = self.chain.send(form_transaction(world.form(node)))
            if not receipt.success:
                raise LanguageError(f"setup {step!r} of {self.instance.definition.id} reverts: {receipt.reason}.")
        self.values = {**self.instance.values, "start": self.chain.timestamp()}
        for name, expression in self.instance.definition.let.items():
            self.values[name] = World(self.chain, self.values).evaluate(expression)
        self._judge = Judge(self.instance.definition, self.chain, self.values)
        self._judge.note()

    @property
    def max_rounds(self) -> int:
        definition = self.instance.definition
        return ROUNDS_PER_STEP * definition.optimal_steps if definition.composite else 1

    def act(self, action: Action | Found | ActionError) -> Feedback:
        """Carry out one act. An `ActionError` stands for words that were none, `Found` for a script's query."""
        if isinstance(action, Submit | Report):
            if isinstance(action, Submit):
                self.record.answer.update(action.answer)
            return Feedback("", True)
        self.rounds += 1
        try:
            text, failed = self._carry_out(action)
        except (ActionError, AbiError, Reverted) as error:
            text, failed = f"Not done: {error}.", True
        self._failures = self._failures + 1 if failed else 0
        over = self.rounds >= self.max_rounds or self._failures >= MAX_ATTEMPTS
        return Feedback(text, over or not self.instance.definition.composite)

    def _carry_out(self, action: Send | Pay | Permit | Query | Found | ActionError) -> tuple[str, bool]:
        if isinstance(action, ActionError):
            raise action
        if isinstance(action, Found):
            return self._tell(action.answer), False
        if isinstance(action, Query):
            return self._ask(action), False
        sent = permit_transaction(self.chain, action) if isinstance(action, Permit) else transaction(action)
        receipt = self.chain.send(sent)
        self.record.receipts.append(receipt)
        return _describe(receipt), not receipt.success

    def _ask(self, query: Query) -> str:
        results: dict[str, Any] = {}
        for name, call in query.calls.items():
            if call.to:
                to, signature, data = resolve(call)
                raw = self.chain.call(to, data, "0x" + "00" * 20)
                types = outputs(signature)
                values = decode(types, raw) if types else ("0x" + raw.hex(),)
                results[name] = _pick(plain(values[0] if len(values) == 1 else values), call)
                self.record.asked.append(Asked(to, data, len(self.record.receipts)))
            else:
                results[name] = self._ask_chain(call)
        return self._tell(results)

    def _tell(self, results: Mapping[str, Any]) -> str:
        """What a query found, as the agent reads it; where it is all that was asked for, it is the answer."""
        if not self.instance.definition.composite:
            self.record.answer.update(results)
        return "; ".join(f"{name} = {value}" for name, value in results.items())[:MAX_SHOWN_CHARS]

    def _ask_chain(self, call: Call) -> int:
        wanted = CHAIN_FUNCTIONS.get(call.function)
        if wanted is None or wanted != len(call.args):
            raise ActionError(f"without a contract one can ask for {', '.join(CHAIN_FUNCTIONS)}")
        args = [address(arg) for arg in call.args]
        self.record.asked.append(Asked(call.function, "".join(args).encode(), len(self.record.receipts)))
        match call.function, args:
            case "eth_getBalance", [who]:
                return self.chain.balance(who)
            case "eth_getTransactionCount", [who]:
                return self.chain.nonce(who)
            case "eth_blockNumber", _:
                return self.chain.block_number()
            case "eth_gasPrice", _:
                return self.chain.gas_price()
        return self.chain.priority_fee()

    def verdict(self) -> Verdict:
        """What the acts so far are worth."""
        assert self._judge is not None, "a quest is judged after it began"
        return self._judge.verdict(self.record, max(1, self.rounds))

    def end(self) -> None:
        """Put the chain back; harmless where it is back already."""
        if self._point is not None:
            self.chain.revert(self._point)
            self._point = None


def form_transaction(form: Form) -> Transaction:
    """A form as what is to be sent."""
    data = form.data if form.function is None else encode(form.function.signature, form.args)
    return Transaction(form.by, form.to, bytes(data), int(form.value))


def _pick(value: Any, call: Call) -> Any:
    if call.index is None:
        return value
    if not isinstance(value, list) or call.index >= len(value):
        raise ActionError(f"{call.function[:60]} gives no value number {call.index}")
    return value[call.index]


def _describe(receipt: Receipt) -> str:
    if not receipt.success:
        return f"The transaction reverted in block {receipt.block}: {receipt.reason}."
    return f"The transaction succeeded in block {receipt.block} with {len(receipt.logs)} events."
