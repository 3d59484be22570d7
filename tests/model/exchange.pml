/* The exchange between one attention node, two routers and S expert servers, under placement changes, lost,
 * repeated, delayed and reordered messages, and deaths. What it stands for, what it leaves out and its
 * properties: docs/protocol.md, "Checked model". check.py runs it; every property has a way to break it (-DBREAK_...)
 * under which it must fail. -DPROPERTY=n checks one alone, without it all are.
 */
#ifndef S
#define S 2              /* expert servers */
#endif
#ifndef LOSSES           /* what may go wrong, each this often */
#define LOSSES 0         /* messages lost */
#endif
#ifndef REPEATS
#define REPEATS 0        /* messages delivered a second time */
#endif
#ifndef LATE
#define LATE 0           /* deadlines that pass although the answer is on its way */
#endif
#ifndef SERVER_DEATHS
#define SERVER_DEATHS 0
#endif
#ifndef ROUTER_DEATHS
#define ROUTER_DEATHS 0
#endif
#ifndef STEPS
#define STEPS 2          /* exchanges, one after another, in the same microbatch */
#endif
#ifndef PROPERTY
#define PROPERTY 0
#endif

#define G 2              /* groups; the one row goes to both */
#define R 2              /* routers */
#define A 4              /* attempts of one: LOSSES + LATE + ROUTER_DEATHS <= 3 */
#define T 8              /* tags: at most STEPS * A */
#define NONE 3           /* no server, in a plan */
#define SELF R           /* the attention node as a sender of work */

#define TAG (step * A + attempt)
#define BIT(t, g) (1 << ((t) * G + (g)))
#define AT(s, g) (1 << ((s) * G + (g)))
#define CHECK(n, e) assert((PROPERTY != 0 && PROPERTY != n) || (e))

mtype = { unsent, sent, done };

/* On the wire: sets, so that nothing has an order. Per (tag, group): */
int work[(R + 1) * S];   /* by sender and server; also the server's queue */
int partial, nack;
byte dispatch[R];        /* per tag */
byte plan[T];            /* 0: none; else 1 + server of group 0 + 4 server of group 1 + 16 router */

/* Credit at the sender: one row per receiver. What was lost with a message waits for its time to live. */
bool credit[(R + 1) * S], expired[(R + 1) * S], dispatch_credit[R], dispatch_expired[R];

/* Placement: hosts is what servers have loaded; table what the registry published; the rest are copies. */
byte hosts, table, table_of_attention, table_of_router[R];
byte move;               /* of group 1 from server 0 to server 1: 1 loaded, 2 both published, 3 old one withdrawn */

bool alive[S], router_alive[R];
byte up, router_up, up_of_router[R]; /* as the attention node and the routers see it */
byte losses = LOSSES, repeats = REPEATS, late = LATE, deaths, router_deaths;

/* The attention node. */
byte step, attempt, router;
bool dispatched, planned, failed;
mtype slot[G] = unsent;
byte server[G], early;
byte counted[G];         /* partials added up in this exchange */

/* Scratch of one atomic step; 0 between steps. */
byte i, t, g, s, x, c0, c1;
int m;
inline wipe() { i = 0; t = 0; g = 0; s = 0; x = 0; c0 = 0; c1 = 0; m = 0 }

inline pick16(mask, out) {
  if
  :: (mask) & 1 -> out = 0        :: (mask) & 2 -> out = 1         :: (mask) & 4 -> out = 2
  :: (mask) & 8 -> out = 3        :: (mask) & 16 -> out = 4        :: (mask) & 32 -> out = 5
  :: (mask) & 64 -> out = 6       :: (mask) & 128 -> out = 7       :: (mask) & 256 -> out = 8
  :: (mask) & 512 -> out = 9      :: (mask) & 1024 -> out = 10     :: (mask) & 2048 -> out = 11
  :: (mask) & 4096 -> out = 12    :: (mask) & 8192 -> out = 13     :: (mask) & 16384 -> out = 14
  :: (mask) & 32768 -> out = 15
  fi
}
/* A message is taken off the wire, or stays to come once more. */
inline take(set, bits) {
  if
  :: set = set & ~(bits)
  :: repeats > 0 -> repeats--
  fi
}
inline pick_server(set, available) {  /* one of the servers in both, or NONE */
  s = NONE;
  if
  :: ((set) & 1) && ((available) & 1) -> s = 0
  :: ((set) & 2) && ((available) & 2) -> s = 1
#if S > 2
  :: ((set) & 4) && ((available) & 4) -> s = 2
#endif
  :: else -> skip
  fi
}

#if S > 2
#define EACH_SERVER(e) (e(0) | e(1) << 1 | e(2) << 2)
#else
#define EACH_SERVER(e) (e(0) | e(1) << 1)
#endif
#define HOSTS_IN(tbl, grp) (((tbl) >> (grp) & 1) | ((tbl) >> (G + (grp)) & 1) << 1 | ((tbl) >> (2 * G + (grp)) & 1) << 2)
#define CREDIT_OF_SELF(n) credit[SELF * S + n]
#define CREDIT_OF_0(n) credit[n]
#define CREDIT_OF_1(n) credit[S + n]
#define IN_FLIGHT_TO(n) ((work[n] | work[S + n] | work[2 * S + n]) != 0)

/* To a dead server that the sender takes for living: the work is gone, and so is the credit. */
inline put_work(snd, bits) {
  if
  :: alive[s] -> credit[snd * S + s] = 0; work[snd * S + s] = work[snd * S + s] | bits
  :: else -> skip
  fi
}

/* ---- attention node ---- */

inline forget() {        /* the old attempt */
  dispatched = 0; router = 0;
#ifndef BREAK_FORGETTING
  early = 0;
#endif
}
inline again() {         /* gate anew, elsewhere */
  attempt++;
  assert(attempt < A);   /* of the model: A is large enough */
  forget();
}
inline count(grp, tag) { /* a partial comes for a slot */
  CHECK(2, counted[grp] == 0 || slot[grp] == done);
  if
#ifndef BREAK_BITMAP
  :: slot[grp] == done -> skip
#endif
  :: else ->
    counted[grp]++;
    CHECK(2, counted[grp] == 1);
    CHECK(5, tag == TAG);
    slot[grp] = done; server[grp] = 0
  fi
}
inline unsent_again(grp) { slot[grp] = unsent; server[grp] = 0 }
inline unsend(srv) {     /* slots of a server that is lost */
  for (i : 0 .. G - 1) {
    if
    :: planned && slot[i] == sent && server[i] == srv -> unsent_again(i)
    :: else -> skip
    fi
  }
}

/* Nothing of the slot is on its way. */
#define SLOT_LOST(grp) (slot[grp] == sent && ((work[0] | work[1] | work[2] | work[3] | work[4] | work[5] | WORK_MORE | partial | nack) & BIT(TAG, grp)) == 0)
#if S > 2
#define WORK_MORE (work[6] | work[7] | work[8])
#else
#define WORK_MORE 0
#endif
#define PLAN_LOST (((dispatch[0] | dispatch[1]) & (1 << TAG)) == 0 && plan[TAG] == 0)

#define NEXT_ROUTER ((router_up >> (attempt % R) & 1) -> attempt % R : 1 - attempt % R)

active proctype Attention() {
  do
  /* Dispatch: to the router of this attempt, or the other one if that is lost. */
  :: atomic {
      step < STEPS && !planned && !dispatched && router_up != 0 && dispatch_credit[NEXT_ROUTER] ->
      router = NEXT_ROUTER;
      CHECK(5, early == 0);
      if
      :: router_alive[router] -> dispatch_credit[router] = 0; dispatch[router] = dispatch[router] | 1 << TAG
      :: else -> skip    /* gone, and nobody knows it yet */
      fi;
      dispatched = 1
    }
  /* RoutePlan. */
  :: atomic {
      (plan[0] | plan[1] | plan[2] | plan[3] | plan[4] | plan[5] | plan[6] | plan[7]) != 0 ->
      m = 0;
      for (i : 0 .. T - 1) { m = m | ((plan[i] != 0) << i) }
      pick16(m, t);
      i = plan[t] - 1;
      c0 = i & 3; c1 = i >> 2 & 3;
      dispatch_credit[i >> 4] = 1;
      if
      :: plan[t] = 0
      :: repeats > 0 -> repeats--
      fi;
      if
      :: t == TAG && step < STEPS && !planned ->
        planned = 1; router = 0;
        server[0] = c0; server[1] = c1;
        for (g : 0 .. G - 1) {
          if
          :: server[g] != NONE && (up >> server[g] & 1) -> slot[g] = sent
#ifdef BREAK_UNPLACED
          :: server[g] == NONE -> slot[g] = done; server[g] = 0
#endif
          :: else -> unsent_again(g)
          fi
        }
        for (g : 0 .. G - 1) {
          if
          :: (early >> g & 1) -> count(g, TAG)
          :: else -> skip
          fi
        }
        early = 0
      :: else -> skip
      fi;
      wipe()
    }
  /* Partial. */
  :: atomic {
      partial != 0 ->
      pick16(partial, x);
      take(partial, 1 << x);
      t = x / G; g = x % G;
      if
#ifdef BREAK_STALE
      :: step < STEPS && t / A == step && t != TAG && planned -> count(g, t)
#endif
      :: step < STEPS && t == TAG && !planned -> early = early | 1 << g
      :: step < STEPS && t == TAG && planned -> count(g, t)
      :: else -> skip /* stale */
      fi;
      wipe()
    }
  /* Nack. */
  :: atomic {
      nack != 0 ->
      pick16(nack, x);
      take(nack, 1 << x);
      t = x / G; g = x % G;
      if
      :: step < STEPS && t == TAG && planned && slot[g] == sent -> unsent_again(g)
      :: else -> skip
      fi;
      wipe()
    }
  /* What is missing is sent again, straight to a server, under the same attempt. */
  :: atomic {
      planned && slot[0] == unsent && (HOSTS_IN(table_of_attention, 0) & up & EACH_SERVER(CREDIT_OF_SELF)) != 0 ->
      pick_server(HOSTS_IN(table_of_attention, 0) & up, EACH_SERVER(CREDIT_OF_SELF));
      put_work(SELF, BIT(TAG, 0));
      slot[0] = sent; server[0] = s; wipe()
    }
  :: atomic {
      planned && slot[1] == unsent && (HOSTS_IN(table_of_attention, 1) & up & EACH_SERVER(CREDIT_OF_SELF)) != 0 ->
      pick_server(HOSTS_IN(table_of_attention, 1) & up, EACH_SERVER(CREDIT_OF_SELF));
      put_work(SELF, BIT(TAG, 1));
      slot[1] = sent; server[1] = s; wipe()
    }
  /* Deadlines: of a plan; of results. They pass when the message is lost, or (late) when it is not. */
  :: atomic { step < STEPS && !planned && dispatched && PLAN_LOST -> again() }
  :: atomic { step < STEPS && !planned && dispatched && late > 0 -> late--; again() }
#ifndef BREAK_DEADLINE
  :: atomic { planned && SLOT_LOST(0) -> unsent_again(0) }
  :: atomic { planned && SLOT_LOST(1) -> unsent_again(1) }
#endif
  :: atomic {
      planned && late > 0 && (slot[0] == sent || slot[1] == sent) ->
      late--;
      for (i : 0 .. G - 1) {
        if
        :: slot[i] == sent -> unsent_again(i)
        :: else -> skip
        fi
      }
      wipe()
    }
#ifdef GIVE_UP
  :: atomic {            /* the rows still missing fail, and say so */
      step < STEPS && !(planned && slot[0] == done && slot[1] == done) ->
      failed = 1; planned = 1; slot[0] = done; slot[1] = done; server[0] = 0; server[1] = 0; early = 0; router = 0
    }
#endif
  /* All done: the sum is made, the next exchange begins in the same microbatch. */
  :: atomic {
      planned && slot[0] == done && slot[1] == done ->
      CHECK(3, failed || (counted[0] == 1 && counted[1] == 1));
      step++; attempt = 0; dispatched = 0; planned = 0; early = 0; failed = 0; router = 0;
      slot[0] = unsent; slot[1] = unsent; server[0] = 0; server[1] = 0; counted[0] = 0; counted[1] = 0
    }
  :: step == STEPS && partial == 0 && nack == 0 -> break
  od
}

/* ---- router ---- */

inline send_work(r, grp, choice, credits) {
  pick_server(HOSTS_IN(table_of_router[r], grp) & up_of_router[r], credits);
  choice = s;
  if
  :: s != NONE -> put_work(r, BIT(t, grp))
  :: else -> skip
  fi
}
#define ROUTE(r, credits) \
  atomic { \
    router_alive[r] && dispatch[r] != 0 -> \
    pick16(dispatch[r], t); \
    take(dispatch[r], 1 << t); \
    send_work(r, 0, c0, credits); \
    send_work(r, 1, c1, credits); \
    plan[t] = 1 + c0 + 4 * c1 + 16 * r; \
    wipe() \
  }
active proctype Router0() { end: do :: ROUTE(0, EACH_SERVER(CREDIT_OF_0)) od }
active proctype Router1() { end: do :: ROUTE(1, EACH_SERVER(CREDIT_OF_1)) od }

/* ---- expert server ---- */

proctype Server(byte me) {
end:
  do
  :: atomic {
      alive[me] && IN_FLIGHT_TO(me) ->
      if
      :: work[me] != 0 -> x = me
      :: work[S + me] != 0 -> x = S + me
      :: work[2 * S + me] != 0 -> x = 2 * S + me
      fi;
      m = work[x];
      pick16(m, i);
      take(work[x], 1 << i);
      if
#ifdef BREAK_UNHOSTED
      :: true -> CHECK(4, hosts & AT(me, i % G)); partial = partial | 1 << i
#else
      :: (hosts & AT(me, i % G)) -> partial = partial | 1 << i
#endif
      :: else ->
#ifndef BREAK_NACK
        nack = nack | 1 << i;
#endif
        CHECK(4, nack & 1 << i)
      fi;
#ifndef BREAK_CREDIT
      credit[x] = 1;     /* the launch is over */
#endif
      wipe()
    }
  od
}

/* ---- registry: the move, and what follows a death ---- */

#define NO_HOST(grp) (HOSTS_IN(table, grp) == 0)
#define CHECK_TABLE CHECK(6, deaths > 0 || (!NO_HOST(0) && !NO_HOST(1))); CHECK(6, deaths > 0 || (table & ~hosts) == 0)

active proctype Registry() {
end:
  do
#ifdef BREAK_MOVE
  :: atomic { move == 0 -> move = 3; table = table & ~AT(0, 1); CHECK_TABLE }
#else
  :: atomic { move == 0 && alive[1] -> move = 1; hosts = hosts | AT(1, 1) }
#endif
  :: atomic { move == 1 && alive[1] -> move = 2; table = table | AT(1, 1); CHECK_TABLE }
  :: atomic { move == 2 && alive[1] && (table & AT(1, 1)) -> move = 3; table = table & ~AT(0, 1); CHECK_TABLE }
  :: atomic { move == 3 && !(table & AT(0, 1)) -> move = 4; hosts = hosts & ~AT(0, 1) }
  :: atomic { !alive[0] && (table & 3) -> table = table & ~3 }
  :: atomic { !alive[1] && (table & 12) -> table = table & ~12 }
#if S > 2
  :: atomic { !alive[2] && (table & 48) -> table = table & ~48 }
  :: atomic { NO_HOST(0) && alive[2] -> hosts = hosts | AT(2, 0); table = table | AT(2, 0) }
  :: atomic { NO_HOST(1) && alive[2] -> hosts = hosts | AT(2, 1); table = table | AT(2, 1) }
#endif
  :: atomic { NO_HOST(0) && alive[0] -> hosts = hosts | AT(0, 0); table = table | AT(0, 0) }
  :: atomic { NO_HOST(0) && alive[1] -> hosts = hosts | AT(1, 0); table = table | AT(1, 0) }
  :: atomic { NO_HOST(1) && alive[0] && (deaths > 0) -> hosts = hosts | AT(0, 1); table = table | AT(0, 1) }
  :: atomic { NO_HOST(1) && alive[1] && (deaths > 0) -> hosts = hosts | AT(1, 1); table = table | AT(1, 1) }
  od
}

/* ---- news of the table and of deaths, credit whose time to live is over ---- */

active proctype News() {
end:
  do
#ifndef BREAK_NEWS
  :: atomic { table_of_attention != table -> table_of_attention = table }
#endif
  :: atomic { router_alive[0] && table_of_router[0] != table -> table_of_router[0] = table }
  :: atomic { router_alive[1] && table_of_router[1] != table -> table_of_router[1] = table }
  od
}

#define SERVER_LOST(n) \
  :: atomic { !alive[n] && (up >> n & 1) -> up = up & ~(1 << n); unsend(n); wipe() } \
  :: atomic { !alive[n] && (up_of_router[0] >> n & 1) -> up_of_router[0] = up_of_router[0] & ~(1 << n) } \
  :: atomic { !alive[n] && (up_of_router[1] >> n & 1) -> up_of_router[1] = up_of_router[1] & ~(1 << n) }
#define ROUTER_LOST(n) \
  :: atomic { \
      !router_alive[n] && (router_up >> n & 1) -> \
      router_up = router_up & ~(1 << n); \
      if \
      :: step < STEPS && !planned && dispatched && router == n -> again() \
      :: else -> skip \
      fi \
    }
active proctype Detection() {
end:
  do
  SERVER_LOST(0)
  SERVER_LOST(1)
#if S > 2
  SERVER_LOST(2)
#endif
  ROUTER_LOST(0)
  ROUTER_LOST(1)
  od
}

#define EXPIRE(n) :: atomic { expired[n] -> expired[n] = 0; credit[n] = 1 }
active proctype TimeToLive() {
end:
  do
  EXPIRE(0) EXPIRE(1) EXPIRE(2) EXPIRE(3) EXPIRE(4) EXPIRE(5)
#if S > 2
  EXPIRE(6) EXPIRE(7) EXPIRE(8)
#endif
  :: atomic { dispatch_expired[0] -> dispatch_expired[0] = 0; dispatch_credit[0] = 1 }
  :: atomic { dispatch_expired[1] -> dispatch_expired[1] = 0; dispatch_credit[1] = 1 }
  od
}

/* ---- what goes wrong; it may stop at any time ---- */

#define LOSE_WORK(n) \
  :: atomic { losses > 0 && work[n] != 0 -> losses--; m = work[n]; pick16(m, i); work[n] = work[n] & ~(1 << i); expired[n] = 1; wipe() }
#define LOSE_DISPATCH(n) \
  :: atomic { losses > 0 && dispatch[n] != 0 -> losses--; dispatch[n] = 0; dispatch_expired[n] = 1 }
#define KILL(n) \
  :: atomic { \
      deaths < SERVER_DEATHS && alive[n] -> \
      deaths++; alive[n] = 0; work[n] = 0; work[S + n] = 0; work[2 * S + n] = 0; \
      hosts = hosts & ~(3 << (n * G)); \
      expired[n] = 0; expired[S + n] = 0; expired[2 * S + n] = 0; credit[n] = 1; credit[S + n] = 1; credit[2 * S + n] = 1 \
    }
#define KILL_ROUTER(n) \
  :: atomic { router_deaths < ROUTER_DEATHS && router_alive[n] -> router_deaths++; router_alive[n] = 0; dispatch[n] = 0; table_of_router[n] = 0; up_of_router[n] = 0; dispatch_expired[n] = 0; dispatch_credit[n] = 1 }

active proctype Trouble() {
end:
  do
#if LOSSES > 0
  LOSE_WORK(0) LOSE_WORK(1) LOSE_WORK(2) LOSE_WORK(3) LOSE_WORK(4) LOSE_WORK(5)
#if S > 2
  LOSE_WORK(6) LOSE_WORK(7) LOSE_WORK(8)
#endif
  LOSE_DISPATCH(0)
  LOSE_DISPATCH(1)
  :: atomic { losses > 0 && partial != 0 -> losses--; pick16(partial, i); partial = partial & ~(1 << i); wipe() }
  :: atomic { losses > 0 && nack != 0 -> losses--; pick16(nack, i); nack = nack & ~(1 << i); wipe() }
  :: atomic {
      losses > 0 && step < STEPS && plan[TAG] != 0 ->
      losses--; dispatch_expired[(plan[TAG] - 1) >> 4] = 1; plan[TAG] = 0
    }
#endif
#if SERVER_DEATHS > 0
  KILL(0)
  KILL(1)
#if S > 2
  KILL(2)
#endif
#endif
#if ROUTER_DEATHS > 0
  KILL_ROUTER(0)
  KILL_ROUTER(1)
#endif
#ifdef FAIR
  :: break               /* a fair run need not have trouble */
#endif
  :: false
  od
}

init {
  atomic {
    for (i : 0 .. (R + 1) * S - 1) { credit[i] = 1 }
    for (i : 0 .. S - 1) { alive[i] = 1; up = up | 1 << i }
    for (i : 0 .. R - 1) { dispatch_credit[i] = 1; router_alive[i] = 1; router_up = router_up | 1 << i; up_of_router[i] = up }
    hosts = AT(0, 0) | AT(0, 1) | AT(1, 0);
    table = hosts; table_of_attention = hosts; table_of_router[0] = hosts; table_of_router[1] = hosts;
    for (i : 0 .. S - 1) { run Server(i) }
    wipe()
  }
}
