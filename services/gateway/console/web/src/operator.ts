// Scaling and draining, with the operator's token.
import { bearer, confirmed, forgetOperator, operatorToken } from "./access";
import { errorOf, HttpError } from "./stream";

interface Child {
  name: string;
  pool: string;
  state: string;
}

async function call<Answer>(path: string, body?: object): Promise<Answer> {
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { ...bearer(operatorToken()), ...(body ? { "content-type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : null,
  });
  if (!response.ok) throw await errorOf(response);
  return (await response.json()) as Answer;
}

async function staying(pool: string): Promise<number> {
  const { children } = await call<{ children: Child[] }>("/operator/status");
  return children.filter((child) => child.pool === pool && ["starting", "running", "restarting"].includes(child.state)).length;
}

// Each says what it did, or why not.
async function reported(what: () => Promise<string | null>): Promise<string | null> {
  try {
    return await what();
  } catch (error) {
    if (error instanceof HttpError && error.status === 403) forgetOperator();
    return error instanceof Error ? error.message : String(error);
  }
}

export const scale = (pool: string, by: number): Promise<string | null> =>
  reported(async () => {
    const count = (await staying(pool)) + by;
    if (by < 0 && !(await confirmed(`Scale ${pool} to ${count}?`, "The youngest process leaves; its work goes to others first.", "Scale down"))) {
      return null;
    }
    await call("/operator/scale", { pool, count });
    return `${pool}: scaling to ${count}`;
  });

export const drain = (id: string, name: string): Promise<string | null> =>
  reported(async () => {
    if (!(await confirmed(`Drain ${name}?`, "Its work goes to others first, then its process ends. Nothing takes its place.", "Drain"))) return null;
    await call("/operator/drain", { node: id });
    return `${name}: draining`;
  });
