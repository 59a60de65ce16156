// The emulation's runtime as kernels see it through cuda_on_cpu.h, and `emulate`, with which the
// tests' bindings launch a kernel. Every thread of a block is a fiber; blocks run one after
// another, and a fiber runs until it waits for others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/tensor_map.h"

namespace flexvar::emulation {

using Location = std::source_location;

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
  // The device:
  int multiprocessors = 132;
  size_t shared_memory = 227 * 1024;  // the most that a block may have
  bool warpgroups = true;             // ptx::has_warpgroup_products
};

struct LaunchShape {
  unsigned grid[3];
  unsigned block[3];
  size_t dynamic_shared;
  bool overlaps = false;  // may begin before earlier launches have ended
};

// Runs `body(context)` once per thread. `context` (of `context_bytes`) holds the kernel's
// arguments. Throws KernelError.
void launch(const LaunchShape& shape, const Options& options, void (*body)(void*), void* context,
            size_t context_bytes);

// Ends the running kernel: launch() throws KernelError with `message`, the block and the thread.
[[noreturn]] void fail(const std::string& message);

// --- What waits for other threads --------------------------------------------------------------

enum class Vote { none, all, any, count };
// `threads` = 0: all of the block.
int block_barrier(int id, int threads, Vote vote, int predicate, Location where);
void block_barrier_arrive(int id, int threads, Location where);

enum class WarpOp {
  sync,
  shuffle,
  ballot,
  vote_all,
  vote_any,
  match_any,
  match_all,
  add,
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

// One lane's part in a warp-wide operation.
struct WarpArguments {
  uint64_t value = 0;
  int source_lane = 0;  // shuffle: the lane to read
  uint64_t result = 0;
  void* operands = nullptr;  // of the matrix operations
};
void warp_collective(WarpOp op, unsigned mask, WarpArguments& arguments, Location where);
int current_lane();

// --- Memory ------------------------------------------------------------------------------------

// Static shared memory of the block: the same object for the same key.
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* type_name);
void* dynamic_shared_memory();

// Records an atomic update: it conflicts with plain accesses of other threads, not with atomic
// ones.
void check_atomic(void* pointer, size_t bytes, Location where);
void thread_fence();

// Behind this, the thread sees what earlier launches did; in a launch that overlaps them not
// before.
void wait_for_earlier_launches();

void cp_async(void* shared, const void* global, size_t bytes, bool valid, Location where);
void cp_async_commit();
void cp_async_wait(int pending_groups);

// The same for products of a warpgroup: run(context) when their group is waited for.
constexpr size_t kProductBytes = 128;  // of a context, which is copied
void begin_product(void (*run)(const void* context), const void* context, size_t bytes);
void commit_products();
void wait_for_products(int pending_groups);

// Barriers in shared memory, and boxes of tensors whose copies they count: bytes move when somebody
// waits for the phase.
void mbarrier_init(void* barrier, int arrivals, Location where);
void mbarrier_end(void* barrier, Location where);
void mbarrier_arrive(void* barrier, int64_t expected_bytes, Location where);
void mbarrier_wait(void* barrier, int parity, Location where);
void copy_box(void* shared, const TensorMap& map, int row, int head, int image, void* barrier,
              Location where);

// --- For the bindings --------------------------------------------------------------------------

// Runs kernel<<<grid, block, dynamic_shared>>>(arguments...) to its end. Throws KernelError.
template <class... Parameters, class... Arguments>
void emulate(const Options& options, void (*kernel)(Parameters...), const LaunchShape& shape,
             const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {arguments...}};
  launch(
      shape, options,
      [](void* context) {
        auto& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.parameters);
      },
      &call, sizeof(call));
}

}  // namespace flexvar::emulation
