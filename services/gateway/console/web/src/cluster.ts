// The live view: traffic, pools, expert load, events.
import { operatorToken } from "./access";
import { makeChart } from "./chart";
import { announce, byId, h, keyed, setAttribute, setText } from "./dom";
import { ago, clock, count, milliseconds, plural, shortId } from "./format";
import { makeHeatMap } from "./heatmap";
import { drain, scale } from "./operator";
import type { Cluster, ClusterEvent, Latency, Load, Member, Pool, State } from "./schema";

const TITLES: Record<string, string> = { gateways: "Gateways", attention: "Attention", routers: "Routers", experts: "Experts" };
const SEEN_AT_ONCE = 8;
// Said aloud when they happen; the others are in the list only.
const SPOKEN = new Set(["lost", "cluster", "failover", "operator"]);

export interface ClusterPanel {
  update(cluster: Cluster): void;
  setStale(stale: boolean): void;
  redraw(): void;
}

// What of a member's load is worth a glance: text, and a part of something full where there is one.
function loadOf(member: Member, pool: Pool): { text: string; part: number | null } {
  const load: Load = member.load;
  if (member.state === "loading") return { text: member.detail ?? "starting", part: null };
  if (member.state === "lost" || member.state === "left") return { text: "", part: null };
  switch (pool.role) {
    case "gateway":
      return { text: `${plural(load.sequences ?? 0, "sequence")}, ${plural(load.connections ?? 0, "connection")}`, part: null };
    case "attention": {
      const used = (load.cache_pages_used ?? 0) / Math.max(1, load.cache_pages_total ?? 1);
      const waiting = load.waiting ? `, ${count(load.waiting)} waiting` : "";
      const cache = used > 0 && used < 0.01 ? "<1" : (used * 100).toFixed(0);
      return { text: `${count(load.running ?? 0)} running${waiting}, ${count(load.tokens_per_s ?? 0)} tokens/s, cache ${cache} %`, part: used };
    }
    case "router":
      return { text: `${count(load.rows_per_s ?? 0)} rows/s`, part: null };
    case "expert": {
      const queued = load.queued_rows ? `, ${count(load.queued_rows)} queued` : "";
      const most = Math.max(1, ...pool.members.map((other) => other.load.rows_per_s ?? 0));
      return { text: `${count(load.rows_per_s ?? 0)} rows/s${queued}, ${plural(load.units ?? 0, "unit")}`, part: (load.rows_per_s ?? 0) / most };
    }
  }
}

// The gateway is one per port, and so is a router that holds the registry.
const isScalable = (pool: Pool, cluster: Cluster): boolean =>
  pool.role === "router" ? cluster.registry === "etcd" : pool.role !== "gateway";

// Where not all are seen at once, those in trouble come first.
function inOrder(members: Member[]): Member[] {
  if (members.length <= SEEN_AT_ONCE) return members;
  return [...members].sort((a, b) => Number(a.state === "ready") - Number(b.state === "ready"));
}

function makeMember(pool: Pool, member: Member, onDone: (message: string | null) => void): HTMLElement {
  const name = `${pool.role} ${shortId(member.id)}`;
  const button = h("button", { type: "button", class: "quiet small drain", "aria-label": `Drain ${name}` }, "Drain");
  button.addEventListener("click", () => void drain(member.id, name).then(onDone));
  return h(
    "li",
    { class: "member" },
    h("span", { class: "dot", "aria-hidden": "true" }),
    h("span", { class: "id" }, shortId(member.id)),
    h("span", { class: "state" }),
    h("span", { class: "address" }),
    button,
    h("span", { class: "load" }),
    h("span", { class: "meter", "aria-hidden": "true" }, h("span", {})),
  );
}

function updateMember(element: HTMLElement, pool: Pool, member: Member, cluster: Cluster): void {
  const part = (name: string): HTMLElement => element.querySelector(`.${name}`) as HTMLElement;
  setAttribute(element, "data-state", member.state);
  setAttribute(element, "title", `${member.id}${member.pid ? `, pid ${member.pid}` : ""}`);
  const leads = member.id === cluster.leader && pool.role === "router" ? ", leads" : "";
  const here = member.id === cluster.gateway ? ", this one" : "";
  setText(part("state"), `${member.state}${leads}${here}${member.state === "lost" ? ` ${ago(cluster.time_ms - member.since_ms)} ago` : ""}`);
  setText(part("address"), member.address ?? "");
  const load = loadOf(member, pool);
  setText(part("load"), load.text);
  part("meter").hidden = load.part === null;
  (part("meter").firstElementChild as HTMLElement).style.width = `${((load.part ?? 0) * 100).toFixed(1)}%`;
  const operable = cluster.operator && operatorToken() !== "" && isScalable(pool, cluster);
  part("drain").hidden = !operable || member.state === "lost" || member.state === "left" || member.state === "draining";
}

function makePool(pool: Pool, onDone: (message: string | null) => void): HTMLElement {
  const title = TITLES[pool.name] ?? pool.name;
  const step = (by: number, sign: string, verb: string): HTMLElement =>
    h("button", { type: "button", class: "quiet small step", "data-by": by, "aria-label": `${verb} ${title.toLowerCase()}`, click: () => void scale(pool.name, by).then(onDone) }, sign);
  return h(
    "div",
    { class: "pool", id: `pool-${pool.name}` },
    h(
      "div",
      { class: "pool-head" },
      h("h3", {}, title),
      h("span", { class: "pool-count" }),
      h("span", { class: "steps" }, step(-1, "−", "Fewer"), step(1, "+", "More")),
    ),
    h("p", { class: "empty" }, "Nobody here."),
    h("ul", { class: "members", "aria-label": title }),
  );
}

function updatePool(element: HTMLElement, pool: Pool, cluster: Cluster, onDone: (message: string | null) => void): void {
  setAttribute(element, "data-health", pool.health);
  const health = pool.health === "ok" ? "" : `, ${pool.health}`;
  setText(element.querySelector(".pool-count") as HTMLElement, `${pool.ready} ready${health}`);
  (element.querySelector(".steps") as HTMLElement).hidden = !cluster.operator || operatorToken() === "" || !isScalable(pool, cluster);
  (element.querySelector(".empty") as HTMLElement).hidden = pool.members.length > 0;
  const list = element.querySelector(".members") as HTMLElement;
  keyed(
    list,
    inOrder(pool.members),
    (member) => member.id,
    (member) => makeMember(pool, member, onDone),
    (row, member) => updateMember(row, pool, member, cluster),
  );
  // One that scrolls is reached by keyboard.
  if (list.scrollHeight > list.clientHeight) setAttribute(list, "tabindex", "0");
  else list.removeAttribute("tabindex");
}

function makeEvent(event: ClusterEvent): HTMLElement {
  return h("li", { "data-kind": event.kind }, h("time", {}), h("span", { class: "what" }));
}

export function makeClusterPanel(root: HTMLElement, askForToken: () => void): ClusterPanel {
  const tokens = makeChart("Throughput", (value) => `${count(value)} tokens/s`);
  const first = makeChart("Time to first token", milliseconds);
  const each = makeChart("Time per token", milliseconds);
  const heat = makeHeatMap();
  const pools = h("div", { class: "pools" });
  const epoch = h("span", { class: "epoch", id: "epoch" });
  const operate = h("button", { type: "button", class: "quiet small", id: "operate", hidden: true, click: askForToken }, "Operate…");
  const log = h("ol", { class: "events", id: "events" });
  const noEvents = h("p", { class: "empty" }, "Nothing has happened since this gateway started.");
  const said = h("p", { class: "said", id: "operator-said", role: "status" });
  const block = (title: string, extra: (Node | string)[], ...content: Node[]): HTMLElement =>
    h("div", { class: "block" }, h("div", { class: "block-head" }, h("h2", {}, title), ...extra), ...content);
  root.append(
    block("Traffic", [h("span", { class: "hint" }, "this gateway, last minute")], h("div", { class: "charts" }, tokens.element, first.element, each.element)),
    block("Pools", [h("span", { class: "side" }, epoch, operate)], said, pools),
    block("Expert load", [h("span", { class: "hint" }, "rows per second, layer × server")], heat.element),
    block("Events", [], noEvents, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Recent events" }, log)),
  );

  let heard = -1; // number of the last event that was there
  const onDone = (message: string | null): void => {
    if (message !== null) setText(said, message);
  };
  const latency = (value: Latency): string => (value.p95 === null ? "no tokens in the last minute" : `95 % below ${milliseconds(value.p95)}`);

  function updateTraffic({ traffic }: Cluster): void {
    tokens.update(
      `${count(traffic.tokens_per_s)} tokens/s`,
      `${count(traffic.sequences)} open, ${count(traffic.prompt_tokens_per_s)} prompt tokens/s${traffic.failed ? `, ${traffic.failed} failed` : ""}`,
      traffic.series.tokens,
      `Tokens per second over two minutes, now ${count(traffic.series.tokens.at(-1) ?? 0)}`,
    );
    first.update(milliseconds(traffic.first_token_ms.p50), latency(traffic.first_token_ms), traffic.series.first_token_ms,
      `Time to the first token over two minutes, median ${milliseconds(traffic.first_token_ms.p50)}`);
    each.update(milliseconds(traffic.token_ms.p50), latency(traffic.token_ms), traffic.series.token_ms,
      `Time per token over two minutes, median ${milliseconds(traffic.token_ms.p50)}`);
  }

  function updateEvents(list: ClusterEvent[]): void {
    noEvents.hidden = list.length > 0;
    keyed(log, [...list].reverse(), (event) => String(event.number), makeEvent, (element, event) => {
      setText(element.querySelector("time") as HTMLElement, clock(event.time_ms));
      setText(element.querySelector(".what") as HTMLElement, event.text);
    });
    const last = list.at(-1)?.number ?? 0;
    if (heard >= 0) {
      const spoken = list.filter((event) => event.number > heard && SPOKEN.has(event.kind)).map((event) => event.text);
      if (spoken.length > 0) announce(spoken.join(". "));
    }
    heard = last;
  }

  return {
    update(cluster): void {
      updateTraffic(cluster);
      setText(epoch, cluster.epoch.counter === 0 ? "not placed yet" : `epoch ${cluster.epoch.term}.${cluster.epoch.counter}`);
      keyed(pools, cluster.pools, (pool) => pool.name, (pool) => makePool(pool, onDone), (element, pool) => updatePool(element, pool, cluster, onDone));
      operate.hidden = !cluster.operator || operatorToken() !== "";
      const states = new Map<string, State>(cluster.pools.flatMap((pool) => pool.members.map((member) => [member.id, member.state] as const)));
      heat.update(cluster.heat, states);
      updateEvents(cluster.events);
      setText(byId("model-name"), cluster.model.name);
    },
    setStale(stale): void {
      root.classList.toggle("stale", stale);
    },
    redraw: heat.redraw,
  };
}
