/* A decoder's layers in one call: between two products nothing waits for Python. */

typedef struct {
    const float *norm1, *norm2;
    const Matrix *qkv, *out, *gate_up, *down;
} Layer;

/* x [batch, time, hidden] through all layers, as `base.Layers` says; `ring` is the first layer's, `layer_stride` elements
 * before the next one's. total: the residual stream; pending: what is yet to be added to it; both as x. There is a layer
 * at least. Returns 0, or -1 for want of memory.
 */
int64_t native_layers(const Layer *layers, int64_t count, float eps, const Ring *ring, int64_t layer_stride,
                      const View *view, const float *x, int64_t batch, int64_t time, int64_t heads, int64_t groups,
                      int64_t dim, float *total, float *pending, int threads) {
    int64_t rows = batch * time, hidden = layers->qkv->inputs, width = layers->qkv->outputs;
    int64_t inner = layers->down->inputs, attended_width = layers->out->inputs, size = ring->kind == FLOAT32 ? 4 : 2;
    float *normed = malloc(rows * (hidden + width + attended_width + inner) * sizeof(float));
    if (!normed) return -1;
    float *qkv = normed + rows * hidden, *attended = qkv + rows * width, *gated = attended + rows * attended_width;
    const After plain = {PLAIN, 0, 0}, gate = {GATED, 0, 0};
    const Rows of_normed = {normed, 1, rows, 0, hidden}, of_attended = {attended, 1, rows, 0, attended_width};
    const Rows of_gated = {gated, 1, rows, 0, inner};
    memcpy(total, x, rows * hidden * sizeof(float));
    int64_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Layer *layer = layers + i;
        Ring own = *ring;
        own.keys = (char *)ring->keys + i * layer_stride * size;
        own.values = (char *)ring->values + i * layer_stride * size;
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
