"""Tools over a chain: plain values in and out, and no trace."""

from __future__ import annotations

import json

import pytest

from shoal.envs.evm.actions import ActionError, Pay, Send
from shoal.envs.evm.chain import ChainBackend, Reverted
from shoal.envs.evm.genesis import AGENT, load_genesis
from shoal.envs.evm.language import ETHER
from shoal.envs.evm.tools import balance, call, simulate

STRANGER = "0x" + "ab" * 20


def test_balances(chain: ChainBackend) -> None:
    assert balance(chain) == {"base_units": str(100 * ETHER), "amount": "100"}
    assert balance(chain, "me", "USDT") == {"base_units": str(1000 * ETHER), "amount": "1000"}
    assert balance(chain, STRANGER, "CAKE") == {"base_units": "0", "amount": "0"}
    with pytest.raises(ActionError):
        balance(chain, "Bob")
    with pytest.raises(ActionError):
        balance(chain, "me", STRANGER)


def test_calls(chain: ChainBackend) -> None:
    assert call(chain, "USDT", "symbol") == {"values": ["USDT"]}
    assert call(chain, "nft", "ownerOf", ["1"])["values"] == [AGENT]
    (amounts,) = call(chain, "router", "getAmountsOut", ["1 ether", ["USDT", "BUSD"]])["values"]
    assert amounts[0] == str(ETHER) and int(amounts[1]) > 0
    assert call(chain, "USDT", "decimals()")["values"] == ["18"]
    assert call(chain, "T1363", "DOMAIN_SEPARATOR")["values"][0].startswith("0x")
    with pytest.raises(Reverted, match="exceeds balance"):
        call(chain, "USDT", "transfer", [STRANGER, "5000 ether"])
    with pytest.raises(ActionError, match="no function"):
        call(chain, "USDT", "fly")


def test_a_simulation_says_what_would_happen_and_nothing_does(chain: ChainBackend) -> None:
    transfer = Send(action="send", to="USDT", function="transfer", args=(STRANGER, "2 ether"))
    told = simulate(chain, transfer)
    assert told == {
        "success": True,
        "reason": "",
        "events": [
            {
                "address": load_genesis().names["USDT"],
                "event": "Transfer",
                "values": [AGENT, STRANGER, str(2 * ETHER)],
            }
        ],
        "spent": "0",
    }
    assert json.loads(json.dumps(told)) == told
    poor = simulate(chain, Send(action="send", to="USDT", function="transfer", args=(STRANGER, "5000 ether")))
    assert (poor["success"], poor["reason"], poor["events"]) == (False, "transfer amount exceeds balance", [])
    assert simulate(chain, Pay(action="pay", to=STRANGER, value="3 ether"))["spent"] == str(3 * ETHER)
    assert balance(chain, STRANGER)["base_units"] == balance(chain, STRANGER, "USDT")["base_units"] == "0"
    assert not chain.receipts()
