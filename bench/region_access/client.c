/*
 * Times 4-byte register reads over vfio-user, one outstanding at a time: what a guest's load costs on this side.
 *
 *   client SOCKET REGION WARMUP COUNT
 *
 * Writes COUNT latencies in nanoseconds to standard output, 32 bits each in host order. The echo server takes the same
 * messages, so both peers are driven by the very same code.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "message.h"

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);

    if (sock < 0 || strlen(path) >= sizeof(address.sun_path))
        die("socket");
    strcpy(address.sun_path, path);
    if (connect(sock, (struct sockaddr *)&address, sizeof(address)) < 0)
        die("connect");
    return sock;
}

static void say_version(int sock)
{
    struct version_message hello = {
        .header = { .command = VERSION, .size = sizeof(hello) },
    };
    char reply[4096];

    if (send(sock, &hello, sizeof(hello), 0) != sizeof(hello))
        die("send VERSION");
    if (recv(sock, reply, sizeof(reply), 0) < (ssize_t)sizeof(struct header) || ((struct header *)reply)->flags != REPLY)
        die("the server refuses VERSION");
}

static void read_register(int sock, uint32_t region, uint16_t id)
{
    struct read_request request = {
        .header = { .id = id, .command = REGION_READ, .size = sizeof(request) },
        .region = region,
        .count = VALUE_SIZE,
    };
    struct read_reply reply;

    if (send(sock, &request, sizeof(request), 0) != sizeof(request))
        die("send");
    if (recv(sock, &reply, sizeof(reply), MSG_WAITALL) != sizeof(reply))
        die("recv");
    if (reply.header.id != id || reply.header.flags != REPLY || reply.header.size != sizeof(reply)) {
        fprintf(stderr, "a wrong reply\n");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: client SOCKET REGION WARMUP COUNT\n");
        return 2;
    }
    int sock = connect_to(argv[1]);
    uint32_t region = (uint32_t)atoi(argv[2]);
    int warmup = atoi(argv[3]), count = atoi(argv[4]);
    uint32_t *latencies = calloc((size_t)count, sizeof(*latencies));

    if (latencies == NULL)
        die("calloc");
    say_version(sock);
    for (int i = -warmup; i < count; i++) {
        uint64_t begin = now_ns();

        read_register(sock, region, (uint16_t)i);
        if (i >= 0)
            latencies[i] = (uint32_t)(now_ns() - begin);
    }
    if (fwrite(latencies, sizeof(*latencies), (size_t)count, stdout) != (size_t)count)
        die("write");
    return 0;
}
