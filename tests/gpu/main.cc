#include <cstdio>

#include "gtest/gtest.h"
#include "libs/kernels/cuda/device.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const auto device = minke::cuda::CurrentDevice();
  if (!device.ok()) {
    std::printf("no CUDA device: %s\nNo GPU test was run.\n", std::string(device.status().message()).c_str());
    return 77;
  }
  std::printf("device: %s, compute capability %d.%d, %d multiprocessors\n", device->name.c_str(),
              device->major, device->minor, device->multiprocessors);
  return RUN_ALL_TESTS();
}
