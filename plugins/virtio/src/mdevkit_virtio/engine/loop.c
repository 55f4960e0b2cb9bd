/* One data thread: moves frames while there are any, polls for a while when there are none, then sleeps on kicks. */
#include <poll.h>
#include <time.h>

#include "guard.h"

enum { MOST_MOVERS = 256, UNKICKED_NS = 1000000 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline bool stopped(const mv_loop *loop) { return atomic_load((const _Atomic uint32_t *)&loop->stop); }

/* The queue whose driver has to act before this mover can go on. */
static mv_queue *awaited(const mv_mover *m) { return m->wait == MV_FULL ? m->rx : m->tx; }

/* No kicks while polling. */
static void refuse_kicks(mv_loop *loop) {
    for (uint32_t i = 0; i < loop->count; i++) {
        mv_queue *queues[] = {loop->movers[i]->tx, loop->movers[i]->rx};
        for (int j = 0; j < 2 && !loop->movers[i]->halted; j++)
            if (queues[j])
                mv_notify(queues[j], 0);
    }
}

static void sleep_on_kicks(mv_loop *loop) {
    struct timespec nap = {0, UNKICKED_NS}, *timeout = NULL;
    struct pollfd fds[MOST_MOVERS + 1] = {{loop->stop_fd, POLLIN, 0}};
    bool idle = true;
    for (uint32_t i = 0; i < loop->count; i++) {
        mv_queue *q = awaited(loop->movers[i]);
        fds[i + 1] = (struct pollfd){loop->movers[i]->halted ? -1 : q->kick_fd, POLLIN, 0};
        if (loop->movers[i]->halted)
            continue;
        /* Every driver is asked, also after one has answered; a ring that breaks is work as well. */
        idle &= !mv_notify(q, 1) && !q->fault;
        /* One that gave no kick descriptor has to be polled. */
        timeout = q->kick_fd < 0 ? &nap : timeout;
    }
    if (idle && !stopped(loop)) {
        loop->sleeps++;
        ppoll(fds, loop->count + 1, timeout, NULL);
    }
    for (uint32_t i = 0; i < loop->count; i++)
        if (fds[i + 1].revents)
            mv_drain(awaited(loop->movers[i]));
    refuse_kicks(loop);
}

/* One burst of every mover. */
static uint32_t move_all(mv_loop *loop, bool *halted) {
    uint32_t moved = 0;
    for (uint32_t i = 0; i < loop->count; i++) {
        mv_mover *m = loop->movers[i];
        if (m->halted)
            continue;
        moved += (uint32_t)move(m, loop->burst);
        m->halted = m->wait == MV_BROKEN;
        *halted |= m->halted;
    }
    return moved;
}

int mv_run(mv_loop *loop) {
    uint64_t idle_since = 0;
    mv_guard_install();
    refuse_kicks(loop);
    for (;;) {
        bool halted = false;
        uint32_t moved = move_all(loop, &halted);
        if (unlikely(stopped(loop) || halted))
            return !stopped(loop);
        uint64_t now = moved ? 0 : now_ns();
        if (moved || !idle_since)
            idle_since = now;
        else if (now - idle_since < loop->spin_ns)
            relax();
        else
            sleep_on_kicks(loop), idle_since = 0;
    }
}
