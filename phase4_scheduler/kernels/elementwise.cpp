// What lies between the products of a layer, each as one pass: torch's operators make several of each, and a decode
// step is so small that every one of them costs its call.
#include <cmath>

#include "numbers.h"

namespace {

constexpr int64_t ALONE = 16384;  // numbers that one thread is through with before another has started

// x / rms(x) * weight for each row; rows of x are `stride` numbers apart.
template <class T>
void norm_rows(const T *x, const T *weight, T *out, int64_t rows, int64_t size, int64_t stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * stride;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) squares += wide(from[i]) * wide(from[i]);
        const float factor = 1.0f / std::sqrt(squares / size + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[row * size + i] = narrow<T>(wide(from[i]) * factor * wide(weight[i]));
    }
}

struct Silu {
    static inline float of(float x) { return x / (1.0f + exponential(-x)); }
};

// x / 2 * (1 + tanh(y)) with y = sqrt(2 / pi) * (x + 0.044715 x^3), and (1 + tanh(y)) / 2 = 1 / (1 + e^(-2 y))
struct GeluTanh {
    static inline float of(float x) { return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x))); }
};

// activation(gate) * up, of rows that hold gate and up side by side: [rows, 2 * size] -> [rows, size]. Cut into pieces,
// so that one row is work for several threads.
template <class Activation, class T> void gate_rows(const T *x, T *out, int64_t rows, int64_t size, int threads) {
    constexpr int64_t PIECE = 1024;
    const int64_t pieces = (size + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) collapse(2) if (rows * size > ALONE / 4)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t from = piece * PIECE, to = from + PIECE < size ? from + PIECE : size;
            const T *gate = x + row * 2 * size, *up = gate + size;
#pragma omp simd
            for (int64_t i = from; i < to; i++)
                out[row * size + i] = narrow<T>(Activation::of(wide(gate[i])) * wide(up[i]));
        }
}

template <class T> void gate(const T *x, T *out, int64_t rows, int64_t size, int kind, int threads) {
    if (kind)
        gate_rows<GeluTanh>(x, out, rows, size, threads);
    else
        gate_rows<Silu>(x, out, rows, size, threads);
}

// Turns the pairs (x[i], x[i + half]) of the heads of q and k in place, and copies k and v to their slots in the cache.
template <class T>
void turn_rows(T *q, T *k, const T *v, const T *cos, const T *sin, const int64_t *blocks, const int64_t *places,
               T *keys, T *values, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t half,
               int64_t stride, int64_t angle_stride, int64_t page, int threads) {
    auto turn = [half, dim](T *x, int64_t heads, const T *c, const T *s) {
        for (int64_t head = 0; head < heads; head++, x += dim)
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                const float first = wide(x[i]), second = wide(x[i + half]), a = wide(c[i]), b = wide(s[i]);
                x[i] = narrow<T>(first * a - second * b);
                x[i + half] = narrow<T>(second * a + first * b);
            }
    };
#pragma omp parallel for num_threads(threads) if (tokens * (q_heads + kv_heads) * dim > ALONE)
    for (int64_t t = 0; t < tokens; t++) {
        turn(q + t * stride, q_heads, cos + t * angle_stride, sin + t * angle_stride);
        turn(k + t * stride, kv_heads, cos + t * angle_stride, sin + t * angle_stride);
        const int64_t slot = (blocks[t] * page + places[t]) * kv_heads * dim;
        memcpy(keys + slot, k + t * stride, kv_heads * dim * sizeof(T));
        memcpy(values + slot, v + t * stride, kv_heads * dim * sizeof(T));
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void norm_##NAME(const T *x, const T *weight, T *out, int64_t rows, int64_t size, int64_t stride,       \
                                float eps, int threads) {                                                              \
        norm_rows(x, weight, out, rows, size, stride, eps, threads);                                                   \
    }                                                                                                                  \
    extern "C" void gate_##NAME(const T *x, T *out, int64_t rows, int64_t size, int kind, int threads) {               \
        gate(x, out, rows, size, kind, threads);                                                                       \
    }                                                                                                                  \
    extern "C" void turn_##NAME(T *q, T *k, const T *v, const T *cos, const T *sin, const int64_t *blocks,             \
                                const int64_t *places, T *keys, T *values, int64_t tokens, int64_t q_heads,            \
                                int64_t kv_heads, int64_t dim, int64_t half, int64_t stride, int64_t angle_stride,     \
                                int64_t page, int threads) {                                                           \
        turn_rows(q, k, v, cos, sin, blocks, places, keys, values, tokens, q_heads, kv_heads, dim, half, stride,       \
                  angle_stride, page, threads);                                                                        \
    }

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
