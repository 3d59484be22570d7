#include "cli/bench/transport_report.h"

#include "absl/strings/str_format.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli::bench {
namespace {

using Json = nlohmann::ordered_json;

std::string ShowSize(uint32_t bytes) {
  return bytes % 1024 == 0 ? StrCat(bytes / 1024, " KiB") : StrCat(bytes, " B");
}

std::string ShowGiga(double bytes_per_s) {
  return absl::StrFormat(bytes_per_s < 1e10 ? "%.2f" : "%.1f", bytes_per_s / 1e9);
}

Json ToJson(const TransportRow& row) {
  Json json = {
      {"transport", row.name},
      {"lanes", row.lanes},
      {"payload_bytes", row.bytes},
      {"round_trip_us",
       {{"count", row.round_trip.count}, {"p50", row.round_trip.p50_us}, {"p99", row.round_trip.p99_us}}},
      {"dispatch_bytes_per_s", row.dispatch_bytes_per_s},
      {"partial_bytes_per_s", row.partial_bytes_per_s},
      {"ucx_perftest", nullptr}};
  if (row.raw) {
    json["ucx_perftest"] = {
        {"round_trip_us", {{"p50", row.raw->round_trip.p50_us}, {"p99", row.raw->round_trip.p99_us}}},
        {"bytes_per_s", row.raw->bytes_per_s}};
  }
  if (!row.raw_error.empty()) json["ucx_perftest_error"] = row.raw_error;
  return json;
}

}  // namespace

std::string TransportTableHead(const TransportReport& report) {
  std::string head =
      StrCat("minke bench transport ", report.version, " · --transport ", report.transport, " on ",
             report.interface, " · ", report.poll, " polling · ", report.min_time_s, " s each\n");
  if (!report.raw_missing.empty()) StrAppend(&head, "nothing to compare with: ", report.raw_missing, "\n");
  absl::StrAppendFormat(&head, "\n%-22s  %20s  %18s  %30s\n", "", "round trip [us]", "one way [GB/s]",
                        "ucx_perftest [us], [GB/s]");
  absl::StrAppendFormat(&head, "%-14s%8s  %10s%10s  %9s%9s  %10s%10s%10s\n", "transport", "payload", "p50",
                        "p99", "Dispatch", "Partial", "p50", "p99", "one way");
  return head;
}

std::string FormatTransportRow(const TransportRow& row) {
  const std::string name = row.lanes == row.name ? row.name : StrCat(row.name, " ", row.lanes);
  std::string line = absl::StrFormat("%-14s%8s  %10.2f%10.2f  %9s%9s", name, ShowSize(row.bytes),
                                     row.round_trip.p50_us, row.round_trip.p99_us,
                                     ShowGiga(row.dispatch_bytes_per_s), ShowGiga(row.partial_bytes_per_s));
  if (row.raw) {
    absl::StrAppendFormat(&line, "  %10.2f%10.2f%10s", row.raw->round_trip.p50_us, row.raw->round_trip.p99_us,
                          ShowGiga(row.raw->bytes_per_s));
  }
  if (!row.raw_error.empty()) StrAppend(&line, "  ", row.raw_error);
  return line + "\n";
}

std::string FormatTransportJson(const TransportReport& report) {
  Json rows = Json::array();
  for (const TransportRow& row : report.rows) rows.push_back(ToJson(row));
  const Json json = {
      {"tool", "minke bench transport"},
      {"schema", 1},
      {"version", report.version},
      {"flags",
       {{"transport", report.transport},
        {"interface", report.interface},
        {"poll", report.poll},
        {"min_time", report.min_time_s}}},
      {"no_ucx_perftest", report.raw_missing.empty() ? Json(nullptr) : Json(report.raw_missing)},
      {"results", rows}};
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace minke::cli::bench
