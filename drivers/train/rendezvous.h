/* drivers/train/rendezvous.h - processes that were started by environment variables alone find each other: rank 0
 * listens at MASTER_ADDR:MASTER_PORT (at all its addresses where that is a name), the others connect. Over these
 * connections goes what rank 0 tells the others (NCCL's unique id at first), and each rank learns by them when another
 * one has ended.
 *
 *     rendezvous_place place;                             // RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
 *     if (!rendezvous_find(&place, &e)) puts(e.text);
 *     if (place.count == 0) ...                           // none of them is set
 *     rendezvous r;
 *     if (!rendezvous_open(&r, &place, &e)) puts(e.text);
 *     if (!rendezvous_share(&r, bytes, sizeof bytes, &e)) puts(e.text);   // rank 0's, however long it takes
 *     if (!rendezvous_all_alive(&r, &e)) puts(e.text);    // also from another thread
 *     rendezvous_close(&r, true);                         // true: this rank is done; false: it has failed
 *
 * The names are those that torchrun sets; where its agent has taken the port for itself, the next one is used.
 * RANKS_TIMEOUT is how many seconds ranks wait for each other (600) to come together and to exchange; but what rank
 * 0 does alone (a vocabulary, the tokens of a text, a checkpoint) takes as long as it takes, while all of them
 * live. A stranger (a port scanner) is turned away; ranks that disagree, or two of one number, end all of them.
 * Nothing is encrypted.
 *
 * Needs common.h and gated_attention.h before it.
 */
#ifndef DRIVERS_RENDEZVOUS_H
#define DRIVERS_RENDEZVOUS_H

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#ifdef __APPLE__ /* another name; none */
#define TCP_KEEPIDLE TCP_KEEPALIVE
#define SOCK_CLOEXEC 0
#endif

enum { RENDEZVOUS_MOST = 65536 }; /* ranks */

typedef struct {
    size_t rank, count; /* count 0: the environment says nothing */
    size_t local_rank;  /* among those on this machine; where nobody says so, the rank itself */
    bool has_local_rank;
    char host[256], port[8];
} rendezvous_place;

typedef struct {
    rendezvous_place place;
    double seconds, deadline; /* for coming together, and until when */
    int *peers;               /* rank 0: a connection to each rank but itself; the others: one, to rank 0; -1: none */
    size_t n_peers;
    int listening;
    pthread_mutex_t lock; /* of the connections, once two threads use them */
    ga_error ended;       /* why it is all over, for both of them */
} rendezvous;

/* ---- the environment --------------------------------------------------------------------------------------------- */

/* A number below `limit` from the environment; false: it is none. */
static bool rendezvous_number(const char *name, size_t limit, size_t *value, ga_error *e) {
    const char *text = getenv(name);
    char *end;
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || n >= limit)
        return fail_with(e, GA_ERR_DEVICE, "%s=%.40s is not a whole number below %zu", name, text, limit);
    *value = n;
    return true;
}

/* Seconds that ranks wait for each other. */
static double rendezvous_timeout(void) {
    const char *text = getenv("RANKS_TIMEOUT");
    double seconds = text ? strtod(text, NULL) : 600;
    return seconds > 0 && seconds < 1e9 ? seconds : 600;
}

static bool rendezvous_find(rendezvous_place *p, ga_error *e) {
    static const char *const names[] = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"};
    size_t port = 0, set = 0;
    memset(p, 0, sizeof *p);
    for (size_t i = 0; i < 4; i++) set += getenv(names[i]) != NULL;
    if (!getenv("RANK") && !getenv("WORLD_SIZE")) return true;
    for (size_t i = 0; i < 4 && set < 4; i++)
        if (!getenv(names[i]))
            return fail_with(e, GA_ERR_DEVICE, "%s is set, but not %s", getenv("RANK") ? "RANK" : "WORLD_SIZE",
                             names[i]);
    if (!rendezvous_number("WORLD_SIZE", RENDEZVOUS_MOST + 1, &p->count, e) ||
        !rendezvous_number("RANK", RENDEZVOUS_MOST, &p->rank, e) || !rendezvous_number("MASTER_PORT", 65536, &port, e))
        return false;
    p->local_rank = p->rank;
    p->has_local_rank = getenv("LOCAL_RANK") != NULL;
    if (p->has_local_rank && !rendezvous_number("LOCAL_RANK", RENDEZVOUS_MOST, &p->local_rank, e)) return false;
    if (p->count == 0 || p->rank >= p->count)
        return fail_with(e, GA_ERR_DEVICE, "RANK=%zu is not one of WORLD_SIZE=%zu ranks, 0 to WORLD_SIZE - 1", p->rank,
                         p->count);
    const char *agent = getenv("TORCHELASTIC_USE_AGENT_STORE");
    if (agent && strcmp(agent, "True") == 0) port++;
    if (port == 0 || port > 65535) return fail_with(e, GA_ERR_DEVICE, "MASTER_PORT=%zu is no port", port);
    snprintf(p->port, sizeof p->port, "%zu", port);
    if (snprintf(p->host, sizeof p->host, "%s", getenv("MASTER_ADDR")) >= (int)sizeof p->host || !*p->host)
        return fail_with(e, GA_ERR_DEVICE, "MASTER_ADDR is empty or too long");
    return true;
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

enum {
    RENDEZVOUS_HELLO,
    RENDEZVOUS_WELCOME,
    RENDEZVOUS_SIZES,
    RENDEZVOUS_TWICE,
    RENDEZVOUS_LOST,
    RENDEZVOUS_WORD,
    RENDEZVOUS_DONE
};

/* All that is ever said, in network byte order. HELLO a of b; SIZES: rank 0 has WORLD_SIZE a, another b; TWICE: there
 * are two ranks a; LOST: rank a has ended; WORD: a bytes follow. */
typedef struct {
    char magic[8];
    uint32_t what, a, b;
} rendezvous_message;

static const char RENDEZVOUS_MAGIC[] = "GARANKS"; /* with its zero 8 bytes */

static bool rendezvous_send(int peer, const void *bytes, size_t n) {
    for (size_t sent = 0; sent < n;) {
        ssize_t more = send(peer, (const char *)bytes + sent, n - sent, MSG_NOSIGNAL);
        if (more < 0 && errno == EINTR) continue;
        if (more <= 0) return false;
        sent += (size_t)more;
    }
    return true;
}

static bool rendezvous_say(int peer, uint32_t what, size_t a, size_t b) {
    rendezvous_message m = {.what = htonl(what), .a = htonl((uint32_t)a), .b = htonl((uint32_t)b)};
    memcpy(m.magic, RENDEZVOUS_MAGIC, sizeof m.magic);
    return peer < 0 || rendezvous_send(peer, &m, sizeof m);
}

/* Reads n bytes before the deadline. */
static bool rendezvous_receive(int peer, void *bytes, size_t n, double deadline) {
    for (size_t got = 0; got < n;) {
        double left = deadline - now();
        struct pollfd one = {peer, POLLIN, 0};
        int ready = left > 0 ? poll(&one, 1, left > 1e6 ? 1000000000 : (int)(left * 1e3) + 1) : 0;
        if (ready < 0 && errno == EINTR) continue;
        if (ready <= 0) {
            errno = ready == 0 ? ETIMEDOUT : errno;
            return false;
        }
        ssize_t more = recv(peer, (char *)bytes + got, n - got, 0);
        if (more < 0 && errno == EINTR) continue;
        if (more == 0) errno = ECONNRESET;
        if (more <= 0) return false;
        got += (size_t)more;
    }
    return true;
}

static bool rendezvous_hear(int peer, rendezvous_message *m, double deadline) {
    if (!rendezvous_receive(peer, m, sizeof *m, deadline)) return false;
    m->what = ntohl(m->what), m->a = ntohl(m->a), m->b = ntohl(m->b);
    errno = EPROTO;
    return memcmp(m->magic, RENDEZVOUS_MAGIC, sizeof m->magic) == 0;
}

/* Why rank 0 has ended it all. */
static bool rendezvous_explain(const rendezvous_message *m, ga_error *e) {
    if (m->what == RENDEZVOUS_SIZES)
        return fail_with(e, GA_ERR_DEVICE, "the ranks disagree: WORLD_SIZE is %u for rank 0, and %u for another", m->a,
                         m->b);
    if (m->what == RENDEZVOUS_TWICE) return fail_with(e, GA_ERR_DEVICE, "two processes have RANK=%u", m->a);
    return fail_with(e, GA_ERR_DEVICE, "rank %u has ended", m->a);
}

/* Tells all others why it ends, and what this rank says itself. */
static bool rendezvous_end_all(rendezvous *r, uint32_t what, size_t a, size_t b, ga_error *e) {
    rendezvous_message m = {.what = what, .a = (uint32_t)a, .b = (uint32_t)b};
    for (size_t i = 0; i < r->n_peers; i++) (void)rendezvous_say(r->peers[i], what, a, b);
    return rendezvous_explain(&m, e);
}

/* ---- coming together --------------------------------------------------------------------------------------------- */

static void rendezvous_close(rendezvous *r, bool done) {
    for (size_t i = 0; i < r->n_peers; i++) {
        if (r->peers[i] < 0) continue;
        if (done) (void)rendezvous_say(r->peers[i], RENDEZVOUS_DONE, 0, 0);
        close(r->peers[i]);
    }
    if (r->listening >= 0) close(r->listening);
    free(r->peers);
    *r = (rendezvous){.listening = -1};
}

/* No delays; a machine that is gone without a word is noticed in half a minute. */
static void rendezvous_prepare(int peer) {
    const int on = 1, idle = 10, interval = 5, probes = 4;
    setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(peer, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(peer, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(peer, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(peer, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

static bool rendezvous_look_up(const rendezvous_place *p, struct addrinfo **found, ga_error *e) {
    const struct addrinfo wanted = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    int wrong = getaddrinfo(p->host, p->port, &wanted, found);
    if (wrong) return fail_with(e, GA_ERR_DEVICE, "MASTER_ADDR=%s: %s", p->host, gai_strerror(wrong));
    return true;
}

static int rendezvous_listen_at(const struct addrinfo *a) {
    const int on = 1, off = 0;
    int s = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) return -1;
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->ai_family == AF_INET6) setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(s, a->ai_addr, a->ai_addrlen) == 0 && listen(s, 128) == 0) return s;
    int wrong = errno;
    close(s);
    errno = wrong;
    return -1;
}

/* At all addresses of this machine: IPv6, which takes IPv4 too, else that. */
static int rendezvous_listen_anywhere(const char *port) {
    static const int families[] = {AF_INET6, AF_INET};
    int s = -1;
    for (size_t i = 0; i < 2 && s < 0; i++) {
        const struct addrinfo all = {
            .ai_family = families[i], .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
        struct addrinfo *found;
        if (getaddrinfo(NULL, port, &all, &found)) continue;
        s = rendezvous_listen_at(found);
        freeaddrinfo(found);
    }
    return s;
}

static bool rendezvous_is_number(const char *host) {
    const struct addrinfo number = {.ai_family = AF_UNSPEC, .ai_flags = AI_NUMERICHOST};
    struct addrinfo *found;
    if (getaddrinfo(host, NULL, &number, &found)) return false;
    freeaddrinfo(found);
    return true;
}

/* At the address that is given, if it is one. A name may be one that this machine knows as a loopback address (Debian's
 * 127.0.1.1), where no other finds it, or that of a service which passes connections on. */
static bool rendezvous_listen(rendezvous *r, ga_error *e) {
    struct addrinfo *found;
    bool there = rendezvous_is_number(r->place.host) || strcmp(r->place.host, "localhost") == 0;
    if (!rendezvous_look_up(&r->place, &found, e)) return false;
    if (!there) r->listening = rendezvous_listen_anywhere(r->place.port);
    for (struct addrinfo *a = found; there && a && r->listening < 0; a = a->ai_next)
        r->listening = rendezvous_listen_at(a);
    int wrong = errno;
    freeaddrinfo(found);
    if (r->listening >= 0) return true;
    return fail_with(e, GA_ERR_DEVICE, "rank 0 cannot listen at %s:%s: %s", r->place.host, r->place.port,
                     strerror(wrong));
}

/* Which ranks have not come: "rank 3", "ranks 1, 2 and 12 others". */
static const char *rendezvous_missing(const rendezvous *r, char text[96]) {
    size_t missing = 0, shown = 0;
    int used = 0;
    for (size_t i = 1; i < r->n_peers; i++) missing += r->peers[i] < 0;
    used = snprintf(text, 96, "rank%s ", missing > 1 ? "s" : "");
    for (size_t i = 1; i < r->n_peers && shown < 3; i++)
        if (r->peers[i] < 0) used += snprintf(text + used, 96 - (size_t)used, "%s%zu", shown++ ? ", " : "", i);
    if (missing > shown) snprintf(text + used, 96 - (size_t)used, " and %zu others", missing - shown);
    return text;
}

/* One who has connected: a rank takes its place, a stranger is turned away. False: the ranks do not fit together. */
static bool rendezvous_admit(rendezvous *r, int peer, ga_error *e) {
    rendezvous_message m;
    double soon = now() + 2;
    if (!rendezvous_hear(peer, &m, soon < r->deadline ? soon : r->deadline) || m.what != RENDEZVOUS_HELLO) {
        close(peer);
        return true;
    }
    bool sizes = m.b != r->place.count, twice = !sizes && (m.a == 0 || m.a >= m.b || r->peers[m.a] >= 0);
    if (!sizes && !twice) {
        rendezvous_prepare(peer);
        r->peers[m.a] = peer;
        return true;
    }
    uint32_t what = sizes ? RENDEZVOUS_SIZES : RENDEZVOUS_TWICE;
    size_t a = sizes ? r->place.count : m.a;
    (void)rendezvous_say(peer, what, a, m.b);
    close(peer);
    return rendezvous_end_all(r, what, a, m.b, e);
}

/* Rank 0: until all are here. */
static bool rendezvous_gather(rendezvous *r, ga_error *e) {
    char text[96];
    double tell = now() + 10;
    for (size_t missing = r->place.count - 1; missing > 0;) {
        double next = tell < r->deadline ? tell : r->deadline;
        struct pollfd door = {r->listening, POLLIN, 0};
        int ready = poll(&door, 1, (int)((next > now() ? next - now() : 0) * 1e3) + 1);
        if (ready < 0 && errno != EINTR) return fail_with(e, GA_ERR_DEVICE, "rank 0: poll: %s", strerror(errno));
        int peer = ready > 0 ? accept(r->listening, NULL, NULL) : -1;
        if (peer >= 0 && !rendezvous_admit(r, peer, e)) return false;
        missing = 0;
        for (size_t i = 1; i < r->n_peers; i++) missing += r->peers[i] < 0;
        if (missing == 0) break;
        if (now() >= r->deadline)
            return fail_with(e, GA_ERR_DEVICE, "%s of %zu did not come to %s:%s within %g s",
                             rendezvous_missing(r, text), r->place.count, r->place.host, r->place.port, r->seconds);
        if (now() < tell) continue;
        fprintf(stderr, "waiting for %s of %zu at %s:%s\n", rendezvous_missing(r, text), r->place.count, r->place.host,
                r->place.port);
        tell = now() + 60;
    }
    for (size_t i = 1; i < r->n_peers; i++)
        if (!rendezvous_say(r->peers[i], RENDEZVOUS_WELCOME, 0, 0))
            return rendezvous_end_all(r, RENDEZVOUS_LOST, i, 0, e);
    return true;
}

/* One try; -1 and errno: nobody answers. */
static int rendezvous_connect_to(const struct addrinfo *a, double seconds) {
    struct timeval most = {(time_t)seconds, (suseconds_t)((seconds - (double)(time_t)seconds) * 1e6)};
    int s = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) return -1;
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most);
    if (connect(s, a->ai_addr, a->ai_addrlen) == 0) return s;
    int wrong = errno == EINPROGRESS ? ETIMEDOUT : errno;
    close(s);
    errno = wrong;
    return -1;
}

/* The others: rank 0 may come later. */
static bool rendezvous_connect(rendezvous *r, ga_error *e) {
    struct addrinfo *found;
    if (!rendezvous_look_up(&r->place, &found, e)) return false;
    double tell = now() + 10;
    int wrong = 0;
    for (;;) {
        for (struct addrinfo *a = found; a && r->peers[0] < 0 && now() < r->deadline; a = a->ai_next) {
            double left = r->deadline - now();
            r->peers[0] = rendezvous_connect_to(a, left < 0.001 ? 0.001 : left < 5 ? left : 5);
            wrong = errno;
        }
        if (r->peers[0] >= 0 || now() >= r->deadline) break;
        if (now() > tell) {
            fprintf(stderr, "waiting for rank 0 at %s:%s: %s\n", r->place.host, r->place.port, strerror(wrong));
            tell = now() + 60;
        }
        const struct timespec a_while = {0, 100000000};
        nanosleep(&a_while, NULL);
    }
    freeaddrinfo(found);
    if (r->peers[0] < 0)
        return fail_with(e, GA_ERR_DEVICE, "rank %zu finds no rank 0 at %s:%s: %s", r->place.rank, r->place.host,
                         r->place.port, strerror(wrong));
    rendezvous_prepare(r->peers[0]);
    rendezvous_message m;
    if (!rendezvous_say(r->peers[0], RENDEZVOUS_HELLO, r->place.rank, r->place.count) ||
        !rendezvous_hear(r->peers[0], &m, r->deadline))
        return fail_with(e, GA_ERR_DEVICE, "rank %zu: %s:%s does not answer as rank 0 does: %s", r->place.rank,
                         r->place.host, r->place.port, strerror(errno));
    return m.what == RENDEZVOUS_WELCOME || rendezvous_explain(&m, e);
}

/* Until all ranks have come together. */
static bool rendezvous_open(rendezvous *r, const rendezvous_place *place, ga_error *e) {
    double seconds = rendezvous_timeout();
    *r = (rendezvous){.place = *place,
                      .listening = -1,
                      .seconds = seconds,
                      .deadline = now() + seconds,
                      .lock = PTHREAD_MUTEX_INITIALIZER};
    r->n_peers = place->rank == 0 ? place->count : 1;
    r->peers = malloc(r->n_peers * sizeof *r->peers);
    if (!r->peers) return fail_with(e, GA_ERR_DEVICE, "no memory for %zu ranks", place->count);
    for (size_t i = 0; i < r->n_peers; i++) r->peers[i] = -1;
    bool here = place->rank == 0 ? rendezvous_listen(r, e) && rendezvous_gather(r, e) : rendezvous_connect(r, e);
    if (!here) {
        rendezvous_close(r, false);
        return false;
    }
    if (r->listening >= 0) close(r->listening);
    r->listening = -1;
    return true;
}

/* ---- afterwards -------------------------------------------------------------------------------------------------- */

/* What the other end of connection i has said and nobody has heard; a word stays there for whom it is meant. False: a
 * rank has ended before it was done. */
static bool rendezvous_look(rendezvous *r, size_t i, bool *word, ga_error *e) {
    rendezvous_message m;
    if (r->peers[i] < 0) return true;
    ssize_t n = recv(r->peers[i], &m, sizeof m, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return true;
    if (n > 0 && n < (ssize_t)sizeof m) return true;
    *word = n > 0 && ntohl(m.what) == RENDEZVOUS_WORD;
    if (*word) return true;
    if (n <= 0 || !rendezvous_hear(r->peers[i], &m, now() + 1)) return rendezvous_end_all(r, RENDEZVOUS_LOST, i, 0, e);
    if (m.what != RENDEZVOUS_DONE) return rendezvous_explain(&m, e);
    close(r->peers[i]);
    r->peers[i] = -1;
    return true;
}

/* False: a rank has ended before it was done. Also from another thread. */
static bool rendezvous_all_alive(void *state, ga_error *e) {
    rendezvous *r = (rendezvous *)state;
    bool alive, word;
    pthread_mutex_lock(&r->lock);
    alive = r->ended.result == GA_OK;
    for (size_t i = 0; i < r->n_peers && alive; i++) alive = rendezvous_look(r, i, &word, &r->ended);
    if (!alive) *e = r->ended;
    pthread_mutex_unlock(&r->lock);
    return alive;
}

/* Rank 0: n bytes to all others. */
static bool rendezvous_tell(rendezvous *r, const void *bytes, size_t n, ga_error *e) {
    pthread_mutex_lock(&r->lock);
    bool told = r->ended.result == GA_OK;
    for (size_t i = 1; i < r->n_peers && told; i++)
        told = (rendezvous_say(r->peers[i], RENDEZVOUS_WORD, n, 0) && rendezvous_send(r->peers[i], bytes, n)) ||
               rendezvous_end_all(r, RENDEZVOUS_LOST, i, 0, &r->ended);
    if (!told) *e = r->ended;
    pthread_mutex_unlock(&r->lock);
    return told;
}

/* The others: takes rank 0's word of n bytes, if it is here. False: it will not come. */
static bool rendezvous_take(rendezvous *r, void *bytes, size_t n, bool *taken, ga_error *e) {
    rendezvous_message m;
    bool good = r->ended.result == GA_OK && rendezvous_look(r, 0, taken, &r->ended);
    if (good && r->peers[0] < 0) good = rendezvous_end_all(r, RENDEZVOUS_LOST, 0, 0, &r->ended);
    if (good && *taken &&
        (!rendezvous_hear(r->peers[0], &m, now() + r->seconds) || m.a != n ||
         !rendezvous_receive(r->peers[0], bytes, n, now() + r->seconds)))
        good = rendezvous_end_all(r, RENDEZVOUS_LOST, 0, 0, &r->ended);
    if (!good) *e = r->ended;
    return good;
}

/* Rank 0's n bytes, to all; however long it takes rank 0 to come here, while all are alive. */
static bool rendezvous_share(void *state, void *bytes, size_t n, ga_error *e) {
    rendezvous *r = (rendezvous *)state;
    if (r->place.rank == 0) return rendezvous_tell(r, bytes, n, e);
    for (bool taken = false, good = true;;) {
        pthread_mutex_lock(&r->lock);
        struct pollfd rank_0 = {r->peers[0], POLLIN, 0};
        good = rendezvous_take(r, bytes, n, &taken, e);
        pthread_mutex_unlock(&r->lock);
        if (!good || taken) return good;
        poll(&rank_0, 1, 100); /* the other thread may hear first that it is over */
    }
}

#endif
