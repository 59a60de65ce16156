// The emulated device memory: one reserved range of addresses that holds every global buffer and
// the shared memory of the running block, with a record per byte of who wrote and read it last.
// That record finds accesses outside buffers, reads of what nobody wrote, and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "testing/runtime.h"

namespace flexvar::emulation {

// A place in a kernel's source: either known, or the address of an instruction to look up.
struct Site {
  const void* instruction = nullptr;
  Location where{};
};
std::string to_string(const Site& site);
std::string to_string(const Location& where);

// Who did something, packed so that a record is one number: the running number of the block (0: not
// a thread), the thread within it, the thread's clock (see clocks.h), and whether it was atomic.
struct Epoch {
  uint64_t bits;

  static constexpr Epoch of(uint32_t block, uint32_t thread, uint32_t clock, bool atomic) {
    return {(uint64_t{block} << 32) | (thread << 22) | (clock << 1) | (atomic ? 1u : 0u)};
  }
  constexpr uint32_t block() const { return static_cast<uint32_t>(bits >> 32); }
  constexpr uint32_t thread() const { return (bits >> 22) & 0x3ff; }
  constexpr uint32_t clock() const { return (bits >> 1) & 0x1fffff; }
  constexpr bool atomic() const { return (bits & 1) != 0; }
  constexpr uint64_t block_and_thread() const { return bits >> 22; }
};

// States of a byte that no thread has written.
enum ByteState : uint64_t { no_buffer, unwritten, read_only, written_by_host, in_flight };

inline constexpr size_t kArenaBytes = size_t{1} << 30;

extern char* arena;  // null before the first use

// Global buffers, for the bindings. `misalignment`: bytes by which the start misses a multiple of
// 256.
void* allocate(const std::string& name, size_t bytes, ByteState state, size_t misalignment,
               uint8_t poison);
void free_buffer(void* buffer);
void free_all();
uint64_t generation();  // how often all was freed
void set_buffer(void* buffer, const std::string& name, ByteState state);
void set_state(void* data, size_t bytes, ByteState state);
// Host code is not instrumented: what no thread has written and is not poison any more, it wrote,
// and the rest of that buffer with it.
void adopt_host_writes(uint8_t poison);
size_t count_unwritten(const void* buffer, size_t bytes);

// Shared memory: forgotten with a launch, unwritten again with a block.
void begin_launch(size_t dynamic_bytes);
void begin_block();
bool in_shared(const void* pointer);

// Accesses of the running thread to the arena. All fail() on a mistake.
void check_read(const void* pointer, size_t bytes, const Site& site);
void check_write(void* pointer, size_t bytes, const Site& site);
// For copies that were checked when they were issued: under way, done.
void set_in_flight(void* pointer, size_t bytes);
void mark_written(void* pointer, size_t bytes);

}  // namespace flexvar::emulation
