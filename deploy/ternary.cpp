// Decoding from packed weights: products with matrices of 2-bit ternary codes or of int8 rows, and whole blocks for one token.
// Weights are read once, as they are stored; sums of products with codes are of whole numbers, so they are the same in any
// order. Built by packed.py on first use; no headers but the compiler's, so that this takes seconds.
//
// Codes: four a byte, the first in the low bits, 00 = 0, 01 = 1, 10 = -1; every row starts at a byte.
// Activations are whole numbers, too: int8 (one digit, a byte) as BitNet is trained, or 24 bits (three) where training has fp32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 128;   // codes of 32 bytes, a vector register
constexpr int STREAMS = 4;   // rows of bytes that share one look at the codes

// ---- activations

float magnitude(const float* x, int n) {
    int32_t largest = 0, bits;  // magnitudes are in the order of their bits, taken as whole numbers
    for (int k = 0; k < n; k++) std::memcpy(&bits, x + k, 4), largest = std::max(largest, bits & 0x7fffffff);
    float size;
    std::memcpy(&size, &largest, 4);
    return std::max(size, 1e-5f);
}

struct Activations {  // x is about (digit 0 + 256 digit 1 + 65536 digit 2) / scale
    int digits, padded;
    std::vector<int8_t> bytes;  // digit d of x[128 b + 4 i + j] at d * padded + 128 b + 32 j + i: in the order in which codes come out
    int64_t sum[3];             // of each digit
    float scale;

    void set(const float* x, int n, int digits_) {
        digits = digits_, padded = (n + BLOCK - 1) / BLOCK * BLOCK;
        bytes.assign((size_t)digits * padded, 0);
        std::fill(sum, sum + 3, 0);
        scale = 1 / magnitude(x, n) * (digits == 1 ? 127.0f : 127.0f * 65536.0f);  // rounded as torch rounds number / tensor
        for (int k = 0; k < n; k++) {
            int32_t q = (int32_t)std::nearbyintf(x[k] * scale);
            int8_t* to = bytes.data() + (k / BLOCK * BLOCK + k % 4 * 32 + k % BLOCK / 4);
            for (int d = 0; d < digits; d++, to += padded) {
                *to = (int8_t)(digits == 1 ? q : ((q + 128) & 255) - 128);
                sum[d] += *to;
                q = (q - *to) >> 8;
            }
        }
    }
};

// ---- sums of whole numbers

#ifdef __AVX2__
int64_t sum(__m256i x) {  // of eight lanes of 32 bits
    const __m256i four = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(x)),
                                          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(x, 1)));
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
}
#endif

// total[s] = sum of a row of codes times the stream s of bytes, plus the sum of that stream where codes are shifted by 1
template <int S>
void dots(const uint8_t* row, int n_bytes, const int8_t* const* q, int64_t* total) {
#ifdef __AVX512VNNI__
    // code + 1 of the lower and of the upper code of four bits (the value 3 does not occur), in the two halves of a register
    const __m512i table = _mm512_inserti64x4(
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 0, 1, 1, 2, 0, 1, 1, 2, 0, 1, 1, 2, 0, 1)),
        _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1)), 1);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i lower[S], upper[S];  // sums of four products of at most 2 * 128
    for (int s = 0; s < S; s++) lower[s] = upper[s] = _mm512_setzero_si512();
    for (int b = 0; 32 * b < n_bytes; b++) {
        const __mmask32 inside = n_bytes - 32 * b < 32 ? (1u << (n_bytes - 32 * b)) - 1 : ~0u;  // nothing is read beyond a row
        const __m512i codes = _mm512_broadcast_i64x4(_mm256_maskz_loadu_epi8(inside, row + 32 * b));
        const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
        const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
        for (int s = 0; s < S; s++) {
            lower[s] = _mm512_dpbusd_epi32(lower[s], low, _mm512_loadu_si512(q[s] + BLOCK * b));
            upper[s] = _mm512_dpbusd_epi32(upper[s], high, _mm512_loadu_si512(q[s] + BLOCK * b + 64));
        }
    }
    for (int s = 0; s < S; s++) {
        const __m512i both = _mm512_add_epi32(lower[s], upper[s]);
        total[s] = sum(_mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1)));
    }
#elif defined __AVX2__
    // code + 1 of the lower and of the upper code of four bits (the value 3 does not occur)
    const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 0, 1, 1, 2, 0, 1, 1, 2, 0, 1, 1, 2, 0, 1));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1));
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i wide[S];
    for (auto& w : wide) w = _mm256_setzero_si256();
    for (int b = 0, blocks = (n_bytes + 31) / 32; b < blocks;) {
        __m256i narrow[S];  // at most 8 * 4 sums of two products of at most 2 * 128: they fit into 16 bits
        for (auto& w : narrow) w = _mm256_setzero_si256();
        for (const int end = std::min(blocks, b + 8); b < end; b++) {
            __m256i codes;
            if (32 * b + 32 <= n_bytes) {
                codes = _mm256_loadu_si256((const __m256i*)(row + 32 * b));
            } else {  // the end of a row: nothing is read beyond it
                alignas(32) uint8_t rest[32] = {};
                std::memcpy(rest, row + 32 * b, n_bytes - 32 * b);
                codes = _mm256_load_si256((const __m256i*)rest);
            }
            const __m256i low = _mm256_and_si256(codes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            const __m256i c[4] = {_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, low),
                                  _mm256_shuffle_epi8(first, high), _mm256_shuffle_epi8(second, high)};
            for (int s = 0; s < S; s++)
                for (int j = 0; j < 4; j++)
                    narrow[s] = _mm256_add_epi16(narrow[s], _mm256_maddubs_epi16(
                        c[j], _mm256_loadu_si256((const __m256i*)(q[s] + BLOCK * b + 32 * j))));
        }
        for (int s = 0; s < S; s++) wide[s] = _mm256_add_epi32(wide[s], _mm256_madd_epi16(narrow[s], ones));
    }
    for (int s = 0; s < S; s++) total[s] = sum(wide[s]);
#else
    for (int s = 0; s < S; s++) total[s] = 0;
    for (int b = 0; b < n_bytes; b++)
        for (int j = 0; j < 4; j++) {
            const int code = row[b] >> 2 * j & 3, at = b / 32 * BLOCK + 32 * j + b % 32;
            for (int s = 0; s < S; s++) total[s] += (code == 2 ? 0 : code + 1) * q[s][at];
        }
#endif
}

float dot(const uint8_t* row, const Activations& x, int n_bytes) {
    const int8_t* q[3] = {x.bytes.data(), x.bytes.data() + x.padded, x.bytes.data() + 2 * x.padded};
    int64_t total[3];
    if (x.digits == 1) {
        dots<1>(row, n_bytes, q, total);
        return (float)(total[0] - x.sum[0]);
    }
    dots<3>(row, n_bytes, q, total);
    return (float)(total[0] - x.sum[0] + 256 * (total[1] - x.sum[1]) + 65536 * (total[2] - x.sum[2]));
}

int64_t dot(const int8_t* row, const int16_t* x, int n) {
    int64_t total = 0;
    int k = 0;
#ifdef __AVX512VNNI__
    while (k + 32 <= n) {
        __m512i products = _mm512_setzero_si512();
        for (const int end = std::min(n, k + 4096); k + 32 <= end; k += 32)  // a lane: 256 products of at most 127 * 32767
            products = _mm512_dpwssd_epi32(products, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(row + k))),
                                      _mm512_loadu_si512(x + k));
        total += sum(_mm512_castsi512_si256(products)) + sum(_mm512_extracti64x4_epi64(products, 1));
    }
#elif defined __AVX2__
    while (k + 16 <= n) {
        __m256i products = _mm256_setzero_si256();
        for (const int end = std::min(n, k + 2048); k + 16 <= end; k += 16)  // a lane: 256 products of at most 127 * 32767
            products = _mm256_add_epi32(products, _mm256_madd_epi16(
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(row + k))), _mm256_loadu_si256((const __m256i*)(x + k))));
        total += sum(products);
    }
#endif
    for (; k < n; k++) total += (int32_t)row[k] * x[k];
    return total;
}

float to_16_bits(const float* x, int n, int16_t* q) {  // x is about q / what comes back
    const float s = 32767.0f / magnitude(x, n);
    for (int k = 0; k < n; k++) q[k] = (int16_t)std::nearbyintf(x[k] * s);
    return s;
}

float dot(const float* a, const float* b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < n; k++) sum += a[k] * b[k];
    return sum;
}

// ---- parts of a block, within a parallel region

struct Matrix {  // (rows, cols); rows = 0: none
    const void* data;  // codes, or fp32 where scale is 0
    const float* bias;
    int rows, cols, sub_norm;
    float scale;
};

struct Trix {  // tiles = 0: none. act: -1 relu2 and a norm; tiles cut from a dense FFN: 0 gelu, 1 relu2, 2 silu with a gate
    const uint8_t *up, *down;
    const float *up_scale, *down_scale, *signatures, *balance, *slope, *up_bias, *down_bias;  // biases: null for none
    int tiles, shared, k, h, digits, act;
};

struct Layer {
    const float *mixer_norm, *mixer_bias, *ffn_norm, *ffn_bias;
    Matrix q, k, v, o, gate, up, down;
    Trix trix;
    float *keys, *values;  // (n_kv_head, positions, hs)
    int C, n_head, n_kv_head, positions, layer_norm, rotary, qk_norm, act;  // act: 0 gelu, 1 relu2, 2 silu with a gate
};

struct Embedding {  // the table: (rows, cols) int8 with a scale a row and perhaps a second byte, or fp32 where scale is null
    const void* data;
    const float *scale, *positions, *taps;  // positions: learned ones, taps: (n_taps, cols); null for none
    const int8_t* low;  // second bytes, 1 / unit of the scale; null for none
    int cols, norm, n_taps;
    float unit;
};

struct Head {  // logits: (rows, cols) int8 with a scale a row, or fp32 where scale is null, behind the last norm
    const float *norm, *norm_bias;
    const void* data;
    const float* scale;
    int rows, cols, layer_norm;
    float softcap;  // 0: none
};

struct Vector {  // what goes into matrices
    const float* x;
    Activations codes;

    void set(const float* x_, const Matrix& m) {
        x = x_;
        if (m.scale) codes.set(x, m.cols, 1);
    }
};

float row(const Matrix& m, const Vector& x, int r) {
    const float y = m.scale ? dot((const uint8_t*)m.data + (int64_t)r * ((m.cols + 3) / 4), x.codes, (m.cols + 3) / 4) * (m.scale / x.codes.scale)
                            : dot((const float*)m.data + (int64_t)r * m.cols, x.x, m.cols);
    return m.bias ? y + m.bias[r] : y;
}

void rms(float* x, int n, const float* weight) {
    const float inverse = 1 / std::sqrt(dot(x, x, n) / n + 1e-6f);
    for (int k = 0; k < n; k++) x[k] = weight ? x[k] * inverse * weight[k] : x[k] * inverse;
}

void norm(const float* x, float* y, int n, const float* weight, const float* bias, int layer_norm) {
    std::copy(x, x + n, y);
    if (!layer_norm) return rms(y, n, weight);
    double mean = 0, squares = 0;
    for (int k = 0; k < n; k++) mean += x[k];
    for (int k = 0; k < n; k++) squares += (x[k] - mean / n) * (x[k] - mean / n);
    const float inverse = 1 / std::sqrt((float)(squares / n) + 1e-5f);
    for (int k = 0; k < n; k++) y[k] = (float)(x[k] - mean / n) * inverse * weight[k] + (bias ? bias[k] : 0);
}

float activated(float u, int act) {
    if (act == 0) return 0.5f * u * (1 + std::tanh(0.7978845608f * (u + 0.044715f * u * u * u)));
    return act == 1 ? (u > 0 ? u * u : 0) : u / (1 + std::exp(-u));
}

struct Scratch {
    std::vector<float> y, q, kv, hidden;
    Vector in, out;
    std::vector<Activations> tiles;
    std::vector<int64_t> chosen;
    std::vector<float> gates;
    std::vector<int16_t> wide;
    float unit;
};

// y[c] += gates[i] down_i(RMSNorm(relu(up_i x)^2)), or gates[i] down_i(act(up_i x)), summed over the k tiles that are chosen
void trix(const Trix& t, const float* x, int n, float* y, int k, const int64_t* tiles, const float* gates, Scratch& s) {
    const int n_bytes = (n + 3) / 4, h_bytes = (t.h + 3) / 4, rows = t.act == 2 ? 2 * t.h : t.h;
#pragma omp single
    {
        s.in.codes.set(x, n, t.digits);
        s.hidden.resize((size_t)k * rows);
        s.tiles.resize(k);
    }
#pragma omp for schedule(static)
    for (int r = 0; r < k * rows; r++) {
        const int64_t e = tiles[r / rows];
        const int64_t at = e * rows + r % rows;
        const float product = dot(t.up + at * n_bytes, s.in.codes, n_bytes) * (t.up_scale[e] / s.in.codes.scale);
        const float z = t.up_bias ? product + t.up_bias[at] : product;
        s.hidden[r] = r % rows < t.h ? activated(z, t.act < 0 ? 1 : t.act) : z;
    }
#pragma omp for schedule(static)
    for (int i = 0; i < k; i++) {
        float* u = s.hidden.data() + (size_t)i * rows;
        if (t.act < 0) rms(u, t.h, nullptr);
        if (t.act == 2)
            for (int r = 0; r < t.h; r++) u[r] *= u[t.h + r];
        for (int r = 0; r < t.h; r++) u[r] *= gates[i];
        s.tiles[i].set(u, t.h, t.digits);
    }
#pragma omp for schedule(static)
    for (int c = 0; c < n; c++) {
        float sum = 0;
        for (int i = 0; i < k; i++)
            sum += dot(t.down + (tiles[i] * n + c) * h_bytes, s.tiles[i], h_bytes) * (t.down_scale[tiles[i]] / s.tiles[i].scale);
        y[c] += t.down_bias ? sum + t.down_bias[c] : sum;
    }
}

void attention(const Layer& l, float* x, int pos, const float* cos, const float* sin, Scratch& s) {
    const int hs = l.q.rows / l.n_head, kv = l.k.rows, group = l.n_head / l.n_kv_head;
#pragma omp single
    {
        norm(x, s.y.data(), l.C, l.mixer_norm, l.mixer_bias, l.layer_norm);
        s.in.set(s.y.data(), l.q);
        s.q.resize(2 * l.q.rows);
        s.kv.resize(2 * kv);
    }
#pragma omp for schedule(static)
    for (int r = 0; r < l.q.rows + 2 * kv; r++) {
        if (r < l.q.rows) s.q[r] = row(l.q, s.in, r);
        else s.kv[r - l.q.rows] = r < l.q.rows + kv ? row(l.k, s.in, r - l.q.rows) : row(l.v, s.in, r - l.q.rows - kv);
    }
#pragma omp for schedule(static)
    for (int h = 0; h < l.n_head + l.n_kv_head; h++) {
        float* a = h < l.n_head ? s.q.data() + h * hs : s.kv.data() + (h - l.n_head) * hs;
        if (l.qk_norm) rms(a, hs, nullptr);
        if (l.rotary)
            for (int i = 0; i < hs / 2; i++) {
                const float u = a[i], v = a[i + hs / 2], c = cos[pos * (hs / 2) + i], d = sin[pos * (hs / 2) + i];
                a[i] = u * c - v * d, a[i + hs / 2] = v * c + u * d;
            }
        if (h >= l.n_head) {
            const int64_t at = ((int64_t)(h - l.n_head) * l.positions + pos) * hs;
            std::copy(a, a + hs, l.keys + at);
            std::copy(a + kv, a + kv + hs, l.values + at);
        }
    }
#pragma omp for schedule(static)
    for (int h = 0; h < l.n_head; h++) {
        const float *q = s.q.data() + h * hs, *keys = l.keys + (int64_t)(h / group) * l.positions * hs,
                    *values = l.values + (int64_t)(h / group) * l.positions * hs;
        float* y = s.q.data() + l.q.rows + h * hs;
        std::vector<float> p(pos + 1);
        float peak = -INFINITY, total = 0;
        for (int t = 0; t <= pos; t++) peak = std::max(peak, p[t] = dot(q, keys + (int64_t)t * hs, hs) / std::sqrt((float)hs));
        for (int t = 0; t <= pos; t++) total += p[t] = std::exp(p[t] - peak);
        std::fill(y, y + hs, 0.0f);
        for (int t = 0; t <= pos; t++)
            for (int i = 0; i < hs; i++) y[i] += p[t] / total * values[(int64_t)t * hs + i];
    }
#pragma omp single
    {
        float* y = s.q.data() + l.q.rows;
        if (l.o.sub_norm) rms(y, l.q.rows, nullptr);
        s.in.set(y, l.o);
    }
#pragma omp for schedule(static)
    for (int r = 0; r < l.C; r++) x[r] += row(l.o, s.in, r);
}

void ffn(const Layer& l, float* x, Scratch& s) {
#pragma omp single
    norm(x, s.y.data(), l.C, l.ffn_norm, l.ffn_bias, l.layer_norm);
    if (l.trix.tiles) {
        const Trix& t = l.trix;
#pragma omp single
        {
            std::vector<float> scores(t.tiles);
            s.chosen.resize(t.k + t.shared), s.gates.assign(t.k + t.shared, 1.0f);
            for (int e = 0; e < t.tiles; e++) scores[e] = dot(t.signatures + (int64_t)e * l.C, s.y.data(), l.C) / std::sqrt((float)l.C);
            std::vector<int64_t> order(t.tiles);
            for (int e = 0; e < t.tiles; e++) order[e] = e;
            std::partial_sort(order.begin(), order.begin() + t.k, order.end(),
                              [&](int64_t a, int64_t b) { return scores[a] + t.balance[a] > scores[b] + t.balance[b]; });
            for (int i = 0; i < t.k; i++) {
                const int64_t e = s.chosen[i] = order[i];
                s.gates[i] = t.act < 0 ? 2.0f / t.k / (1 + std::exp(-scores[e])) : 2 / (1 + std::exp(-t.slope[e] * scores[e]));
            }
            if (t.shared) s.chosen[t.k] = t.tiles;
        }
        return trix(t, s.y.data(), l.C, x, t.k + t.shared, s.chosen.data(), s.gates.data(), s);
    }
#pragma omp single
    {
        s.in.set(s.y.data(), l.up);
        s.hidden.resize(l.up.rows);
    }
#pragma omp for schedule(static)
    for (int r = 0; r < l.up.rows; r++) {
        const float u = row(l.up, s.in, r);
        s.hidden[r] = l.act == 2 ? u * activated(row(l.gate, s.in, r), 2) : activated(u, l.act);
    }
#pragma omp single
    {
        if (l.down.sub_norm) rms(s.hidden.data(), l.down.cols, nullptr);
        s.in.set(s.hidden.data(), l.down);
    }
#pragma omp for schedule(static)
    for (int r = 0; r < l.C; r++) x[r] += row(l.down, s.in, r);
}

void logits(const Head& h, const float* x, float* y, Scratch& s) {
#pragma omp single
    {
        norm(x, s.y.data(), h.cols, h.norm, h.norm_bias, h.layer_norm);
        s.wide.resize(h.cols);
        s.unit = h.scale ? to_16_bits(s.y.data(), h.cols, s.wide.data()) : 1;
    }
#pragma omp for schedule(static)
    for (int r = 0; r < h.rows; r++) {
        const float u = h.scale ? (float)dot((const int8_t*)h.data + (int64_t)r * h.cols, s.wide.data(), h.cols) * (h.scale[r] / s.unit)
                                : dot((const float*)h.data + (int64_t)r * h.cols, s.y.data(), h.cols);
        y[r] = h.softcap ? h.softcap * std::tanh(u / h.softcap) : u;
    }
}

}  // namespace

extern "C" {

const char* instructions() {  // that the library was built for
#ifdef __AVX512VNNI__
    return "AVX512VNNI";
#elif defined __AVX2__
    return "AVX2";
#else
    return "";
#endif
}

// y (n, rows) = scale * (codes (rows, cols) of each row of x (n, cols)). digits: 1 (int8) or 3.
void ternary(const float* x, int n, int cols, int digits, const uint8_t* codes, float scale, int rows, float* y, int threads) {
    const int n_bytes = (cols + 3) / 4;
    std::vector<Activations> a(n);
#pragma omp parallel num_threads(threads) if (threads > 1 && (int64_t)n * rows * n_bytes > 16384)
    {
#pragma omp for schedule(static)
        for (int i = 0; i < n; i++) a[i].set(x + (int64_t)i * cols, cols, digits);
        const int together = digits == 1 ? STREAMS : 1;
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const uint8_t* of = codes + (int64_t)r * n_bytes;
            int i = 0;
            for (; together > 1 && i + together <= n; i += together) {
                const int8_t* q[STREAMS];
                int64_t total[STREAMS];
                for (int s = 0; s < STREAMS; s++) q[s] = a[i + s].bytes.data();
                dots<STREAMS>(of, n_bytes, q, total);
                for (int s = 0; s < STREAMS; s++)
                    y[(int64_t)(i + s) * rows + r] = (float)(total[s] - a[i + s].sum[0]) * (scale / a[i + s].scale);
            }
            for (; i < n; i++) y[(int64_t)i * rows + r] = dot(of, a[i], n_bytes) * (scale / a[i].scale);
        }
    }
}

// y (rows) = scale_r * (row r of int8, (rows, n)) x, x rounded to 16 bits
void int8_rows(const float* x, int n, const int8_t* weight, const float* scale, int rows, float* y, int threads) {
    std::vector<int16_t> q(n);
    const float s = to_16_bits(x, n, q.data());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && (int64_t)rows * n > 65536)
    for (int r = 0; r < rows; r++) y[r] = (float)dot(weight + (int64_t)r * n, q.data(), n) * (scale[r] / s);
}

// y (n) += a TriX FFN of x (n), by tiles that are chosen already: k of them, with their gates
void tiles(const Trix* t, const float* x, int n, int k, const int64_t* tiles, const float* gates, float* y, int threads) {
    Scratch s;
#pragma omp parallel num_threads(threads) if (threads > 1 && (int64_t)k * t->h * n > 65536)
    trix(*t, x, n, y, k, tiles, gates, s);
}

// x (C): the input of the first block for token `id` at position pos. recent (n_taps - 1, C): the inputs of the taps before it,
// the oldest first, which it joins.
void embed(const Embedding* e, int64_t id, int pos, float* recent, float* x) {
    const int n = e->cols;
    const int8_t *codes = (const int8_t*)e->data + id * n, *low = e->low ? e->low + id * n : nullptr;
    for (int k = 0; k < n; k++)
        x[k] = !e->scale ? ((const float*)e->data)[id * n + k] : (low ? codes[k] + low[k] / e->unit : codes[k]) * e->scale[id];
    if (e->positions)
        for (int k = 0; k < n; k++) x[k] += e->positions[(int64_t)pos * n + k];
    if (e->norm) rms(x, n, nullptr);
    if (!e->n_taps) return;
    const std::vector<float> z(x, x + n);
    for (int k = 0; k < n; k++) x[k] *= e->taps[k];
    for (int j = 1; j < e->n_taps; j++)
        for (int k = 0; k < n; k++) x[k] += recent[(int64_t)(e->n_taps - 1 - j) * n + k] * e->taps[j * n + k];
    if (e->n_taps == 1) return;
    std::copy(recent + n, recent + (int64_t)(e->n_taps - 1) * n, recent);
    std::copy(z.begin(), z.end(), recent + (int64_t)(e->n_taps - 2) * n);
}

// One token from its embedding x (C), at position pos, through all blocks, whose keys and values it joins, to its logits y.
// cos, sin: (positions, hs / 2).
void step(const Layer* layers, int n_layers, const Head* head, float* x, int pos, const float* cos, const float* sin, float* y, int threads) {
    Scratch s;
    s.y.resize(layers[0].C);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int i = 0; i < n_layers; i++) {
            attention(layers[i], x, pos, cos, sin, s);
            if (layers[i].ffn_norm) ffn(layers[i], x, s);
        }
        logits(*head, x, y, s);
    }
}

}  // extern "C"
