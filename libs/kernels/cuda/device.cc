#include "libs/kernels/cuda/device.h"

#include "absl/strings/str_cat.h"
#include "libs/kernels/cuda/check.h"

namespace minke::cuda {

absl::Status ToStatus(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return absl::OkStatus();
  // CUDA keeps it for the thread's next cudaGetLastError, which would blame the next launch for it. (Errors
  // that leave the device unusable stay anyway.)
  (void)cudaGetLastError();
  // The call's arguments help nobody: "cudaMalloc(&data, bytes)" is named cudaMalloc.
  const std::string_view name(call, std::string_view(call).find('('));
  const std::string message = absl::StrCat(absl::string_view(name.data(), name.size()), ": ",
                                           cudaGetErrorName(code), ": ", cudaGetErrorString(code));
  switch (code) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(message);
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
      return absl::InvalidArgumentError(message);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
      return absl::FailedPreconditionError(message);
    default:
      return absl::InternalError(message);
  }
}

absl::StatusOr<int> DeviceCount() {
  int count = 0;  // untouched by the call when it fails
  MK_CUDA_RETURN_IF_ERROR(cudaGetDeviceCount(&count));
  if (count == 0) return absl::FailedPreconditionError("no CUDA device");
  return count;
}

absl::StatusOr<DeviceInfo> CurrentDevice() {
  if (absl::StatusOr<int> count = DeviceCount(); !count.ok()) return count.status();
  int device = 0;
  MK_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  cudaDeviceProp properties;
  MK_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, device));
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.l2_bytes = properties.l2CacheSize;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return info;
}

absl::StatusOr<int64_t> FreeMemoryBytes() {
  size_t free = 0, total = 0;
  MK_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

absl::StatusOr<int> CurrentDeviceIndex() {
  int device = 0;
  MK_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  return device;
}

absl::Status UseDevice(int device) {
  MK_CUDA_RETURN_IF_ERROR(cudaSetDevice(device));
  return absl::OkStatus();
}

absl::StatusOr<DeviceScope> DeviceScope::Enter(int device) {
  int before = 0;
  MK_CUDA_RETURN_IF_ERROR(cudaGetDevice(&before));
  if (before == device) return DeviceScope(-1);
  if (const cudaError_t code = cudaSetDevice(device); code != cudaSuccess) {
    const absl::Status status = ToStatus(code, "cudaSetDevice(device)");
    return code == cudaErrorInvalidDevice ? absl::InvalidArgumentError(status.message()) : status;
  }
  return DeviceScope(before);
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

absl::StatusOr<Path> Resolve(Path path, const DeviceInfo& device) {
  if (device.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat(device.name, " has compute capability ", device.major,
                                                      ".", device.minor, ", 8.0 or newer is needed"));
  }
  switch (path) {
    case Path::kAuto:
      return device.hopper() ? Path::kHopper : Path::kPortable;
    case Path::kPortable:
      return path;
    case Path::kHopper:
      if (!device.hopper()) {
        return absl::FailedPreconditionError(absl::StrCat(device.name, " is no sm_90 device"));
      }
      return path;
  }
  return absl::InternalError("path");
}

absl::StatusOr<Stream> Stream::Create() {
  cudaStream_t handle = nullptr;
  MK_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
  return Stream(handle);
}

Stream::~Stream() {
  if (handle_ != nullptr) (void)cudaStreamDestroy(handle_);
}

absl::Status Stream::Synchronize() const {
  MK_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(handle_));
  return absl::OkStatus();
}

absl::StatusOr<bool> Stream::Done() const {
  const cudaError_t code = cudaStreamQuery(handle_);
  if (code == cudaErrorNotReady) {
    (void)cudaGetLastError();  // not an error; the next launch must not be blamed for it
    return false;
  }
  MK_CUDA_RETURN_IF_ERROR(code);
  return true;
}

absl::StatusOr<Event> Event::Create() {
  cudaEvent_t handle = nullptr;
  MK_CUDA_RETURN_IF_ERROR(cudaEventCreate(&handle));
  return Event(handle);
}

Event::~Event() {
  if (handle_ != nullptr) (void)cudaEventDestroy(handle_);
}

absl::Status Event::Record(const Stream& stream) {
  MK_CUDA_RETURN_IF_ERROR(cudaEventRecord(handle_, stream.handle()));
  return absl::OkStatus();
}

absl::Status Event::Synchronize() const {
  MK_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(handle_));
  return absl::OkStatus();
}

absl::StatusOr<float> Event::Milliseconds(const Event& begin, const Event& end) {
  float ms = 0;
  MK_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, begin.handle_, end.handle_));
  return ms;
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::Allocate(int64_t bytes) {
  void* data = nullptr;
  if (bytes > 0) MK_CUDA_RETURN_IF_ERROR(cudaMalloc(&data, static_cast<size_t>(bytes)));
  return DeviceBuffer(data, bytes);
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) (void)cudaFree(data_);
}

absl::Status DeviceBuffer::Upload(const void* host, int64_t bytes, const Stream& stream, int64_t offset) {
  if (offset < 0 || bytes < 0 || offset + bytes > bytes_)
    return absl::OutOfRangeError("Upload past the buffer");
  MK_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(as<char>() + offset, host, static_cast<size_t>(bytes),
                                          cudaMemcpyHostToDevice, stream.handle()));
  return absl::OkStatus();
}

absl::Status DeviceBuffer::Download(void* host, int64_t bytes, const Stream& stream, int64_t offset) const {
  if (offset < 0 || bytes < 0 || offset + bytes > bytes_) {
    return absl::OutOfRangeError("Download past the buffer");
  }
  MK_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(host, as<char>() + offset, static_cast<size_t>(bytes),
                                          cudaMemcpyDeviceToHost, stream.handle()));
  return absl::OkStatus();
}

absl::Status DeviceBuffer::Fill(uint8_t byte, const Stream& stream) {
  MK_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(data_, byte, static_cast<size_t>(bytes_), stream.handle()));
  return absl::OkStatus();
}

}  // namespace minke::cuda
