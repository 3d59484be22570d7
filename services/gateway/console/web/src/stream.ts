// Server-sent events over fetch: EventSource can send no Authorization header and no body.

export class HttpError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

// The message of an OpenAI error object, or what there is.
export async function errorOf(response: Response): Promise<HttpError> {
  const text = await response.text().catch(() => "");
  try {
    const message: unknown = JSON.parse(text)?.error?.message;
    if (typeof message === "string") return new HttpError(response.status, message);
  } catch {
    // not JSON
  }
  return new HttpError(response.status, text.slice(0, 300) || `HTTP ${response.status}`);
}

// The data of each event until the stream ends. HttpError for another answer than 200.
export async function* events(input: string, init: RequestInit): AsyncGenerator<string> {
  const response = await fetch(input, init);
  if (!response.ok || !response.body) throw await errorOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += value;
      for (let end = pending.indexOf("\n\n"); end >= 0; end = pending.indexOf("\n\n")) {
        const event = pending.slice(0, end);
        pending = pending.slice(end + 2);
        for (const line of event.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } finally {
    void reader.cancel().catch(() => undefined);
  }
}
