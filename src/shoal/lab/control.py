"""What a lab and its switch process say to each other: JSON lines over a socket pair, one reply to each request.

The lab ends the switch by closing its end; a lab that dies does the same without knowing.
"""

from __future__ import annotations

import msgspec

from shoal.lab.network import Network
from shoal.lab.statistics import Statistics

MAX_LINE_BYTES = 64 * 2**20
"""Statistics of the largest network fit well."""


class SetUp(msgspec.Struct, frozen=True, tag=True):
    """Make the namespaces and devices; answered by `Ready` or `Failed`."""

    network: Network
    owner_pid: int
    owner_start_ticks: int
    number: int
    capture: str = ""
    """Folder for a `NODE.pcap` of each node; none: nothing is captured."""


class SetCuts(msgspec.Struct, frozen=True, tag=True):
    """Exactly these (source, target) are cut; the NATs of `restart` forget their sessions. Answered by `Done`."""

    pairs: list[tuple[int, int]]
    restart: list[int]


class AskStatistics(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Counted`."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The network stands."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """Carried out."""


class Counted(msgspec.Struct, frozen=True, tag=True):
    """The counts so far."""

    statistics: Statistics


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What the user has to mend."""

    problem: str
    remedy: str


Request = SetUp | SetCuts | AskStatistics
Reply = Ready | Done | Counted | Failed
