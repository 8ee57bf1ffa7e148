/* Vectors of floats as wide as the processor's, the same names for every instruction set, and the curves over them.
 *
 * A row's bits must depend on that row alone, on every processor and with every compiler. So the compiler may not choose
 * where a product and a sum become one instruction with one rounding (it chose otherwise in each shape of a loop):
 * `library.py` forbids it with -ffp-contract=off, and what is to be one instruction is written `fused`.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__FAST_MATH__)
#error "sums must keep their order"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#define WIDE 4 /* vectors in a block of outputs */
#define BLOCK (LANES * WIDE)
#if LANES == 16 || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 8")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));

/* Asks for what will be read a little later, for loops with too much to do between two reads: the processor looks no
 * further than some hundred instructions ahead, and its own guesses end with the page.
 */
enum { AHEAD = 1024 };
INLINE void prefetch(const void *p, const int size) {
    UNROLL for (int i = 0; i < size; i += 64) __builtin_prefetch((const char *)p + AHEAD + i);
}

/* The same much later: what lies at p itself, into a cache that does not hold what is used until then. */
INLINE void prefetch_far(const void *p, const int size) {
    UNROLL for (int i = 0; i < size; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vi load_integers(const void *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* Up to a vector of what may not fill one. */
INLINE vf some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    float v[LANES] = {0};
    memcpy(v, p, count * sizeof(float));
    return load(v);
}

/* The first elements of a vector, where not all may be written. */
INLINE void store_some(float *p, vf v, int64_t count) { memcpy(p, &v, (count < LANES ? count : LANES) * sizeof(float)); }

/* bfloat16 to float32. gcc makes six instructions of `__builtin_convertvector` where the processor has one. */
INLINE vf widen(const uint16_t *p) {
    vh half;
    memcpy(&half, p, sizeof half);
#if LANES == 16
    vi words = (vi)_mm512_cvtepu16_epi32((__m256i)half);
#elif LANES == 8
    vi words = (vi)_mm256_cvtepu16_epi32((__m128i)half);
#else
    vi words = __builtin_convertvector(half, vi);
#endif
    return (vf)(words << 16);
}

INLINE uint16_t narrow(float x) { /* float32 to bfloat16, to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

INLINE vf spread(float x) { return x - (vf){}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf least(vf a, vf b) { return pick(b < a, b, a); } /* a where either is NaN */
INLINE vf most(vf a, vf b) { return pick(b > a, b, a); }

/* a * b + sum, rounded once where the processor can. */
INLINE vf fused(vf a, vf b, vf sum) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

/* The nearest whole number, ties to even, of what is smaller than 2^22. */
INLINE vf rounded(vf x) { return x + 12582912.0f - 12582912.0f; }

/* The sum of a vector, by halves. */
INLINE float total(vf v) {
#if LANES == 16
    v += SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    v += SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += SHUFFLE(v, v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

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
    (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                                           \
     SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = SHUFFLE(two, other, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              SHUFFLE(two, other, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    four += SHUFFLE(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    four += SHUFFLE(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
#define PAIR(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = SHUFFLE(two, other, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(two, other, 2, 3, 6, 7, 10, 11, 14, 15);
    four += SHUFFLE(four, four, 1, 0, 3, 2, 5, 4, 7, 6);
#else
#define PAIR(a, b) (SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7))
    vf two = PAIR(v[0], v[1]), other = count == 4 ? PAIR(v[2], v[3]) : two;
    vf four = SHUFFLE(two, other, 0, 2, 4, 6) + SHUFFLE(two, other, 1, 3, 5, 7);
#endif
    UNROLL for (int i = 0; i < count; i++) out[i] = four[i * LANES / 4];
}

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vf exponential(vf x) {
    vf bounded = most(least(x, spread(88.3762f)), spread(-87.3365f));
    vf n = rounded(bounded * 1.44269504f);
    vf r = fused(n, spread(-1.42860677e-6f), fused(n, spread(-0.693145752f), bounded));
    vf p = spread(0.00137511303f);
    p = fused(p, r, spread(0.00836899225f));
    p = fused(p, r, spread(0.0416695438f));
    p = fused(p, r, spread(0.166665182f));
    p = fused(p, r, spread(0.499999881f));
    p = fused(p * r, r, r) + 1.0f;
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return pick(x != x, x, p * power);
}

/* x where positive, e^x - 1 elsewhere. */
INLINE vf elu(vf x) { return most(x, exponential(least(x, (vf){})) - 1.0f); }

/* x times the normal distribution's share below x; erf to 4e-7 as a quotient of polynomials. */
INLINE vf gelu(vf x) {
    vf z = most(least(x * 0.707106781f, spread(3.92f)), spread(-3.92f)), t = z * z;
    vf p = spread(2.06780123e-06f), q = spread(3.82131730e-05f);
    p = fused(p, t, spread(0.000283679518f));
    q = fused(q, t, spread(0.00114617648f));
    p = fused(p, t, spread(0.00369500695f));
    q = fused(q, t, spread(0.0148267746f));
    p = fused(p, t, spread(0.0525301211f));
    q = fused(q, t, spread(0.113412894f));
    p = fused(p, t, spread(0.188708782f));
    q = fused(q, t, spread(0.500571787f));
    p = fused(p, t, spread(1.12837911f));
    q = fused(q, t, spread(1.0f));
    vf one = pick(z > 3.8f, spread(1.0f), spread(-1.0f)), inside = z * p / q;
    return 0.5f * x * (1.0f + pick((z > 3.8f) | (z < -3.8f), one, inside));
}
