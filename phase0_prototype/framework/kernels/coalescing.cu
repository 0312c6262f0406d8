// Access patterns: transpose a matrix of float32,  out[c][r] = in[r][c].
//
// Work: no arithmetic. It must read rows*cols floats and write as many: 8 bytes an element, at the rate of a copy.
//
// The two comment lines above a kernel are read by the host: `tile` is the rows x columns of `in` that a block turns,
// `block` its threads (x, or x times y). Change them together with the kernel. Kernels are checked and counted on the
// CPU, so use static __shared__ arrays and no libraries.

constexpr int kTile = 32;

__device__ __forceinline__ void naive(const float* in, float* out, int rows, int cols) {
    const int r = blockIdx.y * kTile + threadIdx.y;
    const int c = blockIdx.x * kTile + threadIdx.x;
    if (r < rows && c < cols) out[c * rows + r] = in[r * cols + c];
}

// adds: nothing; the plain version
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_naive(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    naive(in, out, rows, cols);
}

// adds: nothing yet
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_fast(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    // TASK 0.4: move no sector that is not used, on either side, without a bank conflict, 16 bytes at a time.
    naive(in, out, rows, cols);
}
