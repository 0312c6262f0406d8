// x [m, k] times the transpose of w [n, k], bfloat16 with sums in float32: the product of every linear layer.
//
// A decode step reads each weight once and uses it m times, so up to about ten rows the memory sets the time, from then
// on the multiplier. One loop serves both. VDPBF16PS multiplies 16 pairs of neighbours in k and adds each to its lane:
//
//   weights   in panels of 32 columns; a panel has k / 2 lines of 128 bytes, the pairs of its 32 columns. So a panel is
//             one stream through memory, which the hardware prefetches.
//   rows      a tile of up to 12 rows x 32 columns is 24 registers of sums; for each line of the panel, one pair of
//             each row is broadcast. The inputs are copied so that these pairs lie side by side: rows that are a
//             multiple of 4 KiB apart would all fall into one set of the first-level cache.
//   memory    one tile is limited by its panel's way from memory. Of several tiles only the first would be: so each
//             fetches its share of the next panel while it computes.
//   threads   take a few panels at a time. One that is held up, by another process on its core, takes fewer.
#include <algorithm>
#include <cstdlib>

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t COLUMNS = 32, ROWS = 12, PANELS = 8, LINE = 2 * COLUMNS * sizeof(bf16);
constexpr int64_t MOST_SHARES = 8;  // tiles for whom fetching the next panel is worth an instruction a line
constexpr int64_t AHEAD = 2048;  // bytes of a panel that are on their way to the first-level cache

inline __m512bh line(const void *at) { return (__m512bh)_mm512_loadu_si512(at); }

inline __m256i rounded(__m512 sums) { return (__m256i)_mm512_cvtneps_pbh(sums); }

// R rows, x [half][R] pairs, times one panel, plus its part of the bias; on the way `share` bytes a line are fetched
// from `next` into the second-level cache.
template <int R>
void tile(const uint32_t *x, const char *panel, int64_t half, const bf16 *bias, bf16 *out, int64_t n, const char *next,
          int64_t share) {
    __m512 sums[R][2];
    for (int h = 0; h < 2; h++) {
        float start[16] = {};
        for (int c = 0; bias && c < 16; c++) start[c] = wide(bias[16 * h + c]);
        for (int r = 0; r < R; r++) sums[r][h] = _mm512_loadu_ps(start);
    }
    for (int64_t k = 0; k < half; k++, panel += LINE, x += R, next += share) {
        _mm_prefetch(panel + AHEAD, _MM_HINT_T0);
        _mm_prefetch(panel + AHEAD + 64, _MM_HINT_T0);
        if (share) _mm_prefetch(next, _MM_HINT_T1);
        const __m512bh left = line(panel), right = line(panel + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[r]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right);
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(out + r * n + 16 * h), rounded(sums[r][h]));
}

using Tile = void (*)(const uint32_t *, const char *, int64_t, const bf16 *, bf16 *, int64_t, const char *,
                      int64_t);
const Tile TILES[] = {tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                      tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

}  // namespace

extern "C" int has_product() { return 1; }

// x [m, k], panels [n / 32][k / 2][32][2], bias [n] or null, out [m, n]; n is a multiple of 32, k even.
extern "C" void product(const uint32_t *x, const char *panels, const bf16 *bias, bf16 *out, int64_t m, int64_t n,
                        int64_t k, int threads) {
    if (!m) return;
    const int64_t tiles = (m + ROWS - 1) / ROWS, each = m / tiles, longer = m % tiles;  // rows of a tile: each, or + 1
    const int64_t half = k / 2, chunks = (n / COLUMNS + PANELS - 1) / PANELS;
    uint32_t *copy = m == 1 ? nullptr : (uint32_t *)malloc(m * half * sizeof(uint32_t));
    const uint32_t *rows = m == 1 ? x : copy;
#pragma omp parallel num_threads(threads)
    {
        if (copy) {
#pragma omp for schedule(static)
            for (int64_t from = 0; from < half; from += 16)
                for (int64_t t = 0, row = 0; t < tiles; t++) {
                    const int64_t size = each + (t < longer), to = std::min(half, from + 16);
                    for (int64_t i = from; i < to; i++)
                        for (int64_t r = 0; r < size; r++) copy[row * half + i * size + r] = x[(row + r) * half + i];
                    row += size;
                }
        }
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t p = chunk * PANELS; p < std::min(n / COLUMNS, (chunk + 1) * PANELS); p++)
                for (int64_t t = 0, row = 0; t < tiles; t++) {
                    const int64_t size = each + (t < longer), column = p * COLUMNS;
                    const char *panel = panels + p * half * LINE, *next = panel + half * LINE;
                    const int64_t share = tiles > 1 && tiles <= MOST_SHARES ? LINE / tiles : 0;
                    TILES[size - 1](rows + row * half, panel, half, bias ? bias + column : nullptr,
                                    out + row * n + column, n, next + t * half * share, share);
                    row += size;
                }
    }
    free(copy);
}

#else

extern "C" int has_product() { return 0; }

#endif
