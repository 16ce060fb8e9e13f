// What the chip does beyond C++, and what stands for it where the kernels are emulated.

#ifdef EMULATED
__device__ __forceinline__ void signal(u32* arrived) { ++*arrived; }
__device__ __forceinline__ void wait_for(u32* arrived, u32 count) {
  while ((int)(*arrived - count) < 0) yield_at(AT_GRID);
}
template <int COUNT> __device__ __forceinline__ void take_registers() {}
template <int COUNT> __device__ __forceinline__ void leave_registers() {}
__device__ __forceinline__ int count_one(int* counter) { return (*counter)++; }
__device__ __forceinline__ void bring_near(const void*, u32) {}
__device__ __forceinline__ void copy_aside(void* to, const void* from) { memcpy(to, from, 16); }
__device__ __forceinline__ void await_copies() {}
__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) { open_barrier(barrier, arrivals); }
__device__ __forceinline__ void show_barriers() {}
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) { arrive_at(barrier, bytes); }
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64* barrier) {
  post_copy(to, from, bytes, barrier);
}
__device__ __forceinline__ bool has_arrived(const u64* barrier, u32 parity) { return (*barrier >> 32 & 1) != parity; }
__device__ __forceinline__ void wait_barrier(u64* barrier, u32 parity) {
  while (!has_arrived(barrier, parity)) yield_at(AT_GRID);
}
template <class T> __device__ __forceinline__ void tell(T* to, T value) { *(volatile T*)to = value; }
__device__ __forceinline__ void note(u64* to, u64 value) { tell(to, value); }
template <class T> __device__ __forceinline__ T heard(const T* from) { return *(const volatile T*)from; }
__device__ __forceinline__ u64 least_heard(const u64* from, int count) { return *std::min_element(from, from + count); }
__device__ __forceinline__ void look_again() { yield_at(AT_GRID); }
__device__ __forceinline__ void rest() { yield_at(AT_GRID); }
#else
__device__ __forceinline__ void signal(u32* arrived) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}
__device__ __forceinline__ void wait_for(u32* arrived, u32 count) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
  while ((int)(seen - count) < 0);
}
// By all warps of four that follow each other: of what a launch gives every thread the same of, some need more.
template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
__device__ __forceinline__ int count_one(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Copies by the copy engine, and the barriers that tell when all bytes of a slot are there.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64* barrier) {
  // Read once a step: what is read more often stays in the second cache.
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// 16 bytes into shared memory, there after await_copies() and a __syncthreads(); nobody waits meanwhile.
__device__ __forceinline__ void copy_aside(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// sum (16 x 8) += a (16 x 16) · b (16 x 8); a: of the upper rows, of the lower ones, then of both what lies 8 columns on.
__device__ __forceinline__ void multiply_matrices(float sum[4], const u32 a[4], const u32 b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Into the second cache.
__device__ __forceinline__ void bring_near(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool has_arrived(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ void wait_barrier(u64* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
}
// What warps of a block tell each other in shared memory: whoever hears it sees what was done before.
__device__ __forceinline__ void tell(u32* to, u32 value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(to)), "r"(value) : "memory");
}
// That shared memory was read: a warp's accesses to it happen in order, so no fence is needed, which would take as long as
// the multiplications of a piece.
__device__ __forceinline__ void note(u64* to, u64 value) {
  asm volatile("st.relaxed.cta.shared::cta.u64 [%0], %1;" ::"r"(shared_address(to)), "l"(value) : "memory");
}
__device__ __forceinline__ u32 heard(const u32* from) {
  u32 value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(from)) : "memory");
  return value;
}
__device__ __forceinline__ u64 heard(const u64* from) {
  u64 value;
  asm volatile("ld.acquire.cta.shared::cta.u64 %0, [%1];" : "=l"(value) : "r"(shared_address(from)) : "memory");
  return value;
}
// The least of several.
__device__ __forceinline__ u64 least_heard(const u64* from, int count) {
  u64 least = ~0ull;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const u64 value = heard(from + i);
    least = value < least ? value : least;
  }
  return least;
}
__device__ __forceinline__ void look_again() {}
__device__ __forceinline__ void rest() { __nanosleep(20); }
#endif
