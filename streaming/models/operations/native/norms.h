/* Norms, and what a convolution reads. */

/* total = x + pending (where there is any), normed = weight * total / rms(total): LlamaRMSNorm. */
void native_rms_norm(const float *x, const float *pending, const float *weight, float eps, int64_t rows, int64_t size,
                     float *sum, float *normed) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        if (pending) {
            for (int64_t n = 0; n < size; n++) sum[row * size + n] = from[n] + pending[row * size + n];
            from = sum + row * size;
        }
        vf squares = (vf){};
        for (int64_t n = 0; n < size; n += LANES) {
            vf v = load(from + n);
            squares = fused(v, v, squares);
        }
        float factor = 1.0f / sqrtf(total(squares) / size + eps);
        for (int64_t n = 0; n < size; n++) normed[row * size + n] = weight[n] * (from[n] * factor);
    }
}

void native_layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t rows, int64_t size,
                       float *normed) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        vf sum = (vf){}, squares = (vf){};
        for (int64_t n = 0; n < size; n += LANES) sum += load(from + n);
        float mean = total(sum) / size;
        for (int64_t n = 0; n < size; n += LANES) {
            vf centred = load(from + n) - mean;
            squares = fused(centred, centred, squares);
        }
        float factor = 1.0f / sqrtf(total(squares) / size + eps);
        for (int64_t n = 0; n < size; n++) normed[row * size + n] = (from[n] - mean) * factor * weight[n] + bias[n];
    }
}

typedef struct {
    const float *context, *x;
    int64_t stride, old, new;
    int activate;
    float *out;
} Extension;

enum { PART = 4096 };

static void part_of_extension(int64_t task, void *what) {
    const Extension *e = what;
    int64_t parts = (e->new + PART - 1) / PART, row = task / parts, n = task % parts * PART;
    int64_t until = n + PART < e->new ? n + PART : e->new;
    const float *in = e->x + row * e->new;
    float *to = e->out + row * (e->old + e->new) + e->old;
    if (n == 0) memcpy(to - e->old, e->context + row * e->stride, e->old * sizeof(float));
    if (!e->activate) {
        memcpy(to + n, in + n, (until - n) * sizeof(float));
        return;
    }
    for (; n + LANES <= until; n += LANES) {
        vf v = load(in + n);
        store(to + n, most(v, exponential(least(v, (vf){})) - 1.0f));
    }
    for (; n < until; n++) {
        vf v = spread(in[n]);
        to[n] = most(v, exponential(least(v, (vf){})) - 1.0f)[0];
    }
}

/* out [batch, old + new]: `old` elements of context, `stride` apart those of two rows, then `new` of x, by their ELU (x
 * where positive, e^x - 1 elsewhere) if `activate`.
 */
void native_extend(const float *context, int64_t stride, int64_t old, const float *x, int64_t new, int64_t batch,
                   int activate, float *out, int threads) {
    Extension extension = {context, x, stride, old, new, activate, out};
    share(batch * ((new + PART - 1) / PART), batch * new > 1 << 15 ? threads : 1, part_of_extension, &extension);
}
