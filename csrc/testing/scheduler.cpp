#include "testing/scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "testing/fiber_switch.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace flexvar::emulation {

Block block;
Fiber* current = nullptr;
Options options;

namespace {

constexpr size_t kGuardBytes = 16 * 1024;  // below every stack
void* scheduler_stack;
void (*kernel_body)(void*);
void* kernel_context;
std::string error;  // of the kernel that is to end

std::string index_text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

void fiber_main() {
  kernel_body(kernel_context);
  current->state = Fiber::finished;
  void* never_continued;
  switch_stack(&never_continued, scheduler_stack);
}

char* stack_of(unsigned thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      throw KernelError("emulation: no memory for the stacks of the threads");
    }
    stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  return stacks[thread];
}

void start_fibers(unsigned threads) {
  block.fibers.assign(threads, {});
  const auto nothing_known = std::make_shared<const Clocks>(threads, 0);
  for (unsigned id = 0; id < threads; ++id) {
    Fiber& fiber = block.fibers[id];
    fiber.id = id;
    fiber.thread_index = {id % blockDim.x, id / blockDim.x % blockDim.y,
                          id / (blockDim.x * blockDim.y)};
    fiber.knows.own_block = nothing_known;
    fiber.stack = stack_of(id);
    fiber.stack_pointer = new_stack(fiber.stack, kStackBytes, fiber_main);
  }
  for (Barrier& barrier : block.barriers) barrier = {};
  block.memory_barriers.clear();
  block.warps.assign((threads + 31) / 32, {});
}

// Runs the thread until it waits or ends. False: the kernel failed.
bool run(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread_index;
  switch_stack(&scheduler_stack, fiber.stack_pointer);
  current = nullptr;
  return error.empty();
}

std::string deadlock_text() {
  std::map<std::string, std::pair<int, const Fiber*>> groups;
  for (const Fiber& fiber : block.fibers) {
    std::string what = "ended";
    if (fiber.state == Fiber::waiting) {
      what = std::string("waiting at ") + fiber.waits_at + ", " + to_string(fiber.where);
      if (fiber.waits_with != 0) {
        char mask[32];
        std::snprintf(mask, sizeof(mask), " (mask 0x%08x)", fiber.waits_with);
        what += mask;
      }
    }
    auto& [count, example] = groups[what];
    ++count;
    if (example == nullptr) example = &fiber;
  }
  std::string text = "block " + index_text(blockIdx) + ": deadlock: ";
  const char* separator = "";
  for (const auto& [what, group] : groups) {
    text += separator + describe(*group.second);
    if (group.first > 1) text += " and " + std::to_string(group.first - 1) + " more";
    text += ": " + what;
    separator = "; ";
  }
  return text;
}

void run_block(std::mt19937_64& random) {
  const auto threads = static_cast<unsigned>(block.fibers.size());
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (options.order == ThreadOrder::reversed) std::reverse(order.begin(), order.end());
  for (bool progress = true; progress;) {
    progress = false;
    if (options.order == ThreadOrder::random) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned id : order) {
      Fiber& fiber = block.fibers[id];
      if (fiber.state != Fiber::runnable) continue;
      progress = true;
      if (!run(fiber)) throw KernelError(error);
    }
  }
  const auto ended = [](const Fiber& fiber) { return fiber.state == Fiber::finished; };
  if (!std::all_of(block.fibers.begin(), block.fibers.end(), ended)) {
    throw KernelError(deadlock_text());
  }
  for (const auto& [address, barrier] : block.memory_barriers) {
    if (barrier.copies.empty()) continue;
    throw KernelError("block " + index_text(blockIdx) +
                      ": its threads ended while the copy engine wrote to its shared memory");
  }
}

void check_shape(const LaunchShape& shape) {
  const unsigned *grid = shape.grid, *threads = shape.block;
  const uint64_t per_block = uint64_t{threads[0]} * threads[1] * threads[2];
  const bool grid_fits = grid[0] >= 1 && grid[0] <= 0x7fffffffu && grid[1] >= 1 &&
                         grid[1] <= 65535 && grid[2] >= 1 && grid[2] <= 65535;
  if (!grid_fits || per_block < 1 || per_block > 1024 || threads[2] > 64) {
    throw KernelError("launch: no GPU takes a grid of " + index_text({grid[0], grid[1], grid[2]}) +
                      " blocks of " + index_text({threads[0], threads[1], threads[2]}));
  }
}

}  // namespace

void launch(const LaunchShape& shape, const Options& launch_options, void (*body)(void*),
            void* context, size_t context_bytes) {
  check_shape(shape);
  options = launch_options;
  begin_launch(shape.dynamic_shared);
  forget_atomics();
  error.clear();
  kernel_body = body;
  kernel_context = context;
  block.parameters = context;
  block.parameter_bytes = context_bytes;
  block.first_number = block.number + 1;
  block.overlaps = shape.overlaps;
  gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  std::mt19937_64 random(options.seed);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        ++block.number;
        begin_block();
        start_fibers(blockDim.x * blockDim.y * blockDim.z);
        run_block(random);
      }
    }
  }
}

void fail(const std::string& message) {
  if (current == nullptr) throw KernelError(message);
  error = "block " + index_text(blockIdx) + ", " + describe(*current) + ": " + message;
  current->state = Fiber::finished;
  void* never_continued;
  switch_stack(&never_continued, scheduler_stack);
  __builtin_unreachable();
}

void wait(const char* waits_at, unsigned lanes, Location where) {
  Fiber& fiber = *current;
  fiber.state = Fiber::waiting;
  fiber.waits_at = waits_at;
  fiber.waits_with = lanes;
  fiber.where = where;
  switch_stack(&fiber.stack_pointer, scheduler_stack);
}

void make_runnable(Fiber& fiber) { fiber.state = Fiber::runnable; }

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

std::string describe(const Fiber& fiber) { return "thread " + index_text(fiber.thread_index); }

namespace {

// The current thread arrives. True: it was the last one, and the others go on.
bool arrive(Barrier& barrier, int id, int threads, Vote vote, int predicate, Location where,
            bool waits) {
  if (threads == 0) threads = static_cast<int>(block.fibers.size());
  if (threads % 32 != 0 && threads != static_cast<int>(block.fibers.size())) {
    fail("barrier " + std::to_string(id) + ": a number of threads divisible by 32, got " +
         std::to_string(threads) + ", " + to_string(where));
  }
  if (barrier.threads == 0) {
    barrier.threads = threads;
    barrier.vote = vote;
    barrier.where = where;
  }
  const bool divergent = id == 0 && !same_place(barrier.where, where);
  if (barrier.threads != threads || barrier.vote != vote || divergent) {
    fail("divergent barrier " + std::to_string(id) + ": this thread is at " + to_string(where) +
         ", another at " + to_string(barrier.where));
  }
  barrier.predicates += predicate != 0;
  if (waits) {
    barrier.waiting.push_back(current);
  } else {
    barrier.left.push_back(publish(*current));
  }
  if (++barrier.arrived < barrier.threads) return false;

  if (!barrier.waiting.empty()) meet(barrier.waiting, barrier.left);
  const int result = vote == Vote::all   ? barrier.predicates == threads
                     : vote == Vote::any ? barrier.predicates != 0
                                         : barrier.predicates;
  for (Fiber* fiber : barrier.waiting) {
    fiber->barrier_result = result;
    make_runnable(*fiber);
  }
  barrier = {};
  return true;
}

}  // namespace

int block_barrier(int id, int threads, Vote vote, int predicate, Location where) {
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + ": there are 0 to 15");
  if (!arrive(block.barriers[id], id, threads, vote, predicate, where, true)) {
    wait(id == 0 ? "__syncthreads" : "barrier_sync", 0, where);
  }
  return current->barrier_result;
}

void block_barrier_arrive(int id, int threads, Location where) {
  if (id < 1 || id > 15) fail("barrier " + std::to_string(id) + ": there are 1 to 15");
  arrive(block.barriers[id], id, threads, Vote::none, 0, where, false);
}

}  // namespace flexvar::emulation
