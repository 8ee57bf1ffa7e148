/* The codec's way in and its way out, each in one call: a frame of several streams, from samples to latents and from
 * codes to samples. And its quantizer, from latents to codes.
 */

enum { STEPS = 2 }; /* of a transformer, in a frame */

/* What the way in, or out, is made of, as `base.py` says. rounded: before this position angles are as float32 has them;
 * frequency: [dim / 2]. downsample: on the way in; taps [2 * STEPS, hidden] and latents [books, entries, hidden]: out.
 */
typedef struct {
    const Convolution *convolutions, *downsample;
    const CodecLayer *layers;
    const float *frequency, *taps, *latents;
    const double *frequency64;
    int64_t convolution_count, layer_count, heads, groups, dim, window, rounded, books, entries;
    float eps;
} Half;

/* All that it remembers: `HalfState`. */
typedef struct {
    int64_t *frames;
    float *contexts;
    int64_t depth, width;
    Ring ring; /* the first layer's */
    int64_t layer_stride;
} HalfState;

/* active: [batch]; slots: [batch], or none: row n is slot n. */
typedef struct {
    int64_t batch;
    const int64_t *slots;
    const uint8_t *active;
    int threads;
} Streams;

/* slots, frames: [batch]; position, start: [batch, STEPS]; cos, sin: [batch, STEPS, dim]; x, y: [batch, STEPS, hidden].
 * The first one is the memory of all.
 */
typedef struct {
    int64_t *slots, *frames, *position, *start;
    float *cos, *sin, *x, *y;
} Steps;

/* Leaves `slots` null for want of memory. */
static Steps steps_of(const Half *half, const HalfState *state, const Streams *streams) {
    const int64_t batch = streams->batch, steps = batch * STEPS, hidden = half->layers->qkv->inputs, dim = half->dim;
    Steps s = {malloc(2 * (batch + steps) * sizeof(int64_t) + 2 * steps * (dim + hidden) * sizeof(float))};
    if (!s.slots) return s;
    s.frames = s.slots + batch, s.position = s.frames + batch, s.start = s.position + steps;
    s.cos = (float *)(s.start + steps), s.sin = s.cos + steps * dim, s.x = s.sin + steps * dim, s.y = s.x + steps * hidden;
    for (int64_t row = 0; row < batch; row++) {
        s.slots[row] = streams->slots ? streams->slots[row] : row;
        s.frames[row] = state->frames[s.slots[row]];
    }
    for (int64_t n = 0; n < steps; n++) {
        const int64_t position = s.position[n] = s.frames[n / STEPS] * STEPS + n % STEPS;
        s.start[n] = position < half->window ? 0 : position - (half->window - 1);
        for (int64_t i = 0; i < dim / 2; i++) {
            double angle = position < half->rounded ? position * half->frequency[i] : position * half->frequency64[i];
            s.cos[n * dim + i] = s.cos[n * dim + dim / 2 + i] = cos(angle);
            s.sin[n * dim + i] = s.sin[n * dim + dim / 2 + i] = sin(angle);
        }
    }
    return s;
}

static Contexts contexts_of(const HalfState *state, const Steps *s, int64_t offset) {
    return (Contexts){state->contexts, s->slots, s->frames, state->depth, state->width, offset};
}

/* y = all layers of x. */
static int64_t through_layers(const Half *half, const HalfState *state, const Streams *streams, const Steps *s) {
    const int64_t dim = half->dim;
    const View view = {s->slots, s->position, s->start, s->cos, s->sin, STEPS, STEPS, 1, STEPS * dim};
    const Pass pass = {s->x, &state->ring, &view, state->layer_stride, streams->batch, STEPS, half->heads, half->groups,
                       dim, half->eps, streams->threads};
    return native_codec_layers(half->layers, half->layer_count, &pass, s->y);
}

static void advance(const HalfState *state, const Streams *streams, const Steps *s) {
    for (int64_t row = 0; row < streams->batch; row++) state->frames[s->slots[row]] += streams->active[row];
}

/* latent [batch, hidden] of pcm [batch, samples]. lengths: [batch], how many samples of a row there are, or none. Returns
 * 0, or -1 for want of memory.
 */
int64_t native_encode(const Half *half, const HalfState *state, const Streams *streams, const float *pcm, int64_t samples,
                      const int64_t *lengths, float *latent) {
    const int64_t hidden = half->layers->qkv->inputs, batch = streams->batch;
    const Steps s = steps_of(half, state, streams);
    if (!s.slots) return -1;
    Contexts contexts = contexts_of(state, &s, 0);
    int64_t failed = native_convolutions(half->convolutions, half->convolution_count, &contexts, pcm, batch, samples,
                                         lengths, samples, s.x, streams->threads);
    if (!failed) failed = through_layers(half, state, streams, &s);
    for (int64_t row = 0; lengths && row < batch; row++) /* here the padding is replicated: a last step is read twice */
        if (lengths[row] <= samples / STEPS)
            memcpy(s.y + (row * STEPS + 1) * hidden, s.y + row * STEPS * hidden, hidden * sizeof(float));
    for (int64_t i = 0; i < half->convolution_count; i++)
        contexts.offset += half->convolutions[i].context * half->convolutions[i].channels;
    if (!failed)
        failed = native_convolutions(half->downsample, 1, &contexts, s.y, batch, STEPS, 0, samples, latent,
                                     streams->threads);
    if (!failed) advance(state, streams, &s);
    free(s.slots);
    return failed;
}

/* x [STEPS, hidden]: what a row's codes stand for, behind what the frame before left. Returns whether all codes are. */
static int64_t latents_to_steps(const Half *half, const HalfState *state, const Steps *s, int64_t row,
                                const int64_t *codes) {
    const int64_t hidden = half->layers->qkv->inputs, frame = s->frames[row], slot = s->slots[row] * state->depth;
    const float *old = state->contexts + (slot + (frame + state->depth - 1) % state->depth) * state->width;
    float *new = state->contexts + (slot + frame % state->depth) * state->width, *x = s->x + row * STEPS * hidden;
    memset(new, 0, hidden * sizeof(float));
    for (int64_t book = 0; book < half->books; book++) {
        if (codes[book] < 0 || codes[book] >= half->entries) return 0;
        const float *entry = half->latents + (book * half->entries + codes[book]) * hidden;
        for (int64_t n = 0; n < hidden; n++) new[n] += entry[n];
    }
    for (int64_t step = 0; step < STEPS; step++) {
        const float *tap = half->taps + step * hidden, *before = tap + STEPS * hidden;
        for (int64_t n = 0; n < hidden; n++)
            x[step * hidden + n] = new[n] * tap[n] + (frame ? old[n] : 0.0f) * before[n];
    }
    return 1;
}

/* pcm [batch, samples] of codes [batch, books]. Returns 0, -1 for want of memory, 1 for a code that there is not. */
int64_t native_decode(const Half *half, const HalfState *state, const Streams *streams, const int64_t *codes,
                      int64_t samples, float *pcm) {
    const int64_t hidden = half->layers->qkv->inputs, batch = streams->batch;
    const Steps s = steps_of(half, state, streams);
    if (!s.slots) return -1;
    int64_t failed = 0;
    for (int64_t row = 0; row < batch && !failed; row++)
        failed = !latents_to_steps(half, state, &s, row, codes + row * half->books);
    if (!failed) failed = through_layers(half, state, streams, &s);
    const Contexts contexts = contexts_of(state, &s, hidden);
    if (!failed)
        failed = native_convolutions(half->convolutions, half->convolution_count, &contexts, s.y, batch, STEPS, 0, samples,
                                     pcm, streams->threads);
    if (!failed) advance(state, streams, &s);
    free(s.slots);
    return failed;
}

/* Of two parts, each with its projection (both or none of them have one): codebooks [books, entries, width], the first
 * `semantic` of them the first part's, and the nearness of each one's entries.
 */
typedef struct {
    const Matrix *projections[2], *const *nearness;
    const float *codebooks;
    int64_t books, semantic, entries, width;
} Quantizer;

/* The first of the largest; what is not a number counts as the largest, as it does to PyTorch. */
static int64_t place_of_largest(const float *x, int64_t count) {
    int64_t at = 0;
    for (int64_t n = 1; n < count && x[at] == x[at]; n++)
        if (!(x[n] <= x[at])) at = n;
    return at;
}

/* codes [batch, books] of latent [batch, hidden]. Returns 0, or -1 for want of memory. */
int64_t native_quantise(const Quantizer *q, const float *latent, int64_t batch, int64_t *codes, int threads) {
    const After plain = {PLAIN};
    float *residual = malloc(batch * (q->width + q->entries) * sizeof(float)), *scores = residual + batch * q->width;
    if (!residual) return -1;
    int64_t failed = 0;
    for (int64_t book = 0; book < q->books && !failed; book++) {
        const Matrix *projection = q->projections[book == q->semantic];
        if (book && book != q->semantic)
            for (int64_t n = 0; n < batch * q->width; n++) {
                int64_t code = codes[n / q->width * q->books + book - 1];
                residual[n] -= q->codebooks[((book - 1) * q->entries + code) * q->width + n % q->width];
            }
        else if (projection) {
            const Rows latents = {latent, 1, batch, 0, projection->inputs};
            failed = native_product(projection, &latents, &plain, residual, threads);
        } else
            memcpy(residual, latent, batch * q->width * sizeof(float));
        const Rows residuals = {residual, 1, batch, 0, q->width};
        if (!failed) failed = native_product(q->nearness[book], &residuals, &plain, scores, threads);
        for (int64_t row = 0; row < batch; row++)
            codes[row * q->books + book] = place_of_largest(scores + row * q->entries, q->entries);
    }
    free(residual);
    return failed;
}
