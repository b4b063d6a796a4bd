// Sparse products on one core of a CPU: y [T, O] = x [T, K] W[O, K]^T + bias.
//
// csr_linear: single fp32 weights. 64 tokens at a time are turned into columns, so that a weight is one broadcast and a
// few vector products; the inputs are cut into chunks that stay in the first cache level.
// block_linear: blocks of 32 x 32 in bf16 on AMX tiles: x is the first operand as it lies in memory, the blocks are packed
// in pairs of inputs (VNNI) once, and a pair of blocks by 32 tokens fills the eight tile registers.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
constexpr int TOKENS = 64, PARTS = TOKENS / LANES;

namespace {

// x [count <= 64, K] -> columns [K][64], zeros for the tokens beyond.
void transpose(const float* x, float* columns, int count, int num_inputs) {
  for (int k0 = 0; k0 < num_inputs; k0 += 16)
    for (int t0 = 0; t0 < TOKENS; t0 += 16)
      for (int k = k0; k < k0 + 16 && k < num_inputs; k++)
        for (int t = t0; t < t0 + 16; t++) columns[size_t(k) * TOKENS + t] = t < count ? x[size_t(t) * num_inputs + k] : 0.0f;
}

}  // namespace

// starts [chunks][O + 1], places (input within the chunk) and weights in the order of starts.
extern "C" void csr_linear(const int* starts, const uint16_t* places, const float* weights, const float* x, const float* bias,
                           float* y, int num_tokens, int num_outputs, int num_inputs, int chunk) {
  const int num_chunks = (num_inputs + chunk - 1) / chunk;
  thread_local std::vector<Vector> columns, sums;
  columns.resize(size_t(num_inputs) * PARTS);
  sums.resize(size_t(num_outputs) * PARTS);
  for (int first = 0; first < num_tokens; first += TOKENS) {
    const int count = num_tokens - first < TOKENS ? num_tokens - first : TOKENS;
    transpose(x + size_t(first) * num_inputs, reinterpret_cast<float*>(columns.data()), count, num_inputs);
    for (int c = 0; c < num_chunks; c++) {
      const int* bounds = starts + size_t(c) * (num_outputs + 1);
      const Vector* inputs = columns.data() + size_t(c) * chunk * PARTS;
      for (int o = 0; o < num_outputs; o++) {
        Vector* sum = sums.data() + size_t(o) * PARTS;
        Vector acc[PARTS];
        for (int p = 0; p < PARTS; p++) acc[p] = c ? sum[p] : Vector{} + (bias ? bias[o] : 0.0f);
        for (int i = bounds[o]; i < bounds[o + 1]; i++) {
          const float weight = weights[i];
          const Vector* input = inputs + size_t(places[i]) * PARTS;
          for (int p = 0; p < PARTS; p++) acc[p] += weight * input[p];
        }
        for (int p = 0; p < PARTS; p++) sum[p] = acc[p];
      }
    }
    const float* from = reinterpret_cast<const float*>(sums.data());
    for (int o0 = 0; o0 < num_outputs; o0 += 16)
      for (int t = 0; t < count; t++)
        for (int o = o0; o < o0 + 16 && o < num_outputs; o++)
          y[size_t(first + t) * num_outputs + o] = from[size_t(o) * TOKENS + t];
  }
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Asks Linux for the tile registers; 0 where they may be used.
extern "C" int amx_refused() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) != 0; }

// starts [O / 32 + 1] and columns: kept blocks of each row of blocks; blocks [n][2 halves of outputs][16 pairs][16 outputs][2].
// x [T, K] with T and K multiples of 32, y bf16 [T, O].
extern "C" void block_linear(const int* starts, const int* columns, const uint16_t* blocks, const uint16_t* x,
                             const float* bias, uint16_t* y, int num_tokens, int num_outputs, int num_inputs) {
  struct alignas(64) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  constexpr int AT_ONCE = 128;  // tokens whose inputs stay in the second cache level
  alignas(64) float out[32][32];
  for (int t0 = 0; t0 < num_tokens; t0 += AT_ONCE)
    for (int o = 0; o < num_outputs; o += 32)
      for (int t = t0; t < t0 + AT_ONCE && t < num_tokens; t += 32) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int i = starts[o / 32]; i < starts[o / 32 + 1]; i++) {
          const uint16_t* in = x + size_t(t) * num_inputs + size_t(columns[i]) * 32;
          const uint16_t* block = blocks + size_t(i) * 1024;
          _tile_loadd(4, in, num_inputs * 2);
          _tile_loadd(5, in + size_t(16) * num_inputs, num_inputs * 2);
          _tile_loadd(6, block, 64);
          _tile_loadd(7, block + 512, 64);
          _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, &out[0][0], 128); _tile_stored(1, &out[0][16], 128);
        _tile_stored(2, &out[16][0], 128); _tile_stored(3, &out[16][16], 128);
        const __mmask16 low = num_outputs - o >= 16 ? 0xffff : (1u << (num_outputs - o)) - 1;
        const __mmask16 high = num_outputs - o >= 32 ? 0xffff : num_outputs - o > 16 ? (1u << (num_outputs - o - 16)) - 1 : 0;
        const __m512 bias_low = bias ? _mm512_maskz_loadu_ps(low, bias + o) : _mm512_setzero_ps();
        const __m512 bias_high = bias ? _mm512_maskz_loadu_ps(high, bias + o + 16) : _mm512_setzero_ps();
        for (int row = 0; row < 32; row++) {
          uint16_t* to = y + size_t(t + row) * num_outputs + o;
          const __m512 a = _mm512_add_ps(_mm512_load_ps(out[row]), bias_low);
          const __m512 b = _mm512_add_ps(_mm512_load_ps(out[row] + 16), bias_high);
          _mm256_mask_storeu_epi16(to, low, (__m256i)_mm512_cvtneps_pbh(a));
          _mm256_mask_storeu_epi16(to + 16, high, (__m256i)_mm512_cvtneps_pbh(b));
        }
      }
  _tile_release();
}
#endif
