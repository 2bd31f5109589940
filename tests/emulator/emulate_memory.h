// Asynchronous copies of common.cuh on a CPU; included by emulate.h.
//
// A copy happens as late as the rules allow: cp.async when its thread waits for it, a bulk load when all threads of the block
// wait for something. Until then its destination holds 0xFF bytes, so that a kernel which forgets to wait computes from these.
#pragma once

// ---- cp.async ----

TQ_DEVICE void copy_async_16(void* shared, const void* global) {
  emu::check_shared("copy_async_16", shared, 16, 16);
  emu::check_global("copy_async_16", global);
  emu::Thread& t = emu::threads[emu::current];
  if (t.copies == emu::MAX_COPIES) TQ_FAIL("copy_async_16: more than %d copies that were not waited for", emu::MAX_COPIES);
  t.copy[t.copies++] = {shared, global, t.groups};
  memset(shared, emu::POISON, 16);
}
TQ_DEVICE void copy_async_commit() { emu::threads[emu::current].groups++; }
template <int PENDING> TQ_DEVICE void copy_async_wait() {
  emu::Thread& t = emu::threads[emu::current];
  int kept = 0;
  for (int i = 0; i < t.copies; i++) {
    if (t.copy[i].group < t.groups - PENDING)
      memcpy(t.copy[i].to, t.copy[i].from, 16);
    else
      t.copy[kept++] = t.copy[i];
  }
  t.copies = kept;
}

// ---- bulk copies ----

#ifdef TQ_BULK_COPY

namespace emu {

constexpr uint64_t BARRIER_MARK = 0xBA441E4000000000ull;  // a barrier's 8 bytes: this and its number

inline Barrier* find_barrier(const uint64_t* bar) {
  const uint64_t i = *bar - BARRIER_MARK;
  return i < (uint64_t)barrier_count && barriers[i].at == bar ? &barriers[i] : nullptr;
}
inline Barrier& ready_barrier(const char* what, const uint64_t* bar) {
  check_shared(what, bar, 8, 8);
  Barrier* b = find_barrier(bar);
  if (!b) TQ_FAIL("%s: the barrier was not initialised yet (or was overwritten)", what);
  if (!b->fenced) TQ_FAIL("%s: no mbar_fence by the thread that initialised the barrier", what);
  return *b;
}

inline void start_loads(const char* what, uint64_t* bar, const Load (&load)[2], int count) {
  Barrier& b = ready_barrier(what, bar);
  // The barrier counts one arrival per phase, and each call is one: a second would end up in another phase.
  if (b.loads) TQ_FAIL("%s: nobody waited for the load before on this barrier", what);
  for (int i = 0; i < count; i++) {
    check_shared(what, load[i].to, load[i].bytes, 16);
    check_global(what, load[i].from);
    if (load[i].bytes == 0 || load[i].bytes % 16) TQ_FAIL("%s: %u bytes are no positive multiple of 16", what, load[i].bytes);
    b.load[i] = load[i];
    memset(load[i].to, POISON, load[i].bytes);
  }
  b.loads = count;
}

}  // namespace emu

TQ_DEVICE void mbar_init(uint64_t* bar) {
  emu::check_shared("mbar_init", bar, 8, 8);
  if (emu::find_barrier(bar)) TQ_FAIL("mbar_init: the barrier was initialised before");
  if (emu::barrier_count == emu::MAX_BARRIERS) TQ_FAIL("mbar_init: more than %d barriers", emu::MAX_BARRIERS);
  *bar = emu::BARRIER_MARK + (uint64_t)emu::barrier_count;
  emu::barriers[emu::barrier_count++] = {bar, 0, emu::current, 0, false, {}};
}
TQ_DEVICE void mbar_fence() {
  for (int i = 0; i < emu::barrier_count; i++) emu::barriers[i].fenced |= emu::barriers[i].owner == emu::current;
}
TQ_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  emu::start_loads("bulk_load", bar, {{shared, global, bytes}, {}}, 1);
}
TQ_DEVICE void bulk_load_2(void* shared0, const void* global0, uint32_t bytes0, void* shared1, const void* global1,
                           uint32_t bytes1, uint64_t* bar) {
  emu::start_loads("bulk_load_2", bar, {{shared0, global0, bytes0}, {shared1, global1, bytes1}}, 2);
}
TQ_DEVICE void mbar_wait(uint64_t* bar, uint32_t parity) {
  if (parity > 1) TQ_FAIL("mbar_wait: the parity is %u, not 0 or 1", parity);
  while (emu::ready_barrier("mbar_wait", bar).parity == parity) {  // that phase is not over; finish_load ends it
    emu::threads[emu::current].waits = bar;
    emu::warps[emu::current >> 5].runnable &= ~(1u << (emu::current & 31));
    emu::yield();
  }
}

#endif

TQ_DEVICE uint64_t read_once() { return 0; }

// ---- between blocks: they run one after another ----

TQ_DEVICE void fence_device() {}
TQ_DEVICE int atomic_add(int* p, int x) {
  const int before = *p;
  *p = (int)((uint32_t)before + (uint32_t)x);
  return before;
}
TQ_DEVICE int atomic_add_acq_rel(int* p, int x) { return atomic_add(p, x); }
