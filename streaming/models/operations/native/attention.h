/* Attention over rings of keys and values, reading what a slot holds and nothing else. */

/* One layer of a ring of keys and values, [slots, heads, prefix + size, dim] at these distances (in elements). */
typedef struct {
    int64_t kind, prefix, size, slot_stride, head_stride;
    void *keys, *values;
} Ring;

/* The slot that each row of the batch is, and where its tokens stand: positions [batch, time], the oldest position that each may look at (prefix aside), and its
 * angles' cosines and sines [batch, time, dim].
 */
typedef struct {
    const int64_t *slots, *position, *start;
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

/* So many entries stay in the nearest cache for all queries. Values are fewer, since each of them is read in several
 * turns: reading them from memory is to be spread over what is computed.
 */
enum { KEYS_AT_ONCE = 64, VALUES_AT_ONCE = 32 };

/* Scores of N entries for Q queries, as many as there are registers for their sums: a query is loaded once for all N. */
INLINE void score_some(const int kind, const int Q, const int N, const void *keys, int64_t at, int64_t dim,
                       const float *query, float *scores, int64_t span) {
    vf sum[4][4], key[4];
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int q = 0; q < Q; q++) sum[n][q] = (vf){};
    for (int64_t i = 0; i < dim; i += LANES) {
        UNROLL for (int n = 0; n < N; n++) key[n] = element(kind, keys, at + n * dim + i);
        UNROLL for (int q = 0; q < Q; q++) {
            vf one = load(query + q * dim + i);
            UNROLL for (int n = 0; n < N; n++) sum[n][q] = fused(one, key[n], sum[n][q]);
        }
    }
    UNROLL for (int n = 0; n < N; n++) {
        float result[4];
        totals(Q, sum[n], result);
        UNROLL for (int q = 0; q < Q; q++) scores[q * span + n] = result[q];
    }
}

/* Entries first .. first + count - 1 of a head: their scores for Q (1, 2 or 4) queries [dim], `span` floats apart. */
INLINE void score(const int kind, const int Q, const void *keys, int64_t first, int64_t count, int64_t dim,
                  const float *query, float *scores, int64_t span) {
    enum { SOME = REGISTERS == 32 ? 4 : 2 };
    int64_t n = 0;
    for (; n + SOME <= count; n += SOME) score_some(kind, Q, SOME, keys, (first + n) * dim, dim, query, scores + n, span);
    for (; n < count; n++) score_some(kind, Q, 1, keys, (first + n) * dim, dim, query, scores + n, span);
}

/* Adds the entries' values, times their weights, to out [Q, dim], some vectors of them at a time. */
INLINE void gather(const int kind, const int Q, const void *values, int64_t first, int64_t count, int64_t dim,
                   const float *weights, int64_t span, float *out) {
    enum { SOME = REGISTERS == 32 ? 4 : 2 };
    int64_t i = 0;
    for (; i + SOME * LANES <= dim; i += SOME * LANES) {
        vf sum[4][SOME];
        UNROLL for (int q = 0; q < Q; q++)
            UNROLL for (int j = 0; j < SOME; j++) sum[q][j] = load(out + q * dim + i + j * LANES);
        for (int64_t n = 0; n < count; n++) {
            vf value[SOME];
            UNROLL for (int j = 0; j < SOME; j++) value[j] = element(kind, values, (first + n) * dim + i + j * LANES);
            UNROLL for (int q = 0; q < Q; q++) {
                vf weight = spread(weights[q * span + n]);
                UNROLL for (int j = 0; j < SOME; j++) sum[q][j] = fused(value[j], weight, sum[q][j]);
            }
        }
        UNROLL for (int q = 0; q < Q; q++)
            UNROLL for (int j = 0; j < SOME; j++) store(out + q * dim + i + j * LANES, sum[q][j]);
    }
    for (; i < dim; i += LANES)
        UNROLL for (int q = 0; q < Q; q++) {
            vf sum = load(out + q * dim + i);
            for (int64_t n = 0; n < count; n++)
                sum = fused(element(kind, values, (first + n) * dim + i), spread(weights[q * span + n]), sum);
            store(out + q * dim + i, sum);
        }
}

/* `score` or `gather` of a run of entries for any number of queries, so many entries at a time as the cache holds. */
#define FOR_ALL_QUERIES(KIND, MOST, CALL)                                                                          \
    for (int64_t block = 0; block < count; block += MOST) {                                                        \
        int64_t held = count - block < MOST ? count - block : MOST, q = 0;                                      \
        for (; q + 4 <= queries; q += 4) CALL(KIND, 4);                                                                \
        for (; q + 2 <= queries; q += 2) CALL(KIND, 2);                                                                \
        if (q < queries) CALL(KIND, 1);                                                                                \
    }

INLINE void score_all(const int kind, const void *keys, int64_t first, int64_t count, int64_t dim, const float *query,
                      int64_t queries, float *scores, int64_t span) {
#define SCORE(KIND, Q)                                                                                                 \
    score(KIND, Q, keys, first + block, held, dim, query + q * dim, scores + q * span + block, span)
    FOR_ALL_QUERIES(kind, KEYS_AT_ONCE, SCORE)
}

INLINE void gather_all(const int kind, const void *values, int64_t first, int64_t count, int64_t dim,
                       const float *weights, int64_t span, int64_t queries, float *out) {
#define GATHER(KIND, Q)                                                                                                \
    gather(KIND, Q, values, first + block, held, dim, weights + q * span + block, span, out + q * dim)
    FOR_ALL_QUERIES(kind, VALUES_AT_ONCE, GATHER)
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
                   int64_t groups, int64_t dim, int64_t row, int64_t head, int64_t group, int64_t count, float *memory,
                   int64_t span, float *out) {
    const int64_t *position = view->position + row * view->position_stride, queries = count * time;
    const int64_t *start = view->start + row * view->start_stride;
    int64_t width = (heads * groups + 2 * heads) * dim, at = view->slots[row] * ring->slot_stride + head * ring->head_stride;
    const void *keys = kind == FLOAT32 ? (void *)((float *)ring->keys + at) : (void *)((uint16_t *)ring->keys + at);
    const void *values = kind == FLOAT32 ? (void *)((float *)ring->values + at) : (void *)((uint16_t *)ring->values + at);
    float *query = memory, *result = query + queries * dim, *scores = result + queries * dim;
    for (int64_t q = 0; q < queries; q++) {
        int64_t g = group + q / time, t = q % time, angle = row * view->angle_stride + t * dim;
        rotate(qkv + (row * time + t) * width + (head * groups + g) * dim, view->cos + angle, view->sin + angle, dim,
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
        memcpy(out + ((row * time + q % time) * heads * groups + head * groups + group + q / time) * dim, result + q * dim,
               dim * 4);
}

typedef struct {
    const Ring *ring;
    const View *view;
    const float *qkv;
    int64_t batch, time, heads, groups, dim, count, span;
    float *out;
    int64_t failed;
} Attention;

/* `count` of the `groups` queries that share a head, of all tokens of a row. */
static void part_of_attention(int64_t task, void *what) {
    Attention *a = what;
    int64_t parts = a->groups / a->count, row = task / (a->heads * parts), head = task / parts % a->heads;
    int64_t group = task % parts * a->count;
    float *memory = malloc(a->count * a->time * (2 * a->dim + a->span) * sizeof(float));
    if (!memory) {
        __atomic_store_n(&a->failed, -1, __ATOMIC_RELAXED);
        return;
    }
    if (a->ring->kind == FLOAT32)
        attend(FLOAT32, a->ring, a->view, a->qkv, a->time, a->heads, a->groups, a->dim, row, head, group, a->count,
               memory, a->span, a->out);
    else
        attend(BFLOAT16, a->ring, a->view, a->qkv, a->time, a->heads, a->groups, a->dim, row, head, group, a->count,
               memory, a->span, a->out);
    free(memory);
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
                int64_t at = view->slots[b] * ring->slot_stride + h * ring->head_stride + entry(ring, position[t]) * dim;
                float turned[dim];
                rotate(key, view->cos + angle, view->sin + angle, dim, 1.0f, turned);
                keep(ring, ring->keys, at, turned, dim);
                keep(ring, ring->values, at, key + heads * dim, dim);
            }
    }
    span += ring->prefix + LANES;
    /* A unit of work is a head with all its queries, so that keys are read once; with part of them, if threads want work. */
    int64_t count = groups;
    while (count % 2 == 0 && batch * heads * (groups / count) < threads) count /= 2;
    int64_t units = batch * heads * (groups / count);
    Attention all = {ring, view, qkv, batch, time, heads, groups, dim, count, span, out, 0};
    share(units, span * units * count * time > 4096 ? threads : 1, part_of_attention, &all);
    return all.failed;
}
