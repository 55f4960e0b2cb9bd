/* The two vfio-user messages the benchmark exchanges, as they lie on the wire. */
#ifndef MESSAGE_H
#define MESSAGE_H

#include <stdint.h>

enum { VERSION = 1, REGION_READ = 9, REPLY = 1, VALUE_SIZE = 4 };

struct header {
    uint16_t id;
    uint16_t command;
    uint32_t size;
    uint32_t flags;
    uint32_t error;
} __attribute__((packed));

struct version_message {
    struct header header;
    uint16_t major;
    uint16_t minor;
} __attribute__((packed));

struct read_request {
    struct header header;
    uint64_t offset;
    uint32_t region;
    uint32_t count;
} __attribute__((packed));

struct read_reply {
    struct header header;
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    uint8_t value[VALUE_SIZE];
} __attribute__((packed));

#endif
