// The threads of a CUDA block as fibers of one operating-system thread, and the scheduler that runs them.
//
// Blocks run one after another. A fiber runs until it needs the others of its warp (a warp collective), of its block
// (sync_block) or a bulk load (mbar_wait); then the next fiber of the warp runs, then the next warp. The order is fixed, so
// every run gives the same bits; Launch::reverse turns it round, which shows code that only works because of the order.
// Every rule that a kernel breaks ends the launch with a message (fail), never the process.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__) || defined(TQ_UCONTEXT)
#include <ucontext.h>
#endif

struct Dim {
  uint32_t x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32, MAX_COPIES = 128, MAX_BARRIERS = 256;
constexpr size_t STACK = 128 << 10, SHARED_ROOM = 256 << 10, CANARY = 4096;
#ifdef TQ_NO_BULK
constexpr uint32_t SHARED_LIMIT = 163 << 10;  // what a block of compute capability 8.0 may have
#else
constexpr uint32_t SHARED_LIMIT = 227 << 10;  // compute capability 9.0 and 10.0
#endif
#define UNCHECKED __attribute__((no_sanitize("undefined")))  // hot code of the emulator itself
constexpr uint8_t POISON = 0xFF, GUARD = 0xC5;

struct Launch {
  uint32_t grid[3], block, shared, reverse;
};
struct Op {  // a warp collective: run gets the arguments of all 32 lanes and writes their results
  const char* name;
  void (*run)(void** lanes);
};
struct Warp {
  uint32_t runnable, arrived, done;  // bit masks of lanes
  const Op* op;                      // what the arrived lanes wait in
  bool at_barrier;                   // all lanes are in sync_block
  void* args[32];
};
struct Copy {
  void* to;
  const void* from;
  int group;
};
struct Thread {  // state of cp.async, and the barrier that the thread waits for
  int copies, groups;
  const void* waits;
  Copy copy[MAX_COPIES];
};
struct Load {
  void* to;
  const void* from;
  uint32_t bytes;
};
struct Barrier {
  uint64_t* at;
  uint32_t parity;
  int owner, loads;  // the thread that initialised it; copies of the present phase
  bool fenced;
  Load load[2];
};

// ---- switching stacks ----

#if defined(__x86_64__) && !defined(TQ_UCONTEXT)
typedef void* Context;  // the stack pointer; the registers that calls preserve are on the stack
extern "C" void tq_switch_stack(Context* from, Context to) __asm__("tq_switch_stack");
__asm__(
    ".text\n"
    "tq_switch_stack:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
    "popq %rcx\n jmp *%rcx\n");  // not ret: its prediction expects the caller of this stack
UNCHECKED inline void switch_context(Context& from, Context& to) { tq_switch_stack(&from, to); }
inline void make_context(Context& c, uint8_t*, uint8_t* top, void (*entry)()) {
  uint64_t* sp = (uint64_t*)top;  // a multiple of 16, so that entry sees the alignment that a call leaves
  *--sp = 0;
  *--sp = (uint64_t)entry;
  for (int i = 0; i < 6; i++) *--sp = 0;
  c = sp;
}
#else
typedef ucontext_t Context;
UNCHECKED inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& c, uint8_t* bottom, uint8_t* top, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = bottom;
  c.uc_stack.ss_size = (size_t)(top - bottom);
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
#endif

// ---- state ----

static Launch launch_now;
static const char* kernel_name;
static void (*kernel_body)(const void*);
static const void* kernel_params;
static Warp warps[MAX_WARPS];
static Thread threads[MAX_THREADS];
static Barrier barriers[MAX_BARRIERS];
static Context contexts[MAX_THREADS], main_context;
static uint8_t *stacks, *shared_room, *shared_base;
static size_t stacks_size;
static int current = -1;  // the running fiber; -1 outside of kernels
static int warp_count, live_warps, waiting_warps, barrier_count;
static pthread_t runner;
static char message[2048];

// ---- errors ----

static int say(int at, const char* format, ...) __attribute__((format(printf, 2, 3)));
static int say(int at, const char* format, ...) {
  if (at >= (int)sizeof message - 1) return at;
  va_list list;
  va_start(list, format);
  at += vsnprintf(message + at, sizeof message - at, format, list);
  va_end(list);
  return at;
}
static int say_where() {
  int at = say(0, "%s, block (%u, %u, %u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
  if (current >= 0) at = say(at, ", thread %d (warp %d, lane %d)", current, current / 32, current % 32);
  return say(at, ": ");
}
[[noreturn]] static void leave() {  // give up the launch; message is set
  static Context dropped;
  switch_context(dropped, main_context);
  __builtin_unreachable();
}
#define TQ_FAIL(...) (emu::say(emu::say_where(), __VA_ARGS__), emu::leave())

static void say_warps(int at) {
  for (int i = 0; i < warp_count; i++) {
    const Warp& w = warps[i];
    uint32_t loads = 0;
    for (int lane = 0; lane < 32; lane++) loads |= (uint32_t)(threads[i * 32 + lane].waits != nullptr) << lane;
    if (w.arrived) at = say(at, "; warp %d lanes %08x wait in %s", i, w.arrived, w.op->name);
    if (loads) at = say(at, "; warp %d lanes %08x wait in mbar_wait for a bulk load that nobody issued", i, loads);
    if (w.done) at = say(at, "; warp %d lanes %08x ended", i, w.done);
  }
}

// ---- scheduler ----

UNCHECKED inline void run_fiber(int next) {
  const int before = current;
  if (next == before) return;
  current = next;
  threadIdx.x = (uint32_t)next;
  switch_context(contexts[before], contexts[next]);
}

inline void wake(const void* barrier) {  // the threads that wait for it go on
  for (int i = 0; i < warp_count * 32; i++)
    if (threads[i].waits == barrier) {
      threads[i].waits = nullptr;
      warps[i >> 5].runnable |= 1u << (i & 31);
    }
}

static bool finish_load() {  // of the first barrier that somebody waits for
  for (int i = 0; i < warp_count * 32; i++)
    for (int j = 0; j < barrier_count; j++) {
      Barrier& b = barriers[j];
      if (threads[i].waits != b.at || !b.loads) continue;
      for (int k = 0; k < b.loads; k++) memcpy(b.load[k].to, b.load[k].from, b.load[k].bytes);
      b.loads = 0;
      b.parity ^= 1;
      wake(b.at);
      return true;
    }
  return false;
}

UNCHECKED static void yield() {  // run another fiber; returns when this one is chosen again
  const int lane = current & 31;
  int warp = current >> 5;
  const uint32_t r = warps[warp].runnable;
  if (r) {
    const uint32_t turned = (r >> lane) | (lane ? r << (32 - lane) : 0);  // bit 0 is this lane
    const uint32_t others = turned & ~1u;
    const int step = !others ? 0 : launch_now.reverse ? 31 - __builtin_clz(others) : __builtin_ctz(others);
    return run_fiber((warp << 5) | ((lane + step) & 31));
  }
  for (int i = 1; i < warp_count; i++) {
    warp = launch_now.reverse ? (warp ? warp - 1 : warp_count - 1) : (warp + 1 == warp_count ? 0 : warp + 1);
    const uint32_t ready = warps[warp].runnable;
    if (ready) return run_fiber((warp << 5) | (launch_now.reverse ? 31 - __builtin_clz(ready) : __builtin_ctz(ready)));
  }
  if (finish_load()) return yield();
  say_warps(say(say_where(), "no thread of the block can go on"));
  leave();
}

[[noreturn]] static void diverged(const Warp& w, const char* reached) {
  int at = say_where();
  at = say(at, "diverged warp: this lane reached %s", reached);
  if (w.arrived) at = say(at, ", lanes %08x wait in %s", w.arrived, w.op->name);
  if (w.done) at = say(at, ", lanes %08x ended", w.done);
  leave();
}

// True for the lane that arrives last: it does the work of the operation. The others return when it is done.
UNCHECKED inline bool arrive(const Op& op, void* args) {
  Warp& w = warps[current >> 5];
  const uint32_t bit = 1u << (current & 31);
  if (w.done || (w.arrived && w.op != &op)) diverged(w, op.name);
  w.op = &op;
  w.args[current & 31] = args;
  w.arrived |= bit;
  w.runnable &= ~bit;
  if (w.arrived == ~0u) return true;
  yield();
  return false;
}

UNCHECKED static void collective(const Op& op, void* args) {
  if (!arrive(op, args)) return;
  Warp& w = warps[current >> 5];
  op.run(w.args);
  w.arrived = 0;
  w.runnable = ~0u;
}

static void release_block() {
  for (int i = 0; i < warp_count; i++)
    if (warps[i].at_barrier) {
      warps[i].at_barrier = false;
      warps[i].arrived = 0;
      warps[i].runnable = ~0u;
    }
  waiting_warps = 0;
}

static const Op op_sync_block = {"sync_block", nullptr};

static void block_barrier() {
  if (!arrive(op_sync_block, nullptr)) return;
  warps[current >> 5].at_barrier = true;
  if (++waiting_warps == live_warps) return release_block();
  yield();
}

static void fiber_main() {
  kernel_body(kernel_params);
  Warp& w = warps[current >> 5];
  const uint32_t bit = 1u << (current & 31);
  if (w.arrived) diverged(w, "the end of the kernel");
  w.done |= bit;
  w.runnable &= ~bit;
  if (w.done == ~0u) {  // warps that ended no longer count in sync_block
    if (--live_warps == 0) leave();
    if (waiting_warps == live_warps) release_block();
  }
  yield();
  __builtin_unreachable();
}

// ---- launch ----

static void on_fault(int signal, siginfo_t* info, void*) {
  if (current < 0 || !pthread_equal(pthread_self(), runner)) {  // not ours: let it strike again with the default action
    ::signal(signal, SIG_DFL);
    return;
  }
  if (signal == SIGFPE) TQ_FAIL("integer division by zero");
  const intptr_t offset = (intptr_t)info->si_addr - (intptr_t)shared_base;
  if (offset >= -(intptr_t)SHARED_ROOM && offset < (intptr_t)SHARED_ROOM)
    TQ_FAIL("access outside of shared memory, at byte %ld of %u", (long)offset, launch_now.shared);
  TQ_FAIL("invalid memory access at address %p", info->si_addr);
}

inline uint8_t* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (uint8_t*)p;
}

static const char* prepare(const Launch& l, uint32_t bound) {
  if (l.block == 0 || l.block % 32 || l.block > MAX_THREADS) return "the block size must be a multiple of 32 up to 1024";
  if (l.block > bound) return "the block size is above the kernel's launch bound";
  if (!l.grid[0] || !l.grid[1] || !l.grid[2] || l.grid[0] > 0x7FFFFFFF || l.grid[1] > 65535 || l.grid[2] > 65535)
    return "the grid must be 1 or more in each direction, up to 2^31 - 1, 65535 and 65535";
  if (l.shared > SHARED_LIMIT) return "more shared memory than a block may have";
  if (l.block * STACK > stacks_size) {
    if (stacks) munmap(stacks, stacks_size);
    stacks_size = l.block * STACK;
    if (!(stacks = reserve(stacks_size))) return stacks_size = 0, "out of memory";
  }
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (!shared_room) {  // between two pages that may not be touched
    if (!(shared_room = reserve(SHARED_ROOM + 2 * page))) return "out of memory";
    mprotect(shared_room, page, PROT_NONE);
    mprotect(shared_room + page + SHARED_ROOM, page, PROT_NONE);
  }
  shared_base = shared_room + page + SHARED_ROOM - (l.shared + 127) / 128 * 128;  // its end is the forbidden page
  return nullptr;
}

inline bool intact(const uint8_t* from, const uint8_t* to, uint8_t value) {
  while (from < to && *from == value) from++;
  return from == to;
}

static bool run_block() {
  const int n = (int)launch_now.block;
  const size_t tail = (128 - launch_now.shared % 128) % 128;
  memset(shared_base - CANARY, GUARD, CANARY);
  memset(shared_base, POISON, launch_now.shared);
  memset(shared_base + launch_now.shared, GUARD, tail);
  warp_count = live_warps = n / 32;
  waiting_warps = barrier_count = 0;
  for (int i = 0; i < warp_count; i++) warps[i] = Warp{~0u, 0, 0, nullptr, false, {}};
  for (int i = 0; i < n; i++) {
    threads[i].copies = threads[i].groups = 0;
    threads[i].waits = nullptr;
    uint8_t* bottom = stacks + (size_t)i * STACK;
    memset(bottom, GUARD, 64);
    // Different offsets per lane: stacks that are equal modulo the page size would share a few cache sets.
    make_context(contexts[i], bottom, bottom + STACK - (i & 31) * 17 * 64, fiber_main);
  }
  message[0] = 0;
  current = launch_now.reverse ? n - 1 : 0;
  threadIdx = Dim{(uint32_t)current, 0, 0};
  switch_context(main_context, contexts[current]);
  current = -1;
  if (message[0]) return false;
  if (!intact(shared_base - CANARY, shared_base, GUARD)) say(say_where(), "wrote before the start of shared memory");
  const uint8_t* end = shared_base + launch_now.shared;
  if (!intact(end, end + tail, GUARD)) say(say_where(), "wrote behind the %u bytes of shared memory", launch_now.shared);
  for (int i = 0; i < n; i++)
    if (!intact(stacks + i * STACK, stacks + i * STACK + 64, GUARD)) say(say_where(), "stack overflow in thread %d", i);
  for (int i = 0; i < barrier_count; i++)
    if (barriers[i].loads)
      say(say_where(), "ended before a bulk load of %u bytes, which nobody waited for", barriers[i].load[0].bytes);
  return !message[0];
}

static int launch(const char* name, void (*body)(const void*), uint32_t bound, size_t size, const Launch& l, const void* params,
                  size_t params_size) {
  kernel_name = name;
  kernel_body = body;
  kernel_params = params;
  launch_now = l;
  gridDim = Dim{l.grid[0], l.grid[1], l.grid[2]};
  blockDim = Dim{l.block, 1, 1};
  if (size != params_size) {
    say(0, "%s: its struct of parameters has %zu bytes, the one passed has %zu", name, size, params_size);
    return 1;
  }
  if (const char* wrong = prepare(l, bound)) {
    say(0, "%s: %s (grid %u x %u x %u, block %u, shared memory %u bytes, launch bound %u)", name, wrong, l.grid[0], l.grid[1],
        l.grid[2], l.block, l.shared, bound);
    return 1;
  }
  alignas(16) static uint8_t fault_stack[64 << 10];
  stack_t mine = {}, stack_before;
  mine.ss_sp = fault_stack;
  mine.ss_size = sizeof fault_stack;
  struct sigaction action = {}, before[3];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  const int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  runner = pthread_self();
  sigaltstack(&mine, &stack_before);
  for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &before[i]);
  const uint64_t blocks = (uint64_t)l.grid[0] * l.grid[1] * l.grid[2];
  bool fine = true;
  for (uint64_t i = 0; fine && i < blocks; i++) {
    const uint64_t b = l.reverse ? blocks - 1 - i : i;
    blockIdx = Dim{(uint32_t)(b % l.grid[0]), (uint32_t)(b / l.grid[0] % l.grid[1]), (uint32_t)(b / l.grid[0] / l.grid[1])};
    fine = run_block();
  }
  for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return fine ? 0 : 1;
}

}  // namespace emu
