// The conversation: streams an answer, can be stopped, counts tokens.
import { apiKey, bearer } from "./access";
import { announce, h, setText } from "./dom";
import { milliseconds, plural } from "./format";
import { loadSettings, settingsForm } from "./settings";
import { events, HttpError } from "./stream";

interface Turn {
  role: "user" | "assistant";
  text: string;
}

interface Usage {
  prompt: number | null; // null: the server did not get to say
  completion: number;
  first_ms: number | null;
  total_ms: number;
}

// The parts of a streamed chunk that are used here.
interface Chunk {
  choices?: { delta?: { content?: string }; text?: string; token_ids?: number[]; finish_reason?: string | null }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
  error?: { message?: string };
}

export interface ChatOptions {
  needAccess(): void;
}

export function makeChat(root: HTMLElement, options: ChatOptions): { setModel(hasChat: boolean): void } {
  const settings = loadSettings();
  const turns: Turn[] = [];
  let hasChat = true;
  let running: AbortController | null = null;

  const empty = h(
    "div",
    { class: "empty" },
    h("p", {}, "Nothing said yet."),
    h("p", { class: "hint" }, "Enter sends, Shift+Enter begins a new line."),
  );
  const transcript = h("div", { class: "transcript", id: "transcript", role: "region", "aria-label": "Conversation", tabindex: 0 }, empty);
  const prompt = h("textarea", { id: "prompt", rows: 2, placeholder: "Say something", "aria-label": "Message", autocomplete: "off" });
  const send = h("button", { type: "submit", class: "primary", id: "send" }, "Send");
  const clear = h("button", { type: "button", class: "quiet", id: "clear", disabled: true }, "New chat");
  const form = h("form", { class: "composer" }, prompt, h("div", { class: "actions" }, clear, send));
  root.append(transcript, settingsForm(settings, () => undefined), form);

  const completionOnly = (): boolean => !hasChat || settings.mode === "completion";

  function follow(): void {
    transcript.scrollTop = transcript.scrollHeight;
  }

  function bubble(role: "user" | "assistant", text: string): { body: HTMLElement; foot: HTMLElement } {
    empty.remove();
    const body = h("div", { class: "text" }, text);
    const foot = h("p", { class: "foot" });
    transcript.append(
      h("article", { class: `turn ${role}`, "aria-label": role === "user" ? "You" : "Answer" },
        h("p", { class: "who" }, role === "user" ? "You" : "Minke"), body, foot),
    );
    follow();
    return { body, foot };
  }

  function request(): { path: string; body: object } {
    const common = {
      temperature: settings.temperature,
      top_p: settings.top_p,
      max_tokens: settings.max_tokens,
      stream: true,
      stream_options: { include_usage: true },
      return_token_ids: true,
    };
    const system = settings.system.trim();
    if (completionOnly()) {
      const text = [...(system ? [system, "\n"] : []), ...turns.map((turn) => turn.text)].join("");
      return { path: "/v1/completions", body: { prompt: text, ...common } };
    }
    const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
    if (system) messages.unshift({ role: "system" as "user", content: system });
    return { path: "/v1/chat/completions", body: { messages, ...common } };
  }

  function describe(usage: Usage, how: string): string {
    const seconds = (usage.total_ms - (usage.first_ms ?? usage.total_ms)) / 1000;
    const speed = usage.completion > 1 && seconds > 0 ? ` · ${((usage.completion - 1) / seconds).toFixed(0)} tokens/s` : "";
    const asked = usage.prompt === null ? "" : `${plural(usage.prompt, "prompt token")} · `;
    const first = usage.first_ms === null ? "" : ` · first after ${milliseconds(usage.first_ms)}`;
    return `${asked}${plural(usage.completion, "token")}${speed}${first}${how ? ` · ${how}` : ""}`;
  }

  async function answer(): Promise<void> {
    const controller = new AbortController();
    setRunning(controller);
    const { body, foot } = bubble("assistant", "");
    body.classList.add("busy");
    const turn: Turn = { role: "assistant", text: "" };
    const usage: Usage = { prompt: null, completion: 0, first_ms: null, total_ms: 0 };
    const begin = performance.now();
    let how = "";
    // Tokens may come faster than frames: what is new goes into the page once per frame.
    const shown = document.createTextNode("");
    body.append(shown);
    let frame = 0;
    const show = (): void => {
      frame = 0;
      const atEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;
      shown.appendData(turn.text.slice(shown.length));
      setText(foot, describe(usage, how));
      if (atEnd) follow();
    };
    try {
      const { path, body: json } = request();
      const init = {
        method: "POST",
        headers: { "content-type": "application/json", ...bearer(apiKey()) },
        body: JSON.stringify(json),
        signal: controller.signal,
      };
      for await (const data of events(path, init)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data) as Chunk;
        if (chunk.error) throw new Error(chunk.error.message ?? "the server reported an error");
        const choice = chunk.choices?.[0];
        if (choice) {
          const piece = choice.delta?.content ?? choice.text ?? "";
          usage.completion += choice.token_ids?.length ?? 0;
          if (usage.first_ms === null && (choice.token_ids?.length ?? 0) > 0) usage.first_ms = performance.now() - begin;
          if (choice.finish_reason === "length") how = "stopped at max tokens";
          turn.text += piece;
        }
        if (chunk.usage) {
          usage.prompt = chunk.usage.prompt_tokens;
          usage.completion = chunk.usage.completion_tokens;
        }
        usage.total_ms = performance.now() - begin;
        if (frame === 0) frame = requestAnimationFrame(show);
      }
    } catch (error) {
      if (controller.signal.aborted) {
        how = "stopped by you";
      } else {
        const message = error instanceof Error ? error.message : String(error);
        how = "failed";
        body.after(h("p", { class: "error", role: "alert" }, error instanceof HttpError || turn.text ? message : `The gateway does not answer: ${message}`));
        if (error instanceof HttpError && error.status === 401) options.needAccess();
      }
    }
    body.classList.remove("busy");
    usage.total_ms = performance.now() - begin;
    cancelAnimationFrame(frame);
    show();
    turns.push(turn);
    setRunning(null);
    follow();
    announce(how === "failed" ? "The answer failed." : `Answer: ${turn.text.slice(0, 2000)}. ${foot.textContent}`);
  }

  function setRunning(controller: AbortController | null): void {
    running = controller;
    send.textContent = controller ? "Stop" : "Send";
    send.classList.toggle("stop", controller !== null);
    clear.disabled = controller !== null || turns.length === 0;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) {
      running.abort();
      return;
    }
    const text = prompt.value;
    if (!text.trim()) return;
    prompt.value = "";
    turns.push({ role: "user", text });
    bubble("user", text);
    void answer();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
  clear.addEventListener("click", () => {
    turns.length = 0;
    transcript.replaceChildren(empty);
    clear.disabled = true;
    prompt.focus();
  });

  return {
    setModel(chat: boolean): void {
      hasChat = chat;
      prompt.placeholder = completionOnly() ? "Text to go on from" : "Say something";
    },
  };
}
