// The part of CUDA C++ that a .cu file may use here, for a host compiler. It is included before the file itself.
//
// The kernel's text is not changed. Its memory accesses are seen because it is compiled with -fsanitize=thread, which
// puts a call before every load and store; runtime.cpp defines those calls (instead of linking the sanitizer).
// Supported: built-in indices, static __shared__ arrays, __syncthreads, __syncwarp, warp shuffles, vector types,
// atomicAdd, __ldg. Not supported: dynamic shared memory (extern __shared__), tensor cores, inline PTX, fp16/bf16.
#pragma once
#include <math.h>
#include <stddef.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __constant__ static
#define __shared__ static
#define __launch_bounds__(...)
#define CUDA_ON_CPU 1

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

// A vector type moves as one access of 8 or 16 bytes, so its copies report themselves: the compiler's own calls miss a
// vector that a function returns straight into memory.
#define CPU_UNSEEN __attribute__((no_sanitize("thread")))
extern "C" void cpu_vector_copy(void* to, const void* from, unsigned size, void* site);
#define CPU_VECTOR_COPIES(V)                                                                                      \
    V() = default;                                                                                                \
    CPU_UNSEEN V(const V& from) { cpu_vector_copy(this, &from, sizeof(V), __builtin_return_address(0)); }         \
    CPU_UNSEEN V& operator=(const V& from) {                                                                      \
        cpu_vector_copy(this, &from, sizeof(V), __builtin_return_address(0));                                     \
        return *this;                                                                                             \
    }
#define CPU_VECTOR2(V, T)                                                                                         \
    struct alignas(2 * sizeof(T)) V { T x, y; CPU_VECTOR_COPIES(V) V(T x, T y) : x(x), y(y) {} };                 \
    inline V make_##V(T x, T y) { return V(x, y); }
#define CPU_VECTOR4(V, T)                                                                                         \
    struct alignas(4 * sizeof(T)) V {                                                                             \
        T x, y, z, w;                                                                                             \
        CPU_VECTOR_COPIES(V) V(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}                                    \
    };                                                                                                            \
    inline V make_##V(T x, T y, T z, T w) { return V(x, y, z, w); }
CPU_VECTOR2(float2, float)
CPU_VECTOR2(int2, int)
CPU_VECTOR4(float4, float)
CPU_VECTOR4(int4, int)
CPU_VECTOR4(uint4, unsigned)

struct CpuBuiltins { uint3 thread, block; dim3 block_dim, grid_dim; };
extern CpuBuiltins cpu_builtins;
#define threadIdx (cpu_builtins.thread)
#define blockIdx (cpu_builtins.block)
#define blockDim (cpu_builtins.block_dim)
#define gridDim (cpu_builtins.grid_dim)
static const int warpSize = 32;

extern "C" void cpu_block_barrier();
extern "C" void cpu_warp_barrier();
extern "C" unsigned long long* cpu_warp_slots();  // one 8-byte mailbox a lane
inline void __syncthreads() { cpu_block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cpu_warp_barrier(); }

template <class T> T cpu_exchange(T value, unsigned lane, unsigned from) {
    unsigned long long* slots = cpu_warp_slots();
    memcpy(&slots[lane], &value, sizeof(T));
    cpu_warp_barrier();
    memcpy(&value, &slots[from], sizeof(T));
    cpu_warp_barrier();
    return value;
}
inline unsigned cpu_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
template <class T> T __shfl_sync(unsigned, T v, unsigned source, unsigned width = 32) {
    const unsigned lane = cpu_lane();
    return cpu_exchange(v, lane, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned, T v, unsigned mask, unsigned width = 32) {
    const unsigned lane = cpu_lane(), from = lane ^ mask;
    return cpu_exchange(v, lane, (from & ~(width - 1)) == (lane & ~(width - 1)) ? from : lane);
}
template <class T> T __shfl_down_sync(unsigned, T v, unsigned delta, unsigned width = 32) {
    const unsigned lane = cpu_lane(), from = lane + delta;
    return cpu_exchange(v, lane, (lane & (width - 1)) + delta < width ? from : lane);
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned delta, unsigned width = 32) {
    const unsigned lane = cpu_lane();
    return cpu_exchange(v, lane, (lane & (width - 1)) >= delta ? lane - delta : lane);
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

// Unpacks the host's argument array; those reads are not the kernel's traffic.
template <class... A> struct CpuCall {
    template <size_t... I> struct Indices {};
    template <size_t N, size_t... I> struct Make : Make<N - 1, N - 1, I...> {};
    template <size_t... I> struct Make<0, I...> { using type = Indices<I...>; };
    template <size_t... I> CPU_UNSEEN static void spread(void (*kernel)(A...), void** args, Indices<I...>) {
        kernel(*(A*)args[I]...);
    }
    static void go(void (*kernel)(A...), void** args) { spread(kernel, args, typename Make<sizeof...(A)>::type()); }
};
template <class... A> CPU_UNSEEN void cpu_call(void (*kernel)(A...), void** args) { CpuCall<A...>::go(kernel, args); }
template <class... A> int cpu_arity(void (*)(A...)) { return (int)sizeof...(A); }
