/* Makes writes to files fail in the process it is loaded into, as a disk that is full or broken does.
 *
 * The file ARMED holds an error number and a part of a path: what is written to files whose paths have that part fails
 * with that error, and so does having it written to the disk. While it is not there, all goes on. Programs that the
 * process starts are left alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define ARMED "/run/godwit-fail-writes"

static int fails(int file)
{
	char link[32], path[4096] = "", part[256];
	int number, saved = errno;
	FILE *armed = fopen(ARMED, "re");

	if (!armed) {
		errno = saved;
		return 0;
	}
	int found = fscanf(armed, "%d %255s", &number, part);

	fclose(armed);
	snprintf(link, sizeof link, "/proc/self/fd/%d", file);
	if (found == 2 && readlink(link, path, sizeof path - 1) > 0 && strstr(path, part)) {
		errno = number;
		return 1;
	}
	errno = saved;
	return 0;
}

__attribute__((constructor)) static void alone(void)
{
	unsetenv("LD_PRELOAD");
}

#define FAIL(type, name, parameters, arguments)                              \
	type name parameters                                                 \
	{                                                                    \
		static type (*real) parameters;                              \
		if (!real)                                                   \
			real = (type (*) parameters)dlsym(RTLD_NEXT, #name); \
		return fails(file) ? -1 : real arguments;                    \
	}

FAIL(ssize_t, write, (int file, const void *bytes, size_t count), (file, bytes, count))
FAIL(ssize_t, pwrite, (int file, const void *bytes, size_t count, off_t at), (file, bytes, count, at))
FAIL(ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), (file, bytes, count, at))
FAIL(int, ftruncate, (int file, off_t length), (file, length))
FAIL(int, ftruncate64, (int file, off64_t length), (file, length))
FAIL(int, fsync, (int file), (file))
FAIL(int, fdatasync, (int file), (file))
