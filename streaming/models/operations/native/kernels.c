/* The codec's and the decoder's operations on a CPU, for few rows at a time.
 *
 * `library.py` compiles this file, and `operations.py` and `matrix.py` call what is not static.
 */
#include "vectors.h"
#include "threads.h"
#include "integers.h"
#include "products.h"
#include "norms.h"
#include "attention.h"
#include "layers.h"
#include "convolutions.h"
#include "codec.h"
#include "draw.h"
