// Changes stacks: saves what a function call must preserve, then continues another stack where it
// was saved. On x86-64 a few instructions; elsewhere ucontext, which also saves the signal mask.
#pragma once

#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>

#include <deque>
#endif

namespace flexvar::emulation {

#ifdef __x86_64__

extern "C" void flexvar_switch_stack(void** save, void* load);
asm(R"(
.text
.local flexvar_switch_stack
.type flexvar_switch_stack, @function
flexvar_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flexvar_switch_stack, .-flexvar_switch_stack
)");

inline void switch_stack(void** save, void* load) { flexvar_switch_stack(save, load); }

// A stack that starts in `entry`, which must not return.
inline void* new_stack(char* low, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(low + bytes);
  *--top = 0;  // the return address of `entry`; also aligns its frame
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}

#else

inline void switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

inline void* new_stack(char* low, size_t bytes, void (*entry)()) {
  auto* context = new (low) ucontext_t;  // at the low end of its own stack
  getcontext(context);
  context->uc_stack.ss_sp = low + sizeof(ucontext_t);
  context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

}  // namespace flexvar::emulation
