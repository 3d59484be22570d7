#include "services/experts/compute/cuda_backend.h"

#include <algorithm>
#include <cstring>

#include "libs/base/log.h"
#include "libs/base/status.h"

namespace minke::experts {
namespace {

// Group rows of one pass; launches of more take several. The workspace of V2 (hidden 5120, inner 1536, 6
// slots): 4096 * 6 * 2 * (5120 + 1536) = 327 MB of pairs, and 2 * 42 MB of rows, which the host has once
// more, page-locked.
constexpr int32_t kOutputsMax = 4096;

struct CudaUnit final : UnitWeights {
  CudaUnit(cuda::GroupedFfnWeights loaded, const cuda::Stream& gives)
      : weights(std::move(loaded)), gives(gives) {}
  int64_t bytes() const override { return weights.bytes(); }
  absl::Status Read(int64_t begin, std::span<std::byte> out) const override {
    MK_RETURN_IF_ERROR(weights.ReadPacked(begin, out, gives));
    return gives.Synchronize();
  }
  const cuda::GroupedFfnWeights weights;
  const cuda::Stream& gives;  // the engine's
};

class CudaUnitBuilder final : public UnitBuilder {
 public:
  CudaUnitBuilder(cuda::GroupedFfnWeights empty, const cuda::Stream& loads, const cuda::Stream& gives)
      : weights_(std::move(empty)), loads_(loads), gives_(gives) {}
  int64_t bytes() const override { return weights_.bytes(); }
  absl::Status Write(int64_t begin, std::span<const std::byte> bytes) override {
    return weights_.WritePacked(begin, bytes, loads_);
  }
  absl::StatusOr<std::shared_ptr<const UnitWeights>> Finish() override {
    MK_RETURN_IF_ERROR(loads_.Synchronize());  // launches are on another stream
    return std::make_shared<const CudaUnit>(std::move(weights_), gives_);
  }

 private:
  cuda::GroupedFfnWeights weights_;
  const cuda::Stream& loads_;
  const cuda::Stream& gives_;
};

cuda::GroupedFfnShape ShapeOf(const ModelConfig& config, int32_t experts) {
  return {.experts = experts, .hidden = config.hidden_size, .inner = config.moe_intermediate_size};
}

// Says what a GPU's memory was too small for.
absl::Status NameMemory(const absl::Status& status, int64_t needed, const std::string& what) {
  if (!absl::IsResourceExhausted(status)) return status;
  const absl::StatusOr<int64_t> free = cuda::FreeMemoryBytes();
  return absl::ResourceExhaustedError(StrCat("out of GPU memory: ", what, " needs ", needed, " bytes, ",
                                             free.ok() ? StrCat(*free) : "unknown", " are free"));
}

}  // namespace

CudaBackend::CudaBackend(const ModelConfig& config, cuda::FfnFormat format, ThreadPool& pool,
                         cuda::Stream launches, cuda::Stream gives, cuda::Stream loads,
                         cuda_model::CheckpointSource source, transport::RowMemory* rows)
    : config_(config),
      format_(format),
      pool_(pool),
      plan_(config),
      launches_(std::move(launches)),
      gives_(std::move(gives)),
      rows_(rows),
      loads_(std::move(loads)),
      source_(std::move(source)) {}

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(const Checkpoint& checkpoint,
                                                                 ExpertsFormat format, ThreadPool& pool,
                                                                 transport::RowMemory* rows) {
  const ModelConfig& config = checkpoint.config();
  MK_RETURN_IF_ERROR(cuda_model::CheckSupported(config));
  MK_ASSIGN_OR_RETURN(const cuda::DeviceInfo device, cuda::CurrentDevice());
  MK_ASSIGN_OR_RETURN(cuda::Stream launches, cuda::Stream::Create());
  MK_ASSIGN_OR_RETURN(cuda::Stream gives, cuda::Stream::Create());
  MK_ASSIGN_OR_RETURN(cuda::Stream loads, cuda::Stream::Create());
  MK_ASSIGN_OR_RETURN(cuda_model::CheckpointSource source, cuda_model::CheckpointSource::Create(checkpoint));
  const bool fp8 = format == ExpertsFormat::kFP8;
  std::unique_ptr<CudaBackend> backend(
      new CudaBackend(config, fp8 ? cuda::FfnFormat::kFP8 : cuda::FfnFormat::kBF16, pool, std::move(launches),
                      std::move(gives), std::move(loads), std::move(source), rows));
  if (config.n_routed_experts > 0) MK_RETURN_IF_ERROR(backend->AllocateWorkspace());
  log::Info("experts", StrCat("device=cuda name=\"", device.name, "\" format=", fp8 ? "fp8" : "bf16"));
  return backend;
}

absl::Status CudaBackend::AllocateWorkspace() {
  const int64_t hidden = config_.hidden_size, inner = config_.moe_intermediate_size;
  const int64_t staged = rows_ == nullptr ? kOutputsMax : 0;
  const int64_t up_bytes = LayOutUpload(staged, kOutputsMax, plan_.slots(), hidden, rows_ != nullptr).bytes;
  const int64_t down_bytes = LayOutDownload(staged, kOutputsMax, hidden).bytes;
  const int64_t needed = up_bytes + down_bytes + 3 * hidden * inner * 2 +
                         int64_t{kOutputsMax} * plan_.slots() * 2 * (hidden + inner);
  const auto allocate = [&]() -> absl::Status {
    for (int32_t g = 0; g < config_.placement_groups(); ++g) {
      const int32_t experts = config_.GroupExperts(g).size();
      if (ffn_.contains(experts)) continue;
      MK_ASSIGN_OR_RETURN(cuda::GroupedFfn ffn, cuda::GroupedFfn::Create({.shape = ShapeOf(config_, experts),
                                                                          .format = format_,
                                                                          .slots = plan_.slots(),
                                                                          .outputs_max = kOutputsMax}));
      ffn_.emplace(experts, std::move(ffn));
    }
    MK_ASSIGN_OR_RETURN(up_, cuda::DeviceBuffer::Allocate(up_bytes));
    MK_ASSIGN_OR_RETURN(down_, cuda::DeviceBuffer::Allocate(down_bytes));
    MK_ASSIGN_OR_RETURN(staging_, cuda::DeviceBuffer::Allocate(3 * hidden * inner * 2));
    return absl::OkStatus();
  };
  MK_RETURN_IF_ERROR(NameMemory(allocate(), needed, "the workspace of launches"));
  if (rows_ != nullptr) {
    MK_CHECK(rows_->row_bytes() == hidden * 2);
    MK_ASSIGN_OR_RETURN(RowStage stage, RowStage::Create(*rows_, kOutputsMax));
    stage_.emplace(std::move(stage));
  }
  MK_ASSIGN_OR_RETURN(host_up_, cuda::PinnedBuffer::Allocate(up_bytes));
  MK_ASSIGN_OR_RETURN(host_down_, cuda::PinnedBuffer::Allocate(down_bytes));
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const UnitWeights>> CudaBackend::LoadUnit(UnitId unit) {
  const ExpertRange range = config_.GroupExperts(static_cast<int32_t>(unit.group));
  auto weights = cuda_model::LoadExperts(config_, static_cast<int32_t>(unit.layer), range, format_, source_,
                                         staging_, loads_);
  if (!weights.ok()) {
    return NameMemory(weights.status(),
                      cuda::GroupedFfnWeights::Bytes(ShapeOf(config_, range.size()), format_),
                      StrCat("a unit of ", range.size(), " experts"));
  }
  MK_RETURN_IF_ERROR(loads_.Synchronize());  // launches are on another stream
  return std::make_shared<const CudaUnit>(*std::move(weights), gives_);
}

absl::StatusOr<std::unique_ptr<UnitBuilder>> CudaBackend::BuildUnit(UnitId unit) {
  const cuda::GroupedFfnShape shape =
      ShapeOf(config_, config_.GroupExperts(static_cast<int32_t>(unit.group)).size());
  auto empty = cuda::GroupedFfnWeights::Create(shape, format_);
  if (!empty.ok()) {
    return NameMemory(empty.status(), cuda::GroupedFfnWeights::Bytes(shape, format_),
                      StrCat("a unit of ", shape.experts, " experts"));
  }
  return std::make_unique<CudaUnitBuilder>(*std::move(empty), loads_, gives_);
}

uint64_t CudaBackend::UnitLayout(UnitId unit) const {
  return LayoutName(format_ == cuda::FfnFormat::kFP8 ? "cuda 2 fp8" : "cuda 1 bf16", config_, unit);
}

absl::Status CudaBackend::Run(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                              std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                              std::span<uint8_t> finite) {
  for (size_t begin = 0; begin < rows.size(); begin += kOutputsMax) {
    const size_t count = std::min<size_t>(kOutputsMax, rows.size() - begin);
    MK_RETURN_IF_ERROR(RunChunk(units, layer, jobs, rows.subspan(begin, count), outs.subspan(begin, count),
                                finite.subspan(begin, count)));
  }
  return absl::OkStatus();
}

void CudaBackend::PlaceRows(std::span<const LaunchJob> jobs, std::span<const SumTarget> outs,
                            int32_t* targets) {
  stage_->Begin();
  numbers_.clear();
  for (const LaunchPlan::Row& row : plan_.rows()) {
    const LaunchJob& job = jobs[row.job];
    const std::byte* const from = job.view.data + row.row * rows_->row_bytes();
    numbers_.push_back(job.in_row_memory ? static_cast<int32_t>(rows_->RowNumber(from))
                                         : stage_->AddRow(from));
  }
  for (const uint32_t i : plan_.group_row_of()) {
    const SumTarget& out = outs[i];
    *targets++ = out.in_row_memory ? static_cast<int32_t>(rows_->RowNumber(out.at)) : stage_->AddSum(out.at);
  }
}

absl::Status CudaBackend::RunChunk(const Units& units, uint32_t layer, std::span<const LaunchJob> jobs,
                                   std::span<const GroupRow> rows, std::span<const SumTarget> outs,
                                   std::span<uint8_t> finite) {
  const int64_t hidden = config_.hidden_size, row_bytes = hidden * 2, outputs = std::ssize(rows);
  const bool staged = rows_ == nullptr;  // all rows, and all sums
  plan_.Make(rows);
  const int64_t rows_up = staged ? std::ssize(plan_.rows()) : 0;
  const UploadLayout up = LayOutUpload(rows_up, outputs, plan_.slots(), hidden, !staged);
  const DownloadLayout down = LayOutDownload(staged ? outputs : 0, outputs, hidden);
  std::byte* const block = host_up_.as<std::byte>();
  if (staged) {
    numbers_.clear();
    CopyRows(pool_, rows_up, row_bytes, [&](int64_t i) {
      const LaunchPlan::Row row = plan_.rows()[i];
      std::memcpy(block + up.rows + i * row_bytes, jobs[row.job].view.data + row.row * row_bytes, row_bytes);
    });
  } else {
    PlaceRows(jobs, outs, reinterpret_cast<int32_t*>(block + up.targets));
    MK_RETURN_IF_ERROR(stage_->Upload(pool_, launches_));
  }
  plan_.WriteTables(jobs, numbers_, up, block);
  MK_RETURN_IF_ERROR(up_.Upload(block, up.bytes, launches_));
  for (const LaunchPlan::UnitRun& run : plan_.runs()) {
    const auto& unit = static_cast<const CudaUnit&>(*units.at({layer, run.group}));
    const std::byte* in = up_.as<std::byte>();
    std::byte* out = down_.as<std::byte>();
    cuda::GroupedFfnArgs args;
    args.weights = &unit.weights;
    args.outputs = run.end - run.begin;
    args.source = reinterpret_cast<const int32_t*>(in + up.source) + run.begin;
    args.experts = reinterpret_cast<const int32_t*>(in + up.experts) + int64_t{run.begin} * plan_.slots();
    args.slot_weights = reinterpret_cast<const float*>(in + up.weights) + int64_t{run.begin} * plan_.slots();
    if (staged) {
      args.x = reinterpret_cast<const bf16*>(in + up.rows);
      args.partial = reinterpret_cast<bf16*>(out + down.partials) + run.begin * hidden;
    } else {
      args.x = reinterpret_cast<const bf16*>(rows_->base());
      args.partial = reinterpret_cast<bf16*>(rows_->base());
      args.partial_rows = reinterpret_cast<const int32_t*>(in + up.targets) + run.begin;
    }
    args.finite = reinterpret_cast<uint8_t*>(out + down.finite) + run.begin;
    MK_RETURN_IF_ERROR(ffn_.at(unit.weights.shape().experts).Run(args, launches_));
  }
  const std::byte* const results = host_down_.as<std::byte>();
  if (!staged) MK_RETURN_IF_ERROR(stage_->Download(launches_));
  MK_RETURN_IF_ERROR(down_.Download(host_down_.as<std::byte>(), down.bytes, launches_));
  MK_RETURN_IF_ERROR(launches_.Synchronize());
  if (staged) {
    CopyRows(pool_, outputs, row_bytes, [&](int64_t i) {
      std::memcpy(outs[plan_.group_row_of()[i]].at, results + down.partials + i * row_bytes, row_bytes);
    });
  } else {
    stage_->Deliver(pool_);
  }
  for (int64_t i = 0; i < outputs; ++i)
    finite[plan_.group_row_of()[i]] = std::to_integer<uint8_t>(results[down.finite + i]);
  return absl::OkStatus();
}

}  // namespace minke::experts
