"""Warm workers: what is paid once, and what one job can learn of another or do to it: nothing."""

# Programs inside texts keep their long lines; waiting for processes is polling.
# ruff: noqa: E501, ASYNC110

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from sandbox_processes import alive, descendants

from shoal.sandbox import DenoRuntime, Job, Limits, PythonRuntime, Sandbox, SandboxError, Setup, WorkerPool

SLOW_MODULE = "import os, time\ntime.sleep(.5)\nLOADED_BY = os.getpid()\nSTATE = []\n"


async def test_modules_are_imported_once_and_each_job_is_a_fresh_fork(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    setup = Setup(PythonRuntime(packages=(tmp_path,), preload=("slow_module",)))
    source = (
        "import os, sys, random, slow_module\n"
        "slow_module.STATE.append(1)\n"
        "print(slow_module.LOADED_BY, len(slow_module.STATE), os.getpid() != 1, random.random())\n"
    )
    async with WorkerPool(setup, Limits(), size=1) as pool:
        results = [await pool.run(Job(source=source)) for _ in range(5)]
        assert pool.started == 1
    lines = [result.stdout.decode().split() for result in results]
    assert {tuple(line[:3]) for line in lines} == {("1", "1", "True")}
    assert len({line[3] for line in lines}) == 5, "every fork draws random numbers of its own"


async def test_a_job_finds_nothing_of_an_earlier_one(sandbox: Sandbox) -> None:
    marker = "left-by-the-" + "first-job"
    first = f"""
import os, socket, sys, time
open({marker!r}, 'w').write('x')
os.makedirs('locked/inner'); open('locked/inner/file', 'w'); os.chmod('locked/inner', 0); os.chmod('locked', 0)
here = '/scratch'
for _ in range(1500):
    os.mkdir('deep'); os.chdir('deep')
os.chdir(here)
os.symlink('/', 'root'); os.mkfifo('pipe'); os.mkdir('9.wiped')
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        s = socket.socket(socket.AF_UNIX); s.bind('\\0{marker}'); s.listen()
        time.sleep(1000)
t = socket.socket(); t.bind(('127.0.0.1', 7777)); t.listen()
import builtins, json
builtins.print = lambda *a: None
json.dumps = None
os.environ['MARK'] = {marker!r}
sys.stdout.write(str(os.getpid()))
"""
    # It looks for the earlier job's text in all memory that it was forked with.
    second = """
import os, json, socket
needle = b'boj-tsrif-eht-yb-tfel'[::-1]
found = 0
maps = open('/proc/self/maps').readlines()
with open('/proc/self/mem', 'rb', buffering=0) as memory:
    for line in maps:
        span, modes = line.split()[:2]
        if modes.startswith('rw') and '[v' not in line:
            start, end = (int(n, 16) for n in span.split('-'))
            memory.seek(start)
            try: data = memory.read(end - start)
            except OSError: continue
            at = data.find(needle)
            while at >= 0:
                found += 1
                where = (line.split()[0], line.split()[-1], data[max(0, at - 100):at + 60])
                at = data.find(needle, at + 1)
            del data
print(sorted(os.listdir('/scratch')), 'MARK' in os.environ, json.dumps([1]), sorted(n for n in os.listdir('/proc') if n.isdigit())[:1])
s = socket.socket(socket.AF_UNIX)
try: s.connect(b'\\0' + needle); print('connected')
except OSError: print('refused')
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(('127.0.0.1', 7777))
print(found, where if found != 1 else '')
"""
    async with WorkerPool(Setup(), Limits(wall_s=30), size=1) as pool:
        result = await pool.run(Job(source=first))
        assert result.reason == "ok", result
        result = await pool.run(Job(source=second))
        assert pool.started == 1
    assert result.reason == "ok", result
    got = result.stdout.decode().splitlines()
    assert got[:2] == ["['main.py'] False [1] ['1']", "refused"]
    assert got[2].strip() == "1", got  # its own needle, which shows that the search works


HOSTILE = {
    "kills the manager": "import os\nfor n in os.listdir('/proc'):\n    if n.isdigit() and int(n) not in (1, os.getpid()): os.kill(int(n), 9)",
    "kills everything": "import os\nos.kill(-1, 9)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "time": "while True: pass",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_job_costs_its_own_result_only(sandbox: Sandbox, name: str) -> None:
    limits = Limits(wall_s=1.5 if name == "time" else 20, memory_bytes=100 << 20, processes=12)
    async with WorkerPool(Setup(), limits, size=1) as pool:
        result = await pool.run(Job(source=HOSTILE[name]))
        assert result.reason in {"killed", "processes", "memory", "time"}, result
        for _ in range(2):
            assert (await pool.run(Job(source="print(1)"))).stdout == b"1\n"


@pytest.mark.slow
async def test_a_job_that_stops_its_manager_is_ended_by_the_host(sandbox: Sandbox) -> None:
    source = "import os, time\nfor n in os.listdir('/proc'):\n    if n.isdigit() and int(n) not in (1, os.getpid()): os.kill(int(n), 19)\ntime.sleep(100)"
    async with WorkerPool(Setup(), Limits(wall_s=1), size=1) as pool:
        assert (await pool.run(Job(source=source))).reason == "time"
        assert (await pool.run(Job(source="print(1)"))).stdout == b"1\n"
        assert pool.started == 2


async def test_workers_are_replaced_after_their_share(sandbox: Sandbox) -> None:
    async with WorkerPool(Setup(), size=1, jobs_per_worker=2) as pool:
        for n in range(5):
            assert (await pool.run(Job(source=f"print({n})"))).stdout == b"%d\n" % n
        assert pool.started >= 3


async def test_many_jobs_share_few_workers(sandbox: Sandbox) -> None:
    async with WorkerPool(Setup(), Limits(wall_s=60), size=3) as pool:
        results = await asyncio.gather(*(pool.run(Job(source=f"print({n} + 1)")) for n in range(20)))
        assert [int(result.stdout) for result in results] == list(range(1, 21))
        assert pool.started == 3


async def test_deno_workers_do_one_job_each(deno: Sandbox) -> None:
    source = "const g = globalThis as Record<string, unknown>; console.log(g.mark); g.mark = 1; Deno.writeTextFileSync('/scratch/mark', '');"
    async with WorkerPool(Setup(DenoRuntime()), Limits(wall_s=60), size=2) as pool:
        results = await asyncio.gather(*(pool.run(Job(source=source)) for _ in range(4)))
        assert [result.stdout for result in results] == [b"undefined\n"] * 4, results
        assert pool.started >= 4


async def test_a_pool_ends_what_it_started(sandbox: Sandbox) -> None:
    before = descendants(os.getpid())
    pool = WorkerPool(Setup(), Limits(wall_s=100), size=2, wait_timeout_s=0.2)
    async with pool:
        running = [asyncio.ensure_future(pool.run(Job(source="import time\ntime.sleep(100)"))) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(SandboxError, match="No warm sandbox became free"):
            await pool.run(Job(source=""))
        running[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await running[0]
        running[1].cancel()
        await asyncio.wait(running)
    with pytest.raises(SandboxError, match="closed"):
        await pool.run(Job(source=""))
    async with asyncio.timeout(20):
        while alive(descendants(os.getpid()) - before):
            await asyncio.sleep(0.02)


async def test_what_cannot_be_preloaded_is_told_at_once(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="no_such_module"):
        async with WorkerPool(Setup(PythonRuntime(preload=("no_such_module",)))):
            pass
