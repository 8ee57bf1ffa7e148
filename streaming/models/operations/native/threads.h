/* Work for PyTorch's own threads.
 *
 * `GOMP_parallel` is what gcc calls for `#pragma omp parallel`. PyTorch's OpenMP library has it, be it gcc's or LLVM's, so
 * that one call serves all compilers; clang's own would ask for LLVM's library, which PyTorch does not bring on Linux.
 */
#include <stdint.h>

extern void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

typedef void Work(int64_t task, void *what);

enum { RANGES = 16 }; /* at most; of more threads, some share one */

typedef struct {
    struct {
        _Alignas(64) int64_t next;
        int64_t until;
    } ranges[RANGES];
    int64_t count, joined;
    Work *work;
    void *what;
} Tasks;

/* A range first, then what is left of the others. */
static void take_turns(void *given) {
    Tasks *all = given;
    int64_t mine = __atomic_fetch_add(&all->joined, 1, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < all->count; i++) {
        int64_t range = (mine + i) % all->count, until = all->ranges[range].until;
        for (int64_t task; (task = __atomic_fetch_add(&all->ranges[range].next, 1, __ATOMIC_RELAXED)) < until;)
            all->work(task, all->what);
    }
}

/* Does all tasks, each once, and returns when they are done. Every thread has tasks that follow one another, so that it
 * reads on where it was (docs/decisions.md), and helps with the others' when it has done its own.
 */
static void share(int64_t tasks, int threads, Work *work, void *what) {
    Tasks all = {.count = 1, .work = work, .what = what};
    if (threads > tasks) threads = tasks;
    if (threads > 1) all.count = threads < RANGES ? threads : RANGES;
    for (int64_t i = 0; i < all.count; i++)
        all.ranges[i].next = tasks * i / all.count, all.ranges[i].until = tasks * (i + 1) / all.count;
    if (threads > 1)
        GOMP_parallel(take_turns, &all, threads, 0);
    else
        take_turns(&all);
}
