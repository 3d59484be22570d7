#include "libs/kernels/cuda/graph.h"

#include "libs/kernels/cuda/check.h"

namespace minke::cuda {

absl::StatusOr<Graph> Graph::Capture(const Stream& stream, absl::FunctionRef<absl::Status()> body) {
  MK_CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal));
  const absl::Status recorded = body();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended =
      cudaStreamEndCapture(stream.handle(), &graph);  // also after an error: it ends the capture
  if (!recorded.ok()) {
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    return recorded;
  }
  MK_CUDA_RETURN_IF_ERROR(ended);
  cudaGraphExec_t made = nullptr;
  const cudaError_t instantiated = cudaGraphInstantiate(&made, graph, 0);
  (void)cudaGraphDestroy(graph);
  MK_CUDA_RETURN_IF_ERROR(instantiated);
  return Graph(made);
}

Graph::~Graph() {
  if (handle_ != nullptr) (void)cudaGraphExecDestroy(handle_);
}

absl::Status Graph::Launch(const Stream& stream) const {
  MK_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(handle_, stream.handle()));
  return absl::OkStatus();
}

absl::Status Wait(const Stream& stream, const Event& event) {
  MK_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream.handle(), event.handle(), 0));
  return absl::OkStatus();
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Allocate(int64_t bytes) {
  void* data = nullptr;
  if (bytes > 0) MK_CUDA_RETURN_IF_ERROR(cudaMallocHost(&data, static_cast<size_t>(bytes)));
  return PinnedBuffer(data, bytes);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

}  // namespace minke::cuda
