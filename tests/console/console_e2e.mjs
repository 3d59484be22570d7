// The console in a real headless Chromium, in front of a real cluster that is loaded, killed, scaled and drained.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { API_KEY, Cluster, OPERATOR_TOKEN, sleep, until } from "./cluster.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const WIDE = { width: 1280, height: 900 };
const NARROW = { width: 390, height: 844 };

const cluster = new Cluster();
let browser;

// A page on the console; `complaints` gathers what the browser does not like, and requests to elsewhere.
async function openPage({ viewport = WIDE, colorScheme = "light", session = { "minke.api-key": API_KEY } } = {}) {
  const context = await browser.newContext({ viewport, colorScheme, reducedMotion: "reduce" });
  await context.addInitScript((items) => {
    for (const [name, value] of Object.entries(items)) if (!sessionStorage.getItem(name)) sessionStorage.setItem(name, value);
    // Red, green and blue of a pixel of the heat map, in parts of its size.
    window.heatPixel = (x, y) => {
      const canvas = document.getElementById("heat");
      return [...canvas.getContext("2d").getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data].slice(0, 3);
    };
  }, session);
  const page = await context.newPage();
  page.setDefaultTimeout(15_000);
  page.complaints = [];
  page.on("console", (message) => {
    const ours = message.text().startsWith("Canvas2D: Multiple readback"); // this test reads pixels
    if (["error", "warning"].includes(message.type()) && !ours) page.complaints.push(message.text());
  });
  page.on("pageerror", (error) => page.complaints.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(cluster.url)) page.complaints.push(`request to ${request.url()}`);
  });
  await page.goto(cluster.url + "/");
  return page;
}

const text = (page, selector) => page.locator(selector).innerText();
const members = (page, pool, state) => page.locator(`#pool-${pool} .member[data-state="${state}"]`);
const answer = (page) => page.locator(".turn.assistant .text").last();

async function checkAccessibility(page, what) {
  await page.evaluate(AXE); // not by a script tag: the page's policy allows none
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  const list = violations.map((v) => `${v.id}: ${v.nodes.map((node) => node.target.join(" ")).join(", ")}`);
  assert.deepEqual(list, [], `axe: ${what}`);
}

// ---- the steps, in order: each one leaves the cluster as the next one needs it

async function accessIsAskedFor() {
  const page = await openPage({ session: {} });
  await page.locator("#health", { hasText: "No access" }).waitFor();
  assert.match(await text(page, "#notice"), /needs an API key/);
  await page.click("#open-access");
  await page.fill("#api-key", "wrong");
  await page.press("#api-key", "Enter");
  await page.locator("#notice", { hasText: "not valid" }).waitFor();
  await page.click("#open-access");
  await page.fill("#api-key", API_KEY);
  await page.press("#api-key", "Enter");
  await page.locator("#health", { hasText: "Serving" }).waitFor();
  assert.equal(await page.locator("#notice").isVisible(), false);
  assert.equal(await page.evaluate(() => Object.values(localStorage).join().includes("key")), false);
  await page.context().close();
}

async function chatByKeyboard(page) {
  await page.locator("#health", { hasText: "Serving" }).waitFor();
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  await page.keyboard.type("O Romeo,");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("wherefore art thou Romeo?");
  await page.evaluate(() => {
    window.pieces = 0;
    new MutationObserver((changes) => {
      window.pieces += changes.filter((change) => change.target.parentElement?.matches(".turn.assistant .text")).length;
    }).observe(document.getElementById("transcript"), { characterData: true, subtree: true });
  });
  await page.keyboard.press("Enter");
  assert.equal(await text(page, ".turn.user .text"), "O Romeo,\nwherefore art thou Romeo?");
  await page.locator(".turn.assistant .foot", { hasText: "prompt tokens" }).waitFor();
  await page.locator("#send", { hasText: "Send" }).waitFor();
  // It came in pieces.
  const pieces = await page.evaluate(() => window.pieces);
  assert.ok(pieces >= 3, `pieces: ${pieces}`);
  const foot = await text(page, ".turn.assistant .foot");
  const [, asked, said] = foot.match(/^(\d+) prompt tokens · (\d+) tokens? · .*first after/) ?? assert.fail(foot);
  assert.ok(Number(asked) > 10 && Number(said) > 1, foot);
  assert.equal(await page.locator(".turn .error").count(), 0);
}

async function settingsAreSent(page) {
  await page.click("#settings summary");
  await page.fill("#setting-max_tokens", "5");
  await page.fill("#setting-temperature", "0");
  await page.selectOption("#setting-mode", "completion");
  await page.fill("#setting-system", "KING HENRY:");
  await page.press("#setting-system", "Tab");
  const sent = page.waitForRequest((request) => request.url().endsWith("/v1/completions"));
  await page.fill("#prompt", "Once more");
  await page.press("#prompt", "Enter");
  const body = (await sent).postDataJSON();
  assert.deepEqual([body.max_tokens, body.temperature, body.top_p, body.stream], [5, 0, 0.95, true]);
  assert.match(body.prompt, /^KING HENRY:\n/);
  await page.locator(".turn.assistant .foot", { hasText: /· 5 tokens · .*stopped at max tokens/ }).waitFor();
}

async function stopStops(page) {
  await page.click("#clear");
  await page.fill("#setting-max_tokens", "3000");
  await page.fill("#prompt", "Tell me all.");
  await page.press("#prompt", "Enter");
  await until("the answer begins", async () => (await answer(page).textContent()).length > 20);
  await page.keyboard.press("Tab"); // New chat is disabled meanwhile
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Stop");
  await page.keyboard.press("Enter");
  await page.locator(".turn.assistant .foot", { hasText: "stopped by you" }).waitFor();
  const length = (await answer(page).textContent()).length;
  await until("nothing runs any more", async () => (await cluster.pool("attention")).members[0].load.running === 0, 5000);
  assert.equal((await answer(page).textContent()).length, length);
  const [, tokens] = (await page.locator(".turn.assistant .foot").last().innerText()).match(/([\d,]+) tokens?/);
  assert.ok(Number(tokens.replace(",", "")) < 2900, `${tokens} tokens`);
  await page.click("#clear");
  assert.equal(await page.locator(".turn").count(), 0);
}

const pixel = (page, x, y) => page.evaluate(([x, y]) => window.heatPixel(x, y), [x, y]);

async function loadIsShown(page) {
  await page.locator("#heat").scrollIntoViewIfNeeded();
  const idle = await until("an idle heat map", async () => Number(await page.getAttribute("#heat", "data-top")) === 0 && pixel(page, 0.3, 0.1));
  cluster.startLoad(3);
  await until("rows on the heat map", async () => Number(await page.getAttribute("#heat", "data-top")) > 20);
  await until("a cell with load is painted", async () => String(await pixel(page, 0.3, 0.1)) !== String(idle));
  assert.match(await page.getAttribute("#heat", "aria-label"), /7 layers by 2 servers, at most [\d.,k ]+ rows per second/);
  await page.focus("#heat");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowDown");
  assert.match(await text(page, "#heat-readout"), /^Layer 2, server [0-9a-f]{8}: [\d.,k ]+ rows\/s$/);
  await page.click(".numbers summary");
  await until("a row of numbers for each layer", async () => (await page.locator(".numbers tbody tr").count()) === 7);
  assert.equal(await page.locator(".numbers tbody td").count(), 14);
  await page.click(".numbers summary");
  await until("throughput", async () => Number.parseFloat(await page.locator(".chart .value").first().innerText()) > 1);
  assert.match(await page.locator(".chart .value").nth(1).innerText(), /\d (ms|s)$/);
  assert.ok((await page.locator(".chart .line").first().getAttribute("d")).length > 50);
}

async function killedExpertTurnsRedAndRecovers(page) {
  const victim = (await cluster.pool("experts")).members[0];
  process.kill(victim.pid, "SIGKILL");
  const row = page.locator(`#pool-experts .member[data-key="${victim.id}"]`);
  // All of one moment: a new server takes its place at once.
  const seen = await until("the server is shown as lost", () =>
    page.evaluate((id) => {
      const row = document.querySelector(`#pool-experts .member[data-key="${id}"][data-state="lost"]`);
      return row && {
        row: row.innerText,
        dot: getComputedStyle(row.querySelector(".dot")).backgroundColor,
        pool: document.querySelector("#pool-experts .pool-count").innerText,
        health: document.getElementById("health").innerText,
        cell: window.heatPixel(0.1, 0.1), // its column
      };
    }, victim.id));
  const [red, green] = seen.dot.match(/\d+/g).map(Number);
  assert.ok(red > 150 && red > 2 * green, `red ${red}, green ${green}`);
  assert.match(seen.row, /lost/);
  assert.match(seen.pool, /degraded|down/);
  assert.match(seen.health, /degraded: experts|Not ready/);
  assert.ok(seen.cell[0] > seen.cell[1] + 20, `cell: ${seen.cell}`);
  await page.locator("#events", { hasText: `expert server ${victim.id.slice(0, 8)} was lost` }).waitFor();
  await page.locator("#pool-experts .pool-count", { hasText: /^2 ready$/ }).waitFor();
  await row.waitFor({ state: "detached" });
  await page.locator("#health", { hasText: /^Serving$/ }).waitFor();
}

async function operatorScalesAndDrains(page) {
  assert.equal(await page.locator("#pool-experts .step").first().isVisible(), false);
  await page.click("#operate");
  assert.equal(await page.evaluate(() => document.activeElement.id), "operator-token");
  await page.fill("#operator-token", OPERATOR_TOKEN);
  await page.press("#operator-token", "Enter");
  await page.click('#pool-experts .step[data-by="1"]');
  await page.locator("#operator-said", { hasText: "experts: scaling to 3" }).waitFor();
  await page.locator("#pool-experts .pool-count", { hasText: /^3 ready$/ }).waitFor();
  await until("the new server has work", async () => (await cluster.pool("experts")).members.every((member) => member.load.rows_per_s > 0));

  const last = members(page, "experts", "ready").last();
  const id = await last.getAttribute("data-key");
  await last.locator(".drain").click();
  await page.locator("dialog[open]").waitFor();
  await page.keyboard.press("Escape"); // not after all
  await sleep(300);
  assert.equal((await cluster.pool("experts")).members.filter((member) => member.state === "ready").length, 3);
  await last.locator(".drain").click();
  await page.locator('dialog[open] button:has-text("Drain")').click();
  await page.locator(`#pool-experts .member[data-key="${id}"]:is([data-state="draining"], [data-state="left"])`).waitFor();
  await page.locator("#pool-experts .pool-count", { hasText: /^2 ready$/ }).waitFor();
  await until("it has left", async () => {
    const member = (await cluster.pool("experts")).members.find((candidate) => candidate.id === id);
    return !member || member.state === "left";
  });
  const operated = page.locator("#events li[data-kind=operator]");
  assert.equal(await operated.count(), 2);
}

async function wrongTokenIsForgotten() {
  const page = await openPage({ session: { "minke.api-key": API_KEY, "minke.operator-token": "wrong" } });
  await page.locator('#pool-experts .step[data-by="1"]').click();
  await page.locator("#operator-said", { hasText: "operator token is not valid" }).waitFor();
  await page.locator("#operate").waitFor();
  assert.equal(await page.locator("#pool-experts .step").first().isVisible(), false);
  await page.context().close();
}

async function axeIsCleanEverywhere() {
  for (const viewport of [WIDE, NARROW]) {
    const page = await openPage({ viewport, session: { "minke.api-key": API_KEY, "minke.operator-token": OPERATOR_TOKEN } });
    await page.locator("#health", { hasText: "Serving" }).waitFor();
    await page.click("#settings summary");
    await page.fill("#setting-max_tokens", "20");
    await page.fill("#prompt", "Good morrow, cousin.");
    await page.press("#prompt", "Enter");
    await page.locator(".turn.assistant .foot", { hasText: "prompt tokens" }).waitFor();
    for (const colorScheme of ["light", "dark"]) {
      const what = `${viewport.width} ${colorScheme}`;
      await page.emulateMedia({ colorScheme });
      await checkAccessibility(page, what);
      if (viewport !== NARROW) continue;
      await page.click("#tab-cluster");
      await checkAccessibility(page, `${what}, cluster`);
      const wider = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
      assert.equal(wider, false, "no sideways scrolling");
      await page.click("#tab-chat");
    }
    await page.click("#open-access");
    await checkAccessibility(page, `${viewport.width} dark, dialog`);
    assert.deepEqual(page.complaints, [], String(viewport.width));
    await page.context().close();
  }
}

async function themeIsChosen(page) {
  const background = () => page.evaluate(() => getComputedStyle(document.body.parentElement).backgroundColor);
  const light = await background();
  await page.click("#theme");
  await page.click("#theme");
  assert.equal(await text(page, "#theme"), "Theme: dark");
  assert.notEqual(await background(), light);
  await page.reload();
  assert.equal(await text(page, "#theme"), "Theme: dark");
  await page.click("#theme");
  assert.equal(await background(), light);
}

// Last: the browser complains about connections that are refused.
async function aLostGatewayIsSaidAndComesBack(page) {
  assert.deepEqual(page.complaints, []);
  process.kill((await cluster.pool("gateways")).members[0].pid, "SIGKILL");
  await page.locator("#health", { hasText: "Disconnected" }).waitFor();
  assert.match(await text(page, "#notice"), /does not answer/);
  await page.locator("#health", { hasText: "Serving" }).waitFor();
  assert.equal(await page.locator("#notice").isVisible(), false);
}

async function step(what, run) {
  const begin = Date.now();
  await run();
  console.log(`ok ${what} (${((Date.now() - begin) / 1000).toFixed(1)} s)`);
}

try {
  const launched = chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"] });
  await step("the cluster starts", () => cluster.start("--experts=2"));
  browser = await launched;
  await step("access is asked for", accessIsAskedFor);
  const page = await openPage();
  await step("chat by keyboard", () => chatByKeyboard(page));
  await step("settings are sent", () => settingsAreSent(page));
  await step("stop stops", () => stopStops(page));
  await step("load is shown", () => loadIsShown(page));
  await step("a killed expert server turns red and recovers", () => killedExpertTurnsRedAndRecovers(page));
  await step("an operator scales and drains", () => operatorScalesAndDrains(page));
  await step("a wrong token is forgotten", wrongTokenIsForgotten);
  await step("no request failed under all this", () => cluster.stopLoad());
  await step("axe is clean in both themes and widths", axeIsCleanEverywhere);
  await step("the theme is chosen", () => themeIsChosen(page));
  await step("a lost gateway is said and comes back", () => aLostGatewayIsSaidAndComesBack(page));
} catch (error) {
  console.error(error);
  console.error(cluster.log.split("\n").slice(-60).join("\n"));
  process.exitCode = 1;
} finally {
  await step("the browser ends", async () => browser?.close());
  await step("the cluster ends", () => cluster.stop());
}
