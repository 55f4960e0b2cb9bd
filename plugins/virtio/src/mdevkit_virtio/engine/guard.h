/* The SIGBUS guard.
 *
 * Guest memory is a file of the client's. When the client truncates it, the next access of ours raises SIGBUS, and
 * nothing but a handler can survive that. The handler is process-wide and chains; it jumps only for a thread that is
 * inside GUARDED, and only when the address is guest memory that this very call works on.
 */
#pragma once

#include <setjmp.h>

#include "ring.h"

typedef struct {
    sigjmp_buf jump;
    volatile int armed, chaining;
    volatile uintptr_t address;          /* the access that failed */
    struct { const mv_memory *memory; const mv_log *log; } watched[2];
} mv_guard;

static _Thread_local mv_guard guard;

static inline void guard_watch(const mv_memory *m0, const mv_log *l0, const mv_memory *m1, const mv_log *l1) {
    guard.watched[0].memory = m0, guard.watched[0].log = l0;
    guard.watched[1].memory = m1, guard.watched[1].log = l1;
    guard.chaining = 0;
}

static inline void guard_set(int armed) {
    atomic_signal_fence(memory_order_seq_cst);
    guard.armed = armed;
    atomic_signal_fence(memory_order_seq_cst);
}

/* Evaluates `work`, or `failed` if it touched memory that is gone. The signal mask is not saved: SA_NODEFER makes that
 * unnecessary, and saving costs a system call. Locals changed in `work` are lost; state is kept in the structures. */
#define GUARDED(work, failed)                          \
    do {                                               \
        if (likely(!sigsetjmp(guard.jump, 0)))         \
            guard_set(1), (work);                      \
        else                                           \
            failed;                                    \
        guard_set(0);                                  \
    } while (0)
