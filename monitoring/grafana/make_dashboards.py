#!/usr/bin/env python3
"""Writes dashboards/*.json. What a panel shows stands here once, as a query; the JSON around it is Grafana's. After a
change: run this, commit both. A test holds them together, checks the JSON against Grafana's schema package, and runs
every query against a loaded cluster (tests/monitoring)."""
import json, os, sys

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
C = 'cluster=~"$cluster"'


def rate(metric, by="", more=""):
    selector = "%s{%s%s}" % (metric, C, more)
    return "sum%s (rate(%s[$__rate_interval]))" % (" by (%s)" % by if by else "", selector)


def quantile(q, metric, by="", more=""):
    return "histogram_quantile(%s, %s)" % (q, rate(metric + "_bucket", "le, " + by if by else "le", more))


def mean(metric, by="", more=""):
    on = " / on (%s) " % by if by else " / "
    return rate(metric + "_sum", by, more) + on + rate(metric + "_count", by, more)


def quantiles(metric):
    return [(quantile(q, metric), "p%g" % (100 * q)) for q in (0.5, 0.9, 0.99)] + [(mean(metric), "mean")]


def target(expr, legend, ref, instant=False, kind="time_series"):
    return {"refId": ref, "datasource": DATASOURCE, "expr": expr, "legendFormat": legend, "editorMode": "code",
            "instant": instant, "range": not instant, "format": kind}


def panel(kind, title, queries, description, unit, options, custom=None, width=8, height=8, instant=False, format_="time_series",
          **defaults):
    return {
        "type": kind, "title": title, "description": description, "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height, "x": 0, "y": 0},
        "targets": [target(expr, legend, "ABCDEFGHIJ"[i], instant, format_) for i, (expr, legend) in enumerate(queries)],
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom or {}, **defaults}, "overrides": []},
        "options": options,
    }


def lines(title, queries, description="", unit="short", stack=False, **more):
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if stack else 8, "showPoints": "never", "spanNulls": False,
              "stacking": {"mode": "normal" if stack else "none", "group": "A"}}
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
               "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, queries, description, unit, options, custom, min=0, **more)


def stat(title, query, description="", unit="short", steps=(), **more):
    options = {"colorMode": "value", "graphMode": "area", "justifyMode": "auto", "textMode": "auto", "wideLayout": True,
               "orientation": "auto", "percentChangeColorMode": "standard", "showPercentChange": False,
               "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    thresholds = {"mode": "absolute", "steps": [{"color": "green", "value": None}] + [{"color": c, "value": v} for c, v in steps]}
    return panel("stat", title, [(query, "")], description, unit, options, width=4, height=4, thresholds=thresholds, **more)


def bars(title, query, legend, description="", unit="short", steps=(), **more):
    """The present value of every series, one bar each."""
    options = {"displayMode": "gradient", "orientation": "horizontal", "showUnfilled": True, "valueMode": "color",
               "namePlacement": "auto", "sizing": "auto", "minVizHeight": 8, "minVizWidth": 8, "maxVizHeight": 24,
               "legend": {"displayMode": "hidden", "placement": "bottom", "showLegend": False, "calcs": []},
               "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    thresholds = {"mode": "absolute", "steps": [{"color": "green", "value": None}] + [{"color": c, "value": v} for c, v in steps]}
    return panel("bargauge", title, [(query, legend)], description, unit, options, instant=True, min=0, thresholds=thresholds, **more)


def matrix(title, query, rows, columns, description="", unit="short", **more):
    """A heat map of the present: one coloured cell per (row, column)."""
    options = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0,
               "footer": {"show": False, "reducer": ["sum"], "countRows": False}}
    custom = {"align": "center", "cellOptions": {"type": "color-background", "mode": "basic"}, "inspect": False}
    out = panel("table", title, [(query, "")], description, unit, options, custom, instant=True, format_="table",
                color={"mode": "continuous-BlYlRd"}, decimals=0, **more)
    out["transformations"] = [
        {"id": "groupingToMatrix", "options": {"columnField": columns, "rowField": rows, "valueField": "Value"}},
        {"id": "convertFieldType", "options": {"conversions": [{"targetField": "%s\\%s" % (rows, columns), "destinationType": "number"}]}},
        {"id": "sortBy", "options": {"sort": [{"field": "%s\\%s" % (rows, columns), "desc": False}]}}]
    # The first column names the row: no colour, no unit.
    out["fieldConfig"]["overrides"] = [{"matcher": {"id": "byName", "options": "%s\\%s" % (rows, columns)},
                                        "properties": [{"id": "custom.cellOptions", "value": {"type": "auto"}},
                                                       {"id": "unit", "value": "none"}, {"id": "custom.width", "value": 90}]}]
    return out


def distribution(title, query, description="", unit="short", **more):
    """How a histogram's buckets fill over time."""
    options = {"calculate": False, "cellGap": 1, "color": {"exponent": 0.5, "fill": "dark-orange", "mode": "scheme", "reverse": False,
                                                         "scale": "exponential", "scheme": "Oranges", "steps": 64},
               "exemplars": {"color": "rgba(255,0,255,0.7)"}, "filterValues": {"le": 1e-9}, "legend": {"show": True},
               "rowsFrame": {"layout": "auto"}, "showValue": "never",
               "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": False},
               "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit}}
    out = panel("heatmap", title, [(query, "{{le}}")], description, unit, options, format_="heatmap", **more)
    return out


def row(title, *panels):
    return [{"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1, "x": 0, "y": 0}}, *panels]


def lay_out(panels):
    x = y = height = 0
    for i, p in enumerate(panels):
        w, h = p["gridPos"]["w"], p["gridPos"]["h"]
        if x + w > 24:
            x, y, height = 0, y + height, 0
        p["gridPos"].update(x=x, y=y)
        p["id"] = i + 1
        x, height = x + w, max(height, h)
    return panels


def variables():
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0,
         "includeAll": False, "multi": False, "regex": "", "options": []},
        {"name": "cluster", "label": "Cluster", "type": "query", "datasource": DATASOURCE, "refresh": 2, "hide": 0, "sort": 1,
         "query": {"query": "label_values(minke:build_info, cluster)", "refId": "clusters"},
         "includeAll": True, "allValue": ".*", "multi": True, "regex": "",
         "current": {"text": "All", "value": "$__all"}, "options": []}]


def dashboard(uid, title, description, *rows):
    return {
        "uid": uid, "title": title, "description": description, "tags": ["minke"], "schemaVersion": 39, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "links": [{"type": "dashboards", "title": "Minke", "tags": ["minke"], "asDropdown": True, "icon": "external link",
                   "includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": ""}],
        "annotations": {"list": []}, "templating": {"list": variables()}, "panels": lay_out([p for r in rows for p in r]),
    }


SERVING = dashboard(
    "minke-serving", "Minke: Serving", "What clients see, with the panels that operators of vLLM know.",
    row("Now",
        stat("Requests per second", rate("minke:http_responses_total", more=', endpoint="generate"'), "Answers to requests for text", "reqps"),
        stat("Sequences running", "sum (minke:num_requests_running{%s})" % C),
        stat("Sequences waiting", "sum (minke:num_requests_waiting{%s})" % C, steps=[("orange", 1), ("red", 50)]),
        stat("First token, p95", quantile(0.95, "minke:time_to_first_token_seconds"), "Objective: 2.5 s", "s", steps=[("orange", 1), ("red", 2.5)]),
        stat("Per token, p95", quantile(0.95, "minke:request_time_per_output_token_seconds"), "Objective: 100 ms", "s", steps=[("orange", 0.05), ("red", 0.1)]),
        stat("Failed requests, 5 min", "max (cluster:minke_request_errors:ratio_rate5m{%s})" % C, "Objective: 0.1 %", "percentunit", steps=[("red", 0.001)])),
    row("Latency",
        lines("End-to-end request latency", quantiles("minke:e2e_request_latency_seconds"), "From admission to the end of a sequence", "s"),
        lines("Time to first token", quantiles("minke:time_to_first_token_seconds"), "From admission to the first token", "s"),
        lines("Inter-token latency", quantiles("minke:inter_token_latency_seconds"), "Between two tokens of a sequence", "s"),
        lines("Where a request's time goes, mean",
              [(mean("minke:request_queue_time_seconds"), "queue"), (mean("minke:request_prefill_time_seconds"), "prefill"),
               (mean("minke:request_decode_time_seconds"), "decode")], "Means of the sequences that have ended", "s", stack=True),
        lines("Queue time", quantiles("minke:request_queue_time_seconds"), "In an attention node's admission queue", "s"),
        lines("Time per output token, by request", quantiles("minke:request_time_per_output_token_seconds"), "Mean of each sequence", "s")),
    row("Throughput",
        lines("Token throughput", [(rate("minke:prompt_tokens_total"), "prompt"), (rate("minke:generation_tokens_total"), "generated")], "", "tokens/s"),
        lines("Scheduler state", [("sum (minke:num_requests_running{%s})" % C, "running"), ("sum (minke:num_requests_waiting{%s})" % C, "waiting"),
                                  (rate("minke:num_preemptions_total"), "preemptions per second")], "Of all attention nodes"),
        lines("Cache utilisation", [("minke:kv_cache_usage_perc{%s}" % C, "{{member}}")], "Part of the latent cache's pages in use", "percentunit", max=1),
        distribution("Prompt length", rate("minke:request_prompt_tokens_bucket", "le"), "Tokens"),
        distribution("Generation length", rate("minke:request_generation_tokens_bucket", "le"), "Tokens"),
        lines("Prefix cache hit rate", [(rate("minke:prefix_cache_hits_total") + " / " + rate("minke:prefix_cache_queries_total"), "hits")],
              "Prompt tokens whose latents were there already", "percentunit", max=1)),
    row("Outcomes",
        lines("Finish reason", [(rate("minke:request_success_total", "finished_reason"), "{{finished_reason}}")], "Sequences per second", "reqps", stack=True),
        lines("Answers by status", [(rate("minke:http_responses_total", "code", ', endpoint="generate"'), "{{code}}")], "HTTP, requests for text", "reqps", stack=True),
        lines("Requests refused, abandoned, failed in their stream",
              [(rate("minke:requests_refused_total"), "refused: gateway full"), (rate("minke:requests_abandoned_total"), "client left"),
               (rate("minke:stream_errors_total"), "error in the stream")], "", "reqps")))

BALANCE = dashboard(
    "minke-balance", "Minke: Expert balance", "How evenly rows fall on experts, groups and servers, and what the placement does about it.",
    row("Now",
        stat("Expert balance", 'avg (minke:balance_factor{%s, kind="expert"})' % C, "B_exp, mean over layers; 1 when even", "none", steps=[("orange", 1.5), ("red", 3)], decimals=2),
        stat("Device balance", 'avg (minke:balance_factor{%s, kind="device"})' % C, "B_dev over the servers of each layer; 1 when even", "none", steps=[("orange", 1.2), ("red", 1.5)], decimals=2),
        stat("Communication balance", 'avg (minke:balance_factor{%s, kind="communication"})' % C, "B_comm; fan-out over its limit when even", "none", decimals=2),
        stat("Fan-out, mean", mean("minke:fan_out_servers"), "Expert servers that a row is sent to, per layer", "none", decimals=2),
        stat("Fan-out violations", "sum (minke:fan_out_violations_total{%s})" % C, "Rows sent to more servers than the model allows, ever", steps=[("red", 1)]),
        stat("Placement epoch", "max (minke:placement_epoch{%s})" % C, "Changes of the placement in this term")),
    row("Heat maps",
        matrix("Layer × server, rows per second", "sum by (layer, address) (layer_server:minke_expert_rows:rate1m{%s})" % C, "layer", "address",
               "(row, group) sums computed by each expert server", width=12, height=16),
        matrix("Layer × group, rows per second", "sum by (layer, group) (layer_group:minke_rows:rate1m{%s})" % C, "layer", "group",
               "Rows routed to an expert of the group", width=12, height=16)),
    row("Balance",
        bars("Busiest server over the mean, by layer", "max by (layer) (minke:device_load_max{%s})" % C, "layer {{layer}}",
             "How much longer the expert stage of a layer takes than with even servers", "none", steps=[("orange", 1.2), ("red", 1.5)], height=12, decimals=2),
        bars("Busiest expert over the mean, by layer", "max by (layer) (minke:expert_load_max{%s})" % C, "layer {{layer}}",
             "Hot experts, which the balance factor averages out", "none", steps=[("orange", 4), ("red", 8)], height=12, decimals=2),
        lines("Balance factors", [("avg by (kind) (minke:balance_factor{%s})" % C, "{{kind}}"), ("max by (kind) (minke:balance_factor{%s})" % C, "{{kind}}, worst layer")],
              "The paper's balance losses without their factors, over the last half minute", "none", height=12),
        lines("Over-budget fraction", [("avg (minke:over_budget_fraction{%s})" % C, "mean"), ("max (minke:over_budget_fraction{%s})" % C, "worst layer")],
              "Part of the (row, expert) pairs above a server's even share: what training would drop at capacity 1.0", "percentunit"),
        distribution("Fan-out", rate("minke:fan_out_servers_bucket", "le"), "Servers a row is sent to, all layers", "none"),
        lines("Fan-out by layer", [(mean("minke:fan_out_servers", "layer"), "layer {{layer}}"), ("max (minke:fan_out_limit{%s})" % C, "limit")], "", "none")),
    row("Experts and replicas",
        bars("Hottest experts", "topk(12, %s)" % rate("minke:expert_selections_total", "layer, expert"), "layer {{layer}}, expert {{expert}}", "Rows per second", "rowsps"),
        lines("Replicas", [("sum (max by (cluster, layer, group) (minke:replicas{%s}))" % C, "replicas"),
                           ("count (max by (cluster, layer, group) (minke:replicas{%s}))" % C, "units")], "Of all (layer, group) units"),
        lines("Moves", [("sum by (kind) (max by (cluster, kind) (rate(minke:replica_moves_total{%s}[$__rate_interval])))" % C, "{{kind}}")],
              "Replicas published and withdrawn per second"),
        lines("Rows by expert server", [("sum by (address) (layer_server:minke_expert_rows:rate1m{%s})" % C, "{{address}}")], "(row, group) sums per second, all layers"),
        lines("Rows sent by server, each once", [(rate("minke:server_rows_total", "server"), "{{server}}")], "As routers count them", "rowsps"),
        lines("Hottest group over the mean", [("max (layer_group:minke_rows:over_mean_rate5m{%s})" % C, "of all layers")], "Alert above 2", "none")))

DATA_PLANE = dashboard(
    "minke-data-plane", "Minke: Data plane", "Rows and partial sums on their way between attention nodes, routers and expert servers.",
    row("Latency",
        lines("Dispatch: rows out, plan back", [(quantile(0.5, "minke:dispatch_seconds", "server"), "p50 {{server}}"), (quantile(0.99, "minke:dispatch_seconds", "server"), "p99 {{server}}")],
              "By router", "s"),
        lines("Combine: rows out, sums back", [(quantile(0.5, "minke:combine_seconds", "server"), "p50 {{server}}"), (quantile(0.99, "minke:combine_seconds", "server"), "p99 {{server}}")],
              "By expert server", "s"),
        lines("Bubbles", [("pool:minke_bubble:ratio_rate1m{%s}" % C, "{{pool}}")],
              "Part of the time in which engines had nothing to do but wait: attention for experts, experts for rows", "percentunit", max=1)),
    row("Traffic",
        lines("Bytes sent", [(rate("minke:ucx_bytes_total", "job, transport", ', direction="sent"'), "{{job}} {{transport}}")], "Frames, headers included", "Bps", stack=True),
        lines("Frames sent", [(rate("minke:ucx_frames_total", "job, transport", ', direction="sent"'), "{{job}} {{transport}}")], "", "pps", stack=True),
        lines("Bytes by peer of attention nodes", [(rate("minke:ucx_bytes_total", "peer, direction", ', job="minke-attention"'), "{{direction}} {{peer}}")], "", "Bps"),
        lines("Rows dispatched", [(rate("minke:dispatched_rows_total", "member"), "{{member}}")], "In all layers", "rowsps"),
        lines("Rows per dispatch", [(rate("minke:router_rows_total", "member") + " / on (member) " + rate("minke:router_dispatches_total", "member"), "{{member}}")],
              "How well a step fills its messages", "none")),
    row("What went wrong",
        lines("Connections that broke", [(rate("minke:ucx_errors_total", "member"), "{{member}}")], "Per second", "none"),
        lines("Rows sent again", [(rate("minke:redispatched_rows_total"), "sent again"), (rate("minke:hedged_rows_total"), "asked of a second replica"),
                                  (rate("minke:plan_retries_total"), "messages to another router")], "Per second", "none"),
        lines("Failovers", [(rate("minke:failovers_total", "kind"), "{{kind}} lost"), (rate("minke:resubmissions_total"), "sequences: attention node lost"),
                            (rate("minke:migrations_total"), "sequences: attention node drained")], "Per second", "none"),
        lines("Late and repeated answers", [(rate("minke:stale_frames_total"), "stale messages"), (rate("minke:duplicate_rows_total"), "answers there already")], "Per second", "none"),
        lines("Rows nobody could take", [(rate("minke:router_unplaced_rows_total"), "no server or no credit"), (rate("minke:expert_nacked_rows_total"), "not hosted there")], "Per second", "none"),
        lines("Malformed messages", [(rate("minke:ucx_bad_frames_total"), "transport"), (rate("minke:router_bad_frames_total"), "router"),
                                     (rate("minke:attention_bad_frames_total"), "attention"), (rate("minke:expert_bad_frames_total"), "experts")], "Per second", "none")))

CAPACITY = dashboard(
    "minke-capacity", "Minke: Capacity and scaling", "How full the two pools are, and what scaling does.",
    row("Pools",
        lines("Members", [("max by (role) (sum by (instance, role) (minke:members{%s, state=\"ready\"}))" % C, "{{role}}")], "Ready, as routers see them", "none"),
        lines("Members that start or drain", [("sum by (role, state) (max by (cluster, role, state) (minke:members{%s, state!=\"ready\"}))" % C, "{{role}} {{state}}")], "", "none"),
        lines("Busy", [("pool:minke_busy:ratio_rate1m{%s}" % C, "{{pool}}")], "Part of the engine threads' time in which they compute. Alert above 0.85 for experts", "percentunit", max=1)),
    row("Attention nodes",
        lines("Step time", [(quantile(0.5, "minke:step_seconds", "kind"), "p50 {{kind}}"), (quantile(0.99, "minke:step_seconds", "kind"), "p99 {{kind}}")], "By what a step computes", "s"),
        lines("Step time by phase", [(rate("minke:step_phase_seconds_total", "phase"), "{{phase}}")], "Seconds per second, all nodes", "percentunit", stack=True),
        distribution("Rows per step", rate("minke:step_rows_bucket", "le"), "", "none"),
        lines("Latent cache", [("sum by (state) (minke:latent_cache_bytes{%s})" % C, "{{state}}")], "kept: for requests that begin the same", "bytes", stack=True),
        lines("Latent cache pages in use", [('minke:latent_cache_pages{%s, state="used"}' % C, "{{member}}")], "Of 64 tokens"),
        lines("Pages between nodes", [(rate("minke:latent_pages_moved_total", "direction"), "{{direction}}")], "Sequences that move take their pages along", "none")),
    row("Expert servers",
        lines("Launch time", [(quantile(0.5, "minke:expert_launch_seconds", "class"), "p50 {{class}}"), (quantile(0.99, "minke:expert_launch_seconds", "class"), "p99 {{class}}")], "One grouped launch", "s"),
        lines("Rows per launch", [(mean("minke:expert_launch_rows", "class"), "{{class}}")], "The more, the better weights are used", "none"),
        lines("Rows waiting", [("minke:expert_queued_rows{%s}" % C, "{{member}}")], "In an expert server's queues", "none"),
        lines("Units", [("sum by (state) (minke:expert_units{%s})" % C, "{{state}}")], "(layer, group) units on expert servers", "none", stack=True),
        lines("Weights", [("minke:expert_weight_bytes{%s}" % C, "{{member}}")], "Packed, of the units hosted", "bytes"),
        lines("Loading a unit, mean", [("sum by (source) (minke:unit_load_seconds_sum{%s}) / sum by (source) (minke:unit_load_seconds_count{%s})" % (C, C), "from {{source}}")],
              "Since the servers' starts", "s"),
        lines("Weights between servers", [(rate("minke:unit_exchange_bytes_total", "direction"), "{{direction}}")], "Packed units that servers take from each other", "Bps")),
    row("Gateways and hosts",
        lines("Gateway fill", [("minke:gateway_sequences{%s} / minke:gateway_sequences_max{%s}" % (C, C), "{{member}}")], "Sequences held, of those it may hold; beyond: 429", "percentunit"),
        lines("HTTP connections", [("minke:gateway_connections{%s}" % C, "{{member}}")], "", "none"),
        lines("CPU", [(rate("process_cpu_seconds_total", "member", ', job=~"minke-.*"'), "{{member}}")], "Cores", "none", stack=True),
        lines("Memory", [('process_resident_memory_bytes{%s, job=~"minke-.*"}' % C, "{{member}}")], "Resident", "bytes", stack=True),
        lines("Tokens per CPU second", [(rate("minke:generation_tokens_total") + " / " + rate("process_cpu_seconds_total", more=', job=~"minke-.*"'), "generated")],
              "What a token costs, on CPUs", "none"),
        lines("Uptime", [('time() - process_start_time_seconds{%s, job=~"minke-.*"}' % C, "{{member}}")], "", "s")))

DASHBOARDS = {"serving": SERVING, "expert_balance": BALANCE, "data_plane": DATA_PLANE, "capacity": CAPACITY}


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "dashboards")
    for name, content in DASHBOARDS.items():
        with open(os.path.join(folder, name + ".json"), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
            f.write("\n")


if __name__ == "__main__":
    main()
