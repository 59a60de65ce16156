// Internal to the emulation: the running block and its threads.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "testing/intrinsics_on_cpu.h"
#include "testing/memory.h"
#include "testing/order.h"
#include "testing/runtime.h"

namespace flexvar::emulation {

struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  size_t bytes;
};

struct Product {
  void (*run)(const void* context);
  alignas(16) unsigned char context[kProductBytes];
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 thread_index{};
  unsigned id = 0;
  enum State { runnable, waiting, finished } state = runnable;
  const char* waits_at =
      "";  // while waiting: the operation, its lanes (0: no warp operation), where
  unsigned waits_with = 0;
  Location where{};

  uint32_t clock = 1;
  Knowledge knows;
  bool waited_for_earlier_launches = false;
  uint32_t fenced_clock = 0;             // its own clock at its last fence
  std::shared_ptr<const Clocks> fenced;  // what it knew then

  int barrier_result = 0;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> product_groups;
};

struct Barrier {
  int threads = 0;  // how many meet here; 0 while nobody has arrived
  int arrived = 0;
  int predicates = 0;
  Vote vote = Vote::none;
  Location where{};
  std::vector<Fiber*> waiting;
  std::vector<Knowledge> left;  // of those that arrived without waiting
};

// An Mbarrier. Its phase ends with the last arrival and, where copies count, with the wait for it.
struct MemoryBarrier {
  int arrivals = 0;  // of a phase
  int missing = 0;   // of this one
  int parity = 0;
  int64_t expected_bytes = 0, issued_bytes = 0;
  std::vector<AsyncCopy> copies;
  std::vector<Fiber*> waiting;
  std::vector<Knowledge> arrived, arrived_before;  // in this phase, in the one before
};

// A warp-wide operation that waits for lanes.
struct WarpGroup {
  WarpOp op;
  unsigned mask;
  unsigned arrived;
  Location where;
  WarpArguments* lanes[32];
};

struct Block {
  uint32_t number = 0;        // running number over all launches
  uint32_t first_number = 0;  // of this launch
  bool overlaps = false;      // this launch, those before it
  std::vector<Fiber> fibers;
  Barrier barriers[16];
  std::map<const void*, MemoryBarrier> memory_barriers;
  std::vector<std::vector<WarpGroup>> warps;
  const void* parameters = nullptr;  // the kernel's arguments, which every thread may read
  size_t parameter_bytes = 0;
};

extern Block block;
extern Fiber* current;  // null outside kernels
extern Options options;

inline constexpr size_t kStackBytes = 128 * 1024;

// Suspends the current thread until make_runnable.
void wait(const char* waits_at, unsigned lanes, Location where);
void make_runnable(Fiber& fiber);

bool same_place(const Location& a, const Location& b);
std::string describe(const Fiber& fiber);

}  // namespace flexvar::emulation
