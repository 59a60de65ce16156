// What the compiler calls from a kernel's code. The bindings are compiled with -fsanitize=thread,
// which puts a call before every load and store, and with checks of -fsanitize=undefined; instead
// of the sanitizers' own runtimes these functions take the calls.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "testing/scheduler.h"

// First and last address of this module.
extern "C" {
__attribute__((visibility("hidden"))) extern const char __ehdr_start;
__attribute__((visibility("hidden"))) extern const char _end;
}

namespace flexvar::emulation {

namespace {

bool within(const void* pointer, const void* start, size_t bytes) {
  return static_cast<size_t>(static_cast<const char*>(pointer) - static_cast<const char*>(start)) <
         bytes;
}

__attribute__((noinline)) void check_host_access(const void* pointer, size_t bytes, bool writes,
                                                 const void* instruction) {
  if (within(pointer, current->stack, kStackBytes)) return;
  const auto image_bytes = static_cast<size_t>(&_end - &__ehdr_start);
  if (!writes && (within(pointer, &__ehdr_start, image_bytes) ||
                  within(pointer, block.parameters, block.parameter_bytes))) {
    return;
  }
  char address[32];
  std::snprintf(address, sizeof(address), "%p", pointer);
  fail(std::string("out of bounds: ") + (writes ? "writes " : "reads ") + std::to_string(bytes) +
       " bytes at " + address + ", which is no device memory, " + to_string(Site{instruction, {}}));
}

inline void read(const void* pointer, size_t bytes, const void* instruction) {
  if (current == nullptr) return;
  if (within(pointer, arena, kArenaBytes)) {
    check_read(pointer, bytes, {instruction, {}});
  } else {
    check_host_access(pointer, bytes, false, instruction);
  }
}

inline void write(void* pointer, size_t bytes, const void* instruction) {
  if (current == nullptr) return;
  if (within(pointer, arena, kArenaBytes)) {
    check_write(pointer, bytes, {instruction, {}});
  } else {
    check_host_access(pointer, bytes, true, instruction);
  }
}

// Source line of an instruction, as far as the debug information and binutils tell.
std::string look_up(const void* instruction) {
  Dl_info info;
  if (dladdr(instruction, &info) == 0) return "at an unknown place";
  const auto offset =
      static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase);
  char command[4096], line[1024] = "";
  // One before the return address: within the call.
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%llx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long long>(offset - 1));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = '\0';
    pclose(pipe);
  }
  std::string text = line;
  text = text.substr(0, text.find_first_of(" \n"));  // without "(discriminator 2)"
  if (!text.empty() && text[0] != '?') return text;
  std::snprintf(line, sizeof(line), "at instruction 0x%llx",
                static_cast<unsigned long long>(offset));
  return line;
}

// The start of every sanitizer's data.
struct SourcePosition {
  const char* file;
  uint32_t line, column;
};

// Host code of the bindings is not ours to judge: Python's headers index past declared arrays.
void undefined_behaviour(const char* what, const void* data) {
  if (current == nullptr) return;
  const auto& position = *static_cast<const SourcePosition*>(data);
  std::string file = position.file == nullptr ? "?" : position.file;
  file = file.substr(file.find_last_of('/') + 1);
  fail(std::string(what) + ", " + file + ":" + std::to_string(position.line));
}

}  // namespace

std::string to_string(const Location& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

std::string to_string(const Site& site) {
  return site.instruction == nullptr ? to_string(site.where) : look_up(site.instruction);
}

}  // namespace flexvar::emulation

using flexvar::emulation::read;
using flexvar::emulation::undefined_behaviour;
using flexvar::emulation::write;

extern "C" {

void __tsan_init() {}

#define FLEXVAR_ACCESS(bytes)                                                                 \
  void __tsan_read##bytes(void* p) { read(p, bytes, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* p) { write(p, bytes, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##bytes(void* p) { read(p, bytes, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { write(p, bytes, __builtin_return_address(0)); }
FLEXVAR_ACCESS(1)
FLEXVAR_ACCESS(2)
FLEXVAR_ACCESS(4)
FLEXVAR_ACCESS(8)
FLEXVAR_ACCESS(16)
#undef FLEXVAR_ACCESS

void __tsan_read_range(void* p, size_t bytes) { read(p, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { write(p, bytes, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Host code of the bindings only: kernels have atomicAdd and the like.
#define FLEXVAR_ATOMIC(bits)                                                                       \
  using Atomic##bits = uint##bits##_t;                                                             \
  Atomic##bits __tsan_atomic##bits##_load(const volatile Atomic##bits* p, int) {                   \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile Atomic##bits* p, Atomic##bits value, int) {            \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                \
  Atomic##bits __tsan_atomic##bits##_exchange(volatile Atomic##bits* p, Atomic##bits value, int) { \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                \
  Atomic##bits __tsan_atomic##bits##_fetch_add(volatile Atomic##bits* p, Atomic##bits v, int) {    \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  Atomic##bits __tsan_atomic##bits##_fetch_sub(volatile Atomic##bits* p, Atomic##bits v, int) {    \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(                                               \
      volatile Atomic##bits* p, Atomic##bits* expected, Atomic##bits value, int, int) {            \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,                \
                                       __ATOMIC_SEQ_CST);                                          \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(                                                 \
      volatile Atomic##bits* p, Atomic##bits* expected, Atomic##bits value, int, int) {            \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, value, 0, 0);                \
  }
FLEXVAR_ATOMIC(8)
FLEXVAR_ATOMIC(32)
FLEXVAR_ATOMIC(64)
#undef FLEXVAR_ATOMIC

void __ubsan_handle_type_mismatch_v1(void* data, void*) {
  undefined_behaviour("misaligned or null access", data);
}
void __ubsan_handle_out_of_bounds(void* data, void* index) {
  const std::string what =
      "out of bounds: index " + std::to_string(reinterpret_cast<intptr_t>(index)) + " of an array";
  undefined_behaviour(what.c_str(), data);
}
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
  undefined_behaviour("shift by more than the width", data);
}
void __ubsan_handle_divrem_overflow(void* data, void*, void*) {
  undefined_behaviour("division by zero or overflow", data);
}
void __ubsan_handle_add_overflow(void* data, void*, void*) {
  undefined_behaviour("integer overflow", data);
}
void __ubsan_handle_sub_overflow(void* data, void*, void*) {
  undefined_behaviour("integer overflow", data);
}
void __ubsan_handle_mul_overflow(void* data, void*, void*) {
  undefined_behaviour("integer overflow", data);
}
void __ubsan_handle_negate_overflow(void* data, void*) {
  undefined_behaviour("integer overflow", data);
}
void __ubsan_handle_load_invalid_value(void* data, void*) {
  undefined_behaviour("a bool or enum that holds no such value", data);
}

}  // extern "C"
