"""Attempts to get out, made in earnest by a program that knows Python, ctypes and the kernel. Each must be denied.

Every program here prints what it got; what it should get is written beside it. The host's own state is looked at
afterwards where an attempt could have changed it.
"""

# Programs inside texts keep their long lines; waiting for processes is polling.
# ruff: noqa: E501, ASYNC230

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from shoal.sandbox import Job, Limits, NativeRuntime, Program, Result, Sandbox, Setup

PRELUDE = """
import ctypes, errno, os, socket, stat, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else f"ESCAPED {result}"
def attempt(what, *arguments, **named):
    try:
        return f"ESCAPED {what(*arguments, **named)!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
"""

X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of these calls are those of x86_64")


async def run(sandbox: Sandbox, source: str, *, setup: Setup | None = None, **job: object) -> Result:
    result = await sandbox.run(
        Program(Job(source=PRELUDE + source, **job), setup or Setup()),  # type: ignore[arg-type]
        Limits(wall_s=20),
    )
    assert result.reason == "ok", result
    return result


async def lines(sandbox: Sandbox, source: str, **more: object) -> list[str]:
    return (await run(sandbox, source, **more)).stdout.decode().splitlines()  # type: ignore[arg-type]


async def test_files_of_the_host_are_not_there(sandbox: Sandbox, repository: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    paths = ["/etc/shadow", str(Path.home() / ".ssh"), str(Path.home()), str(repository), str(secret), "/sys", "/root",
             "/home", "/var", "/run", "/boot", "/mnt", sys.executable]  # fmt: skip
    assert set(await lines(sandbox, f"for path in {paths!r}: print(attempt(os.stat, path))")) == {"ENOENT"}
    # Nor through what is there: the way up ends at the sandbox's own root, and no mount can be left.
    source = f"for way in ('/..', '/proc/self/root', '/proc/self/cwd/../..', '/dev/fd/../../root'):\n    print(attempt(os.stat, way + {str(secret)!r}))"
    assert set(await lines(sandbox, source)) == {"ENOENT"}


async def test_nothing_can_be_written_but_the_scratch_folder(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "given").write_text("given")
    (tmp_path / "given").chmod(0o666)
    source = """
for folder in ('/', '/input', '/dev', '/dev/shm', '/etc', '/usr', '/usr/lib', '/python', '/python/lib', '/shoal', '/proc', '/proc/sys'):
    if os.path.isdir(folder): print(attempt(open, folder + '/new', 'w'))
for path in ('/input/given', '/etc/passwd', '/etc/hosts', '/python/bin/python3', '/shoal/shoal/sandbox/guest/warden.py', '/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern'):
    print(attempt(open, path, 'r+')); print(attempt(os.unlink, path)); print(attempt(os.chmod, path, 0o777))
    print(attempt(os.link, path, '/scratch/link')); print(attempt(os.rename, path, '/scratch/moved'))
"""
    denied = set(await lines(sandbox, source, setup=Setup(read_only={"/input": tmp_path})))
    assert denied <= {"EROFS", "EACCES", "EPERM", "ENOENT", "EXDEV", "EBUSY", "EIO", "ETXTBSY"}, denied
    assert (tmp_path / "given").read_text() == "given" and os.listdir(tmp_path) == ["given"]
    assert "ESCAPED" not in "".join(denied)


async def test_no_program_of_the_host_can_be_executed(sandbox: Sandbox) -> None:
    source = "for path in ('/bin/sh', '/usr/bin/env', '/usr/bin/bwrap', '/bin/mount', '/usr/bin/sudo', '/usr/bin/git'):\n    print(attempt(os.execv, path, [path]))"
    assert set(await lines(sandbox, source)) == {"ENOENT"}
    result = await sandbox.run(Program(Job(argv=("/bin/sh", "-c", "echo ESCAPED")), Setup(NativeRuntime())))
    assert (result.exit_code, result.stdout) == (127, b"")


async def test_no_network_of_the_host(sandbox: Sandbox) -> None:
    visits = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        own = socket.gethostbyname(socket.gethostname()) if socket.gethostname() else "127.0.0.1"
        source = f"""
def reach(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(3)
        s.connect(address)
        return s.send(b'x')
INET, STREAM, DATAGRAM = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
print(attempt(reach, INET, STREAM, ('127.0.0.1', {port})))
print(attempt(reach, socket.AF_INET6, STREAM, ('::1', {port})))
for address in ({own!r}, '10.0.0.1', '192.168.0.1', '169.254.169.254', '1.1.1.1', '8.8.8.8'):
    if not address.startswith('127.'):
        print(attempt(reach, INET, STREAM, (address, {port}))); print(attempt(reach, INET, DATAGRAM, (address, 53)))
print(attempt(socket.socket, INET, socket.SOCK_RAW, 1))
print(attempt(socket.socket, 16, socket.SOCK_RAW, 0))  # netlink
print(attempt(socket.socket, 17, socket.SOCK_RAW, 0))  # packet
print(attempt(socket.socket, 40, STREAM))  # vsock, to the hypervisor
print(attempt(socket.socket, 38, 5))  # kernel crypto
try: print('ESCAPED', socket.getaddrinfo('example.com', 80))
except socket.gaierror as error: print('EAI')
print(sorted(os.listdir('/sys/class/net')) if os.path.exists('/sys') else [line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]])
"""
        got = await lines(sandbox, source)
        with pytest.raises(TimeoutError):
            visits.append(listener.accept())
    assert set(got[:-1]) <= {"ECONNREFUSED", "ENETUNREACH", "EADDRNOTAVAIL", "EPERM", "EAI"}, got
    assert got[-1] == "['lo']" or "eth0" not in got[-1]
    assert visits == []


async def test_unix_sockets_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    abstract = f"\0shoal-test-{os.getpid()}"
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(abstract)
        second.bind(path)
        first.listen()
        second.listen()
        source = f"for address in ({abstract!r}, {path!r}):\n    print(attempt(socket.socket(socket.AF_UNIX).connect, address))"
        assert await lines(sandbox, source) == ["ECONNREFUSED", "ENOENT"]


async def test_processes_of_the_host(sandbox: Sandbox) -> None:
    source = f"""
print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit()) == [1, os.getpid()])
for pid in ({os.getpid()}, {os.getppid()}, {threading.get_native_id()}):
    if pid not in (1, os.getpid()):
        print(attempt(os.kill, pid, 9)); print(attempt(os.kill, pid, 0)); print(attempt(os.listdir, f'/proc/{{pid}}'))
try: os.kill(-1, 9)  # everything in sight: itself and the supervisor excepted, there is nothing
except ProcessLookupError: print('nobody')
for number in (9, 15, 19, 2, 1): os.kill(1, number)  # the supervisor is not impressed
print(attempt(os.setpriority, os.PRIO_PROCESS, 1, 19))
print(attempt(os.sched_setaffinity, 1, [0]))
import resource
print(attempt(resource.prlimit, 1, resource.RLIMIT_NOFILE, (3, 3)))
for name in ('mem', 'environ', 'maps', 'root/etc', 'cwd', 'fd', 'ns/net'): print(attempt(os.listdir if name == 'fd' else (lambda p: open(p, 'rb').read(10)), f'/proc/1/{{name}}'))
print(attempt(open, '/proc/1/oom_score_adj', 'w'))
"""
    got = await lines(sandbox, source)
    assert got[0] == "True"
    assert "nobody" in got
    assert set(got[1:]) <= {"ESRCH", "ENOENT", "nobody", "EACCES", "EPERM", "EISDIR"}, got


@X86
async def test_calls_into_the_kernel(sandbox: Sandbox) -> None:
    source = """
NEWUSER, NEWNS, NEWPID, NEWNET = 0x10000000, 0x20000, 0x20000000, 0x40000000
for flags in (NEWUSER, NEWNS, NEWPID, NEWNET, NEWUSER | NEWNS): print(call(272, flags))  # unshare
for flags in (NEWUSER, NEWUSER | NEWNS): print(call(56, flags | 17, 0, 0, 0, 0))  # clone
print(call(435, 0, 0))  # clone3
print(call(308, 0, 0))  # setns
print(call(101, 16, 1, 0, 0), call(101, 0, 0, 0, 0))  # ptrace
print(call(310, 1, 0, 0, 0, 0, 0), call(311, 1, 0, 0, 0, 0, 0))  # process_vm_readv, process_vm_writev
print(call(165, b'none', b'/scratch', b'tmpfs', 0, 0), call(166, b'/scratch', 2), call(155, b'/', b'/'), call(161, b'/scratch'))
print(call(430, b'tmpfs', 0), call(428, -100, b'/', 1), call(304, -100, 0, 0))  # fsopen, open_tree, open_by_handle_at
print(call(248, b'user', b'k', b'v', 1, -3), call(249, b'user', b'k', 0, -3), call(250, 0, -3, 0))  # keys
print(call(321, 0, 0, 0), call(298, 0, 0, -1, -1, 0), call(323, 0), call(425, 8, 0))  # bpf, perf, userfaultfd, io_uring
print(call(319, b'm', 0), call(447, 0), call(29, 0, 1 << 20, 0o1777), call(240, b'q', 66, 0, 0))  # memfd, shm, mqueue
print(call(9, 0, 1 << 30, 3, 0x21, -1, 0))  # shared anonymous memory
print(call(169, 0xfee1dead, 672274793, 0x1234567, 0), call(170, b'x', 1), call(164, 0, 0), call(227, 0, 0), call(103, 3, 0, 0))
print(call(175, 0, 0, b''), call(246, 0, 0, 0, 0), call(163, 0), call(172, 3), call(135, 0x0040000))
print(call(438, 0, 0, 0), call(312, 1, 1, 0, 0, 0))  # pidfd_getfd, kcmp
print(call(1000), call(0x40000000 + 39))  # one that does not exist yet; the x32 way to getpid
"""
    got = " ".join(await lines(sandbox, source)).split()
    assert set(got) <= {"EPERM", "ENOSYS"}, got
    assert len(got) > 45


async def test_no_privilege_can_be_had(sandbox: Sandbox) -> None:
    source = """
import shutil, subprocess
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(*(status[name].strip() for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'Seccomp')))
print(attempt(os.setuid, 0), attempt(os.setresuid, 0, 0, 0), attempt(os.setgid, 0), attempt(os.setgroups, [0]))
print(attempt(os.chown, '/scratch', 0, 0), attempt(os.nice, -5))
shutil.copy('/python/bin/python3', 'own')
os.chmod('own', 0o6755)
print(subprocess.run(['/scratch/own', '-S', '-c', 'import os; print(os.getuid(), os.geteuid(), os.getegid())'],
                     env={**os.environ, 'PYTHONHOME': '/python'}, capture_output=True, text=True).stdout.strip())
print(attempt(os.mknod, 'disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0)), attempt(os.mknod, 'mem', 0o666 | stat.S_IFCHR, os.makedev(1, 1)))
print(sorted(os.listdir('/dev')))
import fcntl
print(attempt(fcntl.ioctl, 0, 0x5412, b'x'), attempt(open, '/dev/tty'))  # typing into the host's terminal
import resource

for name in ('RLIMIT_NPROC', 'RLIMIT_DATA', 'RLIMIT_CPU', 'RLIMIT_CORE'):
    try: resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,) * 2); print('ESCAPED', name)
    except (ValueError, OSError): print('kept')
"""
    got = await lines(sandbox, source)
    assert len(got) == 11, got
    assert got[0] == "0000000000000000 " * 5 + "1 2", got
    # EINVAL: the user namespace has no such user.
    assert got[1] == "EINVAL EINVAL EINVAL EPERM", got
    assert got[2] in ("EPERM EPERM", "EPERM EACCES", "EINVAL EPERM", "EINVAL EACCES"), got
    assert got[3] == "65534 65534 65534"
    assert got[4] == "EPERM EPERM"
    assert got[5] == "['fd', 'full', 'null', 'random', 'stderr', 'stdin', 'stdout', 'urandom']"
    assert got[6] in ("EPERM ENXIO", "EPERM ENOENT")
    assert set(got[7:]) == {"kept"}


async def test_environment_and_descriptors_do_not_leak(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_TEST_SECRET", "planted")
    (tmp_path / "open").write_text("planted")
    with open(tmp_path / "open") as file:
        os.set_inheritable(file.fileno(), True)
        source = """
print('planted' in repr(os.environ), 'planted' in open('/proc/self/environ').read())
print([fd for fd in map(int, os.listdir('/proc/self/fd')) if os.path.exists(f'/proc/self/fd/{fd}')])
for fd in range(3, 300): assert attempt(os.fstat, fd) == 'EBADF', fd
print(os.uname().nodename, [os.readlink(f'/proc/self/fd/{fd}').split(':')[0] for fd in range(3)])
"""
        got = await lines(sandbox, source)
    assert got == ["False False", "[0, 1, 2]", "sandbox ['pipe', 'pipe', 'pipe']"]


async def test_links_and_oddities_are_not_collected(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source = f"""
os.symlink('/etc/passwd', 'link'); os.symlink({str(tmp_path / "secret")!r}, 'outside'); os.symlink('/etc', 'folder')
os.symlink('loop', 'loop'); os.mkfifo('pipe'); os.mkdir('dir'); open('plain', 'w').write('plain')
s = socket.socket(socket.AF_UNIX); s.bind('/scratch/socket')
os.mkdir('dir/dir'); open('dir/dir/inner', 'w').write('inner'); os.symlink('/proc/1/root', 'root')
open('unreadable', 'w').write('x'); os.chmod('unreadable', 0)
"""
    names = ("link", "outside", "folder/passwd", "loop", "pipe", "dir", "socket", "root/etc/passwd", "unreadable")
    result = await run(sandbox, source, collect=(*names, "plain", "dir/dir/inner"))
    assert result.files == {"plain": b"plain", "dir/dir/inner": b"inner"}


async def test_the_supervisor_is_not_fooled(sandbox: Sandbox) -> None:
    """A program in the supervisor's own process image looks for its connection, and dies in every way there is."""
    source = """
import gc
for thing in gc.get_objects():
    if isinstance(thing, socket.socket) and thing.fileno() >= 0: print('found', attempt(thing.send, b'forged'))
for fd in range(3, 64): print(attempt(os.write, fd, b'forged')) if attempt(os.fstat, fd) != 'EBADF' else None
print('end')
"""
    assert set(await lines(sandbox, source)) <= {"found EBADF", "end"}
    for ending, reason in (("os._exit(3)", "exit"), ("os.abort()", "killed"), ("os.kill(os.getpid(), 9)", "killed"),
                           ("ctypes.string_at(0)", "killed"), ("os.closerange(0, 3)", "ok")):  # fmt: skip
        result = await sandbox.run(Program(Job(source=PRELUDE + ending)), Limits(wall_s=20))
        assert result.reason == reason, (ending, result)


async def test_stopping_oneself_and_a_deaf_program(sandbox: Sandbox) -> None:
    result = await sandbox.run(Program(Job(source="import os\nos.kill(os.getpid(), 19)")), Limits(wall_s=1))
    assert result.reason == "time"
    result = await sandbox.run(Program(Job(source="print(1)", stdin=b"x" * 5_000_000)), Limits(wall_s=20))
    assert (result.stdout, result.reason) == (b"1\n", "ok")


async def test_twenty_attackers_leave_the_host_working(sandbox: Sandbox) -> None:
    """Fork bombs, memory bombs and floods at once; an honest program beside them still gets its answer."""
    bombs = ["import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
             "x = []\nwhile True: x.append(bytearray(1 << 20))", "while True: print('x' * 4096)"]  # fmt: skip
    crowd = Sandbox(max_jobs=7)
    limits = Limits(wall_s=60, cpu_s=30, memory_bytes=64 << 20, processes=12)
    results = await asyncio.gather(*(crowd.run(Program(Job(source=bombs[n % 3])), limits) for n in range(6)),
                                   crowd.run(Program(Job(source="print('honest')")), limits))  # fmt: skip
    assert [result.reason for result in results] == ["processes", "memory", "output"] * 2 + ["ok"]
    assert results[-1].stdout == b"honest\n"
