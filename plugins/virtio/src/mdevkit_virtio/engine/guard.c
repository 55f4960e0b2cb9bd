#include "guard.h"

#include <pthread.h>
#include <signal.h>

/* Taken again at every start, since others (faulthandler) may have taken the signal since; never inside the guard. */
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;

static bool mv_touches(const mv_memory *memory, const mv_log *log, uintptr_t address) {
    for (uint32_t i = 0; memory && i < memory->count; i++)
        if (address - (uintptr_t)memory->regions[i].host < memory->regions[i].size)
            return true;
    return log && address - (uintptr_t)log->bits < log->size;
}

static bool is_guest_memory(uintptr_t at) {
    return mv_touches(guard.watched[0].memory, guard.watched[0].log, at) || mv_touches(guard.watched[1].memory, guard.watched[1].log, at);
}

/* Not ours: the handler before us decides. It may be faulthandler's, which was installed after ours and calls us back:
 * the second entry ends that with the default action, when it has printed its traceback. */
static void chain(int number, siginfo_t *info, void *context) {
    bool callable = previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;
    if (guard.chaining || !callable) {
        signal(number, SIG_DFL);
        if (guard.chaining)
            raise(number);
        return;
    }
    guard.chaining = 1;
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else
        previous.sa_handler(number);
    guard.chaining = 0;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    uintptr_t address = (uintptr_t)info->si_addr;
    /* BUS_ADRERR: beyond the end of the file. Memory errors of the machine are for others to handle. */
    if (guard.armed && info->si_code == BUS_ADRERR && is_guest_memory(address)) {
        guard.address = address;
        siglongjmp(guard.jump, 1);
    }
    chain(number, info, context);
}

static void mv_guard_install(void) {
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &now) == 0 && now.sa_sigaction == on_sigbus)
        return;
    pthread_mutex_lock(&install_lock);
    if (sigaction(SIGBUS, &ours, &now) == 0 && now.sa_sigaction != on_sigbus)
        previous = now;
    pthread_mutex_unlock(&install_lock);
}
