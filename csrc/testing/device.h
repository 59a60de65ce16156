// The emulated device that launchers see: while one is open, torch's CPU tensors lie in the
// emulated device memory, those that launchers and torch itself allocate included.
#pragma once

#include <cstddef>

#include "testing/runtime.h"

namespace flexvar::emulation {

// Of the device that is open; throws KernelError when none is.
const Options& device_options();
// How many were opened, this one among them.
int device_ordinal();

// A launcher's time on the device, whose current stream is new in every scope: launches must use
// it.
class DeviceScope {
 public:
  DeviceScope();
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

 private:
  void* stream_;
};
void check_stream(const char* op, const void* stream);

// cudaFuncSetAttribute: how much dynamic shared memory a kernel may ask for. False: more than the
// device has.
bool allow_dynamic_shared(const void* kernel, size_t bytes);
size_t allowed_dynamic_shared(const void* kernel);
// Launchers are to put each question about a kernel or a device to CUDA once.
void count_question();
// Options for a launch of `kernel`, whose dynamic shared memory must be allowed.
Options begin_device_launch(const char* op, const void* kernel, size_t shared_bytes);
// cudaMemset.
void fill_from_host(void* data, int value, size_t bytes);

}  // namespace flexvar::emulation
