/* A model's layers in one call: between two products nothing waits for Python. */

/* One of a decoder's. */
typedef struct {
    const float *norm1, *norm2;
    const Matrix *qkv, *out, *gate_up, *down;
} Layer;

INLINE Ring of_layer(const Ring *first, int64_t number, int64_t layer_stride) {
    Ring ring = *first;
    int64_t bytes = number * layer_stride * (ring.kind == FLOAT32 ? 4 : 2);
    ring.keys = (char *)ring.keys + bytes, ring.values = (char *)ring.values + bytes;
    return ring;
}

/* x [batch, time, hidden] through all layers, as `base.Layers` says; `ring` is the first layer's, `layer_stride` elements
 * before the next one's. total: the residual stream; pending: what is yet to be added to it; both as x. There is a layer
 * at least. Returns 0, or -1 for want of memory.
 */
int64_t native_layers(const Layer *layers, int64_t count, float eps, const Ring *ring, int64_t layer_stride,
                      const View *view, const float *x, int64_t batch, int64_t time, int64_t heads, int64_t groups,
                      int64_t dim, float *total, float *pending, int threads) {
    int64_t rows = batch * time, hidden = layers->qkv->inputs, width = layers->qkv->outputs;
    int64_t inner = layers->down->inputs, attended_width = layers->out->inputs;
    float *normed = malloc(rows * (hidden + width + attended_width + inner) * sizeof(float));
    if (!normed) return -1;
    float *qkv = normed + rows * hidden, *attended = qkv + rows * width, *gated = attended + rows * attended_width;
    const After plain = {PLAIN}, gate = {GATED};
    const Rows of_normed = {normed, 1, rows, 0, hidden}, of_attended = {attended, 1, rows, 0, attended_width};
    const Rows of_gated = {gated, 1, rows, 0, inner};
    memcpy(total, x, rows * hidden * sizeof(float));
    int64_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Layer *layer = layers + i;
        const Ring own = of_layer(ring, i, layer_stride);
        native_rms_norm(total, i ? pending : 0, layer->norm1, eps, rows, hidden, total, normed);
        failed |= native_product(layer->qkv, &of_normed, &plain, qkv, threads);
        failed |= native_attend(&own, view, qkv, batch, time, heads, groups, dim, attended, threads);
        failed |= native_product(layer->out, &of_attended, &plain, pending, threads);
        native_rms_norm(total, pending, layer->norm2, eps, rows, hidden, total, normed);
        failed |= native_product(layer->gate_up, &of_normed, &gate, gated, threads);
        failed |= native_product(layer->down, &of_gated, &plain, pending, threads);
    }
    free(normed);
    return failed;
}

/* One of the codec's. norm1, norm2, their biases, scale1, scale2: [hidden]. */
typedef struct {
    const float *norm1, *bias1, *norm2, *bias2, *scale1, *scale2;
    const Matrix *qkv, *out, *up, *down;
} CodecLayer;

/* The same of the codec: out: as x, what all layers make of it. */
int64_t native_codec_layers(const CodecLayer *layers, int64_t count, float eps, const Ring *ring, int64_t layer_stride,
                            const View *view, const float *x, int64_t batch, int64_t time, int64_t heads, int64_t groups,
                            int64_t dim, float *out, int threads) {
    int64_t rows = batch * time, hidden = layers->qkv->inputs, width = layers->qkv->outputs;
    int64_t inner = layers->down->inputs, attended_width = layers->out->inputs;
    float *normed = malloc(rows * (hidden + width + attended_width + inner) * sizeof(float));
    if (!normed) return -1;
    float *qkv = normed + rows * hidden, *attended = qkv + rows * width, *up = attended + rows * attended_width;
    const After plain = {PLAIN}, curved = {GELU};
    const Rows of_normed = {normed, 1, rows, 0, hidden}, of_attended = {attended, 1, rows, 0, attended_width};
    const Rows of_up = {up, 1, rows, 0, inner};
    memcpy(out, x, rows * hidden * sizeof(float));
    int64_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const CodecLayer *layer = layers + i;
        const Ring own = of_layer(ring, i, layer_stride);
        const After add1 = {PLAIN, layer->scale1, out}, add2 = {PLAIN, layer->scale2, out};
        native_layer_norm(out, layer->norm1, layer->bias1, eps, rows, hidden, normed);
        failed |= native_product(layer->qkv, &of_normed, &plain, qkv, threads);
        failed |= native_attend(&own, view, qkv, batch, time, heads, groups, dim, attended, threads);
        failed |= native_product(layer->out, &of_attended, &add1, out, threads);
        native_layer_norm(out, layer->norm2, layer->bias2, eps, rows, hidden, normed);
        failed |= native_product(layer->up, &of_normed, &curved, up, threads);
        failed |= native_product(layer->down, &of_up, &add2, out, threads);
    }
    free(normed);
    return failed;
}
