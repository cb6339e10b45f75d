"""Imported last, before the first script arrives: does once what is slow the first time, for every fork to find done.

Reading an ABI's types and making their codecs takes milliseconds each; every script would pay for it again.
"""

from __future__ import annotations

import gc

from eth_abi.registry import registry
from eth_utils.address import to_checksum_address

from shoal.envs.evm.scripts.guest.chain import known_interfaces
from shoal.envs.evm.scripts.guest.contract import read_abi


def warm_up() -> None:
    """Make every codec that the known contracts need."""
    for functions in known_interfaces().values():
        for function in functions:
            for kind in (*function.inputs, *function.outputs):
                registry.get_encoder(kind)
                registry.get_decoder(kind)
            # The same function, as scripts write it.
            read_abi([f"function {function.signature}"])
    to_checksum_address("0x" + "00" * 20)
    # What is here stays: a fork's garbage collector need not touch, and so copy, its pages.
    gc.collect()
    gc.freeze()


warm_up()
