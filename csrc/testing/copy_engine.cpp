// Barriers in shared memory and the copy engine. A box moves when somebody waits for its phase, the
// latest moment that hardware may choose; until then the destination holds poison.
#include <cstring>
#include <string>

#include "common/swizzle.h"
#include "testing/scheduler.h"

namespace flexvar::emulation {

namespace {

constexpr size_t kBarrierBytes = 8, kChunkBytes = 16, kBoxElements = 64;

// Which threads may use a barrier is found like a race on its bytes.
MemoryBarrier& barrier_at(void* address, Location where) {
  const auto found = block.memory_barriers.find(address);
  if (found == block.memory_barriers.end()) {
    fail("mbarrier: there is none at this address, " + to_string(where));
  }
  check_read(address, kBarrierBytes, {nullptr, where});
  return found->second;
}

bool may_end(const MemoryBarrier& barrier) {
  return barrier.missing == 0 && barrier.expected_bytes == barrier.issued_bytes;
}

// The current thread moves what is to be moved, as the engine would have.
void end_phase(MemoryBarrier& barrier) {
  for (const AsyncCopy& copy : barrier.copies) {
    if (copy.global == nullptr) {
      std::memset(copy.shared, 0, copy.bytes);
    } else {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
    mark_written(copy.shared, copy.bytes);
  }
  if (!barrier.copies.empty()) barrier.arrived.push_back(publish(*current));
  for (Fiber* fiber : barrier.waiting) {
    meet({fiber}, barrier.arrived);
    make_runnable(*fiber);
  }
  barrier.arrived_before = std::move(barrier.arrived);
  barrier.arrived.clear();
  barrier.copies.clear();
  barrier.waiting.clear();
  barrier.missing = barrier.arrivals;
  barrier.expected_bytes = barrier.issued_bytes = 0;
  barrier.parity ^= 1;
}

// With copies, only where somebody waits for them.
void end_phase_in_time(MemoryBarrier& barrier) {
  if (may_end(barrier) && (barrier.copies.empty() || !barrier.waiting.empty())) end_phase(barrier);
}

}  // namespace

void mbarrier_init(void* address, int arrivals, Location where) {
  if (!in_shared(address) || reinterpret_cast<uintptr_t>(address) % kBarrierBytes != 0 ||
      arrivals < 1 || block.memory_barriers.contains(address)) {
    fail(
        "mbarrier_init: 8 aligned bytes of shared memory without a barrier, for 1 arrival or "
        "more, " +
        to_string(where));
  }
  check_write(address, kBarrierBytes, {nullptr, where});
  MemoryBarrier& barrier = block.memory_barriers[address];
  barrier.arrivals = barrier.missing = arrivals;
}

void mbarrier_end(void* address, Location where) {
  const MemoryBarrier& barrier = barrier_at(address, where);
  check_write(address, kBarrierBytes, {nullptr, where});
  if (!barrier.copies.empty() || !barrier.waiting.empty()) {
    fail("mbarrier_end: the barrier is in use, " + to_string(where));
  }
  block.memory_barriers.erase(address);
}

void mbarrier_arrive(void* address, int64_t expected_bytes, Location where) {
  MemoryBarrier& barrier = barrier_at(address, where);
  if (may_end(barrier)) end_phase(barrier);  // the engine has been quick
  if (barrier.missing == 0) {
    fail("mbarrier_arrive: more arrivals than the barrier was made for, " + to_string(where));
  }
  --barrier.missing;
  barrier.expected_bytes += expected_bytes;
  barrier.arrived.push_back(publish(*current));
  end_phase_in_time(barrier);
}

void mbarrier_wait(void* address, int parity, Location where) {
  MemoryBarrier& barrier = barrier_at(address, where);
  if (parity != 0 && parity != 1) fail("mbarrier_wait: a parity of 0 or 1, " + to_string(where));
  if (parity == barrier.parity) {
    if (!may_end(barrier)) {
      barrier.waiting.push_back(current);
      wait("mbarrier_wait", 0, where);
      return;
    }
    end_phase(barrier);
  }
  meet({current}, barrier.arrived_before);
}

void copy_box(void* shared, const TensorMap& map, int row, int head, int image, void* address,
              Location where) {
  const Site site{nullptr, where};
  MemoryBarrier& barrier = barrier_at(address, where);
  if (!in_shared(shared) || reinterpret_cast<uintptr_t>(shared) % 1024 != 0) {
    fail("copy_box: the destination must be shared memory at a multiple of 1024 bytes, " +
         to_string(where));
  }
  const bool is_inside = head >= 0 && head < map.heads && image >= 0 && image < map.images;
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t from = int64_t{row} + r;
    const bool is_there = is_inside && from >= 0 && from < map.rows;
    const char* source =
        map.data + image * map.image_bytes + head * map.head_bytes + from * map.row_bytes;
    char* target = static_cast<char*>(shared) + r * kBoxElements * 2;
    if (is_there) check_read(source, map.elements * 2, site);
    check_write(target, kBoxElements * 2, site);
    set_in_flight(target, kBoxElements * 2);
    for (size_t column = 0; column < kBoxElements; column += 8) {
      barrier.copies.push_back(
          {target + ptx::swizzled_column(r, static_cast<int>(column)) * 2,
           is_there && static_cast<int64_t>(column) < map.elements ? source + column * 2 : nullptr,
           kChunkBytes});
    }
  }
  barrier.issued_bytes += int64_t{map.box_rows} * kBoxElements * 2;
  if (barrier.issued_bytes > barrier.expected_bytes) {
    fail("copy_box: more bytes than the barrier was told to expect, " + to_string(where));
  }
  end_phase_in_time(barrier);
}

}  // namespace flexvar::emulation
