#include "libs/node/transport_metrics.h"

namespace minke::node {

void CollectTransport(const transport::Transport& transport, telemetry::Page& page) {
  constexpr char kBytes[] = "minke:ucx_bytes_total", kBytesHelp[] = "Bytes of frames, headers included";
  constexpr char kFrames[] = "minke:ucx_frames_total", kFramesHelp[] = "Frames";
  constexpr char kRows[] = "minke:ucx_row_frames_total",
                 kRowsHelp[] = "Received frames with row data, by where these came to lie";
  constexpr char kErrors[] = "minke:ucx_errors_total", kErrorsHelp[] = "Connections that failed or broke";
  for (const auto& [name, help] : {std::pair{kBytes, kBytesHelp}, std::pair{kFrames, kFramesHelp},
                                   std::pair{kRows, kRowsHelp}, std::pair{kErrors, kErrorsHelp}})
    page.Declare(name, help, telemetry::MetricType::kCounter);
  for (const transport::PeerStatistics& peer : transport.all_statistics()) {
    const std::string id = ToString(peer.peer);
    page.Counter(kErrors, kErrorsHelp, static_cast<double>(peer.errors), {{"peer", id}});
    if (peer.transport.empty()) continue;  // was never up
    const auto count = [&](const char* name, const char* help, const char* direction, uint64_t value) {
      page.Counter(name, help, static_cast<double>(value),
                   {{"peer", id}, {"direction", direction}, {"transport", peer.transport}});
    };
    count(kBytes, kBytesHelp, "sent", peer.sent_bytes);
    count(kBytes, kBytesHelp, "received", peer.received_bytes);
    count(kFrames, kFramesHelp, "sent", peer.sent_frames);
    count(kFrames, kFramesHelp, "received", peer.received_frames);
    const auto count_rows = [&](const char* memory, uint64_t value) {
      page.Counter(kRows, kRowsHelp, static_cast<double>(value), {{"peer", id}, {"memory", memory}});
    };
    count_rows("gpu", peer.frames_in_row_memory);
    count_rows("host", peer.frames_in_host_memory);
  }
  page.Counter("minke:ucx_bad_frames_total", "Malformed frames", static_cast<double>(transport.bad_frames()));
}

}  // namespace minke::node
