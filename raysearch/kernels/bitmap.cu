// Unstructured sparse product for few tokens on tensor cores: y [T, O] = x [T, K] W[O, K]^T + bias, bf16 in and out, fp32 sums.
//
// The weight is cut into tiles of 16 outputs x 16 inputs, 8 weights of each tile for a lane, in the order in which the lane
// gives them to mma.m16n8k16. The inputs of two tiles are dealt out so that a lane has 8 in a row of x, which it then reads at
// once, without shared memory. A stage is 8 tiles along the inputs: a bitmap of the lane's 64 weights, then rows of one word
// for each lane, with the kept weights of the first 4 tiles in its low half, in order, and those of the others in its high
// half. So lanes that read at different places never meet in a bank of shared memory. A warp owns 16 outputs and a part of
// the inputs, streams its stages through a ring in shared memory and expands them in registers. The parts and the blocks of
// a cluster are summed in a fixed order.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <stdint.h>

namespace cg = cooperative_groups;

constexpr int TILES = 8, MAX_BUFFERS = 4, UNIT = 128;  // UNIT: bytes, one word of each lane

__device__ uint32_t address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ void fetch(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
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
// A block's W warps share `row_tiles` times 16 outputs.
template <int N, bool PAIRS, int W>
__global__ void __launch_bounds__(32 * W, 1)
bitmap(const int* __restrict__ starts, const uint8_t* __restrict__ data, const __nv_bfloat16* __restrict__ x,
       const __nv_bfloat16* __restrict__ bias, __nv_bfloat16* __restrict__ y, int num_tokens, int num_outputs, int num_inputs,
       int num_stages, int stage_bytes, int num_buffers, int row_tiles) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = gridDim.x, first = num_stages * blockIdx.x / blocks, count = num_stages * (blockIdx.x + 1) / blocks - first;
  uint8_t* ring = shared + 8 * W * MAX_BUFFERS;
  ring += size_t(warp) * num_buffers * stage_bytes;
  const uint32_t barriers = address(shared) + 8 * MAX_BUFFERS * warp;
  const int parts = W / row_tiles, row_tile = blockIdx.y * row_tiles + warp / parts, part = warp % parts;
  const int mine = count * part / parts, num_mine = count * (part + 1) / parts - mine;  // stages, from the block's first
  const bool active = row_tile * 16 < num_outputs;
  const int start = active && lane <= num_mine ? starts[row_tile * num_stages + first + mine + lane] : 0;  // in units
  auto request = [&](int i) {  // stage i into its buffer
    const int from = __shfl_sync(~0u, start, i), to = __shfl_sync(~0u, start, i + 1), buffer = i % num_buffers;
    if (lane == 0)
      fetch(address(ring) + buffer * stage_bytes, data + size_t(from) * UNIT, (to - from) * UNIT, barriers + 8 * buffer);
  };
  if (active) {
    if (lane < num_buffers) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * lane) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    for (int i = 0; i < min(num_buffers, num_mine); i++) request(i);
  }

  float sums[N][4] = {};
  if (active) {
    uint4 inputs[TILES / 2][N];  // of two tiles and 8 tokens each
    auto load = [&](int stage, int pair) {
      const int k = (first + mine + stage) * TILES * 16 + pair * 32 + lane % 4 * 8;
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int token = n * 8 + lane / 4;
        inputs[pair][n] = make_uint4(0, 0, 0, 0);
        if (token < num_tokens && k < num_inputs && stage < num_mine)
          inputs[pair][n] = __ldg(reinterpret_cast<const uint4*>(x + size_t(token) * num_inputs + k));
      }
    };
#pragma unroll
    for (int pair = 0; pair < TILES / 2; pair++) load(0, pair);
    for (int i = 0; i < num_mine; i++) {
      const int buffer = i % num_buffers;
      const uint8_t* stage = ring + buffer * stage_bytes;
      wait(barriers + 8 * buffer, i / num_buffers % 2);
      const uint32_t* bits = reinterpret_cast<const uint32_t*>(stage) + (PAIRS ? 1 : 2) * lane;
      const uint32_t halves[2] = {bits[0], PAIRS ? 0 : bits[1]};
      uint32_t at[2];
      at[0] = address(stage) + (PAIRS ? 1 : 2) * UNIT + 4 * lane, at[1] = at[0] + 2;
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
          const uint4 part = inputs[tile / 2][n];
          if (tile % 2) multiply(sums[n], w, part.z, part.w);
          else multiply(sums[n], w, part.x, part.y);
        }
        if (PAIRS ? j % 2 : j % 4 == 3) {  // the next stage's, while this one's are expanded
          if (!PAIRS) load(i + 1, tile / 2 - 2);
          load(i + 1, tile / 2);
        }
      }
      __syncwarp();
      if (i + num_buffers < num_mine) request(i + num_buffers);
    }
  }

  __syncthreads();
  cg::cluster_group cluster = cg::this_cluster();
  float* partial = reinterpret_cast<float*>(shared + 8 * W * MAX_BUFFERS);  // [part][token][output]
  const int num_own = 16 * row_tiles;  // outputs of the block
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      partial[(part * 8 * N + n * 8 + lane % 4 * 2 + j % 2) * num_own + warp / parts * 16 + lane / 4 + j / 2 * 8] = sums[n][j];
  if (blocks > 1) cluster.sync();
  else __syncthreads();
  for (int j = threadIdx.x + 32 * W * blockIdx.x; j < num_tokens * num_own; j += 32 * W * blocks) {
    const int token = j / num_own, output = blockIdx.y * num_own + j % num_own;
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < blocks * parts; i++)
      sum += (blocks > 1 ? cluster.map_shared_rank(partial, i / parts) : partial)[i % parts * 8 * N * num_own + j];
    if (output < num_outputs) {
      if (bias) sum += static_cast<float>(bias[output]);
      y[size_t(token) * num_outputs + output] = __float2bfloat16(sum);
    }
  }
  if (blocks > 1) cluster.sync();  // nobody leaves while others read its sums
}

template <int N, bool PAIRS, int W>
int launch(const int* starts, const void* data, const void* x, const void* bias, void* y, int num_tokens, int num_outputs,
           int num_inputs, int num_stages, int stage_bytes, int num_buffers, int shared_bytes, int cluster,
           int row_tiles, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(bitmap<N, PAIRS, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster, (num_outputs + 16 * row_tiles - 1) / (16 * row_tiles));
  config.blockDim = dim3(32 * W);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, bitmap<N, PAIRS, W>, starts, static_cast<const uint8_t*>(data),
                            static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(bias),
                            static_cast<__nv_bfloat16*>(y), num_tokens, num_outputs, num_inputs, num_stages, stage_bytes,
                            num_buffers, row_tiles);
}

// 0, or a cudaError. At most 16 tokens and 31 stages per warp; `row_tiles` divides the warps of a block.
extern "C" int bitmap_linear(const int* starts, const void* data, const void* x, const void* bias, void* y, int num_tokens,
                             int num_outputs, int num_inputs, int num_stages, int stage_bytes, int num_buffers,
                             int shared_bytes, int cluster, int row_tiles, int pairs, void* stream) {
  auto run = num_tokens <= 8 ? (pairs ? launch<1, true, 24> : launch<1, false, 24>) : (pairs ? launch<2, true, 16> : launch<2, false, 16>);
  return run(starts, data, x, bias, y, num_tokens, num_outputs, num_inputs, num_stages, stage_bytes, num_buffers, shared_bytes,
             cluster, row_tiles, static_cast<cudaStream_t>(stream));
}

extern "C" const char* bitmap_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
