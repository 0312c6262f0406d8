// Matrix product in float32 of square matrices, row-major:  C = A * B, each n x n, n a multiple of 16.
//
// Work: 2*n^3 FLOPs; it must move 12*n^2 bytes: A, B and C once each. At n = 1024 that is 2.1 GFLOP over 12.6 MB, 171
// FLOPs a byte. Versions for the notebook 02_matmul_1024, each with one change; all take a grid of (n/16, n/16) blocks
// of 16 x 16 threads, a thread for each output:
//
//   naive         lanes walk down a column: 2n loads an output, and every row of A and C is its own sector
//   coalesced     lanes walk along a row: as many loads, in fewer sectors
//   tiled         tiles of 16 x 16 in shared memory: each float that is loaded serves 16 threads
//   conflicting   the tile of B lies transposed: eight lanes at a time want the same bank. A mistake, on purpose
//
// Phase 0 (task 0.5) goes on from there: any size, more outputs for each thread, 128-bit loads.
// Source: CUDA C++ Programming Guide, "Shared Memory".

constexpr int kTile = 16;

#define MATRICES const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int n

__device__ __forceinline__ float row_times_column(const float* a, const float* b, int row, int col, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += a[row * n + i] * b[i * n + col];
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) naive(MATRICES) {
    const int row = blockIdx.y * kTile + threadIdx.x;  // neighbours of a warp are neighbours in a column
    const int col = blockIdx.x * kTile + threadIdx.y;
    c[row * n + col] = row_times_column(a, b, row, col, n);
}

extern "C" __global__ void __launch_bounds__(256) coalesced(MATRICES) {
    const int row = blockIdx.y * kTile + threadIdx.y;
    const int col = blockIdx.x * kTile + threadIdx.x;  // neighbours of a warp are neighbours in a row
    c[row * n + col] = row_times_column(a, b, row, col, n);
}

// kTransposed: element (k, column) of B's tile lies at [column][k], so lanes that are neighbours read 16 floats apart.
template <bool kTransposed>
__device__ __forceinline__ void through_tiles(MATRICES, float (*a_tile)[kTile], float (*b_tile)[kTile]) {
    const int x = threadIdx.x, y = threadIdx.y;
    const int row = blockIdx.y * kTile + y, col = blockIdx.x * kTile + x;
    float sum = 0.0f;
    for (int k0 = 0; k0 < n; k0 += kTile) {
        a_tile[y][x] = a[row * n + k0 + x];
        (kTransposed ? b_tile[x][y] : b_tile[y][x]) = b[(k0 + y) * n + col];
        __syncthreads();
        for (int i = 0; i < kTile; ++i) sum += a_tile[y][i] * (kTransposed ? b_tile[x][i] : b_tile[i][x]);
        __syncthreads();  // nobody overwrites a tile that someone still reads
    }
    c[row * n + col] = sum;
}

extern "C" __global__ void __launch_bounds__(256) tiled(MATRICES) {
    __shared__ float a_tile[kTile][kTile], b_tile[kTile][kTile];
    through_tiles<false>(a, b, c, n, a_tile, b_tile);
}

extern "C" __global__ void __launch_bounds__(256) conflicting(MATRICES) {
    __shared__ float a_tile[kTile][kTile], b_tile[kTile][kTile];
    through_tiles<true>(a, b, c, n, a_tile, b_tile);
}
