#include "libs/transport/ucx/ucx.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <ucs/config/global_opts.h>
#include <uct/api/uct.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "libs/transport/driver.h"
#include "libs/transport/peer_transport.h"
#include "libs/transport/ucx/addresses.h"
#include "libs/transport/ucx/ucx_settings.h"
#include "libs/wire/messages.h"

namespace minke::transport {
namespace internal {
namespace {

constexpr unsigned kMessageId = 1;      // the only active message; kinds are ours
constexpr int kProgressRoundsMax = 64;  // per Progress(), so that a flood cannot keep the engine in here
constexpr size_t kConnectionRequestsMax = 1024;
constexpr absl::Duration kInterfaceTimeout = absl::Seconds(10);
constexpr int64_t kDeviceCheckNs =
    1'000'000'000;                           // how often a GPU with row memory is asked whether it lives
constexpr int64_t kReceiveNs = 200'000'000;  // how long closing waits for receives under way
constexpr int64_t kCloseNs = 1'000'000'000;  // how long the destructor waits for UCX to let go of endpoints

int64_t NowNs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

struct ContextDestroyer {
  void operator()(ucp_context_h context) const noexcept { ucp_cleanup(context); }
};
struct WorkerDestroyer {
  void operator()(ucp_worker_h worker) const noexcept { ucp_worker_destroy(worker); }
};
struct ListenerDestroyer {
  void operator()(ucp_listener_h listener) const noexcept { ucp_listener_destroy(listener); }
};
struct MemoryUnmapper {
  ucp_context_h context = nullptr;
  void operator()(ucp_mem_h memory) const noexcept { ucp_mem_unmap(context, memory); }
};
using Context = std::unique_ptr<std::remove_pointer_t<ucp_context_h>, ContextDestroyer>;
using Worker = std::unique_ptr<std::remove_pointer_t<ucp_worker_h>, WorkerDestroyer>;
using MappedMemory = std::unique_ptr<std::remove_pointer_t<ucp_mem_h>, MemoryUnmapper>;
using Listener = std::unique_ptr<std::remove_pointer_t<ucp_listener_h>, ListenerDestroyer>;

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

absl::Status UcxError(std::string_view where, ucs_status_t status) {
  return absl::UnavailableError(StrCat(where, ": ", std::string_view(ucs_status_string(status))));
}

// Whether this UCX has a component of that name, and hardware for it.
bool ComponentPresent(std::string_view name) {
  uct_component_h* components = nullptr;
  unsigned count = 0;
  if (uct_query_components(&components, &count) != UCS_OK) return false;
  bool present = false;
  for (unsigned i = 0; i < count; ++i) {
    uct_component_attr_t attributes{};
    attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_NAME | UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
    if (uct_component_query(components[i], &attributes) != UCS_OK) continue;
    present |= std::string_view(attributes.name) == name && attributes.md_resource_count > 0;
  }
  uct_release_component_list(components);
  return present;
}

absl::StatusOr<std::vector<UcxSetting>> ChooseSettings(const UcxOptions& options,
                                                       const Interface& interface) {
  const UcxSelection selection = options.selection;
  const bool rdma_present = ComponentPresent("ib");
  if (selection == UcxSelection::kRdma && !rdma_present) {
    return absl::FailedPreconditionError("transport rdma: UCX sees no RDMA device on this host");
  }
  const RowMemory* const rows = options.transport.rows;
  return SettingsFor(selection, interface.name, interface.loopback, rdma_present,
                     rows != nullptr && rows->on_gpu() && UcxKnowsCuda());
}

absl::StatusOr<Context> CreateContext(const std::vector<UcxSetting>& settings) {
  // Users may well have UCX variables for other versions in their environment.
  if (std::getenv("UCX_WARN_UNUSED_ENV_VARS") == nullptr)
    ucs_global_opts_set_value("WARN_UNUSED_ENV_VARS", "n");
  ucp_config_t* config = nullptr;
  if (ucs_status_t status = ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) {
    return UcxError("ucp_config_read", status);
  }
  const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> config_owner(config,
                                                                                  &ucp_config_release);
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  const bool old_names = major == 1 && minor <= 13;
  for (const UcxSetting& setting : settings) {
    if (std::getenv(StrCat("UCX_", setting.name).c_str()) != nullptr) continue;  // the user's own wins
    const std::string& name = old_names && !setting.name_1_13.empty() ? setting.name_1_13 : setting.name;
    if (ucs_status_t status = ucp_config_modify(config, name.c_str(), setting.value.c_str());
        status != UCS_OK) {
      return UcxError(StrCat("UCX_", setting.name, "=", setting.value), status);
    }
  }
  ucp_params_t parameters{};
  parameters.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
  parameters.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  parameters.mt_workers_shared = 0;  // one worker per context
  ucp_context_h context = nullptr;
  if (ucs_status_t status = ucp_init(&parameters, config, &context); status != UCS_OK) {
    return UcxError("ucp_init", status);
  }
  return Context(context);
}

absl::StatusOr<Worker> CreateWorker(ucp_context_h context) {
  ucp_worker_params_t parameters{};
  parameters.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  parameters.thread_mode =
      UCS_THREAD_MODE_SERIALIZED;  // engine and keepalive thread, under PeerTransport's mutex
  ucp_worker_h worker = nullptr;
  if (ucs_status_t status = ucp_worker_create(context, &parameters, &worker); status != UCS_OK) {
    return UcxError("ucp_worker_create", status);
  }
  return Worker(worker);
}

ucs_memory_type_t MemoryType(const RowMemory& rows) {
  return rows.on_gpu() ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
}

// Whether messages can come from and go to this memory.
absl::StatusOr<bool> Carries(ucp_context_h context, const RowMemory* rows) {
  if (rows == nullptr || !rows->on_gpu()) return rows != nullptr;
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  if (ucs_status_t status = ucp_context_query(context, &attributes); status != UCS_OK) {
    return UcxError("ucp_context_query", status);
  }
  return (attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
}

// Messages name the memory of their rows. Were it left to UCX to register them one by one, it would want the
// registration of a send to a peer that has died invalidated before it calls the send over; cuda_ipc of
// UCX 1.13 has nothing to invalidate and never answers, and the send would hold its block for ever.
absl::StatusOr<MappedMemory> Map(ucp_context_h context, const RowMemory& rows) {
  ucp_mem_map_params_t parameters{};
  parameters.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  parameters.address = rows.base();
  parameters.length = static_cast<size_t>(rows.bytes());
  parameters.memory_type = MemoryType(rows);
  ucp_mem_h memory = nullptr;
  if (ucs_status_t status = ucp_mem_map(context, &parameters, &memory); status != UCS_OK) {
    return UcxError("ucp_mem_map of the row memory", status);
  }
  return MappedMemory(memory, MemoryUnmapper{context});
}

// How long a message's header may be, with everything that goes in it.
absl::StatusOr<size_t> HeaderBytesMax(ucp_worker_h worker) {
  ucp_worker_attr_t attributes{};
  attributes.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  if (ucs_status_t status = ucp_worker_query(worker, &attributes); status != UCS_OK) {
    return UcxError("ucp_worker_query", status);
  }
  return attributes.max_am_header;
}

// UCX asks CUDA for the device of the thread it runs in.
void UseDeviceInThisThread(RowMemory* rows) {
  static thread_local const RowMemory* in_use = nullptr;
  if (rows == nullptr || std::exchange(in_use, rows) == rows) return;
  rows->UseInThisThread();
}

// The transports of an endpoint's lanes for active messages, as UCX names them. UCX 1.13 tells them only in
// print:
//   #     lane[0]:  2:posix/memory.0 md[2]   -> md[2]/posix/sysdev[255] am am_bw#0
std::string TransportName(ucp_ep_h ep) {
  char* text = nullptr;
  size_t bytes = 0;
  FILE* const stream = open_memstream(&text, &bytes);
  if (stream == nullptr) return "unknown";
  ucp_ep_print_info(ep, stream);
  std::fclose(stream);
  const std::string info(text, bytes);
  std::free(text);

  for (size_t begin = 0; begin < info.size();) {
    const size_t end = std::min(info.find('\n', begin), info.size());
    const std::string_view line = std::string_view(info).substr(begin, end - begin);
    begin = end + 1;
    const size_t lane = line.find("lane[");
    const size_t slash = line.find('/', lane == std::string_view::npos ? line.size() : lane);
    if (lane == std::string_view::npos || slash == std::string_view::npos) continue;
    if ((StrCat(line, " ")).find(" am ") == std::string::npos) continue;
    const size_t colon = line.rfind(':', slash);
    return std::string(line.substr(colon + 1, slash - colon - 1));
  }
  return "unknown";
}

class UcxDriver;
class UcxLink;

// A send under way. Header and payload must stay where they are until UCX is done with them.
struct SendOperation {
  wire::FrameHeader header;
  std::vector<std::byte> header_and_descriptors;  // if the rows travel apart from them
  FrameRef frame;
  UcxLink* link = nullptr;
  int64_t queued_ns = 0;
  SendOperation* previous = nullptr;
  SendOperation* next = nullptr;
};

// A rendezvous receive under way, directly into a frame of the pool.
struct ReceiveOperation {
  UcxDriver* driver = nullptr;
  UcxLink* link = nullptr;
  FrameRef frame;
  size_t bytes = 0;  // expected
};

class UcxLink final : public Link {
 public:
  explicit UcxLink(UcxDriver* driver) : driver_(driver) {}

  void Send(FrameRef frame, uint8_t version, uint32_t credits, int64_t now_ns) override;
  uint32_t sends_pending() const override { return sends_pending_; }
  int64_t oldest_send_ns() const override { return oldest_ == nullptr ? 0 : oldest_->queued_ns; }
  std::string transport_name() override { return TransportName(ep_); }
  void Close() override;

  // Fills what every endpoint of ours has in common, and creates it.
  absl::Status Create(ucp_worker_h worker, ucp_ep_params_t parameters);
  // True when UCX will not call back for this link any more.
  bool Released();
  bool usable() const { return !closed_ && !failed_; }
  bool closed() const { return closed_; }
  ucp_ep_h ep() const { return ep_; }
  void ReceiveBegun() { ++receives_pending_; }
  void ReceiveEnded() { --receives_pending_; }
  void Fail(ucs_status_t status);

 private:
  static void OnError(void* arg, ucp_ep_h ep, ucs_status_t status);
  static void OnSent(void* request, ucs_status_t status, void* arg);
  void Append(SendOperation* operation);
  void Remove(SendOperation* operation);

  UcxDriver* const driver_;
  ucp_ep_h ep_ = nullptr;
  void StartClose();

  int64_t close_by_ns_ = 0;  // closed, but receives are under way: until then
  void* close_request_ = nullptr;
  bool failed_ = false;  // UCX said so; it is recorded
  bool closed_ = false;  // by the user
  uint32_t sends_pending_ = 0;
  uint32_t receives_pending_ = 0;
  SendOperation* oldest_ = nullptr;
  SendOperation* newest_ = nullptr;
};

// Callbacks of UCX run inside ucp_worker_progress() and only record; Progress() acts on the records
// afterwards.
class UcxDriver final : public Driver {
 public:
  static absl::StatusOr<std::unique_ptr<UcxDriver>> Create(FramePool* pool, const UcxOptions& options);
  ~UcxDriver() override;

  std::string address() const override { return address_; }
  bool carries_rows() const override { return rows_ != nullptr; }
  uint32_t rows_offset_max() const override { return rows_offset_max_; }
  absl::StatusOr<std::string> Resolve(std::string_view address) const override;
  absl::StatusOr<Link*> Open(const std::string& resolved) override;
  void Progress(DriverSink& sink) override;
  bool PrepareToBlock() override;
  void Block(int64_t timeout_ns) override;
  void Signal() override;

  // For links.
  void Lost(UcxLink* link, absl::Status status) {
    records_.push_back({Record::Kind::kLost, link, {}, std::move(status)});
  }
  void Closing(UcxLink* link, ucp_ep_h ep);
  // A send to a peer that is given up is over for UCX at once, although the peer, if it lives, may still come
  // for the rows: its block must not be somebody else's by then.
  void KeepForAWhile(FrameRef frame) { kept_.emplace_back(NowNs() + keep_ns_, std::move(frame)); }
  SendOperation* NewSend();
  void FreeSend(SendOperation* operation);
  ucp_worker_h worker() const { return worker_.get(); }
  ucp_mem_h row_memory_handle() const { return mapped_rows_.get(); }

 private:
  struct Record {
    enum class Kind : uint8_t { kFrame, kBad, kLost } kind;
    UcxLink* link;
    FrameRef frame;
    absl::Status status;
  };

  UcxDriver(FramePool* pool, RowMemory* rows, int64_t heartbeat_ns, uint32_t rows_offset_max, Context context,
            MappedMemory mapped_rows, Worker worker, int worker_fd, FileDescriptor signal_fd)
      : pool_(pool),
        rows_(rows),
        rows_offset_max_(rows_offset_max),
        context_(std::move(context)),
        mapped_rows_(std::move(mapped_rows)),
        worker_(std::move(worker)),
        worker_fd_(worker_fd),
        signal_fd_(std::move(signal_fd)),
        silence_ns_(2 * heartbeat_ns),
        keep_ns_(4 * heartbeat_ns + 1'000'000'000) {}

  static void OnConnectionRequest(ucp_conn_request_h request, void* arg);
  static ucs_status_t OnMessage(void* arg, const void* header, size_t header_bytes, void* data, size_t bytes,
                                const ucp_am_recv_param_t* parameters);
  static void OnReceived(void* request, ucs_status_t status, size_t bytes, void* arg);
  ucs_status_t Receive(const void* header, size_t header_bytes, void* data, size_t bytes,
                       const ucp_am_recv_param_t* parameters);
  // The last `bytes` of the frame: its rows if it is one with rows apart.
  ucs_status_t ReceiveRendezvous(UcxLink* link, FrameRef frame, void* data, size_t bytes);
  absl::StatusOr<UcxLink*> AddLink(ucp_ep_params_t parameters);
  void AcceptConnections(DriverSink& sink);
  void ReapClosed();

  FramePool* const pool_;
  RowMemory* const rows_;  // null: none, or UCX cannot carry rows from and to it
  const uint32_t rows_offset_max_;
  const Context context_;
  const MappedMemory mapped_rows_;  // null without rows_
  const Worker worker_;
  const int worker_fd_;  // the worker's own
  const FileDescriptor signal_fd_;
  Listener listener_;
  std::string address_;

  // With row memory only. Peers that heard nothing for silence_ns_ have given this node up, and after
  // keep_ns_ their blocks hold other rows: what they offered before must not be fetched.
  void CheckRowMemory();
  const int64_t silence_ns_, keep_ns_;
  int64_t last_progress_ns_ = 0, last_check_ns_ = 0;
  std::deque<std::pair<int64_t, FrameRef>> kept_;  // until when

  absl::flat_hash_map<ucp_ep_h, std::unique_ptr<UcxLink>> links_;  // by endpoint, while it is ours
  std::vector<std::unique_ptr<UcxLink>> closing_;                  // until UCX is done with them
  std::vector<ucp_conn_request_h> requests_;
  std::vector<Record> records_;
  std::vector<Record> acting_on_;
  SendOperation* free_sends_ = nullptr;
  std::vector<std::unique_ptr<SendOperation>> sends_;
  bool arm_failed_ = false;
};

// ---- Link
// ---------------------------------------------------------------------------------------------------

absl::Status UcxLink::Create(ucp_worker_h worker, ucp_ep_params_t parameters) {
  parameters.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;  // a killed peer surfaces at once
  parameters.err_handler = {&UcxLink::OnError, this};
  if (ucs_status_t status = ucp_ep_create(worker, &parameters, &ep_); status != UCS_OK) {
    return UcxError("ucp_ep_create", status);
  }
  return absl::OkStatus();
}

void UcxLink::Send(FrameRef frame, uint8_t version, uint32_t credits, int64_t now_ns) {
  if (!usable()) return;
  SendOperation* const operation = driver_->NewSend();
  // The frame may go to several peers at once, so what differs between them is in a copy of the header.
  operation->header = frame.header();
  operation->header.magic = wire::kMagic;
  operation->header.version = version;
  operation->header.credits = credits;
  operation->frame = std::move(frame);
  operation->link = this;
  operation->queued_ns = now_ns;

  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE |
                            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  parameters.flags = UCP_AM_SEND_FLAG_REPLY;  // tells the receiver which of its endpoints this came over
  parameters.memory_type = UCS_MEMORY_TYPE_HOST;
  parameters.cb.send = &UcxLink::OnSent;
  parameters.user_data = operation;
  const void* header = &operation->header;
  size_t header_bytes = sizeof(operation->header);
  const std::byte* data = operation->frame.payload();
  size_t bytes = operation->header.payload_bytes;
  if (const std::byte* const rows = operation->frame.device_rows(); rows != nullptr) {
    const uint32_t offset = operation->frame.rows_offset();
    std::vector<std::byte>& head = operation->header_and_descriptors;
    head.resize(sizeof(operation->header) + offset);
    std::memcpy(head.data(), &operation->header, sizeof(operation->header));
    std::memcpy(head.data() + sizeof(operation->header), operation->frame.payload(), offset);
    header = head.data();
    header_bytes = head.size();
    data = rows;
    bytes -= offset;
    parameters.memory_type = MemoryType(*operation->frame.row_memory());
    parameters.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    parameters.memh = driver_->row_memory_handle();
    // UCX would send up to its threshold (RNDV_THRESH, above every payload over shared memory and tcp)
    // eagerly, which copies a GPU's memory through the host's on both sides. Rendezvous goes from GPU to GPU,
    // and is quicker from one row on.
    if (bytes != 0) parameters.flags |= UCP_AM_SEND_FLAG_RNDV;
    UseDeviceInThisThread(operation->frame.row_memory());
  }
  void* const request = ucp_am_send_nbx(ep_, kMessageId, header, header_bytes, data, bytes, &parameters);
  if (UCS_PTR_IS_PTR(request)) {
    Append(operation);
    return;
  }
  driver_->FreeSend(operation);
  if (UCS_PTR_IS_ERR(request)) Fail(UCS_PTR_STATUS(request));
}

void UcxLink::OnSent(void* request, ucs_status_t status, void* arg) {
  auto* const operation = static_cast<SendOperation*>(arg);
  UcxLink* const link = operation->link;
  ucp_request_free(request);
  link->Remove(operation);
  if (status != UCS_OK && operation->frame.device_rows() != nullptr) {
    link->driver_->KeepForAWhile(std::move(operation->frame));
  }
  link->driver_->FreeSend(operation);
  if (status != UCS_OK) link->Fail(status);
}

void UcxLink::OnError(void* arg, ucp_ep_h /*ep*/, ucs_status_t status) {
  static_cast<UcxLink*>(arg)->Fail(status);
}

void UcxLink::Fail(ucs_status_t status) {
  if (!usable()) return;
  failed_ = true;
  driver_->Lost(this, UcxError("connection", status));
}

void UcxLink::Close() {
  if (std::exchange(closed_, true)) return;
  driver_->Closing(this, ep_);
  // A copy from the peer's GPU that is under way answers through this endpoint when it is done.
  if (receives_pending_ > 0) {
    close_by_ns_ = NowNs() + kReceiveNs;
  } else {
    StartClose();
  }
}

void UcxLink::StartClose() {
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  // What had to be read by the other side was given time before (PeerTransport lingers).
  parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
  void* const request = ucp_ep_close_nbx(std::exchange(ep_, nullptr), &parameters);
  if (UCS_PTR_IS_PTR(request)) close_request_ = request;
}

bool UcxLink::Released() {
  if (ep_ != nullptr) {
    if (receives_pending_ > 0 && NowNs() < close_by_ns_) return false;
    StartClose();
  }
  if (close_request_ != nullptr) {
    if (ucp_request_check_status(close_request_) == UCS_INPROGRESS) return false;
    ucp_request_free(std::exchange(close_request_, nullptr));
  }
  return sends_pending_ == 0 && receives_pending_ == 0;
}

void UcxLink::Append(SendOperation* operation) {
  operation->previous = newest_;
  operation->next = nullptr;
  (newest_ == nullptr ? oldest_ : newest_->next) = operation;
  newest_ = operation;
  ++sends_pending_;
}

void UcxLink::Remove(SendOperation* operation) {
  (operation->previous == nullptr ? oldest_ : operation->previous->next) = operation->next;
  (operation->next == nullptr ? newest_ : operation->next->previous) = operation->previous;
  --sends_pending_;
}

// ---- Driver
// -------------------------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<UcxDriver>> UcxDriver::Create(FramePool* pool, const UcxOptions& options) {
  // UCX looks at interfaces once: a container may start before its own is up, and would never connect.
  MK_ASSIGN_OR_RETURN(Interface interface, AwaitInterface(options.interface, kInterfaceTimeout));
  RowMemory* rows = options.transport.rows;
  UseDeviceInThisThread(rows);
  MK_ASSIGN_OR_RETURN(const std::vector<UcxSetting> settings, ChooseSettings(options, interface));
  MK_ASSIGN_OR_RETURN(Context context, CreateContext(settings));
  MK_ASSIGN_OR_RETURN(const bool carries_rows, Carries(context.get(), rows));
  if (!carries_rows) rows = nullptr;
  MappedMemory mapped_rows;
  if (rows != nullptr) {
    if (absl::StatusOr<MappedMemory> mapped = Map(context.get(), *rows); mapped.ok()) {
      mapped_rows = *std::move(mapped);
    } else {
      log::Warning("transport", std::string(mapped.status().message()));
      rows = nullptr;
    }
  }
  MK_ASSIGN_OR_RETURN(Worker worker, CreateWorker(context.get()));
  MK_ASSIGN_OR_RETURN(const size_t header_bytes_max, HeaderBytesMax(worker.get()));
  const size_t rows_offset_max = std::min<size_t>(
      header_bytes_max - std::min(header_bytes_max, sizeof(wire::FrameHeader)), wire::kPayloadBytesMax);
  int worker_fd = -1;
  if (ucs_status_t status = ucp_worker_get_efd(worker.get(), &worker_fd); status != UCS_OK) {
    return UcxError("ucp_worker_get_efd", status);
  }
  FileDescriptor signal_fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (signal_fd.get() < 0) return absl::UnavailableError(StrCat("eventfd: ", std::strerror(errno)));
  std::unique_ptr<UcxDriver> driver(
      new UcxDriver(pool, rows, absl::ToInt64Nanoseconds(options.transport.heartbeat),
                    static_cast<uint32_t>(rows_offset_max), std::move(context), std::move(mapped_rows),
                    std::move(worker), worker_fd, std::move(signal_fd)));

  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
  handler.id = kMessageId;
  handler.cb = &UcxDriver::OnMessage;
  handler.arg = driver.get();
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  if (ucs_status_t status = ucp_worker_set_am_recv_handler(driver->worker(), &handler); status != UCS_OK) {
    return UcxError("ucp_worker_set_am_recv_handler", status);
  }

  SocketAddress listen = interface.address;
  SetPort(listen, options.port);
  ucp_listener_params_t parameters{};
  parameters.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  parameters.sockaddr = {listen.get(), listen.bytes};
  parameters.conn_handler = {&UcxDriver::OnConnectionRequest, driver.get()};
  ucp_listener_h listener = nullptr;
  if (ucs_status_t status = ucp_listener_create(driver->worker(), &parameters, &listener); status != UCS_OK) {
    return UcxError(StrCat("listen on ", JoinHostPort(listen.host(), options.port)), status);
  }
  driver->listener_.reset(listener);
  ucp_listener_attr_t attributes{};
  attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  if (ucs_status_t status = ucp_listener_query(listener, &attributes); status != UCS_OK) {
    return UcxError("ucp_listener_query", status);
  }
  SocketAddress bound;
  bound.storage = attributes.sockaddr;
  driver->address_ =
      JoinHostPort(options.advertise_host.empty() ? bound.host() : options.advertise_host, bound.port());
  return driver;
}

UcxDriver::~UcxDriver() {
  UseDeviceInThisThread(rows_);
  for (ucp_conn_request_h request : requests_) ucp_listener_reject(listener_.get(), request);
  listener_.reset();
  while (!links_.empty()) links_.begin()->second->Close();
  const int64_t begin = NowNs();
  do {
    while (ucp_worker_progress(worker()) != 0) {
    }
    ReapClosed();
  } while (!closing_.empty() && NowNs() - begin < kCloseNs);
  if (!closing_.empty()) {
    log::Warning("transport",
                 StrCat(closing_.size(), " UCX endpoints did not close; their memory is not reused"));
    // UCX may still read from and write to these until the worker is gone, which is after this body.
    for (auto& link : closing_) (void)link.release();
    for (auto& operation : sends_) (void)operation.release();
  }
}

absl::StatusOr<std::string> UcxDriver::Resolve(std::string_view address) const {
  MK_ASSIGN_OR_RETURN(const SocketAddress resolved, ResolveHostPort(address));
  return std::string(reinterpret_cast<const char*>(&resolved), sizeof(resolved));
}

absl::StatusOr<Link*> UcxDriver::Open(const std::string& resolved) {
  SocketAddress address;
  MK_CHECK(resolved.size() == sizeof(address));
  std::memcpy(&address, resolved.data(), sizeof(address));
  ucp_ep_params_t parameters{};
  parameters.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  parameters.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  parameters.sockaddr = {address.get(), address.bytes};
  return AddLink(parameters);
}

absl::StatusOr<UcxLink*> UcxDriver::AddLink(ucp_ep_params_t parameters) {
  auto link = std::make_unique<UcxLink>(this);
  MK_RETURN_IF_ERROR(link->Create(worker(), parameters));
  UcxLink* const raw = link.get();
  links_[raw->ep()] = std::move(link);
  return raw;
}

void UcxDriver::Closing(UcxLink* /*link*/, ucp_ep_h ep) {
  // UCX may give the next endpoint the same address.
  const auto found = links_.find(ep);
  MK_CHECK(found != links_.end());
  closing_.push_back(std::move(found->second));
  links_.erase(found);
}

void UcxDriver::ReapClosed() {
  closing_.erase(
      std::remove_if(closing_.begin(), closing_.end(), [](auto& link) { return link->Released(); }),
      closing_.end());
}

void UcxDriver::Progress(DriverSink& sink) {
  UseDeviceInThisThread(rows_);
  for (int round = 0; round < kProgressRoundsMax && ucp_worker_progress(worker()) != 0; ++round) {
  }
  if (rows_ != nullptr) CheckRowMemory();
  if (!requests_.empty()) AcceptConnections(sink);
  std::swap(records_, acting_on_);
  for (Record& record : acting_on_) {
    if (record.link->closed()) continue;
    switch (record.kind) {
      case Record::Kind::kFrame: {
        const uint32_t credits = record.frame.header().credits;
        sink.OnFrame(record.link, std::move(record.frame), credits);
        break;
      }
      case Record::Kind::kBad:
        sink.OnBadFrame(record.link, record.status);
        break;
      case Record::Kind::kLost:
        sink.OnLost(record.link, record.status);
        break;
    }
  }
  acting_on_.clear();
  // Only now: records_ may name links that were closed while acting.
  if (!closing_.empty() && records_.empty()) ReapClosed();
}

void UcxDriver::CheckRowMemory() {
  const int64_t now = NowNs();
  while (!kept_.empty() && kept_.front().first <= now) kept_.pop_front();
  if (last_progress_ns_ != 0 && now - last_progress_ns_ > silence_ns_) {
    log::Warning("transport", StrCat("nobody looked for ", (now - last_progress_ns_) / 1'000'000,
                                     " ms: peers have given this node up, and it gives up what they sent"));
    std::erase_if(records_, [](const Record& record) { return record.kind == Record::Kind::kFrame; });
    for (auto& [ep, link] : links_) link->Fail(UCS_ERR_TIMED_OUT);
  }
  last_progress_ns_ = now;
  if (rows_->on_gpu() && now - last_check_ns_ > kDeviceCheckNs) {
    last_check_ns_ = now;
    std::byte
        row[16];  // ends the process if the GPU is lost: UCX alone would only fail to fetch, again and again
    (void)rows_->CopyToHost(row, rows_->base(), sizeof(row));
  }
}

void UcxDriver::AcceptConnections(DriverSink& sink) {
  for (ucp_conn_request_h request : std::exchange(requests_, {})) {
    ucp_ep_params_t parameters{};
    parameters.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
    parameters.conn_request = request;
    absl::StatusOr<UcxLink*> link = AddLink(parameters);
    if (link.ok()) {
      sink.OnAccept(*link);
    } else {
      log::Warning("transport", StrCat("connection not accepted: ", link.status().ToString()));
    }
  }
}

void UcxDriver::OnConnectionRequest(ucp_conn_request_h request, void* arg) {
  auto* const driver = static_cast<UcxDriver*>(arg);
  if (driver->requests_.size() >= kConnectionRequestsMax) {
    ucp_listener_reject(driver->listener_.get(), request);
    return;
  }
  driver->requests_.push_back(request);
}

ucs_status_t UcxDriver::OnMessage(void* arg, const void* header, size_t header_bytes, void* data,
                                  size_t bytes, const ucp_am_recv_param_t* parameters) {
  return static_cast<UcxDriver*>(arg)->Receive(header, header_bytes, data, bytes, parameters);
}

ucs_status_t UcxDriver::Receive(const void* header_data, size_t header_bytes, void* data, size_t bytes,
                                const ucp_am_recv_param_t* parameters) {
  // Without an endpoint of ours to blame (it is closed already) the message is dropped.
  if ((parameters->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) == 0) return UCS_OK;
  const auto found = links_.find(parameters->reply_ep);
  if (found == links_.end() || !found->second->usable()) return UCS_OK;
  UcxLink* const link = found->second.get();

  const std::span<const std::byte> head(static_cast<const std::byte*>(header_data), header_bytes);
  absl::StatusOr<wire::FrameHeader> read = wire::ReadHead(head, bytes);
  if (!read.ok()) {
    records_.push_back({Record::Kind::kBad, link, {}, std::move(read).status()});
    return UCS_OK;
  }
  const wire::FrameHeader& header = *read;
  const auto descriptor_bytes = static_cast<uint32_t>(header_bytes - sizeof(header));
  const bool rendezvous = (parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  FrameRef frame;
  // Rows that come apart, for us to say where. (A Dispatch is nothing but rows.) Those of another length than
  // ours are not to lie between ours; the reader of the message refuses them.
  if (rendezvous && rows_ != nullptr && wire::RowDataOffsetOf(header) == descriptor_bytes &&
      rows_->Fits(header.rows, bytes)) {
    frame = pool_->AllocateWithRows(header.payload_bytes, descriptor_bytes, *rows_);
  }
  if (!frame) frame = pool_->Allocate(header.payload_bytes);
  frame.header() = header;
  std::memcpy(frame.payload(), head.data() + sizeof(header), descriptor_bytes);
  if (rendezvous) return ReceiveRendezvous(link, std::move(frame), data, bytes);
  if (bytes != 0) std::memcpy(frame.payload() + descriptor_bytes, data, bytes);
  records_.push_back({Record::Kind::kFrame, link, std::move(frame), absl::OkStatus()});
  return UCS_OK;
}

ucs_status_t UcxDriver::ReceiveRendezvous(UcxLink* link, FrameRef frame, void* data, size_t bytes) {
  auto operation = std::make_unique<ReceiveOperation>(ReceiveOperation{this, link, std::move(frame), bytes});
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                            UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  parameters.cb.recv_am = &UcxDriver::OnReceived;
  parameters.user_data = operation.get();
  const FrameRef& target = operation->frame;
  std::byte* to = target.payload() + (target.header().payload_bytes - bytes);
  parameters.memory_type = UCS_MEMORY_TYPE_HOST;
  if (target.device_rows() != nullptr) {
    to = target.device_rows();
    parameters.memory_type = MemoryType(*rows_);
  }
  void* const request = ucp_am_recv_data_nbx(worker(), data, to, bytes, &parameters);
  if (UCS_PTR_IS_ERR(request)) {
    link->Fail(UCS_PTR_STATUS(request));
    return UCS_OK;
  }
  link->ReceiveBegun();
  (void)operation.release();  // OnReceived() deletes it
  return UCS_INPROGRESS;
}

void UcxDriver::OnReceived(void* request, ucs_status_t status, size_t bytes, void* arg) {
  const std::unique_ptr<ReceiveOperation> operation(static_cast<ReceiveOperation*>(arg));
  ucp_request_free(request);
  UcxLink* const link = operation->link;
  link->ReceiveEnded();
  if (!link->usable()) return;
  if (status != UCS_OK) {
    link->Fail(status);
  } else if (bytes != operation->bytes) {
    operation->driver->records_.push_back(
        {Record::Kind::kBad,
         link,
         {},
         absl::InvalidArgumentError(
             StrCat("frame payload: announced were ", operation->bytes, " bytes, received ", bytes))});
  } else {
    operation->driver->records_.push_back(
        {Record::Kind::kFrame, link, std::move(operation->frame), absl::OkStatus()});
  }
}

SendOperation* UcxDriver::NewSend() {
  if (free_sends_ == nullptr) {
    sends_.push_back(std::make_unique<SendOperation>());
    return sends_.back().get();
  }
  return std::exchange(free_sends_, free_sends_->next);
}

void UcxDriver::FreeSend(SendOperation* operation) {
  operation->frame = FrameRef();
  operation->link = nullptr;
  operation->next = free_sends_;
  free_sends_ = operation;
}

// ---- Sleeping
// -----------------------------------------------------------------------------------------------

bool UcxDriver::PrepareToBlock() {
  if (!records_.empty() || !requests_.empty()) return false;
  const ucs_status_t status = ucp_worker_arm(worker());
  if (status == UCS_ERR_BUSY) return false;  // something came meanwhile
  if (status != UCS_OK && !std::exchange(arm_failed_, true)) {
    log::Warning("transport", StrCat(UcxError("ucp_worker_arm", status).ToString(), "; polling instead"));
  }
  return true;
}

void UcxDriver::Block(int64_t timeout_ns) {
  if (arm_failed_) timeout_ns = std::min<int64_t>(timeout_ns, 1'000'000);
  pollfd descriptors[2] = {{worker_fd_, POLLIN, 0}, {signal_fd_.get(), POLLIN, 0}};
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  if (ppoll(descriptors, 2, &timeout, nullptr) > 0 && (descriptors[1].revents & POLLIN) != 0) {
    eventfd_t count = 0;
    eventfd_read(signal_fd_.get(), &count);
  }
}

void UcxDriver::Signal() { eventfd_write(signal_fd_.get(), 1); }

}  // namespace
}  // namespace internal

absl::StatusOr<UcxSelection> ParseUcxSelection(std::string_view text) {
  if (text == "auto") return UcxSelection::kAuto;
  if (text == "shm") return UcxSelection::kShm;
  if (text == "tcp") return UcxSelection::kTcp;
  if (text == "rdma") return UcxSelection::kRdma;
  return absl::InvalidArgumentError(
      StrCat("transport: expected auto, shm, tcp or rdma, found \"", text, "\""));
}

bool UcxKnowsCuda() {
  return internal::ComponentPresent("cuda_cpy") && internal::ComponentPresent("cuda_ipc");
}

absl::StatusOr<std::unique_ptr<Transport>> CreateUcx(Identity identity, UcxOptions options) {
  auto pool = std::make_unique<FramePool>();
  MK_ASSIGN_OR_RETURN(std::unique_ptr<internal::UcxDriver> driver,
                      internal::UcxDriver::Create(pool.get(), options));
  return std::make_unique<internal::PeerTransport>(std::move(pool), std::move(driver), std::move(identity),
                                                   options.transport);
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> UcxEnvironment(const UcxOptions& options) {
  MK_ASSIGN_OR_RETURN(const internal::Interface interface, internal::FindInterface(options.interface));
  MK_ASSIGN_OR_RETURN(const std::vector<internal::UcxSetting> settings,
                      internal::ChooseSettings(options, interface));
  std::vector<std::pair<std::string, std::string>> variables;
  for (const internal::UcxSetting& setting : settings) {
    std::string name = StrCat("UCX_", setting.name);
    if (std::getenv(name.c_str()) == nullptr) variables.emplace_back(std::move(name), setting.value);
  }
  return variables;
}

}  // namespace minke::transport
