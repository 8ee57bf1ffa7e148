/* Work for PyTorch's own threads.
 *
 * `GOMP_parallel` is what gcc calls for `#pragma omp parallel`. PyTorch's OpenMP library has it, be it gcc's or LLVM's, so
 * that one call serves all compilers; clang's own would ask for LLVM's library, which PyTorch does not bring on Linux.
 */
#include <stdint.h>

extern void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);

typedef void Work(int64_t task, void *what);

enum { MOST_THREADS = 64 };

/* What is left of a thread's own share, in a cache line of its own: the first task in the lower half, their end above. */
typedef struct {
    _Alignas(64) uint64_t left;
} Share;

typedef struct {
    Share *shares;
    int threads;
    Work *work;
    void *what;
} Tasks;

/* Takes the first of what is left, or the last; -1 where nothing is. */
INLINE int64_t take_one(Share *share, int last) {
    uint64_t left = __atomic_load_n(&share->left, __ATOMIC_RELAXED), first, end;
    do {
        first = (uint32_t)left, end = left >> 32;
        if (first == end) return -1;
    } while (!__atomic_compare_exchange_n(&share->left, &left, last ? first | (end - 1) << 32 : (first + 1) | end << 32, 1,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return last ? end - 1 : first;
}

static void take_turns(void *given) {
    Tasks *all = given;
    int own = omp_get_thread_num();
    for (int other = 0; other < all->threads; other++)
        for (int64_t task; (task = take_one(all->shares + (own + other) % all->threads, other)) >= 0;)
            all->work(task, all->what);
}

/* Does all tasks, each once, and returns when they are done. A thread does its own share, task after task, since these
 * lie so in memory, and then what is left of the others', from behind.
 */
static void share(int64_t tasks, int threads, Work *work, void *what) {
    threads = threads < tasks ? threads : tasks;
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    Share shares[MOST_THREADS];
    if (threads < 2) {
        for (int64_t task = 0; task < tasks; task++) work(task, what);
        return;
    }
    for (int64_t n = 0; n < threads; n++) shares[n].left = tasks * n / threads | (uint64_t)(tasks * (n + 1) / threads) << 32;
    Tasks all = {shares, threads, work, what};
    GOMP_parallel(take_turns, &all, threads, 0);
}
