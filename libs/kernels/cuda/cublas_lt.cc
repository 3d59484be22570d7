// cuBLASLt's functions by their own names, found in its library when the first of them is called. Linked the
// ordinary way it would have to be on every machine that runs Minke, with a GPU or without, and its 94 KB of
// thread-local memory would not fit the stacks that other libraries give their threads.
#include <cublasLt.h>
#include <dlfcn.h>

namespace {

struct Library {
  void* handle = nullptr;
  const char* error = "";
};

const Library& Loaded() {
  static const Library library = [] {
    Library found;
    for (const char* name : {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13"}) {
      found.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (found.handle != nullptr) return found;
    }
    found.error = "libcublasLt.so.13 cannot be loaded";
    return found;
  }();
  return library;
}

template <class Function>
Function* Find(const char* name) {
  return Loaded().handle == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(Loaded().handle, name));
}

}  // namespace

#define MK_FORWARD(NAME, PARAMETERS, ...)                                       \
  cublasStatus_t CUBLASWINAPI NAME PARAMETERS {                                 \
    static auto* const real = Find<decltype(NAME)>(#NAME);                      \
    return real == nullptr ? CUBLAS_STATUS_NOT_INITIALIZED : real(__VA_ARGS__); \
  }

extern "C" {

const char* CUBLASWINAPI cublasLtGetStatusString(cublasStatus_t status) {
  static auto* const real = Find<decltype(cublasLtGetStatusString)>("cublasLtGetStatusString");
  return real == nullptr ? Loaded().error : real(status);
}

MK_FORWARD(cublasLtCreate, (cublasLtHandle_t * handle), handle)
MK_FORWARD(cublasLtDestroy, (cublasLtHandle_t handle), handle)
MK_FORWARD(cublasLtMatrixLayoutCreate,
           (cublasLtMatrixLayout_t * layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld),
           layout, type, rows, columns, ld)
MK_FORWARD(cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), layout)
MK_FORWARD(cublasLtMatrixLayoutSetAttribute,
           (cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute, const void* value,
            size_t bytes),
           layout, attribute, value, bytes)
MK_FORWARD(cublasLtMatmulDescCreate,
           (cublasLtMatmulDesc_t * desc, cublasComputeType_t compute, cudaDataType_t scale), desc, compute,
           scale)
MK_FORWARD(cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t desc), desc)
MK_FORWARD(cublasLtMatmulDescSetAttribute,
           (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void* value,
            size_t bytes),
           desc, attribute, value, bytes)
MK_FORWARD(cublasLtMatmulPreferenceCreate, (cublasLtMatmulPreference_t * preference), preference)
MK_FORWARD(cublasLtMatmulPreferenceDestroy, (cublasLtMatmulPreference_t preference), preference)
MK_FORWARD(cublasLtMatmulPreferenceSetAttribute,
           (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
            const void* value, size_t bytes),
           preference, attribute, value, bytes)
MK_FORWARD(cublasLtMatmulAlgoGetHeuristic,
           (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
            cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
            cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
            int* found),
           handle, desc, a, b, c, d, preference, wanted, results, found)
MK_FORWARD(cublasLtMatmul,
           (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
            cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
            const void* c, cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
            const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
            cudaStream_t stream),
           handle, desc, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algorithm,
           workspace, workspace_bytes, stream)

}  // extern "C"
