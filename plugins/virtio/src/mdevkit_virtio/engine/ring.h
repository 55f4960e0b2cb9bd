/* Reading and writing virtqueues, device side: what ring.c and net.c share.
 *
 * The driver is hostile: it may change anything in guest memory at any time. So every field is read exactly once, into a
 * local, and judged there; every loop is bounded by the size of the ring; every address goes through the table with its
 * length. Functions here run inside the guard (guard.h): they hold no lock and call nothing that does.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* What processors have that the language does not know: a pause while polling, and registers of a whole cache line. */
#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#define WHOLE_LINES __builtin_cpu_supports("avx512f")
#define USES_WHOLE_LINES __attribute__((target("avx512f")))
#else
#define relax() atomic_signal_fence(memory_order_seq_cst)
#define WHOLE_LINES 0
#define USES_WHOLE_LINES
#endif

/* virtio 1.2, 2.7.5 and 2.8.1: descriptor flags; 2.7.7, 2.7.9 and 2.8.10: event suppression. */
enum { F_NEXT = 1, F_WRITE = 2, F_INDIRECT = 4, F_AVAIL = 1 << 7, F_USED = 1 << 15 };
enum { NO_INTERRUPT = 1, NO_NOTIFY = 1, EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 };

typedef struct { uint64_t addr; uint32_t len; uint16_t flags, next; } split_desc;
typedef struct { uint64_t addr; uint32_t len; uint16_t id, flags; } packed_desc;

/* Where a burst stands, before it is committed to the queue. */
typedef struct { uint32_t taken; uint16_t avail; uint8_t wrap; } mv_cursor;

static inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint16_t load16(const void *at) { return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_relaxed); }
static inline uint16_t acquire16(const void *at) { return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_acquire); }
static inline void store16(void *at, uint16_t v) { atomic_store_explicit((_Atomic uint16_t *)at, v, memory_order_relaxed); }
static inline void release16(void *at, uint16_t v) { atomic_store_explicit((_Atomic uint16_t *)at, v, memory_order_release); }
static inline void full_fence(void) { atomic_thread_fence(memory_order_seq_cst); }

/* One read of 16 bytes that may lie at any address (indirect tables do): volatile keeps the compiler from a second one. */
static inline void snapshot(void *to, const void *from) {
    typedef uint64_t __attribute__((aligned(1), may_alias)) word;
    const volatile word *source = from;
    uint64_t words[2] = {source[0], source[1]};
    memcpy(to, words, sizeof words);
}

static inline int broken(mv_queue *q, uint32_t fault, uint64_t value) { return q->fault = fault, q->fault_value = value, -1; }

static inline uint8_t *avail_entry(const mv_queue *q, uint16_t at) { return q->driver + 4 + 2 * (size_t)(at & (q->num - 1)); }
static inline uint8_t *used_entry(const mv_queue *q, uint16_t at) { return q->device + 4 + 8 * (size_t)(at & (q->num - 1)); }
static inline uint8_t *packed_entry(const mv_queue *q, uint32_t at) { return q->desc + 16 * (size_t)at; }

static inline mv_cursor cursor_of(const mv_queue *q) { return (mv_cursor){0, q->avail, q->avail_wrap}; }

/* Moves a position on; in a packed ring it laps, and then the wrap counter changes. */
static inline void move_on(const mv_queue *q, uint16_t *at, uint8_t *wrap, uint32_t slots) {
    uint32_t after = *at + slots, lap = q->packed && after >= q->num;
    *at = (uint16_t)(lap ? after - q->num : after);
    *wrap ^= (uint8_t)lap;
}

static inline void step(const mv_queue *q, mv_cursor *c, uint32_t slots) {
    c->taken += slots;
    move_on(q, &c->avail, &c->wrap, slots);
}

static inline void commit(mv_queue *q, uint32_t slots) {
    q->inflight += slots;
    move_on(q, &q->avail, &q->avail_wrap, slots);
    q->looked = q->avail, q->looked_wrap = q->avail_wrap;
}

/* The bits of a packed descriptor's flags say whose it is: 2.8.1. */
static inline bool packed_available(uint16_t flags, bool wrap) { return !!(flags & F_AVAIL) == wrap && !!(flags & F_USED) != wrap; }
