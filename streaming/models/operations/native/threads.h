/* Work for PyTorch's own threads.
 *
 * `GOMP_parallel` is what gcc calls for `#pragma omp parallel`. PyTorch's OpenMP library has it, be it gcc's or LLVM's, so
 * that one call serves all compilers; clang's own would ask for LLVM's library, which PyTorch does not bring on Linux.
 */
#include <stdint.h>

extern void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

typedef void Work(int64_t task, void *what);

typedef struct {
    int64_t next, tasks;
    Work *work;
    void *what;
} Tasks;

static void take_turns(void *given) {
    Tasks *all = given;
    for (int64_t task; (task = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->tasks;)
        all->work(task, all->what);
}

/* Does all tasks, each once, and returns when they are done. A thread takes the next when it has done one. */
static void share(int64_t tasks, int threads, Work *work, void *what) {
    Tasks all = {0, tasks, work, what};
    if (threads > 1 && tasks > 1)
        GOMP_parallel(take_turns, &all, threads < tasks ? threads : tasks, 0);
    else
        take_turns(&all);
}
