// Occupancy: the tiled matrix product of matmul.cu, C[m][n] = A[m][k] * B[k][n], at many tile sizes.
//
// Work: 2*m*n*k FLOPs as before. It must move 4*(m*k + k*n + m*n) bytes. A block computes kTile x kTile outputs with
// (kTile/kPerThread)^2 threads, each of which keeps kPerThread x kPerThread sums in registers. Two forces pull against
// each other:
//   reuse      global loads per output are 2k/kTile; reads of shared memory per multiply-add are 2/kPerThread.
//              Big tiles and many sums per thread are good.
//   occupancy  an SM has warp slots, block slots, registers and shared memory to give. Big blocks, many registers and
//              big tiles mean fewer warps to hide latency with.
// Occupancy is a means. Predict before you measure: occupancy_tile8 fills the SM but reads two floats for each
// multiply-add; occupancy_tile128 fills a quarter of it and reads half a float; occupancy_squeezed doubles the warps of
// tile128 and pays with spills. `titan kernels` prints the theoretical figure of each, `ncu` the achieved one.
//
//   occupancy_tile4     16 threads: half of each warp has no work, and block slots run out first
//   occupancy_tile8     64 threads: a full SM, but each element is loaded k/8 times
//   occupancy_tile16    256 threads
//   occupancy_tile32    1024 threads: on a GPU with 48 warp slots a second block does not fit
//   occupancy_tile128   8x8 sums per thread, registers set the limit
//   occupancy_squeezed  the same, told to fit four blocks on an SM: registers spill to memory
//   occupancy_fast      4x4 sums per thread, 64x64 tiles: 16 multiply-adds for 8 reads, half of the warp slots or more
//
// See: Vasily Volkov, "Better Performance at Lower Occupancy" (GTC 2010).

#define MATRICES const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int m, int n, int k

template <int kTile, int kStep, int kPerThread>
__device__ __forceinline__ void tile_matmul(MATRICES) {
    constexpr int kSide = kTile / kPerThread, kThreads = kSide * kSide;
    static_assert(kTile * kStep % kThreads == 0, "each thread carries the same number of elements");
    __shared__ float a_tile[kStep][kTile + 1], b_tile[kStep][kTile];  // A transposed; padded for its strided store
    const int t = threadIdx.x, x = t % kSide, y = t / kSide;
    const int row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile;
    float sum[kPerThread][kPerThread] = {};
    for (int k0 = 0; k0 < k; k0 += kStep) {
#pragma unroll
        for (int j = 0; j < kTile * kStep / kThreads; ++j) {
            const int i = t + j * kThreads;
            const int a_row = i / kStep, a_col = i % kStep, b_row = i / kTile, b_col = i % kTile;
            a_tile[a_col][a_row] = row0 + a_row < m && k0 + a_col < k ? a[(row0 + a_row) * k + k0 + a_col] : 0.0f;
            b_tile[b_row][b_col] = k0 + b_row < k && col0 + b_col < n ? b[(k0 + b_row) * n + col0 + b_col] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            float a_part[kPerThread], b_part[kPerThread];  // rows y, y + kSide, ...: lanes read neighbours
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) {
                a_part[j] = a_tile[i][y + j * kSide];
                b_part[j] = b_tile[i][x + j * kSide];
            }
#pragma unroll
            for (int r = 0; r < kPerThread; ++r)
#pragma unroll
                for (int s = 0; s < kPerThread; ++s) sum[r][s] += a_part[r] * b_part[s];
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kPerThread; ++r)
#pragma unroll
        for (int s = 0; s < kPerThread; ++s) {
            const int row = row0 + y + r * kSide, col = col0 + x + s * kSide;
            if (row < m && col < n) c[row * n + col] = sum[r][s];
        }
}

// adds: nothing; the smallest tile
// launch: tile 4x4, block 16
extern "C" __global__ void __launch_bounds__(16) occupancy_tile4(MATRICES) { tile_matmul<4, 4, 1>(a, b, c, m, n, k); }

// adds: full warps
// launch: tile 8x8, block 64
extern "C" __global__ void __launch_bounds__(64) occupancy_tile8(MATRICES) { tile_matmul<8, 8, 1>(a, b, c, m, n, k); }

// adds: twice the reuse, as many warps on an SM
// launch: tile 16x16, block 256
extern "C" __global__ void __launch_bounds__(256) occupancy_tile16(MATRICES) {
    tile_matmul<16, 16, 1>(a, b, c, m, n, k);
}

// adds: twice the reuse again, in blocks of the largest size
// launch: tile 32x32, block 1024
extern "C" __global__ void __launch_bounds__(1024) occupancy_tile32(MATRICES) {
    tile_matmul<32, 32, 1>(a, b, c, m, n, k);
}

// adds: 64 sums per thread: a read of shared memory feeds 4 multiply-adds, with a quarter of the warps
// launch: tile 128x128, block 256
extern "C" __global__ void __launch_bounds__(256, 2) occupancy_tile128(MATRICES) {
    tile_matmul<128, 8, 8>(a, b, c, m, n, k);
}

// adds: a demand for 4 blocks an SM, which leaves 64 registers a thread for 64 sums and all else
// launch: tile 128x128, block 256
extern "C" __global__ void __launch_bounds__(256, 4) occupancy_squeezed(MATRICES) {
    tile_matmul<128, 8, 8>(a, b, c, m, n, k);
}

// adds: the middle way: 16 sums per thread fit in 64 registers, so 4 blocks fit without a spill
// launch: tile 64x64, block 256
extern "C" __global__ void __launch_bounds__(256, 4) occupancy_fast(MATRICES) {
    tile_matmul<64, 16, 4>(a, b, c, m, n, k);
}
