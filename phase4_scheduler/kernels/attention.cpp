// Causal attention of a step's tokens, decodes and prompts alike, to their pages, where they lie: nothing is gathered.
//
// A work is a few tokens of one sequence, and all query heads that share one key head: each of these (token, head) is a
// lane. Keys and values come in tiles that are widened into the nearest cache once for all lanes. Scores are computed
// with one lane of a vector for each, so no sum goes across a vector; the softmax goes on from tile to tile with a
// running maximum (Milakov & Gimelshein, 2018, arXiv 1805.02867). A decode to a long sequence is cut into pieces, always
// at the same tokens, that several threads take; their sums are joined at the end. So what comes out for a sequence
// depends on nothing but itself.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t TILE = 32, PIECE = 1024, MOST_LANES = 64;
constexpr int WIDTH = 16;  // numbers in a vector
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Wide __attribute__((vector_size(4 * WIDTH), aligned(4)));

template <int L> struct Lanes {
    typedef float type __attribute__((vector_size(4 * L), aligned(4)));
};

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Shape {
    int64_t q_heads, kv_heads, dim, page, window;  // window 0: none
    float scale, soft_cap;                         // soft_cap 0: none

    int64_t group() const { return q_heads / kv_heads; }
    // Numbers of a head where they are computed with: behind the last are zeros.
    int64_t width() const { return rounded_up(dim, WIDTH); }
};

struct Work {
    int64_t sequence, row, tokens;  // of q and out
    int64_t position;               // of the first token in its sequence
    int64_t from, to;               // keys
    int64_t piece, pieces;          // which of the token's
};

// What a thread works in. `keys` and `values` are zero at first, and what lies behind a head's last number stays so.
struct Room {
    std::vector<float> keys, values, queries, scores, sums, most, total;
    explicit Room(int64_t lanes, int64_t width)
        : keys(TILE * width), values(TILE * width), queries(lanes * width), scores(TILE * WIDTH), sums(lanes * width),
          most(lanes), total(lanes) {}
};

template <class T> void widen(const T *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
#pragma omp simd
        for (int j = 0; j < WIDTH; j++) to[i + j] = wide(from[i + j]);
    for (; i < n; i++) to[i] = wide(from[i]);
}

// scores [tokens][L] of keys [tokens][width] and queries [width][L], eight tokens at a time: one multiply-add waits four
// cycles for the one before it, and two start in each. What lies behind the last token is multiplied too, and not used.
template <int L> void multiply_by_lane(const float *keys, const float *queries, float *scores, int64_t n, int64_t width) {
    typedef typename Lanes<L>::type Vector;
    for (int64_t t = 0; t < n; t += 8) {
        Vector sums[8] = {};
        for (int64_t d = 0; d < width; d++) {
            const Vector q = *(const Vector *)(queries + d * L);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[i] += keys[(t + i) * width + d] * q;
        }
        for (int i = 0; i < 8; i++) *(Vector *)(scores + (t + i) * L) = sums[i];
    }
}

// The same for queries [L][width], where lanes are too few to fill a vector.
template <int L> void multiply_by_dim(const float *keys, const float *queries, float *scores, int64_t n, int64_t width) {
    for (int64_t t = 0; t < n; t++)
        for (int l = 0; l < L; l++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < width; d++) sum += keys[t * width + d] * queries[l * width + d];
            scores[t * L + l] = sum;
        }
}

// sums [width] of a lane = sums * factor + weights (L apart) x values [tokens][width], V vectors at a time.
template <int L, int V>
void add_values(const float *values, const float *weights, float *sums, float factor, int64_t n, int64_t width) {
    for (int64_t d = 0; d < width; d += V * WIDTH) {
        Wide found[V];
        for (int i = 0; i < V; i++) found[i] = *(const Wide *)(sums + d + i * WIDTH) * factor;
        for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 4
            for (int i = 0; i < V; i++) found[i] += weights[t * L] * *(const Wide *)(values + t * width + d + i * WIDTH);
        for (int i = 0; i < V; i++) *(Wide *)(sums + d + i * WIDTH) = found[i];
    }
}

// Attends with all lanes of a work to its keys; `q` are its tokens' heads, which lie `q_stride` numbers apart.
template <class T, int L>
void attend(const Shape &shape, const Work &work, const T *q, int64_t q_stride, int64_t shared, const T *keys,
            const T *values, const int64_t *table, Room &room) {
    constexpr bool BY_LANE = L >= 4;
    typedef typename Lanes<L>::type Vector;
    const int64_t group = shape.group(), lanes = work.tokens * group, width = shape.width();
    const int64_t page = shape.page, apart = shape.kv_heads * shape.dim;
    float *scores = room.scores.data();
    std::fill(room.queries.begin(), room.queries.end(), 0.0f);
    std::fill(room.sums.begin(), room.sums.end(), 0.0f);
    std::fill(room.most.begin(), room.most.end(), NOTHING);
    std::fill(room.total.begin(), room.total.end(), 0.0f);
    for (int64_t lane = 0; lane < lanes; lane++) {
        const T *head = q + lane / group * q_stride + lane % group * shape.dim;
        float *to = room.queries.data() + lane / L * L * width + (BY_LANE ? lane % L : lane % L * width);
        for (int64_t d = 0; d < shape.dim; d++) to[BY_LANE ? d * L : d] = wide(head[d]) * shape.scale;
    }
    for (int64_t from = work.from; from < work.to; from += TILE) {
        const int64_t n = std::min(TILE, work.to - from);
        for (int64_t t = 0; t < n;) {
            const int64_t place = (from + t) % page, stop = std::min(n, t + page - place);
            int64_t entry = ((table[(from + t) / page] * page + place) * shape.kv_heads + shared) * shape.dim;
            for (; t < stop; t++, entry += apart) {
                widen(keys + entry, room.keys.data() + t * width, shape.dim);
                widen(values + entry, room.values.data() + t * width, shape.dim);
            }
        }
        for (int64_t first = 0; first < lanes; first += L) {
            if (BY_LANE)
                multiply_by_lane<L>(room.keys.data(), room.queries.data() + first * width, scores, n, width);
            else
                multiply_by_dim<L>(room.keys.data(), room.queries.data() + first * width, scores, n, width);
            if (shape.soft_cap > 0)
                for (int64_t i = 0; i < n * L; i++) scores[i] = shape.soft_cap * std::tanh(scores[i] / shape.soft_cap);
            for (int l = 0; l < L && first + l < lanes; l++) {  // what the lane's token doesn't see
                const int64_t end = work.position + (first + l) / group + 1 - from;
                const int64_t begin = shape.window ? std::min(n, end - shape.window) : 0;
                for (int64_t t = 0; t < begin; t++) scores[t * L + l] = NOTHING;
                for (int64_t t = std::max<int64_t>(0, end); t < n; t++) scores[t * L + l] = NOTHING;
            }
            Vector *by_token = (Vector *)scores, before = *(Vector *)(room.most.data() + first), most = before, shift = {};
            for (int64_t t = 0; t < n; t++) most = by_token[t] > most ? by_token[t] : most;
            for (int l = 0; l < L; l++) shift[l] = most[l] == NOTHING ? 0.0f : most[l];  // nothing was seen yet
            for (int l = 0; l < L; l++) before[l] = exponential(before[l] - shift[l]);
            for (int64_t t = 0; t < n; t++) by_token[t] -= shift;
#pragma omp simd
            for (int64_t i = 0; i < n * L; i++) scores[i] = exponential(scores[i]);
            Vector total = *(Vector *)(room.total.data() + first) * before;
            for (int64_t t = 0; t < n; t++) total += by_token[t];
            *(Vector *)(room.most.data() + first) = most;
            *(Vector *)(room.total.data() + first) = total;
            for (int l = 0; l < L && first + l < lanes; l++) {
                float *sums = room.sums.data() + (first + l) * width;
                if (width % (4 * WIDTH) == 0)
                    add_values<L, 4>(room.values.data(), scores + l, sums, before[l], n, width);
                else
                    add_values<L, 1>(room.values.data(), scores + l, sums, before[l], n, width);
            }
        }
    }
}

template <class T> auto attend_lanes(int64_t lanes) {
    return lanes <= 1 ? attend<T, 1> : lanes <= 2 ? attend<T, 2> : lanes <= 4 ? attend<T, 4>
           : lanes <= 8 ? attend<T, 8> : attend<T, 16>;
}

// All works of a step, for one kv head.
std::vector<Work> works_of(const Shape &shape, const int64_t *starts, const int64_t *lengths, int64_t sequences) {
    const int64_t at_once = std::max<int64_t>(1, MOST_LANES / shape.group());
    auto begin = [&](int64_t position) { return shape.window ? std::max<int64_t>(0, position + 1 - shape.window) : 0; };
    std::vector<Work> works;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t count = starts[s + 1] - starts[s], before = lengths[s] - count;
        if (count == 1) {
            const int64_t from = begin(before), first = from / PIECE, pieces = before / PIECE - first + 1;
            for (int64_t i = 0; i < pieces; i++)
                works.push_back({s, starts[s], 1, before, std::max(from, (first + i) * PIECE),
                                 std::min(lengths[s], (first + i + 1) * PIECE), i, pieces});
            continue;
        }
        for (int64_t t = 0; t < count; t += at_once) {
            const int64_t tokens = std::min(at_once, count - t), position = before + t;
            works.push_back({s, starts[s] + t, tokens, position, begin(position), position + tokens, 0, 1});
        }
    }
    return works;
}

template <class T>
void run(const T *q, const T *keys, const T *values, const int64_t *starts, const int64_t *tables,
         const int64_t *lengths, T *out, int64_t sequences, int64_t table_width, int64_t q_stride, const Shape &shape,
         int threads) {
    const int64_t group = shape.group(), width = shape.width(), entry = group * (width + 2);
    const std::vector<Work> works = works_of(shape, starts, lengths, sequences);
    const int64_t count = works.size();
    // Of decodes in pieces: sums [group][width], most and total [group] of each piece and kv head.
    std::vector<int64_t> places(count, -1);
    int64_t kept = 0, widest = group;
    for (int64_t w = 0; w < count; w++) {
        if (works[w].pieces > 1) places[w] = kept++;
        widest = std::max(widest, works[w].tokens * group);
    }
    std::vector<float> pieces(kept * shape.kv_heads * entry);
    auto piece = [&](int64_t w, int64_t shared) { return pieces.data() + (places[w] * shape.kv_heads + shared) * entry; };
#pragma omp parallel num_threads(threads)
    {
        Room room(rounded_up(widest, WIDTH), width);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t w = 0; w < count; w++)
            for (int64_t shared = 0; shared < shape.kv_heads; shared++) {
                const Work &work = works[w];
                const int64_t lanes = work.tokens * group;
                attend_lanes<T>(lanes)(shape, work, q + work.row * q_stride + shared * group * shape.dim, q_stride, shared,
                                       keys, values, tables + work.sequence * table_width, room);
                if (work.pieces > 1) {
                    float *to = piece(w, shared);
                    std::copy_n(room.sums.begin(), group * width, to);
                    std::copy_n(room.most.begin(), group, to + group * width);
                    std::copy_n(room.total.begin(), group, to + group * (width + 1));
                    continue;
                }
                for (int64_t lane = 0; lane < lanes; lane++) {
                    const int64_t head = shared * group + lane % group;
                    T *to = out + ((work.row + lane / group) * shape.q_heads + head) * shape.dim;
                    const float *sums = room.sums.data() + lane * width;
                    const float factor = 1.0f / room.total[lane];
                    for (int64_t d = 0; d < shape.dim; d++) to[d] = narrow<T>(sums[d] * factor);
                }
            }
#pragma omp for schedule(dynamic)
        for (int64_t w = 0; w < count; w++) {
            if (works[w].pieces == 1 || works[w].piece) continue;
            for (int64_t head = 0; head < shape.q_heads; head++) {
                const int64_t shared = head / group, g = head % group;
                float most = NOTHING, total = 0;
                for (int64_t i = 0; i < works[w].pieces; i++) most = std::max(most, piece(w + i, shared)[group * width + g]);
                std::fill_n(room.sums.begin(), width, 0.0f);
                for (int64_t i = 0; i < works[w].pieces; i++) {
                    const float *found = piece(w + i, shared);
                    const float factor = exponential(found[group * width + g] - most);
                    total += found[group * (width + 1) + g] * factor;
                    for (int64_t d = 0; d < width; d++) room.sums[d] += found[g * width + d] * factor;
                }
                T *to = out + (works[w].row * shape.q_heads + head) * shape.dim;
                for (int64_t d = 0; d < shape.dim; d++) to[d] = narrow<T>(room.sums[d] / total);
            }
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void attend_##NAME(const T *q, const T *keys, const T *values, const int64_t *starts,                   \
                                  const int64_t *tables, const int64_t *lengths, T *out, int64_t sequences,            \
                                  int64_t table_width, int64_t q_stride, int64_t q_heads, int64_t kv_heads,            \
                                  int64_t dim, int64_t page, int64_t window, float scale, float soft_cap,              \
                                  int threads) {                                                                       \
        const Shape shape{q_heads, kv_heads, dim, page, window, scale, soft_cap};                                      \
        run(q, keys, values, starts, tables, lengths, out, sequences, table_width, q_stride, shape, threads);          \
    }

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
