/* The sampler: see `sampler.draw`, which draws the same. */

/* What `sampler.draw` reads and writes: see there. Flags are bytes, `flag_stride` apart those of `listening` and
 * `speaking`.
 */
typedef struct {
    const float *temperature, *top_p;
    const int64_t *top_k, *seed, *slots, *frames;
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

/* `sampler.draw` for rows whose slots' top_k is from 1 to FEW. logits: [batch, size]; units: [batch]. */
void native_draw(const float *logits, const Drawing *d, int64_t batch, int64_t size, int64_t book, int64_t books,
                int64_t *units) {
    for (int64_t b = 0; b < batch; b++, logits += size) {
        int64_t slot = d->slots[b], top_k = d->top_k[slot];
        int64_t count = d->temperature[slot] <= 0 ? 1 : top_k < 1 ? 1 : top_k > FEW ? FEW : top_k;
        int64_t order[FEW], weight[FEW], sum = 0, reached = 0, chosen = 0;
        if (count > size) count = size;
        float bad = 0; /* the last one is minus infinity by right, but in the first codebook */
        for (int64_t i = 0; i < size - (book > 0); i++) bad += logits[i] * 0.0f;
        d->finite[b] &= bad == 0;
        rank(logits, size, count, order);
        double divisor = d->temperature[slot] > 1e-4f ? d->temperature[slot] : 1e-4f;
        for (int64_t i = 0; i < count; i++) {
            double chance = exp(((double)logits[order[i]] - logits[order[0]]) / divisor) * 0x1p36;
            sum += weight[i] = chance >= 0 && chance <= 0x1p36 ? (int64_t)chance : 0;
        }
        double limit = (double)d->top_p[slot] * (double)sum;
        int64_t before = 0, total = 0;
        for (int64_t i = 0; i < count; i++) {
            if ((double)before >= limit) count = i; /* the first is always kept: 0 < top_p */
            else before += weight[i], total = before;
        }
        double threshold = uniform(d->seed[slot], d->frames[slot] * books + book) * (double)total;
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
