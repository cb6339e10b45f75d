"""Programs that mean no harm: what they are given, what comes back, and which limit ended them."""

# Programs inside texts keep their long lines; waiting for processes is polling.
# ruff: noqa: E501, ASYNC110, ASYNC220

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandbox_processes import alive, descendants

from shoal.sandbox import (
    DenoRuntime,
    Job,
    Limits,
    NativeRuntime,
    Program,
    PythonRuntime,
    Sandbox,
    SandboxError,
    Setup,
)


async def test_a_program_gets_its_input_and_gives_its_output(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "given.txt").write_text("given")
    source = (
        "import os, sys, time\n"
        "used = bytearray(30_000_000)\ntime.sleep(.1)\n"
        "print(sys.argv[1:], sys.stdin.read(), open('/input/given.txt').read(), open('deep/file').read(), os.getuid())\n"
        "print(os.environ['COLOUR'], os.getcwd(), __name__, file=sys.stderr)\n"
        "open('result', 'wb').write(bytes(range(256)))\n"
        "sys.exit(7)\n"
    )
    job = Job(
        source=source, argv=("a", "b c"), stdin=b"typed", files={"deep/file": b"carried"}, collect=("result", "none"),
        environment={"COLOUR": "red"},
    )  # fmt: skip
    result = await sandbox.run(Program(job, Setup(read_only={"/input": tmp_path})))
    assert result.stdout.decode() == "['a', 'b c'] typed given carried 65534\n"
    assert result.stderr.decode() == "red /scratch __main__\n"
    assert (result.exit_code, result.reason) == (7, "exit")
    assert result.files == {"result": bytes(range(256))} and not result.files_truncated
    assert result.peak_memory > 20_000_000 and result.seconds > 0


async def test_a_traceback_begins_at_the_programs_own_line(sandbox: Sandbox) -> None:
    result = await sandbox.run(Program(Job(source="def f():\n    raise KeyError('k')\nf()\n")))
    assert result.exit_code == 1 and result.reason == "exit"
    assert result.stderr.decode().splitlines()[1] == '  File "/scratch/main.py", line 3, in <module>'
    assert (
        (await sandbox.run(Program(Job(source="def")))).stderr.decode().rstrip().endswith("SyntaxError: invalid syntax")
    )


async def test_threads_end_before_the_program_does(sandbox: Sandbox) -> None:
    source = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()"
    assert (await sandbox.run(Program(Job(source=source)))).stdout == b"late\n"


async def test_packages_and_preloading(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "given_module.py").write_text("VALUE = 41\n")
    setup = Setup(PythonRuntime(packages=(tmp_path,), preload=("given_module", "json")))
    result = await sandbox.run(Program(Job(source="import given_module\nprint(given_module.VALUE + 1)"), setup))
    assert result.stdout == b"42\n"
    with pytest.raises(SandboxError, match="no_such_module"):
        await sandbox.run(Program(Job(source=""), Setup(PythonRuntime(preload=("no_such_module",)))))
    (tmp_path / "private").mkdir(mode=0o700)
    if os.geteuid() == 0:  # Root's sandboxes do not run as root.
        with pytest.raises(SandboxError, match="private is not readable by every user"):
            await sandbox.run(Program(Job(source=""), Setup(read_only={"/input": tmp_path / "private"})))
    with pytest.raises(SandboxError, match="does not exist"):
        await sandbox.run(Program(Job(source=""), Setup(read_only={"/input": tmp_path / "missing"})))


async def test_a_native_program_and_one_that_cannot_start(sandbox: Sandbox) -> None:
    setup = Setup(NativeRuntime(), read_only={"/tools/cat": Path("/bin/cat").resolve()})
    result = await sandbox.run(Program(Job(argv=("/tools/cat", "-"), stdin=b"x" * 300_000), setup))
    assert result.stdout == b"x" * 300_000 and result.reason == "ok"
    result = await sandbox.run(Program(Job(argv=("/tools/dog",)), setup))
    assert result.exit_code == 127 and b"No such file" in result.stderr


async def test_deno_runs_typescript(deno: Sandbox, tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "tiny"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "tiny", "version": "1.0.0", "main": "index.js", "type": "module"}')
    (package / "index.js").write_text("export const add = (a, b) => a + b;")
    setup = Setup(DenoRuntime(node_modules=tmp_path / "node_modules", preload=("tiny",)))
    source = (
        'import { add } from "tiny";\n'
        "const n: number = add(40, 2);\n"
        "const typed: string = await new Response(Deno.stdin.readable).text();\n"
        'await Deno.writeTextFile("result.txt", `${n} ${typed} ${Deno.args}`);\n'
        "console.log(n);\n"
    )
    job = Job(source=source, argv=("a", "b"), stdin="gr\u00fc\u00df".encode(), collect=("result.txt",))
    result = await deno.run(Program(job, setup))
    assert (result.stdout, result.reason) == (b"42\n", "ok"), result.stderr
    assert result.files["result.txt"].decode() == "42 gr\u00fc\u00df a,b"


ENDLESS = {
    "sleep": ("import time\ntime.sleep(60)", "time"),
    "loop": ("while True: pass", "time"),
    "ignores signals": ("import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
                        "    except (OSError, ValueError): pass\nwhile True: pass", "time"),
    "output": ("import sys\nwhile True: sys.stdout.write('x' * 10000)", "output"),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", "output"),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "one allocation": ("bytearray(1 << 40)", "memory"),
    "memory of children": ("import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(40 << 20)\n"
                           "        time.sleep(60)\ntime.sleep(60)", "memory"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "processes"),
    "thread bomb": ("import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
                    "    except RuntimeError: time.sleep(.01)", "processes"),
    "processor time of children": ("import os\nfor _ in range(4):\n    if os.fork() == 0:\n        while True: pass\n"
                                   "import time\ntime.sleep(60)", "time"),
    "empty files": ("n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1", "output"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
async def test_a_limit_ends_what_does_not_end(sandbox: Sandbox, name: str) -> None:
    source, reason = ENDLESS[name]
    wall_s = 1.2 if reason == "time" else 40.0
    limits = Limits(wall_s=wall_s, cpu_s=1.0 if "loop" in name or "children" in name else 40.0, memory_bytes=(1024 if name == "thread bomb" else 128) << 20, processes=16, output_bytes=100_000)  # fmt: skip
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    result = await sandbox.run(Program(Job(source=source)), limits)
    ticking.cancel()
    assert result.reason == reason, result
    assert len(result.stdout) <= 100_000 and len(result.stderr) <= 100_000
    assert result.stdout_truncated == (name == "output") and result.stderr_truncated == (name == "errors")
    assert ticks > 0


async def test_files_cannot_outgrow_the_scratch_folder(sandbox: Sandbox) -> None:
    source = (
        "import os\n"
        "for name in 'abcdef':\n"
        "    try: open(name, 'wb').write(bytes(1 << 20))\n"
        "    except OSError as error: print(name, error.strerror)\n"
        "try: os.truncate('a', 1 << 40)\n"
        "except OSError as error: print('sparse', error.strerror)\n"
    )
    result = await sandbox.run(Program(Job(source=source, collect=tuple("abcdef"))), Limits(scratch_bytes=3 << 20))
    assert b"No space left" in result.stdout and b"sparse File too large" in result.stdout
    assert sum(map(len, result.files.values())) <= 3 << 20
    result = await sandbox.run(Program(Job(source="", files={"big": bytes(4 << 20)})), Limits(scratch_bytes=3 << 20))
    assert result.reason == "output"


async def test_twenty_at_once(sandbox: Sandbox) -> None:
    eager = Sandbox(max_jobs=20)
    programs = [Program(Job(source=f"import time\ntime.sleep(.2)\nprint({n} ** 2)")) for n in range(20)]
    results = await asyncio.gather(*(eager.run(program, Limits(wall_s=60)) for program in programs))
    assert [int(result.stdout) for result in results] == [n**2 for n in range(20)]


async def test_a_cancelled_call_leaves_nothing(sandbox: Sandbox) -> None:
    before = descendants(os.getpid())
    call = asyncio.ensure_future(sandbox.run(Program(Job(source="import time\ntime.sleep(100)")), Limits(wall_s=100)))
    while not (started := descendants(os.getpid()) - before) or len(started) < 3:
        await asyncio.sleep(0.02)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await _gone(started)


async def test_no_free_place_is_told(sandbox: Sandbox) -> None:
    narrow = Sandbox(max_jobs=1, queue_timeout_s=0.1)
    first = asyncio.ensure_future(narrow.run(Program(Job(source="import time\ntime.sleep(1)"))))
    await asyncio.sleep(0)
    with pytest.raises(SandboxError, match="No sandbox became free"):
        await narrow.run(Program(Job(source="")))
    assert (await first).reason == "ok"


HOST = """
import asyncio
from shoal.sandbox import *
async def main():
    forever = Job(source="import os, time\\nif os.fork() == 0: os.setsid()\\nprint(1, flush=True)\\nwhile True: time.sleep(1)")
    async with WorkerPool(Setup(), Limits(wall_s=100), size=2) as pool:
        jobs = [pool.run(forever), Sandbox().run(Program(forever), Limits(wall_s=100))]
        await asyncio.gather(*jobs)
asyncio.run(main())
"""


async def _gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 20
    while left := alive(pids):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_outlives_its_host(sandbox: Sandbox, sign: signal.Signals) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST])
    try:
        deadline = time.monotonic() + 60
        # Per running job: bwrap, warden, program, its child (and a manager for the pool's), and an idle worker's two.
        while len(found := descendants(host.pid)) < 11:
            assert time.monotonic() < deadline and host.poll() is None
            await asyncio.sleep(0.05)
        host.send_signal(sign)
        host.wait(20)
        await _gone(found)
    finally:
        host.kill()
        host.wait()
