/* Products of few rows with a matrix: as fast as its weights can be read.
 *
 * Weights are packed in the order in which they are read, in blocks of outputs, and converted on the way; all else is
 * kept off their way: activations are float32, a thread's blocks lie one after another, and what follows a product happens
 * while its results are in a register's reach.
 *
 * Every output sums its products in the order of its inputs, alone, or, where a matrix has no other, lane by lane: its
 * bits depend on its own row and on nothing else, neither on the other rows nor on the threads.
 */

#define ROWS 6       /* that one tile takes, at most */
#define MANY_ROWS 48 /* that one thread takes with a block; a multiple of ROWS */
#define MANY_INPUTS 256 /* whose weights stay in a near cache for all those rows */

enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { PLAIN, GELU, GATED };

/* A matrix of weights, [outputs / BLOCK] blocks of
 * - float32, bfloat16: [inputs][BLOCK]. A last block of few outputs is 1 or 2 vectors wide. A single output is float32,
 *   [inputs]. Two vectors of bfloat16 lie as one of words, the first in the lower halves, which takes two operations to
 *   take apart instead of four.
 * - int8: [inputs / 4][BLOCK][4]. scales: [outputs / BLOCK][2][BLOCK], a float32 scale and, int32, -128 times the sum of
 *   the output's weights.
 * - int4: for each group of inputs its scales, bfloat16 [BLOCK], and its nibbles, [group / 8][BLOCK][4], the first four
 *   inputs in the lower halves of the bytes and the next in the upper.
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

/* What is done to results [rows, outputs]: an activation, then x * scale[n], then + residual[m, n], then an ELU. gap: so
 * many elements lie between the results of one of the batch and those of the next.
 */
typedef struct {
    int64_t activation;
    const float *scale, *residual;
    int64_t elu, gap;
} After;

INLINE const float *row_of(const Rows *x, int64_t row) {
    return x->x + row / x->rows * x->batch_stride + row % x->rows * x->row_stride;
}

/* How wide, in vectors, the block is that holds the last so many outputs. */
INLINE int vectors(int64_t outputs) { return outputs > 2 * LANES ? WIDE : outputs > LANES ? 2 : 1; }

/* J vectors of outputs by R rows: in registers, with the weights and an activation beside the sums. */
#define AT_ONCE(R) (REGISTERS == 32 || (R) <= 2 ? WIDE : WIDE / 2)

/* Few rows take so many blocks of outputs at once: four streams are read faster than one (docs/decisions.md). Blocks of
 * floats take turns; two of integers share what is done to a row's activation, and the second lies so many bytes
 * `further`.
 */
#define STREAMS 4
#define BOTH 2

/* Some inputs of a block: those from `first` until `last`. ahead: how far from these weights those are, in bytes, that
 * many rows need next. For few rows the processor's own guesses are better.
 */
typedef struct {
    int64_t first, last, ahead;
} Inputs;

/* Adds the products with these inputs to out [MANY_ROWS, BLOCK], R of the rows, whose sums begin with input 0. */
INLINE void tile(const int kind, const int R, const int J, const int width, const char *weight, const float *const *x,
                 Inputs some, float *out) {
    const int size = kind == FLOAT32 ? 4 : 2;
    vf sum[ROWS][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) sum[r][j] = some.first ? load(out + r * BLOCK + j * LANES) : (vf){};
    weight += some.first * width * LANES * size;
    for (int64_t k = some.first; k < some.last; k++, weight += width * LANES * size) {
        const float *w32 = (const float *)weight;
        const uint16_t *w16 = (const uint16_t *)weight;
        vf w[WIDE];
        if (R > 2) prefetch_far(weight + some.ahead, J * LANES * size);
        if (kind == FLOAT32)
            UNROLL for (int j = 0; j < J; j++) w[j] = load(w32 + j * LANES);
        else if (width == 1)
            w[0] = widen(w16);
        else
            UNROLL for (int j = 0; j < J; j += 2) {
                vi both = load_integers(w16 + j * LANES);
                w[j] = (vf)(both << 16), w[j + 1] = (vf)(both & -65536);
            }
        UNROLL for (int r = 0; r < R; r++) {
            vf a = spread(x[r][k]);
            UNROLL for (int j = 0; j < J; j++) sum[r][j] = fused(w[j], a, sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) store(out + r * BLOCK + j * LANES, sum[r][j]);
}

INLINE void tiles(const int kind, const int R, int width, const char *w, const float *const *x, Inputs some,
                  float *out) {
    const int size = kind == FLOAT32 ? 4 : 2, J = AT_ONCE(R);
    if (width == 1)
        tile(kind, R, 1, 1, w, x, some, out);
    else if (width == 2)
        tile(kind, R, 2, 2, w, x, some, out);
    else
        for (int j = 0; j < WIDE; j += J) tile(kind, R, J, WIDE, w + j * LANES * size, x, some, out + j * LANES);
}

/* The sums of `streams` blocks of full width, each so many bytes `further` than the one before it, a few inputs of each in
 * turn; out: [streams, MANY_ROWS, BLOCK].
 */
INLINE void turns(const int kind, const int R, const char *w, int64_t further, int streams, const float *const *x,
                  int64_t inputs, float *out) {
    const int size = kind == FLOAT32 ? 4 : 2, J = AT_ONCE(R), turn = (R > 4 ? 32 : 16) / size;
    for (int64_t first = 0; first < inputs; first += turn) {
        const Inputs some = {first, first + turn < inputs ? first + turn : inputs, 0};
        for (int n = 0; n < streams; n++)
            for (int j = 0; j < WIDE; j += J)
                tile(kind, R, J, WIDE, w + n * further + j * LANES * size, x, some,
                     out + n * MANY_ROWS * BLOCK + j * LANES);
    }
}

#define SHAPE(R)                                                                                                       \
    static void float32_##R(int width, const char *w, const float *const *x, Inputs some, float *out) {               \
        tiles(FLOAT32, R, width, w, x, some, out);                                                                     \
    }                                                                                                                  \
    static void bfloat16_##R(int width, const char *w, const float *const *x, Inputs some, float *out) {              \
        tiles(BFLOAT16, R, width, w, x, some, out);                                                                    \
    }                                                                                                                  \
    static void turns_of_float32_##R(const char *w, int64_t further, int streams, const float *const *x,              \
                                     int64_t inputs, float *out) {                                                     \
        turns(FLOAT32, R, w, further, streams, x, inputs, out);                                                        \
    }                                                                                                                  \
    static void turns_of_bfloat16_##R(const char *w, int64_t further, int streams, const float *const *x,             \
                                      int64_t inputs, float *out) {                                                    \
        turns(BFLOAT16, R, w, further, streams, x, inputs, out);                                                       \
    }
SHAPE(1)
SHAPE(2)
SHAPE(4)
SHAPE(6)

/* A single output of `rows` rows, to the first of each [BLOCK] of out: a vector would hold one output and nothing. */
static void single(const float *w, const float *const *x, int64_t inputs, int rows, float *out) {
    for (int row = 0; row < rows; row += 4) {
        const float *from[4];
        vf sum[4];
        float result[4];
        UNROLL for (int r = 0; r < 4; r++) from[r] = x[row + r < rows ? row + r : row], sum[r] = (vf){};
        for (int64_t k = 0; k < inputs; k += LANES) {
            vf weights = some(w + k, inputs - k);
            UNROLL for (int r = 0; r < 4; r++) sum[r] = fused(some(from[r] + k, inputs - k), weights, sum[r]);
        }
        totals(4, sum, result);
        for (int r = 0; r < 4 && row + r < rows; r++) out[(row + r) * BLOCK] = result[r];
    }
}

/* How many rows a tile takes where so many are left: one more than that at times, which is multiplied for nothing. */
INLINE int rows_of_tile(int left) { return left > 4 ? 6 : left > 2 ? 4 : left; }

/* One block of floating-point weights by `rows` rows; out: [MANY_ROWS, BLOCK]. Weights that more than one tile needs are
 * read from memory in parts, the next one while all rows are multiplied with this one.
 */
static void block_of_floats(const Matrix *m, int64_t block, const float *const *x, int rows, float *out) {
    if (m->outputs == 1) {
        single(m->weight, x, m->inputs, rows, out);
        return;
    }
    int64_t first = block * BLOCK, size = m->kind == FLOAT32 ? 4 : 2, part = rows > ROWS ? MANY_INPUTS : m->inputs;
    int width = vectors(m->outputs - first);
    const char *w = (const char *)m->weight + first * m->inputs * size;
    Inputs some = {0, 0, rows > ROWS ? part * width * LANES * size : 0};
    for (; some.first < m->inputs; some.first = some.last) {
        some.last = some.first + part < m->inputs ? some.first + part : m->inputs;
        for (int row = 0, now; row < rows; row += now) {
            const float *const *from = x + row;
            float *to = out + row * BLOCK;
            now = rows_of_tile(rows - row);
            if (m->kind == FLOAT32)
                (now == 6 ? float32_6 : now == 4 ? float32_4 : now == 2 ? float32_2 : float32_1)(width, w, from, some, to);
            else
                (now == 6 ? bfloat16_6 : now == 4 ? bfloat16_4 : now == 2 ? bfloat16_2 : bfloat16_1)(width, w, from, some, to);
        }
    }
}

/* `streams` blocks of full width, each `apart` from the one before it, by up to ROWS rows; out: [streams, MANY_ROWS,
 * BLOCK].
 */
static void blocks_of_floats(const Matrix *m, int64_t block, int64_t apart, int streams, const float *const *x, int rows,
                             float *out) {
    const int64_t bytes = BLOCK * m->inputs * (m->kind == FLOAT32 ? 4 : 2);
    const char *w = (const char *)m->weight + block * bytes;
    const int now = rows_of_tile(rows);
    if (m->kind == FLOAT32)
        (now == 6   ? turns_of_float32_6
         : now == 4 ? turns_of_float32_4
         : now == 2 ? turns_of_float32_2
                    : turns_of_float32_1)(w, apart * bytes, streams, x, m->inputs, out);
    else
        (now == 6   ? turns_of_bfloat16_6
         : now == 4 ? turns_of_bfloat16_4
         : now == 2 ? turns_of_bfloat16_2
                    : turns_of_bfloat16_1)(w, apart * bytes, streams, x, m->inputs, out);
}

/* Activations as integers, with a scale for each group of inputs (int8: all of them): x is about value * scale. start:
 * see `start4`, for each `summed` inputs.
 */
typedef struct {
    int8_t *value;
    float *scale;
    int32_t *start;
} Integers;

/* So many inputs of a group are summed at once. */
INLINE int64_t summed(const Matrix *m) { return m->kind == INT8 ? m->inputs : m->group < SUMMED ? m->group : SUMMED; }

/* The scale is the group's largest magnitude by 127, a value the nearest whole number to x * (1 / scale), ties to even;
 * nothing here may be fused.
 */
static void quantise(const Matrix *m, const float *x, Integers to) {
    const int64_t group = m->kind == INT4 ? m->group : m->inputs, some = summed(m);
    const int8_t shift = UNSIGNED_ACTIVATIONS && m->kind == INT8 ? -128 : 0;
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
        to.scale[g] = scale;
        for (int64_t first = 0; first < group; first += some) {
            vi sum = (vi){};
            for (int64_t k = first; k < first + some; k += LANES) {
                vi v = __builtin_convertvector(rounded(load(from + k) * inverse), vi);
                sum += v;
                vb bytes = __builtin_convertvector(v, vb) ^ shift;
                memcpy(to.value + g * group + k, &bytes, LANES);
            }
            int32_t sums[4] = {0};
            UNROLL for (int i = 0; i < LANES; i++) sums[i % 4] += sum[i];
            to.start[(g * group + first) / some] = start4(sums);
        }
    }
}

/* sum[r][j] + the products of R rows with J vectors of weights, from input k until `until`, eight inputs at a time. A
 * vector's weights of the first four inputs are at `low`, of the other four at `high` bytes further; or, of nibbles, in
 * the same bytes.
 */
INLINE void sums_of_pairs(const int R, const int J, const int kind, const char *w, int64_t k, int64_t until,
                          const Integers *x, vi sum[4][WIDE]) {
#if PAIRS
    TwoRows two[2][WIDE];
    UNROLL for (int r = 0; r < R; r += 2)
        UNROLL for (int j = 0; j < J; j++) two[r / 2][j] = start_two(sum[r][j], sum[r + 1][j]);
    for (; k < until; k += 8, w += kind == INT8 ? 8 * BLOCK : 4 * BLOCK) {
        UNROLL for (int j = 0; j < J; j++) {
            vi low = load_integers(w + j * 4 * LANES), high;
            if (kind == INT8)
                high = load_integers(w + 4 * BLOCK + j * 4 * LANES);
            else
                high = low >> 4 & 0x0F0F0F0F, low &= 0x0F0F0F0F;
            UNROLL for (int r = 0; r < R; r += 2)
                two[r / 2][j] = dot_two(two[r / 2][j], low, high, x[r].value + k, x[r + 1].value + k);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) sum[r][j] = one_of_two(two[r / 2][j], r % 2);
#endif
}

/* Of `block`, and where H is BOTH of the one `apart` blocks further, too: out [H, MANY_ROWS, BLOCK]. */
INLINE void tile_of_int8(const int H, const int R, const int J, const Matrix *m, int64_t block, int64_t apart, int from,
                         const Integers *x, float *out) {
    const char *w = (const char *)m->weight + block * BLOCK * m->inputs + from * 4 * LANES;
    const int64_t further = apart * BLOCK * m->inputs;
    vi sum[BOTH][4][WIDE];
    UNROLL for (int h = 0; h < H; h++) {
        const float *starts = (const float *)m->scales + (2 * (block + h * apart) + 1) * BLOCK + from * LANES;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < J; j++)
                sum[h][r][j] = UNSIGNED_ACTIVATIONS ? load_integers(starts + j * LANES) : (vi){};
    }
    if (PAIRS && R > 1)
        sums_of_pairs(R, J, INT8, w, 0, m->inputs, x, sum[0]);
    else for (int64_t k = 0; k < m->inputs; k += 4, w += 4 * BLOCK) {
        Four a[4];
        UNROLL for (int r = 0; r < R; r++) a[r] = four(x[r].value + k);
        UNROLL for (int h = 0; h < H; h++) {
            if (R > 1) prefetch(w + h * further, J * 4 * LANES);
            UNROLL for (int j = 0; j < J; j++) {
                vi weights = load_integers(w + h * further + j * 4 * LANES);
                UNROLL for (int r = 0; r < R; r++) sum[h][r][j] = dot8(sum[h][r][j], weights, a[r]);
            }
        }
    }
    UNROLL for (int h = 0; h < H; h++) {
        const float *scales = (const float *)m->scales + 2 * (block + h * apart) * BLOCK + from * LANES;
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) {
            vf value = __builtin_convertvector(sum[h][r][j], vf) * (load(scales + j * LANES) * x[r].scale[0]);
            store(out + (h * MANY_ROWS + r) * BLOCK + (from + j) * LANES, value);
        }
    }
}

/* As `tile_of_int8`. */
INLINE void tile_of_int4(const int H, const int R, const int J, const Matrix *m, int64_t block, int64_t apart, int from,
                         const Integers *x, float *out) {
    const int64_t size = BLOCK * (m->inputs / m->group) * (2 + m->group / 2), further = apart * size, some = summed(m);
    const char *w = (const char *)m->weight + block * size;
    vf sum[BOTH][4][WIDE];
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) sum[h][r][j] = (vf){};
    for (int64_t g = 0; g * m->group < m->inputs; g++) {
        const char *scales = w + from * 2 * LANES;
        vi whole[BOTH][4][WIDE];
        w += 2 * BLOCK;
        for (int64_t first = g * m->group; first < (g + 1) * m->group; first += some) {
            vi part[BOTH][4][WIDE];
            UNROLL for (int h = 0; h < H; h++)
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int j = 0; j < J; j++) part[h][r][j] = x[r].start[first / some] - (vi){};
            int64_t k = first;
            if (PAIRS && R > 1)
                sums_of_pairs(R, J, INT4, w + from * 4 * LANES, k, k + some, x, part[0]), w += some / 2 * BLOCK;
            else for (; k < first + some; k += 8, w += 4 * BLOCK) {
                Four low[4], high[4];
                UNROLL for (int r = 0; r < R; r++) low[r] = four(x[r].value + k), high[r] = four(x[r].value + k + 4);
                UNROLL for (int h = 0; h < H; h++) {
                    const char *eight = w + h * further + from * 4 * LANES;
                    if (R > 1) prefetch(eight, J * 4 * LANES);
                    UNROLL for (int j = 0; j < J; j++) {
                        vi both = load_integers(eight + j * 4 * LANES);
                        vi lower = both & 0x0F0F0F0F, upper = both >> 4 & 0x0F0F0F0F;
                        UNROLL for (int r = 0; r < R; r++)
                            part[h][r][j] = dot4(dot4(part[h][r][j], lower, low[r]), upper, high[r]);
                    }
                }
            }
            const int more = first > g * m->group;
            UNROLL for (int h = 0; h < H; h++)
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int j = 0; j < J; j++) {
                        vi sum = end4(part[h][r][j]);
                        whole[h][r][j] = more ? whole[h][r][j] + sum : sum;
                    }
        }
        UNROLL for (int h = 0; h < H; h++) UNROLL for (int j = 0; j < J; j++) {
            vf scale = widen((const uint16_t *)(scales + h * further) + j * LANES);
            UNROLL for (int r = 0; r < R; r++)
                sum[h][r][j] += __builtin_convertvector(whole[h][r][j], vf) * (scale * x[r].scale[g]);
        }
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < J; j++) store(out + (h * MANY_ROWS + r) * BLOCK + (from + j) * LANES, sum[h][r][j]);
}

#define SHAPE_OF_INTEGERS(R)                                                                                           \
    static void int8_##R(const Matrix *m, int64_t block, const Integers *x, float *out) {                             \
        for (int from = 0; from < WIDE; from += AT_ONCE(R)) tile_of_int8(1, R, AT_ONCE(R), m, block, 0, from, x, out); \
    }                                                                                                                  \
    static void int4_##R(const Matrix *m, int64_t block, const Integers *x, float *out) {                             \
        for (int from = 0; from < WIDE; from += AT_ONCE(R)) tile_of_int4(1, R, AT_ONCE(R), m, block, 0, from, x, out); \
    }
SHAPE_OF_INTEGERS(1)
SHAPE_OF_INTEGERS(2)
SHAPE_OF_INTEGERS(4)

static void block_of_integers(const Matrix *m, int64_t block, const Integers *x, int rows, float *out) {
    while (rows > 0) {
        int now = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (m->kind == INT8)
            (now == 4 ? int8_4 : now == 2 ? int8_2 : int8_1)(m, block, x, out);
        else
            (now == 4 ? int4_4 : now == 2 ? int4_2 : int4_1)(m, block, x, out);
        rows -= now, x += now, out += now * BLOCK;
    }
}

/* Two blocks of full width by one row; out: [BOTH, MANY_ROWS, BLOCK]. */
static void two_blocks_of_integers(const Matrix *m, int64_t block, int64_t apart, const Integers *x, float *out) {
    if (m->kind == INT8)
        tile_of_int8(BOTH, 1, WIDE, m, block, apart, 0, x, out);
    else
        tile_of_int4(BOTH, 1, WIDE, m, block, apart, 0, x, out);
}

/* What follows the sums of some rows of a block: `count` outputs from `first` on. sums, others: [rows, BLOCK]; residual,
 * where there is any, and out: of each row, from its first output on.
 */
INLINE void finish(const int activation, const Matrix *m, const After *after, int64_t first, int64_t count, int64_t width,
                   int rows, const float *sums, const float *others, const float *const *residual, float *const *out) {
    const vf none = {};
    for (int64_t n = 0; n < count; n += LANES) {
        int64_t left = count - n, at = first + n;
        vf bias = m->bias ? some(m->bias + at, left) : none;
        vf other_bias = m->bias && activation == GATED ? some(m->bias + width + at, left) : none;
        vf scale = after->scale ? some(after->scale + at, left) : none;
        for (int r = 0; r < rows; r++) {
            vf y = load(sums + r * BLOCK + n);
            if (m->bias) y += bias;
            if (activation == GELU) y = gelu(y);
            if (activation == GATED) {
                vf other = load(others + r * BLOCK + n);
                if (m->bias) other += other_bias;
                y = y / (1.0f + exponential(-y)) * other;
            }
            if (after->scale) y *= scale;
            if (after->residual) y += some(residual[r] + at, left);
            if (after->elu) y = elu(y);
            if (left >= LANES)
                store(out[r] + at, y);
            else
                store_some(out[r] + at, y, left);
        }
    }
}

/* Tasks are `parts` of the rows by so many blocks of outputs as there are `apart`, each with as many others as make
 * `streams`, that far from one another.
 */
typedef struct {
    const Matrix *m;
    const Rows *x;
    const After *after;
    const Integers *integers; /* x as such, where the weights are */
    int64_t rows, width, streams, apart, parts;
    float *out;
} Product;

/* A few blocks of outputs by MANY_ROWS rows. */
static void part_of_product(int64_t task, void *what) {
    const Product *p = what;
    const Matrix *m = p->m;
    const After *after = p->after;
    int64_t block = task / p->parts, from = task % p->parts * MANY_ROWS;
    int64_t until = from + MANY_ROWS < p->rows ? from + MANY_ROWS : p->rows;
    int64_t member = from / p->x->rows, place = from % p->x->rows; /* of the batch, and among its rows */
    int rows = until - from, streams = 1, gated = after->activation == GATED;
    while (streams < p->streams && (block + streams * p->apart) * BLOCK < m->outputs) streams++;
    float sums[STREAMS][MANY_ROWS * BLOCK];
    const Integers *integers = p->integers ? p->integers + from : 0;
    const float *inputs[MANY_ROWS], *residual[MANY_ROWS];
    float *out[MANY_ROWS];
    for (int r = 0; r < rows; r++) {
        inputs[r] = p->x->x + member * p->x->batch_stride + place * p->x->row_stride;
        residual[r] = after->residual + (from + r) * p->width;
        out[r] = p->out + (from + r) * p->width + member * after->gap;
        if (++place == p->x->rows) place = 0, member++;
    }
    for (int r = rows; r % ROWS; r++) inputs[r] = inputs[rows - 1]; /* see `rows_of_tile` */
    int together = 0; /* so many of them, of full width */
    if (!integers && rows <= ROWS) {
        while (together < streams && vectors(m->outputs - (block + together * p->apart) * BLOCK) == WIDE) together++;
        blocks_of_floats(m, block, p->apart, together, inputs, rows, sums[0]);
    } else if (integers && rows == 1 && streams == BOTH && vectors(m->outputs - (block + p->apart) * BLOCK) == WIDE) {
        two_blocks_of_integers(m, block, p->apart, integers, sums[0]);
        together = BOTH;
    }
    for (int n = together; n < streams; n++)
        if (integers)
            block_of_integers(m, block + n * p->apart, integers, rows, sums[n]);
        else
            block_of_floats(m, block + n * p->apart, inputs, rows, sums[n]);
    for (int n = 0; n < (gated ? 1 : streams); n++) {
        int64_t first = (block + n * p->apart) * BLOCK, count = p->width - first < BLOCK ? p->width - first : BLOCK;
        if (after->activation == PLAIN)
            finish(PLAIN, m, after, first, count, p->width, rows, sums[n], 0, residual, out);
        else if (after->activation == GELU)
            finish(GELU, m, after, first, count, p->width, rows, sums[n], 0, residual, out);
        else
            finish(GATED, m, after, first, count, p->width, rows, sums[0], sums[1], residual, out);
    }
}

/* out [batch * rows, outputs] = after(x W + bias). GATED: half of the outputs, silu of the first times the second. `out`
 * may be the residual. Returns 0, or -1 for want of memory.
 */
int64_t native_product(const Matrix *m, const Rows *x, const After *after, float *out, int threads) {
    int64_t rows = x->batch * x->rows, gated = after->activation == GATED, width = gated ? m->outputs / 2 : m->outputs;
    int64_t blocks = (width + BLOCK - 1) / BLOCK, parts = (rows + MANY_ROWS - 1) / MANY_ROWS;
    int64_t bytes = m->inputs * m->outputs * (m->kind == FLOAT32 ? 8 : m->kind == BFLOAT16 ? 4 : m->kind == INT8 ? 2 : 1) / 2;
    int64_t streams = gated ? 2 : m->kind >= INT8 ? (rows == 1 ? BOTH : 1) : rows <= 4 ? STREAMS : rows <= ROWS ? 2 : 1;
    if (bytes * (rows + 3) <= 1 << 19) threads = 1;
    while (!gated && streams > 1 && threads > 1 && blocks < 2 * streams * threads) streams /= 2;
    int64_t apart = gated ? blocks : (blocks + streams - 1) / streams;
    Integers *integers = 0;
    if (m->kind >= INT8) {
        int64_t groups = m->kind == INT4 ? m->inputs / m->group : 1, sums = m->inputs / summed(m);
        if (!(integers = malloc(rows * (sizeof(Integers) + 4 * (groups + sums) + m->inputs)))) return -1;
        float *scales = (float *)(integers + rows);
        int32_t *starts = (int32_t *)(scales + groups * rows);
        int8_t *values = (int8_t *)(starts + sums * rows);
        for (int64_t r = 0; r < rows; r++) {
            integers[r] = (Integers){values + r * m->inputs, scales + groups * r, starts + sums * r};
            quantise(m, row_of(x, r), integers[r]);
        }
    }
    Product product = {m, x, after, integers, rows, width, streams, apart, parts, out};
    share(apart * parts, threads, part_of_product, &product);
    free(integers);
    return 0;
}

/* What `matrix.py` has to know to pack weights. */
int64_t native_lanes(void) { return LANES; }
int64_t native_block(void) { return BLOCK; }
int64_t native_width(int64_t outputs) { return vectors(outputs) * LANES; }
const char *native_instructions(void) { return INSTRUCTIONS; }
