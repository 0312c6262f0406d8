// Rotary position embedding of a flat batch of tokens, and the write of keys and values into a paged cache.
//
// For each token, each head of q and k, and each pair i of the first R dims of the head (R <= D, the rest is kept):
//     x' = x cos - y sin,   y' = y cos + x sin,      cos = cos_sin[position][i], sin = cos_sin[position][R/2 + i]
// where (x, y) is (head[i], head[i + R/2]) ("neox") or, interleaved, (head[2i], head[2i + 1]) ("GPT-J").
//
// Work: no arithmetic to speak of. It must read and write q and k once, and read a row of cos and sin once a token: at
// the rate of a copy. With the write into the cache: v is read and written once, and the turned k is not read again.
//
// Strides are in elements; the dims of a head are neighbours. `vectors` is 1 where every pointer and stride is a
// multiple of 16 bytes, and R/2 and D are multiples of the elements of a 16-byte vector; where it is 0 all of this must
// work, too. A token whose block is negative is padding: nothing is written to the cache for it. Outputs may be inputs.
//
// The two comment lines above a kernel are read by the host: `tile AxB` says that a block takes B tokens; A is 4096
// where it takes all heads, 1 where the host may deal them out to gridDim.y blocks; `block` is its threads. Change them
// together with the kernel. Kernels are checked and counted on the CPU: static __shared__ arrays only, no libraries.

#if defined(SCALAR_F32)
using Scalar = float;
__device__ __forceinline__ float to_float(Scalar x) { return x; }
__device__ __forceinline__ Scalar to_scalar(float x) { return x; }
#else
using Scalar = unsigned short;  // the bits of a bfloat16, or with SCALAR_F16 of a float16: no header is needed for them

#if defined(__CUDA_ARCH__) && defined(SCALAR_F16)
__device__ __forceinline__ float to_float(Scalar bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ unsigned pack_two(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#elif defined(__CUDA_ARCH__)
__device__ __forceinline__ float to_float(Scalar bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ __forceinline__ unsigned pack_two(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#else  // on a CPU: the same roundings by hand
#if defined(SCALAR_F16)
inline float to_float(Scalar h) {
    const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return sign ? -(float)mantissa * 0x1p-24f : (float)mantissa * 0x1p-24f;
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline unsigned round_one(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, u = bits & 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00u;
    if (u >= 0x477ff000u) return sign | 0x7c00u;
    if (u < 0x38800000u) return sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - __float_as_uint(0.5f));
    return sign | ((u + 0xfffu + (u >> 13 & 1u)) >> 13) - (112u << 10);
}
#else
inline float to_float(Scalar bits) { return __uint_as_float((unsigned)bits << 16); }
inline unsigned round_one(float x) {
    const unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return u >> 16 | 0x40u;
    return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
#endif
inline unsigned pack_two(float low, float high) { return round_one(low) | round_one(high) << 16; }
#endif
__device__ __forceinline__ Scalar to_scalar(float x) { return (Scalar)pack_two(x, 0.0f); }
#endif

#define ROPE                                                                                                    \
    const Scalar *q, const Scalar *k, Scalar *out_q, Scalar *out_k, const float *__restrict__ cos_sin,          \
        const long long *__restrict__ positions, int tokens, int q_heads, int k_heads, int dim, int rotated,    \
        int interleaved, int vectors, int q_token, int q_head, int k_token, int k_head, int out_q_token,        \
        int out_q_head, int out_k_token, int out_k_head

#define ROPE_AND_WRITE                                                                                          \
    Scalar *q, Scalar *k, const Scalar *v, Scalar *keys, Scalar *values, const float *__restrict__ cos_sin, \
        const long long *__restrict__ positions, const long long *__restrict__ blocks,                          \
        const long long *__restrict__ places, int tokens, int q_heads, int k_heads, int dim, int rotated,       \
        int interleaved, int vectors, int q_token, int q_head, int k_token, int k_head, int v_token,            \
        int v_head, int block_stride, int place_stride, int head_stride

// Turns all heads of one token by all threads of the block.
__device__ __forceinline__ void turn_heads(const Scalar* in, Scalar* out, int heads, int in_head, int out_head,
                                           const float* table, int dim, int rotated, int interleaved) {
    const int half = rotated / 2;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        const Scalar* from = in + i / half * in_head;
        Scalar* to = out + i / half * out_head;
        const int pair = i % half, first = interleaved ? 2 * pair : pair, second = first + (interleaved ? 1 : half);
        const float x = to_float(from[first]), y = to_float(from[second]);
        const float cos = table[pair], sin = table[half + pair];
        to[first] = to_scalar(x * cos - y * sin);
        to[second] = to_scalar(y * cos + x * sin);
    }
    if (in == out) return;
    for (int i = threadIdx.x; i < heads * (dim - rotated); i += blockDim.x) {
        const int head = i / (dim - rotated), at = rotated + i % (dim - rotated);
        out[head * out_head + at] = in[head * in_head + at];
    }
}

// Copies all heads of one token to its place in the cache, by all threads of the block.
__device__ __forceinline__ void write_heads(const Scalar* in, Scalar* out, int heads, int in_head, int out_head,
                                            int dim) {
    for (int i = threadIdx.x; i < heads * dim; i += blockDim.x)
        out[i / dim * out_head + i % dim] = in[i / dim * in_head + i % dim];
}

__device__ __forceinline__ void naive(ROPE) {
    const size_t t = blockIdx.x;
    const float* table = cos_sin + positions[t] * rotated;
    turn_heads(q + t * q_token, out_q + t * out_q_token, q_heads, q_head, out_q_head, table, dim, rotated, interleaved);
    turn_heads(k + t * k_token, out_k + t * out_k_token, k_heads, k_head, out_k_head, table, dim, rotated, interleaved);
}

// adds: nothing; the plain version, two table loads for each pair of each head
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_naive(ROPE) {
    naive(q, k, out_q, out_k, cos_sin, positions, tokens, q_heads, k_heads, dim, rotated, interleaved, vectors, q_token,
          q_head, k_token, k_head, out_q_token, out_q_head, out_k_token, out_k_head);
}

// adds: nothing yet
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_tokens(ROPE) {
    // TASK 2.1: read a token's cos and sin once for all its heads, move 16 bytes at a time, and let a block have work
    // for all its threads when a model has few heads.
    naive(q, k, out_q, out_k, cos_sin, positions, tokens, q_heads, k_heads, dim, rotated, interleaved, vectors, q_token,
          q_head, k_token, k_head, out_q_token, out_q_head, out_k_token, out_k_head);
}

// adds: nothing yet; k is turned where it lies, then read again to be written
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_fast(ROPE_AND_WRITE) {
    const size_t t = blockIdx.x;
    const float* table = cos_sin + positions[t] * rotated;
    Scalar *this_q = q + t * q_token, *this_k = k + t * k_token;
    // TASK 2.2: k need not come back to where it lay: nobody reads it there. And all of 2.1 holds here.
    turn_heads(this_q, this_q, q_heads, q_head, q_head, table, dim, rotated, interleaved);
    turn_heads(this_k, this_k, k_heads, k_head, k_head, table, dim, rotated, interleaved);
    if (blocks[t] < 0) return;
    __syncthreads();
    const long long slot = blocks[t] * block_stride + places[t] * place_stride;
    write_heads(this_k, keys + slot, k_heads, k_head, head_stride, dim);
    write_heads(v + t * v_token, values + slot, k_heads, v_head, head_stride, dim);
}

// adds: nothing; the second launch of those who turn q and k in place first
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) kv_write(ROPE_AND_WRITE) {
    const size_t t = blockIdx.x;
    if (blocks[t] < 0) return;
    const long long slot = blocks[t] * block_stride + places[t] * place_stride;
    write_heads(k + t * k_token, keys + slot, k_heads, k_head, head_stride, dim);
    write_heads(v + t * v_token, values + slot, k_heads, v_head, head_stride, dim);
}
