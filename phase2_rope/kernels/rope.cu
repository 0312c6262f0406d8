// Rotary position embedding of a flat batch of tokens, and the write of keys and values into a paged cache.
//
// For each token, each head of q and k, and each pair i of the first R dims of the head (R <= D, the rest is kept):
//     x' = x cos - y sin,   y' = y cos + x sin,      cos = cos_sin[position][i], sin = cos_sin[position][R/2 + i]
// where (x, y) is (head[i], head[i + R/2]) ("neox") or, interleaved, (head[2i], head[2i + 1]) ("GPT-J").
// RoPE sees one token at a time: where sequences begin and end in the batch does not matter here.
//
// Work: 6 FLOPs a pair, so none to speak of. It must read and write q and k once, and read a row of cos and sin once a
// token: 2 (Hq + Hkv) R elements and 4 R bytes. The fused version also reads and writes v. The copy rate of the machine
// is the limit for many tokens; for few it is the time of one launch and of two loads that wait for each other.
//
//   rope_naive   a block a token, a thread a pair, as in vLLM: cos and sin again for each head, 2 bytes an access
//   rope_shared  cos and sin of the token are staged in shared memory, for all heads
//   rope_vector  16 bytes an access: 8 halves (4 floats) of x and of y
//   rope_tokens  a warp a token: few heads still fill a block, cos and sin stay in registers, two heads in flight
//   rope_fast    K goes to its place in the cache as it is turned, and V with it: one launch, K is moved once
//   kv_write     the write alone, so that two launches can be compared with one
//
// A vector holds 16 neighbouring bytes for either pairing; only which values meet in a turn differs. The host allows
// vectors where every pointer and stride is a multiple of 16 bytes and R/2 and D of a vector; else the last versions
// move one element at a time, too. Arithmetic is float32. A token whose block is negative is padding: nothing is
// written for it. See: Su et al., "RoFormer", 2021; flashinfer's pos_enc.cuh; vLLM's pos_encoding_kernels.cu.
//
// `tile AxB`: B tokens a block; A is 4096 where a block takes all heads, and 1 where the heads are dealt out to as many
// blocks along y as the host finds useful (gridDim.y).

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

constexpr int kVector = 16 / sizeof(Scalar);  // elements of a 128-bit access
constexpr int kMaxRotated = 512;

// A pointer that was chosen among several is generic to the compiler, unless it is told what the choice was among.
template <class T>
__device__ __forceinline__ T* global(T* p) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

// One head of one token: where it is read, and where its turned form goes (the same place, in place).
struct Row {
    const Scalar* in;
    Scalar* out;
};

// All heads of one token in one tensor.
struct Rows {
    const Scalar* in;
    Scalar* out;
    int heads, in_head, out_head;
    __device__ __forceinline__ Row at(int head) const {
        return {in + (size_t)head * in_head, out + (size_t)head * out_head};
    }
};

// One token: its heads are numbered q, then k, which turn, then v, which is copied.
struct Token {
    Rows q, k, v;
    __device__ __forceinline__ int turned() const { return q.heads + k.heads; }
    __device__ __forceinline__ int heads() const { return q.heads + k.heads + v.heads; }
    __device__ __forceinline__ Row at(int head) const {
        const Row row = head < q.heads ? q.at(head) : head < turned() ? k.at(head - q.heads) : v.at(head - turned());
        return {global(row.in), global(row.out)};
    }
};

#define ROPE                                                                                                    \
    const Scalar *q, const Scalar *k, Scalar *out_q, Scalar *out_k, const float *__restrict__ cos_sin,          \
        const long long *__restrict__ positions, int tokens, int q_heads, int k_heads, int dim, int rotated,    \
        int interleaved, int vectors, int q_token, int q_head, int k_token, int k_head, int out_q_token,        \
        int out_q_head, int out_k_token, int out_k_head

#define ROPE_TOKEN(t)                                                                                           \
    Token {                                                                                                     \
        {q + (size_t)(t) * q_token, out_q + (size_t)(t) * out_q_token, q_heads, q_head, out_q_head},            \
        {k + (size_t)(t) * k_token, out_k + (size_t)(t) * out_k_token, k_heads, k_head, out_k_head},            \
        {nullptr, nullptr, 0, 0, 0}                                                                             \
    }

#define ROPE_AND_WRITE                                                                                          \
    Scalar *q, const Scalar *k, const Scalar *v, Scalar *keys, Scalar *values, const float *__restrict__ cos_sin, \
        const long long *__restrict__ positions, const long long *__restrict__ blocks,                          \
        const long long *__restrict__ places, int tokens, int q_heads, int k_heads, int dim, int rotated,       \
        int interleaved, int vectors, int q_token, int q_head, int k_token, int k_head, int v_token,            \
        int v_head, int block_stride, int place_stride, int head_stride

// Turns one pair of one head.
__device__ __forceinline__ void turn_pair(Row row, int i, int half, int interleaved, float cos, float sin) {
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    const float x = to_float(row.in[first]), y = to_float(row.in[second]);
    row.out[first] = to_scalar(x * cos - y * sin);
    row.out[second] = to_scalar(y * cos + x * sin);
}

// Copies the dims from `begin` on of some heads, for the `thread`th of `threads`; in place there is nothing to do.
__device__ __forceinline__ void copy_rest(const Token& token, int first_head, int begin, int dim, int vectors,
                                          int thread, int threads) {
    const int width = vectors ? kVector : 1, pieces = (dim - begin) / width;
    if (pieces == 0) return;
    for (int i = thread; i < (token.heads() - first_head) * pieces; i += threads) {
        const Row row = token.at(first_head + i / pieces);
        const int at = begin + i % pieces * width;
        if (row.in == row.out) continue;
        if (vectors)
            *reinterpret_cast<uint4*>(row.out + at) = *reinterpret_cast<const uint4*>(row.in + at);
        else
            row.out[at] = row.in[at];
    }
}

// adds: nothing; the plain version, two table loads for each pair of each head
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_naive(ROPE) {
    const Token token = ROPE_TOKEN(blockIdx.x);
    const int half = rotated / 2;
    const float* table = cos_sin + positions[blockIdx.x] * rotated;
    for (int i = threadIdx.x; i < token.turned() * half; i += blockDim.x) {
        const int pair = i % half;
        turn_pair(token.at(i / half), pair, half, interleaved, table[pair], table[half + pair]);
    }
    copy_rest(token, 0, rotated, dim, 0, threadIdx.x, blockDim.x);
}

// adds: cos and sin of a token are read once, into shared memory
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_shared(ROPE) {
    __shared__ float table[kMaxRotated];
    const Token token = ROPE_TOKEN(blockIdx.x);
    const int half = rotated / 2;
    const long long position = positions[blockIdx.x];
    for (int i = threadIdx.x; i < rotated; i += blockDim.x) table[i] = cos_sin[position * rotated + i];
    __syncthreads();
    for (int i = threadIdx.x; i < token.turned() * half; i += blockDim.x) {
        const int pair = i % half;
        turn_pair(token.at(i / half), pair, half, interleaved, table[pair], table[half + pair]);
    }
    copy_rest(token, 0, rotated, dim, 0, threadIdx.x, blockDim.x);
}

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kVector]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if defined(SCALAR_F32)
        x[i] = __uint_as_float(words[i]);
#else
        x[2 * i] = to_float((Scalar)words[i]);
        x[2 * i + 1] = to_float((Scalar)(words[i] >> 16));
#endif
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
#if defined(SCALAR_F32)
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
#else
    return make_uint4(pack_two(x[0], x[1]), pack_two(x[2], x[3]), pack_two(x[4], x[5]), pack_two(x[6], x[7]));
#endif
}

// cos and sin of the pairs that a thread turns: those of the `chunk`th vector of each half of a head.
struct Turn {
    float cos[kVector], sin[kVector];

    __device__ __forceinline__ void load(const float* table, int half, int chunk, int interleaved) {
        constexpr int n = kVector / 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int from = interleaved ? h * half / 2 + chunk * n : chunk * kVector + h * n;
            if constexpr (n == 4) {
                const float4 c = *reinterpret_cast<const float4*>(table + from);
                const float4 s = *reinterpret_cast<const float4*>(table + half + from);
                cos[4 * h] = c.x, cos[4 * h + 1] = c.y, cos[4 * h + 2] = c.z, cos[4 * h + 3] = c.w;
                sin[4 * h] = s.x, sin[4 * h + 1] = s.y, sin[4 * h + 2] = s.z, sin[4 * h + 3] = s.w;
            } else {
                const float2 c = *reinterpret_cast<const float2*>(table + from);
                const float2 s = *reinterpret_cast<const float2*>(table + half + from);
                cos[2 * h] = c.x, cos[2 * h + 1] = c.y;
                sin[2 * h] = s.x, sin[2 * h + 1] = s.y;
            }
        }
    }

    // `a` is the chunk of the head's first half and `b` that of its second. Neox pairs a with b; interleaved pairs are
    // neighbours within a and within b.
    __device__ __forceinline__ void apply(uint4& a, uint4& b, int interleaved) const {
        float x[kVector], y[kVector];
        unpack(a, x);
        unpack(b, y);
        if (interleaved) {
#pragma unroll
            for (int i = 0; i < kVector / 2; ++i) {
                one(x[2 * i], x[2 * i + 1], i);
                one(y[2 * i], y[2 * i + 1], kVector / 2 + i);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) one(x[i], y[i], i);
        }
        a = pack(x);
        b = pack(y);
    }

    __device__ __forceinline__ void one(float& x, float& y, int i) const {
        const float before = x;
        x = before * cos[i] - y * sin[i];
        y = y * cos[i] + before * sin[i];
    }
};

__device__ __forceinline__ const uint4& vector_at(const Scalar* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ uint4& vector_at(Scalar* p) { return *reinterpret_cast<uint4*>(p); }

// adds: 128-bit loads and stores (what is not aligned goes the scalar way)
// launch: tile 4096x1, block 256
extern "C" __global__ void __launch_bounds__(256) rope_vector(ROPE) {
    alignas(16) __shared__ float table[kMaxRotated];
    const Token token = ROPE_TOKEN(blockIdx.x);
    const int half = rotated / 2;
    const long long position = positions[blockIdx.x];
    for (int i = threadIdx.x; i < rotated; i += blockDim.x) table[i] = cos_sin[position * rotated + i];
    __syncthreads();
    const int width = vectors ? kVector : 1, chunks = half / width;
    for (int i = threadIdx.x; i < token.turned() * chunks; i += blockDim.x) {
        const Row row = token.at(i / chunks);
        const int chunk = i % chunks, first = chunk * kVector, second = half + first;
        if (!vectors) {
            turn_pair(row, chunk, half, interleaved, table[chunk], table[half + chunk]);
            continue;
        }
        uint4 a = vector_at(row.in + first), b = vector_at(row.in + second);
        Turn turn;
        turn.load(table, half, chunk, interleaved);
        turn.apply(a, b, interleaved);
        vector_at(row.out + first) = a;
        vector_at(row.out + second) = b;
    }
    copy_rest(token, 0, rotated, dim, vectors, threadIdx.x, blockDim.x);
}

constexpr int kTokens = 4;    // of a block of 128 threads: one warp each
constexpr int kInFlight = 2;  // heads whose loads a thread has issued before it turns the first

// The vectors of up to kInFlight heads that one thread holds.
struct Batch {
    uint4 a[kInFlight], b[kInFlight];

    __device__ __forceinline__ void load(const Token& token, int head, int step, int first, int second) {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
            if (head + j * step < token.heads()) {
                const Scalar* in = token.at(head + j * step).in;
                a[j] = vector_at(in + first);
                b[j] = vector_at(in + second);
            }
    }
};

// One warp turns one token: its lanes are a row of chunks for each of some heads, and step through the heads together.
// A lane keeps its chunk, so it reads its cos and sin once, and lanes of other heads ask for the same addresses in the
// same instruction. gridDim.y warps share the heads of a token.
__device__ __forceinline__ void turn_token(const Token& token, const float* table, int half, int interleaved,
                                           int vectors) {
    const int lane = threadIdx.x % 32;
    if (!vectors) {
        for (int i = blockIdx.y * 32 + lane; i < token.turned() * half; i += gridDim.y * 32) {
            const int pair = i % half;
            turn_pair(token.at(i / half), pair, half, interleaved, table[pair], table[half + pair]);
        }
        return;
    }
    const int chunks = half / kVector, rows = 32 / chunks, chunk = lane % chunks;
    const int first = chunk * kVector, second = half + first, step = gridDim.y * rows;
    int head = blockIdx.y * rows + lane / chunks;
    if (lane / chunks >= rows || head >= token.heads()) return;  // 32 is no multiple of 6 chunks: two lanes rest
    Batch batch;
    batch.load(token, head, step, first, second);  // it is under way while the position, then cos and sin are fetched
    Turn turn;
    turn.load(table, half, chunk, interleaved);
    for (;;) {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int at = head + j * step;
            if (at >= token.heads()) break;
            if (at < token.turned()) turn.apply(batch.a[j], batch.b[j], interleaved);
            const Row row = token.at(at);
            vector_at(row.out + first) = batch.a[j];
            vector_at(row.out + second) = batch.b[j];
        }
        head += kInFlight * step;
        if (head >= token.heads()) return;
        batch.load(token, head, step, first, second);
    }
}

// adds: four tokens a block, a warp each; cos and sin in registers for all heads; two heads of a thread in flight
// launch: tile 1x4, block 128
extern "C" __global__ void __launch_bounds__(128, 6) rope_tokens(ROPE) {
    const int t = blockIdx.x * kTokens + threadIdx.x / 32;
    if (t >= tokens) return;
    const Token token = ROPE_TOKEN(t);
    turn_token(token, cos_sin + positions[t] * rotated, rotated / 2, interleaved, vectors);
    copy_rest(token, 0, rotated, dim, vectors, blockIdx.y * 32 + threadIdx.x % 32, gridDim.y * 32);
}

// Where a token's keys and values go; without heads for a token that is padding.
__device__ __forceinline__ Token token_to_cache(Rows q, Rows k, Rows v, long long block, long long place,
                                                int block_stride, int place_stride) {
    const long long offset = block * block_stride + place * place_stride;
    k.out += block < 0 ? 0 : offset;
    v.out += block < 0 ? 0 : offset;
    if (block < 0) k.heads = v.heads = 0;
    return {q, k, v};
}

// adds: keys and values go to their places in the cache in the same launch; the turned K is never read again for it
// launch: tile 1x4, block 128
extern "C" __global__ void __launch_bounds__(128, 6) rope_fast(ROPE_AND_WRITE) {
    const int t = blockIdx.x * kTokens + threadIdx.x / 32;
    if (t >= tokens) return;
    const Token token = token_to_cache({q + (size_t)t * q_token, q + (size_t)t * q_token, q_heads, q_head, q_head},
                                       {k + (size_t)t * k_token, keys, k_heads, k_head, head_stride},
                                       {v + (size_t)t * v_token, values, k_heads, v_head, head_stride}, blocks[t],
                                       places[t], block_stride, place_stride);
    const int lane = blockIdx.y * 32 + threadIdx.x % 32, lanes = gridDim.y * 32;
    turn_token(token, cos_sin + positions[t] * rotated, rotated / 2, interleaved, vectors);
    copy_rest(token, q_heads, rotated, dim, vectors, lane, lanes);
    if (!vectors && token.v.heads)  // the scalar way turns only; with vectors the first R dims of V are written by now
        copy_rest({{}, {}, token.v}, 0, 0, rotated, 0, lane, lanes);
}

// adds: nothing; the second launch of those who turn q and k in place first
// launch: tile 1x4, block 128
extern "C" __global__ void __launch_bounds__(128) kv_write(ROPE_AND_WRITE) {
    const int t = blockIdx.x * kTokens + threadIdx.x / 32;
    if (t >= tokens) return;
    const Token token = token_to_cache({}, {k + (size_t)t * k_token, keys, k_heads, k_head, head_stride},
                                       {v + (size_t)t * v_token, values, k_heads, v_head, head_stride}, blocks[t],
                                       places[t], block_stride, place_stride);
    copy_rest(token, 0, 0, dim, vectors, blockIdx.y * 32 + threadIdx.x % 32, gridDim.y * 32);
}
