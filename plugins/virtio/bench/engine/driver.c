/* The driver's side of the benchmark: what a forwarding application does with a loopback.
 *
 * Every frame that comes is sent again from the same buffer, in bursts of 32, as DPDK's testpmd does in io mode: the
 * content is not looked at. Buffers are laid out as DPDK's are (128 bytes of headroom, the virtio header right before the
 * data). No checks: it is the benchmark's own memory.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { BURST = 32, HEADROOM = 128, HEADER = 12, ROOM = 2048, NEXT = 1, WRITE = 2, AVAIL = 1 << 7, USED = 1 << 15 };

typedef struct { uint64_t addr; uint32_t len; uint16_t a, b; } desc_t; /* a, b: flags, next or id, flags */

typedef struct {
    uint8_t *desc, *driver, *device;
    uint32_t num, packed, free;
    uint16_t avail, used;               /* split: free-running; packed: positions */
    uint8_t avail_wrap, used_wrap;
    uint32_t buffers[32768];            /* by slot: the buffer that is there */
} ring_t;

typedef struct {
    ring_t tx, rx;
    uint8_t *memory;                    /* guest address 0 */
    uint64_t pool_at;                   /* guest address of buffer 0 */
    uint32_t stride, frame, count;
    uint32_t stack[65536];              /* free buffers */
    _Atomic uint64_t frames;
    _Atomic uint32_t stop;
    uint64_t bad;
} bench_t;

static inline uint64_t data_at(const bench_t *b, uint32_t buffer) { return b->pool_at + (uint64_t)buffer * b->stride + HEADROOM; }

static inline void put(ring_t *r, uint64_t addr, uint32_t len, int write, uint32_t buffer) {
    uint32_t slot = r->packed ? r->avail : r->avail & (r->num - 1);
    desc_t *d = (desc_t *)r->desc + slot;
    r->buffers[slot] = buffer;
    d->addr = addr;
    d->len = len;
    if (r->packed) {
        d->a = (uint16_t)slot;
        uint16_t flags = (uint16_t)((r->avail_wrap ? AVAIL : USED) | (write ? WRITE : 0));
        atomic_store_explicit((_Atomic uint16_t *)&d->b, flags, memory_order_release);
        if (++r->avail == r->num)
            r->avail = 0, r->avail_wrap ^= 1;
    } else {
        d->a = write ? WRITE : 0;
        ((uint16_t *)r->driver)[2 + slot] = (uint16_t)slot;
        r->avail++;
    }
    r->free--;
}

static inline void publish(ring_t *r) {
    if (!r->packed)
        atomic_store_explicit((_Atomic uint16_t *)(r->driver + 2), r->avail, memory_order_release);
}

/* Returns the buffer of the next used entry, or -1; `limit` is the used index read before for a split ring. */
static inline int64_t get(ring_t *r, uint16_t limit) {
    uint32_t id;
    if (r->packed) {
        desc_t *d = (desc_t *)r->desc + r->used;
        uint16_t flags = atomic_load_explicit((_Atomic uint16_t *)&d->b, memory_order_acquire);
        if (!!(flags & AVAIL) != r->used_wrap || !!(flags & USED) != r->used_wrap)
            return -1;
        id = d->a;
        if (++r->used == r->num)
            r->used = 0, r->used_wrap ^= 1;
    } else {
        if (r->used == limit)
            return -1;
        id = ((uint32_t *)(r->device + 4))[2 * (r->used & (r->num - 1))];
        r->used++;
    }
    r->free++;
    return r->buffers[id];
}

static inline uint16_t used_index(ring_t *r) { return atomic_load_explicit((_Atomic uint16_t *)(r->device + 2), memory_order_acquire); }

static void refill(bench_t *b) {
    uint32_t added = 0;
    while (b->rx.free && b->count && added < BURST) {
        uint32_t buffer = b->stack[--b->count];
        put(&b->rx, data_at(b, buffer) - HEADER, ROOM + HEADER, 1, buffer);
        added++;
    }
    if (added)
        publish(&b->rx);
}

static void reclaim(bench_t *b) {
    uint16_t limit = b->tx.packed ? 0 : used_index(&b->tx);
    int64_t buffer;
    for (int i = 0; i < BURST && (buffer = get(&b->tx, limit)) >= 0; i++)
        b->stack[b->count++] = (uint32_t)buffer;
}

static void forward(bench_t *b) {
    uint16_t limit = b->rx.packed ? 0 : used_index(&b->rx);
    uint32_t buffers[BURST], got = 0, sent = 0;
    int64_t buffer;
    while (got < BURST && b->tx.free > got && (buffer = get(&b->rx, limit)) >= 0)
        buffers[got++] = (uint32_t)buffer;
    for (; sent < got; sent++) {
        /* The header has to be looked at (num_buffers), and cleared only if it is not. */
        uint8_t *header = b->memory + data_at(b, buffers[sent]) - HEADER;
        b->bad += header[10] != 1;
        put(&b->tx, data_at(b, buffers[sent]) - HEADER, b->frame + HEADER, 0, buffers[sent]);
    }
    if (got) {
        publish(&b->tx);
        atomic_fetch_add_explicit(&b->frames, got, memory_order_relaxed);
    }
}

/* Puts `inflight` frames on the way. */
void bench_begin(bench_t *b, uint32_t inflight) {
    while (b->rx.free)
        refill(b);
    for (uint32_t i = 0; i < inflight && b->tx.free && b->count; i++) {
        uint32_t buffer = b->stack[--b->count];
        memset(b->memory + data_at(b, buffer) - HEADER, 0, HEADER);
        put(&b->tx, data_at(b, buffer) - HEADER, b->frame + HEADER, 0, buffer);
    }
    publish(&b->tx);
}

void bench_run(bench_t *b) {
    while (!atomic_load_explicit(&b->stop, memory_order_relaxed)) {
        forward(b);
        reclaim(b);
        refill(b);
    }
}

/* Frames per second of nothing but the copies, over the same buffers, on one processor. */
double bench_floor(uint8_t *memory, uint64_t pool_at, uint32_t stride, uint32_t frame, uint32_t buffers, double seconds) {
    struct timespec t0, t1;
    uint64_t done = 0;
    double elapsed;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    do {
        for (uint32_t i = 0; i < 4096; i++, done++) {
            uint32_t from = (uint32_t)(done % (buffers / 2)), to = from + buffers / 2;
            memcpy(memory + pool_at + (uint64_t)to * stride + HEADROOM - HEADER, memory + pool_at + (uint64_t)from * stride + HEADROOM - HEADER,
                   frame + HEADER);
            __asm__ volatile("" ::: "memory");
        }
        clock_gettime(CLOCK_MONOTONIC, &t1);
        elapsed = (double)(t1.tv_sec - t0.tv_sec) + (double)(t1.tv_nsec - t0.tv_nsec) * 1e-9;
    } while (elapsed < seconds);
    return (double)done / elapsed;
}
