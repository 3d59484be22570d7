// Light, dark, or as the system says (the default). Kept across visits.
import { byId } from "./dom";

const KEY = "minke.theme";
const NEXT = { auto: "light", light: "dark", dark: "auto" } as const;
type Theme = keyof typeof NEXT;

function stored(): Theme {
  const value = localStorage.getItem(KEY);
  return value === "light" || value === "dark" ? value : "auto";
}

export function startTheme(onChange: () => void): void {
  const button = byId("theme");
  const apply = (theme: Theme): void => {
    if (theme === "auto") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
    button.textContent = `Theme: ${theme}`;
    onChange();
  };
  button.addEventListener("click", () => {
    const theme = NEXT[stored()];
    localStorage.setItem(KEY, theme);
    apply(theme);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply(stored());
}
