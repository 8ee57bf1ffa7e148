/* Call libopus for many streams, one after the other, in one call from Python. libopus' own functions are passed in, so
   nothing is linked with it, and none of its headers is needed. */

#include <stdint.h>

typedef int32_t (*encode)(void *encoder, const int16_t *pcm, int samples, unsigned char *packet, int32_t most_bytes);
typedef int (*decode)(void *decoder, const unsigned char *packet, int32_t bytes, int16_t *pcm, int most_samples,
                      int error_correction);

/* pcm: of all streams, one behind the other. packets: `most_bytes` for each. bytes: what each packet has, or libopus'
   error. */
void opus_calls_encode(encode function, int64_t count, void *const *encoders, const int16_t *pcm,
                       const int64_t *samples, unsigned char *packets, int64_t most_bytes, int64_t *bytes)
{
    for (int64_t i = 0; i < count; i++) {
        bytes[i] = function(encoders[i], pcm, (int)samples[i], packets + i * most_bytes, (int32_t)most_bytes);
        pcm += samples[i];
    }
}

/* packets, pcm: one behind the other. samples: how many each packet should have. found: how many it has, or libopus'
   error. */
void opus_calls_decode(decode function, int64_t count, void *const *decoders, const unsigned char *packets,
                       const int64_t *bytes, int16_t *pcm, const int64_t *samples, int64_t *found)
{
    for (int64_t i = 0; i < count; i++) {
        found[i] = function(decoders[i], packets, (int32_t)bytes[i], pcm, (int)samples[i], 0);
        packets += bytes[i];
        pcm += samples[i];
    }
}
