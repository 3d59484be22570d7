// What GET /cluster answers: docs/console.md.

export type State = "loading" | "ready" | "draining" | "lost" | "left";
export type Role = "gateway" | "attention" | "router" | "expert";

export interface Load {
  sequences?: number;
  connections?: number;
  running?: number;
  waiting?: number;
  cache_pages_used?: number;
  cache_pages_total?: number;
  tokens_per_s?: number;
  redispatched_rows?: number;
  rows_per_s?: number;
  queued_rows?: number;
  units?: number;
}

export interface Member {
  id: string;
  address: string | null;
  pid: number;
  state: State;
  detail: string | null;
  since_ms: number;
  load: Load;
}

export interface Pool {
  name: string;
  role: Role;
  health: "ok" | "degraded" | "down";
  ready: number;
  members: Member[];
}

export interface Heat {
  servers_total: number;
  layers: number[];
  servers: string[];
  rows_per_s: number[][]; // by layer, then by server
}

export interface Latency {
  p50: number | null;
  p95: number | null;
}

export interface Traffic {
  window_s: number;
  sequences: number;
  tokens_per_s: number;
  prompt_tokens_per_s: number;
  sequences_per_s: number;
  failed: number;
  first_token_ms: Latency;
  token_ms: Latency;
  series: { tokens: number[]; first_token_ms: (number | null)[]; token_ms: (number | null)[] };
}

export interface ClusterEvent {
  number: number;
  time_ms: number;
  kind: string;
  text: string;
  node: string | null;
}

export interface Cluster {
  schema: number;
  time_ms: number;
  gateway: string | null;
  version: string;
  model: { name: string; context_length: number; chat: boolean };
  operator: boolean;
  registry: string;
  registry_connected: boolean;
  ready: boolean;
  not_ready_reason: string | null;
  epoch: { term: number; counter: number };
  leader: string | null;
  pools: Pool[];
  heat: Heat;
  traffic: Traffic;
  events: ClusterEvent[];
}
