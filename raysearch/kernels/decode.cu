// Unstructured sparse product for few tokens: y [T, O] = x [T, K] W[O, K]^T + bias, bf16 in and out, fp32 sums.
//
// A lane owns an output and walks its kept weights, an octet at a time: 8 values (16 bytes), their places in shared memory as
// 8 bytes beside a 2-byte base, 3.25 bytes for each. The inputs of all tokens lie there, 8 in 9 slots. Which weight stands
// where within some octets is free, so decode.py makes the lanes of a warp read different banks. The warps of a block take
// turns at the octets of the same 32 outputs; blocks of a cluster may share the inputs, and are summed in a fixed order.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <stdint.h>

namespace cg = cooperative_groups;

constexpr int WARPS = 32;

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// T tokens: 1 (as fp32), 2, 4 or 8 (as pairs of bf16).
template <int T>
__global__ void __launch_bounds__(32 * WARPS, 1)
decode(const int* __restrict__ starts, const uint4* __restrict__ values, const uint2* __restrict__ offsets,
       const uint16_t* __restrict__ bases, const __nv_bfloat16* __restrict__ x, const __nv_bfloat16* __restrict__ bias,
       __nv_bfloat16* __restrict__ y, int num_tokens, int num_outputs, int num_inputs, int chunk, int chunks_per_block) {
  constexpr int WORDS = T == 1 ? 1 : T / 2;
  extern __shared__ uint4 shared[];
  uint32_t* xs = reinterpret_cast<uint32_t*>(shared);  // [span / 8 * 9 slots][WORDS]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int span = chunk * chunks_per_block, first = blockIdx.x * span, first_slot = first / 8 * 9;
  cudaGridDependencySynchronize();  // launched while the kernel before this one ends
  const int* at = starts + (blockIdx.y * gridDim.x + blockIdx.x) * chunks_per_block;
  const int begin = at[0] + warp, end = at[chunks_per_block];
  uint4 v;
  uint2 offset;
  int base;
  auto load = [&](int i) {  // of octet i
    v = make_uint4(0, 0, 0, 0), offset = make_uint2(0, 0), base = first_slot;
    if (i < end) {
      const size_t index = size_t(i) * 32 + lane;
      v = __ldcs(values + index), offset = __ldcs(offsets + index), base = __ldcs(bases + index);
    }
  };
  auto stage = [&](int k, bool first_octet) {  // 8 inputs of all tokens
    uint4 token[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
      token[t] = make_uint4(0, 0, 0, 0);
      if (t < num_tokens && k < span && first + k < num_inputs)
        token[t] = *reinterpret_cast<const uint4*>(x + size_t(t) * num_inputs + first + k);
    }
    if (T < 8 && first_octet) load(begin);  // behind the inputs, which are used before it
    if (k >= span) return;
    uint32_t* to = xs + k / 8 * 9 * WORDS;  // 9 slots for 8 inputs: the lanes write to different banks
#pragma unroll
    for (int i = 0; i < 8; i++, to += WORDS) {
      uint32_t words[WORDS];
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const uint32_t a = (&token[2 * w % T].x)[i / 2], b = (&token[(2 * w + 1) % T].x)[i / 2];
        words[w] = T == 1 ? (i % 2 ? a & 0xffff0000u : a << 16) : __byte_perm(a, b, i % 2 ? 0x7632 : 0x5410);
      }
      if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
      else *to = words[0];
    }
  };
  stage(threadIdx.x * 8, true);
  for (int k = (threadIdx.x + 32 * WARPS) * 8; k < span; k += 8 * 32 * WARPS) stage(k, false);
  __syncthreads();
  if (T == 8) load(begin);  // before, no registers were left for it

  float sums[T] = {};
  auto add = [&](float weight, uint32_t from) {  // the slot's first byte
    uint32_t words[WORDS];
    const uint8_t* slot = reinterpret_cast<const uint8_t*>(shared) + from;
    if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(slot);
    else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(slot);
    else words[0] = *reinterpret_cast<const uint32_t*>(slot);
    if constexpr (T == 1) {
      sums[0] = fmaf(weight, __uint_as_float(words[0]), sums[0]);
    } else {
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        sums[2 * w] = fmaf(weight, low(words[w]), sums[2 * w]);
        sums[2 * w + 1] = fmaf(weight, high(words[w]), sums[2 * w + 1]);
      }
    }
  };
  for (int i = begin; i < end; i += WARPS) {
    const uint32_t from = (base - first_slot) * WORDS * 4, pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const uint32_t place = __byte_perm(j < 4 ? offset.x : offset.y, 0, 0x4440 | (j & 3));
      add(j % 2 ? high(pairs[j / 2]) : low(pairs[j / 2]), from + place * WORDS * 4);
    }
    load(i + WARPS);
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
  const int bytes = max(span / 8 * 9 * (T == 1 ? 4 : 2 * T), T * (WARPS + 1) * 32 * 4);
  cudaError_t error = cudaFuncSetAttribute(decode<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster, (num_outputs + 31) / 32);
  config.blockDim = dim3(32 * WARPS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(
      &config, decode<T>, starts, static_cast<const uint4*>(values), static_cast<const uint2*>(offsets),
      static_cast<const uint16_t*>(bases), static_cast<const __nv_bfloat16*>(x), static_cast<const __nv_bfloat16*>(bias),
      static_cast<__nv_bfloat16*>(y), num_tokens, num_outputs, num_inputs, chunk, num_chunks / cluster);
}

// 0, or a cudaError. At most 8 tokens; `cluster` divides `num_chunks`.
extern "C" int decode_linear(const int* starts, const void* values, const void* offsets, const void* bases, const void* x,
                             const void* bias, void* y, int num_tokens, int num_outputs, int num_inputs, int chunk,
                             int num_chunks, int cluster, void* stream) {
  auto run = num_tokens <= 1   ? launch<1>
             : num_tokens <= 2 ? launch<2>
             : num_tokens <= 4 ? launch<4>
                               : launch<8>;
  return run(starts, values, offsets, bases, x, bias, y, num_tokens, num_outputs, num_inputs, chunk, num_chunks, cluster,
             static_cast<cudaStream_t>(stream));
}

extern "C" const char* decode_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
