"""The filter, run by a small reference machine: every rule, on both architectures, and what no rule names."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.sandbox import SandboxUnavailable
from shoal.sandbox.seccomp import ARCHITECTURES, CLONE3, DENIED, JUDGED, NEW_NAMESPACE, NEWEST_CALL, build_filter

ALLOW, KILL = "allow", "kill"
FILTERS = {machine: build_filter(machine) for machine in ARCHITECTURES}


def judge(machine: str, number: int, *arguments: int, architecture: int | None = None) -> str:
    """What the kernel would answer: a plain interpreter of the classic BPF subset that filters use."""
    data = struct.pack(
        "=iIQ6Q", number, ARCHITECTURES[machine][1] if architecture is None else architecture, 0,
        *(*arguments, *[0] * (6 - len(arguments))),
    )  # fmt: skip
    program = list(struct.iter_unpack("=HBBI", FILTERS[machine]))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            at += if_true if accumulator == value else if_false
        elif code == 0x25:
            at += if_true if accumulator > value else if_false
        else:
            assert code == 0x06
            if value & 0xFFFF0000 == 0x00050000:
                return errno.errorcode[value & 0xFFFF]
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}[value]


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_denied_call_is_denied_and_no_number_serves_twice(machine: str) -> None:
    column = ARCHITECTURES[machine][0]
    numbers = [entry[column] for entry in DENIED.values()] + [rule.numbers[column] for rule in JUDGED.values()]
    numbers = [number for number in numbers if number >= 0]
    assert len(numbers) == len(set(numbers))
    for name, entry in DENIED.items():
        if entry[column] >= 0:
            assert judge(machine, entry[column]) == "EPERM", name


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_calls_outside_the_tables_are_allowed_up_to_the_newest_known(machine: str, number: int, argument: int) -> None:
    column = ARCHITECTURES[machine][0]
    named = {entry[column] for entry in DENIED.values()} | {rule.numbers[column] for rule in JUDGED.values()}
    number = number if number < 2**31 else number - 2**32
    if number in named:
        return
    beyond = number < 0 or number > NEWEST_CALL or number == CLONE3
    assert judge(machine, number, argument) == ("ENOSYS" if beyond else ALLOW)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(0, 2**64 - 1))
def test_clone_may_not_make_a_namespace(machine: str, flags: int) -> None:
    number = JUDGED["clone"].numbers[ARCHITECTURES[machine][0]]
    assert judge(machine, number, flags) == ("EPERM" if flags & NEW_NAMESPACE else ALLOW)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(0, 2**32 - 1))
def test_mmap_may_not_share_anonymous_memory(machine: str, flags: int) -> None:
    number = JUDGED["mmap"].numbers[ARCHITECTURES[machine][0]]
    assert judge(machine, number, 0, 4096, 3, flags) == ("EPERM" if flags & 0x21 == 0x21 else ALLOW)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(0, 2**32 - 1))
def test_only_three_families_of_sockets(machine: str, family: int) -> None:
    number = JUDGED["socket"].numbers[ARCHITECTURES[machine][0]]
    assert judge(machine, number, family) == (ALLOW if family in (1, 2, 10) else "EPERM")


def test_other_architectures_and_x32_calls() -> None:
    assert judge("x86_64", 0, architecture=0x40000003) == KILL  # i386 code on a 64-bit machine
    assert judge("x86_64", 0x40000000 | 59) == "ENOSYS"
    with pytest.raises(SandboxUnavailable, match="riscv64"):
        build_filter("riscv64")
