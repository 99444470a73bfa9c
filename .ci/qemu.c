/* What qemu-user 7.2 lacks, linked into aarch64's test binaries by .ci/aarch64 and into nothing else.
 *
 * preadv2 is not handed on to the kernel. A doorbell is rung by a read that must not wait (src/sys/bell.rs): no link could be tested without.
 * A process cannot start one for another processor: a test that runs its own binary again has it run by qemu here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags) {
    if (flags & RWF_NOWAIT) {
        /* Another reader may come in between; a descriptor that blocks would wait then. */
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, 0) < 0)
            return -1;
        if (!(ready.revents & POLLIN)) {
            errno = EAGAIN;
            return -1;
        }
    }
    return offset == -1 ? readv(fd, iov, count) : preadv64(fd, iov, count, offset);
}

static int is_aarch64(const char *file) {
    Elf64_Ehdr header;
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? -1 : read(fd, &header, sizeof header);
    if (fd >= 0)
        close(fd);
    return len == sizeof header && !memcmp(header.e_ident, ELFMAG, SELFMAG) && header.e_machine == EM_AARCH64;
}

/* More arguments than a test has. */
enum { MOST = 64 };

static const char *with_qemu(const char *file, char *const argv[], char *with[MOST + 4]) {
    int len = 0;
    while (argv[len])
        len++;
    if (len == 0 || len > MOST || !is_aarch64(file))
        return NULL;
    with[0] = "qemu-aarch64";
    with[1] = "-L";
    with[2] = "/usr/aarch64-linux-gnu";
    with[3] = (char *)file;
    memcpy(with + 4, argv + 1, len * sizeof *argv);
    return with[0];
}

int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions, const posix_spawnattr_t *attributes, char *const argv[],
                 char *const envp[]) {
    int (*real)(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, char *const[], char *const[]) =
        dlsym(RTLD_NEXT, "posix_spawnp");
    char *with[MOST + 4];
    const char *qemu = with_qemu(file, argv, with);
    return qemu ? real(pid, qemu, actions, attributes, with, envp) : real(pid, file, actions, attributes, argv, envp);
}

int execvp(const char *file, char *const argv[]) {
    int (*real)(const char *, char *const[]) = dlsym(RTLD_NEXT, "execvp");
    char *with[MOST + 4];
    const char *qemu = with_qemu(file, argv, with);
    return qemu ? real(qemu, with) : real(file, argv);
}
