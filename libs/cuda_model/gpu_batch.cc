// AttentionOnGpu::Begin: from chunks on the host to tables on the device, in one upload.
#include "libs/cuda_model/gpu_batch.h"

#include <algorithm>
#include <cstring>

#include "libs/base/status.h"
#include "libs/cuda_model/attention_on_gpu.h"
#include "libs/kernels/cpu/mla.h"

namespace minke::cuda_model {
namespace {

constexpr int64_t kPageTokens = kernels::kPageTokens;
constexpr int64_t kQueriesMax = 4;  // of one sequence in MlaDecode

int64_t PagesOf(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// Arrays one behind the other, each at a multiple of 16 bytes, in host memory that is copied as a whole.
class TableWriter {
 public:
  // Returns the array's offset.
  template <class T>
  int64_t Add(const std::vector<T>& values) {
    const int64_t at = std::ssize(bytes_);
    bytes_.resize((at + std::ssize(values) * sizeof(T) + 15) / 16 * 16);
    std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

struct Rows {
  std::vector<uint32_t> tokens, pages;
  std::vector<int32_t> positions;
  std::vector<int32_t> sequences;  // of absorbed rows

  void Append(const GpuChunk& chunk) {
    for (int64_t i = 0; i < std::ssize(chunk.tokens); ++i) {
      const int64_t position = chunk.position_begin + i;
      tokens.push_back(chunk.tokens[i]);
      positions.push_back(static_cast<int32_t>(position));
      pages.push_back(chunk.pages[position / kPageTokens]);
    }
  }
};

// Page tables of some sequences, all as wide as the longest.
std::vector<uint32_t> PageTable(const std::vector<std::span<const uint32_t>>& sequences, int64_t stride) {
  std::vector<uint32_t> table(sequences.size() * stride, 0);
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::copy_n(sequences[s].begin(), std::min<int64_t>(stride, std::ssize(sequences[s])),
                table.begin() + s * stride);
  }
  return table;
}

}  // namespace

absl::Status AttentionOnGpu::CheckChunks(std::span<const GpuChunk> chunks, int64_t& rows) const {
  if (std::ssize(chunks) > options_.sequences_max) {
    return absl::InvalidArgumentError(
        StrCat("a batch of ", chunks.size(), " chunks, at most ", options_.sequences_max));
  }
  bool naive = false;
  rows = 0;
  for (const GpuChunk& chunk : chunks) {
    const int64_t count = std::ssize(chunk.tokens), end = chunk.position_begin + count;
    rows += count;
    if (count == 0 || chunk.position_begin < 0 || std::ssize(chunk.pages) < PagesOf(end)) {
      return absl::InvalidArgumentError(StrCat("a chunk of ", count, " tokens at ", chunk.position_begin,
                                               " with ", chunk.pages.size(), " pages"));
    }
    for (const uint32_t page : chunk.pages.first(PagesOf(end))) {
      if (page >= options_.cache_pages) return absl::InvalidArgumentError(StrCat("page ", page));
    }
    for (const uint32_t token : chunk.tokens) {
      if (token >= static_cast<uint32_t>(config().vocab_size))
        return absl::InvalidArgumentError(StrCat("token ", token));
    }
    const bool absorbed = Absorbed(count, chunk.position_begin);
    if (absorbed && naive) return absl::InvalidArgumentError("chunks of the absorbed form come first");
    naive = !absorbed;
  }
  if (rows > options_.rows_max) {
    return absl::InvalidArgumentError(StrCat("a batch of ", rows, " rows, at most ", options_.rows_max));
  }
  return absl::OkStatus();
}

absl::Status AttentionOnGpu::Begin(GpuBatch& batch, std::span<const GpuChunk> chunks) {
  int64_t row_count = 0;
  MK_RETURN_IF_ERROR(CheckChunks(chunks, row_count));
  Rows rows;
  std::vector<std::span<const uint32_t>> sequences;
  std::vector<cuda::DecodeSequence> decodes;
  int64_t stride = 1;
  size_t next = 0;
  for (; next < chunks.size(); ++next) {
    const GpuChunk& chunk = chunks[next];
    const int64_t count = std::ssize(chunk.tokens);
    if (!Absorbed(count, chunk.position_begin)) break;
    rows.Append(chunk);
    stride = std::max(stride, PagesOf(chunk.position_begin + count));
    // To MlaDecode a chunk is several sequences of up to four queries that share their pages; the generic
    // kernel takes it as it is.
    const int64_t step = batch.decode_ ? kQueriesMax : count;
    for (int64_t i = 0; i < count; i += step) {
      const int64_t queries = std::min(step, count - i);
      rows.sequences.insert(rows.sequences.end(), queries, static_cast<int32_t>(sequences.size()));
      sequences.push_back(chunk.pages);
      decodes.push_back(
          {static_cast<int32_t>(chunk.position_begin + i + queries), static_cast<int32_t>(queries)});
    }
  }
  const int64_t absorbed_rows = std::ssize(rows.tokens);

  // The rest in passes that fit the workspace.
  struct PassTables {
    std::vector<cuda::PrefillSequence> sequences;
    std::vector<std::span<const uint32_t>> pages;
    std::vector<int32_t> counts, begins;
    int64_t row_begin, rows, keys, pages_max;
    int64_t counts_at, begins_at, table_at;
  };
  std::vector<PassTables> passes;
  for (; next < chunks.size(); ++next) {
    const GpuChunk& chunk = chunks[next];
    const int64_t count = std::ssize(chunk.tokens), keys = chunk.position_begin + count;
    if (passes.empty() || passes.back().keys + keys > options_.prefill_keys_max) {
      passes.push_back({.row_begin = std::ssize(rows.tokens)});
    }
    PassTables& pass = passes.back();
    pass.sequences.push_back({static_cast<int32_t>(count), static_cast<int32_t>(keys)});
    pass.pages.push_back(chunk.pages);
    pass.counts.push_back(static_cast<int32_t>(keys));
    pass.begins.push_back(static_cast<int32_t>(pass.keys));
    pass.rows += count;
    pass.keys += keys;
    pass.pages_max = std::max(pass.pages_max, PagesOf(keys));
    rows.Append(chunk);
  }

  TableWriter writer;
  const int64_t tokens_at = writer.Add(rows.tokens), positions_at = writer.Add(rows.positions),
                pages_at = writer.Add(rows.pages), sequences_at = writer.Add(rows.sequences),
                table_at = writer.Add(PageTable(sequences, stride));
  for (PassTables& pass : passes) {
    pass.counts_at = writer.Add(pass.counts);
    pass.begins_at = writer.Add(pass.begins);
    pass.table_at = writer.Add(PageTable(pass.pages, pass.pages_max));
  }
  const int64_t bytes = std::ssize(writer.bytes());
  if (batch.uploading_) MK_RETURN_IF_ERROR(batch.uploaded_->Synchronize());
  if (batch.staging_.bytes() < bytes) {
    MK_RETURN_IF_ERROR(Synchronize());  // kernels may still read the old tables
    MK_ASSIGN_OR_RETURN(batch.staging_, cuda::PinnedBuffer::Allocate(2 * bytes));
    MK_ASSIGN_OR_RETURN(batch.tables_, DeviceBuffer::Allocate(2 * bytes));
  }
  std::memcpy(batch.staging_.as(), writer.bytes().data(), bytes);
  MK_RETURN_IF_ERROR(batch.tables_.Upload(batch.staging_.as(), bytes, stream_));
  MK_RETURN_IF_ERROR(batch.uploaded_->Record(stream_));
  batch.uploading_ = true;

  const char* at = batch.tables_.as<char>();
  BatchView view;
  view.rows = row_count;
  view.absorbed_rows = absorbed_rows;
  view.tokens = reinterpret_cast<const uint32_t*>(at + tokens_at);
  view.positions = reinterpret_cast<const int32_t*>(at + positions_at);
  view.pages = reinterpret_cast<const uint32_t*>(at + pages_at);
  view.sequences = reinterpret_cast<const int32_t*>(at + sequences_at);
  view.page_table = reinterpret_cast<const uint32_t*>(at + table_at);
  view.stride = stride;
  batch.passes_used_ = passes.size();
  for (size_t i = 0; i < passes.size(); ++i) {
    const PassTables& from = passes[i];
    if (i == batch.passes_.size()) {
      cuda::MlaPrefill::Options options;
      options.heads = config().num_attention_heads;
      options.softmax_scale = static_cast<float>(config().softmax_scale());
      options.sequences_max = static_cast<int32_t>(options_.sequences_max);
      options.path = options_.path;
      MK_ASSIGN_OR_RETURN(cuda::MlaPrefill prefill, cuda::MlaPrefill::Create(options));
      batch.passes_.emplace_back(std::move(prefill));
    }
    NaivePass& pass = batch.passes_[i];
    pass.row_begin = from.row_begin;
    pass.rows = from.rows;
    pass.keys = from.keys;
    pass.sequences = std::ssize(from.sequences);
    pass.pages_max = from.pages_max;
    pass.key_counts = reinterpret_cast<const int32_t*>(at + from.counts_at);
    pass.key_begin = reinterpret_cast<const int32_t*>(at + from.begins_at);
    pass.page_table = reinterpret_cast<const uint32_t*>(at + from.table_at);
    MK_RETURN_IF_ERROR(pass.prefill.Plan(from.sequences, stream_));
  }
  return BeginDecode(batch, view, decodes);
}

absl::Status AttentionOnGpu::BeginDecode(GpuBatch& batch, const BatchView& view,
                                         std::span<const cuda::DecodeSequence> sequences) {
  if (view.rows > options_.rows_max) {
    return absl::InvalidArgumentError(StrCat("a batch of ", view.rows, " rows, at most ", options_.rows_max));
  }
  batch.view = view;
  batch.pending = nullptr;
  if (view.absorbed_rows == view.rows) batch.passes_used_ = 0;
  if (!batch.decode_ || sequences.empty()) return absl::OkStatus();
  return batch.decode_->Plan(sequences, stream_);
}

}  // namespace minke::cuda_model
