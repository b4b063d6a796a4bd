// Unstructured sparse product for few tokens on tensor cores: y [T, O] = x [T, K] W[O, K]^T + bias, bf16 in and out, fp32 sums.
//
// The weight is cut into tiles of 16 outputs x 16 inputs, 8 weights of each tile for a lane, in the order in which the lane
// gives them to mma.m16n8k16. The inputs of two tiles are dealt out so that a lane has 8 in a row of x, which it then reads at
// once, without shared memory. A stage is 8 tiles along the inputs: a bitmap of the lane's 64 weights, then rows of one word
// for each lane, with the kept weights of the first 4 tiles in its low half, in order, and those of the others in its high
// half. So lanes that read at different places never meet in a bank of shared memory. A warp owns a part of the inputs and
// one or two tiles of outputs, streams its stages through two buffers in shared memory and expands them in registers. The
// warps and the blocks of a cluster are summed in a fixed order.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <stdint.h>

namespace cg = cooperative_groups;

constexpr int WARPS = 20, TILES = 8, UNIT = 128, BARRIER_BYTES = 512;  // UNIT: bytes, one word of each lane

__device__ uint32_t address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ void fetch(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ uint32_t word(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}

__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What lies at `at` where `bit` is set in `bits`, else 0; `at` then goes to the next row. Each row has an address register of
// its own: one that is overwritten waits for the load before.
template <bool WORD>
__device__ uint32_t next(uint32_t bits, int bit, uint32_t& at) {
  uint32_t value;
  const uint32_t kept = bits & 1u << bit;
  if (WORD)
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.shared.u32 %0, [%1];\n}" : "=&r"(value) : "r"(at), "r"(kept));
  else
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.shared.u16 %0, [%1];\n}" : "=&r"(value) : "r"(at), "r"(kept));
  at += bit >= 7 ? kept >> (bit - 7) : kept << (7 - bit);
  return value;
}

__device__ void multiply(float (&sum)[4], const uint32_t (&w)[4], uint32_t x0, uint32_t x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
}

// N: tokens in eights, 1 or 2. PAIRS: a bit and a word for each two weights of which one is kept, instead of for each weight.
// The warps of a block share its inputs; each multiplies its part with R tiles of 16 outputs, so that x is read once for R.
template <int N, bool PAIRS, int R>
__global__ void __launch_bounds__(32 * WARPS, 1)
bitmap(const int* __restrict__ starts, const uint8_t* __restrict__ data, const __nv_bfloat16* __restrict__ x,
       const __nv_bfloat16* __restrict__ bias, __nv_bfloat16* __restrict__ y, int num_tokens, int num_outputs, int num_inputs,
       int num_stages, int stage_bytes) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = gridDim.x, part = blockIdx.x * WARPS + warp, parts = blocks * WARPS;
  // item i: stage i / R of tile i % R
  const int first = num_stages * R * part / parts, num_items = num_stages * R * (part + 1) / parts - first;
  const uint32_t buffers = address(shared) + BARRIER_BYTES + warp * 2 * stage_bytes, barriers = address(shared) + 16 * warp;
  cudaGridDependencySynchronize();  // launched while the kernel before this one ends
  int start = 0, stop = 0;          // in units, of the warp's item `lane`
  if (lane < num_items) {
    const int* at = starts + (blockIdx.y * R + (first + lane) % R) * num_stages + (first + lane) / R;
    start = at[0], stop = at[1];
  }
  auto request = [&](int i) {  // the warp's item i into its buffer
    const int from = __shfl_sync(~0u, start, i), to = __shfl_sync(~0u, stop, i);
    if (lane == 0) fetch(buffers + i % 2 * stage_bytes, data + size_t(from) * UNIT, (to - from) * UNIT, barriers + i % 2 * 8);
  };
  if (lane < 2) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * lane) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
  for (int i = 0; i < min(2, num_items); i++) request(i);

  uint4 inputs[TILES / 2][N];  // of two tiles and 8 tokens each
  auto load = [&](int stage, int pair) {
    const int k = stage * TILES * 16 + pair * 32 + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int token = n * 8 + lane / 4;
      inputs[pair][n] = make_uint4(0, 0, 0, 0);
      if (token < num_tokens && k < num_inputs && stage * R < first + num_items)
        inputs[pair][n] = __ldg(reinterpret_cast<const uint4*>(x + size_t(token) * num_inputs + k));
    }
  };
#pragma unroll
  for (int pair = 0; pair < TILES / 2; pair++) load(first / R, pair);
  float sums[R][N][4] = {};
  for (int i = first / R; i * R < first + num_items; i++) {
#pragma unroll
    for (int row = 0; row < R; row++) {
      const int item = i * R + row - first;
      if (item < 0 || item >= num_items) continue;
      wait(barriers + item % 2 * 8, item / 2 % 2);
      const uint32_t stage = buffers + item % 2 * stage_bytes;
      const uint32_t bits = stage + (PAIRS ? 4 : 8) * lane;
      const uint32_t halves[2] = {word(bits), PAIRS ? 0 : word(bits + 4)};
      uint32_t at[2];
      at[0] = stage + (PAIRS ? 1 : 2) * UNIT + 4 * lane, at[1] = at[0] + 2;
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        const int half = PAIRS ? 0 : j % 2, tile = PAIRS ? j : half * 4 + j / 2;
        uint32_t w[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          if (PAIRS) {
            w[r] = next<true>(halves[0], tile * 4 + r, at[0]);
          } else {
            const uint32_t low = next<false>(halves[half], j / 2 * 8 + 2 * r, at[half]);
            const uint32_t high = next<false>(halves[half], j / 2 * 8 + 2 * r + 1, at[half]);
            asm("mad.lo.u32 %0, %1, 65536, %2;" : "=r"(w[r]) : "r"(high), "r"(low));  // not on the pipe that tests the bits
          }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
          const uint4 some = inputs[tile / 2][n];
          if (tile % 2) multiply(sums[row][n], w, some.z, some.w);
          else multiply(sums[row][n], w, some.x, some.y);
        }
        if (row == R - 1 && (PAIRS ? j % 2 : j % 4 == 3)) {  // the next stage's, while this one's are expanded
          if (!PAIRS) load(i + 1, tile / 2 - 2);
          load(i + 1, tile / 2);
        }
      }
      __syncwarp();
      if (item + 2 < num_items) request(item + 2);
    }
  }

  __syncthreads();
  cg::cluster_group cluster = cg::this_cluster();
  float* partial = reinterpret_cast<float*>(shared + BARRIER_BYTES);  // [warp][token][output]
  constexpr int OWN = 16 * R;                                         // outputs of the block
#pragma unroll
  for (int row = 0; row < R; row++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        partial[(warp * 8 * N + n * 8 + lane % 4 * 2 + j % 2) * OWN + row * 16 + lane / 4 + j / 2 * 8] = sums[row][n][j];
  if (blocks > 1) cluster.sync();
  else __syncthreads();
  for (int j = threadIdx.x + 32 * WARPS * blockIdx.x; j < num_tokens * OWN; j += 32 * WARPS * blocks) {
    const int token = j / OWN, output = blockIdx.y * OWN + j % OWN;
    float sum = 0;
    for (int block = 0; block < blocks; block++) {
      const float* from = blocks > 1 ? cluster.map_shared_rank(partial, block) : partial;
#pragma unroll 4
      for (int i = 0; i < WARPS; i++) sum += from[i * 8 * N * OWN + j];
    }
    if (output < num_outputs) {
      if (bias) sum += static_cast<float>(bias[output]);
      y[size_t(token) * num_outputs + output] = __float2bfloat16(sum);
    }
  }
  if (blocks > 1) cluster.sync();  // nobody leaves while others read its sums
}

template <int N, bool PAIRS, int R>
int launch(const int* starts, const void* data, const void* x, const void* bias, void* y, int num_tokens, int num_outputs,
           int num_inputs, int num_stages, int stage_bytes, int shared_bytes, int cluster, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(bitmap<N, PAIRS, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster, (num_outputs + 16 * R - 1) / (16 * R));
  config.blockDim = dim3(32 * WARPS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, bitmap<N, PAIRS, R>, starts, static_cast<const uint8_t*>(data),
                            static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(bias),
                            static_cast<__nv_bfloat16*>(y), num_tokens, num_outputs, num_inputs, num_stages, stage_bytes);
}

// 0, or a cudaError. At most 16 tokens and 32 items for each warp; 1 or 2 row tiles, which divide the tiles of outputs.
extern "C" int bitmap_linear(const int* starts, const void* data, const void* x, const void* bias, void* y, int num_tokens,
                             int num_outputs, int num_inputs, int num_stages, int stage_bytes, int shared_bytes,
                             int cluster, int row_tiles, int pairs, void* stream) {
  if ((num_outputs + 15) / 16 % row_tiles) return cudaErrorInvalidValue;
  using Launch = decltype(&launch<1, true, 1>);
  const Launch launches[2][2][2] = {{{launch<1, false, 1>, launch<1, false, 2>}, {launch<1, true, 1>, launch<1, true, 2>}},
                                    {{launch<2, false, 1>, launch<2, false, 2>}, {launch<2, true, 1>, launch<2, true, 2>}}};
  return launches[num_tokens > 8][pairs != 0][row_tiles == 2](starts, data, x, bias, y, num_tokens, num_outputs, num_inputs,
                                                              num_stages, stage_bytes, shared_bytes, cluster,
                                                              static_cast<cudaStream_t>(stream));
}

extern "C" const char* bitmap_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
