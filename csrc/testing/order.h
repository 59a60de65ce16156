// What happened before what, by CUDA's memory model: barriers and __syncwarp order all memory,
// atomics with __threadfence order it between blocks, shuffles and votes order nothing.
//
// A thread counts its own time; the clock moves on whenever others learn what it did so far. It
// carries what it knows of every other thread's clock, and meeting others merges that knowledge.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace flexvar::emulation {

struct Fiber;
struct Epoch;

// Entry t: what thread t did up to this clock happened before.
using Clocks = std::vector<uint32_t>;
// The same for other blocks, by their running number.
using BlockClocks = std::map<uint32_t, std::shared_ptr<const Clocks>>;

struct Knowledge {
  std::shared_ptr<const Clocks> own_block;
  std::shared_ptr<const BlockClocks> other_blocks;
  std::shared_ptr<const BlockClocks> pending;  // seen through an atomic, counts after a fence
};

// Did what `epoch` stands for happen before the current thread's next action?
bool happened_before(Epoch epoch);

// These threads meet, and learn what those knew who arrived without waiting (`left`).
void meet(const std::vector<Fiber*>& fibers, const std::vector<Knowledge>& left);
// What others may learn from this thread, its own actions so far included.
Knowledge publish(Fiber& fiber);

// The current thread's atomic access to `address`: it leaves there what its fences made visible,
// and finds what others left.
void order_by_atomic(const void* address);
void forget_atomics();

}  // namespace flexvar::emulation
