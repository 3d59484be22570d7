// The API key and the operator's token: asked for in one dialog, kept for this tab only (sessionStorage).
import { byId, h } from "./dom";

const API_KEY = "minke.api-key";
const OPERATOR = "minke.operator-token";

export const apiKey = (): string => sessionStorage.getItem(API_KEY) ?? "";
export const operatorToken = (): string => sessionStorage.getItem(OPERATOR) ?? "";

export function forgetOperator(): void {
  sessionStorage.removeItem(OPERATOR);
  changed();
}

const listeners: (() => void)[] = [];
export function onAccessChange(listener: () => void): void {
  listeners.push(listener);
}
function changed(): void {
  for (const listener of listeners) listener();
}

export const bearer = (token: string): Record<string, string> => (token ? { authorization: `Bearer ${token}` } : {});

function keep(name: string, value: string): void {
  if (value) sessionStorage.setItem(name, value);
  else sessionStorage.removeItem(name);
}

function secretField(id: string, label: string, hint: string): { field: HTMLElement; input: HTMLInputElement } {
  const input = h("input", { id, type: "password", autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-hint` });
  const field = h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    input,
    h("p", { class: "hint", id: `${id}-hint` }, hint),
  );
  return { field, input };
}

export function makeAccessDialog(): (first: "key" | "operator") => void {
  const key = secretField("api-key", "API key", "Needed where the cluster was started with --api-key-file.");
  const token = secretField("operator-token", "Operator token", "Allows to scale pools and to drain members.");
  const form = h(
    "form",
    { method: "dialog" },
    h("h2", { id: "access-title" }, "Access"),
    h("p", { class: "hint" }, "Kept in this tab only, and sent to this gateway only."),
    key.field,
    token.field,
    h(
      "div",
      { class: "actions" },
      h("button", { type: "button", class: "quiet", click: () => dialog.close() }, "Cancel"),
      h("button", { type: "submit", class: "primary", id: "save-access" }, "Save"),
    ),
  );
  const dialog = h("dialog", { class: "dialog", "aria-labelledby": "access-title" }, form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    keep(API_KEY, key.input.value.trim());
    keep(OPERATOR, token.input.value.trim());
    dialog.close();
    changed();
  });
  document.body.append(dialog);
  const open = (first: "key" | "operator"): void => {
    key.input.value = apiKey();
    token.input.value = operatorToken();
    if (!dialog.open) dialog.showModal();
    (first === "key" ? key : token).input.focus();
  };
  byId("open-access").addEventListener("click", () => open("key"));
  return open;
}

// A question before something that cannot be taken back at once. True: yes.
export function confirmed(title: string, text: string, yes: string): Promise<boolean> {
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      { class: "dialog", "aria-labelledby": "confirm-title", "aria-describedby": "confirm-text" },
      h("h2", { id: "confirm-title" }, title),
      h("p", { id: "confirm-text" }, text),
      h(
        "div",
        { class: "actions" },
        h("button", { type: "button", class: "quiet", click: () => dialog.close("no") }, "Cancel"),
        h("button", { type: "button", class: "primary", click: () => dialog.close("yes") }, yes),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
