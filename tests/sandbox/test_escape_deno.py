"""The same for TypeScript: Deno's own permissions are tried first, and what is behind them second."""

# Programs inside texts keep their long lines.
# ruff: noqa: E501

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shoal.sandbox import DenoRuntime, Job, Limits, Program, Relay, Result, Sandbox, Setup

ATTEMPT = """
async function attempt(what: () => unknown): Promise<void> {
  try { console.log("ESCAPED", await what()); } catch (error) { console.log((error as Error).constructor.name); }
}
"""


async def run(deno: Sandbox, source: str, *, setup: Setup | None = None, limits: Limits | None = None) -> Result:
    setup = setup or Setup(DenoRuntime())
    return await deno.run(Program(Job(source=ATTEMPT + source), setup), limits or Limits(wall_s=30))


async def test_permissions_are_not_there(deno: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TEST_SECRET", "planted")
    (tmp_path / "secret").write_text("secret")
    source = f"""
for (const path of ["/etc/passwd", "/proc/self/environ", "/proc/1/mem", "/", {str(tmp_path / "secret")!r}, "/python/bin/python3", "/shoal"])
  await attempt(() => Deno.readFileSync(path));
await attempt(() => Deno.readDirSync("/").next());
for (const path of ["/new", "/etc/hosts", "/deno/worker.ts"]) await attempt(() => Deno.writeTextFileSync(path, "x"));
await attempt(() => new Deno.Command("/python/bin/python3", {{ args: ["-c", "print(1)"] }}).outputSync());
await attempt(() => Deno.dlopen("/lib64/libc.so.6", {{ getpid: {{ parameters: [], result: "i32" }} }}).symbols.getpid());
await attempt(() => Deno.hostname());
await attempt(() => Deno.osRelease());
await attempt(() => Deno.networkInterfaces());
await attempt(() => Deno.kill(1, "SIGKILL"));
await attempt(() => Deno.symlinkSync("/etc/passwd", "/scratch/link") ?? Deno.readTextFileSync("/scratch/link"));
await attempt(async () => {{ const state = await Deno.permissions.request({{ name: "run" }}); if (state.state !== "granted") throw new Error(); }});
await attempt(async () => (await import("node:child_process")).execFileSync("/python/bin/python3", ["-c", "1"]));
await attempt(async () => (await import("node:fs")).readFileSync("/etc/passwd"));
await attempt(async () => {{ const {{ default: process }} = await import("node:process"); process.setuid!(0); }});
console.log(Deno.env.get("SHOAL_TEST_SECRET"), JSON.stringify(Deno.env.toObject()));
"""
    result = await run(deno, source)
    got = result.stdout.decode().splitlines()
    assert result.reason == "ok" and len(got) == 23, result
    assert "ESCAPED" not in result.stdout.decode(), got
    assert got[-1] == "undefined {}"


async def test_no_code_from_elsewhere(deno: Sandbox) -> None:
    source = """
for (const name of ["https://deno.land/std/version.ts", "http://127.0.0.1:8000/x.ts", "npm:chalk", "jsr:@std/path", "file:///etc/passwd", "/python/x.ts"])
  await attempt(() => import(name));
await attempt(() => import("data:text/javascript,export default 1").then(m => { if (m.default === 1) throw new TypeError("harmless"); }));
"""
    result = await run(deno, source)
    got = result.stdout.decode().splitlines()
    assert result.reason == "ok" and len(got) == 7 and "ESCAPED" not in result.stdout.decode(), result
    result = await run(deno, 'import "npm:chalk";')
    assert result.exit_code == 1 and result.reason == "exit", result
    result = await run(deno, 'import "https://deno.land/std/version.ts";')
    assert result.exit_code == 1, result


async def test_a_worker_gets_no_more_than_its_parent(deno: Sandbox) -> None:
    source = """
const code = `try { self.postMessage("ESCAPED " + Deno.readTextFileSync("/etc/passwd")); } catch (e) { self.postMessage(e.constructor.name); }`;
const url = "data:application/javascript," + encodeURIComponent(code);
const answer = (w: Worker) => new Promise(done => { w.onmessage = e => done(e.data); w.onerror = e => { e.preventDefault(); done("error"); }; });
const plain = new Worker(url, { type: "module" });
console.log(await answer(plain)); plain.terminate();
await attempt(async () => {
  const w = new Worker(url, { type: "module", deno: { permissions: { read: true, run: true } } } as WorkerOptions);
  const got = await answer(w); w.terminate();
  if (!String(got).startsWith("ESCAPED")) throw new Error();
});
"""
    result = await run(deno, source)
    # Asking for more than the parent has ends the whole program: it needs a flag that is not given.
    assert result.stdout == b"NotCapable\n" and result.exit_code != 0, result


async def test_the_network_is_what_was_given(deno: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given, socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        port, other_port = given.getsockname()[1], other.getsockname()[1]
        setup = Setup(DenoRuntime(), relays=(Relay("chain.test", 8545, ("127.0.0.1", port)),))
        source = f"""
const c = await Deno.connect({{ hostname: "chain.test", port: 8545 }});
console.log("connected"); c.close();
for (const [hostname, port] of [["127.0.0.1", {other_port}], ["127.0.0.1", {port}], ["chain.test", 8546], ["localhost", 8545], ["example.com", 443], ["1.1.1.1", 53]])
  await attempt(() => Deno.connect({{ hostname: hostname as string, port: port as number }}));
await attempt(() => fetch("http://127.0.0.1:{other_port}"));
await attempt(() => Deno.resolveDns("example.com", "A"));
await attempt(() => Deno.listen({{ port: 9000 }}));
"""
        result = await run(deno, source, setup=setup)
        with pytest.raises(TimeoutError):
            other.accept()
    got = result.stdout.decode().splitlines()
    assert result.reason == "ok" and got[0] == "connected" and len(got) == 10, result
    assert "ESCAPED" not in result.stdout.decode(), got


@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        ("while (true);", {"time"}),
        ("await new Promise(done => setTimeout(done, 1e6));", {"time"}),
        ("const all: unknown[] = []; while (true) all.push(new Array(1000).fill({}));", {"memory"}),
        ("const all: unknown[] = []; while (true) all.push(new Uint8Array(1 << 22).fill(1));", {"memory", "exit"}),
        ("while (true) console.log('x'.repeat(10000));", {"output"}),
        ("for (;;) new Worker('data:text/javascript,for(;;);', { type: 'module' });", {"processes", "memory", "time"}),
    ],
)
async def test_a_limit_ends_what_does_not_end(deno: Sandbox, source: str, reasons: set[str]) -> None:
    wall_s = 1.2 if reasons == {"time"} else 40.0
    limits = Limits(wall_s=wall_s, cpu_s=30, memory_bytes=192 << 20, processes=48, output_bytes=50_000)
    result = await run(deno, source, limits=limits)
    assert result.reason in reasons, result
    assert result.peak_memory < 600 << 20
    assert os.getpid()  # and we are here to say so
