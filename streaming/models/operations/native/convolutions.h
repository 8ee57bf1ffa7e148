/* SEANet's convolutions in one call: each is a product with windows of its input, and its results lie where the next one
 * reads them, by their ELU if there is one between the two.
 */

/* One of them, as `base.Convolution` says. `context`: steps before its input that its windows reach back to. */
typedef struct {
    const Matrix *product;
    int64_t channels, context, kernel, stride, dilation, upsample, activate, adds, replicates;
} Convolution;

/* What the last frame of each row's stream left for this one: `memory` is [slots, depth, width], frame n's at n % depth;
 * `offset` is where the first convolution's begins. slots, frames: [batch].
 */
typedef struct {
    float *memory;
    const int64_t *slots, *frames;
    int64_t depth, width, offset;
} Contexts;

/* The input of a convolution, [batch, context + time, channels]. */
typedef struct {
    const Convolution *convolution;
    float *steps;
    int64_t time;
} Input;

INLINE int64_t row_size(const Input *in) { return (in->convolution->context + in->time) * in->convolution->channels; }
INLINE float *first_new(const Input *in, int64_t row) {
    return in->steps + row * row_size(in) + in->convolution->context * in->convolution->channels;
}

typedef struct {
    const Input *in;
    const float *x;
} Entry;

enum { PART = 4096 };

static void part_of_entry(int64_t task, void *what) {
    const Entry *e = what;
    int64_t size = e->in->time * e->in->convolution->channels;
    int64_t parts = (size + PART - 1) / PART, row = task / parts, n = task % parts * PART;
    int64_t until = n + PART < size ? n + PART : size;
    const float *from = e->x + row * size;
    float *to = first_new(e->in, row);
    if (!e->in->convolution->activate)
        memcpy(to + n, from + n, (until - n) * sizeof(float));
    else
        for (; n < until; n += LANES) store_some(to + n, elu(some(from + n, until - n)), until - n);
}

/* Puts x [batch, time, channels] where a convolution reads it. */
static void enter(const Input *in, const float *x, int64_t batch, int threads) {
    Entry entry = {in, x};
    int64_t size = in->time * in->convolution->channels, parts = (size + PART - 1) / PART;
    share(batch * parts, batch * size > 1 << 15 ? threads : 1, part_of_entry, &entry);
}

/* Puts what the last frame left before each row's input, zeros behind the end of a row's stream, and keeps what the next
 * frame needs. lengths: in samples, or none; hop: samples a step.
 */
static void settle(const Input *in, const Contexts *contexts, int64_t batch, const int64_t *lengths, int64_t hop) {
    const Convolution *c = in->convolution;
    int64_t size = c->context * c->channels;
    for (int64_t row = 0; row < batch; row++) {
        float *before = in->steps + row * row_size(in), *x = before + size;
        if (lengths) {
            int64_t held = (lengths[row] + hop - 1) / hop;
            if (held < in->time) memset(x + held * c->channels, 0, (in->time - held) * c->channels * sizeof(float));
        }
        int64_t frame = contexts->frames[row], slot = contexts->slots[row] * contexts->depth;
        float *old = contexts->memory + (slot + (frame + contexts->depth - 1) % contexts->depth) * contexts->width;
        float *new = contexts->memory + (slot + frame % contexts->depth) * contexts->width;
        if (frame)
            memcpy(before, old + contexts->offset, size * sizeof(float));
        else if (c->replicates)
            for (int64_t n = 0; n < size; n++) before[n] = x[n % c->channels];
        else
            memset(before, 0, size * sizeof(float));
        memcpy(new + contexts->offset, before + in->time * c->channels, size * sizeof(float));
    }
}

/* Copies every window's steps together: they do not lie so where the kernel is dilated. */
static void unfold(const Input *in, int64_t batch, int64_t windows, float *to) {
    const Convolution *c = in->convolution;
    for (int64_t w = 0; w < batch * windows; w++) {
        const float *from = in->steps + w / windows * row_size(in) + w % windows * c->stride * c->channels;
        for (int64_t k = 0; k < c->kernel; k++, to += c->channels)
            memcpy(to, from + k * c->dilation * c->channels, c->channels * sizeof(float));
    }
}

/* x [batch, time, channels] through `count` convolutions, one at least, as `base.Convolutions` says. lengths: [batch], how
 * many of the row's `samples` there are, or none. Returns 0, or -1 for want of memory.
 */
int64_t native_convolutions(const Convolution *all, int64_t count, const Contexts *given, const float *x, int64_t batch,
                            int64_t time, const int64_t *lengths, int64_t samples, float *out, int threads) {
    int64_t steps = time, largest = 0, plain = 0, unfolded = 0;
    for (const Convolution *c = all; c < all + count; c++) {
        int64_t windows = steps / c->stride, size = (c->context + steps) * c->channels;
        largest = size > largest ? size : largest;
        if (c->dilation > 1 && windows * c->product->inputs > unfolded) unfolded = windows * c->product->inputs;
        if (windows * c->product->outputs > plain) plain = windows * c->product->outputs;
        steps = windows * c->upsample;
    }
    float *memory = malloc(batch * (2 * largest + plain + unfolded) * sizeof(float));
    if (!memory) return -1;
    float *held = memory + 2 * batch * largest, *copied = held + batch * plain;
    Contexts contexts = *given;
    Input in = {all, memory, time};
    int64_t entered = 0, failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Convolution *c = all + i, *next = i + 1 < count ? c + 1 : 0;
        int64_t windows = in.time / c->stride;
        Input following = {next, memory + (in.steps == memory) * batch * largest, windows * c->upsample};
        if (!entered) enter(&in, x, batch, threads);
        settle(&in, &contexts, batch, lengths, samples / in.time);
        contexts.offset += c->context * c->channels;
        Rows rows = {in.steps, batch, windows, row_size(&in), c->stride * c->channels};
        if (c->dilation > 1) {
            unfold(&in, batch, windows, copied);
            rows = (Rows){copied, batch, windows, windows * c->product->inputs, c->product->inputs};
        }
        /* The first of two whose sum is added to their input is given that input as it is, to be kept. */
        entered = next && !(i + 2 < count && next[1].adds);
        After after = {PLAIN, 0, c->adds ? x : 0, entered && next->activate, entered ? next->context * next->channels : 0};
        float *to = entered ? first_new(&following, 0) : next ? held : out;
        failed = native_product(c->product, &rows, &after, to, threads);
        if (!entered) x = to;
        in = following;
    }
    free(memory);
    return failed;
}
