/* A model's layers in one call: between two products nothing waits for Python. */

/* One of a decoder's. */
typedef struct {
    const float *norm1, *norm2;
    const Matrix *qkv, *out, *gate_up, *down;
} Layer;

/* One of the codec's. norm1, norm2, their biases, scale1, scale2: [hidden]. */
typedef struct {
    const float *norm1, *bias1, *norm2, *bias2, *scale1, *scale2;
    const Matrix *qkv, *out, *up, *down;
} CodecLayer;

/* A pass of x [batch, time, hidden] through all layers of a transformer. `ring` is the first layer's, `layer_stride`
 * elements before the next one's.
 */
typedef struct {
    const float *x;
    const Ring *ring;
    const View *view;
    int64_t layer_stride, batch, time, heads, groups, dim;
    float eps;
    int threads;
} Pass;

/* What a layer makes on its way, in `normed` and behind it, and how products read it. */
typedef struct {
    float *normed, *qkv, *attended, *inner;
    Rows of_normed, of_attended, of_inner;
} Space;

/* Leaves `normed` null for want of memory. */
static Space space_for(int64_t rows, const Matrix *qkv, const Matrix *out, const Matrix *down) {
    int64_t hidden = qkv->inputs, attended = out->inputs, inner = down->inputs;
    Space s = {malloc(rows * (hidden + qkv->outputs + attended + inner) * sizeof(float))};
    if (!s.normed) return s;
    s.qkv = s.normed + rows * hidden, s.attended = s.qkv + rows * qkv->outputs, s.inner = s.attended + rows * attended;
    s.of_normed = (Rows){s.normed, 1, rows, 0, hidden}, s.of_attended = (Rows){s.attended, 1, rows, 0, attended};
    s.of_inner = (Rows){s.inner, 1, rows, 0, inner};
    return s;
}

/* Attention of a layer, from what is normed to what is attended. Returns 0, or -1 for want of memory. */
static int64_t attend_in_layer(const Pass *p, int64_t number, const Matrix *qkv, const Space *s) {
    const After plain = {PLAIN};
    Ring ring = *p->ring;
    int64_t bytes = number * p->layer_stride * (ring.kind == FLOAT32 ? 4 : 2);
    ring.keys = (char *)ring.keys + bytes, ring.values = (char *)ring.values + bytes;
    int64_t failed = native_product(qkv, &s->of_normed, &plain, s->qkv, p->threads);
    return failed | native_attend(&ring, p->view, s->qkv, p->batch, p->time, p->heads, p->groups, p->dim, s->attended,
                                  p->threads);
}

/* A decoder's layers, one at least, as `base.Layers` says. total: the residual stream; pending: what is yet to be added to
 * it; both as x. Returns 0, or -1 for want of memory.
 */
int64_t native_layers(const Layer *layers, int64_t count, const Pass *p, float *total, float *pending) {
    const int64_t rows = p->batch * p->time, hidden = layers->qkv->inputs;
    const Space s = space_for(rows, layers->qkv, layers->out, layers->down);
    if (!s.normed) return -1;
    const After plain = {PLAIN}, gate = {GATED};
    memcpy(total, p->x, rows * hidden * sizeof(float));
    int64_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Layer *layer = layers + i;
        native_rms_norm(total, i ? pending : 0, layer->norm1, p->eps, rows, hidden, total, s.normed);
        failed |= attend_in_layer(p, i, layer->qkv, &s);
        failed |= native_product(layer->out, &s.of_attended, &plain, pending, p->threads);
        native_rms_norm(total, pending, layer->norm2, p->eps, rows, hidden, total, s.normed);
        failed |= native_product(layer->gate_up, &s.of_normed, &gate, s.inner, p->threads);
        failed |= native_product(layer->down, &s.of_inner, &plain, pending, p->threads);
    }
    free(s.normed);
    return failed;
}

/* The codec's, one at least. out: as x, what all layers make of it. */
int64_t native_codec_layers(const CodecLayer *layers, int64_t count, const Pass *p, float *out) {
    const int64_t rows = p->batch * p->time, hidden = layers->qkv->inputs;
    const Space s = space_for(rows, layers->qkv, layers->out, layers->down);
    if (!s.normed) return -1;
    const After curved = {GELU};
    memcpy(out, p->x, rows * hidden * sizeof(float));
    int64_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const CodecLayer *layer = layers + i;
        const After add1 = {PLAIN, layer->scale1, out}, add2 = {PLAIN, layer->scale2, out};
        native_layer_norm(out, layer->norm1, layer->bias1, p->eps, rows, hidden, s.normed);
        failed |= attend_in_layer(p, i, layer->qkv, &s);
        failed |= native_product(layer->out, &s.of_attended, &add1, out, p->threads);
        native_layer_norm(out, layer->norm2, layer->bias2, p->eps, rows, hidden, s.normed);
        failed |= native_product(layer->up, &s.of_normed, &curved, s.inner, p->threads);
        failed |= native_product(layer->down, &s.of_inner, &add2, out, p->threads);
    }
    free(s.normed);
    return failed;
}
