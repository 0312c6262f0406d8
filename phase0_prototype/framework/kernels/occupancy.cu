// Occupancy: a tiled matrix product, C[m][n] = A[m][k] * B[k][n], at a tile size that you choose.
//
// Work: 2*m*n*k FLOPs. A block of kTile x kTile threads computes kTile x kTile outputs, one a thread, so every
// multiply-add reads two floats from shared memory. `titan kernels` shows what each size does to occupancy.
//
// The two comment lines above a kernel are read by the host: `tile` is the rows x columns of C that a block computes,
// `block` its threads. Change them together with the kernel and its __launch_bounds__.

#define MATRICES const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int m, int n, int k

template <int kTile>
__device__ __forceinline__ void tile_matmul(MATRICES) {
    __shared__ float a_tile[kTile][kTile], b_tile[kTile][kTile];
    const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
    const int row = blockIdx.y * kTile + y, col = blockIdx.x * kTile + x;
    float sum = 0.0f;
    for (int k0 = 0; k0 < k; k0 += kTile) {
        a_tile[y][x] = row < m && k0 + x < k ? a[row * k + k0 + x] : 0.0f;
        b_tile[y][x] = k0 + y < k && col < n ? b[(k0 + y) * n + col] : 0.0f;
        __syncthreads();
        for (int i = 0; i < kTile; ++i) sum += a_tile[y][i] * b_tile[i][x];
        __syncthreads();
    }
    if (row < m && col < n) c[row * n + col] = sum;
}

// adds: nothing; the smallest tile
// launch: tile 4x4, block 16
extern "C" __global__ void __launch_bounds__(16) occupancy_tile4(MATRICES) { tile_matmul<4>(a, b, c, m, n, k); }

// adds: nothing yet
// launch: tile 4x4, block 16
extern "C" __global__ void __launch_bounds__(16) occupancy_fast(MATRICES) {
    // TASK 0.6: 2 multiply-adds or more for each read of shared memory AND half of the warp slots, without spills.
    tile_matmul<4>(a, b, c, m, n, k);
}
