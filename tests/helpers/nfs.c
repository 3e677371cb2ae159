/* An imitation of NFS for tests: gcc -shared -fPIC -o nfs.so nfs.c -ldl; LD_PRELOAD=nfs.so NFS_ROOT=FOLDER PROGRAM

   Below NFS_ROOT: unlinking a file that this process has open or mapped renames it to .nfsXXXX, which cannot be
   unlinked meanwhile (EBUSY), so that its folder cannot be removed (ENOTEMPTY), and goes when it is closed; flushing a folder is EINVAL; locking a
   file for oneself that is open for reading alone is EBADF; with NFS_NO_LOCKS there are no locks (ENOLCK). */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static int below_root(const char *path) {
    const char *root = getenv("NFS_ROOT");
    return root && strncmp(path, root, strlen(root)) == 0;
}

static int handle_below_root(int handle) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below_root(path);
}

static int in_use(struct stat *file) {
    char path[512], line[8192];
    struct stat other;
    DIR *folder = opendir("/proc/self/fd");
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (entry->d_name[0] != '.' && fstat(atoi(entry->d_name), &other) == 0 && other.st_dev == file->st_dev &&
            other.st_ino == file->st_ino) {
            closedir(folder);
            return 1;
        }
    if (folder) closedir(folder);
    FILE *maps = fopen("/proc/self/maps", "r");
    int found = 0;
    while (maps && !found && fgets(line, sizeof line, maps)) {
        unsigned long inode = 0;
        if (sscanf(line, "%*s %*s %*s %*s %lu %511s", &inode, path) == 2) found = inode == file->st_ino && below_root(path);
    }
    if (maps) fclose(maps);
    return found;
}

static int removed(int folder, const char *name, int (*really)(int, const char *, int)) {
    static int number;
    struct stat file;
    int below = folder == AT_FDCWD ? below_root(name) : handle_below_root(folder);
    if (!below || fstatat(folder, name, &file, AT_SYMLINK_NOFOLLOW) || !S_ISREG(file.st_mode) || !in_use(&file))
        return really(folder, name, 0);
    const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name;
    if (strncmp(base, ".nfs", 4) == 0) return errno = EBUSY, -1;
    char aside[4096];
    snprintf(aside, sizeof aside, "%.*s.nfs%08d%08d", (int)(base - name), name, getpid(), number++);
    return renameat(folder, name, folder, aside);
}

int unlinkat(int folder, const char *name, int flags) {
    int (*really)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");
    return flags & AT_REMOVEDIR ? really(folder, name, flags) : removed(folder, name, really);
}

int unlink(const char *name) {
    return removed(AT_FDCWD, name, dlsym(RTLD_NEXT, "unlinkat"));
}

int fsync(int handle) {
    int (*really)(int) = dlsym(RTLD_NEXT, "fsync");
    struct stat status;
    if (fstat(handle, &status) == 0 && S_ISDIR(status.st_mode) && handle_below_root(handle)) return errno = EINVAL, -1;
    return really(handle);
}

int flock(int handle, int operation) {
    int (*really)(int, int) = dlsym(RTLD_NEXT, "flock");
    if (handle_below_root(handle)) {
        if (getenv("NFS_NO_LOCKS")) return errno = ENOLCK, -1;
        if ((operation & LOCK_EX) && (fcntl(handle, F_GETFL) & O_ACCMODE) == O_RDONLY) return errno = EBADF, -1;
    }
    return really(handle, operation);
}

int close(int handle) {
    int (*really)(int) = dlsym(RTLD_NEXT, "close");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    int result = really(handle);
    struct stat file;
    if (below_root(path) && strstr(path, "/.nfs") && stat(path, &file) == 0 && !in_use(&file)) unlink(path);
    return result;
}
