/* Products of few rows with a matrix: as fast as its weights can be read.
 *
 * Weights are packed in the order in which they are read, in blocks of outputs, and converted on the way; all else is
 * kept off their way: activations are float32, threads take blocks as they come, and what follows a product happens
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
 *   [inputs]. Two vectors of bfloat16 lie as one of words, the first in the lower halves, which takes two operations to take apart instead of four.
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

/* Some inputs of a block: those from `first` until `last`. ahead: how far from these weights those are, in bytes, that are
 * needed next.
 */
typedef struct {
    int64_t first, last, ahead;
} Inputs;

/* Adds the products with these inputs to out [R, BLOCK], whose sums begin with input 0. */
INLINE void tile(const int kind, const int R, const int J, const int width, const void *weight, const float *const *x,
                 Inputs some, float *out) {
    vf sum[ROWS][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) sum[r][j] = some.first ? load(out + r * BLOCK + j * LANES) : (vf){};
    const int size = kind == FLOAT32 ? 4 : 2;
    const float *w32 = (const float *)weight + some.first * width * LANES;
    const uint16_t *w16 = (const uint16_t *)weight + some.first * width * LANES;
    for (int64_t k = some.first; k < some.last; k++, w32 += width * LANES, w16 += width * LANES) {
        vf w[WIDE];
        prefetch_far((kind == FLOAT32 ? (const char *)w32 : (const char *)w16) + some.ahead, J * LANES * size);
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
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) store(out + r * BLOCK + j * LANES, sum[r][j]);
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

#define SHAPE(R)                                                                                                       \
    static void float32_##R(int width, const char *w, const float *const *x, Inputs some, float *out) {               \
        tiles(FLOAT32, R, width, w, x, some, out);                                                                     \
    }                                                                                                                  \
    static void bfloat16_##R(int width, const char *w, const float *const *x, Inputs some, float *out) {              \
        tiles(BFLOAT16, R, width, w, x, some, out);                                                                    \
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

/* One block of floating-point weights by `rows` rows; out: [rows, BLOCK]. Weights that more than one tile needs are read
 * from memory in parts, the next one while all rows are multiplied with this one.
 */
static void block_of_floats(const Matrix *m, int64_t block, const float *const *x, int rows, float *out) {
    if (m->outputs == 1) {
        single(m->weight, x, m->inputs, rows, out);
        return;
    }
    int64_t first = block * BLOCK, size = m->kind == FLOAT32 ? 4 : 2, part = rows > ROWS ? MANY_INPUTS : m->inputs;
    int width = vectors(m->outputs - first);
    const char *w = (const char *)m->weight + first * m->inputs * size;
    Inputs some = {0, 0, rows > ROWS ? part * width * LANES * size : AHEAD};
    for (; some.first < m->inputs; some.first = some.last) {
        some.last = some.first + part < m->inputs ? some.first + part : m->inputs;
        for (int row = 0, now; row < rows; row += now) {
            const float *const *from = x + row;
            float *to = out + row * BLOCK;
            now = rows - row >= 6 ? 6 : rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
            if (m->kind == FLOAT32)
                (now == 6 ? float32_6 : now == 4 ? float32_4 : now == 2 ? float32_2 : float32_1)(width, w, from, some, to);
            else
                (now == 6 ? bfloat16_6 : now == 4 ? bfloat16_4 : now == 2 ? bfloat16_2 : bfloat16_1)(width, w, from, some, to);
        }
    }
}

/* Activations as integers, with a scale for each group of inputs (int8: all of them): x is about value * scale. start:
 * see `start4`.
 */
typedef struct {
    int8_t *value;
    float *scale;
    int32_t *start;
} Integers;

/* The scale is the group's largest magnitude by 127, a value the nearest whole number to x * (1 / scale), ties to even;
 * nothing here may be fused.
 */
static void quantise(const Matrix *m, const float *x, Integers to) {
    int64_t group = m->kind == INT4 ? m->group : m->inputs;
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
        vi sum = (vi){};
        for (int64_t k = 0; k < group; k += LANES) {
            vi v = __builtin_convertvector(rounded(load(from + k) * inverse), vi);
            sum += v;
            vb bytes = __builtin_convertvector(v, vb) ^ shift;
            memcpy(to.value + g * group + k, &bytes, LANES);
        }
        int32_t sums[4] = {0};
        UNROLL for (int i = 0; i < LANES; i++) sums[i % 4] += sum[i];
        to.scale[g] = scale, to.start[g] = start4(sums);
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

INLINE void tile_of_int8(const int R, const int J, const Matrix *m, int64_t block, int from, const Integers *x,
                         float *out) {
    const int8_t *w = (const int8_t *)m->weight + block * BLOCK * m->inputs + from * 4 * LANES;
    const float *scales = (const float *)m->scales + 2 * block * BLOCK + from * LANES;
    vi sum[4][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++)
            sum[r][j] = UNSIGNED_ACTIVATIONS ? load_integers(scales + BLOCK + j * LANES) : (vi){};
    if (PAIRS && R > 1)
        sums_of_pairs(R, J, INT8, (const char *)w, 0, m->inputs, x, sum);
    else for (int64_t k = 0; k < m->inputs; k += 4, w += 4 * BLOCK) {
        Four a[4];
        prefetch(w, J * 4 * LANES);
        UNROLL for (int r = 0; r < R; r++) a[r] = four(x[r].value + k);
        UNROLL for (int j = 0; j < J; j++) {
            vi weights = load_integers(w + j * 4 * LANES);
            UNROLL for (int r = 0; r < R; r++) sum[r][j] = dot8(sum[r][j], weights, a[r]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) {
        vf value = __builtin_convertvector(sum[r][j], vf) * (load(scales + j * LANES) * x[r].scale[0]);
        store(out + r * BLOCK + (from + j) * LANES, value);
    }
}

INLINE void tile_of_int4(const int R, const int J, const Matrix *m, int64_t block, int from, const Integers *x,
                         float *out) {
    const char *w = (const char *)m->weight + block * BLOCK * (m->inputs / m->group) * (2 + m->group / 2);
    vf sum[4][WIDE];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) sum[r][j] = (vf){};
    for (int64_t g = 0; g * m->group < m->inputs; g++) {
        const uint16_t *scales = (const uint16_t *)w + from * LANES;
        vi part[4][WIDE];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < J; j++) part[r][j] = x[r].start[g] - (vi){};
        w += 2 * BLOCK;
        int64_t k = g * m->group, until = k + m->group;
        if (PAIRS && R > 1)
            sums_of_pairs(R, J, INT4, w + from * 4 * LANES, k, until, x, part), w += m->group / 2 * BLOCK;
        else for (; k < until; k += 8, w += 4 * BLOCK) {
            Four low[4], high[4];
            prefetch(w + from * 4 * LANES, J * 4 * LANES);
            UNROLL for (int r = 0; r < R; r++) low[r] = four(x[r].value + k), high[r] = four(x[r].value + k + 4);
            UNROLL for (int j = 0; j < J; j++) {
                vi both = load_integers(w + (from + j) * 4 * LANES);
                vi lower = both & 0x0F0F0F0F, upper = both >> 4 & 0x0F0F0F0F;
                UNROLL for (int r = 0; r < R; r++)
                    part[r][j] = dot4(dot4(part[r][j], lower, low[r]), upper, high[r]);
            }
        }
        UNROLL for (int j = 0; j < J; j++) {
            vf scale = widen(scales + j * LANES);
            UNROLL for (int r = 0; r < R; r++)
                sum[r][j] += __builtin_convertvector(end4(part[r][j]), vf) * (scale * x[r].scale[g]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) store(out + r * BLOCK + (from + j) * LANES, sum[r][j]);
}

#define SHAPE_OF_INTEGERS(R)                                                                                           \
    static void int8_##R(const Matrix *m, int64_t block, const Integers *x, float *out) {                             \
        for (int from = 0; from < WIDE; from += AT_ONCE(R)) tile_of_int8(R, AT_ONCE(R), m, block, from, x, out);       \
    }                                                                                                                  \
    static void int4_##R(const Matrix *m, int64_t block, const Integers *x, float *out) {                             \
        for (int from = 0; from < WIDE; from += AT_ONCE(R)) tile_of_int4(R, AT_ONCE(R), m, block, from, x, out);       \
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

typedef struct {
    const Matrix *m;
    const Rows *x;
    const After *after;
    const Integers *integers; /* x as such, where the weights are */
    int64_t rows, width, blocks, parts;
    float *out;
} Product;

/* A block of outputs, or of both halves if gated, by MANY_ROWS rows. */
static void part_of_product(int64_t task, void *what) {
    const Product *p = what;
    const Matrix *m = p->m;
    int64_t block = task / p->parts, first = block * BLOCK, from = task % p->parts * MANY_ROWS;
    int64_t until = from + MANY_ROWS < p->rows ? from + MANY_ROWS : p->rows;
    int64_t count = p->width - first < BLOCK ? p->width - first : BLOCK;
    const After *after = p->after;
    int gated = after->activation == GATED;
    int64_t member = from / p->x->rows, place = from % p->x->rows; /* of the batch, and among its rows */
    int rows = until - from;
    float sums[MANY_ROWS * BLOCK], others[MANY_ROWS * BLOCK];
    const float *inputs[MANY_ROWS], *residual[MANY_ROWS];
    float *out[MANY_ROWS];
    for (int r = 0; r < rows; r++) {
        inputs[r] = p->x->x + member * p->x->batch_stride + place * p->x->row_stride;
        residual[r] = after->residual + (from + r) * p->width;
        out[r] = p->out + (from + r) * p->width + member * after->gap;
        if (++place == p->x->rows) place = 0, member++;
    }
    if (p->integers) {
        block_of_integers(m, block, p->integers + from, rows, sums);
        if (gated) block_of_integers(m, p->blocks + block, p->integers + from, rows, others);
    } else {
        block_of_floats(m, block, inputs, rows, sums);
        if (gated) block_of_floats(m, p->blocks + block, inputs, rows, others);
    }
    if (after->activation == PLAIN)
        finish(PLAIN, m, after, first, count, p->width, rows, sums, others, residual, out);
    else if (after->activation == GELU)
        finish(GELU, m, after, first, count, p->width, rows, sums, others, residual, out);
    else
        finish(GATED, m, after, first, count, p->width, rows, sums, others, residual, out);
}

/* out [batch * rows, outputs] = after(x W + bias). GATED: half of the outputs, silu of the first times the second. `out`
 * may be the residual. Returns 0, or -1 for want of memory.
 */
int64_t native_product(const Matrix *m, const Rows *x, const After *after, float *out, int threads) {
    int64_t rows = x->batch * x->rows, width = after->activation == GATED ? m->outputs / 2 : m->outputs;
    int64_t blocks = (width + BLOCK - 1) / BLOCK, parts = (rows + MANY_ROWS - 1) / MANY_ROWS;
    int64_t bytes = m->inputs * m->outputs * (m->kind == FLOAT32 ? 8 : m->kind == BFLOAT16 ? 4 : m->kind == INT8 ? 2 : 1) / 2;
    Integers *integers = 0;
    if (m->kind >= INT8) {
        int64_t groups = m->kind == INT4 ? m->inputs / m->group : 1;
        if (!(integers = malloc(rows * (sizeof(Integers) + 8 * groups + m->inputs)))) return -1;
        float *scales = (float *)(integers + rows);
        int32_t *starts = (int32_t *)(scales + groups * rows);
        int8_t *values = (int8_t *)(starts + groups * rows);
        for (int64_t r = 0; r < rows; r++) {
            integers[r] = (Integers){values + r * m->inputs, scales + groups * r, starts + groups * r};
            quantise(m, row_of(x, r), integers[r]);
        }
    }
    Product product = {m, x, after, integers, rows, width, blocks, parts, out};
    share(blocks * parts, bytes * (rows + 3) > 1 << 19 ? threads : 1, part_of_product, &product);
    free(integers);
    return 0;
}

/* What `matrix.py` has to know to pack weights. */
int64_t native_lanes(void) { return LANES; }
int64_t native_block(void) { return BLOCK; }
int64_t native_width(int64_t outputs) { return vectors(outputs) * LANES; }
const char *native_instructions(void) { return INSTRUCTIONS; }
