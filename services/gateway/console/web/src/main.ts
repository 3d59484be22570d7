// The console: a chat on one side, the cluster that answers on the other.
import "./style.css";
import { apiKey, bearer, makeAccessDialog, onAccessChange, operatorToken } from "./access";
import { makeChat } from "./chat";
import { makeClusterPanel } from "./cluster";
import { byId, setText } from "./dom";
import type { Cluster } from "./schema";
import { events, HttpError } from "./stream";
import { startTheme } from "./theme";

const SILENCE_MAX_MS = 5000; // the gateway says something every second
const RETRY_MAX_MS = 8000;

const openAccess = makeAccessDialog();
const panel = makeClusterPanel(byId("cluster"), () => openAccess("operator"));
const chat = makeChat(byId("chat"), { needAccess: () => openAccess("key") });
startTheme(() => panel.redraw());

let last: Cluster | null = null;

function setHealth(kind: "ok" | "waiting" | "down", text: string): void {
  const pill = byId("health");
  pill.dataset["kind"] = kind;
  setText(pill, text);
}

function setNotice(text: string): void {
  const notice = byId("notice");
  notice.hidden = text === "";
  setText(notice, text);
}

function show(cluster: Cluster): void {
  last = cluster;
  panel.setStale(false);
  panel.update(cluster);
  chat.setModel(cluster.model.chat);
  const degraded = cluster.pools.filter((pool) => pool.health !== "ok").map((pool) => pool.name);
  if (!cluster.ready) setHealth("waiting", "Not ready");
  else if (degraded.length > 0) setHealth("waiting", `Serving, degraded: ${degraded.join(", ")}`);
  else setHealth("ok", "Serving");
  setNotice(
    !cluster.registry_connected
      ? "The registry does not answer: members and placement are the last ones known."
      : cluster.ready
        ? ""
        : `Not ready: ${cluster.not_ready_reason ?? "no reason given"}`,
  );
}

function disconnected(error: unknown, retry_ms: number): void {
  panel.setStale(true);
  if (error instanceof HttpError && error.status === 401) {
    setHealth("down", "No access");
    setNotice(apiKey() ? "The API key is not valid." : "This cluster needs an API key.");
    return;
  }
  setHealth("down", "Disconnected");
  const reason = error instanceof HttpError ? `: ${error.message}` : "";
  setNotice(`The gateway does not answer${reason}. Trying again${retry_ms > 1000 ? ` every ${Math.round(retry_ms / 1000)} s` : ""}.`);
}

// One stream after the other, for ever; a new one at once when the access changes.
async function follow(): Promise<void> {
  let retry_ms = 500;
  for (;;) {
    const controller = new AbortController();
    let wake = (): void => undefined;
    onNextAccess = () => {
      controller.abort();
      wake();
    };
    let timer = 0;
    const expect = (): void => {
      window.clearTimeout(timer);
      timer = window.setTimeout(() => controller.abort(), SILENCE_MAX_MS);
    };
    let needsKey = false;
    expect();
    try {
      const headers = bearer(apiKey() || operatorToken());
      for await (const data of events("/cluster/events", { headers, signal: controller.signal })) {
        expect();
        retry_ms = 500;
        show(JSON.parse(data) as Cluster);
      }
      disconnected(null, retry_ms);
    } catch (error) {
      needsKey = error instanceof HttpError && error.status === 401;
      disconnected(error, retry_ms);
    }
    window.clearTimeout(timer);
    await new Promise<void>((resolve) => {
      wake = resolve;
      if (!needsKey) window.setTimeout(resolve, retry_ms);
    });
    retry_ms = Math.min(retry_ms * 2, RETRY_MAX_MS);
  }
}
let onNextAccess = (): void => undefined;
onAccessChange(() => {
  if (last) panel.update(last);
  onNextAccess();
});

// Narrow screens show one section at a time.
for (const name of ["chat", "cluster"] as const) {
  byId(`tab-${name}`).addEventListener("click", () => {
    byId("main").dataset["tab"] = name;
    for (const other of ["chat", "cluster"]) byId(`tab-${other}`).setAttribute("aria-pressed", String(other === name));
    panel.redraw();
  });
}

void follow();
