// Access patterns: transpose a matrix of float32,  out[c][r] = in[r][c].
//
// Work: no arithmetic. It must read rows*cols floats and write as many: 8 bytes an element. A copy does the same, so
// the copy rate of the machine is the limit. All that differs between the versions is the pattern of their addresses.
//
// A warp's 32 lanes issue one request. Global memory answers in sectors of 32 bytes: 32 neighbouring floats are 4
// sectors, 32 floats one row apart are 32 sectors, of which 7/8 is thrown away. Shared memory has 32 banks of 4 bytes:
// 32 lanes that hit one bank wait 32 times.
//
//   transpose_naive        a thread per element; reads are neighbours, writes are a stride of `rows` apart
//   transpose_write_first  the other way round: writes are neighbours, reads are strided
//   transpose_tiled        a 32x32 tile in shared memory turns the corner; both sides of global memory are neighbours
//   transpose_padded       one unused column in the tile moves each row to another bank
//   transpose_fast         128-bit loads and stores: a quarter of the instructions, more bytes in flight
//
// See: Mark Harris, "An Efficient Matrix Transpose in CUDA C/C++" (NVIDIA blog, 2013).

constexpr int kTile = 32;

// adds: nothing; the plain version
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_naive(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    const int r = blockIdx.y * kTile + threadIdx.y;
    const int c = blockIdx.x * kTile + threadIdx.x;  // lanes are neighbours in a row of `in`
    if (r < rows && c < cols) out[c * rows + r] = in[r * cols + c];
}

// adds: lanes that are neighbours in the output instead (a cache can serve what a strided read fetched too much of)
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_write_first(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    const int r = blockIdx.y * kTile + threadIdx.x;  // lanes are neighbours in a row of `out`
    const int c = blockIdx.x * kTile + threadIdx.y;
    if (r < rows && c < cols) out[c * rows + r] = in[r * cols + c];
}

// Reads a tile along the rows of `in`, waits, writes it along the rows of `out`. `pad` unused columns end each row.
template <int pad>
__device__ __forceinline__ void transpose_through_tile(const float* in, float* out, int rows, int cols) {
    __shared__ float tile[kTile][kTile + pad];
    const int x = threadIdx.x, y = threadIdx.y;
    const int r0 = blockIdx.y * kTile, c0 = blockIdx.x * kTile;
    if (r0 + y < rows && c0 + x < cols) tile[y][x] = in[(r0 + y) * cols + c0 + x];
    __syncthreads();
    if (c0 + y < cols && r0 + x < rows) out[(c0 + y) * rows + r0 + x] = tile[x][y];  // a column of the tile
}

// adds: a tile in shared memory, so that reads and writes of global memory are both neighbours
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_tiled(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    transpose_through_tile<0>(in, out, rows, cols);  // a column of 32 floats lies in one bank: 32 wavefronts
}

// adds: one padding column: tile[x][y] of 32 lanes now lies in 32 banks
// launch: tile 32x32, block 32x32
extern "C" __global__ void __launch_bounds__(1024)
transpose_padded(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    transpose_through_tile<1>(in, out, rows, cols);
}

// adds: 128-bit loads and stores, four elements a thread (rows or columns not divisible by 4 go the scalar way)
// launch: tile 32x32, block 256
extern "C" __global__ void __launch_bounds__(256)
transpose_fast(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    __shared__ float tile[kTile][kTile + 1];
    const int line = threadIdx.x / 8, four = threadIdx.x % 8 * 4;  // 8 threads carry one line of 32
    const int r0 = blockIdx.y * kTile, c0 = blockIdx.x * kTile;

    const int r = r0 + line, c = c0 + four;
    if (cols % 4 == 0 && r < rows && c < cols) {
        const float4 v = *reinterpret_cast<const float4*>(&in[r * cols + c]);
        tile[line][four] = v.x;  // banks line + four: 4 lines x 8 fours of a warp are 32 different ones
        tile[line][four + 1] = v.y;
        tile[line][four + 2] = v.z;
        tile[line][four + 3] = v.w;
    } else if (r < rows) {
        for (int i = 0; i < 4; ++i)
            if (c + i < cols) tile[line][four + i] = in[r * cols + c + i];
    }
    __syncthreads();

    const int out_r = c0 + line, out_c = r0 + four;
    if (rows % 4 == 0 && out_r < cols && out_c < rows) {
        *reinterpret_cast<float4*>(&out[out_r * rows + out_c]) =
            make_float4(tile[four][line], tile[four + 1][line], tile[four + 2][line], tile[four + 3][line]);
    } else if (out_r < cols) {
        for (int i = 0; i < 4; ++i)
            if (out_c + i < rows) out[out_r * rows + out_c + i] = tile[four + i][line];
    }
}
