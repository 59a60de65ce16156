#include "testing/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "testing/scheduler.h"

namespace flexvar::emulation {

char* arena = nullptr;

namespace {

// Records, one per byte of the arena each: the last writer (or a ByteState), and the last two
// readers that are different threads. Two readers suffice to convict any one writer.
uint64_t* writers;
uint64_t* readers;
uint64_t* other_readers;

struct Buffer {
  std::string name;
  size_t offset, bytes;
};
std::vector<Buffer> buffers;  // global ones, by offset

// The shared memory of the block has its own range at the end of the arena.
constexpr size_t kSharedStart = kArenaBytes - (size_t{1} << 20);
constexpr size_t kBufferGap = size_t{1} << 16, kSharedGap = 1024;
size_t arena_used = kBufferGap;
uint64_t times_freed;

struct StaticObject {
  const void* key;
  std::string name;
  size_t offset, bytes;
};
std::vector<StaticObject> static_objects;
size_t shared_used;
size_t dynamic_shared_bytes;

void* reserve(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw KernelError("emulation: cannot reserve address space");
  return start;
}

void ensure_arena() {
  if (arena != nullptr) return;
  writers = static_cast<uint64_t*>(reserve(kArenaBytes * sizeof(uint64_t)));
  readers = static_cast<uint64_t*>(reserve(kArenaBytes * sizeof(uint64_t)));
  other_readers = static_cast<uint64_t*>(reserve(kArenaBytes * sizeof(uint64_t)));
  arena = static_cast<char*>(reserve(kArenaBytes));
}

// Gives the pages back: they read as zero afterwards.
void discard(size_t start, size_t end) {
  madvise(arena + start, end - start, MADV_DONTNEED);
  for (uint64_t* records : {writers, readers, other_readers}) {
    madvise(records + start, (end - start) * sizeof(uint64_t), MADV_DONTNEED);
  }
}

size_t offset_of(const void* pointer) {
  return static_cast<size_t>(static_cast<const char*>(pointer) - arena);
}

Buffer& buffer_at(const void* start) {
  const size_t offset = offset_of(start);
  const auto found = std::find_if(buffers.begin(), buffers.end(),
                                  [&](const Buffer& b) { return b.offset == offset; });
  if (found == buffers.end()) throw KernelError("emulation: no buffer starts there");
  return *found;
}

bool is_epoch(uint64_t record) { return record >> 32 != 0; }

std::string bytes_text(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

// Where an address lies, in words: the buffer that holds it or the nearest one.
std::string describe_address(size_t offset) {
  std::string best = "outside all buffers";
  size_t best_distance = SIZE_MAX;
  const auto consider = [&](const std::string& name, size_t start, size_t bytes) {
    const size_t distance = offset < start            ? start - offset
                            : offset >= start + bytes ? offset - (start + bytes) + 1
                                                      : 0;
    if (distance >= best_distance) return;
    best_distance = distance;
    if (distance == 0) {
      best = "at byte " + std::to_string(offset - start) + " of " + name;
    } else if (offset < start) {
      best = bytes_text(distance) + " before " + name;
    } else {
      best = (distance == 1 ? "right" : bytes_text(distance - 1)) + " behind the end of " + name;
    }
    best += " (" + bytes_text(bytes) + ")";
  };
  for (const Buffer& buffer : buffers) {
    consider("buffer '" + buffer.name + "'", buffer.offset, buffer.bytes);
  }
  for (const StaticObject& object : static_objects) {
    consider("shared storage " + object.name, object.offset, object.bytes);
  }
  if (dynamic_shared_bytes != 0)
    consider("dynamic shared memory", kSharedStart, dynamic_shared_bytes);
  return best;
}

std::string describe_epoch(Epoch epoch) {
  if (epoch.block() == block.number) return describe(block.fibers[epoch.thread()]);
  if (epoch.block() < block.first_number) return "a thread of an earlier launch";
  return "a thread of block number " + std::to_string(epoch.block() - block.first_number);
}

enum class Access { read, write, atomic };

[[noreturn]] __attribute__((noinline)) void report(Access access, size_t offset, size_t bytes,
                                                   uint64_t record, const char* earlier,
                                                   const Site& site) {
  const char* verb = access == Access::read    ? "reads "
                     : access == Access::write ? "writes "
                                               : "atomically updates ";
  std::string message =
      verb + bytes_text(bytes) + " " + describe_address(offset) + ", " + to_string(site) + ": ";
  switch (record) {
    case no_buffer:
      message = "out of bounds: " + message + "nothing is there";
      break;
    case unwritten:
      message = "uninitialised: " + message + "nobody has written there";
      break;
    case read_only:
      message = "write to an input: " + message + "the buffer is read-only";
      break;
    case in_flight:
      message = "too early: " + message + "a copy to it is under way";
      break;
    default:
      message = "race: " + message + describe_epoch({record}) + " " + earlier +
                " it with no barrier in between";
  }
  fail(message);
}

void make_unwritten(size_t offset, size_t bytes) {
  std::fill_n(writers + offset, bytes, uint64_t{unwritten});
  std::fill_n(readers + offset, bytes, uint64_t{0});
  std::fill_n(other_readers + offset, bytes, uint64_t{0});
  std::memset(arena + offset, options.poison, bytes);
}

bool in_order(uint64_t record, bool atomic) {
  const Epoch epoch{record};
  const Epoch mine = Epoch::of(block.number, current->id, current->clock, false);
  if (epoch.block_and_thread() == mine.block_and_thread()) return true;
  if (atomic && epoch.atomic()) return true;
  return happened_before(epoch);
}

// The first byte whose record is not `expected`; `bytes` when all are.
size_t first_other(const uint64_t* records, size_t bytes, uint64_t expected) {
  uint64_t difference = 0;
  for (size_t i = 0; i < bytes; ++i) difference |= records[i] ^ expected;
  if (difference == 0) return bytes;
  size_t i = 0;
  while (records[i] == expected) ++i;
  return i;
}

// Calls check(record, i) for every run of equal records.
template <class Check>
void for_each_run(const uint64_t* records, size_t bytes, Check check) {
  for (size_t i = 0; i < bytes;) {
    const uint64_t record = records[i];
    check(record, i);
    i += first_other(records + i, bytes - i, record);
  }
}

// `Bytes`: size_t or a constant.
template <class Bytes>
inline void check_read_of(size_t offset, Bytes bytes, const Site& site) {
  const uint64_t* written = writers + offset;
  uint64_t* last = readers + offset;
  uint64_t* other = other_readers + offset;
  const uint64_t mine = Epoch::of(block.number, current->id, current->clock, false).bits;
  const uint64_t record = written[0];
  const bool fine =
      is_epoch(record) ? in_order(record, false) : record == read_only || record == written_by_host;
  uint64_t difference = 0, reader_difference = 0;
  for (size_t i = 0; i < bytes; ++i) {
    difference |= written[i] ^ record;
    reader_difference |= last[i] ^ mine;
  }
  if (!fine || difference != 0) {
    for_each_run(written, bytes, [&](uint64_t record, size_t i) {
      const bool fine = is_epoch(record) ? in_order(record, false)
                                         : record == read_only || record == written_by_host;
      if (!fine) report(Access::read, offset + i, bytes - i, record, "wrote", site);
    });
  }
  if (reader_difference == 0) return;
  for (size_t i = 0; i < bytes; ++i) {
    const bool same_thread = Epoch{last[i] ^ mine}.block_and_thread() == 0;
    other[i] = same_thread ? other[i] : last[i];
    last[i] = mine;
  }
}

void check_update(char* pointer, size_t bytes, const Site& site, Access access) {
  const size_t offset = offset_of(pointer);
  const bool atomic = access == Access::atomic;
  for_each_run(writers + offset, bytes, [&](uint64_t record, size_t i) {
    const bool fine = is_epoch(record) ? in_order(record, atomic)
                      : atomic         ? record == written_by_host
                                       : record == written_by_host || record == unwritten;
    if (!fine) report(access, offset + i, bytes - i, record, atomic ? "writes" : "wrote", site);
  });
  for (const uint64_t* records : {readers, other_readers}) {
    for_each_run(records + offset, bytes, [&](uint64_t record, size_t i) {
      if (is_epoch(record) && !in_order(record, false)) {
        report(access, offset + i, bytes - i, record, "read", site);
      }
    });
  }
  const Epoch mine = Epoch::of(block.number, current->id, current->clock, atomic);
  std::fill_n(writers + offset, bytes, mine.bits);
}

}  // namespace

void* allocate(const std::string& name, size_t bytes, ByteState state, size_t misalignment,
               uint8_t poison) {
  ensure_arena();
  const size_t offset = (arena_used + 255) / 256 * 256 + misalignment;
  if (offset + bytes + kBufferGap > kSharedStart) {
    throw KernelError("emulation: more device memory than the " + std::to_string(kSharedStart) +
                      " bytes there are");
  }
  arena_used = offset + bytes + kBufferGap;
  buffers.push_back({name, offset, bytes});
  std::fill_n(writers + offset, bytes, static_cast<uint64_t>(state));
  std::memset(arena + offset, poison, bytes);
  return arena + offset;
}

void free_all() {
  ++times_freed;
  if (arena == nullptr) return;
  discard(0, arena_used);
  arena_used = kBufferGap;
  buffers.clear();
}

uint64_t generation() { return times_freed; }

void set_buffer(void* pointer, const std::string& name, ByteState state) {
  Buffer& buffer = buffer_at(pointer);
  buffer.name = name;
  set_state(pointer, buffer.bytes, state);
}

void free_buffer(void* pointer) {
  set_buffer(pointer, buffer_at(pointer).name + ", freed", no_buffer);
}

void set_state(void* data, size_t bytes, ByteState state) {
  std::fill_n(writers + offset_of(data), bytes, static_cast<uint64_t>(state));
}

void adopt_host_writes(uint8_t poison) {
  for (const Buffer& buffer : buffers) {
    uint64_t* records = writers + buffer.offset;
    const auto* bytes = reinterpret_cast<const uint8_t*>(arena + buffer.offset);
    bool written = false;
    for (size_t i = 0; i < buffer.bytes && !written; ++i) {
      written = records[i] == unwritten && bytes[i] != poison;
    }
    if (written) {
      std::replace(records, records + buffer.bytes, uint64_t{unwritten}, uint64_t{written_by_host});
    }
  }
}

size_t count_unwritten(const void* buffer, size_t bytes) {
  const uint64_t* records = writers + offset_of(buffer);
  return static_cast<size_t>(std::count(records, records + bytes, uint64_t{unwritten}));
}

bool in_shared(const void* pointer) {
  const size_t offset = offset_of(pointer);
  return offset >= kSharedStart && offset < kArenaBytes;
}

void begin_launch(size_t dynamic_bytes) {
  ensure_arena();
  if (dynamic_bytes > options.shared_memory) {
    throw KernelError("launch: " + std::to_string(dynamic_bytes) +
                      " bytes of dynamic shared memory, a block has at most " +
                      std::to_string(options.shared_memory));
  }
  discard(kSharedStart, kArenaBytes);
  static_objects.clear();
  dynamic_shared_bytes = shared_used = dynamic_bytes;
}

void begin_block() {
  make_unwritten(kSharedStart, dynamic_shared_bytes);
  for (const StaticObject& object : static_objects) make_unwritten(object.offset, object.bytes);
}

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* type_name) {
  for (const StaticObject& object : static_objects) {
    if (object.key == key) return arena + object.offset;
  }
  const size_t gaps = kSharedGap * (static_objects.size() + 1);
  const size_t offset = (kSharedStart + shared_used + gaps + alignment - 1) / alignment * alignment;
  shared_used += bytes;
  // Dynamic shared memory lies behind the static one, at a multiple of 128 bytes.
  const size_t gap = dynamic_shared_bytes == 0 ? 0 : (dynamic_shared_bytes - shared_used) % 128;
  if (shared_used + gap > options.shared_memory) {
    fail("shared memory: " + std::to_string(shared_used + gap) + " bytes, a block has at most " +
         std::to_string(options.shared_memory));
  }
  // "... [with T = Tile]"
  std::string name = type_name;
  name = name.substr(name.find("T = ") + 4);
  name.pop_back();
  static_objects.push_back({key, name, offset, bytes});
  make_unwritten(offset, bytes);
  return arena + offset;
}

void* dynamic_shared_memory() {
  if (dynamic_shared_bytes == 0) fail("dynamic shared memory: the launch asked for none");
  return arena + kSharedStart;
}

void check_read(const void* pointer, size_t bytes, const Site& site) {
  const size_t offset = offset_of(pointer);
  // Common sizes, so that the loops unroll.
  switch (bytes) {
    case 2:
      return check_read_of(offset, std::integral_constant<size_t, 2>(), site);
    case 4:
      return check_read_of(offset, std::integral_constant<size_t, 4>(), site);
    case 16:
      return check_read_of(offset, std::integral_constant<size_t, 16>(), site);
    default:
      return check_read_of(offset, bytes, site);
  }
}

void check_write(void* pointer, size_t bytes, const Site& site) {
  check_update(static_cast<char*>(pointer), bytes, site, Access::write);
}

void check_atomic(void* pointer, size_t bytes, Location where) {
  if (offset_of(pointer) >= kArenaBytes) fail("atomic outside all buffers, " + to_string(where));
  check_update(static_cast<char*>(pointer), bytes, {nullptr, where}, Access::atomic);
  order_by_atomic(pointer);
}

void set_in_flight(void* pointer, size_t bytes) {
  std::fill_n(writers + offset_of(pointer), bytes, uint64_t{in_flight});
  std::memset(pointer, options.poison, bytes);
}

void mark_written(void* pointer, size_t bytes) {
  const Epoch mine = Epoch::of(block.number, current->id, current->clock, false);
  std::fill_n(writers + offset_of(pointer), bytes, mine.bits);
}

}  // namespace flexvar::emulation
