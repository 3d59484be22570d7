#include "libs/kernels/cuda/linear.h"

#include <cublasLt.h>

#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"

namespace minke::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // what NVIDIA advises for Hopper
// Prompts bring ever new row counts. Past this many shapes all are forgotten: a look-up costs about 50 us.
constexpr size_t kShapesMax = 8192;

absl::Status ToStatus(cublasStatus_t code, const char* call) {
  if (code == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cublasLtGetStatusString(code)));
}

#define MK_LT_RETURN_IF_ERROR(call)                                              \
  do {                                                                           \
    if (absl::Status mk_lt = ToStatus((call), #call); !mk_lt.ok()) return mk_lt; \
  } while (false)

// Everything that an algorithm depends on. cuBLASLt's matrices are column-major: a row-major [rows, width] is
// its [width, rows], so W is its first operand and x its second.
struct Shape {
  int64_t n, rows, k, w_row, x_row, y_row, heads, w_head, x_head, y_head;
  bool w_is_kn, y_f32, add;
  auto operator<=>(const Shape&) const = default;
};

struct LayoutDestroyer {
  void operator()(cublasLtMatrixLayout_t layout) const { (void)cublasLtMatrixLayoutDestroy(layout); }
};
struct DescDestroyer {
  void operator()(cublasLtMatmulDesc_t desc) const { (void)cublasLtMatmulDescDestroy(desc); }
};
struct PreferenceDestroyer {
  void operator()(cublasLtMatmulPreference_t p) const { (void)cublasLtMatmulPreferenceDestroy(p); }
};
using Layout = std::unique_ptr<std::remove_pointer_t<cublasLtMatrixLayout_t>, LayoutDestroyer>;
using Desc = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulDesc_t>, DescDestroyer>;
using Preference = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, PreferenceDestroyer>;

struct Product {
  Desc desc;
  Layout w, x, y;
  cublasLtMatmulAlgo_t algorithm;
};

absl::StatusOr<Layout> MakeLayout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride,
                                  int64_t batch, int64_t batch_stride) {
  cublasLtMatrixLayout_t made = nullptr;
  MK_LT_RETURN_IF_ERROR(cublasLtMatrixLayoutCreate(&made, type, rows, columns, stride));
  Layout layout(made);
  if (batch > 1) {
    const int32_t count = static_cast<int32_t>(batch);
    MK_LT_RETURN_IF_ERROR(
        cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
    MK_LT_RETURN_IF_ERROR(cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                           &batch_stride, sizeof(batch_stride)));
  }
  return layout;
}

}  // namespace

struct Linear::Impl {
  cublasLtHandle_t handle = nullptr;
  DeviceBuffer workspace;
  std::map<Shape, Product> products;

  ~Impl() {
    if (handle != nullptr) (void)cublasLtDestroy(handle);
  }

  absl::StatusOr<const Product*> Find(const Shape& s) {
    const auto known = products.find(s);
    if (known != products.end()) return &known->second;
    if (products.size() >= kShapesMax) products.clear();
    Product product;
    cublasLtMatmulDesc_t desc = nullptr;
    MK_LT_RETURN_IF_ERROR(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    product.desc.reset(desc);
    const cublasOperation_t transpose = s.w_is_kn ? CUBLAS_OP_N : CUBLAS_OP_T;
    MK_LT_RETURN_IF_ERROR(
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)));
    const auto set = [](Layout& to, absl::StatusOr<Layout> made) {
      if (made.ok()) to = *std::move(made);
      return made.status();
    };
    const cudaDataType_t out = s.y_f32 ? CUDA_R_32F : CUDA_R_16BF;
    const int64_t w_rows = s.w_is_kn ? s.n : s.k, w_columns = s.w_is_kn ? s.k : s.n;
    absl::Status status =
        set(product.w, MakeLayout(CUDA_R_16BF, w_rows, w_columns, s.w_row, s.heads, s.w_head));
    if (status.ok())
      status = set(product.x, MakeLayout(CUDA_R_16BF, s.k, s.rows, s.x_row, s.heads, s.x_head));
    if (status.ok()) status = set(product.y, MakeLayout(out, s.n, s.rows, s.y_row, s.heads, s.y_head));
    if (!status.ok()) return status;
    cublasLtMatmulPreference_t made = nullptr;
    MK_LT_RETURN_IF_ERROR(cublasLtMatmulPreferenceCreate(&made));
    const Preference preference(made);
    const uint64_t bytes = kWorkspaceBytes;
    MK_LT_RETURN_IF_ERROR(cublasLtMatmulPreferenceSetAttribute(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                               &bytes, sizeof(bytes)));
    // Slices of larger buffers begin anywhere; 16 bytes is what this project's dimensions guarantee.
    const uint32_t alignment = 16;
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      MK_LT_RETURN_IF_ERROR(
          cublasLtMatmulPreferenceSetAttribute(made, attribute, &alignment, sizeof(alignment)));
    }
    cublasLtMatmulHeuristicResult_t found = {};
    int count = 0;
    const cublasStatus_t asked =
        cublasLtMatmulAlgoGetHeuristic(handle, desc, product.w.get(), product.x.get(), product.y.get(),
                                       product.y.get(), made, 1, &found, &count);
    if (asked != CUBLAS_STATUS_SUCCESS || count == 0) {
      return absl::FailedPreconditionError(absl::StrCat("cuBLASLt knows no algorithm for ", s.rows,
                                                        " rows, n=", s.n, ", k=", s.k, ", ", s.heads,
                                                        " heads: ", cublasLtGetStatusString(asked)));
    }
    product.algorithm = found.algo;
    return &products.emplace(s, std::move(product)).first->second;
  }

  absl::Status Run(const Shape& shape, const void* w, const void* x, void* y, const Stream& stream) {
    absl::StatusOr<const Product*> product = Find(shape);
    if (!product.ok()) return product.status();
    const float one = 1, beta = shape.add ? 1 : 0;
    const Product& p = **product;
    MK_LT_RETURN_IF_ERROR(cublasLtMatmul(handle, p.desc.get(), &one, w, p.w.get(), x, p.x.get(), &beta, y,
                                         p.y.get(), y, p.y.get(), &p.algorithm, workspace.as(),
                                         kWorkspaceBytes, stream.handle()));
    return absl::OkStatus();
  }
};

Linear::Linear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;
Linear::~Linear() = default;

absl::StatusOr<Linear> Linear::Create() {
  auto impl = std::make_unique<Impl>();
  MK_LT_RETURN_IF_ERROR(cublasLtCreate(&impl->handle));
  absl::StatusOr<DeviceBuffer> workspace = DeviceBuffer::Allocate(kWorkspaceBytes);
  if (!workspace.ok()) return workspace.status();
  impl->workspace = *std::move(workspace);
  return Linear(std::move(impl));
}

absl::Status Linear::Run(const LinearArgs& a, const Stream& stream) {
  if (a.rows == 0) return absl::OkStatus();
  const Shape shape = {.n = a.n,
                       .rows = a.rows,
                       .k = a.k,
                       .w_row = a.k,
                       .x_row = a.x_row,
                       .y_row = a.y_row,
                       .heads = 1,
                       .w_head = 0,
                       .x_head = 0,
                       .y_head = 0,
                       .w_is_kn = false,
                       .y_f32 = a.output != LinearOutput::kBF16,
                       .add = a.output == LinearOutput::kAddF32};
  return impl_->Run(shape, a.w, a.x, a.y, stream);
}

absl::Status Linear::Run(const HeadLinearArgs& a, const Stream& stream) {
  if (a.rows == 0) return absl::OkStatus();
  const Shape shape = {.n = a.n,
                       .rows = a.rows,
                       .k = a.k,
                       .w_row = a.w_is_kn ? a.n : a.k,
                       .x_row = a.x_row,
                       .y_row = a.y_row,
                       .heads = a.heads,
                       .w_head = a.w_head,
                       .x_head = a.x_head,
                       .y_head = a.y_head,
                       .w_is_kn = a.w_is_kn,
                       .y_f32 = false,
                       .add = false};
  return impl_->Run(shape, a.w, a.x, a.y, stream);
}

}  // namespace minke::cuda
