// Runs the agent's module and writes what it returned, or why it failed. Everything here is in the script's reach:
// it can change its own result and nothing else.
import * as ethers from "ethers";

const task = JSON.parse(Deno.readTextFileSync("/scratch/task.json"));
// Many write `ethers.` without importing it.
Object.assign(globalThis, { ethers: ethers.ethers });

const plain = (_: string, value: unknown) => (typeof value === "bigint" ? value.toString() : value);
let outcome: string;
try {
  const skill = await import("file:///scratch/skill.ts");
  const run = skill.executeSkill ?? skill.default;
  if (typeof run !== "function") throw new Error("the module exports no function executeSkill");
  const value = await run(task.url, task.agent, task.contracts, task.key);
  outcome = JSON.stringify({ value: value === undefined ? null : value }, plain);
} catch (error) {
  const said = error instanceof Error ? (error as { shortMessage?: string }).shortMessage ?? error.message : error;
  outcome = JSON.stringify({ error: String(said).slice(0, 2000) });
}
Deno.writeTextFileSync("/scratch/result.json", outcome);
Deno.exit(0);
