/* Frames from a transmit queue to a receive queue, in bursts, with one copy (virtio 1.2, 5.1.6).
 *
 * A burst writes into receive buffers first, commits last, and commits the receive side before the transmit side. So
 * whatever ends it (no room, a broken ring, memory that is gone), a frame is delivered once or not at all, and the side
 * that did nothing wrong is in order.
 */
#include "guard.h"

enum { NUM_BUFFERS_AT = 10, LARGE = 512 };
typedef uint8_t block __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint64_t line __attribute__((vector_size(64), aligned(1), may_alias));

/* A position in the pieces of a buffer; `offset` may lie beyond the first of them. */
typedef struct { const mv_piece *piece; uint64_t offset; } place;

static inline void normalize(place *p) {
    for (; p->offset >= p->piece->length; p->piece++)
        p->offset -= p->piece->length;
}

/* Large frames go line by line, the first one first: a driver has that in its cache, and while it is taken from there, stores of
 * whole lines are few enough to wait their turn. memmove writes it last. The end is fetched early, as it is on another page. */
USES_WHOLE_LINES static void copy_lines(uint8_t *to, const uint8_t *from, uint64_t n) {
    const line head = *(const line *)from, tail = *(const line *)(from + n - 64);
    __builtin_prefetch(from + n - 192), __builtin_prefetch(from + n - 128);
    *(line *)to = head;
    for (uint64_t i = 64 - ((uintptr_t)to & 63); i < n - 64; i += 64)
        *(line *)(to + i) = *(const line *)(from + i);
    *(line *)(to + n - 64) = tail;
}

/* As memmove, inline for the smallest frames, which are most of the work: two blocks that overlap instead of a call. Both are read
 * before either is written, for a hostile driver may let the two ranges overlap; then large ones are memmove's. */
static inline void copy_bytes(uint8_t *to, const uint8_t *from, uint64_t n) {
    if (n >= LARGE && WHOLE_LINES && least((uint64_t)(to - from), (uint64_t)(from - to)) >= n)
        return copy_lines(to, from, n);
    if (n < sizeof(block) || n > 2 * sizeof(block))
        return (void)memmove(to, from, n);
    const block head = *(const block *)from, tail = *(const block *)(from + n - sizeof(block));
    *(block *)to = head;
    *(block *)(to + n - sizeof(block)) = tail;
}

/* Both places have room for `n`. */
static inline void copy_frame(place *to, place *from, uint64_t n) {
    while (n) {
        normalize(to);
        normalize(from);
        uint64_t part = least(n, least(to->piece->length - to->offset, from->piece->length - from->offset));
        copy_bytes(to->piece->host + to->offset, from->piece->host + from->offset, part);
        to->offset += part;
        from->offset += part;
        n -= part;
    }
}

/* From memory of ours, as a buffer of one piece. */
static inline void put_bytes(place *to, const void *data, uint64_t n) {
    mv_piece piece = {0, (uint8_t *)data, n};
    copy_frame(to, &(place){&piece, 0}, n);
}

/* Drivers leave the header of a buffer as it was: not writing what is there already spares both sides a cache miss. */
static inline void write_header(place *to, const uint8_t *header, uint32_t size) {
    uint8_t *at = to->piece->host;
    if (likely(to->piece->length >= size && !(size == 12 ? memcmp(at, header, 12) : memcmp(at, header, 10))))
        to->offset += size;
    else
        put_bytes(to, header, size);
}

static bool log_pieces(mv_queue *q, const mv_log *log, place at, uint64_t length) {
    for (uint64_t part; length; at.offset += part, length -= part) {
        normalize(&at);
        part = least(length, at.piece->length - at.offset);
        if (!mv_log_range(q, log, at.piece->guest + at.offset, part))
            return false;
    }
    return true;
}

/* Between a buffer and memory of ours; what is written is marked in the log. */
static int copy(const mv_log *log, place at, uint8_t *data, uint64_t size, bool writing) {
    place theirs = at, ours = {&(mv_piece){0, data, size}, 0};
    copy_frame(writing ? &theirs : &ours, writing ? &ours : &theirs, size);
    return writing && log && !log_pieces(NULL, log, at, size) ? MV_LOG : MV_OK;
}

/* What becomes of a frame, besides the reasons a burst ends for: MV_MORE if it is moved. */
enum { TOO_LARGE = 100, FETCH_FROM = 192, FETCH_TO = 384, CLAIM = 256 };

/* A burst: how many slots it uses up, how far receive buffers are looked up, the pieces of the next one, how many frames
 * there are still, and how long the next is. */
typedef struct { mv_cursor scan, ended; uint32_t tx_slots, rx_slots, frames, ahead; const mv_piece *pieces; } bursting;

/* Fetches the next frame, or where it goes, while this one is copied. Behind the last there is an old address or none, which harms
 * nobody; so it is a number and no pointer. */
static inline void prefetch(uintptr_t at, uint32_t length, bool writing) {
    for (const uintptr_t end = at + length; at < end; at += 64)
        writing ? __builtin_prefetch((void *)at, 1) : __builtin_prefetch((void *)at);
}

/* Drivers fetch the beginning of a frame that comes, so the line has to be taken from them before the next can be written there.
 * A store does that, which changes nothing; many in a row do it at once. A prefetch would be content with a shared line. The copy
 * of a large frame has other lines to go on with meanwhile, and is faster without. */
static void claim_buffers(const mv_mover *m) {
    const mv_piece *piece = m->rx_pieces;
    for (const mv_chain *chain = m->rx_chains; chain < m->rx_chains + m->staged; piece += chain++->pieces)
        if (!chain->readable_pieces && chain->writable && piece->length > m->rx_header)
            *(volatile uint8_t *)&piece->host[m->rx_header] = piece->host[m->rx_header];
}

/* The next receive buffer, for `length` bytes, which it stays until it is used; many are looked up together. */
static inline const mv_chain *next_buffer(mv_mover *m, bursting *b, uint32_t length) {
    if (m->next == m->staged) {
        m->staged = take(m->rx, &b->scan, b->frames, m->rx_chains, m->rx_pieces);
        m->next = 0;
        b->pieces = m->rx_pieces;
        if (length <= CLAIM)
            claim_buffers(m);
        if (!m->staged)
            return NULL;
    }
    const mv_chain *chain = &m->rx_chains[m->next];
    const uintptr_t behind = (uintptr_t)b->pieces[chain->pieces].host;
    /* The header is read: mostly it is as it should be already, and then the driver keeps its copy of that line. */
    __builtin_prefetch((void *)behind);
    prefetch(behind + m->rx_header, least(b->ahead, FETCH_TO), true);
    return chain;
}

static inline void use_buffer(mv_mover *m, bursting *b, const mv_chain *chain) {
    m->next++, b->pieces += chain->pieces, b->rx_slots += chain->slots;
}

/* Writes `length` bytes from `from`, behind a header, into receive buffers; their used entries go to the end of rx_used. */
static uint32_t deliver_scattered(mv_mover *m, bursting *b, place from, uint32_t length, const uint8_t *header) {
    mv_queue *rx = m->rx;
    uint32_t most = rx->num < MV_MERGE ? rx->num : MV_MERGE, buffers = 0, left = length;
    mv_used *used = m->rx_used + m->rx_count;
    do {
        if (unlikely(buffers == most))
            return TOO_LARGE;
        const mv_chain *chain = next_buffer(m, b, left);
        if (unlikely(!chain))
            return rx->fault ? MV_BROKEN : MV_FULL;
        place start = {b->pieces + chain->readable_pieces, 0}, to = start;
        uint32_t before = buffers ? 0 : m->rx_header, room = chain->writable - before, part = room < left ? room : left;
        if (unlikely(chain->writable < before))
            return broken(rx, MV_BUFFER, chain->writable), MV_BROKEN;
        if (unlikely(!m->mergeable && room < left))
            return TOO_LARGE;
        if (!buffers)
            memcpy(m->header_pieces, start.piece, sizeof m->header_pieces), write_header(&to, header, before);
        copy_frame(&to, &from, part);
        if (unlikely(rx->log) && !log_pieces(rx, rx->log, start, before + part))
            return MV_BROKEN;
        used[buffers++] = (mv_used){chain->id, before + part, chain->slots};
        use_buffer(m, b, chain);
        left -= part;
    } while (left);
    m->rx_count += buffers;
    /* The number of buffers is known when all are filled. Its page is in the log already, but that may have been read meanwhile. */
    if (unlikely(buffers > 1 && m->rx_header > NUM_BUFFERS_AT))
        copy(rx->log, (place){m->header_pieces, NUM_BUFFERS_AT}, (uint8_t *)&(uint16_t){(uint16_t)buffers}, 2, true);
    return MV_MORE;
}

/* The same for a transmit buffer. Mostly it is one piece that goes into one, and that takes few steps. */
static inline uint32_t deliver(mv_mover *m, bursting *b, const mv_chain *from, const mv_piece *at, uint32_t length,
                               const uint8_t *header) {
    const mv_chain *chain = next_buffer(m, b, length);
    if (unlikely(!chain))
        return m->rx->fault ? MV_BROKEN : MV_FULL;
    const uint64_t written = (uint64_t)m->rx_header + length;
    if (unlikely(from->pieces != 1 || chain->pieces != 1 || chain->writable < written || m->rx->log))
        return deliver_scattered(m, b, (place){at, m->tx_header}, length, header);
    place to = {b->pieces, 0};
    write_header(&to, header, m->rx_header);
    copy_bytes(to.piece->host + m->rx_header, at->host + m->tx_header, length);
    m->rx_used[m->rx_count++] = (mv_used){chain->id, (uint32_t)written, chain->slots};
    use_buffer(m, b, chain);
    return MV_MORE;
}

/* One frame of the transmit queue; false if the burst ends here without it. */
static inline bool move_frame(mv_mover *m, bursting *b, const mv_chain *chain, const mv_piece *pieces) {
    uint8_t header[12] = {[NUM_BUFFERS_AT] = 1};
    if (unlikely(chain->readable <= m->tx_header)) {
        m->done.malformed++;
        return true;
    }
    uint32_t length = chain->readable - m->tx_header;
    const uint32_t before = b->rx_slots;
    uint32_t result = unlikely(length > MV_FRAME) ? TOO_LARGE : m->rx ? MV_MORE : MV_FULL;
    if (likely(result == MV_MORE)) {
        if (m->keep_header)
            copy_frame(&(place){&(mv_piece){0, header, NUM_BUFFERS_AT}, 0}, &(place){pieces, 0}, NUM_BUFFERS_AT);
        result = deliver(m, b, chain, pieces, length, header);
    }
    if (likely(result == MV_MORE)) {
        m->done.frames++;
        m->done.bytes += length;
        return true;
    }
    /* Buffers that were looked at are looked up anew. */
    b->ended = b->scan;
    if (m->rx)
        b->scan = cursor_of(m->rx), step(m->rx, &b->scan, b->rx_slots = before);
    m->staged = m->next = 0;
    m->done.oversize += result == TOO_LARGE;
    m->done.dropped += result == MV_FULL && m->drop;
    if (result == TOO_LARGE || (result == MV_FULL && m->drop))
        return true;
    m->wait = result;
    return false;
}

static void give_back(mv_mover *m, mv_queue *q, uint32_t slots, const mv_used *used, uint32_t count) {
    commit(q, slots);
    if (!mv_publish(q, used, count))
        m->wait = MV_BROKEN;
    atomic_signal_fence(memory_order_seq_cst);
}

static void burst(mv_mover *m, uint32_t limit) {
    mv_cursor scan = cursor_of(m->tx);
    bursting b = {.scan = m->rx ? cursor_of(m->rx) : scan};
    const uint32_t count = take(m->tx, &scan, limit, m->tx_chains, m->tx_pieces);
    const mv_chain *chain = m->tx_chains;
    m->wait = count ? MV_MORE : m->tx->fault ? MV_BROKEN : MV_EMPTY;
    for (const mv_piece *pieces = m->tx_pieces; m->tx_count < count && m->rx_count < MV_BURST; pieces += chain++->pieces) {
        b.frames = count - m->tx_count;
        b.ahead = b.frames > 1 ? chain[1].readable : 0;
        prefetch((uintptr_t)pieces[chain->pieces].host, least(b.ahead, FETCH_FROM), false);
        if (!move_frame(m, &b, chain, pieces))
            break;
        b.tx_slots += chain->slots;
        m->tx_used[m->tx_count++] = (mv_used){chain->id, 0, chain->slots};
    }
    if (m->tx_count) {
        if (m->wait == MV_BROKEN) /* after good frames, it is left for the next burst, which meets it first */
            m->wait = MV_MORE, broken(m->rx, MV_OK, 0);
        if (m->rx_count)
            give_back(m, m->rx, b.rx_slots, m->rx_used, m->rx_count);
        give_back(m, m->tx, b.tx_slots, m->tx_used, m->tx_count);
        full_fence();
        m->signal_rx = m->rx && m->rx_count && mv_wants_signal(m->rx);
        m->signal_tx = mv_wants_signal(m->tx);
    }
    /* The receive buffers there are, and are too few, are no reason to stay awake. */
    if (m->wait == MV_FULL && m->rx)
        m->rx->looked = b.ended.avail, m->rx->looked_wrap = b.ended.wrap;
}

/* Whose memory it was that went away; a queue pair of one device shares its memory. */
static void lost_memory(mv_mover *m, const mv_counters *before) {
    mv_queue *queues[] = {m->tx, m->rx};
    for (int i = 0; i < 2; i++)
        if (queues[i] && mv_touches(queues[i]->memory, queues[i]->log, guard.address))
            broken(queues[i], MV_MEMORY, 0);
    m->done = *before;
    m->wait = MV_BROKEN;
}

static int move(mv_mover *m, uint32_t limit) {
    const mv_counters before = m->done;
    m->staged = m->next = m->tx_count = m->rx_count = m->signal_tx = m->signal_rx = 0;
    if (m->tx->fault || (m->rx && m->rx->fault)) {
        m->wait = MV_BROKEN;
        return 0;
    }
    guard_watch(m->tx->memory, m->tx->log, m->rx ? m->rx->memory : NULL, m->rx ? m->rx->log : NULL);
    GUARDED(burst(m, limit < MV_BURST ? limit : MV_BURST), lost_memory(m, &before));
    if (m->signal_rx)
        mv_call(m->rx);
    if (m->signal_tx)
        mv_call(m->tx);
    return m->wait == MV_BROKEN ? 0 : (int)m->tx_count;
}

int mv_move(mv_mover *m, uint32_t limit) { return mv_guard_install(), move(m, limit); }

int mv_copy(const mv_memory *memory, const mv_log *log, const mv_piece *pieces, uint64_t offset, uint8_t *data, uint64_t size,
            int writing) {
    int result = MV_OK;
    mv_guard_install();
    guard_watch(memory, log, NULL, NULL);
    GUARDED(result = copy(log, (place){pieces, offset}, data, size, writing), result = MV_MEMORY);
    return result;
}
