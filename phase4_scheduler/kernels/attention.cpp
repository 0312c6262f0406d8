// Attention of one new token of each sequence to its pages, where they lie: nothing is gathered.
//
// All query heads that share keys are served at once, so each key and value is read once. Tokens come in tiles: their
// keys are widened into the first-level cache, multiplied with all heads (one lane a head), and the softmax goes on
// from tile to tile with a running maximum (Milakov & Gimelshein, 2018, arXiv 1805.02867). Long sequences are cut into
// pieces, always at the same tokens, that other threads take; their sums are joined at the end. So what comes out for a
// sequence depends on nothing but itself.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t TILE = 64, PIECE = 1024;
constexpr int WIDTH = 16, MOST_HEADS = 16;  // numbers in a vector along D

typedef float Wide __attribute__((vector_size(4 * WIDTH), aligned(4)));

template <int G> struct Lanes {
    typedef float type __attribute__((vector_size(4 * G), aligned(4)));
};

struct Shape {
    int64_t q_heads, kv_heads, dim, page;
    float scale, soft_cap;  // soft_cap 0: none
};

// Tokens from..to of one sequence.
struct Work {
    int64_t sequence, from, to;
    int64_t piece, pieces;  // which of the sequence's
};

template <class T> void widen(const T *from, float *to, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = wide(from[i]);
}

// scores [tokens][G] of keys [tokens][dim] and queries [dim][G], eight tokens at a time: one multiply-add waits four
// cycles for the one before it, and two start in each. What lies behind the last token is multiplied too, and not used.
template <int G> void multiply_by_head(const float *keys, const float *queries, float *scores, int64_t n, int64_t dim) {
    typedef typename Lanes<G>::type Heads;
    for (int64_t t = 0; t < n; t += 8) {
        Heads sums[8] = {};
        for (int64_t d = 0; d < dim; d++) {
            const Heads q = *(const Heads *)(queries + d * G);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[i] += keys[(t + i) * dim + d] * q;
        }
        for (int i = 0; i < 8; i++) *(Heads *)(scores + (t + i) * G) = sums[i];
    }
}

// The same for queries [G][dim], where heads are too few to fill a vector: lanes lie along D.
template <int G> void multiply_by_dim(const float *keys, const float *queries, float *scores, int64_t n, int64_t dim) {
    for (int64_t t = 0; t < n; t++)
        for (int g = 0; g < G; g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < dim; d++) sum += keys[t * dim + d] * queries[g * dim + d];
            scores[t * G + g] = sum;
        }
}

// sums [dim] of one head = sums * factor + weights (G apart) x values [tokens][dim], V vectors of D at a time.
template <int G, int V>
void add_values(const float *values, const float *weights, float *sums, float factor, int64_t n, int64_t dim) {
    for (int64_t d = 0; d < dim; d += V * WIDTH) {
        Wide found[V];
        for (int i = 0; i < V; i++) found[i] = *(const Wide *)(sums + d + i * WIDTH) * factor;
        for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 4
            for (int i = 0; i < V; i++) found[i] += weights[t * G] * *(const Wide *)(values + t * dim + d + i * WIDTH);
        for (int i = 0; i < V; i++) *(Wide *)(sums + d + i * WIDTH) = found[i];
    }
}

// Floats that a thread needs.
template <int G> int64_t scratch(int64_t dim) { return (2 * TILE + G) * dim + TILE * G; }

// Some heads of those that share kv head `shared`: sums [heads][dim], largest and total [heads].
template <class T, int G>
void attend(const Shape &shape, const Work &work, const T *q, int64_t shared, int64_t heads, const T *keys,
            const T *values, const int64_t *table, float *room, float *sums, float *largest, float *total) {
    constexpr bool BY_HEAD = G >= 4;
    typedef typename Lanes<G>::type Heads;
    const int64_t dim = shape.dim, page = shape.page, apart = shape.kv_heads * dim;
    float *k = room, *v = k + TILE * dim, *queries = v + TILE * dim, *scores = queries + G * dim;
    Heads most = Heads{} - std::numeric_limits<float>::infinity(), total_of = {};
    std::fill_n(queries, G * dim, 0.0f);
    for (int64_t g = 0; g < heads; g++)
        for (int64_t d = 0; d < dim; d++) queries[BY_HEAD ? d * G + g : g * dim + d] = wide(q[g * dim + d]) * shape.scale;
    std::fill_n(sums, heads * dim, 0.0f);
    for (int64_t from = work.from; from < work.to; from += TILE) {
        const int64_t n = std::min(TILE, work.to - from);
        for (int64_t t = 0; t < n;) {
            const int64_t place = (from + t) % page, stop = std::min(n, t + page - place);
            int64_t entry = ((table[(from + t) / page] * page + place) * shape.kv_heads + shared) * dim;
            for (; t < stop; t++, entry += apart) {
                widen(keys + entry, k + t * dim, dim);
                widen(values + entry, v + t * dim, dim);
            }
        }
        if (BY_HEAD)
            multiply_by_head<G>(k, queries, scores, n, dim);
        else
            multiply_by_dim<G>(k, queries, scores, n, dim);
        if (shape.soft_cap > 0)
            for (int64_t i = 0; i < n * G; i++) scores[i] = shape.soft_cap * std::tanh(scores[i] / shape.soft_cap);
        Heads *by_token = (Heads *)scores, before = most;
        for (int64_t t = 0; t < n; t++) most = by_token[t] > most ? by_token[t] : most;
        for (int g = 0; g < G; g++) before[g] = exponential(before[g] - most[g]);
        for (int64_t t = 0; t < n; t++) by_token[t] -= most;
#pragma omp simd
        for (int64_t i = 0; i < n * G; i++) scores[i] = exponential(scores[i]);
        total_of *= before;
        for (int64_t t = 0; t < n; t++) total_of += by_token[t];
        for (int64_t g = 0; g < heads; g++)
            if (dim % (4 * WIDTH) == 0)
                add_values<G, 4>(v, scores + g, sums + g * dim, before[g], n, dim);
            else
                add_values<G, 1>(v, scores + g, sums + g * dim, before[g], n, dim);
    }
    for (int64_t g = 0; g < heads; g++) largest[g] = most[g], total[g] = total_of[g];
}

template <class T>
void run(const T *q, const T *keys, const T *values, const int64_t *rows, const int64_t *tables, const int64_t *lengths,
         T *out, int64_t sequences, int64_t table_width, int64_t q_stride, int64_t window, const Shape &shape,
         int threads) {
    const int64_t dim = shape.dim, group = shape.q_heads / shape.kv_heads;
    const int64_t cuts = (group + MOST_HEADS - 1) / MOST_HEADS, at_once = (group + cuts - 1) / cuts;
    std::vector<Work> works;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t end = lengths[s], begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
        const int64_t first = begin / PIECE, pieces = (end - 1) / PIECE - first + 1;
        for (int64_t i = 0; i < pieces; i++)
            works.push_back({s, std::max(begin, (first + i) * PIECE), std::min(end, (first + i + 1) * PIECE), i, pieces});
    }
    const int64_t count = works.size(), entry = at_once * (dim + 2), places = shape.kv_heads * cuts;
    std::vector<float> found(count * places * entry);
    decltype(&attend<T, 16>) attend_heads = at_once <= 1   ? attend<T, 1>
                                            : at_once <= 2 ? attend<T, 2>
                                            : at_once <= 4 ? attend<T, 4>
                                            : at_once <= 8 ? attend<T, 8>
                                                           : attend<T, 16>;
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> room(new float[scratch<MOST_HEADS>(dim)]), joined(new float[dim]);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t w = 0; w < count; w++)
            for (int64_t place = 0; place < places; place++) {
                const Work &work = works[w];
                const int64_t shared = place / cuts, first = place % cuts * at_once;
                const int64_t heads = std::min(at_once, group - first);
                float *sums = found.data() + (w * places + place) * entry, *largest = sums + at_once * dim;
                attend_heads(shape, work, q + rows[work.sequence] * q_stride + (shared * group + first) * dim, shared,
                             heads, keys, values, tables + work.sequence * table_width, room.get(), sums, largest,
                             largest + at_once);
            }
#pragma omp for schedule(static)
        for (int64_t w = 0; w < count; w++) {
            if (works[w].piece) continue;
            for (int64_t head = 0; head < shape.q_heads; head++) {
                const int64_t place = head / group * cuts + head % group / at_once, g = head % group % at_once;
                auto piece = [&](int64_t i) { return found.data() + ((w + i) * places + place) * entry; };
                float most = -std::numeric_limits<float>::infinity(), total = 0;
                for (int64_t i = 0; i < works[w].pieces; i++) most = std::max(most, piece(i)[at_once * dim + g]);
                std::fill_n(joined.get(), dim, 0.0f);
                for (int64_t i = 0; i < works[w].pieces; i++) {
                    const float *sums = piece(i);
                    const float factor = exponential(sums[at_once * dim + g] - most);
                    total += sums[at_once * (dim + 1) + g] * factor;
                    for (int64_t d = 0; d < dim; d++) joined[d] += sums[g * dim + d] * factor;
                }
                T *to = out + (rows[works[w].sequence] * shape.q_heads + head) * dim;
                for (int64_t d = 0; d < dim; d++) to[d] = narrow<T>(joined[d] / total);
            }
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void attend_##NAME(const T *q, const T *keys, const T *values, const int64_t *rows,                     \
                                  const int64_t *tables, const int64_t *lengths, T *out, int64_t sequences,            \
                                  int64_t table_width, int64_t q_stride, int64_t window, int64_t q_heads,              \
                                  int64_t kv_heads, int64_t dim, int64_t page, float scale, float soft_cap,            \
                                  int threads) {                                                                       \
        const Shape shape{q_heads, kv_heads, dim, page, scale, soft_cap};                                              \
        run(q, keys, values, rows, tables, lengths, out, sequences, table_width, q_stride, window, shape, threads);    \
    }

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
