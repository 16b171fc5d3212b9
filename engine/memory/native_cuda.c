// Device memory: chunks of the CUDA driver, through the addresses of its functions, which Python passes.
// Nothing is linked against it, and no header of CUDA is needed to build this.

#include "native_calls.h"
#include <stddef.h>

struct cuda {
    int (*set_current)(void *context);
    int (*create)(uint64_t *handle, size_t bytes, const void *properties, uint64_t flags);
    int (*map)(uint64_t address, size_t bytes, size_t offset, uint64_t handle, uint64_t flags);
    int (*set_access)(uint64_t address, size_t bytes, const void *access, size_t count);
    int (*unmap)(uint64_t address, size_t bytes);
    int (*release)(uint64_t handle);
    int (*memory_info)(size_t *free, size_t *total);
    void *context;
    const void *properties, *access; // CUmemAllocationProp and CUmemAccessDesc, as cuda-python made them
    uint64_t chunk_bytes, margin_bytes;
};

static int cuda_enter(void *context) {
    struct cuda *cuda = context;
    return cuda->set_current(cuda->context);
}

static int cuda_create(void *context, uint64_t *handle) {
    struct cuda *cuda = context;
    return cuda->create(handle, cuda->chunk_bytes, cuda->properties, 0);
}

static int cuda_map(void *context, uint64_t address, uint64_t handle) {
    struct cuda *cuda = context;
    return cuda->map(address, cuda->chunk_bytes, 0, handle, 0);
}

// One call a chunk: one over a range costs the driver no less, and a refusal of one is exact.
static int cuda_access(void *context, uint64_t address) {
    struct cuda *cuda = context;
    return cuda->set_access(address, cuda->chunk_bytes, cuda->access, 1);
}

static int cuda_unmap(void *context, uint64_t address) {
    struct cuda *cuda = context;
    return cuda->unmap(address, cuda->chunk_bytes);
}

static int cuda_release(void *context, uint64_t handle) {
    struct cuda *cuda = context;
    return cuda->release(handle);
}

// A driver that does not say what is free is left to refuse by itself.
static uint64_t cuda_room(void *context) {
    struct cuda *cuda = context;
    size_t free = 0, total = 0;
    if (cuda->memory_info(&free, &total))
        return UINT64_MAX;
    return free > cuda->margin_bytes ? (free - cuda->margin_bytes) / cuda->chunk_bytes : 0;
}

// Copies, three words each: target, source, bytes. In order on a stream, up to one that is refused: its code.
// Either end of a copy is a host pointer to the driver: in a register it looks like the other, 64 bits.
int cuda_copy(int (*copy)(uint64_t target, uint64_t source, size_t bytes, void *stream), void *stream,
              const uint64_t *words, uint64_t count) {
    int code = 0;
    for (const uint64_t *end = words + 3 * count; words < end && !code; words += 3)
        code = copy(words[0], words[1], words[2], stream);
    return code;
}

void cuda_fill(struct cuda *cuda, struct calls *calls) {
    *calls = (struct calls){cuda,        cuda_enter, cuda_create,  cuda_map,
                            cuda_access, cuda_unmap, cuda_release, cuda_room};
}
