// Matrix product in float32:  C[m][n] = A[m][k] * B[k][n], all row-major.
//
// Work: 2*m*n*k FLOPs. It must move 4*(m*k + k*n + m*n) bytes. At m = n = k = 4096 that is 137 GFLOP over 0.2 GB, or
// 683 FLOPs a byte: bound by arithmetic, if every element is fetched about once. The naive version fetches each
// element 4096 times. The ladder moves that reuse closer to the arithmetic: first into shared memory, then registers.
//
//   matmul_naive         a thread per output; lanes walk down a column, so every load of A is its own sector
//   matmul_coalesced     lanes walk along a row: loads of B and stores of C are neighbours
//   matmul_tiled         32x32 tiles in shared memory: global loads / 32
//   matmul_registers_1d  8 outputs of a column per thread: one read of B's tile feeds 8 multiply-adds
//   matmul_registers_2d  8x8 outputs per thread: 16 reads feed 64 multiply-adds
//   matmul_vectorised    128-bit loads, A's tile stored transposed and padded so that its columns are vectors too
//   matmul_fast          warp tiles (no bank conflicts) and two buffers: the next tile loads while this one computes
//
// Sizes need not be multiples of anything. See: Simon Boehm, "How to Optimize a CUDA Matmul Kernel for cuBLAS-like
// Performance" (2022), and CUTLASS, "Efficient GEMM in CUDA".

#define MATRICES const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int m, int n, int k

// adds: nothing; the plain version, 2k global loads for an output
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024) matmul_naive(MATRICES) {
    const int row = blockIdx.y * 32 + threadIdx.x;
    const int col = blockIdx.x * 32 + threadIdx.y;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum += a[row * k + i] * b[i * n + col];
    c[row * n + col] = sum;
}

// adds: lanes are neighbours in a row; as many loads, in fewer sectors
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024) matmul_coalesced(MATRICES) {
    const int row = blockIdx.y * 32 + threadIdx.y;
    const int col = blockIdx.x * 32 + threadIdx.x;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum += a[row * k + i] * b[i * n + col];  // A is one address for the warp, B neighbours
    c[row * n + col] = sum;
}

// An element of a matrix, or 0 outside of it: a ragged edge multiplies zeros.
__device__ __forceinline__ float at(const float* matrix, int row, int col, int rows, int cols) {
    return row < rows && col < cols ? matrix[row * cols + col] : 0.0f;
}

// adds: tiles of A and B in shared memory, each element read by 32 threads
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024) matmul_tiled(MATRICES) {
    __shared__ float a_tile[32][32], b_tile[32][32];
    const int x = threadIdx.x, y = threadIdx.y;
    const int row = blockIdx.y * 32 + y, col = blockIdx.x * 32 + x;
    float sum = 0.0f;
    for (int k0 = 0; k0 < k; k0 += 32) {
        a_tile[y][x] = at(a, row, k0 + x, m, k);
        b_tile[y][x] = at(b, k0 + y, col, k, n);
        __syncthreads();
        for (int i = 0; i < 32; ++i) sum += a_tile[y][i] * b_tile[i][x];
        __syncthreads();  // nobody overwrites a tile that someone still reads
    }
    if (row < m && col < n) c[row * n + col] = sum;
}

// adds: 8 outputs of a column per thread, kept in registers
// launch: tile 64x64, block 512
extern "C" __global__ void __launch_bounds__(512) matmul_registers_1d(MATRICES) {
    __shared__ float a_tile[64][8], b_tile[8][64];
    const int t = threadIdx.x;
    const int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;
    const int my_row = t / 64 * 8, my_col = t % 64;
    float sum[8] = {};
    for (int k0 = 0; k0 < k; k0 += 8) {
        a_tile[t / 8][t % 8] = at(a, row0 + t / 8, k0 + t % 8, m, k);
        b_tile[t / 64][t % 64] = at(b, k0 + t / 64, col0 + t % 64, k, n);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float b_value = b_tile[i][my_col];
#pragma unroll
            for (int r = 0; r < 8; ++r) sum[r] += a_tile[my_row + r][i] * b_value;
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
        if (row0 + my_row + r < m && col0 + my_col < n) c[(row0 + my_row + r) * n + col0 + my_col] = sum[r];
}

// adds: 8x8 outputs per thread; each value read from shared memory is used 8 times
// launch: tile 128x128, block 256
extern "C" __global__ void __launch_bounds__(256) matmul_registers_2d(MATRICES) {
    __shared__ float a_tile[128][8], b_tile[8][128];
    const int t = threadIdx.x;
    const int row0 = blockIdx.y * 128, col0 = blockIdx.x * 128;
    const int my_row = t / 16 * 8, my_col = t % 16 * 8;
    float sum[8][8] = {};
    for (int k0 = 0; k0 < k; k0 += 8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int a_row = t / 8 + i * 32, b_row = t / 128 + i * 2;
            a_tile[a_row][t % 8] = at(a, row0 + a_row, k0 + t % 8, m, k);
            b_tile[b_row][t % 128] = at(b, k0 + b_row, col0 + t % 128, k, n);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float a_part[8], b_part[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) a_part[j] = a_tile[my_row + j][i], b_part[j] = b_tile[i][my_col + j];
#pragma unroll
            for (int r = 0; r < 8; ++r)
#pragma unroll
                for (int s = 0; s < 8; ++s) sum[r][s] += a_part[r] * b_part[s];
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int s = 0; s < 8; ++s)
            if (row0 + my_row + r < m && col0 + my_col + s < n)
                c[(row0 + my_row + r) * n + col0 + my_col + s] = sum[r][s];
}

// Four neighbours of a row: one 128-bit load where all four exist and are aligned, else one by one, zeros outside.
template <bool kWhole>
__device__ __forceinline__ float4 four(const float* matrix, int row, int col, int rows, int cols) {
    if (kWhole) return *reinterpret_cast<const float4*>(&matrix[row * cols + col]);
    return make_float4(at(matrix, row, col, rows, cols), at(matrix, row, col + 1, rows, cols),
                       at(matrix, row, col + 2, rows, cols), at(matrix, row, col + 3, rows, cols));
}

template <bool kWhole>
__device__ __forceinline__ void store_four(float* matrix, int row, int col, int rows, int cols, const float* v) {
    if (kWhole) {
        *reinterpret_cast<float4*>(&matrix[row * cols + col]) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (row < rows && col + i < cols) matrix[row * cols + col + i] = v[i];
    }
}

constexpr int kEdge = 128;        // outputs of a block: kEdge x kEdge
constexpr int kStep = 8;          // columns of A and rows of B per tile
constexpr int kPad = 4;           // spreads the transposed store over the banks and keeps rows 16-byte aligned

__device__ __forceinline__ void put_transposed(float (*tile)[kEdge + kPad], int row, int col, float4 v) {
    tile[col][row] = v.x;
    tile[col + 1][row] = v.y;
    tile[col + 2][row] = v.z;
    tile[col + 3][row] = v.w;
}

// v[0..8] from two places of a tile's row, 128 bits each.
__device__ __forceinline__ void get_eight(float* v, const float* first, const float* second) {
    const float4 x = *reinterpret_cast<const float4*>(first), y = *reinterpret_cast<const float4*>(second);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
}

__device__ __forceinline__ void multiply(float (*sum)[8], const float* a_part, const float* b_part) {
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int s = 0; s < 8; ++s) sum[r][s] += a_part[r] * b_part[s];
}

template <bool kWhole>
__device__ __forceinline__ void vectorised(MATRICES, float (*a_tile)[kEdge + kPad], float (*b_tile)[kEdge]) {
    const int t = threadIdx.x;
    const int row0 = blockIdx.y * kEdge, col0 = blockIdx.x * kEdge;
    const int my_row = t / 16 * 8, my_col = t % 16 * 8;
    float sum[8][8] = {};
    for (int k0 = 0; k0 < k; k0 += kStep) {
        put_transposed(a_tile, t / 2, t % 2 * 4, four<kWhole>(a, row0 + t / 2, k0 + t % 2 * 4, m, k));
        *reinterpret_cast<float4*>(&b_tile[t / 32][t % 32 * 4]) =
            four<kWhole>(b, k0 + t / 32, col0 + t % 32 * 4, k, n);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            float a_part[8], b_part[8];
            get_eight(a_part, &a_tile[i][my_row], &a_tile[i][my_row + 4]);
            get_eight(b_part, &b_tile[i][my_col], &b_tile[i][my_col + 4]);  // lanes 32 bytes apart: 2 conflicts
            multiply(sum, a_part, b_part);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int s = 0; s < 8; s += 4)
            store_four<kWhole>(c, row0 + my_row + r, col0 + my_col + s, m, n, &sum[r][s]);
}

__device__ __forceinline__ bool is_whole(int m, int n, int k) {
    return m % kEdge == 0 && n % kEdge == 0 && k % kStep == 0;
}

// adds: 128-bit loads from global and shared memory; A's tile transposed so that 8 rows of a column are two vectors
// launch: tile 128x128, block 256
extern "C" __global__ void __launch_bounds__(256, 2) matmul_vectorised(MATRICES) {
    __shared__ float a_tile[kStep][kEdge + kPad], b_tile[kStep][kEdge];
    if (is_whole(m, n, k)) vectorised<true>(a, b, c, m, n, k, a_tile, b_tile);
    else vectorised<false>(a, b, c, m, n, k, a_tile, b_tile);
}

// One warp owns 64x32 outputs; a lane owns rows {4*lane_row, +32} x columns {4*lane_col, +16}, four of each, so that
// the lanes of one 128-bit read are neighbours. While a tile is multiplied, the next one is on its way in registers.
template <bool kWhole>
__device__ __forceinline__ void warp_tiles(MATRICES, float (*a_tile)[kStep][kEdge + kPad],
                                           float (*b_tile)[kStep][kEdge]) {
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const int row0 = blockIdx.y * kEdge, col0 = blockIdx.x * kEdge;
    const int my_row = warp / 4 * 64 + lane / 4 * 4, my_col = warp % 4 * 32 + lane % 4 * 4;
    const int a_row = t / 2, a_col = t % 2 * 4, b_row = t / 32, b_col = t % 32 * 4;
    float sum[8][8] = {};

    float4 next_a = four<kWhole>(a, row0 + a_row, a_col, m, k);
    float4 next_b = four<kWhole>(b, b_row, col0 + b_col, k, n);
    for (int k0 = 0, buffer = 0; k0 < k; k0 += kStep, buffer ^= 1) {
        put_transposed(a_tile[buffer], a_row, a_col, next_a);
        *reinterpret_cast<float4*>(&b_tile[buffer][b_row][b_col]) = next_b;
        __syncthreads();  // one barrier is enough: the other buffer is only written after the next one
        if (k0 + kStep < k) {
            next_a = four<kWhole>(a, row0 + a_row, k0 + kStep + a_col, m, k);
            next_b = four<kWhole>(b, k0 + kStep + b_row, col0 + b_col, k, n);
        }
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            float a_part[8], b_part[8];
            get_eight(a_part, &a_tile[buffer][i][my_row], &a_tile[buffer][i][my_row + 32]);
            get_eight(b_part, &b_tile[buffer][i][my_col], &b_tile[buffer][i][my_col + 16]);
            multiply(sum, a_part, b_part);
        }
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int s = 0; s < 8; s += 4)
            store_four<kWhole>(c, row0 + my_row + r % 4 + r / 4 * 32, col0 + my_col + s * 4, m, n, &sum[r][s]);
}

// adds: warp tiles without bank conflicts, and double buffering: one barrier a tile, loads hidden behind arithmetic
// launch: tile 128x128, block 256
extern "C" __global__ void __launch_bounds__(256, 2) matmul_fast(MATRICES) {
    __shared__ float a_tile[2][kStep][kEdge + kPad], b_tile[2][kStep][kEdge];
    if (is_whole(m, n, k)) warp_tiles<true>(a, b, c, m, n, k, a_tile, b_tile);
    else warp_tiles<false>(a, b, c, m, n, k, a_tile, b_tile);
}
