// The two passes of exact selection over weights or scores (pruning/selection.py), each over all pieces in one launch.
//
// A digit of at most 11 bits is counted in shared memory, where equal digits of a warp are added at once. Floor of a pass: its
// bytes over the memory's bandwidth.

#include <cuda_runtime.h>
#include <stdint.h>

constexpr int THREADS = 512;

// The keys of pruning/selection.py: all but the sign, or the order of the floats, in which -0.0 is 0.0.
struct Magnitude {
  static __device__ uint32_t key(uint32_t bits) { return bits & 0x7fffffffu; }
};
struct Score {
  static __device__ uint32_t key(uint32_t bits) {
    if (bits == 0x80000000u) return bits;
    return bits >> 31 ? ~bits : bits + 0x80000000u;
  }
};

// table: [pieces] of (address of the first weight, weights, prefix that counts or threshold, address of the mask, end of the ties
// to prune)
struct Piece {
  const uint32_t* weights;
  int64_t length;
  int64_t key;
  uint8_t* mask;
  int64_t end;
};

// visit(index, key) for this block's weights of the piece, 16 bytes at a time where they are aligned
template <typename Keys, typename Visit>
__device__ void each(const Piece& piece, Visit visit) {
  const int64_t step = int64_t(gridDim.x) * THREADS, begin = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t quads = reinterpret_cast<uintptr_t>(piece.weights) % 16 ? 0 : piece.length / 4;
  for (int64_t i = begin; i < quads; i += step) {
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(piece.weights) + i);
    visit(4 * i, Keys::key(four.x)), visit(4 * i + 1, Keys::key(four.y));
    visit(4 * i + 2, Keys::key(four.z)), visit(4 * i + 3, Keys::key(four.w));
  }
  for (int64_t i = 4 * quads + begin; i < piece.length; i += step) visit(i, Keys::key(piece.weights[i]));
}

template <typename Keys>
__global__ void __launch_bounds__(THREADS) count(const Piece* table, int* counts, int low_bit, int width) {
  extern __shared__ int bins[];
  const int num_bins = 1 << width;
  for (int i = threadIdx.x; i < num_bins; i += THREADS) bins[i] = 0;
  __syncthreads();
  const Piece piece = table[blockIdx.y];
  const uint32_t prefix = piece.key;
  each<Keys>(piece, [&](int64_t, uint32_t key) {
    const uint32_t high = key >> low_bit;
    if (high >> width == prefix) atomicAdd(&bins[high & (num_bins - 1)], 1);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < num_bins; i += THREADS)
    if (bins[i]) atomicAdd(&counts[int64_t(blockIdx.y) * num_bins + i], bins[i]);
}

template <typename Keys>
__global__ void __launch_bounds__(THREADS) mask(const Piece* table) {
  const Piece piece = table[blockIdx.y];
  const uint32_t threshold = piece.key;
  each<Keys>(piece, [&](int64_t index, uint32_t key) {
    piece.mask[index] = key > threshold || (key == threshold && index >= piece.end);
  });
}

extern "C" int count_keys(const void* table, int of_scores, void* counts, int low_bit, int width, int num_pieces,
                          int num_blocks, void* stream) {
  const auto kernel = of_scores ? count<Score> : count<Magnitude>;
  kernel<<<dim3(num_blocks, num_pieces), THREADS, 4 << width, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Piece*>(table), static_cast<int*>(counts), low_bit, width);
  return cudaGetLastError();
}

extern "C" int mask_keys(const void* table, int of_scores, int num_pieces, int num_blocks, void* stream) {
  const auto kernel = of_scores ? mask<Score> : mask<Magnitude>;
  kernel<<<dim3(num_blocks, num_pieces), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const Piece*>(table));
  return cudaGetLastError();
}

extern "C" const char* keys_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
