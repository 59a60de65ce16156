// The emulation's scheduler: every thread of a block is a fiber, blocks run one after another, and
// a fiber runs until it waits for others. Used by cuda_on_cpu.h (what kernels see) and by the
// tests' bindings (emulate, Options).
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace flexvar::emulation {

// A mistake that the emulation found in a kernel. The text names block, thread and source line.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order the runnable threads of a block get their turn. A right kernel gives the same bits
// in every order.
enum class ThreadOrder { forward, reversed, random };

struct Options {
  ThreadOrder order = ThreadOrder::forward;
  uint64_t seed = 0;      // of ThreadOrder::random
  uint8_t poison = 0xff;  // byte that fills memory nobody has written (0xff: NaN in every format)
};

struct GridShape {
  unsigned grid[3];
  unsigned block[3];
  size_t dynamic_shared;
};

using Location = std::source_location;

// Runs `body(context)` once per thread. `context` (of `context_bytes`) holds the kernel's
// arguments.
void launch(const GridShape& shape, const Options& options, void (*body)(void*), void* context,
            size_t context_bytes);

// Stops the running kernel: launch() throws KernelError with `message` and the place it came from.
[[noreturn]] void fail(const std::string& message);

// --- What waits for other threads
// ---------------------------------------------------------------------

enum class Vote { none, all, any, count };
int block_barrier(int id, int expected_threads, Vote vote, int predicate, Location where);
void block_barrier_arrive(int id, int expected_threads, Location where);

enum class WarpOp {
  sync,
  shuffle,
  ballot,
  vote_all,
  vote_any,
  match_any,
  match_all,
  add,
  add_signed,
  min,
  min_signed,
  max,
  max_signed,
  bit_and,
  bit_or,
  bit_xor,
  matrix_load,
  matrix_product,
};
const char* name_of(WarpOp op);

// One lane's part in a warp-wide operation; `complete` runs once, when the last lane has arrived.
struct WarpArguments {
  uint64_t value = 0;
  int source_lane = 0;  // shuffle: the lane to read, or the lane itself
  uint64_t result = 0;
  void* operands = nullptr;  // matrix operations: see ptx_on_cpu.cpp
};
void warp_collective(WarpOp op, unsigned mask, WarpArguments& arguments, Location where);

int lane_of_current_thread();

// --- Shared memory
// ------------------------------------------------------------------------------------

// Storage of static shared memory: `key` tells the objects of one kernel apart.
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* type_name);
void* dynamic_shared_memory();

// --- Accesses that do not go through compiler instrumentation
// ------------------------------------------

void check_read(const void* pointer, size_t bytes);
void check_write(const void* pointer, size_t bytes);
// An atomic access: conflicts with plain accesses of other threads, not with atomic ones.
void check_atomic(const void* pointer, size_t bytes);
void thread_fence();

void cp_async(void* shared, const void* global, size_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending_groups);

// --- For the bindings
// ---------------------------------------------------------------------------------

// Runs kernel<<<grid, block, dynamic_shared>>>(arguments...) to its end. Throws KernelError.
template <class... Parameters, class... Arguments>
void emulate(const Options& options, void (*kernel)(Parameters...), const GridShape& shape,
             Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  launch(
      shape, options,
      [](void* context) {
        auto& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.parameters);
      },
      &call, sizeof(call));
}

}  // namespace flexvar::emulation
