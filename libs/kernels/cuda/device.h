// The GPU seen from C++: availability, memory, streams, events. No CUDA type appears here, so any library may
// include it; libs/kernels/cuda alone includes CUDA's own headers.
//
// Everything acts on the calling thread's current device. Errors carry the name of the CUDA call that failed:
// RESOURCE_EXHAUSTED out of memory, INVALID_ARGUMENT, FAILED_PRECONDITION no device or driver, else INTERNAL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct CUstream_st;
struct CUevent_st;

namespace minke::cuda {

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t shared_bytes_per_block = 0;  // with opt-in
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;
  bool hopper() const { return major == 9 && minor == 0; }  // runs sm_90a code
};

// FAILED_PRECONDITION when there is no device, with the driver's reason.
absl::StatusOr<int> DeviceCount();
absl::StatusOr<DeviceInfo> CurrentDevice();
// Of the current device, now.
absl::StatusOr<int64_t> FreeMemoryBytes();

// The calling thread's current device.
absl::StatusOr<int> CurrentDeviceIndex();

// Makes a device the calling thread's current one from here on.
absl::Status UseDevice(int device);

// Makes a device the calling thread's current one while it lives. INVALID_ARGUMENT for a device that is not
// there.
class DeviceScope {
 public:
  static absl::StatusOr<DeviceScope> Enter(int device);
  DeviceScope(DeviceScope&& other) noexcept : before_(std::exchange(other.before_, -1)) {}
  DeviceScope& operator=(DeviceScope&&) = delete;
  ~DeviceScope();

 private:
  explicit DeviceScope(int before) : before_(before) {}
  int before_;
};

// Which implementation of a kernel runs. kAuto: kHopper on sm_90, else kPortable (sm_80 and newer).
enum class Path : uint8_t { kAuto, kPortable, kHopper };
absl::StatusOr<Path> Resolve(Path path, const DeviceInfo& device);

class Stream {
 public:
  static absl::StatusOr<Stream> Create();
  // CUDA's default stream, which is there without being made.
  static Stream Default() { return Stream(nullptr); }
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Stream();
  absl::Status Synchronize() const;
  // Whether everything so far is done, without waiting for it.
  absl::StatusOr<bool> Done() const;
  CUstream_st* handle() const { return handle_; }

 private:
  explicit Stream(CUstream_st* handle) : handle_(handle) {}
  CUstream_st* handle_;
};

class Event {
 public:
  static absl::StatusOr<Event> Create();
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Event();
  absl::Status Record(const Stream& stream);
  absl::Status Synchronize() const;
  // Milliseconds between two recorded events; both must have happened.
  static absl::StatusOr<float> Milliseconds(const Event& begin, const Event& end);
  CUevent_st* handle() const { return handle_; }

 private:
  explicit Event(CUevent_st* handle) : handle_(handle) {}
  CUevent_st* handle_;
};

// Device memory, freed with the object. Contents are undefined until written.
class DeviceBuffer {
 public:
  static absl::StatusOr<DeviceBuffer> Allocate(int64_t bytes);
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer();

  // Copies are in stream order. Ordinary (pageable) host memory may be reused as soon as Upload returns;
  // Download's destination is valid after the stream is synchronised.
  absl::Status Upload(const void* host, int64_t bytes, const Stream& stream, int64_t offset = 0);
  absl::Status Download(void* host, int64_t bytes, const Stream& stream, int64_t offset = 0) const;
  absl::Status Fill(uint8_t byte, const Stream& stream);
  int64_t bytes() const { return bytes_; }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  DeviceBuffer(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace minke::cuda
