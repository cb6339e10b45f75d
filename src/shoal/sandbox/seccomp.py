"""The system calls that a sandbox may not make, as the filter program that bubblewrap loads.

Everything ordinary is allowed: interpreters and native libraries need a wide surface, and the namespaces around
them already take away what most calls could reach. Denied are the calls that open new surface (namespaces, mounts,
BPF, io_uring, userfaultfd, keyrings), that reach into other processes, and that hold memory which no limit counts.

Invariants: a call of another architecture kills the process; a call newer than this table is answered `ENOSYS`, as
by an old kernel; `clone3` is answered `ENOSYS`, so that C libraries fall back to `clone`, whose flags can be judged.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass
from typing import Literal

from shoal.sandbox.errors import SandboxUnavailable

# Offsets in `struct seccomp_data`, and the instructions and answers used below (linux/filter.h, linux/seccomp.h).
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

NEWEST_CALL = 462
"""`mseal`, of Linux 6.10: the last call that this table has considered. The x32 calls of x86_64 lie far above."""

NEW_NAMESPACE = 0x7E020000
"""All `CLONE_NEW*` bits that `clone` takes; `CLONE_NEWTIME` cannot be passed to it."""

_MAP_SHARED_ANONYMOUS = 0x21
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_PER_LINUX, _PERSONALITY_QUERY = 0, 0xFFFFFFFF

DENIED: dict[str, tuple[int, int]] = {
    # Namespaces, mounts and file handles.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442), "statmount": (457, 457),
    "listmount": (458, 458), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "ioprio_set": (251, 30),
    # Kernel programs, queues and keys.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
    # Memory that is charged to no process: it would slip through the limits where there is no cgroup.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "vmsplice": (278, 75), "mbind": (237, 235), "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450),
    # The machine as a whole.
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "syslog": (103, 116), "acct": (163, 89),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42), "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1),
    "ustat": (136, -1), "sysfs": (139, -1),
}  # fmt: skip
"""Call numbers on x86_64 and aarch64, -1 where an architecture lacks the call; all are answered `EPERM`."""


@dataclass(frozen=True)
class Judged:
    """A call whose low 32 bits of one argument decide.

    `test` is `only` (allowed only with one of `values`), `never` (denied with one of `values`), `no_bits` (denied
    where any bit of `values[0]` is set) or `not_all_bits` (denied where all bits of `values[0]` are set).
    """

    numbers: tuple[int, int]
    argument: int
    test: Literal["only", "never", "no_bits", "not_all_bits"]
    values: tuple[int, ...]


JUDGED: dict[str, Judged] = {
    "clone": Judged((56, 220), 0, "no_bits", (NEW_NAMESPACE,)),
    "socket": Judged((41, 198), 0, "only", (_AF_UNIX, _AF_INET, _AF_INET6)),
    "socketpair": Judged((53, 199), 0, "only", (_AF_UNIX,)),
    "ioctl": Judged((16, 29), 1, "never", (_TIOCSTI, _TIOCLINUX, _TIOCSETD)),
    # On itself only: no other process's limits, order or processors may be changed, the supervisor's least of all.
    "prlimit64": Judged((302, 261), 0, "only", (0,)),
    "setpriority": Judged((141, 140), 1, "only", (0,)),
    "sched_setaffinity": Judged((203, 122), 0, "only", (0,)),
    "personality": Judged((135, 92), 0, "only", (_PER_LINUX, _PERSONALITY_QUERY)),
    # Shared anonymous pages outlive the process that filled them, and then belong to none.
    "mmap": Judged((9, 222), 3, "not_all_bits", (_MAP_SHARED_ANONYMOUS,)),
}

CLONE3 = 435

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: the column in the tables above, and the kernel's name of the architecture (AUDIT_ARCH_*)."""


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _judge(rule: Judged, number: int) -> bytes:
    """Jumps over itself for other calls; ends with allow or EPERM for this one."""
    allow, deny = _instruction(_RETURN, _ALLOW), _instruction(_RETURN, _ERRNO | errno.EPERM)
    body = _instruction(_LOAD, _ARGUMENTS + 8 * rule.argument)
    if rule.test in ("no_bits", "not_all_bits"):
        bits = rule.values[0]
        unwanted = bits if rule.test == "not_all_bits" else 0
        body += _instruction(_AND, bits)
        hit, miss = (deny, allow) if rule.test == "not_all_bits" else (allow, deny)
        body += _instruction(_JUMP_EQUAL, unwanted, 0, 1) + hit + miss
    else:
        hit, miss = (allow, deny) if rule.test == "only" else (deny, allow)
        for value in rule.values:
            body += _instruction(_JUMP_EQUAL, value, 0, 1) + hit
        body += miss
    return _instruction(_JUMP_EQUAL, number, 0, len(body) // 8) + body


def build_filter(machine: str = "") -> bytes:
    """The filter as an array of `struct sock_filter`, for `machine` (default: this one).

    Raises:
        SandboxUnavailable: no table for this kind of processor.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise SandboxUnavailable(
            f"The sandbox has no table of system calls for {machine} processors.",
            f"Run untrusted code on one of: {', '.join(ARCHITECTURES)}.",
        )
    column, architecture = ARCHITECTURES[machine]
    no_such_call = _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    program = _instruction(_LOAD, _ARCHITECTURE)
    program += _instruction(_JUMP_EQUAL, architecture, 1, 0) + _instruction(_RETURN, _KILL_PROCESS)
    program += _instruction(_LOAD, _NUMBER)
    program += _instruction(_JUMP_GREATER, NEWEST_CALL, 0, 1) + no_such_call
    program += _instruction(_JUMP_EQUAL, CLONE3, 0, 1) + no_such_call
    for rule in JUDGED.values():
        program += _judge(rule, rule.numbers[column])
    for numbers in DENIED.values():
        if numbers[column] >= 0:
            program += _instruction(_JUMP_EQUAL, numbers[column], 0, 1)
            program += _instruction(_RETURN, _ERRNO | errno.EPERM)
    return program + _instruction(_RETURN, _ALLOW)
