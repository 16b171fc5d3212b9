// Batches of chunk operations, made without the interpreter's lock, and the mapping thread.
//
// Python lays a batch out as 64-bit words (engine/memory/mapper.py) and keeps it alive until `done` is set.
// Nothing here prints or ends the process: what failed is told in the operation's last word.

#define _GNU_SOURCE
#include "native_calls.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MAKE = 1, RELEASE = 2 }; // bits of `what`
enum call { CREATE = 1, MAP, ACCESS, UNMAP, RELEASE_CALL, UNDO, MARGIN };

struct operation {
    uint64_t what, handle, source, target, failure;
};

struct batch {
    struct batch *next;
    uint64_t count;
    _Atomic uint64_t done; // set last
    struct operation operations[];
};

static uint64_t failed(enum call call, int code) { return (uint64_t)call << 32 | (uint32_t)code; }

static void count(_Atomic uint64_t *num_calls) {
    atomic_fetch_add_explicit(num_calls, 1, memory_order_relaxed);
}

static uint64_t map(const struct calls *calls, struct operation *operation) {
    int code = calls->map(calls->context, operation->target, operation->handle);
    if (code)
        return failed(MAP, code);
    code = calls->access(calls->context, operation->target);
    if (!code)
        return 0;
    int undo = calls->unmap(calls->context, operation->target);
    return undo ? failed(UNDO, undo) : failed(ACCESS, code);
}

static uint64_t operate(const struct calls *calls, struct operation *operation, uint64_t room,
                        _Atomic uint64_t *num_calls) {
    int code;
    if (operation->what & MAKE) {
        if (!room)
            return failed(MARGIN, 0);
        count(num_calls);
        if ((code = calls->create(calls->context, &operation->handle)))
            return failed(CREATE, code);
    }
    if (operation->source) {
        count(num_calls);
        if ((code = calls->unmap(calls->context, operation->source)))
            return failed(UNMAP, code);
    }
    if (operation->target) {
        count(num_calls);
        uint64_t failure = map(calls, operation);
        if (failure)
            return failure;
    }
    if (operation->what & RELEASE) {
        count(num_calls);
        if ((code = calls->release(calls->context, operation->handle)))
            return failed(RELEASE_CALL, code);
    }
    return 0;
}

// The operations before the first that failed, if `stop`; else all.
static uint64_t make_calls(const struct calls *calls, struct batch *batch, int stop,
                           _Atomic uint64_t *num_calls) {
    uint64_t room = 0;
    int asked = 0;
    for (uint64_t i = 0; i < batch->count; i++) {
        struct operation *operation = &batch->operations[i];
        if (operation->what & MAKE && !asked) {
            room = calls->room(calls->context);
            asked = 1;
        }
        operation->failure = operate(calls, operation, room, num_calls);
        if (operation->failure && stop)
            return i;
        if (operation->what & MAKE && room)
            room--;
    }
    return batch->count;
}

// Calls at once, and a queue for the thread.
struct mapper {
    const struct calls *calls;
    _Atomic uint64_t num_calls, num_calls_beside;
    pthread_mutex_t lock; // of everything below
    pthread_cond_t work, ended;
    pthread_t thread;
    struct batch *first, *last;
    int started, closing;
};

struct mapper *mapper_open(const struct calls *calls) {
    struct mapper *mapper = calloc(1, sizeof *mapper);
    if (!mapper)
        return NULL;
    mapper->calls = calls;
    pthread_mutex_init(&mapper->lock, NULL);
    pthread_cond_init(&mapper->work, NULL);
    pthread_cond_init(&mapper->ended, NULL);
    return mapper;
}

uint64_t mapper_run(struct mapper *mapper, struct batch *batch, int stop) {
    uint64_t made = make_calls(mapper->calls, batch, stop, &mapper->num_calls);
    atomic_store_explicit(&batch->done, 1, memory_order_release);
    return made;
}

static void *serve(void *argument) {
    struct mapper *mapper = argument;
    mapper->calls->enter(mapper->calls->context); // if refused, so is every call, with a code
    pthread_mutex_lock(&mapper->lock);
    for (;;) {
        while (!mapper->first && !mapper->closing)
            pthread_cond_wait(&mapper->work, &mapper->lock);
        struct batch *batch = mapper->first;
        if (!batch)
            break;
        mapper->first = batch->next;
        pthread_mutex_unlock(&mapper->lock);
        make_calls(mapper->calls, batch, 0, &mapper->num_calls_beside);
        pthread_mutex_lock(&mapper->lock);
        atomic_store_explicit(&batch->done, 1, memory_order_release); // from here on it is Python's
        pthread_cond_broadcast(&mapper->ended);
    }
    pthread_mutex_unlock(&mapper->lock);
    return NULL;
}

// Signals are the interpreter's: none is delivered to the thread. Where every core is busy, waking a thread
// of the usual kind stopped the one that woke it until all was mapped (64 moves: 0.8 ms); one for batches
// takes longer (2 to 3 ms) and leaves it two thirds of its speed.
static int start(struct mapper *mapper) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = pthread_create(&mapper->thread, NULL, serve, mapper);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!code) {
        pthread_setname_np(mapper->thread, "ballonet-map");
        pthread_setschedparam(mapper->thread, SCHED_BATCH, &(struct sched_param){0});
    }
    return code;
}

// 0; or a code, and the batch stays the caller's: there is no thread, or none any more.
int mapper_submit(struct mapper *mapper, struct batch *batch) {
    pthread_mutex_lock(&mapper->lock);
    int code = mapper->closing ? ESHUTDOWN : mapper->started ? 0 : start(mapper);
    if (!code) {
        mapper->started = 1;
        batch->next = NULL;
        if (mapper->first)
            mapper->last->next = batch;
        else
            mapper->first = batch;
        mapper->last = batch;
    }
    pthread_mutex_unlock(&mapper->lock);
    pthread_cond_signal(&mapper->work);
    return code;
}

void mapper_wait(struct mapper *mapper, struct batch *batch) {
    if (atomic_load_explicit(&batch->done, memory_order_acquire))
        return;
    pthread_mutex_lock(&mapper->lock);
    while (!atomic_load_explicit(&batch->done, memory_order_relaxed))
        pthread_cond_wait(&mapper->ended, &mapper->lock);
    pthread_mutex_unlock(&mapper->lock);
}

uint64_t mapper_num_calls(struct mapper *mapper, int beside) {
    _Atomic uint64_t *num_calls = beside ? &mapper->num_calls_beside : &mapper->num_calls;
    return atomic_load_explicit(num_calls, memory_order_relaxed);
}

// Ends the thread, once it has made the calls that are queued. Calls at once go on.
void mapper_close(struct mapper *mapper) {
    pthread_mutex_lock(&mapper->lock);
    int ends = mapper->started && !mapper->closing;
    mapper->closing = 1;
    pthread_cond_signal(&mapper->work);
    pthread_mutex_unlock(&mapper->lock);
    if (ends)
        pthread_join(mapper->thread, NULL);
}

// After `mapper_close`. Also in a forked child, which has no thread: destroying what it waited on would hang.
void mapper_free(struct mapper *mapper) { free(mapper); }
