// The driver calls of a backend, on one chunk each, as a table that Python also sees (`native.CallTable`).
// All but `room` answer with the driver's code, 0 for success. They are called by two threads.

#pragma once
#include <stdint.h>

struct calls {
    void *context;
    int (*enter)(void *context); // once, by the mapping thread
    int (*create)(void *context, uint64_t *handle);
    int (*map)(void *context, uint64_t address, uint64_t handle);
    int (*access)(void *context, uint64_t address);
    int (*unmap)(void *context, uint64_t address);
    int (*release)(void *context, uint64_t handle);
    uint64_t (*room)(void *context); // chunks that may be made now
};
