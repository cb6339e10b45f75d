"""The Python interface of scripts encodes as the platform does, however an ABI is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.envs.evm.abi import encode, interfaces
from shoal.envs.evm.genesis import contract_file
from shoal.envs.evm.scripts.guest.contract import Contract, Function, read_abi

ARTIFACTS = json.loads(contract_file("artifacts.json"))
ADDRESS = "0x" + "ab" * 20
VALUES = {
    "address": st.integers(0, 2**160 - 1).map(lambda n: f"0x{n:040x}"),
    "uint256": st.integers(0, 2**256 - 1),
    "bool": st.booleans(),
    "string": st.text(max_size=20),
    "bytes": st.binary(max_size=40),
    "bytes4": st.binary(min_size=4, max_size=4),
    "bytes32": st.binary(min_size=32, max_size=32),
}
FUNCTIONS = sorted(
    {
        function.signature: function
        for contract in interfaces().values()
        for function in contract.functions.values()
        if all(kind in VALUES for kind in function.inputs)
    }.items()
)


def bound(abi: list[Function]) -> Contract:
    return Contract(ADDRESS, abi, lambda transaction: b"")


def test_known_interfaces_are_read_whole() -> None:
    for name, artifact in ARTIFACTS.items():
        read = {function.signature for function in read_abi(artifact["abi"])}
        assert read == {e["name"] + f"({','.join(i['type'] for i in e['inputs'])})" for e in artifact["abi"]
                        if e["type"] == "function"}, name  # fmt: skip
        assert read == {function.signature for function in read_abi(json.dumps(artifact["abi"]))}


@given(st.data())
def test_call_data_is_the_platform_s(data: st.DataObject) -> None:
    signature, function = data.draw(st.sampled_from(FUNCTIONS))
    args = [data.draw(VALUES[kind]) for kind in function.inputs]
    expected = "0x" + encode(signature, args).hex()
    contract = bound(read_abi([f"function {signature}"]))
    assert contract.functions[signature](*args).data == expected
    assert contract.functions[signature](*args).build_transaction({"value": 3}) == {
        "value": 3, "to": contract.address, "data": expected,
    }  # fmt: skip
    # As text and hex, as JSON would bring them.
    written = ["0x" + a.hex() if isinstance(a, bytes) else str(a) if type(a) is int else a for a in args]
    assert contract.encode_abi(signature.partition("(")[0], written) == expected


@pytest.mark.parametrize(
    ("line", "signature", "outputs"),
    [
        ("function f(address to, uint amount) external returns (bool ok)", "f(address,uint256)", ("bool",)),
        ("f(uint256[] calldata ids, bytes data) payable;", "f(uint256[],bytes)", ()),
        ("function g() view returns (uint112, uint112, uint32)", "g()", ("uint112", "uint112", "uint32")),
        ("  balanceOf( address ) returns(uint) ", "balanceOf(address)", ("uint256",)),
    ],
)
def test_lines_of_an_abi(line: str, signature: str, outputs: tuple[str, ...]) -> None:
    (function,) = read_abi([line, "event Transfer(address indexed from, address to)", "error Bad()"])
    assert (function.signature, function.outputs) == (signature, outputs)


@pytest.mark.parametrize("line", ["struct X { uint a; }", "function f(", "returns", "function f((uint256,bool) x)"])
def test_what_is_no_function_is_said_to_be_none(line: str) -> None:
    with pytest.raises(ValueError, match="is no function of an ABI"):
        read_abi([line])
