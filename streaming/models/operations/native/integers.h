/* Products of bytes, four to a lane, for every instruction set; the sums are the same on all of them, to the bit.
 *
 * `Four` is four activations, spread over all lanes. `dot8` adds the products with four weights of 8 bits in each lane,
 * and its sum begins at `start8`; `dot4` those with four nibbles, 0 to 15 for -8 to 7, and its sum, over SUMMED
 * inputs at most, begins at `start4` and becomes whole in `end4`. Bytes are from -127 to 127: -128 has no magnitude in a
 * byte.
 */

/* The words that hold what `start4` needs, from sums over every fourth activation. */
INLINE int32_t whole_start(const int32_t *sums) { return -8 * (sums[0] + sums[1] + sums[2] + sums[3]); }

#define UNSIGNED_ACTIVATIONS 0
#define SUMMED INT64_MAX

/* Arm's products of matrices take two rows at once: eight inputs of each by eight of two outputs. `TwoRows` has the sums of
 * two rows, `low` and `high` the weights of four inputs and of the four after them.
 */
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define PAIRS 1
typedef struct {
    int32x4_t first, last; /* of outputs 0 and 1, 2 and 3: of one row in the lower half, of the other in the upper */
} TwoRows;
INLINE TwoRows start_two(vi one, vi other) {
    int32x4_t a = (int32x4_t)one, b = (int32x4_t)other;
    return (TwoRows){vcombine_s32(vget_low_s32(a), vget_low_s32(b)), vcombine_s32(vget_high_s32(a), vget_high_s32(b))};
}
INLINE TwoRows dot_two(TwoRows sum, vi low, vi high, const int8_t *one, const int8_t *other) {
    int8x16_t rows = vcombine_s8(vld1_s8(one), vld1_s8(other));
    int32x4_t w = (int32x4_t)low, v = (int32x4_t)high;
    sum.first = vmmlaq_s32(sum.first, rows, vreinterpretq_s8_s32(vzip1q_s32(w, v)));
    sum.last = vmmlaq_s32(sum.last, rows, vreinterpretq_s8_s32(vzip2q_s32(w, v)));
    return sum;
}
INLINE vi one_of_two(TwoRows sum, int other) {
    return other ? (vi)vcombine_s32(vget_high_s32(sum.first), vget_high_s32(sum.last))
                 : (vi)vcombine_s32(vget_low_s32(sum.first), vget_low_s32(sum.last));
}
#else
#define PAIRS 0
#endif

#if LANES == 16 && defined(__AVX512VNNI__) || LANES == 8 && defined(__AVXVNNI__)
/* VNNI multiplies unsigned by signed: activations of `dot8` are shifted by 128, and their sum begins at -128 times that
 * of the weights.
 */
#undef UNSIGNED_ACTIVATIONS
#define UNSIGNED_ACTIVATIONS 1
#if LANES == 16
#define INSTRUCTIONS "AVX512-VNNI"
#define DPBUSD(sum, a, b) (vi)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#else
#define INSTRUCTIONS "AVX-VNNI"
#define DPBUSD(sum, a, b) (vi)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(a), (__m256i)(b))
#endif
typedef vi Four;
INLINE Four four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return bytes - (vi){};
}
INLINE vi dot8(vi sum, vi weights, Four a) { return DPBUSD(sum, a, weights); }
INLINE vi dot4(vi sum, vi nibbles, Four a) { return DPBUSD(sum, nibbles, a); }
INLINE int32_t start4(const int32_t *sums) { return whole_start(sums); }
INLINE vi end4(vi sum) { return sum; }

#elif LANES >= 8
/* Without VNNI bytes are multiplied in pairs, and a pair's sum saturates at 16 bits. An activation's magnitude by a
 * weight with the sign of both, 2 * 127 * 127 fits. A nibble's products are summed in 16 bits, 32 to each: what overflows on the way
 * comes back, since the sum begins at -8 times that of the activations, and 32 * 8 * 127 fits.
 */
#undef SUMMED
#define SUMMED 64
#if LANES == 16
#define INSTRUCTIONS "AVX512"
#define MADD(a, b) (vi)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define MADDUBS(a, b) (vi)_mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#define ADD16(a, b) (vi)_mm512_add_epi16((__m512i)(a), (__m512i)(b))
#define MAGNITUDE(a) (vi)_mm512_abs_epi8((__m512i)(a))
#define SIGNED(a, sign)                                                                                                \
    (vi)_mm512_mask_sub_epi8((__m512i)(a), _mm512_movepi8_mask((__m512i)(sign)), _mm512_setzero_si512(), (__m512i)(a))
#else
#define INSTRUCTIONS "AVX2"
#define MADD(a, b) (vi)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define MADDUBS(a, b) (vi)_mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#define ADD16(a, b) (vi)_mm256_add_epi16((__m256i)(a), (__m256i)(b))
#define MAGNITUDE(a) (vi)_mm256_abs_epi8((__m256i)(a))
#define SIGNED(a, sign) (vi)_mm256_sign_epi8((__m256i)(a), (__m256i)(sign))
#endif
#define ONES (0x10001 - (vi){})
typedef vi Four;
INLINE Four four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return bytes - (vi){};
}
INLINE vi dot8(vi sum, vi weights, Four a) { return sum + MADD(MADDUBS(MAGNITUDE(a), SIGNED(weights, a)), ONES); }
INLINE vi dot4(vi sum, vi nibbles, Four a) { return ADD16(sum, MADDUBS(nibbles, a)); }
INLINE int32_t start4(const int32_t *sums) {
    return (-8 * (sums[0] + sums[1]) & 0xFFFF) | (uint32_t)(-8 * (sums[2] + sums[3])) << 16;
}
INLINE vi end4(vi sum) { return MADD(sum, ONES); }

#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define INSTRUCTIONS "NEON with matrix products"
#else
#define INSTRUCTIONS "NEON with dot products"
#endif
typedef int8x16_t Four;
INLINE Four four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}
INLINE vi dot8(vi sum, vi weights, Four a) { return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, a); }
INLINE vi dot4(vi sum, vi nibbles, Four a) { return dot8(sum, nibbles, a); }
INLINE int32_t start4(const int32_t *sums) { return whole_start(sums); }
INLINE vi end4(vi sum) { return sum; }

#elif defined(__aarch64__)
#define INSTRUCTIONS "NEON"
typedef int8x16_t Four;
INLINE Four four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}
INLINE vi dot8(vi sum, vi weights, Four a) {
    int8x16_t w = (int8x16_t)weights;
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    return (vi)vaddq_s32((int32x4_t)sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
INLINE vi dot4(vi sum, vi nibbles, Four a) { return dot8(sum, nibbles, a); }
INLINE int32_t start4(const int32_t *sums) { return whole_start(sums); }
INLINE vi end4(vi sum) { return sum; }

#elif defined(__SSE2__)
/* Every second byte as 16 bits, and the others. */
#define INSTRUCTIONS "SSE2"
typedef struct {
    __m128i even, odd;
} Four;
INLINE Four halves(__m128i bytes) {
    return (Four){_mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), _mm_srai_epi16(bytes, 8)};
}
INLINE Four four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return halves(_mm_set1_epi32(bytes));
}
INLINE vi dot8(vi sum, vi weights, Four a) {
    Four w = halves((__m128i)weights);
    return sum + (vi)_mm_madd_epi16(w.even, a.even) + (vi)_mm_madd_epi16(w.odd, a.odd);
}
INLINE vi dot4(vi sum, vi nibbles, Four a) { return dot8(sum, nibbles, a); }
INLINE int32_t start4(const int32_t *sums) { return whole_start(sums); }
INLINE vi end4(vi sum) { return sum; }

#else
#define INSTRUCTIONS "plain C"
typedef const int8_t *Four;
INLINE Four four(const int8_t *x) { return x; }
INLINE vi dot8(vi sum, vi weights, Four a) {
    UNROLL for (int i = 0; i < 4; i++) sum += (weights << (24 - 8 * i) >> 24) * a[i];
    return sum;
}
INLINE vi dot4(vi sum, vi nibbles, Four a) { return dot8(sum, nibbles, a); }
INLINE int32_t start4(const int32_t *sums) { return whole_start(sums); }
INLINE vi end4(vi sum) { return sum; }
#endif
