/* What Python sees of the engine. This text is both C and cffi's cdef: declarations only, no preprocessor.
 *
 * Every structure is allocated and filled in by Python and outlives the calls that use it. A queue belongs to one thread
 * at a time; the counters may be read by any. Numbers are equal in ring.py and layout.py.
 */

/* Bounds: pieces of one chain, buffers and pieces looked up at once, frames of one burst, buffers one frame may be spread over, bytes of one frame. */
enum { MV_PIECES = 1024, MV_TAKE = 128, MV_TAKE_PIECES = 4096, MV_BURST = 128, MV_MERGE = 1024, MV_FRAME = 69632 };

/* Why a ring is broken: layout.Fault. */
enum {
    MV_OK, MV_INDEX, MV_HEAD, MV_LOOP, MV_INDIRECT, MV_ORDER, MV_ADDRESS, MV_LENGTH, MV_MEMORY, MV_LOG, MV_BUFFER
};

/* What a burst ended for: layout.Wait. */
enum { MV_MORE, MV_EMPTY, MV_FULL, MV_BROKEN };

typedef struct { uint64_t guest, size; uint8_t *host; } mv_region;

/* The guest memory table: regions in order of their guest addresses, none overlapping. */
typedef struct { const mv_region *regions; uint32_t count; } mv_memory;

/* A dirty log: one bit per 4 KiB page of guest memory. */
typedef struct { uint8_t *bits; uint64_t size; } mv_log;

/* Part of a buffer that is contiguous in our address space. */
typedef struct { uint64_t guest; uint8_t *host; uint64_t length; } mv_piece;

/* One buffer: its pieces, the readable ones first. `slots`: descriptors it takes in a packed ring, else 1. */
typedef struct { uint32_t id, slots, pieces, readable_pieces, readable, writable, writing; } mv_chain;

/* One buffer given back, with the bytes written to it. */
typedef struct { uint32_t id, length, slots; } mv_used;

typedef struct {
    const mv_memory *memory;
    const mv_log *log;               /* or null */
    uint8_t *desc, *driver, *device; /* the three areas, aligned as the specification demands */
    uint64_t desc_guest, device_guest; /* where the log finds what we write of the ring */
    uint32_t num, hint;              /* descriptors; the region hit last */
    uint8_t packed, event_idx, indirect, in_order, log_ring;
    uint16_t avail, used, seen;      /* next to take, next to give back; the driver's index when last looked at */
    uint16_t looked;                 /* what lies before it is no reason to stay awake: taken, or too little */
    uint8_t avail_wrap, used_wrap, looked_wrap;
    uint32_t inflight;               /* slots taken and not given back */
    uint32_t unsignalled;            /* slots given back since the driver's wish was last looked at */
    uint64_t fault, fault_value;
    int kick_fd, call_fd;            /* or -1 */
    uint64_t kicks, calls;
} mv_queue;

typedef struct { uint64_t frames, bytes, dropped, malformed, oversize; } mv_counters;

typedef struct {
    mv_queue *tx, *rx;               /* rx may be null: frames are dropped */
    uint32_t tx_header, rx_header;   /* 10 or 12 */
    uint8_t mergeable, drop, keep_header, halted;
    uint32_t wait;
    mv_counters done;
    uint32_t tx_count, rx_count, signal_tx, signal_rx;
    uint32_t staged, next;           /* receive buffers looked up, and how many of them are filled */
    mv_used tx_used[128], rx_used[1152];
    mv_chain tx_chains[128], rx_chains[128];
    mv_piece tx_pieces[4112], rx_pieces[4112], header_pieces[12]; /* room to look ahead of the last */
} mv_mover;

typedef struct {
    mv_mover **movers;
    uint32_t count, burst;
    uint64_t spin_ns;                /* how long to poll without traffic before sleeping */
    int stop_fd;
    uint32_t stop;
    uint64_t sleeps;
} mv_loop;

/* Copies `size` bytes between `data` and the pieces, from byte `offset` of these on; 0, MV_MEMORY or MV_LOG. */
int mv_copy(const mv_memory *memory, const mv_log *log, const mv_piece *pieces, uint64_t offset, uint8_t *data, uint64_t size,
            int writing);

/* Returns how many buffers were taken into arrays of MV_TAKE and MV_TAKE_PIECES; 0 with queue->fault set if the ring is broken. */
int mv_take(mv_queue *queue, uint32_t limit, mv_chain *chains, mv_piece *pieces);
/* Gives buffers back; returns 1 if the driver wants a signal. Sets queue->fault like every call. */
int mv_complete(mv_queue *queue, const mv_used *used, uint32_t count);
/* Asks for kicks or for none; returns 1 if kicks are wanted and buffers have become available meanwhile. */
int mv_notify(mv_queue *queue, int wanted);

/* Moves up to `limit` frames; returns how many transmit buffers were used up, mover->wait says why it ended. */
int mv_move(mv_mover *mover, uint32_t limit);
/* Moves until loop->stop is set, with stop_fd written to, or a mover breaks: 0 stopped, 1 a mover has halted. */
int mv_run(mv_loop *loop);
