// A dashboard's JSON by the types that Grafana publishes: the dashboard, and for each kind of panel that is used its own
// options and field options. dashboards_test.py writes each dashboard, and each panel by its kind, as constants of these types
// and lets tsc judge: of a constant it also finds fields that the type does not have.
import type { Dashboard, DataQuery, DataSourceRef, FieldConfig, FieldConfigSource, GridPos, Panel, RowPanel } from "@grafana/schema";
import type * as barGauge from "@grafana/schema/dist/types/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen.d.ts";
import type * as heatmap from "@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts";
import type * as stat from "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type * as table from "@grafana/schema/dist/types/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen.d.ts";
import type * as timeSeries from "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

// T as JSON has it: an enum is one of its values.
type Json<T> = unknown extends T
  ? unknown
  : T extends string
    ? `${T}`
    : T extends number
      ? `${T}` extends `${infer N extends number}`
        ? N
        : never
      : T extends boolean | null | undefined
        ? T
        : T extends readonly (infer U)[]
          ? Json<U>[]
          : { [K in keyof T]: Json<T[K]> };

// The package has no type of Prometheus queries: what Grafana's data source reads.
type PrometheusQuery = Pick<Json<DataQuery>, "refId" | "hide"> & {
  datasource: Json<DataSourceRef>;
  expr: string;
  legendFormat: string;
  editorMode: "code" | "builder";
  instant: boolean;
  range: boolean;
  format: "time_series" | "table" | "heatmap";
};

type PanelOf<Kind extends string, Options, Custom> = Omit<Json<Panel>, "type" | "options" | "fieldConfig" | "targets" | "id" | "gridPos"> & {
  type: Kind;
  id: number;
  gridPos: Json<GridPos>;
  options: Json<Options>;
  fieldConfig: Pick<Json<FieldConfigSource>, "overrides"> & {
    defaults: Omit<Json<FieldConfig>, "custom"> & { custom: Json<Custom> };
  };
  targets: [PrometheusQuery, ...PrometheusQuery[]];
};

type None = Record<string, never>;

// By panel.type.
export interface Panels {
  row: Omit<Json<RowPanel>, "panels"> & { panels: [] };
  timeseries: PanelOf<"timeseries", timeSeries.Options, Partial<timeSeries.FieldConfig>>;
  stat: PanelOf<"stat", stat.Options, None>;
  bargauge: PanelOf<"bargauge", barGauge.Options, None>;
  table: PanelOf<"table", table.Options, Partial<table.FieldConfig>>;
  heatmap: PanelOf<"heatmap", heatmap.Options, Partial<heatmap.FieldConfig>>;
}

export type DashboardJson = Omit<Json<Dashboard>, "panels" | "uid" | "title"> & {
  uid: string;
  title: string;
  panels: Panels[keyof Panels][];
};
