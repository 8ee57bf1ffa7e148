/* The native operations behind a pipe, for processors that have to be emulated: see `remote.py`. */
#include "kernels.c"

#include <stdio.h>

typedef union {
    int64_t whole;
    double real;
    char *block;
} Value;

static struct {
    char *at;
    uint64_t size;
} given[64];
static int blocks;

static void get(void *to, uint64_t size) {
    if (fread(to, 1, size, stdin) != size) exit(0);
}

/* A number, or a block of memory with the blocks that it points to. */
static Value value(void) {
    Value v = {0};
    switch (getchar()) {
        case 'i': get(&v.whole, 8); break;
        case 'f': get(&v.real, 8); break;
        case 'b': {
            uint64_t size, pointers, offset;
            get(&size, 8);
            v.block = malloc(size + 64);
            memset(v.block + size, 0x7F, 64); /* not a number of any size */
            get(v.block, size);
            given[blocks].at = v.block, given[blocks++].size = size;
            for (get(&pointers, 8); pointers > 0; pointers--) {
                get(&offset, 8);
                Value target = value();
                memcpy(v.block + offset, &target.block, 8);
            }
        }
    }
    return v;
}

int main(void) {
    for (int function; (function = getchar()) != EOF;) {
        uint64_t count;
        Value v[12];
        int64_t result = 0;
        blocks = 0;
        get(&count, 8);
        for (uint64_t i = 0; i < count; i++) v[i] = value();
        switch (function) {
            case 'l': result = native_lanes(); break;
            case 'b': result = native_block(); break;
            case 'w': result = native_width(v[0].whole); break;
            case 'i': puts(native_instructions()); fflush(stdout); continue;
            case 'p':
                result = native_product((void *)v[0].block, (void *)v[1].block, (void *)v[2].block, (void *)v[3].block,
                                        v[4].whole);
                break;
            case 'r':
                native_rms_norm((void *)v[0].block, (void *)v[1].block, (void *)v[2].block, v[3].real, v[4].whole,
                                v[5].whole, (void *)v[6].block, (void *)v[7].block);
                break;
            case 'n':
                native_layer_norm((void *)v[0].block, (void *)v[1].block, (void *)v[2].block, v[3].real, v[4].whole,
                                  v[5].whole, (void *)v[6].block);
                break;
            case 'v':
                result = native_convolutions((void *)v[0].block, v[1].whole, (void *)v[2].block, (void *)v[3].block,
                                             v[4].whole, v[5].whole, (void *)v[6].block, v[7].whole,
                                             (void *)v[8].block, v[9].whole);
                break;
            case 'd':
                native_draw((void *)v[0].block, (void *)v[1].block, v[2].whole, v[3].whole, v[4].whole, v[5].whole,
                            (void *)v[6].block);
                break;
            case 'a':
                result = native_attend((void *)v[0].block, (void *)v[1].block, (void *)v[2].block, v[3].whole,
                                       v[4].whole, v[5].whole, v[6].whole, v[7].whole, (void *)v[8].block, v[9].whole);
        }
        fwrite(&result, 8, 1, stdout);
        for (int i = 0; i < blocks; i++) {
            fwrite(given[i].at, 1, given[i].size, stdout);
            free(given[i].at);
        }
        fflush(stdout);
    }
    return 0;
}
