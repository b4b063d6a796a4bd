// Unstructured sparse product for few tokens: y [T, O] = x [T, K] W[O, K]^T + bias, bf16 in and out, fp32 sums.
//
// A lane owns an output and walks its kept weights, 8 at a time: their values (16 bytes), their inputs as 8 bytes beside a
// 2-byte base, 3.25 bytes for each. The inputs of all tokens lie in shared memory. The order within such an octet is free,
// so decode.py makes the lanes of a warp read different banks. The warps of a block take turns at the octets of the same 32
// outputs; blocks of a cluster may share the inputs, and are summed in a fixed order.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <stdint.h>

namespace cg = cooperative_groups;

constexpr int WARPS = 32;

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Starts to bring [from, to) from device memory into L2; both ends are rounded down to 16 bytes.
__device__ void prefetch(const void* from, const void* to) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(from) & ~uintptr_t(15);
  const uint32_t bytes = (reinterpret_cast<uintptr_t>(to) - start) & ~uintptr_t(15);
  if (bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(start), "r"(bytes) : "memory");
}

// T tokens: 1 (as fp32), 2, 4, 8 (as pairs of bf16), or 16 (two planes of 8).
template <int T>
__global__ void __launch_bounds__(32 * WARPS, 1)
decode(const int* __restrict__ starts, const uint4* __restrict__ values, const uint2* __restrict__ offsets,
       const uint16_t* __restrict__ bases, const __nv_bfloat16* __restrict__ x, const __nv_bfloat16* __restrict__ bias,
       __nv_bfloat16* __restrict__ y, int num_tokens, int num_outputs, int num_inputs, int chunk, int chunks_per_block) {
  constexpr int PLANES = T == 16 ? 2 : 1, PER_PLANE = T / PLANES, WORDS = T == 1 ? 1 : PER_PLANE / 2;
  extern __shared__ uint4 shared[];
  uint32_t* xs = reinterpret_cast<uint32_t*>(shared);  // [PLANES][span][WORDS]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int span = chunk * chunks_per_block, first = blockIdx.x * span;
  const int* at = starts + (blockIdx.y * gridDim.x + blockIdx.x) * chunks_per_block;
  const int begin = at[0], end = at[chunks_per_block];
  if (threadIdx.x == 0) prefetch(values + size_t(begin) * 32, values + size_t(end) * 32);
  if (threadIdx.x == 32) prefetch(offsets + size_t(begin) * 32, offsets + size_t(end) * 32);
  if (threadIdx.x == 64) prefetch(bases + size_t(begin) * 32, bases + size_t(end) * 32);
  constexpr int AHEAD = T <= 2 ? 2 : 1;  // octets that a lane holds while the next ones are on their way
  uint4 v[AHEAD];
  uint2 offset[AHEAD];
  int base[AHEAD], octet = begin + warp;
  auto read = [&]() {
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      v[a] = make_uint4(0, 0, 0, 0), offset[a] = make_uint2(0, 0), base[a] = first;
      if (octet + a * WARPS < end) {
        const size_t index = size_t(octet + a * WARPS) * 32 + lane;
        v[a] = __ldcs(values + index), offset[a] = __ldcs(offsets + index), base[a] = __ldcs(bases + index);
      }
    }
  };
  read();
  for (int j = threadIdx.x; j < span / 8 * PLANES; j += 32 * WARPS) {  // 8 inputs of the tokens of one plane
    const int plane = j / (span / 8), k = j % (span / 8) * 8;
    uint4 token[PER_PLANE];
#pragma unroll
    for (int t = 0; t < PER_PLANE; t++) {
      const int n = plane * PER_PLANE + t;
      token[t] = make_uint4(0, 0, 0, 0);
      if (n < num_tokens && first + k < num_inputs)
        token[t] = *reinterpret_cast<const uint4*>(x + size_t(n) * num_inputs + first + k);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const uint32_t a = (&token[2 * w % PER_PLANE].x)[i / 2], b = (&token[(2 * w + 1) % PER_PLANE].x)[i / 2];
        xs[(plane * span + k + i) * WORDS + w] =
            T == 1 ? (i % 2 ? a & 0xffff0000u : a << 16) : __byte_perm(a, b, i % 2 ? 0x7632 : 0x5410);
      }
  }
  __syncthreads();

  float sums[T] = {};
  auto add = [&](float weight, const uint32_t* from) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++, from += span * WORDS) {
      if constexpr (T == 1) {
        sums[0] = fmaf(weight, __uint_as_float(*from), sums[0]);
      } else {
        uint32_t words[WORDS];
        if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(from);
        else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(from);
        else words[0] = from[0];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
          float* sum = sums + plane * PER_PLANE + 2 * w;
          sum[0] = fmaf(weight, low(words[w]), sum[0]);
          sum[1] = fmaf(weight, high(words[w]), sum[1]);
        }
      }
    }
  };
  auto add_octet = [&](const uint4& v, const uint2& offset, int base) {
    const uint32_t* from = xs + (base - first) * WORDS;
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t place = __byte_perm(i < 4 ? offset.x : offset.y, 0, 0x4440 | (i & 3));
      add(i % 2 ? high(pairs[i / 2]) : low(pairs[i / 2]), from + place * WORDS);
    }
  };
  while (octet < end) {
    uint4 v_now[AHEAD];
    uint2 offset_now[AHEAD];
    int base_now[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) v_now[a] = v[a], offset_now[a] = offset[a], base_now[a] = base[a];
    octet += AHEAD * WARPS;
    read();
#pragma unroll
    for (int a = 0; a < AHEAD; a++) add_octet(v_now[a], offset_now[a], base_now[a]);
  }

  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);  // [token][warp][32 outputs]
  float* total = partial + T * WARPS * 32;            // [token][32 outputs]
#pragma unroll
  for (int t = 0; t < T; t++) partial[(t * WARPS + warp) * 32 + lane] = sums[t];
  __syncthreads();
  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = gridDim.x, row = blockIdx.y * 32 + lane;
  auto write = [&](int token, float sum) {
    if (row < num_outputs) {
      if (bias) sum += static_cast<float>(bias[row]);
      y[size_t(token) * num_outputs + row] = __float2bfloat16(sum);
    }
  };
  for (int token = warp; token < num_tokens; token += WARPS) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[(token * WARPS + w) * 32 + lane];
    if (blocks == 1) write(token, sum);
    else total[token * 32 + lane] = sum;
  }
  if (blocks == 1) return;
  cluster.sync();
  for (int token = warp * blocks + cluster.block_rank(); token < num_tokens; token += WARPS * blocks) {
    float sum = 0;
    for (int block = 0; block < blocks; block++) sum += cluster.map_shared_rank(total, block)[token * 32 + lane];
    write(token, sum);
  }
  cluster.sync();  // nobody leaves while others read its sums
}

template <int T>
int launch(const int* starts, const void* values, const void* offsets, const void* bases, const void* x, const void* bias,
           void* y, int num_tokens, int num_outputs, int num_inputs, int chunk, int num_chunks, int cluster,
           cudaStream_t stream) {
  const int span = chunk * (num_chunks / cluster);
  const int bytes = max(span * (T == 1 ? 4 : 2 * T), T * (WARPS + 1) * 32 * 4);
  cudaError_t error = cudaFuncSetAttribute(decode<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster, (num_outputs + 31) / 32);
  config.blockDim = dim3(32 * WARPS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(
      &config, decode<T>, starts, static_cast<const uint4*>(values), static_cast<const uint2*>(offsets),
      static_cast<const uint16_t*>(bases), static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(bias),
      static_cast<__nv_bfloat16*>(y), num_tokens, num_outputs, num_inputs, chunk, num_chunks / cluster);
}

// 0, or a cudaError. At most 16 tokens; `cluster` divides `num_chunks`.
extern "C" int decode_linear(const int* starts, const void* values, const void* offsets, const void* bases, const void* x,
                             const void* bias, void* y, int num_tokens, int num_outputs, int num_inputs, int chunk,
                             int num_chunks, int cluster, void* stream) {
  auto run = num_tokens <= 1   ? launch<1>
             : num_tokens <= 2 ? launch<2>
             : num_tokens <= 4 ? launch<4>
             : num_tokens <= 8 ? launch<8>
                               : launch<16>;
  return run(starts, values, offsets, bases, x, bias, y, num_tokens, num_outputs, num_inputs, chunk, num_chunks, cluster,
             static_cast<cudaStream_t>(stream));
}

extern "C" const char* decode_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
