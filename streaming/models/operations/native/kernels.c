/* The codec's and the decoder's operations on a CPU, for few rows at a time.
 *
 * With a frame or a token at a time a matrix product is as fast as its weights can be read. So weights are packed in the
 * order in which they are read, converted on the way, and all else is kept off their way: activations are float32,
 * threads take blocks of outputs as they come, and what follows a product happens while its results are in a register's
 * reach.
 *
 * Every output sums its products in the order of its inputs, alone: its bits depend on its own row and on nothing else,
 * neither on the other rows nor on the threads.
 *
 * `library.py` compiles this file, and `operations.py` calls it.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INTEGERS 1
#include <immintrin.h>
#else
#define INTEGERS 0
#endif

/* A block of outputs, WIDE vectors of LANES, by ROWS rows: as many sums as there are registers for. */
#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#elif defined(__aarch64__)
#define LANES 4
#define WIDE 4
#else
#define LANES 4
#define WIDE 2
#endif
#define ROWS 6
#define BLOCK (LANES * WIDE)
#define MANY_ROWS 48 /* rows that one thread takes with a block; a multiple of ROWS */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { PLAIN, GELU, GATED };

int64_t native_lanes(void) { return LANES; }
int64_t native_block(void) { return BLOCK; }
int64_t native_integers(void) { return INTEGERS; }

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf widen(const uint16_t *p) { /* bfloat16 to float32 */
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vi) << 16);
}

INLINE uint16_t narrow(float x) { /* float32 to bfloat16, to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

INLINE vf spread(float x) { return (vf){} + x; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf least(vf a, vf b) { return pick(b < a, b, a); } /* a where either is NaN */
INLINE vf most(vf a, vf b) { return pick(b > a, b, a); }

/* The sum of a vector, by halves. */
INLINE float total(vf v) {
#if LANES == 16
    v += __builtin_shuffle(v, (vi){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (vi){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (vi){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
#elif LANES == 8
    v += __builtin_shuffle(v, (vi){4, 5, 6, 7, 0, 1, 2, 3});
    v += __builtin_shuffle(v, (vi){2, 3, 0, 1, 6, 7, 4, 5});
#else
    v += __builtin_shuffle(v, (vi){2, 3, 0, 1});
#endif
    return v[0] + v[1];
}

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vf exponential(vf x) {
    vf bounded = most(least(x, spread(88.3762f)), spread(-87.3365f));
    vf n = bounded * 1.44269504f + 12582912.0f - 12582912.0f; /* rounded */
    vf r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = spread(0.00137511303f);
    p = p * r + 0.00836899225f;
    p = p * r + 0.0416695438f;
    p = p * r + 0.166665182f;
    p = p * r + 0.499999881f;
    p = p * r * r + r + 1.0f;
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return pick(x != x, x, p * power);
}

/* x times the normal distribution's share below x; erf to 4e-7 as a quotient of polynomials. */
INLINE vf gelu(vf x) {
    vf z = most(least(x * 0.707106781f, spread(3.92f)), spread(-3.92f)), t = z * z;
    vf p = spread(2.06780123e-06f), q = spread(3.82131730e-05f);
    p = p * t + 0.000283679518f;
    q = q * t + 0.00114617648f;
    p = p * t + 0.00369500695f;
    q = q * t + 0.0148267746f;
    p = p * t + 0.0525301211f;
    q = q * t + 0.113412894f;
    p = p * t + 0.188708782f;
    q = q * t + 0.500571787f;
    p = p * t + 1.12837911f;
    q = q * t + 1.0f;
    vf one = pick(z > 3.8f, spread(1.0f), spread(-1.0f)), inside = z * p / q;
    return 0.5f * x * (1.0f + pick((z > 3.8f) | (z < -3.8f), one, inside));
}

/* Matrices. Weights lie in blocks of outputs, each of them input by input: [outputs / BLOCK][inputs][BLOCK]; a last
 * block of few outputs is 1 or 2 vectors wide. Two vectors of bfloat16 lie as one of words, the first in the lower halves,
 * which takes two operations to take apart instead of four. Integers lie in fours of inputs, as they are multiplied:
 * int8 [outputs / 64][inputs / 4][64][4]; int4 [outputs / 64][inputs / 8][64][4], the first four inputs in the lower
 * halves of the bytes and the next in the upper; their scales are [outputs / 64][2][64], a float32 scale and, int32, 128
 * times the sum of the output's weights, and bfloat16 [outputs / 64][inputs / group][2][64], a scale and the least value.
 */
typedef struct {
    int64_t kind, inputs, outputs, group;
    const void *weight, *scales;
    const float *bias; /* [outputs], or none */
} Matrix;

/* Rows to be multiplied: `batch` times `rows`, at these distances; each has as many elements as the matrix has inputs. */
typedef struct {
    const float *x;
    int64_t batch, rows, batch_stride, row_stride;
} Rows;

/* What is done to results [rows, outputs]: an activation, then x * scale[n], then + residual[m, n]. */
typedef struct {
    int64_t activation;
    const float *scale, *residual;
} After;

/* How wide, in vectors, the block is that holds the last so many outputs. */
INLINE int vectors(int64_t outputs) { return outputs > 2 * LANES ? WIDE : outputs > LANES ? 2 : 1; }

int64_t native_width(int64_t outputs) { return vectors(outputs) * LANES; }

INLINE void tile(const int kind, const int R, const int J, const void *weight, const float *const *x, int64_t inputs,
                 float *out) {
    vf sum[ROWS][WIDE];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) sum[r][j] = (vf){};
    const float *w32 = weight;
    const uint16_t *w16 = weight;
    for (int64_t k = 0; k < inputs; k++) {
        vf w[WIDE];
        if (kind == FLOAT32)
            UNROLL for (int j = 0; j < J; j++) w[j] = load(w32 + (k * J + j) * LANES);
        else if (J == 1)
            w[0] = widen(w16 + k * LANES);
        else
            UNROLL for (int j = 0; j < J; j += 2) {
                vi both;
                memcpy(&both, w16 + (k * J + j) * LANES, sizeof both);
                w[j] = (vf)(both << 16), w[j + 1] = (vf)(both & -65536);
            }
        UNROLL for (int r = 0; r < R; r++) {
            float a = x[r][k];
            UNROLL for (int j = 0; j < J; j++) sum[r][j] += w[j] * a;
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) store(out + r * BLOCK + j * LANES, sum[r][j]);
}

#define SHAPES(R)                                                                                                      \
    static void float32_##R(int J, const void *w, const float *const *x, int64_t inputs, float *out) {                \
        J == WIDE ? tile(FLOAT32, R, WIDE, w, x, inputs, out)                                                          \
        : J == 2  ? tile(FLOAT32, R, 2, w, x, inputs, out)                                                             \
                  : tile(FLOAT32, R, 1, w, x, inputs, out);                                                            \
    }                                                                                                                  \
    static void bfloat16_##R(int J, const void *w, const float *const *x, int64_t inputs, float *out) {               \
        J == WIDE ? tile(BFLOAT16, R, WIDE, w, x, inputs, out)                                                         \
        : J == 2  ? tile(BFLOAT16, R, 2, w, x, inputs, out)                                                            \
                  : tile(BFLOAT16, R, 1, w, x, inputs, out);                                                           \
    }
SHAPES(1)
SHAPES(2)
SHAPES(4)
SHAPES(6)

/* One block of floating-point weights by up to ROWS rows; out: [ROWS][BLOCK]. */
static void block_of_floats(const Matrix *m, int64_t block, const float *const *x, int rows, float *out) {
    int64_t first = block * BLOCK, size = m->kind == FLOAT32 ? 4 : 2;
    int J = vectors(m->outputs - first);
    const char *w = (const char *)m->weight + first * m->inputs * size;
    while (rows > 0) {
        int now = rows >= 6 ? 6 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (m->kind == FLOAT32)
            (now == 6 ? float32_6 : now == 4 ? float32_4 : now == 2 ? float32_2 : float32_1)(J, w, x, m->inputs, out);
        else
            (now == 6 ? bfloat16_6 : now == 4 ? bfloat16_4 : now == 2 ? bfloat16_2 : bfloat16_1)(J, w, x, m->inputs, out);
        rows -= now, x += now, out += now * BLOCK;
    }
}

#if INTEGERS
/* Activations as integers, with a scale for each group of inputs (int8: all of them): x is about value * scale. */
typedef struct {
    uint8_t *value; /* int8: shifted by 128 */
    float *scale, *sum;
} Integers;

static void quantise(const Matrix *m, const float *x, Integers to) {
    int64_t group = m->kind == INT4 ? m->group : m->inputs;
    for (int64_t g = 0; g * group < m->inputs; g++) {
        const float *from = x + g * group;
        vf high = (vf){}, bad = (vf){};
        for (int64_t k = 0; k < group; k += LANES) {
            vf v = load(from + k);
            high = most(high, most(v, -v)), bad += v * 0.0f; /* NaN where v is not finite */
        }
        float largest = 1e-30f;
        UNROLL for (int i = 0; i < LANES; i++) largest = high[i] > largest ? high[i] : largest;
        float scale = largest / 127.0f + total(bad), inverse = 1.0f / scale;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < group; k += LANES) {
            __m512i v = _mm512_cvtps_epi32((__m512)(load(from + k) * inverse));
            sum = _mm512_add_epi32(sum, v);
            if (m->kind == INT8) v = _mm512_add_epi32(v, _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i *)(to.value + g * group + k), _mm512_cvtepi32_epi8(v));
        }
        to.scale[g] = scale, to.sum[g] = scale * (float)_mm512_reduce_add_epi32(sum);
    }
}

INLINE __m512i four(const uint8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
}

INLINE void tile_of_int8(const int R, const Matrix *m, int64_t block, const Integers *x, float *out) {
    const uint8_t *w = (const uint8_t *)m->weight + block * BLOCK * m->inputs;
    __m512i sum[4][WIDE];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < WIDE; j++) sum[r][j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < m->inputs; k += 4, w += 4 * BLOCK)
        UNROLL for (int r = 0; r < R; r++) {
            __m512i a = four(x[r].value + k);
            UNROLL for (int j = 0; j < WIDE; j++)
                sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], a, _mm512_loadu_si512(w + 64 * j));
        }
    const float *scales = (const float *)m->scales + 2 * block * BLOCK;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < WIDE; j++) {
        vi shift = (vi)load(scales + BLOCK + j * LANES);
        vf value = __builtin_convertvector((vi)sum[r][j] - shift, vf);
        store(out + r * BLOCK + j * LANES, value * load(scales + j * LANES) * x[r].scale[0]);
    }
}

INLINE void tile_of_int4(const int R, const Matrix *m, int64_t block, const Integers *x, float *out) {
    const uint8_t *w = (const uint8_t *)m->weight + block * BLOCK * m->inputs / 2;
    const uint16_t *scales = (const uint16_t *)m->scales + 2 * block * BLOCK * (m->inputs / m->group);
    const __m512i lower = _mm512_set1_epi8(15);
    vf sum[4][WIDE];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < WIDE; j++) sum[r][j] = (vf){};
    for (int64_t g = 0; g * m->group < m->inputs; g++, scales += 2 * BLOCK) {
        __m512i part[4][WIDE];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < WIDE; j++) part[r][j] = _mm512_setzero_si512();
        for (int64_t k = g * m->group; k < (g + 1) * m->group; k += 8, w += 4 * BLOCK)
            UNROLL for (int j = 0; j < WIDE; j++) {
                __m512i both = _mm512_loadu_si512(w + 64 * j);
                __m512i low = _mm512_and_si512(both, lower), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), lower);
                UNROLL for (int r = 0; r < R; r++) {
                    part[r][j] = _mm512_dpbusd_epi32(part[r][j], low, four(x[r].value + k));
                    part[r][j] = _mm512_dpbusd_epi32(part[r][j], high, four(x[r].value + k + 4));
                }
            }
        UNROLL for (int j = 0; j < WIDE; j++) {
            vf scale = widen(scales + j * LANES), least_value = widen(scales + BLOCK + j * LANES);
            UNROLL for (int r = 0; r < R; r++) {
                vf value = __builtin_convertvector((vi)part[r][j], vf) * x[r].scale[g];
                sum[r][j] += value * scale + least_value * x[r].sum[g];
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < WIDE; j++) store(out + r * BLOCK + j * LANES, sum[r][j]);
}

static void block_of_integers(const Matrix *m, int64_t block, const Integers *x, int rows, float *out) {
    while (rows > 0) {
        int now = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (m->kind == INT8)
            now == 4   ? tile_of_int8(4, m, block, x, out)
            : now == 2 ? tile_of_int8(2, m, block, x, out)
                       : tile_of_int8(1, m, block, x, out);
        else
            now == 4   ? tile_of_int4(4, m, block, x, out)
            : now == 2 ? tile_of_int4(2, m, block, x, out)
                       : tile_of_int4(1, m, block, x, out);
        rows -= now, x += now, out += now * BLOCK;
    }
}
#endif

/* Up to a vector of what may not fill one. */
INLINE vf some(const float *p, int64_t count) {
    float v[LANES] = {0};
    memcpy(v, p, (count < LANES ? count : LANES) * sizeof(float));
    return load(v);
}

/* What follows the sums of one row of a block: `count` outputs from `first` on. `sums` and `others` are [BLOCK]. */
INLINE void finish(const Matrix *m, const After *after, int64_t first, int64_t count, int64_t width, int64_t row,
                   const float *sums, const float *others, float *out) {
    float result[BLOCK];
    for (int64_t n = 0; n < count; n += LANES) {
        vf y = load(sums + n);
        if (m->bias) y += some(m->bias + first + n, count - n);
        if (after->activation == GELU) y = gelu(y);
        if (after->activation == GATED) {
            vf other = load(others + n);
            if (m->bias) other += some(m->bias + width + first + n, count - n);
            y = y / (1.0f + exponential(-y)) * other;
        }
        if (after->scale) y *= some(after->scale + first + n, count - n);
        store(result + n, y);
    }
    out += row * width + first;
    if (after->residual) {
        const float *residual = after->residual + row * width + first;
        for (int64_t n = 0; n < count; n++) out[n] = residual[n] + result[n];
    } else
        memcpy(out, result, count * 4);
}

/* out [batch * rows, outputs] = after(x W + bias). GATED: half of the outputs, silu of the first times the second.
 * Returns 0, or -1 for want of memory.
 */
int64_t native_product(const Matrix *m, const Rows *x, const After *after, float *out, int threads) {
    int64_t rows = x->batch * x->rows, width = after->activation == GATED ? m->outputs / 2 : m->outputs;
    int64_t blocks = (width + BLOCK - 1) / BLOCK, parts = (rows + MANY_ROWS - 1) / MANY_ROWS;
    int64_t bytes = m->inputs * m->outputs * (m->kind == FLOAT32 ? 8 : m->kind == BFLOAT16 ? 4 : m->kind == INT8 ? 2 : 1) / 2;
#if INTEGERS
    int64_t groups = m->kind == INT4 ? m->inputs / m->group : 1;
    char *memory = 0;
    Integers *integers = 0;
    if (m->kind >= INT8) {
        size_t each = sizeof(Integers) + 2 * groups * sizeof(float) + m->inputs;
        if (!(memory = malloc(rows * each))) return -1;
        integers = (Integers *)memory;
        float *scales = (float *)(integers + rows);
        uint8_t *values = (uint8_t *)(scales + 2 * groups * rows);
        for (int64_t r = 0; r < rows; r++) {
            integers[r] = (Integers){values + r * m->inputs, scales + 2 * groups * r, scales + 2 * groups * r + groups};
            quantise(m, x->x + r / x->rows * x->batch_stride + r % x->rows * x->row_stride, integers[r]);
        }
    }
#endif
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && bytes * (rows + 3) > 1 << 19)
    for (int64_t task = 0; task < blocks * parts; task++) {
        int64_t block = task / parts, first = block * BLOCK, from = task % parts * MANY_ROWS;
        int64_t until = from + MANY_ROWS < rows ? from + MANY_ROWS : rows;
        int64_t count = width - first < BLOCK ? width - first : BLOCK;
        for (int64_t row = from; row < until; row += ROWS) {
            int now = until - row < ROWS ? until - row : ROWS;
            float sums[ROWS * BLOCK], others[ROWS * BLOCK];
            if (m->kind <= BFLOAT16) {
                const float *inputs[ROWS];
                for (int r = 0; r < now; r++)
                    inputs[r] = x->x + (row + r) / x->rows * x->batch_stride + (row + r) % x->rows * x->row_stride;
                block_of_floats(m, block, inputs, now, sums);
                if (after->activation == GATED) block_of_floats(m, blocks + block, inputs, now, others);
            }
#if INTEGERS
            else {
                block_of_integers(m, block, integers + row, now, sums);
                if (after->activation == GATED) block_of_integers(m, blocks + block, integers + row, now, others);
            }
#endif
            for (int r = 0; r < now; r++)
                finish(m, after, first, count, width, row + r, sums + r * BLOCK, others + r * BLOCK, out);
        }
    }
#if INTEGERS
    free(memory);
#endif
    return 0;
}

/* total = x + pending (where there is any), normed = weight * total / rms(total): LlamaRMSNorm. */
void native_rms_norm(const float *x, const float *pending, const float *weight, float eps, int64_t rows, int64_t size,
                     float *sum, float *normed) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        if (pending) {
            for (int64_t n = 0; n < size; n++) sum[row * size + n] = from[n] + pending[row * size + n];
            from = sum + row * size;
        }
        vf squares = (vf){};
        for (int64_t n = 0; n < size; n += LANES) squares += load(from + n) * load(from + n);
        float factor = 1.0f / sqrtf(total(squares) / size + eps);
        for (int64_t n = 0; n < size; n++) normed[row * size + n] = weight[n] * (from[n] * factor);
    }
}

void native_layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t rows, int64_t size,
                       float *normed) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        vf sum = (vf){}, squares = (vf){};
        for (int64_t n = 0; n < size; n += LANES) sum += load(from + n);
        float mean = total(sum) / size;
        for (int64_t n = 0; n < size; n += LANES) {
            vf centred = load(from + n) - mean;
            squares += centred * centred;
        }
        float factor = 1.0f / sqrtf(total(squares) / size + eps);
        for (int64_t n = 0; n < size; n++) normed[row * size + n] = (from[n] - mean) * factor * weight[n] + bias[n];
    }
}

/* out [batch, old + new]: `old` elements of context, `stride` apart those of two rows, then `new` of x, by their ELU (x
 * where positive, e^x - 1 elsewhere) if `activate`.
 */
void native_extend(const float *context, int64_t stride, int64_t old, const float *x, int64_t new, int64_t batch,
                   int activate, float *out, int threads) {
    enum { PART = 4096 };
    int64_t parts = (new + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && batch * new > 1 << 15)
    for (int64_t task = 0; task < batch * parts; task++) {
        int64_t row = task / parts, from = task % parts * PART, until = from + PART < new ? from + PART : new, n = from;
        const float *in = x + row * new;
        float *to = out + row * (old + new) + old;
        if (from == 0) memcpy(to - old, context + row * stride, old * sizeof(float));
        if (!activate) {
            memcpy(to + from, in + from, (until - from) * sizeof(float));
            continue;
        }
        for (; n + LANES <= until; n += LANES) {
            vf v = load(in + n);
            store(to + n, most(v, exponential(least(v, (vf){})) - 1.0f));
        }
        for (; n < until; n++) {
            vf v = spread(in[n]);
            to[n] = most(v, exponential(least(v, (vf){})) - 1.0f)[0];
        }
    }
}

/* One layer of a ring of keys and values, [slots, heads, prefix + size, dim] at these distances (in elements). */
typedef struct {
    int64_t kind, prefix, size, slot_stride, head_stride;
    void *keys, *values;
} Ring;

/* Where the tokens stand: positions [batch, time], the oldest position that each may look at (prefix aside), and its
 * angles' cosines and sines [batch, time, dim].
 */
typedef struct {
    const int64_t *position, *start;
    const float *cos, *sin;
    int64_t position_stride, start_stride, start_step, angle_stride;
} View;

INLINE void rotate(const float *x, const float *cos, const float *sin, int64_t dim, float factor, float *out) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * factor;
        out[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * factor;
    }
}

INLINE void keep(const Ring *ring, void *where, int64_t at, const float *x, int64_t dim) {
    if (ring->kind == FLOAT32)
        memcpy((float *)where + at, x, dim * 4);
    else
        for (int64_t i = 0; i < dim; i++) ((uint16_t *)where + at)[i] = narrow(x[i]);
}

INLINE int64_t entry(const Ring *ring, int64_t position) {
    int64_t index = (position - ring->prefix) % ring->size;
    return ring->prefix + (index < 0 ? index + ring->size : index);
}

INLINE vf element(const int kind, const void *where, int64_t at) {
    return kind == FLOAT32 ? load((const float *)where + at) : widen((const uint16_t *)where + at);
}

enum { KEYS_AT_ONCE = 64 }; /* so many stay in the nearest cache for all queries */

/* The sums of `count` (1, 2 or 4) vectors: halves, then quarters of two vectors are added as one. Each is summed as
 * `total` sums it, whatever the others are.
 */
INLINE void totals(const int count, const vf *v, float *out) {
    if (count == 1) {
        out[0] = total(v[0]);
        return;
    }
#if LANES == 16
#define PAIR(a, b)                                                                                                     \
    (__builtin_shuffle(a, b, (vi){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +                           \
     __builtin_shuffle(a, b, (vi){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = __builtin_shuffle(two, other, (vi){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
              __builtin_shuffle(two, other, (vi){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
    four += __builtin_shuffle(four, (vi){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    four += __builtin_shuffle(four, (vi){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif LANES == 8
#define PAIR(a, b)                                                                                                     \
    (__builtin_shuffle(a, b, (vi){0, 1, 2, 3, 8, 9, 10, 11}) + __builtin_shuffle(a, b, (vi){4, 5, 6, 7, 12, 13, 14, 15}))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = __builtin_shuffle(two, other, (vi){0, 1, 4, 5, 8, 9, 12, 13}) +
              __builtin_shuffle(two, other, (vi){2, 3, 6, 7, 10, 11, 14, 15});
    four += __builtin_shuffle(four, (vi){1, 0, 3, 2, 5, 4, 7, 6});
#else
#define PAIR(a, b) (__builtin_shuffle(a, b, (vi){0, 1, 4, 5}) + __builtin_shuffle(a, b, (vi){2, 3, 6, 7}))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = __builtin_shuffle(two, other, (vi){0, 2, 4, 6}) + __builtin_shuffle(two, other, (vi){1, 3, 5, 7});
#endif
    UNROLL for (int i = 0; i < count; i++) out[i] = four[i * LANES / 4];
}

/* Entries first .. first + count - 1 of a head: their scores for Q (1, 2 or 4) queries [dim], `span` floats apart. */
INLINE void score(const int kind, const int Q, const void *keys, int64_t first, int64_t count, int64_t dim,
                  const float *query, float *scores, int64_t span) {
    for (int64_t n = 0; n < count; n++) {
        vf sum[4];
        float result[4];
        UNROLL for (int q = 0; q < Q; q++) sum[q] = (vf){};
        for (int64_t i = 0; i < dim; i += LANES) {
            vf key = element(kind, keys, (first + n) * dim + i);
            UNROLL for (int q = 0; q < Q; q++) sum[q] += load(query + q * dim + i) * key;
        }
        totals(Q, sum, result);
        UNROLL for (int q = 0; q < Q; q++) scores[q * span + n] = result[q];
    }
}

/* Adds the entries' values, times their weights, to out [Q, dim], some vectors of them at a time. */
INLINE void gather(const int kind, const int Q, const void *values, int64_t first, int64_t count, int64_t dim,
                   const float *weights, int64_t span, float *out) {
    enum { AT_ONCE = LANES == 16 ? 4 : 2 };
    int64_t i = 0;
    for (; i + AT_ONCE * LANES <= dim; i += AT_ONCE * LANES) {
        vf sum[4][AT_ONCE];
        UNROLL for (int q = 0; q < Q; q++)
            UNROLL for (int j = 0; j < AT_ONCE; j++) sum[q][j] = load(out + q * dim + i + j * LANES);
        for (int64_t n = 0; n < count; n++) {
            vf value[AT_ONCE];
            UNROLL for (int j = 0; j < AT_ONCE; j++) value[j] = element(kind, values, (first + n) * dim + i + j * LANES);
            UNROLL for (int q = 0; q < Q; q++) {
                float weight = weights[q * span + n];
                UNROLL for (int j = 0; j < AT_ONCE; j++) sum[q][j] += value[j] * weight;
            }
        }
        UNROLL for (int q = 0; q < Q; q++)
            UNROLL for (int j = 0; j < AT_ONCE; j++) store(out + q * dim + i + j * LANES, sum[q][j]);
    }
    for (; i < dim; i += LANES)
        UNROLL for (int q = 0; q < Q; q++) {
            vf sum = load(out + q * dim + i);
            for (int64_t n = 0; n < count; n++)
                sum += element(kind, values, (first + n) * dim + i) * weights[q * span + n];
            store(out + q * dim + i, sum);
        }
}

/* `score` or `gather` of a run of entries for any number of queries, so many entries at a time as the cache holds. */
#define FOR_ALL_QUERIES(KIND, CALL)                                                                                    \
    for (int64_t block = 0; block < count; block += KEYS_AT_ONCE) {                                                    \
        int64_t held = count - block < KEYS_AT_ONCE ? count - block : KEYS_AT_ONCE, q = 0;                             \
        for (; q + 4 <= queries; q += 4) CALL(KIND, 4);                                                                \
        for (; q + 2 <= queries; q += 2) CALL(KIND, 2);                                                                \
        if (q < queries) CALL(KIND, 1);                                                                                \
    }

INLINE void score_all(const int kind, const void *keys, int64_t first, int64_t count, int64_t dim, const float *query,
                      int64_t queries, float *scores, int64_t span) {
#define SCORE(KIND, Q)                                                                                                 \
    score(KIND, Q, keys, first + block, held, dim, query + q * dim, scores + q * span + block, span)
    FOR_ALL_QUERIES(kind, SCORE)
}

INLINE void gather_all(const int kind, const void *values, int64_t first, int64_t count, int64_t dim,
                       const float *weights, int64_t span, int64_t queries, float *out) {
#define GATHER(KIND, Q)                                                                                                \
    gather(KIND, Q, values, first + block, held, dim, weights + q * span + block, span, out + q * dim)
    FOR_ALL_QUERIES(kind, GATHER)
}

/* scores[from .. until - 1] to weights that sum to 1; what stands beside them, up to `span`, to 0. There is room for a
 * vector behind.
 */
static void softmax(float *scores, int64_t from, int64_t until, int64_t span) {
    for (int64_t n = until; n < until + LANES; n++) scores[n] = -INFINITY;
    vf highest = spread(-INFINITY), sum = (vf){};
    for (int64_t n = from; n < until; n += LANES) highest = most(highest, load(scores + n));
    float largest = highest[0];
    UNROLL for (int i = 1; i < LANES; i++) largest = highest[i] > largest ? highest[i] : largest;
    for (int64_t n = from; n < until; n += LANES) {
        vf score = load(scores + n);
        vf weight = pick(score == -INFINITY, (vf){}, exponential(score - largest));
        sum += weight;
        store(scores + n, weight);
    }
    float factor = 1.0f / total(sum);
    for (int64_t n = from; n < until; n++) scores[n] *= factor;
    memset(scores, 0, from * sizeof(float));
    memset(scores + until, 0, (span - until) * sizeof(float));
}

INLINE void attend(const int kind, const Ring *ring, const View *view, const float *qkv, int64_t time, int64_t heads,
                   int64_t groups, int64_t dim, int64_t slot, int64_t head, int64_t group, int64_t count, float *memory,
                   int64_t span, float *out) {
    const int64_t *position = view->position + slot * view->position_stride, queries = count * time;
    const int64_t *start = view->start + slot * view->start_stride;
    int64_t width = (heads * groups + 2 * heads) * dim, at = slot * ring->slot_stride + head * ring->head_stride;
    const void *keys = kind == FLOAT32 ? (void *)((float *)ring->keys + at) : (void *)((uint16_t *)ring->keys + at);
    const void *values = kind == FLOAT32 ? (void *)((float *)ring->values + at) : (void *)((uint16_t *)ring->values + at);
    float *query = memory, *result = query + queries * dim, *scores = result + queries * dim;
    for (int64_t q = 0; q < queries; q++) {
        int64_t g = group + q / time, t = q % time, angle = slot * view->angle_stride + t * dim;
        rotate(qkv + (slot * time + t) * width + (head * groups + g) * dim, view->cos + angle, view->sin + angle, dim,
               1.0f / sqrtf(dim), query + q * dim);
    }
    /* The prefix, then the positions from the oldest in any query's window to the newest, which may wrap around. */
    int64_t oldest = start[0], held = position[time - 1] + 1 - oldest;
    if (held < 0) held = 0;
    int64_t first = entry(ring, oldest), before = ring->prefix + ring->size - first;
    if (before > held) before = held;
    struct { int64_t first, count; } runs[3] = {{0, ring->prefix}, {first, before}, {ring->prefix, held - before}};
    float *to = scores;
    for (int i = 0; i < 3; to += runs[i++].count) score_all(kind, keys, runs[i].first, runs[i].count, dim, query, queries, to, span);
    int64_t filled = ring->prefix + held;
    for (int64_t q = 0; q < queries; q++) {
        int64_t t = q % time, from = start[t * view->start_step] - oldest, until = position[t] + 1 - oldest;
        if (until < 0) until = 0;
        if (from > 0 && ring->prefix == 0)
            softmax(scores + q * span, from, until, filled);
        else
            softmax(scores + q * span, 0, ring->prefix + until, filled);
    }
    memset(result, 0, queries * dim * 4);
    to = scores;
    for (int i = 0; i < 3; to += runs[i++].count) gather_all(kind, values, runs[i].first, runs[i].count, dim, to, span, queries, result);
    for (int64_t q = 0; q < queries; q++)
        memcpy(out + ((slot * time + q % time) * heads * groups + head * groups + group + q / time) * dim, result + q * dim,
               dim * 4);
}

/* Turns queries and keys, keeps keys and values in the ring, and attends: out [batch, time, heads * groups * dim] of
 * qkv [batch, time, (heads * groups + 2 * heads) * dim]. Windows that begin per query need a ring without a prefix.
 * Returns 0, or -1 for want of memory.
 */
int64_t native_attend(const Ring *ring, const View *view, const float *qkv, int64_t batch, int64_t time, int64_t heads,
                  int64_t groups, int64_t dim, float *out, int threads) {
    int64_t span = 0, width = (heads * groups + 2 * heads) * dim;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t *position = view->position + b * view->position_stride;
        int64_t held = ring->prefix + position[time - 1] + 1 - view->start[b * view->start_stride];
        span = held > span ? held : span;
        for (int64_t t = 0; t < time; t++)
            for (int64_t h = 0; h < heads; h++) {
                const float *key = qkv + (b * time + t) * width + (heads * groups + h) * dim;
                int64_t angle = b * view->angle_stride + t * dim;
                int64_t at = b * ring->slot_stride + h * ring->head_stride + entry(ring, position[t]) * dim;
                float turned[dim];
                rotate(key, view->cos + angle, view->sin + angle, dim, 1.0f, turned);
                keep(ring, ring->keys, at, turned, dim);
                keep(ring, ring->values, at, key + heads * dim, dim);
            }
    }
    span += ring->prefix + LANES;
    /* A unit of work is a head with all its queries, so that keys are read once; with part of them, if threads want work. */
    int64_t count = groups, failed = 0;
    while (count % 2 == 0 && batch * heads * (groups / count) < threads) count /= 2;
    int64_t units = batch * heads * (groups / count);
    int64_t size = count * time * (2 * dim + span) * sizeof(float);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && units > 1 && span * units * count * time > 4096)
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t slot = unit / (units / batch), rest = unit % (units / batch);
        int64_t head = rest / (groups / count), group = rest % (groups / count) * count;
        float *memory = malloc(size);
        if (!memory) {
#pragma omp atomic write
            failed = -1;
            continue;
        }
        if (ring->kind == FLOAT32)
            attend(FLOAT32, ring, view, qkv, time, heads, groups, dim, slot, head, group, count, memory, span, out);
        else
            attend(BFLOAT16, ring, view, qkv, time, heads, groups, dim, slot, head, group, count, memory, span, out);
        free(memory);
    }
    return failed;
}

/* What `sampler.draw` reads and writes: see there. Flags are bytes, `flag_stride` apart those of `listening` and
 * `speaking`.
 */
typedef struct {
    const float *temperature, *top_p;
    const int64_t *top_k, *seed, *frames;
    const uint8_t *listening, *speaking;
    int64_t flag_stride;
    int64_t *codes;
    uint8_t *ended, *finite;
} Drawing;

enum { FEW = 64 };

INLINE uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

INLINE double uniform(int64_t seed, int64_t number) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    return (double)(mix(mix((uint64_t)seed + golden) ^ ((uint64_t)number * golden)) >> 40) * 0x1p-24;
}

/* The indices of the `count` largest, the lower index first where two are equal. */
INLINE void rank(const float *logits, int64_t size, int64_t count, int64_t *order) {
    int32_t keys[FEW];
    int64_t held = 0;
    for (int64_t i = 0; i < size; i++) {
        float value = logits[i] + 0.0f; /* -0 becomes 0 */
        int32_t key;
        memcpy(&key, &value, 4);
        key ^= (key >> 31) & 0x7FFFFFFF; /* in the order of the floats */
        if (held == count && key <= keys[count - 1]) continue;
        int64_t at = held < count ? held++ : count - 1;
        for (; at > 0 && key > keys[at - 1]; at--) keys[at] = keys[at - 1], order[at] = order[at - 1];
        keys[at] = key, order[at] = i;
    }
}

/* `sampler.draw` for slots whose top_k is from 1 to FEW. logits: [batch, size]; units: [batch]. */
void native_draw(const float *logits, const Drawing *d, int64_t batch, int64_t size, int64_t book, int64_t books,
                int64_t *units) {
    for (int64_t b = 0; b < batch; b++, logits += size) {
        int64_t count = d->temperature[b] <= 0 ? 1 : d->top_k[b] < 1 ? 1 : d->top_k[b] > FEW ? FEW : d->top_k[b];
        int64_t order[FEW], weight[FEW], sum = 0, reached = 0, chosen = 0;
        if (count > size) count = size;
        float bad = 0; /* the last one is minus infinity by right, but in the first codebook */
        for (int64_t i = 0; i < size - (book > 0); i++) bad += logits[i] * 0.0f;
        d->finite[b] &= bad == 0;
        rank(logits, size, count, order);
        double divisor = d->temperature[b] > 1e-4f ? d->temperature[b] : 1e-4f;
        for (int64_t i = 0; i < count; i++) {
            double chance = exp(((double)logits[order[i]] - logits[order[0]]) / divisor) * 0x1p36;
            sum += weight[i] = chance >= 0 && chance <= 0x1p36 ? (int64_t)chance : 0;
        }
        double limit = (double)d->top_p[b] * (double)sum;
        int64_t before = 0, total = 0;
        for (int64_t i = 0; i < count; i++) {
            if ((double)before >= limit) count = i; /* the first is always kept: 0 < top_p */
            else before += weight[i], total = before;
        }
        double threshold = uniform(d->seed[b], d->frames[b] * books + book) * (double)total;
        for (int64_t i = 0; i < count; i++) {
            reached += weight[i];
            chosen += (double)reached <= threshold && reached < total;
        }
        int64_t drawn = order[chosen];
        if (book == 0) d->ended[b] |= d->speaking[b * d->flag_stride] && drawn == size - 1;
        if (!d->listening[b * d->flag_stride]) d->codes[b * books + book] = drawn < size - 1 ? drawn : size - 2;
        units[b] = d->codes[b * books + book] + book * (size - 1);
    }
}
