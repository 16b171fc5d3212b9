// Host memory: the chunks of a memfd, mapped at fixed addresses. A handle is an offset in the file.
//
// As strict as the CUDA driver, where Linux is not: a place is mapped once, and unmapped if it is mapped.

#define _GNU_SOURCE
#include "native_calls.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

struct range {
    struct range *next;
    uint64_t address, num_rows;
    uint32_t row[]; // 0, or 1 + the chunk mapped there
};

enum { NOT_MADE = UINT32_MAX };

struct host {
    pthread_mutex_t lock; // of all of it: calls at once run beside the thread's
    int file;
    uint64_t chunk_bytes, max_chunks, max_places;
    uint64_t num_free, num_places;
    struct range *ranges;
    uint32_t *free;       // chunks not made, the next one last
    uint32_t places[];    // of each chunk; NOT_MADE
};

static uint32_t *row_at(struct host *host, uint64_t address) {
    for (struct range *range = host->ranges; range; range = range->next)
        if (address >= range->address && address < range->address + range->num_rows * host->chunk_bytes)
            return &range->row[(address - range->address) / host->chunk_bytes];
    return NULL;
}

static int is_made(const struct host *host, uint64_t handle) {
    uint64_t chunk = handle / host->chunk_bytes;
    return handle % host->chunk_bytes == 0 && chunk < host->max_chunks && host->places[chunk] != NOT_MADE;
}

static int map_fixed(uint64_t address, uint64_t bytes, int protection, int flags, int file, uint64_t offset) {
    void *result = mmap((void *)address, bytes, protection, flags | MAP_FIXED, file, (off_t)offset);
    return result == MAP_FAILED ? errno : 0;
}

static int host_do_map(struct host *host, uint64_t address, uint64_t handle) {
    uint32_t *row = row_at(host, address);
    if (!row || !is_made(host, handle))
        return EINVAL;
    if (*row)
        return EEXIST;
    if (host->num_places >= host->max_places)
        return ENOMEM;
    int code = map_fixed(address, host->chunk_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, host->file, handle);
    if (code)
        return code;
    uint32_t chunk = (uint32_t)(handle / host->chunk_bytes);
    *row = 1 + chunk;
    host->places[chunk]++;
    host->num_places++;
    return 0;
}

static int host_do_unmap(struct host *host, uint64_t address) {
    uint32_t *row = row_at(host, address);
    if (!row || !*row)
        return EINVAL;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    int code = map_fixed(address, host->chunk_bytes, PROT_NONE, flags, -1, 0);
    if (code)
        return code;
    host->places[*row - 1]--;
    host->num_places--;
    *row = 0;
    return 0;
}

static int host_do_release(struct host *host, uint64_t handle) {
    if (!is_made(host, handle))
        return EINVAL;
    uint32_t chunk = (uint32_t)(handle / host->chunk_bytes);
    if (host->places[chunk])
        return EBUSY;
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (fallocate(host->file, mode, (off_t)handle, (off_t)host->chunk_bytes))
        return errno;
    host->places[chunk] = NOT_MADE;
    host->free[host->num_free++] = chunk;
    return 0;
}

static int host_create(void *context, uint64_t *handle) {
    struct host *host = context;
    int code = ENOMEM;
    pthread_mutex_lock(&host->lock);
    if (host->num_free) {
        uint32_t chunk = host->free[--host->num_free];
        host->places[chunk] = 0;
        *handle = chunk * host->chunk_bytes;
        code = 0;
    }
    pthread_mutex_unlock(&host->lock);
    return code;
}

static int host_map(void *context, uint64_t address, uint64_t handle) {
    struct host *host = context;
    pthread_mutex_lock(&host->lock);
    int code = host_do_map(host, address, handle);
    pthread_mutex_unlock(&host->lock);
    return code;
}

static int host_unmap(void *context, uint64_t address) {
    struct host *host = context;
    pthread_mutex_lock(&host->lock);
    int code = host_do_unmap(host, address);
    pthread_mutex_unlock(&host->lock);
    return code;
}

static int host_release(void *context, uint64_t handle) {
    struct host *host = context;
    pthread_mutex_lock(&host->lock);
    int code = host_do_release(host, handle);
    pthread_mutex_unlock(&host->lock);
    return code;
}

static int host_enter(void *context) { return (void)context, 0; }
static int host_access(void *context, uint64_t address) { return (void)context, (void)address, 0; }
static uint64_t host_room(void *context) { return (void)context, UINT64_MAX; }

struct host *host_open(int file, uint64_t chunk_bytes, uint64_t max_chunks, uint64_t max_places,
                       struct calls *calls) {
    struct host *host = calloc(1, sizeof *host + max_chunks * sizeof(uint32_t));
    uint32_t *free_chunks = calloc(max_chunks + 1, sizeof(uint32_t));
    if (!host || !free_chunks)
        return free(host), free(free_chunks), NULL;
    pthread_mutex_init(&host->lock, NULL);
    host->file = file;
    host->chunk_bytes = chunk_bytes;
    host->max_chunks = max_chunks;
    host->max_places = max_places;
    host->free = free_chunks;
    for (uint64_t chunk = max_chunks; chunk-- > 0;) {
        host->places[chunk] = NOT_MADE;
        host->free[host->num_free++] = (uint32_t)chunk;
    }
    *calls = (struct calls){host,        host_enter, host_create,  host_map,
                            host_access, host_unmap, host_release, host_room};
    return host;
}

// A reserved range that chunks may be mapped in; 0, or ENOMEM. Rows that are never used cost nothing.
int host_add_range(struct host *host, uint64_t address, uint64_t num_rows) {
    struct range *range = calloc(1, sizeof *range + num_rows * sizeof(uint32_t));
    if (!range)
        return ENOMEM;
    range->address = address;
    range->num_rows = num_rows;
    pthread_mutex_lock(&host->lock);
    range->next = host->ranges;
    host->ranges = range;
    pthread_mutex_unlock(&host->lock);
    return 0;
}

void host_free(struct host *host) {
    for (struct range *range = host->ranges, *next; range; range = next) {
        next = range->next;
        free(range);
    }
    free(host->free);
    free(host);
}
