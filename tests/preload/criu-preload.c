/*
 * Lets CRIU work in test nodes whose root lacks CAP_SYS_RESOURCE, as in most sandboxes and CI machines.
 *
 * CRIU needs that capability twice: to read the limits of tasks of another user, and to grow pipes
 * beyond /proc/sys/fs/pipe-max-size when it serves pages. Here the first falls back to
 * /proc/PID/limits, which anyone with ptrace access may read, and the second to a pipe of 1 MiB,
 * which CRIU fills in more rounds.
 *
 * Loaded by a wrapper named criu that test nodes have first in their PATH. It is never installed for
 * users: with full root it would change nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Largest pipe that is asked for instead of a refused size: the kernel's default pipe-max-size. */
#define PIPE_BYTES_MAX (1L << 20)
/* /proc/PID/limits pads the name of a limit to this column. */
#define LIMIT_VALUES_COLUMN 26

/* Lines of /proc/PID/limits, in the order of the RLIMIT_* numbers. */
static const char *const limit_names[RLIM_NLIMITS] = {
	"Max cpu time",	       "Max file size",	       "Max data size",	    "Max stack size",
	"Max core file size",  "Max resident set",     "Max processes",	    "Max open files",
	"Max locked memory",   "Max address space",    "Max file locks",    "Max pending signals",
	"Max msgqueue size",   "Max nice priority",    "Max realtime priority",
	"Max realtime timeout",
};

static rlim_t parse_limit(const char *text)
{
	return strcmp(text, "unlimited") ? strtoull(text, NULL, 10) : RLIM_INFINITY;
}

/* Reads one limit of a process from /proc; 0 if it is there. */
static int limit_from_proc(pid_t pid, unsigned int resource, struct rlimit *out)
{
	char path[64], line[256], soft[32], hard[32];
	int found = -1;

	if (resource >= RLIM_NLIMITS)
		return -1;
	snprintf(path, sizeof(path), "/proc/%d/limits", pid);
	FILE *file = fopen(path, "re");
	if (!file)
		return -1;
	while (found && fgets(line, sizeof(line), file)) {
		const char *name = limit_names[resource];
		if (strncmp(line, name, strlen(name)) || strlen(line) <= LIMIT_VALUES_COLUMN)
			continue;
		if (sscanf(line + LIMIT_VALUES_COLUMN, "%31s %31s", soft, hard) != 2)
			break;
		out->rlim_cur = parse_limit(soft);
		out->rlim_max = parse_limit(hard);
		found = 0;
	}
	fclose(file);
	return found;
}

/* The answer to a prlimit call that ended with `result`: a refused read is made up from /proc. */
static long answer_prlimit(long result, pid_t pid, unsigned int resource, const void *new_limit,
			   struct rlimit *old_limit)
{
	if (result == 0 || errno != EPERM || new_limit || !old_limit || pid == 0)
		return result;
	if (limit_from_proc(pid, resource, old_limit)) {
		errno = EPERM;
		return -1;
	}
	errno = 0;
	return 0;
}

int prlimit(pid_t pid, __rlimit_resource_t resource, const struct rlimit *new_limit,
	    struct rlimit *old_limit)
{
	int (*next)(pid_t, int, const void *, void *) = dlsym(RTLD_NEXT, "prlimit");
	long result = next(pid, resource, new_limit, old_limit);
	return answer_prlimit(result, pid, resource, new_limit, old_limit);
}

/* Same layout as struct rlimit on 64-bit machines. */
int prlimit64(pid_t pid, __rlimit_resource_t resource, const struct rlimit64 *new_limit,
	      struct rlimit64 *old_limit)
{
	return prlimit(pid, resource, (const void *)new_limit, (void *)old_limit);
}

/* CRIU makes the call by number as well, through libc's syscall(). */
long syscall(long number, ...)
{
	long (*next)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	long a[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	long result = next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number != SYS_prlimit64)
		return result;
	return answer_prlimit(result, (pid_t)a[0], (unsigned int)a[1], (void *)a[2],
			      (struct rlimit *)a[3]);
}

static int grow_pipe(const char *symbol, int fd, int command, long argument)
{
	int (*next)(int, int, ...) = dlsym(RTLD_NEXT, symbol);
	int result = next(fd, command, argument);
	if (result >= 0 || command != F_SETPIPE_SZ || errno != EPERM)
		return result;
	if (argument <= PIPE_BYTES_MAX || next(fd, F_GETPIPE_SZ) >= PIPE_BYTES_MAX)
		return result;
	return next(fd, command, PIPE_BYTES_MAX);
}

int fcntl(int fd, int command, ...)
{
	va_list list;
	va_start(list, command);
	long argument = va_arg(list, long);
	va_end(list);
	return grow_pipe("fcntl", fd, command, argument);
}

int fcntl64(int fd, int command, ...)
{
	va_list list;
	va_start(list, command);
	long argument = va_arg(list, long);
	va_end(list);
	return grow_pipe("fcntl64", fd, command, argument);
}
