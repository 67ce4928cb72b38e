/* A CUDA driver of two GPUs that does nothing: it writes down each call and its arguments, gives back
 * fixed values, and fails where it is told to. Built and loaded by tests/engine/memory/test_cuda_driver.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t u64;
typedef unsigned int u32;

static char told[1 << 16], failing[64];
static int code, times;

const char *fake_told(void) { return told; }
void fake_forget(void) { told[0] = 0; }
void fake_fail(const char *name, int with, int so_often) {
    snprintf(failing, sizeof failing, "%s", name);
    code = with;
    times = so_often;
}

static int tell(const char *name, const char *format, ...) {
    size_t at = strlen(told);
    va_list arguments;
    va_start(arguments, format);
    at += snprintf(told + at, sizeof told - at, "%s ", name);
    at += vsnprintf(told + at, sizeof told - at, format, arguments);
    snprintf(told + at, sizeof told - at, "\n");
    va_end(arguments);
    return strcmp(name, failing) || !times ? 0 : (times--, code);
}

#define TELL(...) return tell(__func__, __VA_ARGS__)
#define GIVE(place, value, ...) do { *(place) = (value); TELL(__VA_ARGS__); } while (0)

int cuGetProcAddress_v2(const char *name, void **found, int version, u64 flags, int *status) {
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    *found = dlsym(RTLD_DEFAULT, second);
    if (!*found) *found = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *found ? 0 : 1;
    return *found ? 0 : 500;
}

int cuInit(u32 flags) { TELL("%u", flags); }
int cuDeviceGetCount(int *count) { GIVE(count, 2, ""); }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0xa0 + device, 16); TELL("%d", device); }
int cuDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:1B:00.%d", device);
    TELL("%d %d", size, device);
}
int cuDeviceCanAccessPeer(int *yes, int device, int peer) { GIVE(yes, 1, "%d %d", device, peer); }
int cuDeviceGetP2PAttribute(int *value, int which, int from, int to) {
    GIVE(value, from > to, "%d %d %d", which, from, to);
}
int cuDeviceGetAttribute(int *value, int which, int device) { GIVE(value, 1, "%d %d", which, device); }
int cuDevicePrimaryCtxRetain(u64 *context, int device) { GIVE(context, 0xc0 + device, "%d", device); }
int cuCtxPushCurrent_v2(u64 context) { TELL("%lx", context); }
int cuCtxPopCurrent_v2(u64 *context) { GIVE(context, 0xc0, ""); }
int cuCtxEnablePeerAccess(u64 context, u32 flags) { TELL("%lx %u", context, flags); }
int cuCtxSynchronize(void) { TELL(""); }
int cuMemAlloc_v2(u64 *address, size_t size) { GIVE(address, 0x7f0000001000, "%zu", size); }
int cuMemFree_v2(u64 address) { TELL("%lx", address); }
int cuMemsetD8Async(u64 address, unsigned char byte, size_t size, u64 stream) {
    TELL("%lx %d %zu %lx", address, byte, size, stream);
}
int cuMemcpyDtoHAsync_v2(int64_t *to, u64 from, size_t size, u64 stream) {
    GIVE(to, -5, "%lx %zu %lx", from, size, stream);
}
int cuMemcpyHtoDAsync_v2(u64 to, u64 from, size_t size, u64 stream) {
    TELL("%lx %lx %zu %lx", to, from, size, stream);
}
int cuMemcpyAsync(u64 to, u64 from, size_t size, u64 stream) {
    TELL("%lx %lx %zu %lx", to, from, size, stream);
}
int cuMemGetAddressRange_v2(u64 *base, size_t *size, u64 address) {
    *size = 1 << 21;
    GIVE(base, address & ~0xfffful, "%lx", address);
}
struct handle { unsigned char bytes[64]; };
int cuIpcGetMemHandle(struct handle *handle, u64 address) {
    memset(handle, 0xf7, 64);
    TELL("%lx", address);
}
int cuIpcOpenMemHandle_v2(u64 *address, struct handle handle, u32 flags) {
    GIVE(address, 0x7e0000000000, "%d..%d %u", handle.bytes[0], handle.bytes[63], flags);
}
int cuIpcCloseMemHandle(u64 address) { TELL("%lx", address); }
int cuPointerGetAttribute(u64 *value, int which, u64 address) {
    GIVE(value, which == 19 ? 0x7d0000000000 : 2 << 20, "%d %lx", which, address);
}
int cuMemRetainAllocationHandle(u64 *handle, u64 address) { GIVE(handle, 0xabc, "%lx", address); }
int cuMemExportToShareableHandle(int *fd, u64 handle, int kind, u64 flags) {
    GIVE(fd, 17, "%lx %d %lu", handle, kind, flags);
}
int cuMemImportFromShareableHandle(u64 *handle, u64 fd, int kind) {
    GIVE(handle, 0xdef, "%lu %d", fd, kind);
}
int cuMemAddressReserve(u64 *address, size_t size, size_t align, u64 at, u64 flags) {
    GIVE(address, 0x7c0000000000, "%zu %zu %lx %lu", size, align, at, flags);
}
int cuMemAddressFree(u64 address, size_t size) { TELL("%lx %zu", address, size); }
int cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
    TELL("%lx %zu %zu %lx %lu", address, size, offset, handle, flags);
}
int cuMemUnmap(u64 address, size_t size) { TELL("%lx %zu", address, size); }
int cuMemSetAccess(u64 address, size_t size, const int *access, size_t count) {
    TELL("%lx %zu kind=%d device=%d flags=%d %zu", address, size, access[0], access[1], access[2], count);
}
int cuMemRelease(u64 handle) { TELL("%lx", handle); }
int cuMemHostRegister_v2(u64 address, size_t size, u32 flags) { TELL("%lx %zu %u", address, size, flags); }
int cuMemHostUnregister(u64 address) { TELL("%lx", address); }
int cuStreamCreate(u64 *stream, u32 flags) { GIVE(stream, 0x51, "%u", flags); }
int cuStreamDestroy_v2(u64 stream) { TELL("%lx", stream); }
int cuStreamSynchronize(u64 stream) { TELL("%lx", stream); }
int cuStreamWaitEvent(u64 stream, u64 event, u32 flags) { TELL("%lx %lx %u", stream, event, flags); }
int cuStreamIsCapturing(u64 stream, int *status) { GIVE(status, stream == 0x52, "%lx", stream); }
int cuStreamWaitValue64_v2(u64 stream, u64 address, u64 value, u32 flags) {
    TELL("%lx %lx %lu %u", stream, address, value, flags);
}
int cuStreamWriteValue64_v2(u64 stream, u64 address, u64 value, u32 flags) {
    TELL("%lx %lx %lu %u", stream, address, value, flags);
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
    static __thread int now;
    int wanted = *mode;
    *mode = now;
    now = wanted;
    TELL("%d", wanted);
}
int cuEventCreate(u64 *event, u32 flags) { GIVE(event, 0xe1, "%u", flags); }
int cuEventRecord(u64 event, u64 stream) { TELL("%lx %lx", event, stream); }
int cuEventSynchronize(u64 event) { TELL("%lx", event); }
int cuEventQuery(u64 event) { TELL("%lx", event); }
int cuFuncGetParamInfo(u64 function, size_t number, size_t *offset, size_t *size) {
    (void)function;
    *offset = 8 * number;
    *size = 8;
    return number < 4 ? 0 : 1;
}
struct config { u32 grid[3], block[3], shared; u64 stream; void *attributes; u32 count; };
int cuLaunchKernelEx(const struct config *a, u64 function, int64_t **words, void **extra) {
    TELL("%lx grid=%ux%ux%u block=%ux%ux%u shared=%u stream=%lx attributes=%u %ld %ld %ld %ld extra=%d",
         function, a->grid[0], a->grid[1], a->grid[2], a->block[0], a->block[1], a->block[2], a->shared,
         a->stream, a->count, *words[0], *words[1], *words[2], *words[3], !!extra);
}
