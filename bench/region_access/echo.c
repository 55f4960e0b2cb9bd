/*
 * The yardstick: a server that does nothing but receive a request and send a reply of the right size.
 *
 *   echo SOCKET
 *
 * One client after the other, until killed. No checks, no device: as short as it can be with a socket in between.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "message.h"

static void serve(int sock)
{
    struct read_reply message = { 0 };
    ssize_t size;

    while ((size = recv(sock, &message, sizeof(message), 0)) > 0) {
        message.header.flags = REPLY;
        if (message.header.command == REGION_READ) {
            message.header.size = sizeof(message);
            size = sizeof(message);
        }
        if (send(sock, &message, (size_t)size, MSG_NOSIGNAL) != size)
            break;
    }
    close(sock);
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (argc != 2 || listener < 0 || strlen(argv[1]) >= sizeof(address.sun_path)) {
        fprintf(stderr, "usage: echo SOCKET\n");
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0) {
        perror(argv[1]);
        return 1;
    }
    puts("ready");
    fflush(stdout);
    for (int sock; (sock = accept(listener, NULL, NULL)) >= 0;)
        serve(sock);
    return 0;
}
