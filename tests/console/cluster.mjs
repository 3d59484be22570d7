// A real cluster for the browser tests: `minke up` with the model in the repository, as a child process.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const BIN = process.env.MINKE_BIN ?? join(ROOT, "build", "bin");
export const API_KEY = "console-test-key";
export const OPERATOR_TOKEN = "console-test-token";

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Waits until `condition()` is truthy, and returns that.
export async function until(what, condition, timeout_ms = 20_000) {
  const end = Date.now() + timeout_ms;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`not within ${timeout_ms} ms: ${what}`);
    await sleep(50);
  }
}

export class Cluster {
  log = "";
  #process;
  #directory;
  #loading = true;

  async start(...flags) {
    this.#directory = mkdtempSync(join(tmpdir(), "minke-console-"));
    const file = (name, text) => {
      writeFileSync(join(this.#directory, name), text, { mode: 0o600 });
      return join(this.#directory, name);
    };
    this.#process = spawn(
      join(BIN, "minke"),
      ["up", join(ROOT, "models", "minke-shakespeare"), "--port=0", "--supervise", "--threads=1", ...flags,
        `--api-key-file=${file("keys", API_KEY + "\n")}`, `--operator-token-file=${file("tokens", OPERATOR_TOKEN + "\n")}`],
      { stdio: ["ignore", "ignore", "pipe"], env: { ...process.env, XDG_RUNTIME_DIR: this.#directory } },
    );
    this.#process.stderr.on("data", (data) => (this.log += data));
    this.url = (await until("the cluster is ready", () => this.log.match(/ready (http:\/\/\S+) after/), 60_000))[1];
  }

  async view() {
    const response = await fetch(`${this.url}/cluster`, { headers: { authorization: `Bearer ${API_KEY}` } });
    return response.json();
  }

  async pool(name) {
    return (await this.view()).pools.find((pool) => pool.name === name);
  }

  // Clients that stream all the time, until stopLoad. Rejects there if any answer was not whole.
  startLoad(clients) {
    const failures = [];
    const client = async (n) => {
      while (this.#loading) {
        try {
          const response = await fetch(`${this.url}/v1/completions`, {
            method: "POST",
            headers: { "content-type": "application/json", authorization: `Bearer ${API_KEY}` },
            body: JSON.stringify({ prompt: `Scene ${n}.\n`, max_tokens: 60, stream: true, ignore_eos: true, seed: n }),
          });
          const text = await response.text();
          if (response.status !== 200 || !text.includes("[DONE]")) failures.push(`${response.status} ${text.slice(-300)}`);
        } catch (error) {
          failures.push(String(error));
        }
      }
    };
    this.#loading = true;
    const running = Promise.all(Array.from({ length: clients }, (_, n) => client(n)));
    this.stopLoad = async () => {
      this.#loading = false;
      await running;
      if (failures.length > 0) throw new Error(`requests failed: ${failures.slice(0, 3).join("; ")}`);
    };
  }

  async stop() {
    this.#loading = false;
    if (this.#process?.exitCode === null) {
      const late = setTimeout(() => this.#process.kill("SIGKILL"), 12_000);
      this.#process.kill("SIGTERM");
      await new Promise((resolve) => this.#process.once("exit", resolve));
      clearTimeout(late);
    }
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
