#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "guard.h"

/* ---- the memory table --------------------------------------------------------------------------------------------- */

static const mv_region *find_region(mv_queue *q, uint64_t guest) {
    const mv_memory *m = q->memory;
    if (likely(q->hint < m->count && guest - m->regions[q->hint].guest < m->regions[q->hint].size))
        return &m->regions[q->hint];
    uint32_t low = 0, high = m->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        bool below = m->regions[middle].guest <= guest;
        low = below ? middle + 1 : low;
        high = below ? high : middle;
    }
    if (low == 0 || guest - m->regions[low - 1].guest >= m->regions[low - 1].size)
        return NULL;
    q->hint = low - 1;
    return &m->regions[low - 1];
}

/* Appends the pieces of a range; adjoining regions make one range. */
static int add_range(mv_queue *q, mv_chain *chain, mv_piece *pieces, uint64_t guest, uint64_t length) {
    while (length) {
        const mv_region *r = find_region(q, guest);
        if (unlikely(!r))
            return broken(q, MV_ADDRESS, guest);
        if (unlikely(chain->pieces == MV_PIECES))
            return broken(q, MV_LENGTH, MV_PIECES);
        uint64_t offset = guest - r->guest, part = least(length, r->size - offset);
        pieces[chain->pieces++] = (mv_piece){guest, r->host + offset, part};
        guest += part;
        length -= part;
    }
    return 0;
}

/* ---- chains ------------------------------------------------------------------------------------------------------- */

static int add_desc(mv_queue *q, mv_chain *chain, mv_piece *pieces, uint64_t addr, uint32_t len, uint16_t flags) {
    if (flags & F_WRITE)
        chain->writing = true;
    else if (chain->writing)
        return broken(q, MV_ORDER, addr);
    /* The used length has 32 bits (2.7.8): a longer chain could not be told from a short one. */
    if ((uint64_t)chain->readable + chain->writable + len > UINT32_MAX)
        return broken(q, MV_LENGTH, addr);
    *(chain->writing ? &chain->writable : &chain->readable) += len;
    if (add_range(q, chain, pieces, addr, len) < 0)
        return -1;
    if (!chain->writing)
        chain->readable_pieces = chain->pieces;
    return 0;
}

/* Most buffers: one descriptor, in the region that was hit last. False for all others. */
static inline bool single(const mv_queue *q, mv_chain *chain, mv_piece *piece, uint64_t addr, uint32_t len, uint16_t flags) {
    const mv_region *r = &q->memory->regions[q->hint];
    uint64_t offset = addr - r->guest;
    if (unlikely(flags & (F_NEXT | F_INDIRECT)) || unlikely(offset >= r->size || r->size - offset < len || !len))
        return false;
    bool writing = flags & F_WRITE;
    *piece = (mv_piece){addr, r->host + offset, len};
    *chain = (mv_chain){.pieces = 1, .readable_pieces = !writing, .readable = writing ? 0 : len, .writable = writing ? len : 0};
    return true;
}

/* Where an indirect table is (2.7.5.3, 2.8.7): whole entries, no more than the ring has, in one region. */
static const uint8_t *indirect_table(mv_queue *q, uint64_t addr, uint32_t len, uint32_t *entries) {
    *entries = len / 16;
    const mv_region *r = find_region(q, addr);
    if (!q->indirect || len % 16 || !len || *entries > q->num)
        return broken(q, MV_INDIRECT, len), NULL;
    if (!r || r->size - (addr - r->guest) < len)
        return broken(q, MV_ADDRESS, addr), NULL;
    return r->host + (addr - r->guest);
}

/* The chain whose first descriptor is `d`. */
static int walk_split(mv_queue *q, mv_chain *chain, mv_piece *pieces, uint32_t head, split_desc d) {
    const uint8_t *table = q->desc;
    uint32_t entries = q->num, left = q->num - 1, index = 0;
    bool nested = false;
    *chain = (mv_chain){0};
    for (;;) {
        if (d.flags & F_INDIRECT) {
            if (nested || (d.flags & F_NEXT))
                return broken(q, MV_INDIRECT, d.len);
            if (!(table = indirect_table(q, d.addr, d.len, &entries)))
                return -1;
            nested = true, left = entries, index = 0;
        } else {
            if (add_desc(q, chain, pieces, d.addr, d.len, d.flags) < 0)
                return -1;
            if (!(d.flags & F_NEXT))
                return 0;
            index = d.next;
        }
        if (index >= entries)
            return broken(q, MV_HEAD, index);
        if (left-- == 0)
            return broken(q, MV_LOOP, head);
        snapshot(&d, table + 16 * (size_t)index);
    }
}

static inline int next_split(mv_queue *q, const mv_cursor *c, mv_chain *chain, mv_piece *pieces) {
    if (c->avail == q->seen) {
        uint16_t index = acquire16(q->driver + 2);
        if (c->avail == index)
            return 0;
        if (unlikely((uint16_t)(index - q->used) > q->num))
            return broken(q, MV_INDEX, index);
        q->seen = index;
    }
    uint16_t head = load16(avail_entry(q, c->avail));
    if (unlikely(head >= q->num))
        return broken(q, MV_HEAD, head);
    split_desc d;
    snapshot(&d, q->desc + 16 * (size_t)head);
    if (!single(q, chain, pieces, d.addr, d.len, d.flags) && walk_split(q, chain, pieces, head, d) < 0)
        return -1;
    chain->id = head;
    chain->slots = 1;
    return 1;
}

/* In an indirect table of a packed ring the entries follow each other, and only WRITE counts (2.8.7). */
static int walk_packed_table(mv_queue *q, mv_chain *chain, mv_piece *pieces, const packed_desc *pointer) {
    uint32_t entries;
    const uint8_t *table = indirect_table(q, pointer->addr, pointer->len, &entries);
    for (uint32_t i = 0; table && i < entries; i++) {
        packed_desc d;
        snapshot(&d, table + 16 * (size_t)i);
        if (add_desc(q, chain, pieces, d.addr, d.len, d.flags & F_WRITE) < 0)
            return -1;
    }
    return table ? 0 : -1;
}

/* The chain whose first descriptor is `d`, which becomes its last: that has the id (2.8.6). */
static int walk_packed(mv_queue *q, uint32_t at, mv_chain *chain, mv_piece *pieces, packed_desc *d) {
    uint32_t head = at;
    *chain = (mv_chain){0};
    while (chain->slots++ < q->num) {
        if (d->flags & F_INDIRECT) {
            if (chain->slots > 1 || (d->flags & F_NEXT))
                return broken(q, MV_INDIRECT, d->len);
            return walk_packed_table(q, chain, pieces, d);
        }
        if (add_desc(q, chain, pieces, d->addr, d->len, d->flags) < 0)
            return -1;
        if (!(d->flags & F_NEXT))
            return 0;
        at = at + 1 == q->num ? 0 : at + 1;
        snapshot(d, packed_entry(q, at));
    }
    return broken(q, MV_LOOP, head);
}

static inline int next_packed(mv_queue *q, const mv_cursor *c, mv_chain *chain, mv_piece *pieces) {
    uint8_t *at = packed_entry(q, c->avail);
    uint16_t flags = acquire16(at + 14);
    if (!packed_available(flags, c->wrap))
        return 0;
    packed_desc d;
    snapshot(&d, at);
    d.flags = flags; /* the flags that said "available" are the ones that count; they are not read again */
    if (single(q, chain, pieces, d.addr, d.len, d.flags))
        chain->slots = 1;
    else if (walk_packed(q, c->avail, chain, pieces, &d) < 0)
        return -1;
    if (unlikely(q->inflight + c->taken + chain->slots > q->num))
        return broken(q, MV_INDEX, c->avail);
    chain->id = d.id;
    return 1;
}

/* Looks up buffers from the cursor on. What is wrong with one behind good ones is left for the next call, which meets it first. */
static uint32_t take(mv_queue *q, mv_cursor *c, uint32_t limit, mv_chain *chains, mv_piece *pieces) {
    const mv_piece *last = pieces + MV_TAKE_PIECES - MV_PIECES;
    uint32_t count = 0;
    for (limit = limit < MV_TAKE ? limit : MV_TAKE; count < limit && pieces <= last; pieces += chains++->pieces, count++) {
        int got = q->packed ? next_packed(q, c, chains, pieces) : next_split(q, c, chains, pieces);
        if (unlikely(got < 0 && count))
            broken(q, MV_OK, 0);
        if (got <= 0)
            break;
        step(q, c, chains->slots);
    }
    return count;
}

/* ---- giving buffers back ------------------------------------------------------------------------------------------ */

/* Marks what was written in the dirty log; the data must have been stored before. */
static bool mv_log_range(mv_queue *q, const mv_log *log, uint64_t guest, uint64_t length) {
    if (!length)
        return true;
    for (uint64_t page = guest >> 12; page <= (guest + length - 1) >> 12; page++) {
        if (page >> 3 >= log->size) {
            if (q)
                broken(q, MV_LOG, page << 12);
            return false;
        }
        /* Always written, even if set: the reader may be clearing it. Release: what was stored must be seen first. */
        atomic_fetch_or_explicit((_Atomic uint8_t *)&log->bits[page >> 3], (uint8_t)(1u << (page & 7)), memory_order_release);
    }
    return true;
}

static bool log_used(mv_queue *q, const uint8_t *area, uint64_t guest, const uint8_t *at, uint64_t length) {
    return !q->log || !q->log_ring || mv_log_range(q, q->log, guest + (uint64_t)(at - area), length);
}

static bool publish_split(mv_queue *q, const mv_used *used, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t entry = used[i].id | (uint64_t)used[i].length << 32;
        uint8_t *at = used_entry(q, (uint16_t)(q->used + i));
        /* In rings that go round evenly it is the same every time; a line not written to stays in the driver's cache. */
        if (memcmp(at, &entry, sizeof entry))
            memcpy(at, &entry, sizeof entry);
        if (unlikely(!log_used(q, q->device, q->device_guest, at, sizeof entry)))
            return false;
    }
    q->used = (uint16_t)(q->used + count);
    release16(q->device + 2, q->used);
    return log_used(q, q->device, q->device_guest, q->device, 4);
}

/* The flags of the first entry are written last: until then the driver sees none of them (2.8.21). */
static bool publish_packed(mv_queue *q, const mv_used *used, uint32_t count) {
    uint16_t next = q->used, first_flags = 0;
    uint8_t *first = packed_entry(q, next), wrap = q->used_wrap;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *at = packed_entry(q, next);
        const uint16_t flags = (wrap ? F_AVAIL | F_USED : 0) | (used[i].length ? F_WRITE : 0);
        const uint64_t entry = used[i].length | (uint64_t)(used[i].id & 0xffff) << 32 | (uint64_t)flags << 48;
        memcpy(at + 8, &entry, i ? 8 : 6);
        first_flags = i ? first_flags : flags;
        if (unlikely(!log_used(q, q->desc, q->desc_guest, at, 16)))
            return false;
        move_on(q, &next, &wrap, used[i].slots);
    }
    q->used = next, q->used_wrap = wrap;
    release16(first + 14, first_flags);
    return log_used(q, q->desc, q->desc_guest, first + 14, 2);
}

/* Writes used entries and makes them visible; false if the dirty log cannot hold them. */
static bool mv_publish(mv_queue *q, const mv_used *used, uint32_t count) {
    uint32_t slots = 0, written = 0;
    for (uint32_t i = 0; i < count; i++)
        slots += used[i].slots, written |= used[i].length;
    q->inflight -= slots;
    q->unsignalled += slots;
    /* In order, the last of a batch stands for all, if there is no length to tell (2.8.9). */
    const mv_used batch = {count ? used[count - 1].id : 0, 0, slots};
    bool alone = q->packed && q->in_order && !written && count;
    return !count || (q->packed ? publish_packed(q, alone ? &batch : used, alone ? 1 : count) : publish_split(q, used, count));
}

/* Whether `event` lies among the `count` indexes that end before `now`; modulo 2^16 (2.7.7.2). */
static bool passed(uint16_t event, uint16_t now, uint32_t count) {
    return count > UINT16_MAX || (uint16_t)(now - event - 1) < (uint16_t)count;
}

/* Whether the driver wants a signal for what was published; needs a full fence between the two. */
static bool mv_wants_signal(mv_queue *q) {
    uint32_t count = q->unsignalled, word;
    uint16_t event;
    q->unsignalled = 0;
    if (!count)
        return false;
    if (q->packed) {
        word = atomic_load_explicit((const _Atomic uint32_t *)q->driver, memory_order_relaxed);
        if (!q->event_idx || (word >> 16 & 3) != EVENT_DESC)
            return (word >> 16 & 3) == EVENT_ENABLE;
        event = (uint16_t)((word & 0x7fff) - ((word >> 15 & 1) == q->used_wrap ? 0 : q->num));
    } else if (q->event_idx) {
        event = load16(q->driver + 4 + 2 * (size_t)q->num); /* used_event: 2.7.7 */
    } else {
        return !(load16(q->driver) & NO_INTERRUPT);
    }
    return passed(event, q->used, count);
}

/* ---- kicks -------------------------------------------------------------------------------------------------------- */

static bool pending(mv_queue *q) {
    return q->packed ? packed_available(acquire16(packed_entry(q, q->looked) + 14), q->looked_wrap)
                     : acquire16(q->driver + 2) != q->looked;
}

static bool set_wish(mv_queue *q, bool wanted) {
    uint8_t *at = q->device;
    if (!wanted && !q->packed && q->event_idx)
        return false; /* the event index is left behind */
    if (q->packed) {
        if (wanted && q->event_idx)
            store16(at, q->looked | (uint16_t)(q->looked_wrap << 15));
        release16(at + 2, !wanted ? EVENT_DISABLE : q->event_idx ? EVENT_DESC : EVENT_ENABLE);
    } else if (q->event_idx) {
        store16(at = used_entry(q, 0) + 8 * (size_t)q->num, q->looked); /* avail_event: 2.7.9 */
    } else {
        store16(at, wanted ? 0 : NO_NOTIFY);
    }
    log_used(q, q->device, q->device_guest, at, q->packed ? 4 : 2);
    if (!wanted)
        return false;
    /* The driver publishes, then looks at our wish; we state it, then look for what was published. */
    full_fence();
    return pending(q);
}

/* These two are system calls, and not for use inside the guard. */
static void mv_call(mv_queue *q) {
    static const uint64_t one = 1;
    struct pollfd target = {q->call_fd, POLLOUT, 0};
    q->calls++;
    /* A client that has filled its eventfd has a signal pending anyway. It may still block the write; see DataThread. */
    if (q->call_fd >= 0 && poll(&target, 1, 0) == 1)
        (void)(write(q->call_fd, &one, sizeof one) < 0);
}

static void mv_drain(mv_queue *q) {
    uint64_t count;
    struct iovec into = {&count, sizeof count};
    /* RWF_NOWAIT, since the client decides whether its eventfd blocks. */
    if (q->kick_fd >= 0 && preadv2(q->kick_fd, &into, 1, -1, RWF_NOWAIT) == sizeof count)
        q->kicks++;
}

/* ---- entries from Python ------------------------------------------------------------------------------------------ */

static void enter(mv_queue *q) {
    mv_guard_install();
    guard_watch(q->memory, q->log, NULL, NULL);
}

int mv_take(mv_queue *q, uint32_t limit, mv_chain *chains, mv_piece *pieces) {
    mv_cursor c = cursor_of(q);
    int count = 0;
    enter(q);
    GUARDED(count = (int)take(q, &c, limit, chains, pieces), broken(q, MV_MEMORY, 0));
    return q->fault ? 0 : (commit(q, c.taken), count);
}

int mv_complete(mv_queue *q, const mv_used *used, uint32_t count) {
    int signal = 0;
    enter(q);
    GUARDED(signal = mv_publish(q, used, count) && (full_fence(), mv_wants_signal(q)), broken(q, MV_MEMORY, 0));
    return signal && !q->fault;
}

int mv_notify(mv_queue *q, int wanted) {
    int more = 0;
    enter(q);
    GUARDED(more = set_wish(q, wanted), broken(q, MV_MEMORY, 0));
    return more && !q->fault;
}
