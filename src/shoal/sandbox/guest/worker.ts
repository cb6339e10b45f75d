// Starts ahead of its job: imports what it was told to, waits for one line on standard input, then runs the module
// that the line names. What follows on standard input belongs to that module.
const preload: string[] = JSON.parse(Deno.args[0]);
for (const specifier of preload) await import(specifier);

const bytes: number[] = [];
const one = new Uint8Array(1);
while (Deno.stdin.readSync(one) === 1 && one[0] !== 10) bytes.push(one[0]);
if (bytes.length > 0) {
  const job = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes)));
  Object.defineProperty(Deno, "args", { value: job.argv, configurable: true, enumerable: true });
  await import(job.main);
}
