/* Preloaded (LD_PRELOAD), lets reads of a file fail as on a broken disk: FAIL_FILE is a part of its path, FAIL_ERRNO the
   error, and FAIL_AFTER the number of reads that still succeed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int reads;

static int fails(int file) {
    const char *part = getenv("FAIL_FILE");
    char link[64], path[4096];
    ssize_t length;
    if (part == NULL || *part == 0) {
        reads = 0;
        return 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strstr(path, part) == NULL) return 0;
    if (getenv("FAIL_AFTER") && reads++ < atoi(getenv("FAIL_AFTER"))) return 0;
    errno = atoi(getenv("FAIL_ERRNO"));
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t read(int file, void *data, size_t size) {
    return fails(file) ? -1 : REAL(read)(file, data, size);
}
ssize_t pread(int file, void *data, size_t size, off_t offset) {
    return fails(file) ? -1 : REAL(pread)(file, data, size, offset);
}
ssize_t pread64(int file, void *data, size_t size, off64_t offset) {
    return fails(file) ? -1 : REAL(pread64)(file, data, size, offset);
}
