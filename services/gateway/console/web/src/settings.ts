// How answers are generated; kept across visits.
import { h } from "./dom";

export interface Settings {
  mode: "chat" | "completion";
  system: string;
  temperature: number;
  top_p: number;
  max_tokens: number;
}

const KEY = "minke.settings";
const DEFAULTS: Settings = { mode: "chat", system: "", temperature: 0.7, top_p: 0.95, max_tokens: 512 };

export function loadSettings(): Settings {
  try {
    const stored: unknown = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return { ...DEFAULTS, ...(typeof stored === "object" ? stored : {}) };
  } catch {
    return { ...DEFAULTS };
  }
}

type NumberName = "temperature" | "top_p" | "max_tokens";

// `settings` is changed in place.
export function settingsForm(settings: Settings, onChange: () => void): HTMLElement {
  const changed = (): void => {
    localStorage.setItem(KEY, JSON.stringify(settings));
    onChange();
  };
  const number = (name: NumberName, label: string, min: number, max: number, step: number): HTMLElement => {
    const id = `setting-${name}`;
    const input = h("input", { id, type: "number", min, max, step, value: settings[name], inputmode: "decimal" });
    input.addEventListener("change", () => {
      const value = Number(input.value);
      const valid = input.value !== "" && Number.isFinite(value);
      settings[name] = valid ? Math.min(max, Math.max(min, step === 1 ? Math.round(value) : value)) : DEFAULTS[name];
      input.value = String(settings[name]);
      changed();
    });
    return h("div", { class: "field" }, h("label", { for: id }, label), input);
  };
  const mode = h(
    "select",
    { id: "setting-mode" },
    h("option", { value: "chat" }, "Chat"),
    h("option", { value: "completion" }, "Completion"),
  );
  mode.value = settings.mode;
  mode.addEventListener("change", () => {
    settings.mode = mode.value === "completion" ? "completion" : "chat";
    changed();
  });
  const system = h("textarea", { id: "setting-system", rows: 2, placeholder: "None" });
  system.value = settings.system;
  system.addEventListener("change", () => {
    settings.system = system.value;
    changed();
  });
  return h(
    "details",
    { class: "settings", id: "settings" },
    h("summary", {}, "Settings"),
    h(
      "div",
      { class: "grid" },
      h("div", { class: "field" }, h("label", { for: "setting-mode" }, "Mode"), mode),
      number("temperature", "Temperature", 0, 2, 0.05),
      number("top_p", "Top p", 0.01, 1, 0.01),
      number("max_tokens", "Max tokens", 1, 1_000_000, 1),
      h("div", { class: "field wide" }, h("label", { for: "setting-system" }, "System prompt"), system),
    ),
  );
}
