"""ERC-2612 permits: the agent's signature that allows a spender, as EIP-712 defines it."""

from __future__ import annotations

from eth_keys.datatypes import PrivateKey
from eth_utils.crypto import keccak

from shoal.envs.evm.abi import decode, encode
from shoal.envs.evm.actions import Permit, address, amount
from shoal.envs.evm.chain import ChainBackend, Transaction
from shoal.envs.evm.genesis import AGENT, AGENT_KEY

SIGNATURE = "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)"
TYPE_HASH = keccak(text="Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)")


def permit_transaction(chain: ChainBackend, action: Permit) -> Transaction:
    """The transaction of a signed permit.

    Raises:
        ActionError: an address or amount makes no sense.
        AbiError, Reverted: the token knows no permits.
    """
    token, spender, value = address(action.token), address(action.spender), amount(action.value)
    nonce = decode(["uint256"], chain.call(token, encode("nonces(address)", [AGENT]), AGENT))[0]
    domain = decode(["bytes32"], chain.call(token, encode("DOMAIN_SEPARATOR()", ()), AGENT))[0]
    types = "f(bytes32,address,address,uint256,uint256,uint256)"
    content = keccak(encode(types, [TYPE_HASH, AGENT, spender, value, nonce, action.deadline])[4:])
    signed = PrivateKey(AGENT_KEY).sign_msg_hash(keccak(b"\x19\x01" + domain + content))
    r, s = signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")
    data = encode(SIGNATURE, [AGENT, spender, value, action.deadline, signed.v + 27, r, s])
    return Transaction(AGENT, token, data)
