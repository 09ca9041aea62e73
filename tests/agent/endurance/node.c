/* A node of its own: the first process of a process-id namespace that has few numbers. It runs the agent, and callers
 * that connect, send a request and are gone at once, or stay until they are answered.
 *
 * Usage: node PID_MAX CALLERS UNIX_SOCKET TCP_PORT COMMAND...
 *
 * COMMAND is the agent. Prints for each caller `NUMBER PID MICROSECONDS STAYS`: its process, and when it began. Its
 * command line begins with its NUMBER, in ten digits, by which the agent can tell it from others of the same user. Those
 * that stay add the status that they were answered to `answers`, a file in the working directory. The agent stands still
 * for a while now and then, so that nobody who calls meanwhile is looked at before the process's number is another's: of
 * these the last stay, and of the others two of five.
 *
 * In C, since a caller is a copy of this process: of another language most of the time would go into copying. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The agent stands still at the beginning of each period, for more callers than there are numbers. */
enum { PERIOD = 600, STILL = 350, LAST = 30, MOST_ALIVE = 40, MOST_NUMBERS = 32768, NOBODY = 65534 };

static struct sockaddr_un unix_socket = {.sun_family = AF_UNIX};
static struct sockaddr_in tcp = {.sin_family = AF_INET};
static pid_t agent;
static int alive, answers;
/* How many of those that are alive stay, and which. */
static int staying;
static char stayer[MOST_NUMBERS];

/* A connection, by TCP from an address of the caller's own, which has ports enough; negative where there is none. */
static int dial(int by_tcp, int number) {
    int caller = socket(by_tcp ? AF_INET : AF_UNIX, SOCK_STREAM, 0), yes = 1, failed;
    if (by_tcp) {
        struct sockaddr_in from = {.sin_family = AF_INET};
        from.sin_addr.s_addr = htonl((127 << 24) | (number / 250 % 250 << 8) | (number % 250 + 2));
        setsockopt(caller, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
        if (bind(caller, (struct sockaddr *)&from, sizeof from)) err(1, "bind");
        failed = connect(caller, (struct sockaddr *)&tcp, sizeof tcp);
    } else {
        failed = connect(caller, (struct sockaddr *)&unix_socket, sizeof unix_socket);
    }
    if (!failed) return caller;
    close(caller);
    return -1;
}

static void call(int number, int stays) {
    char request[256], answer[4096], line[64];
    if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY)) err(1, "user");
    int caller = dial(number % 4 == 0, number);
    if (caller < 0) err(1, "caller %d", number);
    int length = snprintf(request, sizeof request,
                          "GET http://plain.example.test/v1/%d HTTP/1.1\r\nHost: plain.example.test\r\n\r\n", number);
    if (write(caller, request, length) != length) err(1, "caller %d", number);
    if (!stays) return;
    ssize_t got = read(caller, answer, sizeof answer);
    length = snprintf(line, sizeof line, "%d %.3s\n", number, got > 12 ? answer + 9 : "000");
    if (write(answers, line, length) != length) err(1, "answers");
}

/* Whether a caller is gone; waits for one where `options` do not say otherwise. */
static int reap(int options) {
    int status;
    pid_t gone = waitpid(-1, &status, options);
    if (gone > 0 && (gone == agent || status)) errx(1, "process %d, the agent is %d, ended with %d", gone, agent, status);
    if (gone <= 0) return 0;
    alive--;
    staying -= stayer[gone];
    return 1;
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec * 1000000LL + time.tv_nsec / 1000;
}

int main(int count, char **arguments) {
    if (count < 6 || atoi(arguments[1]) > MOST_NUMBERS) errx(64, "see the beginning of node.c");
    int callers = atoi(arguments[2]);
    strncpy(unix_socket.sun_path, arguments[3], sizeof unix_socket.sun_path - 1);
    tcp.sin_port = htons(atoi(arguments[4]));
    tcp.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int pid_max = open("/proc/sys/kernel/pid_max", O_WRONLY | O_CLOEXEC);
    if (pid_max < 0 || dprintf(pid_max, "%s\n", arguments[1]) < 0) err(1, "pid_max");
    answers = open("answers", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (answers < 0) err(1, "answers");
    if ((errno = posix_spawn(&agent, arguments[5], NULL, NULL, arguments + 5, environ))) err(1, "%s", arguments[5]);
    for (int by_tcp = 0; by_tcp < 2;) {
        int found = dial(by_tcp, 0);
        if (found < 0) {
            if (waitpid(agent, NULL, WNOHANG)) errx(1, "the agent ended");
            usleep(20000);
            continue;
        }
        close(found);
        by_tcp++;
    }
    for (int number = 0; number < callers; number++) {
        int in_period = number % PERIOD;
        if (in_period == 0) kill(agent, SIGSTOP);
        if (in_period == STILL) kill(agent, SIGCONT);
        int stays = in_period >= STILL ? in_period % 5 == 0 || in_period % 5 == 3 : in_period >= STILL - LAST;
        /* Then they all wait for an agent that stands still; others leave by themselves. */
        if (staying == MOST_ALIVE) kill(agent, SIGCONT);
        while (alive && reap(alive == MOST_ALIVE ? 0 : WNOHANG)) continue;
        long long began;
        pid_t pid;
        while (began = now(), (pid = fork()) < 0) {
            /* The agent's threads have the other numbers. */
            if (errno != EAGAIN) err(1, "fork");
            kill(agent, SIGCONT);
            usleep(1000);
        }
        if (pid == 0) {
            char name[11];
            snprintf(name, sizeof name, "%010d", number);
            memcpy(arguments[0], name, sizeof name - 1);
            call(number, stays);
            _exit(0);
        }
        alive++;
        staying += stayer[pid] = stays;
        printf("%d %d %lld %d\n", number, pid, began, stays);
    }
    kill(agent, SIGCONT);
    while (alive) reap(0);
    int status;
    kill(agent, SIGTERM);
    waitpid(agent, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
