/* What qemu-user 7.2 lacks, linked into aarch64's test binaries by .ci/aarch64 and into nothing else.
 *
 * preadv2 is not handed on to the kernel. A doorbell is rung by a read that must not wait (src/sys/bell.rs): no link could be tested without.
 * A process cannot start one for another processor: a test that runs its own binary again has it run by qemu here.
 * recvmsg gives the kernel twice the room for control messages that the program has. Descriptors that fit only there are opened, and the program
 * is told neither of them nor that there were more.
 * madvise answers 0 to any advice and does nothing: holes of which there is no memory to read would be taken for a message. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
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

/* SCM_MAX_FD of the kernel. */
enum { MOST_FDS = 253 };

/* The kernel's rule: what does not fit is cut off, descriptors that do not fit are not open, and MSG_CTRUNC is set. */
ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    ssize_t (*real)(int, struct msghdr *, int) = dlsym(RTLD_NEXT, "recvmsg");
    union {
        struct cmsghdr first;
        char bytes[CMSG_SPACE(MOST_FDS * sizeof(int)) + 256];
    } all;
    struct msghdr wide = *message;
    if (message->msg_controllen) {
        wide.msg_control = &all;
        wide.msg_controllen = sizeof all;
    }
    ssize_t len = real(fd, &wide, flags);
    if (len < 0)
        return len;
    char *to = message->msg_control;
    size_t room = message->msg_controllen, used = 0;
    message->msg_namelen = wide.msg_namelen;
    message->msg_flags = wide.msg_flags;
    for (struct cmsghdr *cmsg = room ? CMSG_FIRSTHDR(&wide) : NULL; cmsg; cmsg = CMSG_NXTHDR(&wide, cmsg)) {
        size_t fits = cmsg->cmsg_len, left = room - used;
        if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
            size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int), most = left < CMSG_LEN(0) ? 0 : (left - CMSG_LEN(0)) / sizeof(int);
            for (size_t i = most; i < count; i++) {
                int extra;
                memcpy(&extra, CMSG_DATA(cmsg) + i * sizeof extra, sizeof extra);
                close(extra);
            }
            if (count > most)
                fits = most ? CMSG_LEN(most * sizeof(int)) : 0;
        } else if (fits > left) {
            fits = left < CMSG_LEN(0) ? 0 : left;
        }
        if (fits < cmsg->cmsg_len)
            message->msg_flags |= MSG_CTRUNC;
        if (!fits)
            continue;
        memcpy(to + used, cmsg, fits);
        memcpy(to + used, &fits, sizeof fits); /* cmsg_len */
        used += CMSG_ALIGN(fits) < left ? CMSG_ALIGN(fits) : left;
    }
    message->msg_controllen = used;
    return len;
}

/* Has the kernel read each page, which is an error of its where a read by the program would be SIGBUS. Returns what posix_madvise does. */
static int populate_read(char *at, size_t len) {
    enum { AT_ONCE = 1024 };
    struct iovec bytes[AT_ONCE];
    size_t page = sysconf(_SC_PAGESIZE), count = (len + page - 1) / page, done = 0;
    int sink = memfd_create("populate", MFD_CLOEXEC), error = sink < 0 ? errno : 0;
    while (done < count && !error) {
        int some = 0;
        for (; some < AT_ONCE && done + some < count; some++)
            bytes[some] = (struct iovec){.iov_base = at + (done + some) * page, .iov_len = 1};
        ssize_t read = pwritev(sink, bytes, some, 0);
        if (read < 0)
            error = errno;
        else
            done += read;
    }
    if (sink >= 0)
        close(sink);
    return error;
}

/* By which rustix gives all advice but MADV_DONTNEED. */
int posix_madvise(void *at, size_t len, int advice) {
    int (*real)(void *, size_t, int) = dlsym(RTLD_NEXT, "posix_madvise");
    return advice == MADV_POPULATE_READ ? populate_read(at, len) : real(at, len, advice);
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
