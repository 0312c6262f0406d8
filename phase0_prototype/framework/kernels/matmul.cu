// Matrix product in float32:  C[m][n] = A[m][k] * B[k][n], all row-major, any sizes.
//
// Work: 2*m*n*k FLOPs; it must move 4*(m*k + k*n + m*n) bytes. The version here loads 2k floats for every output.
//
// The two comment lines above a kernel are read by the host: `tile` is the rows x columns of C that a block computes,
// `block` its threads (x, or x times y). Change them together with the kernel. Kernels are checked and counted on the
// CPU, so use static __shared__ arrays and no libraries.

#define MATRICES const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c, int m, int n, int k

__device__ __forceinline__ void naive(MATRICES) {
    const int row = blockIdx.y * 32 + threadIdx.x;
    const int col = blockIdx.x * 32 + threadIdx.y;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum += a[row * k + i] * b[i * n + col];
    c[row * n + col] = sum;
}

// adds: nothing; the plain version, 2k global loads for an output
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024) matmul_naive(MATRICES) { naive(a, b, c, m, n, k); }

// adds: nothing yet
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024) matmul_fast(MATRICES) {
    // TASK 0.5: load each float once for many outputs. Floor: 10 times fewer global loads. Aim: 80 % of cuBLAS.
    naive(a, b, c, m, n, k);
}
