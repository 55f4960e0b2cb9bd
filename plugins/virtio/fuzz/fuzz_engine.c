/* Fuzzes the C engine: random rings, valid and hostile, over memory between guard pages, under AddressSanitizer.
 *
 *     fuzz_engine SECONDS [SEED]
 *
 * A byte touched outside the memory table is a fault on a guard page or a report of the sanitizer, and ends the run. Half
 * of the time a second thread rewrites the rings while they are used; now and then the memory is truncated under them.
 * Prints what was reached, so that the caller can tell whether the run was worth anything.
 */
#include "engine.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { REGIONS = 3, SPACE = 0x8000, PAGE = 4096, NUM = 16, RING_SPACE = 0x800 };

static mv_region regions[REGIONS];
static mv_memory memory = {regions, REGIONS};
static int files[REGIONS];
static mv_log dirty;
static mv_queue queues[2];
static mv_mover mover;
static _Atomic int hostile, busy, finished;
static uint64_t seed = 1, faults[MV_BUFFER + 1], moved, taken, survived;

static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static _Thread_local uint64_t *source = &seed;
static uint32_t below(uint32_t n) { return (uint32_t)(next_random(source) % n); }

static void fail(const char *what) {
    perror(what);
    exit(2);
}

/* A file of the client's between guard pages; its last byte is the last before the second one. */
static uint8_t *between_guards(int file, uint64_t size) {
    uint8_t *space = mmap(NULL, SPACE + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (space == MAP_FAILED || mmap(space + PAGE, SPACE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)
        fail("mmap");
    return space + PAGE + SPACE - size;
}

static int make_file(const char *name, uint64_t size) {
    int file = memfd_create(name, 0);
    if (file < 0 || ftruncate(file, (off_t)size))
        fail(name);
    return file;
}

static void make_memory(void) {
    static const uint64_t guests[] = {0x10000, 0x10000 + 0x7ff0, 0x40000};
    static const uint64_t sizes[] = {0x7ff0, 0x6000, 0x5ff0};
    for (int i = 0; i < REGIONS; i++) {
        files[i] = make_file("guest", SPACE);
        regions[i] = (mv_region){guests[i], sizes[i], between_guards(files[i], sizes[i])};
    }
    dirty = (mv_log){between_guards(make_file("log", SPACE), 8), 8};
}

/* Addresses that are mostly good, and otherwise where mistakes are made: at edges, outside, near the end of everything. */
static uint64_t some_address(void) {
    const mv_region *r = &regions[below(REGIONS)];
    switch (below(12)) {
    case 0: return r->guest + r->size - below(40);
    case 1: return r->guest - below(40);
    case 2: return next_random(source);
    case 3: return UINT64_MAX - below(64);
    case 4: return regions[0].guest + 16 * below(RING_SPACE / 8);
    default: return r->guest + below((uint32_t)r->size);
    }
}

static uint32_t some_length(void) {
    static const uint32_t lengths[] = {0, 1, 11, 12, 13, 16, 32, 48, 64, 256, 272, 1500, 4096, 0x7ff0, 0x7fffffff, UINT32_MAX};
    return below(3) ? 1 + below(700) : lengths[below(sizeof lengths / sizeof *lengths)];
}

static uint16_t some_flags(void) { return (uint16_t)(below(3) ? below(4) : below(8)); }

static uint8_t *ring_of(uint32_t which) { return regions[0].host + which * RING_SPACE; }

/* Writes one descriptor; in a packed ring it is offered for this lap or the other. */
static void poke_desc(uint8_t *desc, bool packed, bool wrap) {
    split_desc d = {some_address(), some_length(), some_flags(), (uint16_t)below(NUM + 2)};
    if (packed) {
        uint16_t flags = d.flags | (uint16_t)(below(8) ? (wrap ? F_AVAIL : F_USED) : next_random(source));
        d.flags = d.next;
        d.next = flags;
    }
    memcpy(desc, &d, sizeof d);
}

static void poke_table(void) { poke_desc(regions[0].host + 2 * RING_SPACE + 16 * below(64), false, false); }

static void poke_ring(uint32_t which, bool packed, bool wrap, uint16_t avail) {
    uint8_t *ring = ring_of(which);
    poke_desc(ring + 16 * below(NUM), packed, wrap);
    uint16_t head = (uint16_t)below(NUM + (below(9) == 0)), index = (uint16_t)(below(9) ? avail + below(NUM) : below(65536));
    memcpy(ring + 0x200 + 4 + 2 * below(NUM), &head, 2);
    memcpy(ring + 0x200 + 2, &index, 2);
    if (below(4) == 0)
        ring[0x200 + below(4)] = (uint8_t)below(256);
}

static void *rewrite(void *unused) {
    static uint64_t own = 99;
    source = &own;
    while (!finished) {
        busy = 1;
        bool working = hostile;
        if (working)
            poke_ring(below(2), below(2), below(2), queues[0].avail), poke_table();
        busy = 0;
        if (!working)
            usleep(1000); /* its turn comes again after 1,000 rounds */
    }
    return unused;
}

static void start_queue(uint32_t which, bool packed, uint32_t num) {
    mv_queue *q = &queues[which];
    uint8_t *ring = ring_of(which);
    if (q->fault)
        faults[q->fault]++;
    *q = (mv_queue){.memory = &memory, .desc = ring, .driver = ring + 0x200, .device = ring + 0x300, .num = num, .packed = packed};
    /* Areas may overlap, as long as they are aligned. */
    if (below(4) == 0)
        q->driver = ring + 16 * below(8), q->device = ring + 16 * below(8);
    q->desc_guest = regions[0].guest + (uint64_t)(q->desc - regions[0].host);
    q->device_guest = regions[0].guest + (uint64_t)(q->device - regions[0].host);
    q->log = below(2) ? &dirty : NULL;
    q->event_idx = below(2), q->indirect = below(4) > 0, q->log_ring = below(2), q->in_order = below(2);
    q->avail_wrap = q->used_wrap = 1;
    q->kick_fd = q->call_fd = -1;
}

static void take_and_complete(mv_queue *q) {
    static mv_chain chains[64];
    static mv_piece pieces[4 * MV_PIECES];
    static uint8_t data[1 << 16];
    mv_used used[64];
    int count = mv_take(q, below(65), chains, pieces);
    const mv_piece *at = pieces;
    for (int i = 0; i < count; at += chains[i++].pieces) {
        uint32_t readable = chains[i].readable, writable = chains[i].writable, n = chains[i].readable_pieces;
        uint32_t offset = readable ? below(readable) : 0, size = readable - offset < sizeof data ? readable - offset : sizeof data;
        if (readable)
            mv_copy(&memory, NULL, at, offset, data, size, 0);
        if (writable)
            mv_copy(&memory, q->log, at + n, 0, data, writable < sizeof data ? writable : sizeof data, 1);
        used[i] = (mv_used){chains[i].id, below(5) ? writable : below(UINT32_MAX), chains[i].slots};
    }
    taken += (uint64_t)count;
    if (count > 0 && below(8))
        mv_complete(q, used, below((uint32_t)count) + 1);
}

/* As a driver would: something that mostly works, so that frames move at all. */
static void offer_frames(uint32_t which, uint32_t num, bool packed) {
    mv_queue *q = &queues[which];
    uint8_t *ring = ring_of(which);
    for (uint32_t i = 0; i < num; i++) {
        uint32_t slot = packed ? (q->avail + i) % num : i;
        bool wrap = q->avail_wrap != (q->avail + i >= num);
        split_desc d = {regions[1].guest + below(0x5000), 13 + below(200), which ? F_WRITE : 0, 0};
        if (packed)
            d.next = d.flags | (wrap ? F_AVAIL : F_USED), d.flags = (uint16_t)slot;
        memcpy(ring + 16 * slot, &d, sizeof d);
        memcpy(ring + 0x200 + 4 + 2 * i, &(uint16_t){(uint16_t)i}, 2);
    }
    uint16_t index = (uint16_t)(q->used + below(num + 1));
    if (!packed)
        memcpy(ring + 0x200 + 2, &index, 2);
}

static void run_one(void) {
    bool packed = below(2);
    uint32_t num = packed ? 1 + below(NUM) : 1u << below(5);
    for (uint32_t i = 0; i < 2; i++)
        start_queue(i, packed, num);
    mover = (mv_mover){.tx = &queues[0], .rx = below(8) ? &queues[1] : NULL, .tx_header = 10 + 2 * below(2), .rx_header = 10 + 2 * below(2)};
    mover.mergeable = below(2), mover.drop = below(2) || !mover.rx, mover.keep_header = below(2);
    for (uint32_t step = below(30); step; step--) {
        uint32_t which = below(2);
        switch (below(7)) {
        case 0: poke_ring(which, packed, queues[which].avail_wrap, queues[which].avail); break;
        case 1: poke_table(); break;
        case 2: take_and_complete(&queues[which]); break;
        case 3: mv_notify(&queues[which], below(2)); break;
        case 4: offer_frames(0, num, packed), offer_frames(1, num, packed); break;
        default: moved += (uint64_t)mv_move(&mover, below(70));
        }
    }
}

/* The client truncates its memory: everything must come back broken, nothing must die. The other thread has no guard and
 * must not be writing at that time. */
static void run_truncated(void) {
    while (busy)
        ;
    int file = files[below(REGIONS)];
    if (ftruncate(file, (off_t)(PAGE * below(SPACE / PAGE))))
        fail("ftruncate");
    for (uint32_t i = 0; i < 2; i++)
        start_queue(i, below(2), NUM);
    mover = (mv_mover){.tx = &queues[0], .rx = &queues[1], .tx_header = 12, .rx_header = 12, .mergeable = 1};
    mv_notify(&queues[0], 1), mv_notify(&queues[1], 0);
    take_and_complete(&queues[below(2)]);
    mv_move(&mover, 64);
    survived += queues[0].fault == MV_MEMORY || queues[1].fault == MV_MEMORY;
    if (ftruncate(file, SPACE))
        fail("ftruncate");
}

int main(int count, char **arguments) {
    uint64_t seconds = count > 1 ? strtoull(arguments[1], NULL, 10) : 10, rounds = 0;
    seed = count > 2 ? strtoull(arguments[2], NULL, 10) : (uint64_t)now_ns();
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    make_memory();
    pthread_t thread;
    if (pthread_create(&thread, NULL, rewrite, NULL))
        fail("pthread_create");
    /* So many at least, however busy the machine is: every check has been reached by then. */
    for (uint64_t end = now_ns() + seconds * 1000000000u; now_ns() < end || rounds < 200000; rounds++) {
        hostile = rounds % 2000 >= 1000;
        if (!hostile && rounds % 50 == 0)
            run_truncated();
        else
            run_one();
    }
    finished = 1;
    pthread_join(thread, NULL);
    printf("rounds %llu\nmoved %llu\ntaken %llu\ntruncated %llu\n", (unsigned long long)rounds, (unsigned long long)moved,
           (unsigned long long)taken, (unsigned long long)survived);
    for (int i = 1; i <= MV_BUFFER; i++)
        printf("fault %d %llu\n", i, (unsigned long long)faults[i]);
    return 0;
}
