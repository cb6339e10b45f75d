"""What can be asked of a sandbox, and the frames that carry it."""

from __future__ import annotations

import socket
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.sandbox import DenoRuntime, Job, Limits, NativeRuntime, Relay, Setup
from shoal.sandbox.guest import wire
from shoal.sandbox.room import addresses, job_frame


@given(st.text(max_size=30))
def test_a_file_name_stays_below_the_scratch_folder(name: str) -> None:
    try:
        Job(files={name: b""}, collect=(name,))
    except ConfigError:
        return
    path = PurePosixPath("/scratch") / name
    assert path.is_relative_to("/scratch") and ".." not in path.parts and str(path) != "/scratch"


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../a", "a/../../b", "a\0b", "a//b", "a/", "./a"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="file name inside a sandbox"):
        Job(collect=(name,))


@pytest.mark.parametrize("inside", ["/", "input", "/scratch", "/scratch/x", "/proc/x", "/a/../etc", "/etc", "/usr/bin"])
def test_folders_are_not_shown_over_what_is_there(inside: str) -> None:
    with pytest.raises(ConfigError, match="cannot show"):
        Setup(read_only={inside: Path("/tmp")})


@pytest.mark.parametrize("limit", ["wall_s", "cpu_s", "memory_bytes", "processes", "output_bytes", "scratch_bytes"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ConfigError, match=limit):
        Limits(**{limit: 0})
    with pytest.raises(ConfigError, match=limit):
        Limits(**{limit: float("nan")})


@pytest.mark.parametrize(
    ("name", "port"), [("a b", 8545), ("x\n127.0.0.1 y", 8545), ("a,b", 8545), ("", 8545), ("a", 80)]
)
def test_relays_that_cannot_be(name: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot be offered"):
        Relay(name, port, ("127.0.0.1", 1))


def test_each_name_has_an_address_of_its_own() -> None:
    relays = tuple(Relay(name, 8545, ("127.0.0.1", 1)) for name in ("a", "b.example", "127.0.0.1", "localhost", "a"))
    found = addresses(Setup(relays=relays))
    assert found["localhost"] == found["127.0.0.1"] == "127.0.0.1"
    assert len({found["a"], found["b.example"], "127.0.0.1"}) == 3
    with pytest.raises(ConfigError, match="8.8.8.8"):
        addresses(Setup(relays=(Relay("8.8.8.8", 8545, ("8.8.8.8", 53)),)))


def test_jobs_that_do_not_fit_their_runtime() -> None:
    with pytest.raises(ConfigError, match="native job"):
        job_frame(Setup(NativeRuntime()), Job(source="print()"))
    with pytest.raises(ConfigError, match="native job"):
        job_frame(Setup(NativeRuntime()), Job(argv=("ls",)))
    with pytest.raises(ConfigError, match="NUL"):
        job_frame(Setup(), Job(argv=("a\0b",)))
    assert job_frame(Setup(DenoRuntime()), Job(source="1", argv=("\0",)))[1][0].endswith(b"\n")


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers() | st.text()), st.lists(st.binary(max_size=2000), max_size=5)
)
def test_frames_arrive_as_sent(header: dict[str, object], blobs: list[bytes]) -> None:
    here, there = socket.socketpair()
    with here, there:
        wire.send(here, header, blobs)
        received, contents = wire.receive(there, 10_000)
    assert contents == blobs
    assert {name: value for name, value in received.items() if name != "blobs"} == header


@given(st.binary(max_size=200))
def test_a_hostile_frame_is_an_error_and_never_a_large_read(data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(data)
        here.shutdown(socket.SHUT_WR)
        try:
            header, blobs = wire.receive(there, 1000)
        except (EOFError, ValueError):
            return
    assert isinstance(header, dict) and sum(map(len, blobs)) <= 1000
