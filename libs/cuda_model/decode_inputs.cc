#include "libs/cuda_model/decode_inputs.h"

#include <algorithm>
#include <numeric>

#include "libs/base/status.h"
#include "libs/kernels/cpu/mla.h"

namespace minke::cuda_model {
namespace {

constexpr int64_t kPageTokens = kernels::kPageTokens;

int64_t Aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

DecodeInputs::Layout::Layout(int64_t rows, int64_t stride)
    : tokens(0),
      positions(Aligned(rows * 4)),
      pages(positions + Aligned(rows * 4)),
      sequences(pages + Aligned(rows * 4)),
      sampling(sequences + Aligned(rows * 4)),
      used(sampling + rows * static_cast<int64_t>(sizeof(cuda::SampleRow))),
      page_table(used + 16),
      bytes(page_table + rows * stride * 4) {}

absl::StatusOr<DecodeInputs> DecodeInputs::Create(Options options) {
  std::erase_if(options.buckets, [&](int32_t b) { return b < 1 || b > options.rows_max; });
  if (options.buckets.empty() || !std::is_sorted(options.buckets.begin(), options.buckets.end()) ||
      options.context_max < 1) {
    return absl::InvalidArgumentError(
        StrCat("DecodeInputs: ", options.buckets.size(), " buckets, context ", options.context_max));
  }
  DecodeInputs inputs;
  inputs.stride_ = (options.context_max + kPageTokens - 1) / kPageTokens;
  inputs.options_ = std::move(options);
  const Layout layout(inputs.rows_max(), inputs.stride_);
  MK_ASSIGN_OR_RETURN(inputs.device_, DeviceBuffer::Allocate(layout.bytes));
  MK_ASSIGN_OR_RETURN(inputs.host_, cuda::PinnedBuffer::Allocate(layout.bytes));
  return inputs;
}

absl::StatusOr<int32_t> DecodeInputs::BucketOf(std::span<const DecodeInput> inputs) const {
  const auto bucket = std::lower_bound(options_.buckets.begin(), options_.buckets.end(), std::ssize(inputs));
  if (bucket == options_.buckets.end()) {
    return absl::InvalidArgumentError(StrCat("Decode: ", inputs.size(), " rows, at most ", rows_max()));
  }
  for (const DecodeInput& input : inputs) {
    const int64_t pages = input.position / kPageTokens + 1;
    if (input.position < 0 || input.position >= options_.context_max || std::ssize(input.pages) < pages ||
        input.token >= static_cast<uint32_t>(options_.vocab) ||
        std::any_of(input.pages.begin(), input.pages.begin() + pages,
                    [&](uint32_t page) { return page >= options_.scratch_page; })) {
      return absl::InvalidArgumentError(StrCat("Decode: token ", input.token, " at ", input.position,
                                               " with ", input.pages.size(), " pages"));
    }
  }
  return *bucket;
}

void DecodeInputs::Write(std::span<const DecodeInput> inputs, int32_t bucket) {
  const Layout at(bucket, stride_);
  char* base = host_.as<char>();
  auto* tokens = reinterpret_cast<uint32_t*>(base + at.tokens);
  auto* positions = reinterpret_cast<int32_t*>(base + at.positions);
  auto* pages = reinterpret_cast<uint32_t*>(base + at.pages);
  auto* sequences = reinterpret_cast<int32_t*>(base + at.sequences);
  auto* sampling = reinterpret_cast<cuda::SampleRow*>(base + at.sampling);
  auto* table = reinterpret_cast<uint32_t*>(base + at.page_table);
  *reinterpret_cast<int32_t*>(base + at.used) = static_cast<int32_t>(inputs.size());
  std::iota(sequences, sequences + bucket, 0);
  sequences_.clear();
  for (int32_t i = 0; i < bucket; ++i) {
    if (i >= std::ssize(inputs)) {  // padding: token 0 at the beginning of a sequence on the scratch page
      tokens[i] = 0;
      positions[i] = 0;
      pages[i] = table[i * stride_] = options_.scratch_page;
      sampling[i] = {};
      sequences_.push_back({1, 1});
      continue;
    }
    const DecodeInput& input = inputs[i];
    const int64_t count = input.position / kPageTokens + 1;
    tokens[i] = input.token;
    positions[i] = static_cast<int32_t>(input.position);
    pages[i] = input.pages[count - 1];
    sampling[i] = input.sampling;
    std::copy_n(input.pages.begin(), count, table + i * stride_);
    sequences_.push_back({static_cast<int32_t>(input.position + 1), 1});
  }
}

absl::Status DecodeInputs::Upload(int32_t bucket, const Stream& stream) {
  return device_.Upload(host_.as(), Layout(bucket, stride_).bytes, stream);
}

BatchView DecodeInputs::View(int32_t bucket) const {
  const Layout at(bucket, stride_);
  const char* base = device_.as<char>();
  BatchView view;
  view.rows = view.absorbed_rows = bucket;
  view.tokens = reinterpret_cast<const uint32_t*>(base + at.tokens);
  view.positions = reinterpret_cast<const int32_t*>(base + at.positions);
  view.pages = reinterpret_cast<const uint32_t*>(base + at.pages);
  view.sequences = reinterpret_cast<const int32_t*>(base + at.sequences);
  view.rows_used = reinterpret_cast<const int32_t*>(base + at.used);
  view.page_table = reinterpret_cast<const uint32_t*>(base + at.page_table);
  view.stride = stride_;
  return view;
}

const cuda::SampleRow* DecodeInputs::sampling(int32_t bucket) const {
  return reinterpret_cast<const cuda::SampleRow*>(device_.as<char>() + Layout(bucket, stride_).sampling);
}

}  // namespace minke::cuda_model
