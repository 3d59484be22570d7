// Takes the pictures in docs/images: node tests/console/pictures.mjs FOLDER. Not a test.
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { API_KEY, Cluster, OPERATOR_TOKEN, sleep, until } from "./cluster.mjs";

const folder = process.argv[2] ?? "docs/images";
mkdirSync(folder, { recursive: true });
const cluster = new Cluster();
let browser;

async function open(viewport, colorScheme, withOperator) {
  const context = await browser.newContext({ viewport, colorScheme, reducedMotion: "reduce" });
  await context.addInitScript(([key, token]) => {
    sessionStorage.setItem("minke.api-key", key);
    if (token) sessionStorage.setItem("minke.operator-token", token);
    localStorage.setItem("minke.settings", JSON.stringify({ mode: "completion", temperature: 0.7, max_tokens: 130 }));
  }, [API_KEY, withOperator ? OPERATOR_TOKEN : ""]);
  const page = await context.newPage();
  await page.goto(cluster.url + "/");
  await page.locator("#health", { hasText: "Serving" }).waitFor();
  await page.fill("#prompt", "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n");
  await page.press("#prompt", "Enter");
  await page.locator(".turn.assistant .foot", { hasText: "prompt tokens" }).waitFor();
  await page.evaluate(() => document.activeElement.blur());
  await sleep(1500);
  return page;
}

try {
  await cluster.start("--experts=4", "--attention=2");
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
  cluster.startLoad(4);
  await sleep(100_000); // the charts show two minutes
  const wide = { width: 1280, height: 1000 };
  const light = await open(wide, "light", true);
  await light.screenshot({ path: join(folder, "console-light.png") });
  const dark = await open(wide, "dark", false);
  process.kill((await cluster.pool("experts")).members[1].pid, "SIGKILL");
  await dark.locator('#pool-experts .member[data-state="lost"]').waitFor();
  await until("the survivors are busy", async () => (await cluster.view()).heat.rows_per_s[0].filter((rows) => rows > 0).length >= 3);
  await dark.screenshot({ path: join(folder, "console-dark.png") });
  const narrow = await open({ width: 390, height: 1000 }, "light", false);
  await narrow.click("#tab-cluster");
  await sleep(500);
  await narrow.screenshot({ path: join(folder, "console-narrow.png") });
} finally {
  await cluster.stopLoad?.();
  await browser?.close();
  await cluster.stop();
}
