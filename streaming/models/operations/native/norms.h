/* Norms. */

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
